"""Arrays of an npz file: their headers first, their bytes as they come, nothing on trust.

`numpy.load` makes room for whatever a header says and unpacks whatever comes. Here the headers
are read first, so that a caller can refuse what is too large, and an array is unpacked in pieces
and refused as soon as it is not what its header says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from core.files.inputs import CHUNK, in_words
from core.load.archives import ArchiveError, opened_zip

MAX_ARRAYS = 64
MAX_HEADER_BYTES = 2**16
# Deflate cannot do better than 1,032 to 1, and no images come near this.
MAX_RATIO = 200
# Arrays up to this size may be all zeros: labels, masks, tiny sets.
SMALL_BYTES = 64 * 2**20


class ArrayError(ValueError):
    """No array that can be meant; the message is a phrase for people."""


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """What an array says of itself.

    Attributes:
        member: Its name in the file.
        shape: Its shape.
        dtype: Its type; never of Python objects.
        columns_first: Whether its numbers lie in the order of Fortran.
        bytes: What its numbers take.
    """

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    columns_first: bool
    bytes: int


def array_headers(path: Path) -> dict[str, ArrayHeader]:
    """Return the headers of the arrays in an npz file, by name; no number is read.

    Raises:
        ArrayError: Damaged, not of plain arrays, too many of them, or one that unpacks to far
            more than images do.
        OSError: It cannot be opened; see `core.files.inputs`.
    """
    headers: dict[str, ArrayHeader] = {}
    try:
        with opened_zip(path) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if len(infos) > MAX_ARRAYS:
                raise ArrayError(f"it holds {len(infos):,} arrays; at most {MAX_ARRAYS} are read")
            for info in infos:
                with archive.open(info) as member:
                    header = _header(member, info.filename)
                if header.bytes > SMALL_BYTES and header.bytes > MAX_RATIO * info.compress_size:
                    raise ArrayError(
                        f'"{info.filename[:80]}" would unpack {in_words(info.compress_size)} to '
                        f"{in_words(header.bytes)}, which no images do"
                    )
                headers[info.filename.removesuffix(".npy")] = header
    except (ArrayError, OSError):
        raise
    except ArchiveError as error:
        raise ArrayError(str(error)) from error
    except Exception as error:
        # Damaged files raise nearly anything.
        raise ArrayError("it is damaged, or holds more than numbers") from error
    return headers


class _HeaderReader:
    """A member of which only as much is read as a header can have; NumPy asks for what it says."""

    def __init__(self, member: IO[bytes]) -> None:
        self.member = member

    def read(self, count: int) -> bytes:
        """Return so many bytes.

        Raises:
            ArrayError: More than a header has.
        """
        if count > MAX_HEADER_BYTES:
            raise ArrayError("the header of an array is too long")
        return self.member.read(count)


def _header(opened: IO[bytes], name: str) -> ArrayHeader:
    member: Any = _HeaderReader(opened)
    version = npy.read_magic(member)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ArrayError(f'"{name[:80]}" is of a later format')
    shape, columns_first, dtype = read(member)
    if dtype.hasobject or any(side < 0 for side in shape):
        raise ArrayError(f'"{name[:80]}" holds more than numbers')
    return ArrayHeader(name, shape, dtype, columns_first, math.prod(shape) * dtype.itemsize)


def read_arrays(path: Path, headers: Mapping[str, ArrayHeader]) -> dict[str, np.ndarray]:
    """Return arrays whose headers were read before, by name, in the shapes the headers give.

    Raises:
        ArrayError: One holds fewer or more numbers than it says, or is damaged.
        OSError: It cannot be opened; see `core.files.inputs`.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with opened_zip(path) as archive:
            for name, header in headers.items():
                with archive.open(header.member) as member:
                    if _header(member, header.member) != header:
                        raise ArrayError("it changed while it was read")
                    arrays[name] = _numbers(member, header)
    except (ArrayError, OSError):
        raise
    except MemoryError as error:
        raise ArrayError("there is not enough memory for it") from error
    except Exception as error:
        raise ArrayError("it is damaged") from error
    return arrays


def _numbers(member: IO[bytes], header: ArrayHeader) -> np.ndarray:
    # Room that is not written to is not taken, so that a header that lies costs nothing.
    flat = np.empty(header.bytes, dtype=np.uint8)
    place = 0
    while place < header.bytes:
        part = member.read(min(CHUNK, header.bytes - place))
        if not part:
            raise ArrayError(f'"{header.member[:80]}" holds less than its header says')
        flat[place : place + len(part)] = np.frombuffer(part, dtype=np.uint8)
        place += len(part)
    if member.read(1):
        raise ArrayError(f'"{header.member[:80]}" holds more than its header says')
    order = "F" if header.columns_first else "C"
    array: np.ndarray = flat.view(header.dtype).reshape(header.shape, order=order)  # type: ignore[call-overload]
    return array
