"""Zip files whose table of contents is bounded before it is read.

A table of a million members takes gigabytes once Python has read it, and one that two readers
understand differently shows each of them another file. Both are refused here.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from core.files.inputs import in_words, open_input

# Bytes of a table of contents: 200,000 members with names of 250 letters.
MAX_TABLE_BYTES = 64 * 2**20
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20
_LONGEST_COMMENT = 2**16


class ArchiveError(ValueError):
    """No zip file that can be meant; the message is a phrase for people."""


def table_of(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return where a zip file's table of contents begins, its bytes, and the place behind it.

    The last number is how many bytes follow the record that ends the file.

    Raises:
        ArchiveError: There is none, or it is larger than `MAX_TABLE_BYTES`.
    """
    size = file.seek(0, 2)
    first = max(0, size - _LONGEST_COMMENT - _END.size)
    file.seek(first)
    tail = file.read()
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise ArchiveError("it has no table of contents at its end")
    *_, table_bytes, start, _ = _END.unpack_from(tail, place)
    end = first + place
    before = end - _LOCATOR_BYTES - _END_64.size
    if before >= 0:
        file.seek(before)
        record = file.read(_END_64.size + 4)
        if record.startswith(b"PK\6\6") and record.endswith(b"PK\6\7"):
            *_, table_bytes, start = _END_64.unpack_from(record)
            end = before
    if table_bytes > MAX_TABLE_BYTES:
        raise ArchiveError(f"its table of contents is larger than {in_words(MAX_TABLE_BYTES)}")
    return start, table_bytes, end, len(tail) - place - _END.size


def opened_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file to read members on demand.

    Raises:
        ArchiveError: Damaged, or its table of contents is too large.
        OSError: It cannot be opened; see `core.files.inputs`.
    """
    with open_input(path) as file:
        table_of(file)
    try:
        return zipfile.ZipFile(path)
    except Exception as error:
        # Damaged archives raise nearly anything; so do those of later formats.
        raise ArchiveError("it is damaged") from error


def stored_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a zip file that is exactly what its table says, nothing compressed.

    So it is what every reader of zip files takes it for, and no larger once read.

    Raises:
        ArchiveError: Something is compressed or encrypted, two members have one name or share
            bytes, or bytes lie before, between or behind where the table says.
        OSError: It cannot be opened.
    """
    with opened_zip(path) as archive, open_input(path) as file:
        start, table_bytes, end, more = table_of(file)
        if more or archive.start_dir != start or start + table_bytes != end:
            raise ArchiveError("its table of contents is not where it says")
        infos = archive.infolist()
    packed = [
        info
        for info in infos
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
    ]
    if packed:
        info = max(packed, key=lambda info: info.file_size)
        raise ArchiveError(
            f'"{info.filename[:80]}" in it is compressed ({in_words(info.compress_size)} that '
            f"stand for {in_words(info.file_size)}), which PyTorch never does"
        )
    members: dict[str, zipfile.ZipInfo] = {}
    behind = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.flag_bits & 1:
            raise ArchiveError("it is encrypted")
        if info.filename in members or info.header_offset < behind:
            raise ArchiveError(f'two of its members share the name or place "{info.filename[:80]}"')
        behind = info.header_offset + info.file_size
        if behind > start:
            raise ArchiveError(f'"{info.filename[:80]}" in it is cut off')
        members[info.filename] = info
    return members
