"""Images of more than eight bits are read by one range a set, and say by which."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import DataError
from core.load import ImageSet, decode, open_images, outline_data, resolve_data, resolve_model
from core.load.intensities import Raw, Tally, mapped, range_of
from core.load.pictures import read_image
from core.pipeline.measuring import MeasureSettings, diagnose
from core.records import Diagnosis, IntensityRange, Preprocessing
from tests.damaged import documented_range, png_16

PREPROCESSING = Preprocessing(
    image_size=28, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, values, **{"photometric": photometric, **options})
    return buffer.getvalue()


def portable(values: np.ndarray, most: int, *, plain: bool = False) -> bytes:
    letter = {(2, False): "P5", (3, False): "P6", (2, True): "P2", (3, True): "P3"}
    head = f"{letter[values.ndim, plain]} {values.shape[1]} {values.shape[0]} {most}\n".encode()
    if plain:
        return head + b"\n".join(b"%d" % each for each in values.reshape(-1))
    return head + values.astype(">u2" if most > 255 else "u1").tobytes()


def saved(values: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def unit(v: np.ndarray) -> np.ndarray:
    return (v / 255).astype(np.float32)


def colours(v: np.ndarray) -> np.ndarray:
    """Three channels that differ."""
    return np.stack([v, np.roll(v, 1), v[::-1]], axis=-1)


# Every way to keep an 8-bit picture in more bits: the file, and what it shows.
COPIES: dict[str, Callable[[np.ndarray], tuple[bytes, np.ndarray]]] = {
    "png-widened": lambda v: (saved(v.astype(np.uint16) * 257), v),
    "png-in-16": lambda v: (saved(v.astype(np.uint16)), v),
    "png-grey-alpha": lambda v: (png_16(np.stack([v.astype(np.uint16) * 257] * 2, -1)), v),
    "png-colours": lambda v: (png_16(colours(v).astype(np.uint16) * 257), colours(v)),
    "png-colours-in-16": lambda v: (png_16(colours(v).astype(np.uint16)), colours(v)),
    "png-colours-alpha": lambda v: (
        png_16(np.concatenate([colours(v), v[..., None]], -1).astype(np.uint16) * 257),
        colours(v),
    ),
    **{
        f"tiff-{name}-{order}-{way}": (
            lambda v, make=make, order=order, way=way: (
                tiff(make(v)[0], byteorder=order, compression=way),
                make(v)[1],
            )
        )
        for name, make in {
            "widened": lambda v: (v.astype(np.uint16) * 257, v),
            "in-16": lambda v: (v.astype(np.uint16), v),
            "signed-16": lambda v: (v.astype(np.int16), v),
            "signed-32": lambda v: (v.astype(np.int32), v),
            "unit": lambda v: (unit(v), v),
            "bytes-as-floats": lambda v: (v.astype(np.float32), v),
            "widened-as-floats": lambda v: (v.astype(np.float32) * 257, v),
            "colours": lambda v: (colours(v).astype(np.uint16) * 257, colours(v)),
        }.items()
        for order in "<>"
        for way in (None, "deflate")
    },
    # Pillow reads these in one order of bytes only.
    "tiff-widened-32": lambda v: (tiff(v.astype(np.uint32) * 16_843_009), v),
    "tiff-in-32": lambda v: (tiff(v.astype(np.uint32)), v),
    "tiff-tiled": lambda v: (tiff(np.tile(v, (2, 2)) * np.uint16(257), tile=(16, 16)), None),
    "pgm-widened": lambda v: (portable(v.astype(np.uint16) * 257, 65_535), v),
    "pgm-of-its-own-maximum": lambda v: (portable(v.astype(np.uint16) * 3, 765), v),
    "pgm-plain": lambda v: (portable(v.astype(np.uint16) * 257, 65_535, plain=True), v),
    "ppm-widened": lambda v: (portable(colours(v).astype(np.uint16) * 257, 65_535), colours(v)),
    "ppm-plain": lambda v: (
        portable(colours(v).astype(np.uint16) * 4, 1020, plain=True),
        colours(v),
    ),
}


def seen(data: bytes | Raw) -> tuple[np.ndarray, IntensityRange]:
    """What a set of this one image shows, and by which range."""
    raw = read_image(data, "x.tif") if isinstance(data, bytes) else data
    assert isinstance(raw, Raw)
    tally = Tally(kind=raw.kind)
    tally.add(raw, "x.tif")
    found = range_of(tally, images=1)
    return np.asarray(mapped(raw, found, "x.tif")), found


def shades(seed: int, *, brightest: int = 255, side: int = 9) -> np.ndarray:
    chooser = np.random.default_rng(seed)
    found = chooser.integers(0, brightest + 1, (side, side + 3), dtype=np.uint8)
    found[0, 0] = brightest
    return found


@pytest.mark.parametrize("way", sorted(COPIES))
@pytest.mark.parametrize("brightest", [64, 130, 255])
def test_an_8_bit_picture_kept_in_more_bits_comes_back_exactly(way: str, brightest: int) -> None:
    v = shades(brightest, brightest=brightest)
    data, wanted = COPIES[way](v)
    if wanted is None:
        wanted = np.tile(v, (2, 2))

    found, _ = seen(data)

    assert np.array_equal(found, wanted if wanted.ndim == 3 else np.stack([wanted] * 3, axis=-1))


@given(
    bits=st.sampled_from([8, 10, 12, 14, 16]),
    kind=st.sampled_from(["uint16", "uint32", "int32", "uint64", "float32", "float64"]),
    seed=st.integers(0, 2**16),
    order=st.sampled_from("<>"),
)
def test_whole_numbers_span_black_to_white_by_the_bits_in_use(
    bits: int, kind: str, seed: int, order: str
) -> None:
    top = 2**bits - 1
    values = np.random.default_rng(seed).integers(0, top + 1, (6, 7))
    values[0, :3] = 0, top, top - 1  # not all multiples of 257 either
    stored = values.astype(np.dtype(kind).newbyteorder(order))

    pixels, found = seen(Raw(values=stored, kind=kind))

    assert (found.low, found.high) == (0, top)
    assert np.array_equal(pixels[..., 0], np.rint(values / top * 255))


@given(
    low=st.floats(-1e30, 1e30),
    span=st.floats(1e-3, 1e30),
    seed=st.integers(0, 2**16),
)
def test_other_numbers_span_their_measured_ends_and_keep_their_order(
    low: float, span: float, seed: int
) -> None:
    values = np.float32(low) + np.random.default_rng(seed).random((5, 5)) * np.float32(span)
    raw = Raw(values=values.astype(np.float32), kind="float32")

    pixels, found = seen(raw)

    assert found.low < found.high
    order = np.argsort(raw.values, axis=None)
    assert (np.diff(pixels[..., 0].reshape(-1)[order].astype(int)) >= 0).all()
    if found.source == "measured" and raw.values.min() < raw.values.max():
        assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("values", "kind", "ends", "source"),
    [
        ([0, 4_095], "uint16", (0, 4_095), "bits"),
        ([0, 4_096], "uint16", (0, 16_383), "bits"),
        ([5, 900], "uint16", (0, 1_023), "bits"),
        ([5, 255], "uint16", (0, 255), "bits"),
        ([0, 0], "uint16", (0, 255), "bits"),
        ([0, 257], "uint16", (0, 65_535), "widened"),
        ([0, 20_000], "int16", (0, 32_767), "bits"),
        ([0, 100], "int8", (0, 127), "bits"),
        ([-1_024, 3_071], "int16", (-1_024, 3_071), "measured"),
        ([-128, 127], "int8", (-128, 127), "measured"),
        ([7, 70_000], "int32", (7, 70_000), "measured"),
        ([0, 16_843_009 * 3], "uint32", (0, 2**32 - 1), "widened"),
        ([0, 2**32 - 1], "uint32", (0, 2**32 - 1), "widened"),
        ([0.0, 1.0], "float32", (0, 1), "convention"),
        ([0.1, 0.3], "float32", (0, 1), "convention"),
        # Faint data would come out black by the convention.
        ([0.001, 0.01], "float64", (0.001, 0.01), "measured"),
        ([0.0, 200.5], "float32", (0, 255), "convention"),
        ([0.0, 1.02], "float64", (0, 1.02), "measured"),
        ([-0.25, 1.0], "float32", (-0.25, 1), "measured"),
        ([0.0, 4_000.0], "float32", (0, 4_095), "bits"),
        ([3.5, 3.5], "float32", (3.5, 4.5), "measured"),
    ],
)
def test_the_rule_for_black_and_white(
    values: list[float], kind: str, ends: tuple[float, float], source: str
) -> None:
    _, found = seen(Raw(values=np.array([values], dtype=kind), kind=kind))

    assert (found.low, found.high, found.source) == (*ends, source)
    assert sum(found.histogram) == len(values)


def test_what_a_tiff_documents_goes_before_what_is_measured() -> None:
    values = np.random.default_rng(0).random((5, 5), dtype=np.float32) * 3
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=documented_range(-1.0, 4.0))

    _, found = seen(buffer.getvalue())

    assert (found.low, found.high, found.source) == (-1, 4, "documented")


@pytest.mark.parametrize(
    ("tags", "ends"),
    [
        ([(280, 3, 1, 10), (281, 3, 1, 3_000)], (10, 3_000)),
        ([(340, 3, 1, 10), (341, 3, 1, 3_000)], (10, 3_000)),
        ([(281, 3, 1, 3_000)], (0, 3_000)),
        # The default of the tag, and numbers that the pixels contradict.
        ([(281, 3, 1, 65_535)], (0, 4_095)),
        ([(341, 3, 1, 2_000)], (0, 4_095)),
        ([(340, 3, 1, 9), (341, 3, 1, 9)], (0, 4_095)),
    ],
)
def test_documented_numbers_are_believed_where_the_pixels_lie_within(
    tags: list[tuple[int, int, int, int]], ends: tuple[int, int]
) -> None:
    values = np.array([[20, 2_500]], dtype=np.uint16)

    _, found = seen(tiff(values, extratags=tags))

    assert (found.low, found.high) == ends


MOST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-MOST, MOST), (0.0, MOST), (-MOST, 1.0), (-3.4e38, 3.4e38), (-1.7e308, 1.7e308)],
)
@pytest.mark.parametrize(
    ("top", "ends"), [(1.0, (0, 1)), (255.0, (0, 255)), (9_000.5, (0, 9_000.5))]
)
def test_limits_of_a_type_are_no_black_and_white(
    low: float, high: float, top: float, ends: tuple[float, float]
) -> None:
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=documented_range(low, high))

    pixels, found = seen(buffer.getvalue())

    assert (found.low, found.high) == ends
    assert (pixels.min(), pixels.max()) == (0, 255)


@given(
    documented=st.floats(1e-3, 1e6),
    share=st.floats(1e-6, 1.0),
    below=st.booleans(),
)
def test_a_documented_range_is_believed_where_the_pixels_fill_some_of_it(
    documented: float, share: float, below: bool
) -> None:
    low = -documented if below else 0.0
    values = np.array([[0.0, share * (documented - low) / (2 if below else 1)]])
    values = values.astype(np.float64)
    ends = (low, documented)

    pixels, found = seen(Raw(values=values, kind="float64", documented=ends))

    filled = float(values.max()) / (documented - low)
    if abs(filled * 32 - 1) > 1e-6:
        assert (found.source == "documented") == (filled > 1 / 32)
    # Never one grey for all.
    assert int(pixels.max()) - int(pixels.min()) >= 7


@pytest.mark.parametrize("high", [255, 1_023, 4_095, 65_535])
def test_documented_bits_are_believed_however_dark_the_pixels(high: int) -> None:
    raw = Raw(values=np.array([[0, 3]], np.uint16), kind="uint16", documented=(0.0, float(high)))
    other = Raw(values=raw.values, kind="uint16", documented=(0.0, high - 5.0))

    assert seen(raw)[1].high == high
    assert seen(other)[1].source == "bits"


def test_twelve_bits_in_a_tiff_are_twelve_bits_however_dark() -> None:
    packed = bytes([0x00, 0x10, 0x02, 0x00, 0x30, 0x04])  # 1, 2, 3, 4
    content = bytearray(tiff(np.zeros((2, 2), dtype=np.uint16)))
    at = content.index(bytes([0x02, 0x01, 3, 0, 1, 0, 0, 0, 16, 0]))
    content[at + 8] = 12
    content = content[:-8] + packed

    raw = read_image(bytes(content), "x.tif")

    assert isinstance(raw, Raw)
    assert raw.values.tolist() == [[1, 2], [3, 4]]
    assert seen(raw)[1].high == 4_095


@pytest.mark.parametrize(
    ("significant", "brightest", "high"),
    [(12, 900, 4_095), (10, 900, 1_023), (12, 60_000, 65_535), (None, 900, 1_023)],
)
def test_significant_bits_of_a_png_are_the_least_that_is_taken(
    significant: int | None, brightest: int, high: int
) -> None:
    data = png_16(np.array([[3, brightest]], dtype=np.uint16), significant=significant)

    assert seen(data)[1].high == high


@pytest.mark.parametrize("kind", ["uint16", "float32", "uint8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_whose_zero_is_white_is_turned_round_or_refused_by_name(
    kind: str, order: str
) -> None:
    v = shades(3)
    values = unit(v) if kind == "float32" else v.astype(kind) * (257 if kind == "uint16" else 1)
    data = tiff(values, photometric="miniswhite", byteorder=order)

    if (kind, order) == ("uint16", ">"):
        with pytest.raises(DataError, match=r'"x\.tif" cannot be read: .* kind that is not read'):
            read_image(data, "x.tif")
        return
    pixels = np.asarray(read_image(data, "x.tif")) if kind == "uint8" else seen(data)[0]

    assert np.array_equal(pixels[..., 0], 255 - v)


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.zeros((3, 4, 5), dtype=np.uint16), photometric="rgb", planarconfig="separate"),
        tiff(np.zeros((4, 5))),
        tiff(np.zeros((4, 5), dtype=np.float16)),
        tiff(np.zeros((4, 5), dtype=np.int64)),
        tiff(np.zeros((4, 5, 2), dtype=np.uint16), photometric="minisblack", planarconfig="contig"),
    ],
    ids=["planes", "doubles", "halves", "64-bit", "two-channels"],
)
def test_deep_pixels_that_cannot_be_read_are_refused_and_never_guessed(data: bytes) -> None:
    with pytest.raises(DataError, match=r'Image "x\.tif" cannot be read: it (has|is damaged, or)'):
        read_image(data, "x.tif")


def test_signed_bytes_are_no_unsigned_ones() -> None:
    values = np.array([[-128, -1, 0, 127]], dtype=np.int8)

    pixels, found = seen(tiff(values))

    assert found.kind == "int8"
    assert pixels[0, :, 0].tolist() == [0, 127, 128, 255]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_pixels_that_are_no_numbers_are_refused_by_name(odd: float, kind: str) -> None:
    raw = Raw(values=np.array([[0.5, odd, odd]], dtype=kind), kind=kind)
    fine = seen(Raw(values=np.array([[0.0, 1.0]], dtype=kind), kind=kind))[1]

    for refused in (lambda: Tally(kind=kind).add(raw, "a.tif"), lambda: mapped(raw, fine, "a.tif")):
        with pytest.raises(DataError, match=r'"a\.tif" has 2 pixels that are NaN or infinite'):
            refused()


# Whole sets


def folder(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def scans(brightest: dict[str, int], *, make: Callable[[np.ndarray], bytes]) -> dict[str, bytes]:
    """Two classes, one picture for each name in both."""
    files = {}
    for place, (name, top) in enumerate(brightest.items()):
        for label in "ab":
            values = np.random.default_rng(place).integers(0, top + 1, (8, 8), dtype=np.uint16)
            values[0, 0] = top
            split, _, file = name.partition("/")
            files[f"{split}/{label}/{file}"] = make(values)
    return files


def opened(name: str) -> ImageSet:
    return open_images(resolve_data(name))


def brightest_of(images: ImageSet, split: str) -> list[int]:
    pixels, _ = decode(images, split, PREPROCESSING, size=28, limit=None, seed=0)
    return sorted(int(each.max()) for each in pixels)


def test_one_range_holds_for_all_images_so_that_dark_ones_stay_dark(tmp_path: Path) -> None:
    files = scans(
        {"train/0.png": 4_000, "train/1.png": 1_000, "val/0.png": 500, "val/1.png": 60_000},
        make=saved,
    )

    images = opened(folder(tmp_path / "set", files))

    (found,) = images.outline.intensities
    assert (found.kind, found.images, found.measured_images) == ("uint16", 8, 4)
    assert (found.low, found.high, found.lowest, found.highest) == (0, 4_095, 9, 4_000)
    # To a few steps, which scaling the picture up takes.
    assert brightest_of(images, "train") == pytest.approx([62, 62, 249, 249], abs=2)
    assert brightest_of(images, "val") == pytest.approx([31, 31, 255, 255], abs=2)
    assert any(
        "8 16-bit images: intensities 0 to 4,095 (12 bits; the brightest pixel of 4 training "
        "images is 4,000) are shown and measured as black to white" in note
        for note in images.outline.notes
    )


DEEP: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "16-bit PNG": ("png", lambda v: saved(v.astype(np.uint16))),
    "floating-point": ("tif", lambda v: tiff((v / 1_000).astype(np.float32))),
    "signed": ("tif", lambda v: tiff((v.astype(np.int32) - 2_000).astype(np.int32))),
}


def ramp(low: int, high: int, *, side: int = 40) -> np.ndarray:
    return np.linspace(low, high, side * side).round().reshape(side, side)


@pytest.mark.parametrize("way", DEEP)
@pytest.mark.parametrize(
    ("low", "high", "beyond"),
    [
        (0, 4_095, ()),
        (100, 300, ()),
        # As far as the brightest pixel varies from any few images to the next.
        (0, 4_200, ()),
        (0, 4_300, ("white",)),
        (0, 8_190, ("white",)),
        (0, 60_000, ("white",)),
        (-3_000, 60_000, ("white", "black")),
        (-3_000, 4_000, ("black",)),
    ],
)
def test_validation_images_beyond_black_or_white_are_a_caveat(
    way: str, low: int, high: int, beyond: tuple[str, ...], tmp_path: Path
) -> None:
    suffix, make = DEEP[way]
    if low < 0 and "PNG" in way:
        low, beyond = 0, tuple(name for name in beyond if name != "black")
    files = {}
    for label in "ab":
        files[f"train/{label}/0.{suffix}"] = make(ramp(0, 4_095))
        files[f"val/{label}/0.{suffix}"] = make(ramp(0, 4_095))
        files[f"val/{label}/1.{suffix}"] = make(ramp(low, high))

    outline = opened(folder(tmp_path / "set", files)).outline

    if not beyond:
        assert outline.caveats == ()
        return
    (caveat,) = outline.caveats
    assert caveat.startswith("2 of 4 ")
    assert "validation images that were looked at (50%) go beyond" in caveat
    assert [name for name in ("white", "black") if f"beyond {name}, to " in caveat] == list(beyond)
    times = (high - 0) / 4_095 if "white" in beyond else 1 - low / 4_095
    assert f"({times:.3g} times the range)" in caveat


def test_a_hot_pixel_of_validation_is_no_caveat_and_changes_no_fingerprint(tmp_path: Path) -> None:
    files = scans({"train/0.tif": 4_000, "val/0.tif": 4_000}, make=tiff)
    hot = ramp(0, 4_000).astype(np.uint16)
    hot[0, 0] = 65_535
    prints = []
    for place, odd in enumerate((ramp(0, 4_000).astype(np.uint16), hot, hot * 0 + 65_535)):
        spec = folder(tmp_path / str(place) / "set", files | {"val/a/odd.tif": tiff(odd)})
        prints.append(opened(spec).outline)

    assert [len(outline.caveats) for outline in prints] == [0, 0, 1]
    assert len({outline.fingerprint for outline in prints}) == 1
    assert len({outline.intensities for outline in prints}) == 1


def test_a_validation_image_that_cannot_be_used_stops_no_opening(tmp_path: Path) -> None:
    files = scans({"train/0.tif": 9, "val/0.tif": 9}, make=lambda v: tiff(v / np.float32(9)))
    files["val/a/odd.tif"] = tiff(np.array([[0.1, math.nan]], dtype=np.float32))
    images = opened(folder(tmp_path / "set", files))

    assert images.outline.caveats == ()
    with pytest.raises(DataError, match=r'Image "val/a/odd\.tif" has 1 pixel that is NaN'):
        brightest_of(images, "val")


@pytest.mark.parametrize("kind", ["uint16", "int16", "float16", "float32", "float64", "int64"])
@pytest.mark.parametrize("limit", ["CHECKED_IMAGES", "CHECKED_PIXELS"])
def test_arrays_beyond_white_are_a_caveat_and_few_are_looked_at(
    kind: str, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"core.load.images.{limit}", 6 if limit == "CHECKED_IMAGES" else 5 * 1_600)
    train = np.stack([ramp(0, 1_000)] * 4).astype(kind)
    val = np.stack([ramp(0, 20_000)] * 12).astype(kind)
    labels = np.arange(12) % 2
    path = tmp_path / "set.npz"
    np.savez(path, train_images=train, train_labels=labels[:4], val_images=val, val_labels=labels)

    (caveat,) = opened(str(path)).outline.caveats

    assert caveat.startswith("6 of 6 ")
    assert "beyond white, to 20,000 where white is 1,0" in caveat


def in_form(form: str, values: np.ndarray) -> tuple[str, bytes]:
    """The end of a name and the file."""
    grey = values.astype(np.uint16)
    channels = np.stack([grey] * 3, axis=-1)
    deep = np.full((*grey.shape, 1), 65_535, np.uint16)
    if form == "PGM":
        return "pgm", portable(grey, 4_095)
    if form == "PPM":
        return "ppm", portable(channels, 4_095)
    if form == "grey TIFF":
        return "tif", tiff(grey)
    if form == "colour TIFF":
        return "tif", tiff(channels)
    if form == "grey PNG with transparency":
        return "png", png_16(np.concatenate([grey[..., None], deep], -1))
    if form == "colour PNG with transparency":
        return "png", png_16(np.concatenate([channels, deep], -1))
    return "png", png_16(channels if form == "colour PNG" else grey)


FORMS = (
    "PGM",
    "PPM",
    *(f"{colour} {kind}" for colour in ("grey", "colour") for kind in ("PNG", "TIFF")),
    *(f"{colour} PNG with transparency" for colour in ("grey", "colour")),
)


def two_forms(root: Path, forms: Callable[[str, str, int], str], tops: dict[str, int]) -> str:
    files = {}
    for split in ("train", "val"):
        for label in "ab":
            for place in range(4):
                form = forms(split, label, place)
                suffix, content = in_form(form, ramp(0, tops[form]))
                files[f"{split}/{label}/{place}.{suffix}"] = content
    return folder(root / "set", files)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_forms_of_one_type_whose_scales_are_apart_are_a_caveat(
    first: str, second: str, tmp_path: Path
) -> None:
    # What is written of 12 bits is read as 16 of the portable formats.
    read = {form: 65_535 if form in ("PGM", "PPM") else 4_095 for form in (first, second)}
    name = two_forms(
        tmp_path,
        lambda split, label, place: first if label == "a" else second,
        dict.fromkeys((first, second), 4_095),
    )

    caveats = opened(name).outline.caveats

    if len(set(read.values())) == 1:
        assert caveats == ()
        return
    (caveat,) = caveats
    dark, bright = sorted(read, key=read.__getitem__)
    assert f": {dark} to 4,095, {bright} to 65,535. " in caveat
    owner, other = ("a", "b") if dark == first else ("b", "a")
    assert f'goes with the class: 100% of "{owner}" and 0% of "{other}"' in caveat


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        (lambda split, label, place: place < 2, ()),
        (lambda split, label, place: place < 1 + (label == "a"), ()),
        (lambda split, label, place: label == "a", ("class",)),
        (lambda split, label, place: label == "b" or place < 1, ("class",)),
        (lambda split, label, place: split == "train", ("part",)),
        (lambda split, label, place: split == "val" and label == "a", ("class", "part")),
    ],
    ids=["mixed", "nearly", "class", "mostly-class", "part", "both"],
)
@pytest.mark.parametrize("apart", [1, 2, 3, 16])
def test_a_scale_that_goes_with_a_class_or_a_part_is_said_more_strongly(
    forms: Callable[[str, str, int], bool], says: tuple[str, ...], apart: int, tmp_path: Path
) -> None:
    name = two_forms(
        tmp_path,
        lambda *place: "grey PNG" if forms(*place) else "colour PNG",
        {"grey PNG": 4_000, "colour PNG": 4_000 * apart},
    )

    caveats = [each for each in opened(name).outline.caveats if "forms" in each]

    assert len(caveats) == (apart > 2)
    for caveat in caveats:
        assert f"grey PNG to 4,000, colour PNG to {4_000 * apart:,}. " in caveat
        told = tuple(what for what in ("class", "part") if f"goes with the {what}:" in caveat)
        assert told == says


def test_one_form_of_any_brightness_and_black_images_say_nothing_of_scales(tmp_path: Path) -> None:
    alike = two_forms(tmp_path / "1", lambda *place: "grey PNG", {"grey PNG": 4_000})
    files = scans({"train/0.png": 60_000, "val/0.png": 60_000, "train/1.png": 20}, make=saved)
    varied = folder(tmp_path / "2", files)
    black = two_forms(
        tmp_path / "3",
        lambda split, label, place: "grey PNG" if label == "a" else "grey TIFF",
        {"grey PNG": 0, "grey TIFF": 4_000},
    )

    for name in (alike, varied, black):
        assert opened(name).outline.caveats == ()


def test_eight_bit_images_beside_deep_ones_stay_as_they_are(tmp_path: Path) -> None:
    v = shades(1)
    files = scans({"train/0.png": 4_000, "val/0.png": 4_000}, make=saved)
    files |= {f"train/{label}/plain.png": saved(v) for label in "ab"}

    images = opened(folder(tmp_path / "set", files))

    item = next(each for each in images.splits["train"] if "plain" in each.name)
    assert np.array_equal(np.asarray(images.open(item))[..., 0], v)
    assert images.outline.intensities[0].images == 4


def test_a_set_of_8_bit_images_is_never_measured(tmp_path: Path) -> None:
    files = scans({"train/0.png": 200, "val/0.png": 90}, make=lambda v: saved(v.astype(np.uint8)))

    found = opened(folder(tmp_path / "set", files)).outline

    assert found.intensities == ()
    assert found.fingerprint_covers == "splits, classes, file names and file sizes"


def test_the_range_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    # Raw TIFF: as many bytes whatever is in them.
    first, second = (
        opened(
            folder(tmp_path / str(top), scans({"train/0.tif": top, "val/0.tif": 9}, make=tiff))
        ).outline
        for top in (1_000, 4_000)
    )

    assert first.fingerprint != second.fingerprint
    assert "which intensities are black and white" in first.fingerprint_covers


def test_a_deep_image_that_only_validation_has_is_measured_there(tmp_path: Path) -> None:
    files = scans({"train/0.png": 200}, make=lambda v: saved(v.astype(np.uint8)))
    files |= scans({"val/0.png": 4_000}, make=saved)

    images = opened(folder(tmp_path / "set", files))

    assert images.outline.intensities[0].high == 4_095
    assert brightest_of(images, "val") == pytest.approx([249, 249], abs=2)


def test_measuring_tells_how_far_it_is_and_can_be_stopped(tmp_path: Path) -> None:
    files = scans({"train/0.png": 999, "train/1.png": 9, "val/0.png": 4_000}, make=saved)
    spec = resolve_data(folder(tmp_path / "set", files))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_images(spec, on_progress=stop)
    told: list[tuple[int, int]] = []
    open_images(spec, on_progress=lambda done, total: told.append((done, total)))

    # Training images, then the validation images that are held against them.
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]


def test_an_image_that_is_no_number_somewhere_names_itself_when_the_set_is_opened(
    tmp_path: Path,
) -> None:
    files = scans({"train/0.tif": 9, "val/0.tif": 9}, make=lambda v: tiff(v / np.float32(9)))
    files["train/a/odd.tif"] = tiff(np.array([[0.1, math.nan]], dtype=np.float32))

    with pytest.raises(DataError, match=r'Image "train/a/odd\.tif" has 1 pixel that is NaN'):
        opened(folder(tmp_path / "set", files))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("<u2", lambda v: v.astype(np.uint16) * 257),
        (">u2", lambda v: v.astype(np.uint16) * 257),
        ("<u2", lambda v: v),
        ("<i2", lambda v: v),
        ("<i8", lambda v: v),
        ("<f4", lambda v: v / 255),
        (">f8", lambda v: v / 255),
        ("<f2", lambda v: v),
        ("<f4", lambda v: v.astype(np.float32)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_more_than_8_bits_are_read_by_their_range(
    tmp_path: Path, kind: str, change: Callable[[np.ndarray], np.ndarray], channels: int
) -> None:
    shape = (6, 9, 9) if channels == 1 else (6, 9, 9, 3)
    v = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    v[:, 0, 0] = 255
    labels = (np.arange(6) % 2).reshape(-1, 1)
    stored = change(v).astype(kind)
    path = tmp_path / "set.npz"
    np.savez(path, train_images=stored, train_labels=labels, val_images=stored, val_labels=labels)

    images = opened(str(path))

    assert images.outline.intensities[0].images == 12
    for split in ("train", "val"):
        for place, item in enumerate(images.splits[split]):
            pixels = np.asarray(images.open(item))
            assert np.array_equal(pixels if channels == 3 else pixels[..., 0], v[place])


def test_arrays_of_two_types_are_refused(tmp_path: Path) -> None:
    zeros, labels = np.zeros((4, 5, 5)), np.arange(4) % 2
    path = tmp_path / "set.npz"
    np.savez(
        path,
        train_images=zeros,
        train_labels=labels,
        val_images=zeros.astype(np.uint8),
        val_labels=labels,
    )

    with pytest.raises(DataError, match=r"train_images are float64 and val_images uint8; store"):
        outline_data(resolve_data(str(path)))


# The embedded X-rays


COPIES_OF_X_RAYS: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "8-bit": ("png", saved),
    "16-bit": ("png", lambda v: saved(v.astype(np.uint16) * 257)),
    "float": ("tif", lambda v: tiff(unit(v))),
    "12-bit": ("tif", lambda v: tiff(np.rint(v / 255 * 4_095).astype(np.uint16))),
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Some embedded X-rays, kept in several ways."""
    source = opened("pneumonia")
    kept = [
        item
        for split in ("train", "val")
        for label in (0, 1)
        for item in [each for each in source.splits[split] if each.label == label][:8]
    ]
    found = {}
    for way, (suffix, make) in COPIES_OF_X_RAYS.items():
        files = {
            f"{item.split}/{item.label}/{place}.{suffix}": make(
                np.asarray(source.open(item))[..., 0]
            )
            for place, item in enumerate(kept)
        }
        found[way] = folder(tmp_path_factory.mktemp(way), files)
    return found


@pytest.fixture(scope="module")
def diagnoses(copies: dict[str, str]) -> dict[str, Diagnosis]:
    """What a small network's measurement finds on them."""
    return {
        way: diagnose(
            resolve_model("timm:test_resnet", weights="none"),
            resolve_data(copies[way]),
            MeasureSettings(samples=8, batch_size=4, image_size=32, device="cpu"),
        )[0]
        for way in ("8-bit", "16-bit", "float")
    }


@pytest.mark.parametrize("way", ["16-bit", "float", "12-bit"])
def test_deep_copies_of_the_embedded_x_rays_give_the_same_pixels(
    copies: dict[str, str], way: str
) -> None:
    for split in ("train", "val"):
        found, wanted = (
            decode(opened(copies[each]), split, PREPROCESSING, size=28, limit=None, seed=0)[0]
            for each in (way, "8-bit")
        )
        assert found.equal(wanted)


@pytest.mark.parametrize(("way", "high"), [("16-bit", 65_535), ("float", 1)])
def test_deep_copies_of_the_embedded_x_rays_give_the_same_diagnosis(
    diagnoses: dict[str, Diagnosis], way: str, high: float
) -> None:
    found, wanted = diagnoses[way], diagnoses["8-bit"]

    assert found.layers == wanted.layers
    assert (found.header.loss, found.header.twin_loss) == (
        wanted.header.loss,
        wanted.header.twin_loss,
    )
    (told,) = found.header.intensities
    assert (told.low, told.high) == (0, high)
    assert told.sentence in found.header.notes
    assert wanted.header.intensities == ()


def test_a_diagnosis_of_before_reads_as_one_without_deep_images(
    diagnoses: dict[str, Diagnosis],
) -> None:
    old = json.loads(diagnoses["8-bit"].model_dump_json())
    del old["header"]["intensities"]

    assert Diagnosis.model_validate(old).header.intensities == ()
