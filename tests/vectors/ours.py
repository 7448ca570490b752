"""The code under test on the vectors' network: from its files through a plan to edited weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import _registry, register_model
from torch import Tensor, nn

from core.edit.apply import entry_flags
from core.files.companions import arrays_of
from core.load import build_module, choose_items, open_images, resolve_data, resolve_model
from core.load.models import _timm_names
from core.pipeline.applying import edited_model
from core.pipeline.planning.control import random_control
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.planning.subject import Sight
from core.records import DataSpec, ModelSpec, ReinitPlan
from tests.vectors.network import Network
from tests.vectors.papers import Selected

CLASSES = 3
SIZE = 16
BATCH_SIZE = 6


def limber_vectors(
    pretrained: bool = False,
    num_classes: int = CLASSES,
    **_: object,
) -> nn.Module:
    """Build the network as timm builds one of its own; inputs are pixels / 255."""
    assert not pretrained
    network = Network(num_classes)
    network.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, SIZE, SIZE),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bilinear",
    }
    return network


@contextmanager
def known_to_timm() -> Iterator[None]:
    """Let timm know the network inside the block, so that it is loaded like any other."""
    register_model(limber_vectors)
    _timm_names.cache_clear()
    try:
        yield
    finally:
        _registry._clear_model_entries("limber_vectors")
        _registry._model_entrypoints.pop("limber_vectors")
        _timm_names.cache_clear()


@dataclass(frozen=True)
class Bench:
    """The files of the vectors as `core` opens them; use inside `known_to_timm`."""

    spec: ModelSpec
    data: DataSpec
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, vectors: Path, folder: Path) -> Bench:
        """Open the network of a folder of vectors; images go to `folder` as an npz file."""
        stored = load_file(vectors / "images.safetensors")
        pixels = stored["images"].movedim(1, -1).numpy()
        labels = stored["labels"].numpy()
        np.savez(
            folder / "images.npz",
            train_images=pixels,
            train_labels=labels,
            val_images=pixels,
            val_labels=labels,
        )
        return cls(
            spec=resolve_model(
                "timm:limber_vectors", checkpoint=str(vectors / "network.safetensors")
            ),
            data=resolve_data(str(folder / "images.npz")),
            state=load_file(vectors / "network.safetensors"),
        )

    def batches(self) -> list[list[int]]:
        """Return the images of each batch by their place in the file."""
        items = choose_items(open_images(self.data).splits["train"], 2 * BATCH_SIZE, seed=0)
        places = [int(item.key) for item in items]
        return [places[:BATCH_SIZE], places[BATCH_SIZE:]]

    def fresh(self, seed: int) -> dict[str, Tensor]:
        return dict(build_module(self.spec, classes=CLASSES, seed=seed).state_dict())

    def plan(self, vector: Mapping[str, Any]) -> ReinitPlan:
        """Return the plan that a vector asks for."""
        if vector["control_of"] is not None:
            return random_control(self.plan(vector["control_of"]), seed=vector["control_seed"])
        return plan_by_rule(
            self.spec,
            vector["rule"],
            vector["options"],
            classes=CLASSES,
            sight=Sight(
                data=self.data,
                samples=2 * BATCH_SIZE,
                batch_size=BATCH_SIZE,
                image_size=SIZE,
                device="cpu",
            ),
            wish=Wish(
                scheme=vector["scheme"],
                numbers=vector["numbers"],
                seed=vector["seed"],
                layers=None if vector["layers"] is None else tuple(vector["layers"]),
                units={layer: tuple(units) for layer, units in vector["units"].items()},
            ),
        )

    def result(self, vector: Mapping[str, Any]) -> tuple[Selected, dict[str, Tensor]]:
        """Return what our code selects for a vector, and the whole state afterwards."""
        plan = self.plan(vector)
        loaded, _ = edited_model(plan)
        return self._selected(plan), dict(loaded.module.state_dict())

    def _selected(self, plan: ReinitPlan) -> Selected:
        arrays = arrays_of(plan)
        found: Selected = {}
        for target in plan.targets:
            partly = {entries.tensor for entries in target.entries}
            for name in (*target.parameters, *target.buffers):
                if name not in partly:
                    write = "scheme" if name in target.parameters else "fresh"
                    everything = torch.ones(self.state[name].shape, dtype=torch.bool)
                    found.setdefault(name, {})[write] = everything
            for entries in target.entries:
                old = self.state[entries.tensor]
                flags = entry_flags(entries, old, arrays)
                writes = found.setdefault(entries.tensor, {})
                chosen = torch.ones(old.shape, dtype=torch.bool) if flags is None else flags
                writes[entries.write] = writes.get(entries.write, torch.zeros_like(chosen)) | chosen
        return found
