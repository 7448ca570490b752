"""Which stored number is black and which is white, where an image has more than eight bits.

A network takes pixels of 8 bits, as the photographs it was trained on had. X-rays and microscopy
store 10 to 32 bits or floating point. Cut off at 255 they would be white; stretched image by image
they would lose what tells one image from the next. So one range is taken for all images of a set
that are stored alike, from its training images, and everything is mapped by it.

The rule, in this order (each in `range_of`):

1. What every training image documents: BitsPerSample below the container's, SMinSampleValue and
   SMaxSampleValue, or MaxSampleValue of a TIFF; the maxval of a PGM or PPM. Believed where the
   pixels lie within it and, unless it is a number of bits, fill more than 8 of its 256 steps: the
   limits of a type would make every pixel one grey.
2. Whole numbers from 0 to 65,535, floating point that holds such included: 8-bit values that were
   widened (all multiples of 257, as the PNG specification widens them) take the full 16 bits;
   else the smallest of `DEPTHS` that holds the largest pixel, because detectors of 10, 12 or 14
   bits write into containers of 16. The significant bits of a PNG (sBIT) are a lower bound.
3. Whole numbers of 32 bits that are widened 8-bit values take the full 32 bits.
4. Floating point from 0 to 1, or from 0 to 255, by the convention of most libraries; believed where
   the brightest pixel reaches a quarter of it, so that faint data do not come out black.
5. Anything else (negative numbers, counts beyond 65,535, other floating point) goes from the
   lowest to the highest pixel that was measured.

Images of 8 bits are no matter of this room: they stay as they are.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from core.errors import DataError
from core.records import IntensityRange
from core.records.outline import STORED_AS, stored_number

DEPTHS = (8, 10, 12, 14, 16)
CONVENTIONS = (1.0, 255.0)
# A convention is believed where the brightest pixel reaches this share of it, two bits less.
BELIEVED_FROM = 0.25
# Documented limits are believed where the pixels fill this share of them, 8 steps of 256.
FILLED_FROM = 1 / 32
# 255 becomes 65,535 and 4,294,967,295 times these.
WIDENED_16, WIDENED_32 = 257, 16_843_009
BINS = 64
# An image is cut where this share of its pixels lies beyond black or white by 8 steps of 256 or
# more: so far the brightest pixel varies from any few images to the next.
CUT_FROM, CUT_BY = 1 / 1_000, 1 / 32
# Forms of file whose brightest pixels are so many times apart hold different scales.
SCALES_APART = 2
# A form goes with a class where its share of one class is so much larger than of another.
GOES_WITH = 0.5
# Values an image gives to the histogram.
SAMPLED = 256
ROWS_AT_ONCE = 2**20

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """Pixels of more than eight bits, as they are stored.

    Attributes:
        values: (height, width), or (height, width, 3) for colours.
        kind: The NumPy name of their type, such as "uint16".
        documented: Black and white as the file names them; None where it does not.
        significant: How many bits the file calls significant; None where it does not.
        inverted: The lowest number is white.
        form: The file's format and channels in words; empty where there is no file.
    """

    values: Array
    kind: str
    documented: tuple[float, float] | None = None
    significant: int | None = None
    inverted: bool = False
    form: str = ""


@dataclass(slots=True)
class Tally:
    """What is known of the pixels of images that are stored alike, image by image."""

    kind: str
    images: int = 0
    low: float = math.inf
    high: float = -math.inf
    whole: bool = True
    widened_16: bool = True
    widened_32: bool = True
    documented: list[tuple[float, float] | None] = field(default_factory=list)
    significant: list[int | None] = field(default_factory=list)
    sampled: list[Array] = field(default_factory=list)

    def add(self, raw: Raw, name: str) -> None:
        """Take one image in.

        Raises:
            DataError: It holds NaN or infinity.
        """
        check_finite(raw, name)
        values = raw.values
        self.images += 1
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        if values.dtype.kind == "f":
            self.whole = self.whole and bool((values == np.rint(values)).all())
        # Looked at only while it may be true: a remainder of each pixel takes a while.
        for kind, unit, size in (("widened_16", WIDENED_16, 2), ("widened_32", WIDENED_32, 4)):
            if getattr(self, kind):
                fits = self.whole and values.dtype.itemsize >= size
                setattr(self, kind, fits and bool((values % unit == 0).all()))
        self.documented.append(raw.documented)
        self.significant.append(raw.significant)
        flat = values.reshape(-1)
        self.sampled.append(flat[:: max(1, flat.size // SAMPLED)][:SAMPLED].astype(np.float64))


@dataclass(slots=True)
class Beyond:
    """How far images that a range was not taken from go beyond its black and white."""

    range: IntensityRange
    images: int = 0
    cut: int = 0
    low: float = math.inf
    high: float = -math.inf
    inverted: bool = False

    def add(self, raw: Raw) -> None:
        """Take one image in."""
        values, known = raw.values, self.range
        self.images += 1
        # Halves, because the difference of two doubles may be beyond the largest one.
        more = (known.high / 2 - known.low / 2) * CUT_BY * 2
        beyond = (values < np.float64(known.low - more)) | (values > np.float64(known.high + more))
        if np.count_nonzero(beyond) >= CUT_FROM * values.size:
            self.cut += 1
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))
            self.inverted = raw.inverted

    @property
    def sentence(self) -> str | None:
        """What is lost of these images; None where nothing is."""
        if not self.cut:
            return None
        known = self.range
        width = max(known.high / 2 - known.low / 2, sys.float_info.min)
        lower, upper = ("white", "black") if self.inverted else ("black", "white")
        ends = [
            f"beyond {name}, to {stored_number(reached)} where {name} is {stored_number(limit)} "
            f"({1 + over / width:.3g} times the range)"
            for name, limit, reached, over in (
                (upper, known.high, self.high, self.high / 2 - known.high / 2),
                (lower, known.low, self.low, known.low / 2 - self.low / 2),
            )
            if over > 0
        ]
        share = self.cut / self.images
        return (
            f"{self.cut:,} of {self.images:,} {STORED_AS.get(known.kind, known.kind)} validation "
            f"images that were looked at ({share * 100:.3g}%) {'goes' if self.cut == 1 else 'go'} "
            f"{' and '.join(ends)}. Black and white are taken from the training images, and what "
            "lies outside is cut off: store both parts in one scale."
        )


@dataclass(slots=True)
class Forms:
    """How bright the images of one stored type are in each form of file, and where these lie.

    A type says how many bits are stored, not how many are in use: 12 bits as they are in a PNG,
    and 12 bits that the reader of PGM has widened to 16, are both "uint16".
    """

    kind: str
    brightest: dict[str, float] = field(default_factory=dict)
    by_class: dict[str, Counter[str]] = field(default_factory=dict)
    by_part: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, raw: Raw, *, label: str, part: str) -> None:
        """Take one image in.

        Args:
            raw: The image.
            label: Its class.
            part: Training or validation.
        """
        reach = max(abs(float(raw.values.min())), abs(float(raw.values.max())))
        self.brightest[raw.form] = max(reach, self.brightest.get(raw.form, 0.0))
        self.by_class.setdefault(label, Counter())[raw.form] += 1
        self.by_part.setdefault(part, Counter())[raw.form] += 1

    @property
    def sentence(self) -> str | None:
        """What one range for all of them may do; None where their scales are alike."""
        # Of images that are all black nobody can tell the scale.
        order = sorted((top, form) for form, top in self.brightest.items() if top > 0)
        if len(order) < 2 or order[-1][0] <= SCALES_APART * order[0][0]:
            return None
        shown = ", ".join(f"{form} to {stored_number(top)}" for top, form in order)
        dark = {form for top, form in order if order[-1][0] > SCALES_APART * top}
        kind = STORED_AS.get(self.kind, self.kind)
        said = (
            f"{kind[0].upper()}{kind[1:]} images come in {len(order)} forms whose brightest pixels "
            f"are more than {SCALES_APART} times apart: {shown}. One black and one white hold for "
            "all, so different scales show as different brightness."
        )
        for groups, what in ((self.by_class, "class"), (self.by_part, "part")):
            shares = {
                name: sum(forms[form] for form in dark) / forms.total()
                for name, forms in groups.items()
            }
            most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
            if shares[most] - shares[least] >= GOES_WITH:
                said += (
                    f" This goes with the {what}: {shares[most]:.0%} of "
                    f'"{most}" and {shares[least]:.0%} of "{least}" come in the darker form'
                    f"{'' if len(dark) == 1 else 's'}, "
                    + (
                        "so brightness alone may tell the classes apart and no result shows what "
                        "the images hold."
                        if what == "class"
                        else "so validation is unlike training."
                    )
                )
        return f"{said} Store all in one form and scale."


def check_finite(raw: Raw, name: str) -> None:
    """Refuse pixels that are no numbers: any place on the way from black to white would be a guess.

    Raises:
        DataError: It holds NaN or infinity; the message names it.
    """
    if raw.values.dtype.kind != "f":
        return
    odd = int(raw.values.size - np.isfinite(raw.values).sum())
    if odd:
        what = "1 pixel that is" if odd == 1 else f"{odd:,} pixels that are"
        raise DataError(
            f'Image "{name}" has {what} NaN or infinite. Give each a value, or remove the image.'
        )


def range_of(tally: Tally, *, images: int) -> IntensityRange:
    """Return black and white for all images that are stored like those of the tally.

    Args:
        tally: Of one training image at least.
        images: How many images of the set are stored so, for the record.
    """
    low, high, source = _ends(tally)
    if not high > low:
        high = low + max(1.0, abs(low) / 2**20)
    sampled = np.concatenate(tally.sampled)
    shown = (min(low, tally.low), max(high, tally.high))
    steps = np.minimum(BINS - 1, (_share(sampled, *shown) * BINS).astype(np.int64))
    counts = np.bincount(steps, minlength=BINS)
    return IntensityRange(
        kind=tally.kind,
        images=images,
        low=low,
        high=high,
        source=source,
        lowest=tally.low,
        highest=tally.high,
        measured_images=tally.images,
        histogram=tuple(int(count) for count in counts),
    )


def _ends(tally: Tally) -> tuple[float, float, Any]:
    documented = [ends for ends in tally.documented if ends is not None]
    if len(documented) == tally.images:
        low, high = min(ends[0] for ends in documented), max(ends[1] for ends in documented)
        if low <= tally.low and tally.high <= high and _filled(tally, low, high):
            return low, high, "documented"
    if tally.whole and tally.low >= 0 and tally.high <= 2 ** DEPTHS[-1] - 1:
        return _ends_of_whole(tally)
    if tally.whole and tally.low >= 0 and tally.widened_32 and tally.high <= 2**32 - 1:
        return 0.0, float(2**32 - 1), "widened"
    if tally.low >= 0 and np.dtype(tally.kind).kind == "f":
        for top in CONVENTIONS:
            if BELIEVED_FROM * top <= tally.high <= top:
                return 0.0, top, "convention"
    return tally.low, tally.high, "measured"


def _filled(tally: Tally, low: float, high: float) -> bool:
    # A number of bits is what a detector or a format has, however dark its images are.
    bits = np.dtype(tally.kind).kind != "f" and low == 0 and math.log2(high + 1).is_integer()
    # Halves, because the difference of two doubles may be beyond the largest one.
    return bits or tally.high / 2 - tally.low / 2 >= FILLED_FROM * (high / 2 - low / 2)


def _ends_of_whole(tally: Tally) -> tuple[float, float, Any]:
    floating = np.dtype(tally.kind).kind == "f"
    if floating and tally.high <= CONVENTIONS[0]:
        return 0.0, CONVENTIONS[0], "convention"
    if tally.widened_16 and tally.high >= WIDENED_16:
        return 0.0, 65_535.0, "widened"
    depth = next(bits for bits in DEPTHS if tally.high <= 2**bits - 1)
    bits = [bit_count for bit_count in tally.significant if bit_count is not None]
    if len(bits) == tally.images:
        depth = max([depth, *bits])
    top = float(2**depth - 1)
    if not floating:
        top = min(top, float(np.iinfo(tally.kind).max))
    return 0.0, top, "bits"


def mapped(raw: Raw, found: IntensityRange, name: str) -> Image.Image:
    """Return an image in 8 bits a channel: black at the range's low end, white at the high one.

    Values between are rounded to the nearest of 256 steps; values outside become black or white.

    Raises:
        DataError: It holds NaN or infinity; the message names it.
    """
    check_finite(raw, name)
    values = raw.values
    if values.dtype == np.uint16:
        # A table of 65,536 entries in place of as many divisions as there are pixels.
        eight = _eight_bits(np.arange(65_536, dtype=np.uint16), found)[values]
    else:
        eight = np.empty(values.shape, dtype=np.uint8)
        # In double precision and a few rows at a time: the whole would take eight times the memory.
        rows = max(1, ROWS_AT_ONCE // max(1, values[:1].size))
        for start in range(0, len(values), rows):
            eight[start : start + rows] = _eight_bits(values[start : start + rows], found)
    if raw.inverted:
        eight = np.subtract(255, eight, dtype=np.uint8)
    return Image.fromarray(eight).convert("RGB")


def _eight_bits(values: Array, found: IntensityRange) -> Array:
    return np.rint(_share(values, found.low, found.high) * 255.0).astype(np.uint8)


def _share(values: Array, low: float, high: float) -> Array:
    # Halves, because the difference of two doubles may be beyond the largest one.
    return np.clip((values.astype(np.float64) / 2 - low / 2) / (high / 2 - low / 2), 0.0, 1.0)
