"""Bytes -> one picture: the formats that are documented, and nothing else.

Pillow knows some forty formats and tries them all; here it is asked for seven. What a damaged file
makes a decoder raise can be nearly anything, and becomes one sentence with the file's name.

What is decided about what a file may hold beside plain pixels:

- Several pages or frames: the first is read (`Look.pages`, counted in the set's notes).
- Transparency: left out; the colours below it stay (`Look.transparent`, counted).
- A rotation in EXIF data: not followed in JPEG, PNG and WebP, as in torchvision's and timm's own
  loading (`Look.turned`, counted). TIFF counts it among the image's own tags, and Pillow obeys.
- Palettes, CMYK and YCbCr become RGB by Pillow's tables; colour profiles are not applied.
- One bit becomes 0 and 255.
- TIFF whose zero is white is turned round, at any depth.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image

from core.errors import DataError
from core.load.intensities import Raw

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
FORMATS_SAID = "PNG, JPEG, BMP, WebP, TIFF, GIF or PPM"
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
)
MAX_PIXELS = 50_000_000
HEAD_BYTES = 4096
# Each costs Pillow a turn in Python: millions of empty ones would hold a reader up for minutes.
MAX_PARTS = 200_000
MAX_GIF_COMMENT = 2**20
ROTATION_TAG = 0x0112
SAMPLE_FORMAT, BITS_PER_SAMPLE, PHOTOMETRIC, PLANES = 339, 258, 262, 284
# Where strips and tiles begin, and how long they are.
PIECES_TAGS = (273, 279, 324, 325)
MIN_SAMPLE, MAX_SAMPLE, LOWEST_SAMPLE, HIGHEST_SAMPLE = 280, 281, 340, 341
# Limits of this share of what a floating-point type holds are limits of the type.
FULL_FLOAT = 0.99

NATIVE_MODES = {
    **dict.fromkeys(("I;16S", "I;16BS"), "I;16NS"),
    **dict.fromkeys(("I;32S", "I;32BS"), "I;32NS"),
    **dict.fromkeys(("F;32F", "F;32BF"), "F;32NF"),
}
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")

Stored = Image.Image | Raw

# Formats that people have and that are not read, by how their files begin.
OTHERS = (
    (0, b"DDS ", "DDS"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%PDF", "PDF"),
    (0, b"qoif", "QOI"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"PK\3\4", "zip"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (128, b"DICM", "DICOM"),
)

# What Pillow says of files that are odd or damaged would stand between our own lines.
warnings.filterwarnings("ignore", module=r"PIL\b")
logging.getLogger("PIL").addHandler(logging.NullHandler())


@cache
def _quieten_libtiff() -> None:
    """Keep libtiff, which Pillow brings, from writing to the terminal itself.

    Its messages go to the error stream of the process from C, past Python. What they are about
    Pillow raises as well. Where the library cannot be found they go on being written.
    """
    home = Path(PIL.__file__).parent
    places = [*home.parent.glob("pillow.libs/libtiff*"), *home.glob(".dylibs/libtiff*")]
    # Looked for elsewhere only where Pillow brings none: the search starts other programs.
    place = str(places[0]) if places else ctypes.util.find_library("tiff")
    try:
        library = ctypes.CDLL(place)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)
    except (OSError, AttributeError, TypeError):
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the first bytes of a file tell.

    Attributes:
        kind: NumPy's name of the stored type where it has more than eight bits, else None.
        pages: There is more than one page or frame.
        transparent: It has an alpha channel or a transparent colour.
        turned: It has a rotation in EXIF data that is not followed.
        inverted: It has more than eight bits and its zero is white.
        unreadable: Its first bytes could not be got at.
    """

    kind: str | None = None
    pages: bool = False
    transparent: bool = False
    turned: bool = False
    inverted: bool = False
    unreadable: bool = False


PLAIN = Look()


class _NotReadError(Exception):
    """What lies in a file is no damage, but nothing that is read: its text says what."""


def read_image(data: bytes, name: str) -> Stored:
    """Decode one image, refusing what is too large to be one.

    Args:
        data: The whole file.
        name: For messages.

    Returns:
        An RGB image where the file has at most eight bits a channel, else the stored pixels.

    Raises:
        DataError: Another format, broken, or more than `MAX_PIXELS` pixels.
    """
    other = other_format(data)
    if other:
        raise DataError(
            f'Image "{name}" cannot be read: it is a file of the format {other}. Save it as '
            f"{FORMATS_SAID}."
        )
    try:
        _check_parts(data)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f'Image "{name}" has {image.width} x {image.height} pixels; at most '
                f"{MAX_PIXELS:,} are read. Make it smaller."
            )
        return _decoded(image, data)
    except DataError:
        raise
    except _NotReadError as error:
        raise DataError(f'Image "{name}" cannot be read: it has {error}') from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f'Image "{name}" cannot be read: it claims more pixels than the {MAX_PIXELS:,} that '
            "are read. Make it smaller."
        ) from error
    except Exception as error:
        # A damaged file makes decoders raise nearly anything.
        kind = (
            "or a TIFF of a kind that is not read (64-bit numbers, or more than eight bits with "
            "an order of bytes or a zero that Pillow does not know). Save it as a 16-bit PNG"
            if data.startswith(TIFF_MARKS)
            else f"or no {FORMATS_SAID} image. Remove or replace it"
        )
        raise DataError(f'Image "{name}" cannot be read: it is damaged, {kind}.') from error


def other_format(data: bytes) -> str | None:
    """Return the name of a known format that is not read, by how the file begins."""
    return next((name for at, mark, name in OTHERS if data.startswith(mark, at)), None)


def _decoded(image: Any, data: bytes) -> Stored:
    if image.format == "PPM":
        portable = _portable(image, data)
        if portable is not None:
            return portable
    kind = _kind(image)
    if kind is None:
        if image.mode == "LAB":
            raise _NotReadError("colours stored as CIELAB, which are not read. Save it as RGB.")
        rgb: Image.Image = image.convert("RGB")
        return rgb
    if image.tile and image.tile[0].codec_name == "libtiff":
        _take_native_order(image)
    inverted = _inverted(image)
    form = _form(image.format, _raw_mode(image) if image.mode == "RGBA" else image.mode)
    documented, significant = None, None
    if image.format == "TIFF":
        documented = _documented(image, kind)
    elif image.format == "PNG":
        significant = _significant(data)
    if image.mode in ("RGB", "RGBA"):
        values = _both_bytes(image, data)
    else:
        values = np.asarray(image)
        if kind == "int8":
            values = values.view(np.int8)
        elif kind == "uint32":
            # Pillow keeps them in signed integers, bit for bit.
            values = values.view(np.uint32)
        values = values.astype(np.dtype(kind), copy=False)
    return Raw(
        values=np.array(values),
        kind=kind,
        documented=documented,
        significant=significant,
        inverted=inverted,
        form=form,
    )


def _form(file_format: str, mode: str) -> str:
    """Return a file's format and channels in words, such as "grey PNG"."""
    colour = "colour" if mode.startswith("RGB") else "grey"
    return f"{colour} {file_format}{' with transparency' if 'A' in mode else ''}"


def _take_native_order(image: Any) -> None:
    """Read numbers that libtiff unpacked in the machine's own order of bytes.

    Pillow 13 does so only for unsigned 16-bit numbers; signed and 32-bit ones of compressed
    big-endian files come out with their bytes in the wrong order.
    """
    (tile,) = image.tile
    native = NATIVE_MODES.get(tile.args[0], tile.args[0])
    image.tile = [tile._replace(args=(native, *tile.args[1:]))]


def _raw_mode(image: Any) -> str:
    args = image.tile[0].args if image.tile else ""
    return str(args[0]) if isinstance(args, tuple) and args else str(args)


def _kind(image: Any) -> str | None:
    """Return NumPy's name of the stored type where it has more than eight bits."""
    tags: Any = getattr(image, "tag_v2", None)
    if image.mode.startswith("I;16"):
        return "uint16"
    if image.mode == "F":
        return "float32"
    if image.format == "PPM" and image.tile[0].codec_name != "raw" and image.mode != "1":
        return "uint16" if image.tile[0].args[-1] > 255 else None
    signed = tags is not None and 2 in _numbers(tags.get(SAMPLE_FORMAT))
    if image.mode == "I":
        if tags is None:
            return "uint16"
        if 16 in _numbers(tags.get(BITS_PER_SAMPLE)):
            return "int16"
        return "int32" if signed else "uint32"
    if image.mode == "L" and signed:
        return "int8"
    apart = bool(tags) and image.mode != "L" and tags.get(PLANES) == 2
    if apart and max(_numbers(tags.get(BITS_PER_SAMPLE)), default=8) > 8:
        # Pillow would read the planes as if they had eight bits.
        raise _NotReadError(
            "16-bit colours in planes of their own, which are not read. Save it with its colours "
            "beside each other, or as PNG."
        )
    return "uint16" if ";16" in _raw_mode(image) and image.mode in ("RGB", "RGBA") else None


def _numbers(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple) else (value,)


def _inverted(image: Any) -> bool:
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(PHOTOMETRIC) == 0


def _documented(image: Any, kind: str) -> tuple[float, float] | None:
    """Return black and white as a TIFF's tags have them; None where they say nothing of use."""
    tags = image.tag_v2
    bits = _numbers(tags.get(BITS_PER_SAMPLE))
    if kind == "uint16" and bits and max(bits) < 16:
        return 0.0, float(2 ** max(bits) - 1)
    low = _numbers(tags.get(LOWEST_SAMPLE)) or _numbers(tags.get(MIN_SAMPLE)) or (0,)
    high = _numbers(tags.get(HIGHEST_SAMPLE)) or _numbers(tags.get(MAX_SAMPLE))
    if not high:
        return None
    try:
        black, white = float(min(low)), float(max(high))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not (np.isfinite(black) and np.isfinite(white) and black < white):
        return None
    kind_of = np.dtype(kind)
    if kind_of.kind in "iu" and white >= np.iinfo(kind_of).max:
        # What the type can hold is the tag's default, and says nothing of what is in it.
        return None
    if kind_of.kind == "f" and max(-black, white) >= FULL_FLOAT * float(np.finfo(kind_of).max):
        # As much of floating point; some programs round it.
        return None
    return black, white


def _both_bytes(image: Any, data: bytes) -> np.ndarray[Any, Any]:
    """Return 16-bit colours (height, width, 3).

    Pillow has no image of 16-bit colours and keeps the upper byte of each. It reads either order
    of bytes, though, and in the wrong order the upper byte is the lower one.
    """
    raw = _raw_mode(image)
    if raw == "LA;16B":
        # Grey and alpha, two bytes each, are as long as four channels of one.
        four = np.asarray(_again(image, data, raw, "RGBA"))
        grey = four[..., 0].astype(np.uint16) << 8 | four[..., 1]
        return np.repeat(grey[..., None], 3, axis=-1)
    if raw.startswith("RGBa"):
        raise _NotReadError(
            "16-bit colours multiplied by their transparency, which are not read. Save it without "
            "transparency."
        )
    order = raw[-1] if raw[-1] in "LB" else "L" if np.little_endian else "B"
    upper = np.asarray(_again(image, data, raw, raw[:-1] + order))[..., :3].astype(np.uint16)
    other = raw[:-1] + ("B" if order == "L" else "L")
    return upper << 8 | np.asarray(_again(image, data, raw, other))[..., :3]


def _again(image: Any, data: bytes, raw: str, wanted: str) -> Image.Image:
    again: Any = Image.open(io.BytesIO(data), formats=(image.format,))
    again.tile = [
        tile._replace(args=wanted if tile.args == raw else (wanted, *tile.args[1:]))
        for tile in again.tile
    ]
    return again


def _significant(data: bytes) -> int | None:
    """Return the significant bits that a PNG names for its channels; None where it names none."""
    for name, start, length in _png_parts(data):
        if name == b"sBIT" and length:
            return max(data[start : start + min(length, 3)])
        if name == b"IDAT":
            break
    return None


def _png_parts(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length of each chunk that begins within the bytes."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, length
        at += 12 + length


def _portable(image: Any, data: bytes) -> Stored | None:
    """Read the portable formats that Pillow reads number by number in Python.

    The same values come out (each file's own maximum becomes white) in a hundredth of the time,
    and 16-bit colours keep their lower byte. None where Pillow reads the pixels as a whole.
    """
    codec, _, start, args = image.tile[0]
    bands = len(image.getbands())
    count = image.width * image.height * bands
    shape = (image.height, image.width, *((bands,) if bands > 1 else ()))
    if codec == "raw":
        return None
    if bands not in (1, 3):
        raise ValueError("a private variant of the format")
    if codec == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b"", data[start:])
        if image.mode == "1":
            digits = np.frombuffer(b"".join(text.split())[:count], dtype=np.uint8)
            if digits.size < count or not np.isin(digits, (48, 49)).all():
                raise ValueError("not as many pixels of 0 and 1 as there should be")
            black = np.where(digits == 49, 0, 255).astype(np.uint8)
            return Image.fromarray(black.reshape(shape)).convert("RGB")
        if not re.fullmatch(rb"[0-9\s]*", text):
            raise ValueError("not numbers alone")
        numbers = np.fromstring(text, dtype=np.int64, sep=" ", count=count)
    else:
        wide = np.dtype(">u2" if args[-1] > 255 else "u1")
        numbers = np.frombuffer(data, dtype=wide, count=count, offset=start)
    most = int(args[-1])
    if numbers.size < count or numbers.min() < 0:
        raise ValueError("too few pixels")
    if codec == "ppm_plain" and numbers.max() > most:
        raise ValueError("pixels above the maximum")
    full = 65_535 if most > 255 else 255
    values = np.minimum(full, np.rint(numbers / most * full)).reshape(shape)
    if full == 255:
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    documented = (0.0, float(full)) if most < full else None
    form = "PGM" if bands == 1 else "PPM"
    return Raw(values=values.astype(np.uint16), kind="uint16", documented=documented, form=form)


def _check_parts(data: bytes) -> None:
    """Refuse files of so many parts that finding the pixels would take minutes.

    Raises:
        ValueError: There are more than any program writes.
    """
    if data.startswith(TIFF_MARKS):
        _quieten_libtiff()
        _check_tiff(io.BytesIO(data))
    if data.startswith(b"\x89PNG"):
        parts = sum(1 for _, _ in zip(range(MAX_PARTS), _png_parts(data), strict=False))
        if parts == MAX_PARTS:
            raise ValueError("too many chunks")
    elif data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data[:1] == b"P":
        # Comments are read letter by letter; a head of this length has room for some lines.
        Image.open(io.BytesIO(data[:HEAD_BYTES]), formats=("PPM",))


def _check_tiff(stream: BinaryIO) -> None:
    """Refuse more strips or tiles than any program writes: Pillow makes a list of them."""
    head = stream.read(16)
    order: Any = "little" if head.startswith(b"II") else "big"
    wide = b"+" in head[2:4]
    entry, count_at, size = (20, 4, 8) if wide else (12, 4, 4)
    stream.seek(int.from_bytes(head[8:16] if wide else head[4:8], order))
    entries = int.from_bytes(stream.read(size if wide else 2), order)
    for _ in range(min(entries, 2**16)):
        row = stream.read(entry)
        tag, count = row[:2], int.from_bytes(row[count_at : count_at + size], order)
        if int.from_bytes(tag, order) in PIECES_TAGS and count > MAX_PARTS:
            raise ValueError("too many strips or tiles")
        if len(row) < entry:
            return


def _check_jpeg(data: bytes) -> None:
    at = 2
    for _ in range(MAX_PARTS):
        at = data.find(b"\xff", at)
        if at < 0 or data[at + 1 : at + 2] in (b"\xda", b""):
            return
        marker = data[at + 1]
        bare = marker in (0, 1, 0xFF) or 0xD0 <= marker <= 0xD9
        at += 1 if marker == 0xFF else 2
        if not bare:
            at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError("too many segments")


def _check_gif(data: bytes) -> None:
    if len(data) < 13:
        return
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    parts = comment = 0
    while at < len(data) and data[at] != 0x2C and data[at] != 0x3B:
        if data[at] != 0x21:
            at += 1
            continue
        said = data[at + 1 : at + 2] == b"\xfe"
        at += 2
        while at < len(data) and data[at]:
            parts += 1
            comment += data[at] if said else 0
            if parts > MAX_PARTS or comment > MAX_GIF_COMMENT:
                raise ValueError("too many blocks before the first image")
            at += 1 + data[at]
        at += 1


def look_at(stream: BinaryIO) -> Look:
    """Return what the head of a file tells; nothing is decoded.

    A file that cannot be made sense of gives `PLAIN`: reading it will say what is wrong.

    Args:
        stream: An open file, at its start, that can be wound back.
    """
    head = stream.read(HEAD_BYTES)
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) > 26:
        return _look_at_png(head)
    if head.startswith(b"\xff\xd8"):
        at = head.find(b"Exif\0\0")
        return Look(turned=at >= 0 and _turned(head[at:])) if at >= 0 else PLAIN
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        flags = head[20] if head[12:16] == b"VP8X" and len(head) > 20 else 0
        lossless = head[12:16] == b"VP8L" and len(head) > 24 and bool(head[24] & 0x10)
        return Look(pages=bool(flags & 0x02), transparent=bool(flags & 0x10) or lossless)
    if not head.startswith((b"II", b"MM", b"GIF8", b"P")) or other_format(head):
        return PLAIN
    try:
        stream.seek(0)
        # A portable file's comments are read letter by letter, however long they are.
        if head.startswith(TIFF_MARKS):
            _check_tiff(stream)
            stream.seek(0)
        opened = io.BytesIO(head) if head.startswith(b"P") else stream
        image: Any = Image.open(opened, formats=("TIFF", "GIF", "PPM"))
        kind = _kind(image)
        return Look(
            kind=kind,
            pages=image.tag_v2.next != 0
            if image.format == "TIFF"
            else bool(getattr(image, "is_animated", False)),
            transparent=image.mode in ("RGBA", "LA", "La", "RGBa", "PA"),
            inverted=kind is not None and _inverted(image),
        )
    except Exception:
        # Damaged, as `read_image` will find.
        return PLAIN


def _look_at_png(head: bytes) -> Look:
    pages, turned = False, False
    transparent = head[25] in (4, 6)
    for name, start, length in _png_parts(head):
        if name == b"IDAT":
            break
        transparent |= name == b"tRNS"
        pages |= name == b"acTL"
        turned |= name == b"eXIf" and _turned(b"Exif\0\0" + head[start : start + length])
    kind = "uint16" if head[24] == 16 else None
    return Look(kind=kind, pages=pages, transparent=transparent, turned=turned)


def _turned(exif: bytes) -> bool:
    found = Image.Exif()
    try:
        found.load(exif)
        return found.get(ROTATION_TAG, 1) in range(2, 9)
    except Exception:
        # Damaged or cut off: what nobody can read turns nothing.
        return False
