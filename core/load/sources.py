"""Where images lie: folders, zip files, MedMNIST arrays, torchvision sets on disk.

Each source turns into the same two things: a list of items (split, class, name) and a way to
open one item. Nothing is unpacked to disk and no header of an archive is believed.
"""

from __future__ import annotations

import inspect
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from core.errors import DataError
from core.files.inputs import bytes_allowed, in_words, open_input
from core.load.archives import ArchiveError, opened_zip
from core.load.arrays import ArrayError, ArrayHeader, array_headers, read_arrays
from core.load.folders import Found, look_at_files, walk
from core.load.intensities import Raw
from core.load.pictures import IMAGE_SUFFIXES, PLAIN, Look, Stored, look_at, read_image
from core.text import as_text

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
MAX_FILES = 200_000
MAX_FILE_BYTES = 64 * 2**20
MAX_CLASSES = 10_000
MAX_ARRAY_IMAGES = 1_000_000
# Arrays of images stay in memory, where files are read as they are needed.
DEFAULT_ARRAY_GB = 4.0
ARRAY_VARIABLE = "LIMBER_MAX_NPZ_GB"
# Folders within folders of a zip file.
MAX_NESTED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image: its split, the index of its class, its name, and a key its source can open."""

    split: str
    label: int
    name: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Items of one data set and how to open them.

    Attributes:
        classes: Their names.
        items: In a fixed order.
        open: Decodes an item: an RGB image, or stored pixels of more than eight bits.
        digest: A cheap content mark of an item.
        digest_covers: What the marks tell apart.
        notes: How the set was read.
        look: What an item is like without decoding it; None where all are plain.
    """

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    open: Callable[[Item], Stored]
    digest: Callable[[Item], str]
    digest_covers: str
    notes: tuple[str, ...] = ()
    look: Callable[[Item], Look] | None = None


def _splits(paths: Iterable[PurePosixPath], where: str) -> tuple[tuple[str, ...], list[Item], str]:
    """Sort relative image paths into splits and classes.

    Accepted: SPLIT/CLASS/file and CLASS/file, below any one common folder. Without split
    folders every item gets the split "all", to be divided by the caller.
    """
    parts = [path.parts for path in paths]
    while parts and all(len(part) > 2 for part in parts) and len({part[0] for part in parts}) == 1:
        if parts[0][0].lower() in TRAIN_NAMES + VAL_NAMES:
            break
        parts = [part[1:] for part in parts]
    if not parts:
        raise DataError(
            f"{where} holds no images. Expected one folder a class with image files in it "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    prefix_of = dict(zip(paths, parts, strict=True))
    tops = {part[0].lower() for part in parts}
    split_names = {name for name in tops if name in TRAIN_NAMES + VAL_NAMES}
    has_train = bool(split_names & set(TRAIN_NAMES))
    chosen_val = next((name for name in VAL_NAMES if name in split_names), None)
    note = ""
    rows: list[tuple[str, str, PurePosixPath]] = []
    loose = 0
    for path, part in prefix_of.items():
        if has_train or chosen_val:
            top = part[0].lower()
            split = "train" if top in TRAIN_NAMES else "val" if top == chosen_val else None
            if split is None:
                continue
            inner = part[1:]
        else:
            split, inner = "all", part
        if len(inner) < 2:
            loose += 1
            continue
        rows.append((split, inner[0], path))
    if loose:
        note = f"{loose} images lie outside class folders and were left out."
    classes = tuple(sorted({name for _, name, _ in rows}))
    if len(classes) < 2:
        there = f"only the class folder {classes[0]!r}" if classes else "no class folders"
        raise DataError(
            f"{where} has {there}. At least two folders with images are needed, one a class."
        )
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{where} has {len(classes):,} class folders; at most {MAX_CLASSES:,}.")
    if has_train != bool(chosen_val):
        # One split alone is divided like an unsplit set.
        rows = [("all", name, path) for _, name, path in rows]
    index = {name: i for i, name in enumerate(classes)}
    items = [
        Item(split=split, label=index[name], name=as_text("/".join(path.parts)), key=str(path))
        for split, name, path in sorted(rows, key=lambda row: str(row[2]))
    ]
    return tuple(map(as_text, classes)), items, note


def open_folder(folder: Path, walked: Found | None = None) -> Source:
    """Read the names of an image folder (class folders, with or without train and val above).

    Args:
        folder: Where it lies.
        walked: What is known to lie in it; None lists it now.

    Raises:
        DataError: Too many files, or no classes in them. Later, from `open`: an image that cannot
            be read.
    """
    walked = walked or walk(folder)
    if len(walked.files) > MAX_FILES:
        raise DataError(f'Folder "{folder}" holds more than {MAX_FILES:,} images.')
    looks = look_at_files(folder, walked)
    try:
        classes, items, note = _splits(
            [PurePosixPath(name) for name in walked.files], f'Folder "{folder}"'
        )
    except DataError as error:
        raise DataError(f"{error} {walked.note}".rstrip()) from error

    def data(item: Item) -> bytes:
        try:
            with open_input(folder / item.key) as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise DataError(
                f'Image "{item.name}" cannot be read ({error.strerror}). Check the folder.'
            ) from error
        if len(content) > MAX_FILE_BYTES:
            raise DataError(f'Image "{item.name}" is larger than {MAX_FILE_BYTES >> 20} MiB.')
        return content

    return Source(
        classes=classes,
        items=tuple(items),
        notes=tuple(each for each in (note, walked.note) if each),
        open=lambda item: read_image(data(item), item.name),
        digest=lambda item: str(walked.files[item.key][0]),
        digest_covers="splits, classes, file names and file sizes",
        look=lambda item: looks.get(item.key, PLAIN),
    )


def open_zip(path: Path) -> Source:
    """Read the names of an image folder inside a zip file; members are read on demand.

    Raises:
        DataError: No readable zip file, too many files, or no classes in them. Later, from `open`:
            an image that cannot be read.
    """
    try:
        archive = opened_zip(path)
    except (OSError, ArchiveError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f'"{path.name}" is not a readable zip file ({why}). Zip the folder again.'
        ) from error
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = PurePosixPath(info.filename)
        unsafe = name.is_absolute() or ".." in name.parts or "\\" in info.filename
        unsafe = unsafe or len(name.parts) > MAX_NESTED
        hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
        if info.is_dir() or unsafe or hidden or name.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        infos[str(name)] = info
        if len(infos) > MAX_FILES:
            raise DataError(f'"{path.name}" holds more than {MAX_FILES:,} images.')
    classes, items, note = _splits([PurePosixPath(name) for name in infos], f'"{path.name}"')

    def data(item: Item) -> bytes:
        try:
            # The header's size is a claim; one byte beyond the limit settles it.
            with archive.open(infos[item.key]) as member:
                content = member.read(MAX_FILE_BYTES + 1)
        except Exception as error:
            locked = infos[item.key].flag_bits & 1
            raise DataError(
                f'"{item.name}" in "{path.name}" cannot be unpacked: '
                + (
                    "it has a password. Zip the folder again, without one."
                    if locked
                    else "its bytes are damaged. Replace it or leave it out, and zip the folder "
                    "again."
                )
            ) from error
        if len(content) > MAX_FILE_BYTES:
            raise DataError(f'Image "{item.name}" is larger than {MAX_FILE_BYTES >> 20} MiB.')
        return content

    def look(item: Item) -> Look:
        try:
            with archive.open(infos[item.key]) as member:
                return look_at(cast(BinaryIO, member))
        except Exception:
            # `data` will say why.
            return Look(unreadable=True)

    return Source(
        classes=classes,
        items=tuple(items),
        notes=(note,) if note else (),
        open=lambda item: read_image(data(item), item.name),
        digest=lambda item: f"{infos[item.key].CRC:08x}",
        digest_covers="splits, classes, file names and the CRC-32 of every file",
        look=look,
    )


def open_npz(path: Path) -> Source:
    """Read a MedMNIST-style file: {train,val,test}_images (n, h, w[, 3]) and _labels.

    Pixels are uint8, or of another integer or floating-point type that is then the same in both
    parts and mapped by one range.

    Raises:
        DataError: No readable npz file, or not the arrays of a set of images.
    """
    try:
        headers = array_headers(path)
    except OSError as error:
        raise DataError(f'"{path.name}" cannot be read ({error.strerror}).') from error
    except ArrayError as error:
        raise DataError(
            f'"{path.name}" is not a readable npz file of plain arrays ({error}).'
        ) from error
    second = next((name for name in ("val", "test") if f"{name}_images" in headers), None)
    if "train_images" not in headers or "train_labels" not in headers or second is None:
        raise DataError(
            f'"{path.name}" has the arrays {", ".join(sorted(headers)[:6]) or "(none)"}; expected '
            "train_images, train_labels, val_images and val_labels as in MedMNIST files."
        )
    _check_npz(path, headers, second)
    wanted = [f"{stem}_{what}" for stem in ("train", second) for what in ("images", "labels")]
    try:
        arrays = read_arrays(path, {name: headers[name] for name in wanted if name in headers})
    except ArrayError as error:
        raise DataError(
            f'"{path.name}" is not a readable npz file of plain arrays ({error}).'
        ) from error
    items: list[Item] = []
    pixels: dict[str, np.ndarray[Any, Any]] = {}
    labels_seen: set[int] = set()
    for split, stem in (("train", "train"), ("val", second)):
        images, labels = arrays[f"{stem}_images"], arrays[f"{stem}_labels"]
        flat = labels.reshape(len(images), 1)
        pixels[split] = images
        for i, label in enumerate(flat[:, 0].tolist()):
            labels_seen.add(int(label))
            items.append(Item(split=split, label=int(label), name=f"{stem}/{i}", key=str(i)))
    if min(labels_seen) < 0 or len(labels_seen) < 2:
        raise DataError(f'"{path.name}" needs at least two classes, numbered from 0.')
    if max(labels_seen) >= MAX_CLASSES:
        raise DataError(
            f'"{path.name}" numbers its classes up to {max(labels_seen):,}; at most '
            f"{MAX_CLASSES:,} are read."
        )
    classes = tuple(f"class {i}" for i in range(max(labels_seen) + 1))
    kinds = {split: array.dtype.newbyteorder("=").name for split, array in pixels.items()}
    if len(set(kinds.values())) > 1:
        raise DataError(
            f'"{path.name}": train_images are {kinds["train"]} and {second}_images '
            f"{kinds['val']}; store both in one type."
        )
    kind = kinds["train"]

    def opened(item: Item) -> Stored:
        values = pixels[item.split][int(item.key)]
        if kind == "uint8":
            return Image.fromarray(values).convert("RGB")
        return Raw(values=values.astype(kind, copy=False), kind=kind)

    return Source(
        classes=classes,
        items=tuple(items),
        open=opened,
        look=None if kind == "uint8" else lambda item: Look(kind=kind),
        digest=lambda item: f"{zlib.crc32(pixels[item.split][int(item.key)].tobytes()):08x}",
        digest_covers="splits, classes and the CRC-32 of every image's pixels",
    )


def _check_npz(path: Path, headers: Mapping[str, ArrayHeader], second: str) -> None:
    """Raise unless the arrays' headers are those of images and their classes, and affordable.

    Raises:
        DataError: Another type or shape, or more images or bytes than are read.
    """
    total = 0
    for stem in ("train", second):
        images, labels = headers[f"{stem}_images"], headers.get(f"{stem}_labels")
        if labels is None or images.dtype.kind not in "uif" or len(images.shape) not in (3, 4):
            raise DataError(
                f'"{path.name}": {stem}_images must be whole or floating-point numbers of shape '
                f"(n, height, width) or (n, height, width, 3), with {stem}_labels beside it."
            )
        if 0 in images.shape or (len(images.shape) == 4 and images.shape[-1] != 3):
            raise DataError(
                f'"{path.name}": {stem}_images has the shape {images.shape}; expected (n, height, '
                "width) or (n, height, width, 3), with at least one image and pixel."
            )
        count = images.shape[0]
        if count > MAX_ARRAY_IMAGES:
            raise DataError(
                f'"{path.name}": {stem}_images holds {count:,} images; at most '
                f"{MAX_ARRAY_IMAGES:,} are read."
            )
        one_each = math.prod(labels.shape) == count and labels.shape[:1] in ((count,), ())
        if not one_each or labels.dtype.kind not in "iub":
            raise DataError(f'"{path.name}": {stem}_labels must hold one class number an image.')
        total += images.bytes
    most = bytes_allowed(ARRAY_VARIABLE, DEFAULT_ARRAY_GB)
    if total > most:
        raise DataError(
            f'"{path.name}" unpacks to {in_words(total)} of images, and at most {in_words(most)} '
            f"are held in memory. Set {ARRAY_VARIABLE} to a larger number of gigabytes, or save "
            "the images as files in a zip or folder."
        )


def torchvision_sets() -> tuple[str, ...]:
    """Return the torchvision classification sets that can be opened from a folder on disk."""
    import torchvision.datasets as sets

    names = []
    for name in sets.__all__:
        parameters = inspect.signature(getattr(sets, name)).parameters
        if (
            "root" in parameters
            and "download" in parameters
            and ("train" in parameters or "split" in parameters)
        ):
            names.append(name)
    return tuple(names)


def open_torchvision(name: str, root: str) -> Source:
    """Open a torchvision data set that is already on disk; nothing is downloaded.

    Raises:
        DataError: No such set, or it is not in that folder.
    """
    import torchvision.datasets as sets

    if name not in torchvision_sets():
        raise DataError(
            f'torchvision has no classification set "{name}" that can be opened from disk. Known: '
            f"{', '.join(torchvision_sets())}."
        )
    if not Path(root).is_dir():
        raise DataError(f'There is no folder "{root}" for the torchvision set {name}.')
    constructor = getattr(sets, name)
    by_train = "train" in inspect.signature(constructor).parameters
    choices = (
        ({"train": True}, {"train": False}) if by_train else ({"split": "train"}, {"split": "test"})
    )
    loaded: list[Any] = []
    for choice in choices:
        try:
            loaded.append(constructor(root=root, download=False, **choice))
        except Exception as error:
            text = str(error).strip().splitlines()
            raise DataError(
                f'torchvision\'s {name} cannot be opened in "{root}": '
                f"{text[0][:160] if text else type(error).__name__}. Put its files there first."
            ) from error
    items: list[Item] = []
    labels: set[int] = set()
    for split, data in zip(("train", "val"), loaded, strict=True):
        targets = next(
            (
                getattr(data, key)
                for key in ("targets", "labels", "_labels", "y")
                if getattr(data, key, None) is not None
            ),
            None,
        )
        if targets is None:
            targets = [label for _, label in (data[i] for i in range(len(data)))]
        for i, label in enumerate(np.asarray(targets).reshape(-1).tolist()):
            labels.add(int(label))
            items.append(Item(split=split, label=int(label), name=f"{split}/{i}", key=str(i)))
    if min(labels) < 0:
        raise DataError(f"torchvision's {name} has labels below 0 and cannot be used as it is.")
    given = getattr(loaded[0], "classes", None) or []
    classes = tuple(
        str(given[i]) if i < len(given) else f"class {i}" for i in range(max(labels) + 1)
    )
    by_split = dict(zip(("train", "val"), loaded, strict=True))

    def opened(item: Item) -> Image.Image:
        image = by_split[item.split][int(item.key)][0]
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(
                f'Image "{item.name}" of torchvision\'s {name} has more than eight bits. Save the '
                "set as a folder of 16-bit PNG or TIFF files."
            )
        converted: Image.Image = image.convert("RGB")
        return converted

    return Source(
        classes=classes,
        items=tuple(items),
        open=opened,
        digest=lambda item: "",
        digest_covers="the name of the set, splits, order and labels",
    )
