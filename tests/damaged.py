"""Image files that are damaged, cut off, mislabelled or of another format, from a seed.

Every file starts as a valid one of `valid_images` (each documented format in the modes it can
hold, and formats that are not documented) and is then changed in ways that files get changed.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image, TiffImagePlugin

SIDE = 24
# What a field of a header is overwritten with: the ends of the usual types, and near them.
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)
# As a camera held sideways writes it.
SIDEWAYS = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


@cache
def valid_images() -> dict[str, bytes]:
    """Valid files by "FORMAT mode"; those of undocumented formats begin with "other"."""
    chooser = np.random.default_rng(0)
    colours = chooser.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    base = Image.fromarray(colours)
    found: dict[str, bytes] = {}

    def keep(name: str, image: Image.Image, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[f"{kind} {name}"] = buffer.getvalue()

    deep = Image.fromarray(chooser.integers(0, 65_536, (SIDE, SIDE), dtype=np.uint16))
    whole = Image.fromarray(chooser.integers(-(2**31), 2**31, (SIDE, SIDE), dtype=np.int32))
    real = Image.fromarray(chooser.random((SIDE, SIDE), dtype=np.float32))
    modes = {each: base.convert(each) for each in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK")}
    modes["RGBA"].putalpha(modes["L"])
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        keep(mode, modes[mode], "PNG")
    keep("I;16", deep, "PNG")
    keep("animated", base, "PNG", save_all=True, append_images=[modes["RGB"].rotate(90)])
    found["PNG RGB;16"] = png_16(chooser.integers(0, 65_536, (SIDE, SIDE, 3), dtype=np.uint16))
    found["PNG LA;16"] = png_16(chooser.integers(0, 65_536, (SIDE, SIDE, 2), dtype=np.uint16))
    for mode in ("L", "RGB", "CMYK"):
        keep(mode, modes[mode], "JPEG", exif=SIDEWAYS)
    keep("progressive", base, "JPEG", progressive=True, comment=b"words")
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        keep(mode, modes[mode], "BMP")
    for name, options in (("lossy", {}), ("lossless", {"lossless": True})):
        keep(name, modes["RGBA"], "WEBP", **options)
    keep("animated", base, "WEBP", save_all=True, append_images=[base.rotate(90)])
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"):
        keep(mode, modes[mode], "TIFF")
    for name, image in (("I;16", deep), ("I", whole), ("F", real), ("RGB", base)):
        for way in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
            keep(f"{name} {way}", image, "TIFF", compression=way)
    keep("jpeg", base, "TIFF", compression="jpeg")
    keep("group4", modes["1"], "TIFF", compression="group4")
    keep("LAB", base.convert("LAB"), "TIFF")
    keep("pages", base, "TIFF", save_all=True, append_images=[modes["L"], deep])
    keep("range", real, "TIFF", tiffinfo=documented_range(0.0, 1.0))
    keep("P", modes["P"], "GIF", comment=b"words")
    keep("animated", modes["P"], "GIF", save_all=True, append_images=[modes["L"]])
    for mode in ("1", "L", "RGB"):
        keep(mode, modes[mode], "PPM")
    keep("F", real, "PPM")
    found["PPM deep"] = b"P5 24 24 4095\n" + chooser.integers(0, 4096, 576).astype(">u2").tobytes()
    found["PPM wide"] = b"P6 8 8 60000\n" + chooser.integers(0, 60_000, 192).astype(">u2").tobytes()
    found["PPM plain"] = b"P3 # words\n4 4 15\n" + b" ".join(b"%d" % (i % 16) for i in range(48))
    found["PPM bits"] = b"P1 8 2\n" + b"01" * 8
    for kind in ("AVIF", "DDS", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "MSP", "QOI"):
        keep("", modes["1"] if kind == "MSP" else base, kind)
        found[f"other {kind}"] = found.pop(f"{kind} ")
    keep("", real, "SPIDER")
    found["other SPIDER"] = found.pop("SPIDER ")
    return found


def documented_range(low: float, high: float) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Tags SMinSampleValue and SMaxSampleValue."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((340, low), (341, high)):
        tags[tag] = value
        tags.tagtype[tag] = 12 if isinstance(value, float) else 3
    return tags


def png_16(values: np.ndarray, *, significant: int | None = None) -> bytes:
    """A PNG of 16 bits a channel, written by the letter: (height, width[, channels])."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    head = struct.pack(
        ">IIBBBBB",
        values.shape[1],
        values.shape[0],
        16,
        {1: 0, 2: 4, 3: 2, 4: 6}[channels],
        0,
        0,
        0,
    )
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", head)]
    if significant is not None:
        chunks.append((b"sBIT", bytes([significant] * channels)))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def damaged_images(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield names that end as images do, and bytes; the same ones for the same seed.

    Args:
        seed: Which ones.
        count: How many.
    """
    chooser = np.random.default_rng(seed)
    valid = valid_images()
    names = sorted(valid)
    suffixes = (".png", ".jpg", ".bmp", ".webp", ".tif", ".gif", ".ppm", ".pgm")
    for number in range(count):
        kind = names[chooser.integers(len(names))]
        content = bytearray(valid[kind])
        ways = []
        for _ in range(chooser.integers(1, 4)):
            way = WAYS[chooser.integers(len(WAYS))]
            ways.append(way.__name__.strip("_"))
            content = way(content, chooser)
        if kind.startswith("PNG") and chooser.random() < 0.5:
            # Or nearly all damage would end at a checksum.
            content = _resummed(content)
        label = kind.replace(" ", "-").replace(";", "")
        suffix = suffixes[chooser.integers(len(suffixes))]
        yield f"{number}-{label}-{'-'.join(ways)}{suffix}", bytes(content)


def _place(content: bytearray, chooser: np.random.Generator) -> int:
    # Half of all hits go to the head, where one byte changes what all others mean.
    near = min(len(content), 160)
    return int(chooser.integers(near if chooser.random() < 0.5 else len(content)))


def _flipped(content: bytearray, chooser: np.random.Generator) -> bytearray:
    for _ in range(chooser.integers(1, 9)) if content else ():
        content[_place(content, chooser)] ^= 1 << int(chooser.integers(8))
    return content


def _written(content: bytearray, chooser: np.random.Generator) -> bytearray:
    for _ in range(chooser.integers(1, 9)) if content else ():
        content[_place(content, chooser)] = int(chooser.integers(256))
    return content


def _extreme(content: bytearray, chooser: np.random.Generator) -> bytearray:
    if len(content) > 4:
        at = _place(content, chooser)
        value = EXTREMES[chooser.integers(len(EXTREMES))]
        form = ("<I", ">I", "<H", ">H")[chooser.integers(4)]
        size = struct.calcsize(form)
        content[at : at + size] = struct.pack(form, value & (256**size - 1))
    return content


def _cut(content: bytearray, chooser: np.random.Generator) -> bytearray:
    return content[: chooser.integers(len(content) + 1)]


def _lengthened(content: bytearray, chooser: np.random.Generator) -> bytearray:
    return content + chooser.bytes(int(chooser.integers(1, 4096)))


def _removed(content: bytearray, chooser: np.random.Generator) -> bytearray:
    at = int(chooser.integers(len(content) + 1))
    del content[at : at + int(chooser.integers(1, 64))]
    return content


def _repeated(content: bytearray, chooser: np.random.Generator) -> bytearray:
    at = int(chooser.integers(len(content) + 1))
    piece = content[at : at + int(chooser.integers(1, 256))]
    return content[:at] + piece * int(chooser.integers(1, 5)) + content[at:]


def _joined(content: bytearray, chooser: np.random.Generator) -> bytearray:
    valid = valid_images()
    other = valid[sorted(valid)[chooser.integers(len(valid))]]
    at = int(chooser.integers(len(content) + 1))
    return content[:at] + other[int(chooser.integers(len(other))) :]


def _moved(content: bytearray, chooser: np.random.Generator) -> bytearray:
    first, second = (int(chooser.integers(len(content) + 1)) for _ in range(2))
    length = int(chooser.integers(1, 32))
    content[first : first + length] = content[second : second + length]
    return content


def _resummed(content: bytearray) -> bytearray:
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return content


WAYS = (
    *(_flipped, _written, _extreme, _cut, _lengthened),
    *(_removed, _repeated, _joined, _moved),
)
