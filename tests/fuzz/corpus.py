"""Small sound files that the fuzzer damages: images, weights, plans, diagnoses, parts."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MODEL = "timm:test_resnet"
CLASSES = ("left", "right")
SIDE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Where the sound files lie; nobody writes to them."""

    folder: Path

    @property
    def images(self) -> Path:
        """A folder of class folders with train and val."""
        return self.folder / "images"

    @property
    def zipped(self) -> Path:
        """The same as a zip file."""
        return self.folder / "images.zip"

    @property
    def arrays(self) -> Path:
        """The same as MedMNIST-style arrays."""
        return self.folder / "images.npz"

    @property
    def weights(self) -> Path:
        """A state dict saved by torch."""
        return self.folder / "weights.pth"

    @property
    def tensors(self) -> Path:
        """The same as safetensors."""
        return self.folder / "weights.safetensors"

    @property
    def plan(self) -> Path:
        """A plan of whole layers."""
        return self.folder / "plan.json"

    @property
    def masked(self) -> Path:
        """A plan of single weights, with masks in its companion."""
        return self.folder / "masked.json"

    @property
    def diagnosis(self) -> Path:
        """A diagnosis, with its companion of units."""
        return self.folder / "diagnosis.json"

    @property
    def part(self) -> Path:
        """One part of two."""
        return self.folder / "part1.safetensors"

    @property
    def edited(self) -> Path:
        """What the plan makes of the weights."""
        return self.folder / "edited.safetensors"


def build(folder: Path) -> Corpus:
    """Write the sound files with the tool's own command line.

    Raises:
        RuntimeError: A command that must work did not.
    """
    corpus = Corpus(folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    stored: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(CLASSES):
            place = corpus.images / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
                stored.setdefault(f"{split}_images", []).append(pixels)
                labels.setdefault(f"{split}_labels", []).append(label)
    with zipfile.ZipFile(corpus.zipped, "w") as archive:
        for path in sorted(corpus.images.rglob("*.png")):
            archive.write(path, path.relative_to(corpus.images))
    arrays = {name: np.stack(each) for name, each in stored.items()}
    arrays |= {name: np.array(each)[:, None] for name, each in labels.items()}
    np.savez_compressed(corpus.arrays, **arrays)

    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = timm.create_model(MODEL.removeprefix("timm:"), num_classes=len(CLASSES)).state_dict()
    torch.save(state, corpus.weights)
    save_file({name: value.contiguous() for name, value in state.items()}, corpus.tensors)
    network = ("--model", MODEL, "--checkpoint", str(corpus.weights))
    images = ("--data", str(corpus.images))
    few = ("--samples", "8", "--batch-size", "4", "--image-size", "32")
    ruled = ("--rule", "weight-magnitude", "--percent", "30")
    for command in (
        ("plan", *network, *images, "--layers", "layer4*", "--out", str(corpus.plan)),
        ("plan", *network, *images, *ruled, "--out", str(corpus.masked)),
        ("measure", *network, *images, *few, "--out", str(corpus.diagnosis)),
        ("measure", *network, *images, *few, "--part", "1/2", "--out", str(corpus.part)),
        ("apply", str(corpus.plan), "--out", str(corpus.edited)),
    ):
        _must_work(command)
    if "mask" not in json.dumps(json.loads(corpus.masked.read_text(encoding="utf-8"))["targets"]):
        raise RuntimeError("The plan of single weights has no mask: the fuzzer would miss them.")
    return corpus


def _must_work(command: tuple[str, ...]) -> None:
    import contextlib
    import io

    from core.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(command))
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: {said.getvalue()[-2000:]}")
