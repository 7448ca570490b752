"""Data sets as a person names them, and images as a network takes them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import DataError
from core.load.models import ASSETS
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
    Preprocessing,
    SampleImage,
)
from core.seeding import generator

VAL_SHARE = 0.2
SPLIT_SEED = 0
# Longer pictures are cut to so many times their shorter side before they are scaled.
MAX_ASPECT = 8
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
                f'"{name}" does not say where the set lies. Write torchvision:{kind or "NAME"}'
                ":FOLDER."
            )
        if kind not in torchvision_sets():
            raise DataError(
                f'torchvision has no classification set "{kind}" that can be opened from disk. '
                f"Known: {', '.join(torchvision_sets())}."
            )
        return DataSpec(source="torchvision", name=kind, root=root)
    if not name.strip():
        raise DataError("Data has no name. See python -m core list datasets.")
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
        "exists. See python -m core list datasets."
    )


@lru_cache(maxsize=4)
def _opened(spec_json: str, stamp: str) -> ImageSet:
    del stamp  # part of the key alone: a changed file is opened again
    spec = DataSpec.model_validate_json(spec_json)
    entry: dict[str, Any] = {}
    source: Source
    if spec.source == "embedded":
        entry = embedded_sets()[spec.name]
        source = open_zip(ASSETS / "data" / entry["file"])
    elif spec.source == "folder":
        source = open_folder(Path(spec.name))
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
    digest = hashlib.sha256()
    digest.update("\0".join(classes).encode())
    for split, items in splits.items():
        for item in items:
            line = f"{split}\0{item.label}\0{item.name}\0{source.digest(item)}\n"
            digest.update(line.encode())
    outline = DataOutline(
        spec=spec,
        title=entry.get("title", Path(spec.name).name),
        description=entry.get("description", ""),
        classes=classes,
        counts={split: class_counts(items, len(classes)) for split, items in splits.items()},
        fingerprint=digest.hexdigest(),
        fingerprint_covers=source.digest_covers,
        licence=entry.get("licence"),
        citation=entry.get("citation"),
        notes=tuple(notes),
    )
    return ImageSet(outline=outline, splits=splits, open=source.open)


def _stamp(path: Path, spec: DataSpec) -> str:
    """Return a mark that changes when the files do: a folder's own date knows no subfolder."""
    paths = [path, *sorted(path.rglob("*"))] if spec.source == "folder" else [path]
    marks = ((str(each), each.stat()) for each in paths)
    text = "".join(f"{name}\0{mark.st_size}\0{mark.st_mtime_ns}\n" for name, mark in marks)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def open_images(spec: DataSpec) -> ImageSet:
    """Open a data set: list its items, divide what is not divided, take its fingerprint.

    Raises:
        DataError: The files are not there, hold no images, or fewer than two classes.
    """
    try:
        stamp = "" if spec.source == "embedded" else _stamp(Path(spec.root or spec.name), spec)
    except OSError as error:
        raise DataError(f'Data "{spec.root or spec.name}" is no longer there.') from error
    return _opened(spec.model_dump_json(), stamp)


def outline_data(spec: DataSpec) -> DataOutline:
    """Return a data set's classes, counts and fingerprint; no pixel is decoded."""
    return open_images(spec).outline


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
    """Decode some images; returns and raises as `decode` does."""
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

    The second picture is after resizing and cropping; normalisation shifts colours alone and
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
