"""Seven formats are read; whatever else a file holds, and however damaged, is one sentence."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import DataError
from core.load.intensities import Raw
from core.load.pictures import MAX_PARTS, MAX_PIXELS, PLAIN, Look, look_at, read_image
from tests.damaged import SIDEWAYS, damaged_images, png_16, valid_images

# The filter that keeps them from a person is tested in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 5.0

GOOD = {name: data for name, data in valid_images().items() if not name.startswith("other")}
OTHER = {name: data for name, data in valid_images().items() if name.startswith("other")}


def look(data: bytes) -> Look:
    return look_at(io.BytesIO(data))


@pytest.mark.parametrize("name", sorted(GOOD))
def test_every_documented_format_is_read_in_every_mode(name: str) -> None:
    if name == "TIFF LAB":
        with pytest.raises(DataError, match="colours stored as CIELAB, which are not read"):
            read_image(GOOD[name], name)
        return

    found = read_image(GOOD[name], name)

    if isinstance(found, Raw):
        assert look(GOOD[name]).kind == found.kind
    else:
        assert look(GOOD[name]).kind is None
        plain = Image.open(io.BytesIO(GOOD[name])).convert("RGB")
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(plain))


@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_is_no_documented_format_is_refused_however_it_is_named(name: str) -> None:
    with pytest.raises(DataError, match=r'^Image "x\.png" cannot be read: .*PNG, JPEG, BMP, WebP'):
        read_image(OTHER[name], "x.png")


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"\0" * 128 + b"DICM" + b"\0" * 40, "of the format DICOM"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 40, "of the format HEIC"),
        (b"%PDF-1.7", "of the format PDF"),
        (b"", "damaged, or no PNG"),
        (b"II*\0\x08\0\0\0\0\0", "damaged, or a TIFF of a kind that is not read"),
    ],
)
def test_a_known_format_is_called_by_its_name(head: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_image(head, "x.png")


def outcome(name: str, data: bytes) -> str:
    """What reading a file comes to; whatever is not foreseen is raised."""
    look(data)
    try:
        found = read_image(data, name)
    except DataError as error:
        return str(error)
    return found.kind if isinstance(found, Raw) else found.mode


def test_damaged_images_are_read_or_refused_in_one_line_and_soon() -> None:
    told = []
    for name, data in damaged_images(seed=15, count=1_200):
        begun = time.process_time()
        told.append(outcome(name, data))
        assert time.process_time() - begun < PATIENCE_S, name

    refused = [each for each in told if each.startswith("Image ")]
    assert 200 < len(refused) < 1_100
    assert not any("\n" in each for each in refused)
    assert set(told) - set(refused) <= {"RGB", "uint16", "int16", "int32", "uint32", "int8"} | {
        "float32"
    }


def test_damaged_images_are_the_same_for_the_same_seed() -> None:
    def digest(seed: int) -> str:
        found = hashlib.sha256()
        for name, data in damaged_images(seed, 60):
            found.update(name.encode() + data)
        return found.hexdigest()

    assert digest(3) == digest(3) != digest(4)


def test_nothing_is_written_to_the_terminal_for_damaged_images() -> None:
    # In a process of its own: libtiff writes past Python, and pytest keeps warnings to itself.
    script = (
        "from core.errors import DataError\n"
        "from core.load.pictures import read_image, look_at\n"
        "from tests.damaged import damaged_images\n"
        "import io\n"
        "for name, data in damaged_images(1, 800):\n"
        "    try:\n"
        "        look_at(io.BytesIO(data)); read_image(data, name)\n"
        "    except DataError:\n"
        "        pass\n"
        "print('through')\n"
    )

    answer = subprocess.run(
        [sys.executable, "-W", "default", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert (answer.stdout, answer.stderr) == ("through\n", "")


def chunks(count: int) -> bytes:
    valid = GOOD["PNG RGB"]
    return (
        valid[:33]
        + struct.pack(">I", 0)
        + b"teSt"
        + bytes(4)
        + ((struct.pack(">I", 0) + b"teSt" + bytes(4)) * count)
    )


def strips(count: int, *, wide: bool, order: str) -> bytes:
    """A TIFF of so many strips that lie all in one place."""
    rows = [(256, 4, 1, 8), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    rows += [(273, 4, count, 0), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, 0)]
    begins = 16 + 8 + 20 * len(rows) + 8 if wide else 8 + 2 + 12 * len(rows) + 4
    form, sizes = order + ("HHQQ" if wide else "HHII"), order + ("Q" if wide else "H")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if wide else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if wide else struct.pack(order + "I", 8)
    head += struct.pack(sizes, len(rows))
    for tag, kind, many, value in rows:
        short = kind == 3 and order == ">"
        shifted = value << (48 if wide else 16) if short else value
        inline = value << 32 if wide and kind == 4 and order == ">" else shifted
        head += struct.pack(form, tag, kind, many, begins if many > 1 else inline)
    return head.ljust(begins, b"\0") + struct.pack(order + "I", begins) * count


HOSTILE = {
    **{
        f"tiff-strips-{order}-{wide}": strips(2**21, wide=wide, order=order)
        for order in "<>"
        for wide in (False, True)
    },
    "png-chunks": chunks(MAX_PARTS),
    "jpeg-segments": b"\xff\xd8" + b"\xff\xe5\0\2" * (MAX_PARTS + 1),
    "jpeg-fill": b"\xff\xd8" + b"\xff" * 2**23,
    "gif-comment": b"GIF89a\4\0\4\0\0\0\0!\xfe" + (b"\xff" + b"x" * 255) * 30_000,
    "gif-blocks": b"GIF89a\4\0\4\0\0\0\0!\x01" + b"\1x" * 2**21,
    "pgm-comment": b"P5 #" + b"x" * 2**25,
    "ppm-of-254": b"P6 1800 1800 254\n" + b"\1\2\3" * 1800 * 1800,
    "pgm-plain": b"P2 1500 1500 255\n" + b"7 " * 1500 * 1500,
    "pgm-plain-comments": b"P2 4 4 255\n" + b"#\n" * 2**20 + b"7 " * 16,
    "pbm-plain": b"P1 3000 3000\n" + (b"01" * 1500 + b"\n") * 3000,
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_no_file_holds_a_reader_up(kind: str) -> None:
    begun = time.process_time()

    told = outcome("x.png", HOSTILE[kind])

    assert told == "RGB" or told.startswith('Image "x.png" cannot be read')
    assert time.process_time() - begun < PATIENCE_S


@pytest.mark.parametrize("most", [1, 7, 100, 254])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("letter", ["grey", "colours"])
def test_portable_files_show_what_pillow_shows(most: int, plain: bool, letter: str) -> None:
    shape = (5, 6) if letter == "grey" else (5, 6, 3)
    values = np.random.default_rng(most).integers(0, most + 1, shape)
    kind = {("grey", False): "P5", ("colours", False): "P6"} | {
        ("grey", True): "P2",
        ("colours", True): "P3",
    }
    body = (
        b" ".join(b"%d" % each for each in values.reshape(-1))
        if plain
        else values.astype("u1").tobytes()
    )
    data = f"{kind[letter, plain]}\n# words\n6 5\n{most}\n".encode() + body

    found = read_image(data, "x.ppm")

    assert isinstance(found, Image.Image)
    wanted = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("PNG RGB", PLAIN),
        ("PNG RGBA", Look(transparent=True)),
        ("PNG animated", Look(pages=True)),
        ("PNG I;16", Look(kind="uint16")),
        ("PNG LA;16", Look(kind="uint16", transparent=True)),
        ("JPEG RGB", Look(turned=True)),
        ("JPEG progressive", PLAIN),
        ("WEBP lossless", Look(transparent=True)),
        ("WEBP animated", Look(pages=True)),
        ("GIF animated", Look(pages=True)),
        ("GIF P", PLAIN),
        ("TIFF pages", Look(pages=True)),
        ("TIFF F raw", Look(kind="float32")),
        ("PPM deep", Look(kind="uint16")),
        ("PPM wide", Look(kind="uint16")),
        ("other DDS", PLAIN),
    ],
)
def test_the_head_of_a_file_tells_what_a_person_should_know(name: str, seen: Look) -> None:
    assert look(valid_images()[name]) == seen


def test_a_rotation_in_exif_data_is_seen_and_not_followed() -> None:
    wide = Image.new("RGB", (20, 10))
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        wide.save(buffer, kind, exif=SIDEWAYS)

        found = read_image(buffer.getvalue(), "x")

        assert look(buffer.getvalue()).turned
        assert isinstance(found, Image.Image)
        assert found.size == (20, 10)


def test_pixels_beyond_the_limit_are_refused_before_they_are_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    for claimed in (side, 60_000):
        head = struct.pack(">IIBBBBB", claimed, claimed, 16, 2, 0, 0, 0)
        data = png_16(np.zeros((2, 2, 3), dtype=np.uint16)).replace(
            struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), head
        )

        # The checksum is wrong as well; what a head claims is looked at first or never.
        told = outcome("x.png", data)

        assert told.startswith('Image "x.png"')


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    from core.files.inputs import open_input

    os.mkfifo(tmp_path / "x.png")

    with pytest.raises(OSError, match="it is a pipe"):
        open_input(tmp_path / "x.png")
