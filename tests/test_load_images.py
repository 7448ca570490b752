"""Images are found where people keep them, and what is no data set is refused by name."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import DataError
from core.load import (
    ImageSet,
    class_counts,
    decode,
    folders,
    list_datasets,
    open_images,
    outline_data,
    resolve_data,
    sample_images,
)
from core.load.images import choose_items, embedded_sets, to_input
from core.load.pictures import MAX_PIXELS, read_image
from core.load.sources import Item
from core.records import DataOutline, Preprocessing
from tests.damaged import valid_images

PREPROCESSING = Preprocessing(
    image_size=32, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
# No hostile file may hold anybody up for longer.
PATIENCE_S = 5.0

Files = Mapping[str, bytes]


@pytest.fixture(autouse=True)
def _no_hold_up(request: pytest.FixtureRequest) -> Iterator[None]:
    begun = time.process_time()
    yield
    # A test of many examples takes its time; each of them is as quick as the others.
    assert time.process_time() - begun < PATIENCE_S or request.node.get_closest_marker("hypothesis")


def picture(shade: int = 0, *, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 200)).save(buffer, kind)
    return buffer.getvalue()


def tree(*classes: str, each: int = 5, above: str = "", first: int = 0) -> dict[str, bytes]:
    """Files of a data set: some pictures of a shade of their own in every class folder."""
    return {
        f"{above}{name}/{i}.png": picture(first + 20 * row + i)
        for row, name in enumerate(classes)
        for i in range(each)
    }


def folder(root: Path, files: Files) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    root.mkdir(exist_ok=True)
    return str(root)


def archive(path: Path, files: Files, *, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return str(path)


def outline(name: str) -> DataOutline:
    return outline_data(resolve_data(name))


def read_all(name: str) -> ImageSet:
    """Open a data set and decode every image of it, as a run would."""
    images = open_images(resolve_data(name))
    for split in ("train", "val"):
        decode(images, split, PREPROCESSING, size=32, limit=None, seed=0)
    return images


Keep = Callable[[Path, Files], str]
KEPT: dict[str, Keep] = {
    "folder": lambda root, files: folder(root / "set", files),
    "zip": lambda root, files: archive(root / "set.zip", files),
}


@pytest.fixture(params=sorted(KEPT))
def keep(request: pytest.FixtureRequest) -> Keep:
    """How the files are kept: as a folder or in a zip file."""
    return KEPT[request.param]


# Folders and zip files


def test_class_folders_become_classes_in_the_order_of_their_names(
    keep: Keep, tmp_path: Path
) -> None:
    found = outline(keep(tmp_path, tree("zebra", "ant", "Bee")))

    assert found.classes == ("Bee", "ant", "zebra")
    assert found.images == 15


def test_a_fifth_of_each_class_is_set_aside_and_said(keep: Keep, tmp_path: Path) -> None:
    found = outline(keep(tmp_path, {**tree("a", each=10), **tree("b", each=5)}))

    assert found.counts == {"train": (8, 4), "val": (2, 1)}
    assert "20% of each class (3 images) were set aside for validation" in found.notes[0]


def test_the_division_is_the_same_every_time_and_loses_no_image(keep: Keep, tmp_path: Path) -> None:
    files = tree("a", "b", each=10)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()

    first, second = (
        open_images(resolve_data(keep(tmp_path / part, files))).splits
        for part in ("first", "second")
    )

    assert {k: [i.name for i in v] for k, v in first.items()} == {
        k: [i.name for i in v] for k, v in second.items()
    }
    names = [item.name for items in first.values() for item in items]
    assert sorted(names) == sorted(files)


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("training", "validation"), ("Train", "TEST"), ("train", "valid")],
)
def test_split_folders_are_taken_as_they_are(
    keep: Keep, tmp_path: Path, train: str, val: str
) -> None:
    files = {
        **tree("a", "b", each=3, above=f"{train}/"),
        **tree("a", "b", each=2, above=f"{val}/", first=100),
    }

    found = outline(keep(tmp_path, files))

    assert found.counts == {"train": (3, 3), "val": (2, 2)}
    assert found.notes == ()


def test_validation_goes_before_test_where_both_are_there(keep: Keep, tmp_path: Path) -> None:
    files = {
        **tree("a", "b", each=3, above="train/"),
        **tree("a", "b", each=2, above="val/", first=100),
        **tree("a", "b", each=4, above="test/", first=150),
    }

    assert outline(keep(tmp_path, files)).counts == {"train": (3, 3), "val": (2, 2)}


def test_a_train_folder_alone_is_divided(keep: Keep, tmp_path: Path) -> None:
    found = outline(keep(tmp_path, tree("a", "b", each=5, above="train/")))

    assert found.classes == ("a", "b")
    assert found.counts == {"train": (4, 4), "val": (1, 1)}


@pytest.mark.parametrize("above", ["photos/", "home/me/photos/", "photos/train/"])
def test_folders_around_the_data_set_are_looked_through(
    keep: Keep, tmp_path: Path, above: str
) -> None:
    found = outline(keep(tmp_path, tree("a", "b", above=above)))

    assert found.classes == ("a", "b")


def test_images_deeper_in_a_class_folder_belong_to_it(keep: Keep, tmp_path: Path) -> None:
    files = {**tree("a", "b"), "a/more/deeper.png": picture(99)}

    assert outline(keep(tmp_path, files)).images == 11


def test_other_files_and_hidden_ones_are_passed_over(keep: Keep, tmp_path: Path) -> None:
    noise = {
        "a/notes.txt": b"words",
        "a/.hidden.png": b"no image",
        ".cache/x.png": b"no image",
        "labels.csv": b"a,b",
        "__MACOSX/a/._0.png": b"no image",
    }
    files = {**tree("a", "b"), **noise}
    if keep is KEPT["folder"]:
        del files["__MACOSX/a/._0.png"]  # such folders are made inside archives alone

    found = outline(keep(tmp_path, files))

    assert (found.classes, found.images) == (("a", "b"), 10)


def test_images_outside_class_folders_are_left_out_and_said(keep: Keep, tmp_path: Path) -> None:
    found = outline(keep(tmp_path, {**tree("a", "b"), "loose.png": picture(3)}))

    assert found.images == 10
    assert found.notes[0] == "1 images lie outside class folders and were left out."


def test_every_image_format_is_read(keep: Keep, tmp_path: Path) -> None:
    kinds = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF",
             "gif": "GIF", "ppm": "PPM", "JPEG": "JPEG"}  # fmt: skip
    files = {
        f"{name}/0.{suffix}": picture(kind=kind) for name in "ab" for suffix, kind in kinds.items()
    }

    images = read_all(keep(tmp_path, files))

    assert images.outline.images == 2 * len(kinds)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_a_grey_or_transparent_image_becomes_colour(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "TIFF")

    found = read_image(buffer.getvalue(), mode)

    assert isinstance(found, Image.Image)
    assert found.mode == "RGB"


# Fingerprints


def test_a_zip_has_the_fingerprint_of_its_content_and_not_of_its_place(tmp_path: Path) -> None:
    files = tree("a", "b")
    first = outline(archive(tmp_path / "one.zip", files))
    second = outline(archive(tmp_path / "two.zip", dict(reversed(files.items())), method=0))

    assert first.fingerprint == second.fingerprint


def changed_files(files: dict[str, bytes], change: str) -> dict[str, bytes]:
    if change == "content":
        return {**files, "a/0.png": picture(7, size=(64, 64))}
    if change == "name":
        return {("a/new.png" if name == "a/0.png" else name): each for name, each in files.items()}
    if change == "class":
        return {name.replace("b/", "c/"): each for name, each in files.items()}
    return {name: each for name, each in files.items() if name != "b/4.png"}


@pytest.mark.parametrize("change", ["content", "name", "class", "fewer"])
def test_the_fingerprint_changes_with_the_files(keep: Keep, tmp_path: Path, change: str) -> None:
    files = tree("a", "b")
    other = changed_files(files, change)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()

    first = outline(keep(tmp_path / "first", files))
    second = outline(keep(tmp_path / "second", other))

    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("change", ["content", "added", "removed"])
def test_a_folder_that_changes_under_a_running_program_is_read_again(
    tmp_path: Path, change: str
) -> None:
    root = tmp_path / "set"
    name = folder(root, tree("a", "b"))
    before = outline(name)
    if change == "content":
        (root / "a" / "0.png").write_bytes(picture(7, size=(64, 64)))
    elif change == "added":
        (root / "a" / "new.png").write_bytes(picture(7))
    else:
        (root / "a" / "0.png").unlink()

    after = outline(name)

    assert after.fingerprint != before.fingerprint


def test_a_zip_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    name = archive(tmp_path / "set.zip", tree("a", "b"))
    before = outline(name)
    archive(tmp_path / "set.zip", tree("a", "b", "c"))
    os.utime(tmp_path / "set.zip", (1, 1))

    assert outline(name).classes == ("a", "b", "c")
    assert outline(name).fingerprint != before.fingerprint


# Training and validation of different classes


def parts(train: Mapping[str, int], val: Mapping[str, int]) -> dict[str, bytes]:
    return {
        f"{split}/{name}/{i}.png": picture(i)
        for split, counts in (("train", train), ("val", val))
        for name, count in counts.items()
        for i in range(count)
    }


@given(
    train=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3), min_size=1, max_size=8),
    val=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 3), min_size=1, max_size=8),
)
def test_classes_that_one_part_lacks_are_named_or_the_set_is_refused(
    tmp_path_factory: pytest.TempPathFactory, train: dict[str, int], val: dict[str, int]
) -> None:
    name = archive(tmp_path_factory.mktemp("set") / "set.zip", parts(train, val))
    untested, unlearnt = sorted(set(train) - set(val)), sorted(set(val) - set(train))

    try:
        found = outline(name)
    except DataError as error:
        refusal = str(error)
    else:
        refusal = ""

    few, none_shared = len(set(train) | set(val)) < 2, not set(train) & set(val)
    assert bool(refusal) == (few or none_shared or len(train) < 2)
    if refusal:
        # At most five classes are named on each side.
        named = (*untested[:5], *unlearnt[:5]) if none_shared and not few else ()
        assert all(f'"{each}"' in refusal for each in named)
        return
    told = " ".join(found.caveats)
    assert bool(untested) == ("training images and no validation image" in told)
    assert bool(unlearnt) == ("validation images and no training image" in told)
    for names, counts in ((untested, train), (unlearnt, val)):
        for each in names[:5]:
            assert f'"{each}" ({counts[each]})' in told
    assert len(found.caveats) == bool(untested) + bool(unlearnt)


def test_class_folders_spelled_in_two_ways_share_no_class(keep: Keep, tmp_path: Path) -> None:
    name = keep(tmp_path, parts({"cat": 2, "dog": 2}, {"Cat": 2, "Dog": 2}))

    with pytest.raises(
        DataError,
        match=r'share no class: "cat", "dog" have training images, "Cat", "Dog" validation images',
    ):
        outline(name)


def test_one_training_class_is_too_few_whatever_validation_has(keep: Keep, tmp_path: Path) -> None:
    name = keep(tmp_path, parts({"a": 3}, {"a": 2, "b": 2}))

    with pytest.raises(DataError, match=r'Training images are there for "a" alone'):
        outline(name)


def test_a_class_of_one_image_has_none_for_validation_and_it_is_said(
    keep: Keep, tmp_path: Path
) -> None:
    found = outline(keep(tmp_path, {**tree("a", "b"), "c/0.png": picture()}))

    assert found.caveats == (
        '1 class has training images and no validation image: "c" (1). Accuracy says nothing of '
        "it.",
    )


def test_numbers_of_classes_that_no_array_holds_are_said(tmp_path: Path) -> None:
    name = arrays(tmp_path / "set.npz", train_labels=labels(6) * 3, val_labels=labels(4) * 3)

    found = outline(name)

    assert found.caveats == ("2 classes have no image at all, only a place in the head.",)


# What is no file in a folder


def looped(root: Path) -> None:
    (root / "train" / "a" / "loop.png").symlink_to("loop.png")


def dangling(root: Path) -> None:
    (root / "train" / "a" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "train" / "b" / "gone").symlink_to("nowhere")


def back(root: Path) -> None:
    (root / "train" / "a" / "up").symlink_to(root)
    (root / "train" / "a" / "here").symlink_to(".")


def unusual(root: Path) -> None:
    os.mkfifo(root / "train" / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(root / "train" / "a")  # a socket's path is short
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(here)
    (root / "train" / "b" / "null.png").symlink_to(os.devnull)


def closed(root: Path) -> None:
    # A regular file whose first byte cannot be read, also by root.
    (root / "train" / "b" / "closed.png").symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (looped, "links that lead nowhere or in a circle (1)"),
        (dangling, "links that lead nowhere or in a circle (2)"),
        (back, "links back to a folder above them (2)"),
        (unusual, "pipes, sockets or devices (3)"),
        (closed, "files or folders that cannot be read (1)"),
    ],
)
def test_what_is_no_readable_file_is_left_out_and_counted(
    tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    root = tmp_path / "set"
    name = folder(root, parts({"a": 3, "b": 3}, {"a": 2, "b": 2}))
    spoil(root)

    images = read_all(name)

    assert images.outline.counts == {"train": (3, 3), "val": (2, 2)}
    assert images.outline.notes == (f"Left out of the folder: {says}.",)
    assert outline(name) is images.outline


def test_a_folder_of_nothing_else_says_what_it_holds(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").symlink_to("nowhere.png")

    with pytest.raises(DataError, match=r"holds no images.*Left out of the folder: links that"):
        outline(str(tmp_path))


def test_class_folders_that_are_links_are_followed(tmp_path: Path) -> None:
    folder(tmp_path / "pool", tree("a", "b"))
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / name).symlink_to(tmp_path / "pool" / name)

    found = outline(str(tmp_path / "set"))

    assert (found.classes, found.images, found.caveats) == (("a", "b"), 10, ())


def test_folders_that_link_to_each_other_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, tree(*"abcdefgh"))
    for one in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / one / f"to-{other}").symlink_to(tmp_path / other)
    monkeypatch.setattr(folders, "MAX_ENTRIES", 5_000)

    with pytest.raises(DataError, match=r"hold more than 5,000 files\. Choose a folder that holds"):
        outline(str(tmp_path))


@pytest.mark.parametrize("odd", ["caf\udce9", "bell\x07", "esc\x1b[31m", "line\nbreak"])
def test_names_that_are_no_text_are_spelled_out(tmp_path: Path, odd: str) -> None:
    name = folder(tmp_path / "set", {**tree("a"), **tree(odd)})

    found = read_all(name)

    # What steers a terminal stays in the name and is spelt out where it is shown.
    shown = odd.encode("utf-8", "backslashreplace").decode()
    assert found.outline.classes == ("a", shown)
    assert found.outline.model_dump_json()
    assert any(item.name.startswith(shown) for item in found.splits["train"])


def test_what_a_set_holds_beside_plain_pixels_is_counted(keep: Keep, tmp_path: Path) -> None:
    valid = valid_images()
    more = {"a/t.png": "PNG RGBA", "a/e.jpg": "JPEG RGB", "b/g.gif": "GIF animated"}
    files = tree("a", "b") | {name: valid[kind] for name, kind in more.items()}

    found = outline(keep(tmp_path, files))

    assert set(found.notes[1:]) == {
        "1 file of several pages or frames: the first of each is read.",
        "1 file with transparency: it is left out, the colours below it stay.",
        "1 file whose EXIF data ask for a rotation: they are read as they are stored.",
    }


# Refusals: folders and zip files


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"holds no images\. Expected one folder a class"),
        ({"a/notes.txt": b"words"}, "holds no images"),
        (tree("only"), r"has only the class folder 'only'\. At least two"),
        ({"0.png": picture(), "1.png": picture(1)}, "has no class folders"),
        ({"a/0.png": picture(), "b/0.png": picture(1)}, "single image, so none can be set aside"),
        (tree("a", above="train/") | tree("a", above="val/"), "only the class folder 'a'"),
    ],
    ids=["empty", "no-images", "one-class", "no-classes", "singles", "one-class-split"],
)
def test_what_is_no_data_set_is_refused(
    keep: Keep, tmp_path: Path, files: Files, says: str
) -> None:
    name = keep(tmp_path, files)

    with pytest.raises(DataError, match=says):
        outline(name)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", picture()[:30], picture(kind="JPEG")[:200]],
    ids=["empty", "text", "head", "half-jpeg"],
)
def test_an_image_that_cannot_be_read_is_named(keep: Keep, tmp_path: Path, content: bytes) -> None:
    name = keep(tmp_path, {**tree("a", "b"), "a/broken.png": content})

    with pytest.raises(DataError, match=r'Image "a/broken\.png" cannot be read: it is damaged'):
        read_all(name)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    huge = io.BytesIO()
    Image.new("1", (side, side)).save(huge, "PNG")
    name = folder(tmp_path / "set", {**tree("a", "b"), "a/huge.png": huge.getvalue()})

    with pytest.raises(DataError, match=rf'"a/huge\.png" has {side} x {side} pixels; at most'):
        read_all(name)


def test_a_very_long_image_is_no_way_to_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)

    square = to_input(Image.new("RGB", (20_000, 1)), size=32, interpolation="bilinear")

    assert square.size == (32, 32)
    # As many pixels as the largest image that is accepted would be too many already.
    assert largest <= 4_000_000


def zip_bomb(path: Path) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in tree("a", "b").items():
            file.writestr(name, content)
        with file.open("a/bomb.png", "w") as member:
            for _ in range(80):
                member.write(bytes(2**20))
    return str(path)


def test_a_zip_bomb_is_refused_by_the_name_of_its_member(tmp_path: Path) -> None:
    name = zip_bomb(tmp_path / "set.zip")
    assert (tmp_path / "set.zip").stat().st_size < 2**20

    with pytest.raises(DataError, match=r'"a/bomb\.png" is larger than 64 MiB'):
        read_all(name)


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    content = bytearray(Path(zip_bomb(path)).read_bytes())
    true, claimed = struct.pack("<I", 80 * 2**20), struct.pack("<I", 1_000)
    path.write_bytes(content.replace(true, claimed))

    with pytest.raises(DataError, match=r"a/bomb\.png"):
        read_all(str(path))


@pytest.mark.parametrize("evil", ["../a/x.png", "/a/x.png", "a/../../x.png", "..\\a\\x.png"])
def test_names_that_lead_out_of_the_archive_are_never_opened(tmp_path: Path, evil: str) -> None:
    files = {**tree("a", "b"), evil: picture(99)}

    images = open_images(resolve_data(archive(tmp_path / "set.zip", files)))

    names = {item.name for items in images.splits.values() for item in items}
    assert names == set(tree("a", "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.zip"]


def test_an_archive_of_such_names_alone_holds_no_images(tmp_path: Path) -> None:
    files = {f"../{name}": content for name, content in tree("a", "b").items()}

    with pytest.raises(DataError, match=r'"set\.zip" holds no images'):
        outline(archive(tmp_path / "set.zip", files))


def encrypted(path: Path, files: Files) -> str:
    """A zip whose members say that they need a password."""
    archive(path, files, method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 4)
    path.write_bytes(content)
    return str(path)


def test_an_image_of_a_zip_that_cannot_be_unpacked_is_named_when_the_set_is_opened(
    tmp_path: Path,
) -> None:
    path = tmp_path / "set.zip"
    archive(path, tree("a", "b"), method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as opened:
        first = opened.infolist()[0]
    content = bytearray(path.read_bytes())
    start = first.header_offset + 30 + len(first.filename)
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)

    found = outline(str(path))

    assert any("1 image cannot be read" in caveat for caveat in found.caveats)
    with pytest.raises(DataError, match="its bytes are damaged"):
        read_all(str(path))


def test_an_encrypted_zip_is_refused_with_the_way_out(tmp_path: Path) -> None:
    name = encrypted(tmp_path / "set.zip", tree("a", "b"))

    with pytest.raises(DataError, match=r'in "set\.zip" cannot be unpacked: it has a password'):
        read_all(name)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"no zip at all", b"PK\x05\x06" + bytes(10)], ids=range(4)
)
def test_what_is_no_zip_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.zip").write_bytes(content)

    with pytest.raises(DataError, match=r'"set\.zip" is not a readable zip file'):
        outline(str(tmp_path / "set.zip"))


METHODS = {"stored": 0, "deflated": 8, "bzip2": 12, "lzma": 14}


@pytest.mark.parametrize("method", sorted(METHODS))
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
def test_a_damaged_zip_is_refused_or_read_and_never_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, method: str, seed: int, count: int
) -> None:
    path = tmp_path_factory.mktemp("zip") / "set.zip"
    files = {f"{name}/{i}.bmp": picture(i, kind="BMP") for name in "ab" for i in range(2)}
    archive(path, files, method=METHODS[method])
    content = bytearray(path.read_bytes())
    chooser = np.random.default_rng(seed)
    for at in chooser.integers(0, len(content), count):
        content[at] = chooser.integers(0, 256)
    path.write_bytes(content)

    try:
        outcome = str(read_all(str(path)).outline.images)
    except DataError as error:
        outcome = str(error)

    # Four images, or three where the damage hid a name; else a sentence.
    assert outcome in ("3", "4") or len(outcome) > 20


def test_damaged_lzma_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    files = {f"{name}/{i}.bmp": picture(i, kind="BMP") for name in "ab" for i in range(2)}
    archive(path, files, method=zipfile.ZIP_LZMA)
    content = bytearray(path.read_bytes())
    start = content.find(b".bmp") + 4
    content[start + 9 : start + 30] = b"\xff" * 21
    path.write_bytes(content)

    with pytest.raises(DataError, match=r'in "set\.zip" cannot be unpacked'):
        read_all(str(path))


def test_a_zip_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    content = bytearray(Path(archive(path, tree("a", "b"))).read_bytes())
    content[content.find(b"PK\x01\x02") + 6] = 200
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"set\.zip"):
        read_all(str(path))


# Arrays


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return (np.arange(count) % 2).reshape(-1, 1)


def arrays(path: Path, **changed: Any) -> str:
    stored = {
        "train_images": pixels(6, 28, 28, 3),
        "train_labels": labels(6),
        "val_images": pixels(4, 28, 28, 3),
        "val_labels": labels(4),
        "test_images": pixels(2, 28, 28, 3),
        "test_labels": labels(2),
        **changed,
    }
    np.savez(path, **{name: value for name, value in stored.items() if value is not None})
    return str(path)


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 28), (64, 48, 3)])
def test_medmnist_arrays_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = arrays(
        tmp_path / "set.npz", train_images=pixels(6, *shape), val_images=pixels(4, *shape)
    )

    images = read_all(name)

    assert images.outline.classes == ("class 0", "class 1")
    assert images.outline.counts == {"train": (3, 3), "val": (2, 2)}
    item = images.splits["train"][1]
    first = np.asarray(images.open(item))
    grey = pixels(6, *shape)[1]
    assert np.array_equal(first, grey if grey.ndim == 3 else np.stack([grey] * 3, axis=-1))


def test_flat_labels_and_a_test_part_instead_of_validation_are_read(tmp_path: Path) -> None:
    name = arrays(
        tmp_path / "set.npz",
        train_labels=labels(6).ravel(),
        val_images=None,
        val_labels=None,
    )

    assert outline(name).counts == {"train": (3, 3), "val": (1, 1)}


def test_one_changed_pixel_changes_the_fingerprint_of_arrays(tmp_path: Path) -> None:
    changed = pixels(6, 28, 28, 3)
    changed[3, 5, 5, 1] ^= 1

    first = outline(arrays(tmp_path / "one.npz"))
    second = outline(arrays(tmp_path / "two.npz", train_images=changed))

    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"train_images": None},
        {"train_labels": None},
        {"val_labels": None},
        {"val_images": None, "test_images": None},
        {"train_images": pixels(6, 28, 28, 3).astype(float)},
        {"train_images": pixels(6, 784)},
        {"train_images": pixels(6, 3, 28, 28)},
        {"train_images": pixels(6, 28, 28, 2)},
        {"train_images": pixels(6, 0, 0)},
        {"train_images": pixels(0, 28, 28), "train_labels": labels(0)},
        {"train_labels": labels(5)},
        {"train_labels": np.zeros((6, 2), dtype=int)},
        {"train_labels": np.array(3)},
        {"train_labels": np.zeros(6, dtype=int), "val_labels": np.zeros(4, dtype=int)},
        {"train_labels": labels(6) - 1},
        {"train_labels": np.array(list("ababab"))},
        {"train_labels": np.full(6, np.nan)},
        {"train_labels": labels(6) / 2},
        {"train_labels": labels(6) * 3_000_000},
        {"train_labels": np.array([None] * 6, dtype=object)},
    ],
    ids=[
        *("no-images", "no-labels", "no-val-labels", "no-val", "float", "flat", "channels-first"),
        *("two-channels", "no-pixels", "no-rows", "too-few-labels", "two-labels", "scalar-label"),
        *("one-class", "negative", "text", "nan", "halves", "millions-of-classes", "objects"),
    ],
)
def test_arrays_of_another_kind_are_refused_by_the_name_of_their_file(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    name = arrays(tmp_path / "set.npz", **changed)

    with pytest.raises(DataError, match=r"set\.npz"):
        read_all(name)


@pytest.mark.parametrize("content", [b"", b"no arrays", picture()], ids=["empty", "text", "image"])
def test_what_is_no_npz_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.npz").write_bytes(content)

    with pytest.raises(DataError, match=r'"set\.npz" is not a readable npz file'):
        outline(str(tmp_path / "set.npz"))


def test_arrays_that_claim_more_than_a_machine_holds_are_refused(tmp_path: Path) -> None:
    head = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 1_000, 1_000)}
    np.lib.format.write_array_header_1_0(head, claim)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as file:
        for name in ("train_images", "train_labels", "val_images", "val_labels"):
            file.writestr(f"{name}.npy", head.getvalue())

    with pytest.raises(DataError, match=r"set\.npz"):
        outline(str(tmp_path / "set.npz"))


# torchvision


def idx(path: Path, values: np.ndarray) -> None:
    """Write an array in MNIST's own format."""
    head = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(head + sizes + values.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 20), ("t10k", 10)):
        idx(raw / f"{stem}-images-idx3-ubyte", pixels(count, 28, 28))
        idx(raw / f"{stem}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def test_a_torchvision_set_on_disk_is_read(mnist: Path) -> None:
    images = read_all(f"torchvision:MNIST:{mnist}")

    assert len(images.outline.classes) == 10
    assert images.outline.classes[3] == "3 - three"
    assert images.outline.counts == {"train": (2,) * 10, "val": (1,) * 10}
    item = images.splits["train"][4]
    assert (item.label, item.name) == (4, "train/4")
    grey = pixels(20, 28, 28)[4]
    assert np.array_equal(np.asarray(images.open(item)), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torchvision:MNIST", r"does not say where the set lies\."),
        ("torchvision:", r"does not say where the set lies"),
        ("torchvision:Nosuch:there", r'no classification set "Nosuch".*Known: .*MNIST'),
        ("torchvision:MNIST:no/such/folder", "no longer there|no folder"),
    ],
)
def test_a_torchvision_name_that_cannot_be_opened_is_refused(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        outline(name)


def test_a_torchvision_folder_without_the_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MNIST cannot be opened in .*Put its files there first"):
        outline(f"torchvision:MNIST:{tmp_path}")


# Names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nosuch", r'Data "nosuch" is neither an embedded set \(bloodmnist, pneumonia\) nor'),
        ("no/such/folder", "nor a path that exists"),
        ("a\0b", "nor a path that exists"),
        ("x" * 5_000, "nor a path that exists"),
        ("~nobody-of-that-name/photos", "nor a path that exists"),
        ("", "Data"),
    ],
    ids=["name", "path", "nul", "long", "unknown-home", "empty"],
)
def test_a_name_that_is_nothing_is_refused(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        resolve_data(name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(picture())

    with pytest.raises(DataError, match=r"neither a folder of class folders, nor a \.zip or"):
        resolve_data(str(tmp_path / "photo.png"))


def test_data_that_goes_away_says_so(tmp_path: Path) -> None:
    path = Path(archive(tmp_path / "set.zip", tree("a", "b")))
    spec = resolve_data(str(path))
    path.unlink()

    with pytest.raises(DataError, match=r"set\.zip\" is no longer there"):
        open_images(spec)


def test_an_image_that_goes_away_is_named(tmp_path: Path) -> None:
    images = open_images(resolve_data(folder(tmp_path / "set", tree("a", "b"))))
    item = images.splits["train"][0]
    (tmp_path / "set" / item.name).unlink()

    with pytest.raises(DataError, match=rf'Image "{item.name}" cannot be read \(No such file'):
        images.open(item)


# The embedded sets


@pytest.mark.parametrize("name", sorted(embedded_sets()))
def test_an_embedded_set_is_what_its_catalogue_says(name: str) -> None:
    entry = embedded_sets()[name]

    found = outline(name)

    assert list(found.classes) == entry["classes"]
    assert {split: sum(counts) for split, counts in found.counts.items()} == entry["images"]
    assert min(min(counts) for counts in found.counts.values()) > 0
    assert found.licence == entry["licence"]
    listed = {row.name: row for row in list_datasets()}
    assert listed[name].embedded
    assert (listed[name].images, listed[name].classes) == (found.images, len(found.classes))


def test_samples_show_each_class_in_turn_before_and_after() -> None:
    spec = resolve_data("bloodmnist")

    samples = sample_images(spec, PREPROCESSING, count=8)

    assert [sample.label for sample in samples] == list(outline("bloodmnist").classes)
    assert {sample.original_size for sample in samples} == {(28, 28)}
    assert Image.open(io.BytesIO(samples[0].original_png)).size == (28, 28)
    assert Image.open(io.BytesIO(samples[0].input_png)).size == (32, 32)
    assert samples == sample_images(spec, PREPROCESSING, count=8)
    assert samples != sample_images(spec, PREPROCESSING, count=8, seed=1)


# Into the network


@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    limit=st.none() | st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_chosen_images_are_balanced_different_and_no_more_than_asked(
    counts: list[int], limit: int | None, seed: int
) -> None:
    items = tuple(
        Item(split="train", label=label, name=f"{label}/{i}", key=str(i))
        for label, count in enumerate(counts)
        for i in range(count)
    )

    chosen = choose_items(items, limit, seed=seed)

    wanted = len(items) if limit is None else min(limit, len(items))
    assert len({item.name for item in chosen}) == len(chosen) == wanted
    assert chosen == choose_items(items, limit, seed=seed)
    taken = class_counts(chosen, len(counts))
    # A class has fewer than another only when it ran out, or by the one that the limit cut.
    assert all(taken[i] == counts[i] or taken[i] >= max(taken) - 1 for i in range(len(counts)))


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(16, 48))
def test_every_shape_of_image_becomes_the_square(width: int, height: int, size: int) -> None:
    square = to_input(Image.new("RGB", (width, height)), size=size, interpolation="bicubic")

    assert square.size == (size, size)


def test_the_centre_is_kept_and_the_sides_are_cut() -> None:
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 255, 0), (32, 0, 64, 32))

    square = np.asarray(to_input(wide, size=32, interpolation="nearest"))

    assert (square == (0, 255, 0)).all()


def test_decoding_gives_whole_bytes_labels_and_progress(tmp_path: Path) -> None:
    images = open_images(resolve_data(folder(tmp_path / "set", tree("a", "b"))))
    seen: list[tuple[int, int]] = []

    found, truth = decode(
        images,
        "train",
        PREPROCESSING,
        size=16,
        limit=4,
        seed=0,
        on_progress=lambda done, total: seen.append((done, total)),
    )

    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (4, 3, 16, 16))
    assert truth.tolist() == [0, 1, 0, 1]
    # The pictures are of one colour each: red tells the class and the picture.
    assert [int(value) // 20 for value in found[:, 0, 0, 0]] == [0, 1, 0, 1]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
