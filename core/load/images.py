"""Data sets as a person names them, and images as a network takes them."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import DataError, Remedy
from core.load.folders import Found, walk
from core.load.intensities import Beyond, Forms, Raw, Tally, check_finite, mapped, range_of
from core.load.models import ASSETS
from core.load.pictures import PLAIN, Look
from core.load.sources import (
    Item,
    Source,
    open_folder,
    open_npz,
    open_torchvision,
    open_zip,
    torchvision_sets,
)
from core.records import (
    DataOutline,
    DatasetEntry,
    DataSpec,
    IntensityRange,
    Preprocessing,
    SampleImage,
)
from core.seeding import generator
from core.text import as_text

VAL_SHARE = 0.2
SPLIT_SEED = 0
# Longer pictures are cut to so many times their shorter side before they are scaled.
MAX_ASPECT = 8
# Black and white are measured on so many images and pixels at most: some seconds of reading.
MEASURED_IMAGES = 10_000
MEASURED_PIXELS = 2**27
# Validation images that are held against that range, and their pixels: a tenth of the time.
CHECKED_IMAGES = 1_000
CHECKED_PIXELS = 2**24
KEPT_OPEN = 4
# Classes that a sentence names before it counts the rest.
NAMED_CLASSES = 5
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """An opened data set: its outline, and items by split in a fixed order."""

    outline: DataOutline
    splits: dict[str, tuple[Item, ...]]
    open: Callable[[Item], Image.Image]


@cache
def embedded_sets() -> dict[str, dict[str, Any]]:
    """Return the embedded data sets by name, as `assets/data/catalogue.json` lists them."""
    entries = json.loads((ASSETS / "data" / "catalogue.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def list_datasets() -> tuple[DatasetEntry, ...]:
    """Return the embedded sets and the torchvision sets that can be opened from disk."""
    rows = [
        DatasetEntry(
            name=name,
            embedded=True,
            images=sum(entry["images"].values()),
            classes=len(entry["classes"]),
            title=entry["title"],
            description=entry["description"],
            licence=entry["licence"],
        )
        for name, entry in embedded_sets().items()
    ]
    rows += [
        DatasetEntry(
            name=f"torchvision:{name}",
            embedded=False,
            images=None,
            classes=None,
            title=name,
            description=f"Already on disk: torchvision:{name}:FOLDER.",
        )
        for name in torchvision_sets()
    ]
    return tuple(rows)


def resolve_data(name: str) -> DataSpec:
    """Find out what a data name or path is; no image is read.

    Args:
        name: An embedded name, the path of a folder, zip or npz file, or
            "torchvision:CLASS:FOLDER".

    Raises:
        DataError: It is none of these.
    """
    if name in embedded_sets():
        return DataSpec(source="embedded", name=name)
    if name.startswith("torchvision:"):
        kind, _, root = name.removeprefix("torchvision:").partition(":")
        if not root:
            raise DataError(
                f'"{name}" does not say where the set lies.',
                Remedy.FOLDER_OF_SET,
                kind=kind or "NAME",
            )
        if kind not in torchvision_sets():
            raise DataError(
                f'torchvision has no classification set "{kind}" that can be opened from disk. '
                f"Known: {', '.join(torchvision_sets())}."
            )
        return DataSpec(source="torchvision", name=kind, root=root)
    if not name.strip():
        raise DataError("Data has no name.", Remedy.LIST_DATA_SETS)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return DataSpec(source="folder", name=str(path))
        if path.is_file() and path.suffix.lower() == ".zip":
            return DataSpec(source="zip", name=str(path))
        if path.is_file() and path.suffix.lower() == ".npz":
            return DataSpec(source="npz", name=str(path))
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):
        exists = False
    if exists:
        raise DataError(f'"{name}" is neither a folder of class folders, nor a .zip or .npz file.')
    raise DataError(
        f'Data "{name}" is neither an embedded set ({", ".join(embedded_sets())}) nor a path that '
        "exists.",
        Remedy.LIST_DATA_SETS,
    )


Progress = Callable[[int, int], None]

_OPENED: OrderedDict[tuple[str, str], ImageSet] = OrderedDict()
_OPENED_LOCK = threading.Lock()


def _open(spec: DataSpec, found: Found | None, on_progress: Progress | None) -> ImageSet:
    entry: dict[str, Any] = {}
    source: Source
    if spec.source == "embedded":
        entry = embedded_sets()[spec.name]
        source = open_zip(ASSETS / "data" / entry["file"])
    elif spec.source == "folder":
        source = open_folder(Path(spec.name), found)
    elif spec.source == "zip":
        source = open_zip(Path(spec.name))
    elif spec.source == "npz":
        source = open_npz(Path(spec.name))
    else:
        source = open_torchvision(spec.name, spec.root or "")
    notes = list(source.notes)
    splits = _divided(source, notes)
    classes = tuple(entry.get("classes", source.classes))
    if tuple(sorted(classes)) == tuple(sorted(source.classes)) and classes != source.classes:
        order = [classes.index(name) for name in source.classes]
        splits = {
            split: tuple(
                Item(split=i.split, label=order[i.label], name=i.name, key=i.key) for i in items
            )
            for split, items in splits.items()
        }
    counts = {split: class_counts(items, len(classes)) for split, items in splits.items()}
    caveats = _unequal_parts(classes, counts)
    ranges, damaged = _ranges(source, splits, classes, notes, on_progress)
    caveats = (*caveats, *damaged)
    digest = hashlib.sha256()
    digest.update("\0".join(classes).encode())
    for split, items in splits.items():
        for item in items:
            line = f"{split}\0{item.label}\0{item.name}\0{source.digest(item)}\n"
            digest.update(line.encode())
    for span in ranges.values():
        digest.update(f"{span.kind}\0{span.low!r}\0{span.high!r}\n".encode())
    outline = DataOutline(
        spec=spec,
        title=entry.get("title", as_text(Path(spec.name).name)),
        description=entry.get("description", ""),
        classes=classes,
        counts=counts,
        fingerprint=digest.hexdigest(),
        fingerprint_covers=source.digest_covers
        + (", and which intensities are black and white" if ranges else ""),
        licence=entry.get("licence"),
        citation=entry.get("citation"),
        notes=tuple(notes),
        caveats=caveats,
        intensities=tuple(ranges.values()),
    )

    def opened(item: Item) -> Image.Image:
        stored = source.open(item)
        if not isinstance(stored, Raw):
            return stored
        if stored.kind not in ranges:
            raise DataError(
                f'Image "{item.name}" has more than eight bits, which it had not when the set was '
                "opened. Open the set again."
            )
        return mapped(stored, ranges[stored.kind], item.name)

    return ImageSet(outline=outline, splits=splits, open=opened)


def _unequal_parts(classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Return what is to be said where training and validation do not hold the same classes.

    Raises:
        DataError: They share none, or fewer than two classes can be learnt.
    """
    train, val = counts["train"], counts["val"]
    untested = [i for i in range(len(classes)) if train[i] and not val[i]]
    unlearnt = [i for i in range(len(classes)) if val[i] and not train[i]]
    empty = len(classes) - sum(1 for i in range(len(classes)) if train[i] or val[i])

    def named(places: Sequence[int], images: Sequence[int] | None = None) -> str:
        shown = [
            f'"{classes[i]}"' + (f" ({images[i]:,})" if images is not None else "")
            for i in places[:NAMED_CLASSES]
        ]
        more = len(places) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")

    shared = sum(1 for i in range(len(classes)) if train[i] and val[i])
    if not shared and any(train) and any(val):
        raise DataError(
            f"Training and validation share no class: {named(untested)} have training images, "
            f"{named(unlearnt)} validation images. Name the classes of both parts alike."
        )
    if sum(1 for count in train if count) < 2 <= len(classes) - empty:
        raise DataError(
            f"Training images are there for {named([i for i, count in enumerate(train) if count])} "
            "alone, and a network needs two classes to tell apart. Add images of another class."
        )
    rows = []
    if unlearnt:
        they = "It" if len(unlearnt) == 1 else "They"
        rows.append(
            f"{_have(len(unlearnt))} validation images and no training image: "
            f"{named(unlearnt, val)}. {they} cannot be learnt, and these images count as mistakes "
            "in every arm."
        )
    if untested:
        them = "it" if len(untested) == 1 else "them"
        rows.append(
            f"{_have(len(untested))} training images and no validation image: "
            f"{named(untested, train)}. Accuracy says nothing of {them}."
        )
    if empty:
        rows.append(f"{_have(empty)} no image at all, only a place in the head.")
    return tuple(rows)


def _have(classes: int) -> str:
    return f"{classes:,} class has" if classes == 1 else f"{classes:,} classes have"


def _ranges(
    source: Source,
    splits: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    notes: list[str],
    on_progress: Progress | None,
) -> tuple[dict[str, IntensityRange], tuple[str, ...]]:
    """Find out what the images hold besides plain 8-bit pixels, and say so.

    Returns:
        By the type they are stored in, which intensities are black and white; and what must be
        said of images that cannot be read or that this range cuts off.

    Raises:
        DataError: An image that had to be measured cannot be read.
    """
    if source.look is None:
        return {}, ()
    looks = {item: source.look(item) for items in splits.values() for item in items}
    odd = [look for look in looks.values() if look != PLAIN]
    notes += _odd_files(odd)
    damaged = _unreadable([item.name for item, look in looks.items() if look.unreadable])
    stored = Counter(look.kind for look in odd if look.kind is not None)
    if not stored:
        return {}, damaged
    forms: dict[str, Forms] = {}

    def seen(item: Item, raw: Raw) -> None:
        of_kind = forms.setdefault(raw.kind, Forms(kind=raw.kind))
        part = "training" if item.split == "train" else "validation"
        of_kind.add(raw, label=classes[item.label], part=part)

    tallies = _measured(source, splits["train"], looks, seen, on_progress)
    # Of a type that no training image has: nothing else is there to go by.
    alone = {kind for kind in stored if kind not in tallies}
    if alone:
        others = [item for item in splits["val"] if looks[item].kind in alone]
        tallies |= _measured(source, others, looks, seen, on_progress)
    ranges = {kind: range_of(tally, images=stored[kind]) for kind, tally in sorted(tallies.items())}
    notes += [each.sentence for each in ranges.values()]
    trained = {kind: ranges[kind] for kind in ranges.keys() - alone}
    cut_off = _cut_off(source, splits["val"], looks, trained, seen, on_progress)
    mixed = [forms[kind].sentence for kind in sorted(forms)]
    return ranges, (*damaged, *cut_off, *(each for each in mixed if each is not None))


def _cut_off(
    source: Source,
    items: Sequence[Item],
    looks: Mapping[Item, Look],
    ranges: Mapping[str, IntensityRange],
    seen: Callable[[Item, Raw], None],
    on_progress: Progress | None,
) -> list[str]:
    """Return what the ranges of the training images lose of some validation images."""
    rows = []
    for kind, intensities in sorted(ranges.items()):
        beyond, pixels = Beyond(range=intensities), 0
        stored_so = tuple(item for item in items if looks[item].kind == kind)
        chosen = choose_items(stored_so, CHECKED_IMAGES, seed=SPLIT_SEED)
        for done, item in enumerate(chosen):
            if pixels > CHECKED_PIXELS:
                break
            try:
                stored = source.open(item)
                if isinstance(stored, Raw) and stored.kind == kind:
                    check_finite(stored, item.name)
                    pixels += stored.values.size
                    beyond.add(stored)
                    seen(item, stored)
            except DataError:
                # Not needed to open the set: whoever reads it is told which image it is.
                pass
            if on_progress is not None:
                on_progress(done + 1, len(chosen))
        if beyond.sentence is not None:
            rows.append(beyond.sentence)
    return rows


def _unreadable(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    count = "1 image" if len(names) == 1 else f"{len(names):,} images"
    them = "it" if len(names) == 1 else "them"
    return (
        f"{count} cannot be read: {', '.join(names[:3])}{more}. Replace {them} or leave {them} "
        "out: measuring and training stop there.",
    )


def _odd_files(looks: Sequence[Look]) -> list[str]:
    said = (
        ("pages", "of several pages or frames: the first of each is read"),
        ("transparent", "with transparency: it is left out, the colours below it stay"),
        ("turned", "whose EXIF data ask for a rotation: they are read as they are stored"),
        ("inverted", "of more than eight bits whose zero is white: they are turned round"),
    )
    rows = []
    for name, words in said:
        count = sum(1 for look in looks if getattr(look, name))
        if count:
            rows.append(f"{count:,} file{'' if count == 1 else 's'} {words}.")
    return rows


def _measured(
    source: Source,
    items: Sequence[Item],
    looks: Mapping[Item, Look],
    seen: Callable[[Item, Raw], None],
    on_progress: Progress | None,
) -> dict[str, Tally]:
    """Read images of more than eight bits, classes in turn, and tally them by their type.

    Each is given to `seen` as well.
    """
    tallies: dict[str, Tally] = {}
    wanted = tuple(item for item in items if looks[item].kind is not None)
    chosen = choose_items(wanted, MEASURED_IMAGES, seed=SPLIT_SEED)
    pixels = 0
    for done, item in enumerate(chosen):
        # Each type is measured on one image at least, however large the images before it were.
        if pixels > MEASURED_PIXELS and looks[item].kind in tallies:
            continue
        stored = source.open(item)
        if isinstance(stored, Raw):
            pixels += stored.values.size
            tallies.setdefault(stored.kind, Tally(kind=stored.kind)).add(stored, item.name)
            seen(item, stored)
        if on_progress is not None:
            on_progress(done + 1, len(chosen))
    return tallies


def _stamp(path: Path, spec: DataSpec) -> tuple[str, Found | None]:
    """Return a mark that changes when the files do, and what was found on the way.

    A folder's own date knows no subfolder.
    """
    if spec.source != "folder":
        mark = path.stat()
        return f"{mark.st_size}\0{mark.st_mtime_ns}", None
    walked = walk(path)
    text = "".join(f"{name}\0{size}\0{date}\n" for name, (size, date) in walked.files.items())
    text += repr(sorted(walked.skipped.items()))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest(), walked


def open_images(spec: DataSpec, *, on_progress: Progress | None = None) -> ImageSet:
    """Open a data set: list its items, divide what is not divided, take its fingerprint.

    Images of more than eight bits are measured on the way, so that one range of intensities holds
    for all of them; a set that has none is not decoded. The last few sets stay open.

    Args:
        spec: Which set.
        on_progress: Called with (done, total) while images are measured; may raise to stop.

    Raises:
        DataError: The files are not there, hold no images, or fewer than two classes; an image
            that is measured cannot be read.
    """
    try:
        stamp, walked = (
            ("", None) if spec.source == "embedded" else _stamp(Path(spec.root or spec.name), spec)
        )
    except OSError as error:
        raise DataError(f'Data "{spec.root or spec.name}" is no longer there.') from error
    key = (spec.model_dump_json(), stamp)
    with _OPENED_LOCK:
        if key in _OPENED:
            _OPENED.move_to_end(key)
            return _OPENED[key]
    images = _open(spec, walked, on_progress)
    with _OPENED_LOCK:
        _OPENED[key] = images
        while len(_OPENED) > KEPT_OPEN:
            _OPENED.popitem(last=False)
    return images


def outline_data(spec: DataSpec, *, on_progress: Progress | None = None) -> DataOutline:
    """Return a data set's classes, counts and fingerprint; as `open_images`."""
    return open_images(spec, on_progress=on_progress).outline


def class_counts(items: tuple[Item, ...], classes: int) -> tuple[int, ...]:
    """Return the number of items of each class."""
    counts = [0] * classes
    for item in items:
        counts[item.label] += 1
    return tuple(counts)


def _divided(source: Source, notes: list[str]) -> dict[str, tuple[Item, ...]]:
    if all(item.split in ("train", "val") for item in source.items):
        return {
            split: tuple(item for item in source.items if item.split == split)
            for split in ("train", "val")
        }
    train: list[Item] = []
    val: list[Item] = []
    for label in range(len(source.classes)):
        mine = [item for item in source.items if item.label == label]
        order = torch.randperm(len(mine), generator=generator(SPLIT_SEED, "split", label)).tolist()
        held_out = set(order[: max(1, round(len(mine) * VAL_SHARE))]) if len(mine) > 1 else set()
        for i, item in enumerate(mine):
            (val if i in held_out else train).append(
                Item(
                    split="val" if i in held_out else "train",
                    label=label,
                    name=item.name,
                    key=item.key,
                )
            )
    notes.append(
        f"The set has no train and validation folders: {VAL_SHARE:.0%} of each class "
        f"({len(val)} images) were set aside for validation, by seed {SPLIT_SEED}."
    )
    if not val:
        raise DataError(
            "Every class has a single image, so none can be set aside for validation. Add images."
        )
    return {"train": tuple(train), "val": tuple(val)}


def choose_items(items: tuple[Item, ...], limit: int | None, *, seed: int) -> tuple[Item, ...]:
    """Return at most `limit` items, classes in turn, drawn and ordered by the seed."""
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    columns = []
    for label in sorted(by_class):
        order = torch.randperm(len(by_class[label]), generator=generator(seed, "choose", label))
        columns.append([by_class[label][i] for i in order.tolist()])
    chosen: list[Item] = []
    wanted = len(items) if limit is None else min(limit, len(items))
    row = 0
    while len(chosen) < wanted:
        chosen += [column[row] for column in columns if row < len(column)]
        row += 1
    return tuple(chosen[:wanted])


def to_input(image: Image.Image, *, size: int, interpolation: str) -> Image.Image:
    """Resize the shorter side to `size` and crop the centre square."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        # Scaled first, a picture one pixel high would fill the memory.
        wide, high = min(width, longest), min(height, longest)
        left, top = (width - wide) // 2, (height - high) // 2
        image = image.crop((left, top, left + wide, top + high))
        width, height = image.size
    scale = size / min(width, height)
    resized = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))),
        RESAMPLING.get(interpolation, Image.Resampling.BILINEAR),
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def decode(
    images: ImageSet,
    split: str,
    preprocessing: Preprocessing,
    *,
    size: int,
    limit: int | None,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode images of one split, classes in turn.

    Returns:
        Pixels uint8 (n, 3, size, size) and labels int64 (n,), on the CPU. Scaling and
        normalising are left to the device that uses them: a quarter of the memory.

    Raises:
        DataError: An image cannot be read; the message names it.
    """
    items = choose_items(images.splits[split], limit, seed=seed)
    if not items:
        raise DataError(f'The data set has no images in its "{split}" part.')
    return decode_items(images, items, preprocessing, size=size, on_progress=on_progress)


def decode_items(
    images: ImageSet,
    items: Sequence[Item],
    preprocessing: Preprocessing,
    *,
    size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode some images, as `decode` does.

    Returns:
        Pixels uint8 (n, 3, size, size) and labels int64 (n,), on the CPU.

    Raises:
        DataError: An image cannot be read; the message names it.
    """
    pixels = torch.empty((len(items), 3, size, size), dtype=torch.uint8)
    for i, item in enumerate(items):
        square = to_input(images.open(item), size=size, interpolation=preprocessing.interpolation)
        pixels[i] = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)
        if on_progress is not None:
            on_progress(i + 1, len(items))
    return pixels, torch.tensor([item.label for item in items])


def sample_images(
    spec: DataSpec, preprocessing: Preprocessing, *, count: int = 12, seed: int = 0
) -> tuple[SampleImage, ...]:
    """Return a few images, classes in turn, as stored and as the network sees them.

    The second picture is after resizing and cropping; normalisation only shifts colours and
    is left out so that it can be looked at.
    """
    images = open_images(spec)
    rows = []
    for item in choose_items(images.splits["train"], count, seed=seed):
        original = images.open(item)
        square = to_input(
            original, size=preprocessing.image_size, interpolation=preprocessing.interpolation
        )
        rows.append(
            SampleImage(
                label=images.outline.classes[item.label],
                split=item.split,
                name=item.name,
                original_png=_png(original),
                input_png=_png(square),
                original_size=original.size,
            )
        )
    return tuple(rows)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
