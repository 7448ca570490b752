"""Files that are small on disk and huge in memory, and sound in every other way."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import torch

# The name of a weight does not matter: a reader has all of it in memory before it looks.
NAME = "conv1.weight"
STORED = 7
BLOCK = bytes(1 << 20)


def checkpoint_bomb(size: int) -> bytes:
    """Return a state dict as torch writes it, whose one tensor is `size` zeros, deflated.

    Args:
        size: Bytes that a reader allocates; below 4 GiB, so that no ZIP64 is needed.
    """
    plain = io.BytesIO()
    torch.save({NAME: torch.zeros(STORED, dtype=torch.uint8)}, plain)
    members = []
    with zipfile.ZipFile(plain) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("/data.pkl"):
                # BININT1 7, the sizes of storage and tensor, becomes a LONG1 of five bytes.
                long = b"\x8a\x05" + struct.pack("<Q", size)[:5]
                data = data.replace(b"K" + bytes([STORED]), long)
            if name.endswith("/data/0"):
                members.append((name, zipfile.ZIP_DEFLATED, _zeros_crc(size), _zeros(size), size))
            else:
                members.append((name, zipfile.ZIP_STORED, zlib.crc32(data), data, len(data)))
    return _archive(members)


def _zeros(size: int) -> bytes:
    """Return that many zeros, deflated: one block's bytes again and again, not deflated anew."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    blocks, rest = divmod(size, len(BLOCK))
    first = packer.compress(BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * (blocks - 1) + packer.compress(bytes(rest)) + packer.flush()


def _zeros_crc(size: int) -> int:
    found, blocks = 0, bytes(1 << 26)
    for _ in range(size // len(blocks)):
        found = zlib.crc32(blocks, found)
    return zlib.crc32(blocks[: size % len(blocks)], found)


def _archive(members: list[tuple[str, int, int, bytes, int]]) -> bytes:
    # `zipfile` deflates whatever it writes itself, which for gigabytes takes half a minute.
    out, directory = io.BytesIO(), b""
    for name, method, crc, data, size in members:
        start, path = out.tell(), name.encode()
        head = struct.pack(
            "<HHHHHIIIHH", 20, 0, method, 0, 0x21, crc, len(data), size, len(path), 0
        )
        out.write(b"PK\3\4" + head + path + data)
        directory += b"PK\1\2" + struct.pack("<H", 20) + head
        directory += struct.pack("<HHHII", 0, 0, 0, 0, start) + path
    start = out.tell()
    count = len(members)
    out.write(directory)
    out.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), start, 0))
    return out.getvalue()
