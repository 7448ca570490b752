"""Build the embedded image samples from your own copies of the two sources.

    python -m tests.build_samples --bloodmnist bloodmnist.npz --pneumonia FOLDER

``bloodmnist.npz`` is the 28-pixel file of MedMNIST v2. ``FOLDER`` holds the chest
X-rays as ``train`` and ``test``, each with ``NORMAL`` and ``PNEUMONIA``. The committed
sample came from a copy of 2,532 and 634 grey images already resized to 224 x 224; the
original release splits them otherwise and so gives another, equally valid, sample.
Either argument may be left out; that sample then stays as it is.

Each zip is an image folder, ``train/CLASS/NAME.EXT`` and ``val/CLASS/NAME.EXT``, where
NAME starts with the split and ends with the index or file name that the image has in
its source. A catalogue with the descriptions must already lie in the output folder: its
digests, counts, classes and seed are brought up to date.

The same sources give the same bytes on every run with the same Pillow. Another Pillow may
compress differently: the chosen images are then the same and the digest is not.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import random
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SEED = 20261123
DATA_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "data"

BLOOD_CLASSES = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocyte",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)
BLOOD_PER_CLASS = {"train": 106, "val": 36}

XRAY_FOLDERS = {"normal": "NORMAL", "pneumonia": "PNEUMONIA"}
XRAY_SOURCE_SPLITS = {"train": "train", "val": "test"}
XRAY_PER_CLASS = {"train": 300, "val": 150}
XRAY_SIDE = 128
XRAY_QUALITY = 32
XRAY_SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
# File names open with the child's number: person1449_bacteria_3746, NORMAL2-IM-0123-0001.
XRAY_PATIENT = re.compile(r"person\d+|(?:NORMAL2-)?IM-\d+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One finished image that may be chosen.

    ``group`` names what must not be on both sides of the split, such as a patient.
    """

    split: str
    class_name: str
    name: str
    group: str
    image: Image.Image


def read_bloodmnist(path: Path) -> Iterator[Candidate]:
    """Yield the images of the original train and val splits; test is left untouched."""
    with np.load(path) as arrays:
        for split in BLOOD_PER_CLASS:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].ravel()
            for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                name = f"{split}_{index:05d}"
                yield Candidate(
                    split=split,
                    class_name=BLOOD_CLASSES[label],
                    name=name,
                    group=name,
                    image=Image.fromarray(pixels),
                )


def read_pneumonia(folder: Path) -> Iterator[Candidate]:
    """Yield the X-rays as grey squares; val comes from the source's test split."""
    for split, source_split in XRAY_SOURCE_SPLITS.items():
        for class_name, source_class in XRAY_FOLDERS.items():
            for path in sorted((folder / source_split / source_class).iterdir()):
                if path.suffix.lower() not in XRAY_SUFFIXES:
                    continue
                patient = XRAY_PATIENT.match(path.stem)
                with Image.open(path) as image:
                    # ImageOps.fit is the resize of the shorter side and the centre crop in one.
                    square = ImageOps.fit(
                        image.convert("L"), (XRAY_SIDE, XRAY_SIDE), Image.Resampling.LANCZOS
                    )
                yield Candidate(
                    split=split,
                    class_name=class_name,
                    name=f"{source_split}_{path.stem}",
                    group=patient.group() if patient else path.stem,
                    image=square,
                )


def without_duplicates(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates with each distinct picture once, the first one seen.

    Finished pixels are compared, not files, so a re-encoded copy is found as well. A
    picture that its source lists under two classes is dropped altogether.
    """
    first_seen: dict[bytes, Candidate] = {}
    contradictory: set[bytes] = set()
    for candidate in candidates:
        digest = hashlib.sha256(candidate.image.tobytes()).digest()
        first = first_seen.setdefault(digest, candidate)
        if first.class_name != candidate.class_name:
            contradictory.add(digest)
    return [one for digest, one in first_seen.items() if digest not in contradictory]


def choose(
    candidates: Sequence[Candidate], per_class: Mapping[str, int], *, seed: int
) -> list[Candidate]:
    """Draw up to ``per_class[split]`` images of every class, no group in both splits.

    Val is drawn first: it is the smaller side, and the train side has images to spare
    for the groups it loses. Each split and class has its own generator, so a change in
    one leaves the others as they were.
    """
    chosen: list[Candidate] = []
    taken_groups: set[str] = set()
    for split in ("val", "train"):
        open_to_choice = [
            one for one in candidates if one.split == split and one.group not in taken_groups
        ]
        for class_name in sorted({one.class_name for one in open_to_choice}):
            pool = [one for one in open_to_choice if one.class_name == class_name]
            generator = random.Random(f"{seed}/{split}/{class_name}")
            chosen += generator.sample(pool, min(per_class[split], len(pool)))
        taken_groups.update(one.group for one in chosen)
    return chosen


def encode_lossless(image: Image.Image) -> bytes:
    """Return the image as lossless WebP, a fifth smaller than PNG: 28 pixels cannot lose any."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=6, quality=100)
    return buffer.getvalue()


def encode_lossy(image: Image.Image) -> bytes:
    """Return the image as WebP at the quality that keeps both samples small."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=6, quality=XRAY_QUALITY)
    return buffer.getvalue()


def write_zip(path: Path, members: Mapping[str, bytes]) -> str:
    """Write the members in name order, each with the same date, and return the SHA-256."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name)
            # ZipInfo records the machine it runs on; the digest must not depend on that.
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, members[name])
    content = buffer.getvalue()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def update_catalogue(
    path: Path,
    *,
    name: str,
    digest: str,
    classes: Sequence[str],
    chosen: Sequence[Candidate],
) -> None:
    """Bring the facts of one sample in the catalogue up to date, and no other text."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    entry = next(entry for entry in entries if entry["name"] == name)
    entry["sha256"] = digest
    entry["classes"] = list(classes)
    entry["images"] = {
        split: sum(one.split == split for one in chosen) for split in ("train", "val")
    }
    entry["seed"] = SEED
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_bloodmnist(source: Path, out: Path) -> None:
    """Write ``bloodmnist.zip`` and its facts."""
    chosen = choose(without_duplicates(read_bloodmnist(source)), BLOOD_PER_CLASS, seed=SEED)
    members = {
        f"{one.split}/{one.class_name}/{one.name}.webp": encode_lossless(one.image)
        for one in chosen
    }
    digest = write_zip(out / "bloodmnist.zip", members)
    update_catalogue(
        out / "catalogue.json",
        name="bloodmnist",
        digest=digest,
        classes=BLOOD_CLASSES,
        chosen=chosen,
    )


def build_pneumonia(source: Path, out: Path) -> None:
    """Write ``pneumonia.zip`` and its facts."""
    chosen = choose(without_duplicates(read_pneumonia(source)), XRAY_PER_CLASS, seed=SEED)
    members = {
        f"{one.split}/{one.class_name}/{one.name}.webp": encode_lossy(one.image) for one in chosen
    }
    digest = write_zip(out / "pneumonia.zip", members)
    update_catalogue(
        out / "catalogue.json",
        name="pneumonia",
        digest=digest,
        classes=tuple(XRAY_FOLDERS),
        chosen=chosen,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the samples whose source is named; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.build_samples",
        description="Build the embedded image samples from your own copies of the sources.",
    )
    parser.add_argument("--bloodmnist", type=Path, metavar="FILE", help="MedMNIST's .npz file")
    parser.add_argument(
        "--pneumonia", type=Path, metavar="FOLDER", help="holds train and test of the X-rays"
    )
    parser.add_argument(
        "--out", type=Path, default=DATA_FOLDER, metavar="FOLDER", help="default: assets/data"
    )
    options = parser.parse_args(arguments)
    if options.bloodmnist is None and options.pneumonia is None:
        parser.error("no source was named; give --bloodmnist FILE, --pneumonia FOLDER or both")
    needed = [options.out / "catalogue.json"]
    if options.bloodmnist is not None:
        needed.append(options.bloodmnist)
    if options.pneumonia is not None:
        needed += [
            options.pneumonia / split / source_class
            for split in XRAY_SOURCE_SPLITS.values()
            for source_class in XRAY_FOLDERS.values()
        ]
    for path in needed:
        if not path.exists():
            parser.error(f'"{path}" does not exist; check the path')

    if options.bloodmnist is not None:
        build_bloodmnist(options.bloodmnist, options.out)
    if options.pneumonia is not None:
        build_pneumonia(options.pneumonia, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
