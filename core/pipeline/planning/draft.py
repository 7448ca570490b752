"""Selections on one network -> targets of a plan, and the arrays of its companion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from core.catalogue.schemes import scheme_numbers
from core.edit.draws import NO_DIRECTION, dash_factors
from core.errors import PlanError
from core.files.companions import packed, sealed
from core.network.connections import Part, Role
from core.pipeline.planning.subject import Subject
from core.records import Companion, Entries, LayerInfo, ReinitPlan, SchemeChoice, Target, Write
from core.records.outline import is_bias

# Up to so many indices stand in the JSON, where a person can read them.
FEW = 256
WRITE_OF: dict[Role, Write] = {
    "bias": "zero",
    "norm_scale": "one",
    "norm_shift": "zero",
    "norm_mean": "zero",
    "norm_var": "one",
    "scale": "fresh",
    "shift": "fresh",
}


class Draft:
    """What one scheme and seed write on a subject.

    Args:
        subject: The network.
        scheme: What is written.
        seed: Seed of the values.

    Raises:
        PlanError: Unknown scheme or numbers.
    """

    def __init__(self, subject: Subject, scheme: SchemeChoice, seed: int) -> None:
        self.subject, self.scheme, self.seed = subject, scheme, seed
        self.numbers = scheme_numbers(scheme.name, scheme.parameters)
        self.arrays: dict[str, np.ndarray] = {}
        self.notes: list[str] = []

    def entries(self, name: str, flat: np.ndarray, write: Write) -> Entries | None:
        """Return entries of a tensor as compactly as they can be said; None for none at all.

        Args:
            name: The tensor's `state_dict` name.
            flat: Row-major indices (k,), ascending.
            write: What is written into them.
        """
        if not len(flat):
            return None
        shape = tuple(self.subject.state[name].shape)
        axis, chosen = as_slices(flat, shape)
        length = int(np.prod(shape)) if axis is None else shape[axis]
        if len(chosen) == length:
            return Entries(tensor=name, write=write, axis=axis, count=length)
        if len(chosen) <= FEW:
            return Entries(
                tensor=name,
                write=write,
                axis=axis,
                indices=tuple(chosen.tolist()),
                count=len(chosen),
            )
        flags = np.zeros(length, dtype=bool)
        flags[chosen] = True
        key = f"{name}:{write}"
        self.arrays[key] = packed(flags)
        return Entries(tensor=name, write=write, axis=axis, mask=key, count=len(chosen))

    def weights(self, layer: LayerInfo, entries: Sequence[Entries | None]) -> list[Target]:
        """Return the target of single weights of a layer; none when nothing was chosen."""
        chosen = tuple(entry for entry in entries if entry is not None)
        if not chosen:
            return []
        return [
            Target(
                layer=layer.name,
                granularity="weight",
                parameters=tuple(dict.fromkeys(each.tensor for each in chosen)),
                entries=chosen,
                scheme=self.scheme,
                seed=self.seed,
            )
        ]

    def units(
        self, bundles: set[int], shifts: Mapping[str, np.ndarray] | None = None
    ) -> list[Target]:
        """Return the targets of units with all that belongs to them.

        Args:
            bundles: Bundles of the subject's connections.
            shifts: Tensor to what is added to it, in its shape, for readers that lose a unit's
                mean.
        """
        subject = self.subject
        members = subject.connections.members(sorted(bundles))
        wiring = subject.connections.wiring(sorted(bundles))
        layers = subject.outline.layers
        by_layer: dict[str, list[Entries | None]] = {}
        owner = {p.name: layer for layer in layers for p in layer.parameters}
        parameters = set(owner)
        # A norm without parameters is no layer: its statistics go with the layer it reads.
        for layer in layers:
            owner |= {name: layer for name in layer.coupled_buffers if name not in owner}
        owner |= {b: layer for layer in layers for b in layer.buffers}

        def note(part: Part, write: Write) -> None:
            if part.tensor not in owner:
                return  # Constants of a module that is no layer; a plan cannot name them.
            entries = self.entries(part.tensor, part.entries, write)
            by_layer.setdefault(owner[part.tensor].name, []).append(entries)

        for part in wiring.incoming:
            note(part, "scheme")
        for role, part in wiring.vectors:
            # A shift without a name of its own is a position embedding or the like.
            write = WRITE_OF[role]
            if role == "shift" and is_bias(part.tensor):
                write = "zero"
            note(part, write)
        for part in wiring.outgoing:
            note(part, "zero")
        for tensor, values in (shifts or {}).items():
            key = f"{tensor}:add"
            self.arrays[key] = values.astype(np.float32)
            entries = Entries(tensor=tensor, write="add", values=key, count=values.size)
            by_layer.setdefault(owner[tensor].name, []).append(entries)
        targets = []
        for layer in layers:
            slices = [each for each in by_layer.get(layer.name, []) if each is not None]
            if not slices:
                continue
            tensors = dict.fromkeys(each.tensor for each in slices)
            targets.append(
                Target(
                    layer=layer.name,
                    granularity="unit",
                    parameters=tuple(name for name in tensors if name in parameters),
                    buffers=tuple(name for name in tensors if name not in parameters),
                    units=members.get(layer.name, ()),
                    entries=tuple(slices),
                    scheme=self.scheme,
                    seed=self.seed,
                )
            )
        return targets

    def with_factors(self, plan: ReinitPlan, *, picked: bool) -> ReinitPlan:
        """Return a plan of layers whose scheme multiplies, with its factors.

        Args:
            plan: Whole layers.
            picked: Whether a person named each layer; one that cannot be taken is then refused,
                and else left out and noted.

        Raises:
            LimberError: No layer is left, or there are no images to take gradients of.
        """
        if any(target.granularity != "layer" for target in plan.targets):
            raise PlanError(f'The scheme "{self.scheme.name}" is for whole layers.')
        layers = {layer.name: layer for layer in self.subject.outline.layers}
        chosen = []
        for target in plan.targets:
            if takes_factors(layers[target.layer]):
                chosen.append(target)
            elif picked and layers[target.layer].kind == "conv":
                raise PlanError(f'"{target.layer}": {NO_DIRECTION}')
        if not chosen:
            raise PlanError(
                "DASH shrinks convolutions larger than 1x1 and linear layers, and none was chosen."
            )
        left = [target.layer for target in plan.targets if target not in chosen]
        if left:
            self.notes.append(
                "DASH only shrinks linear layers and convolutions larger than 1x1; left out: "
                f"{', '.join(left)}."
            )
        direction = self.subject.gradients(decay=self.numbers["alpha"])
        targets = []
        for target in chosen:
            entries = []
            for name in target.parameters:
                old = self.subject.state[name]
                factors = dash_factors(old, direction[name], self.numbers["lambda"])
                key = f"{name}:scale"
                self.arrays[key] = factors.numpy().astype(np.float32)
                entries.append(Entries(tensor=name, write="scale", values=key, count=old.numel()))
            targets.append(target.model_copy(update={"entries": tuple(entries), "buffers": ()}))
        return plan.model_copy(update={"targets": tuple(targets)})

    def sealed(self, plan: ReinitPlan) -> ReinitPlan:
        """Return the finished plan with its companion, if it needs one."""
        if not self.arrays:
            return plan
        named = Companion(file="plan.masks.safetensors", sha256="0" * 64)
        return sealed(plan.model_copy(update={"companion": named}), self.arrays)


def takes_factors(layer: LayerInfo) -> bool:
    """Whether DASH has a direction to compare for a layer: not for norms and 1x1 convolutions."""
    return layer.kind in ("conv", "linear") and not any(
        len(parameter.shape) > 2 and parameter.shape[2:].count(1) == len(parameter.shape[2:])
        for parameter in layer.parameters
    )


def as_slices(flat: np.ndarray, shape: Sequence[int]) -> tuple[int | None, np.ndarray]:
    """Return entries (k,) as whole slices along an axis where they are that, else as they are."""
    if len(shape) > 1:
        for axis, length in enumerate(shape):
            width = int(np.prod(shape)) // length
            if len(flat) % width:
                continue
            after = int(np.prod(shape[axis + 1 :], dtype=np.int64))
            chosen = np.unique(flat // after % length)
            if len(chosen) * width == len(flat):
                return axis, chosen
    return None, flat
