"""Units and what belongs to them: what the tracer found, and what can be asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from core.errors import PlanError

NOBODY = -1

Role = Literal["bias", "norm_scale", "norm_shift", "norm_mean", "norm_var", "scale", "shift"]
# Which entries of which parameter a product takes, and along which axes; see `place_of`.
Place = tuple[Any, ...]


# Operations that leave every entry where it is.
COPIES = frozenset({"clone", "contiguous", "detach", "alias", "lift_fresh_copy", "_to_copy"})
# Operations that show the entries of a tensor in another form, or some of them.
VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t"),
        *("expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow"),
        *("squeeze", "unsqueeze", "movedim", "diagonal"),
    }
)


@dataclass(frozen=True, slots=True)
class Tracked:
    """A parameter or buffer, moved about but not computed with; `entries` are flat indices."""

    name: str
    shape: tuple[int, ...]
    moves: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()

    def entries(self) -> np.ndarray:
        """Return the flat index of each entry, in the shape it has now."""
        count = int(np.prod(self.shape, dtype=np.int64))
        current = torch.arange(count).reshape(self.shape)
        for _, move in self.moves:
            current = move(current)
        return current.numpy()

    def shadow(self) -> Tensor | None:
        """Return the parameter in its present shape, without content; None where it is no view."""
        current: Tensor | None = torch.empty(self.shape, device="meta")
        for name, move in self.moves:
            current = None if current is None else shadowed(name, move, current)
        return current


def shadowed(name: str, move: Callable[[Tensor], Any], shadow: Tensor) -> Any:
    """Return a shadow, or several, behind one more operation; None where it is no view.

    A shadow is a view, without content, of a contiguous tensor in the shape of a parameter. It
    tells which entries of the parameter stand where, whatever memory format that is in.
    """
    if name in COPIES:
        return shadow
    if name not in VIEWS:
        return None
    try:
        return move(shadow)
    except RuntimeError:
        # What was copied into order before it took this form is no view.
        return None


def place_of(name: str, shadow: Tensor, *, in_axis: int, out_axis: int, groups: int = 1) -> Place:
    """Return by what a use of a parameter as a weight is known again, in whatever form it comes.

    A linear layer may be a product with a transposed view here and a batched product with an
    expanded one there: both take the same entries along the same axes.

    Args:
        name: The parameter.
        shadow: A view of the contiguous parameter, of any shape; its content does not matter.
        in_axis: The axis that is summed over.
        out_axis: The axis of what is made.
        groups: Groups of a convolution.
    """
    steps = (shadow.stride(axis) if length > 1 else 0 for axis, length in enumerate(shadow.shape))
    axes = list(zip(shadow.shape, steps, strict=True))
    ends = (in_axis % shadow.ndim, out_axis % shadow.ndim)
    rest = tuple(axis for place, axis in enumerate(axes) if place not in ends and axis[1])
    return (name, shadow.storage_offset(), axes[ends[0]], axes[ends[1]], rest, groups)


@dataclass(slots=True)
class Mix:
    """Weights that read the units `reads` and make the units `makes`.

    In the array of entries `makes` lies on axis `out_axis`; with `groups` the n-th part of the
    outputs reads the n-th part of the inputs, counted along `in_axis`. `bias` is added to what
    they make before anything else is done with it; `mean`, the running mean of a batch norm
    as a rule, is taken off it.
    """

    parameter: Tracked
    reads: np.ndarray
    makes: np.ndarray
    in_axis: int
    out_axis: int
    groups: int = 1
    channelwise: bool = False
    bias: Tracked | None = None
    mean: Tracked | None = None

    @property
    def taker(self) -> Tracked | None:
        """What can take over a mean that is lost."""
        return self.mean if self.bias is None else self.bias

    @property
    def place(self) -> Place:
        """By what its uses are known again; by itself where the entries are no view."""
        shadow = self.parameter.shadow()
        if shadow is None:
            return (self.parameter.name, id(self))
        axes = {"in_axis": self.in_axis, "out_axis": self.out_axis, "groups": self.groups}
        return place_of(self.parameter.name, shadow, **axes)


@dataclass(slots=True)
class Reading:
    """What one use of some weights was multiplied with, summed over images and places.

    Attributes:
        total: float64 (inputs, places of the kernel), what each entry of a weight met; the zeros
            of a padded border are part of it.
        outputs: How many values each output has given: over these `total` is summed.
        magnitude: float64 (inputs,), the sum of the absolute values of the input.
        rows: How many values each input had.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    outputs: int = 0
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: int = 0

    @property
    def mean(self) -> np.ndarray:
        """Mean input that each entry of a weight met, (inputs, places of the kernel)."""
        means: np.ndarray = (self.total / self.outputs).numpy()
        return means

    @property
    def mean_abs(self) -> np.ndarray:
        """Mean |input|, (inputs,)."""
        means: np.ndarray = (self.magnitude / self.rows).numpy()
        return means


# Uses of the same weights in one pass, in order.
Readings = Mapping[Place, Sequence[Reading]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shifts:
    """Where the means go that readers lose with the units they read.

    Attributes:
        values: Tensor to what is added to it, in its shape.
        untaken: Weights of readers that lose a mean which nothing can take over.
    """

    values: Mapping[str, np.ndarray]
    untaken: tuple[str, ...]


@dataclass(slots=True)
class Owned:
    """A parameter or buffer of which each entry belongs to the units in `owners`."""

    parameter: Tracked
    owners: np.ndarray
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Entries of one tensor: flat indices, ascending."""

    tensor: str
    entries: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """All that belongs to some units.

    Attributes:
        incoming: Entries of weights that make them.
        vectors: Entries of biases, norms and scales of their own, by role.
        outgoing: Entries of weights that read them.
    """

    incoming: tuple[Part, ...]
    vectors: tuple[tuple[Role, Part], ...]
    outgoing: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """The units of a network and how they hang together.

    A *bundle* is the smallest set of units that can be reset without changing what the others
    do: mostly one channel of one layer, or a channel of all layers that a residual sum ties, or
    an attention head.

    Attributes:
        bundles: Layer to the bundle of each of its units, (units,).
        reasons: Bundle to why it cannot be reset.
    """

    bundles: Mapping[str, np.ndarray]
    reasons: Mapping[int, str]
    _of: np.ndarray
    _mixes: tuple[Mix, ...]
    _vectors: tuple[Owned, ...]
    _births: tuple[tuple[int, str, Any, Any], ...]
    # Every use of a parameter or buffer that does more than move it about.
    _uses: tuple[Tracked, ...]

    def units_of(self, layer: str) -> np.ndarray:
        """Return the bundle of each unit of a layer, (units,).

        Raises:
            PlanError: The layer makes no units that the trace could follow.
        """
        if layer not in self.bundles:
            raise PlanError(
                f'"{layer}" makes no units: no weight of it was seen in a convolution or a matrix '
                "product. Reset it as a whole layer."
            )
        return self.bundles[layer]

    def free(self, bundle: int) -> bool:
        """Whether a bundle can be reset."""
        return bundle not in self.reasons

    def members(self, bundles: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return layer to units for everything in the bundles."""
        wanted = np.asarray(sorted(bundles))
        members = {
            layer: tuple(np.flatnonzero(np.isin(of, wanted)).tolist())
            for layer, of in self.bundles.items()
        }
        return {layer: units for layer, units in members.items() if units}

    def wiring(self, bundles: Sequence[int]) -> Wiring:
        """Return the entries that make, accompany and read these bundles."""
        chosen = np.zeros(int(self._of.max(initial=0)) + 2, dtype=bool)
        chosen[list(bundles)] = True

        def picked(labels: np.ndarray) -> np.ndarray:
            known = labels != NOBODY
            flags: np.ndarray = known & chosen[np.where(known, self._of[labels], -1)]
            return flags

        incoming: dict[str, list[np.ndarray]] = {}
        outgoing: dict[str, list[np.ndarray]] = {}
        for mix in self._mixes:
            made, read = picked(mix.makes), picked(mix.reads)
            if not made.any() and (mix.channelwise or not read.any()):
                continue
            entries = mix.parameter.entries()
            if made.any():
                rows = np.compress(made, entries, axis=mix.out_axis)
                incoming.setdefault(mix.parameter.name, []).append(rows.ravel())
            if read.any() and not mix.channelwise:
                outgoing.setdefault(mix.parameter.name, []).append(
                    _read_entries(mix, entries, read)
                )
        vectors: dict[tuple[Role, str], list[np.ndarray]] = {}
        for vector in self._vectors:
            owned = picked(vector.owners)
            if not owned.any():
                continue
            entries = vector.parameter.entries()
            whole = np.broadcast_to(owned, np.broadcast_shapes(owned.shape, entries.shape))
            # An entry that other units share stays as it is.
            shared = np.unique(np.broadcast_to(entries, whole.shape)[~whole])
            inside = np.unique(np.broadcast_to(entries, whole.shape)[whole])
            mine = np.setdiff1d(inside, shared, assume_unique=True)
            if len(mine):
                vectors.setdefault((vector.role, vector.parameter.name), []).append(mine)
        return Wiring(
            incoming=_parts(incoming),
            vectors=tuple(
                (role, Part(tensor=name, entries=_joined(found)))
                for (role, name), found in vectors.items()
            ),
            outgoing=_parts(outgoing),
        )

    def touching(self, tensors: Collection[str]) -> set[int]:
        """Return the bundles that these tensors make, accompany or read."""
        rows = [vector.owners for vector in self._vectors if vector.parameter.name in tensors]
        for mix in self._mixes:
            if mix.parameter.name in tensors:
                rows += [mix.makes] if mix.channelwise else [mix.makes, mix.reads]
        places: set[int] = set()
        for labels in rows:
            places.update(self._of[labels[labels != NOBODY]].tolist())
        return places

    def _values(self, by_unit: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a value for each label, (labels,), from values of units; NaN where unknown."""
        values = np.full(len(self._of), np.nan)
        for start, kind, first, second in self._births:
            if kind == "leaf":
                known = by_unit.get(first)
                if known is not None and len(known) == second:
                    values[start : start + second] = known
            else:
                join = np.maximum if kind == "sum" else np.fmin
                values[start : start + len(first)] = join(values[first], values[second])
        return values

    def _readers(self) -> Iterator[Mix]:
        return (mix for mix in self._mixes if not mix.channelwise)

    def scores(self, by_unit: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a score for each bundle, (bundles,), from scores of units.

        What counts is what the readers of a unit see. Where two units are added the higher score
        counts, where they are multiplied the lower one, and of several readers the highest: a
        unit is dormant when it is so wherever it is read. NaN where a score is not known.

        Args:
            by_unit: Layer to score of each of its units, (units,).
        """
        values = self._values(by_unit)
        bundles = np.full(int(self._of.max(initial=-1)) + 1, -np.inf)
        for mix in self._readers():
            labels = mix.reads[mix.reads != NOBODY]
            with np.errstate(invalid="ignore"):
                np.maximum.at(bundles, self._of[labels], values[labels])
        bundles[np.isneginf(bundles)] = np.nan
        return bundles

    def read_places(self) -> frozenset[Place]:
        """Return the places of the weights that read units."""
        return frozenset(mix.place for mix in self._readers() if (mix.reads != NOBODY).any())

    def _read(self, readings: Readings) -> Iterator[tuple[Mix, Reading | None]]:
        """Yield each reader with what it read; None where that was not seen."""
        places = [mix.place for mix in self._readers()]
        uses, passed = Counter(places), Counter[Place]()
        for mix, place in zip(self._readers(), places, strict=True):
            known = readings.get(place, ())
            # Another number of uses than in the trace: which is which is anyone's guess.
            yield mix, known[passed[place]] if len(known) == uses[place] else None
            passed[place] += 1

    def contributions(self, readings: Readings, state: Mapping[str, Tensor]) -> np.ndarray:
        """Return mean |outgoing weight| times mean |what is read| for each bundle, (bundles,).

        Both are taken at the reader: behind pooling, norms and sums, and place by place for a
        reader of places (a linear layer behind a flattened image), over which the product is then
        averaged. The mean weight is taken over all entries of a reader that read the unit; several
        readers add up. NaN where a reader was not seen.

        Args:
            readings: What was read; see `readings_of`.
            state: The network's weights.

        Source:
            Dohare et al., Loss of plasticity in deep continual learning, Nature 2024. Its code
            (shibhansh/loss-of-plasticity, cbp_conv.py) takes a unit's activation behind the
            pooling, before the flattening; the images here are all of a pass, not a running mean.
        """
        bundles = np.zeros(int(self._of.max(initial=-1)) + 1)
        read = np.zeros(len(bundles), dtype=bool)
        for mix, reading in self._read(readings):
            known = mix.reads != NOBODY
            if not known.any():
                continue
            # With groups, an input is read only by the outputs of its own group.
            blocks = self._weights(mix, state).abs().chunk(mix.groups)
            share = torch.cat([block.mean(dim=(0, 2)) for block in blocks]).numpy()
            share = share * (np.nan if reading is None else reading.mean_abs)
            labels, where = np.unique(mix.reads[known], return_inverse=True)
            mean = np.bincount(where, share[known]) / np.bincount(where)
            np.add.at(bundles, self._of[labels], mean)
            read[self._of[labels]] = True
        return np.where(read, bundles, np.nan)

    def shifts(
        self, chosen: Sequence[int] | set[int], readings: Readings, state: Mapping[str, Tensor]
    ) -> Shifts:
        """Return what readers gain so that the mean of their output stays when units are removed.

        A removed input takes w E x with it, x being what the weight w met in the images: behind
        pooling, norms and sums, and with the zeros of a padded border. That goes into the reader's
        bias, or off the running mean of a batch norm right behind a reader without one. A bias
        that several uses of the same weights share gets their mean; one that is used in any other
        way takes over nothing. A unit that is itself reset gains nothing.

        The mean over images and places is kept; at a single place it may be another, most of all
        at a padded border, where fewer weights meet an input.

        Args:
            chosen: Bundles that are reset.
            readings: What was read; see `readings_of`.
            state: The network's weights, and the buffers that may be written, each in its shape.

        Source:
            Dohare et al., Nature 2024. Their code (gnt.py) has this step for biases, with means
            that it has set to 0 by then; running means are ours.
        """
        gone = np.isin(self._of, sorted(chosen))
        users: dict[tuple[str, bytes], list[tuple[Mix, Reading | None]]] = {}
        untaken: list[str] = []
        losses: dict[Place, np.ndarray] = {}
        for mix in self._readers():
            # What one use of a weight loses every other use of it loses too.
            lost = (mix.reads != NOBODY) & gone[mix.reads]
            losses[mix.place] = lost | losses.get(mix.place, False)
        for mix, reading in self._read(readings):
            if mix.taker is not None and mix.taker.name in state:
                key = (mix.taker.name, mix.taker.entries().tobytes())
                users.setdefault(key, []).append((mix, reading))
            elif losses[mix.place].any() and not gone[mix.makes].all():
                untaken.append(mix.parameter.name)
        used: dict[str, list[Tracked]] = {}
        for use in self._uses:
            used.setdefault(use.name, []).append(use)
        values: dict[str, np.ndarray] = {}
        for sharing in users.values():
            losing = [
                mix for mix, _ in sharing if losses[mix.place].any() and not gone[mix.makes].all()
            ]
            taker = sharing[0][0].taker
            if not losing or taker is None:
                continue
            if not _takes_for(taker, [mix for mix, _ in sharing], used[taker.name]):
                untaken += [part.parameter.name for part in losing]
                continue
            gain, outputs = np.zeros(taker.entries().size), 0
            for mix, reading in sharing:
                if reading is None:
                    untaken += [part.parameter.name for part in losing]
                    break
                lost = self._lost(mix, losses[mix.place], reading, state)
                gain += np.where(gone[mix.makes], 0.0, lost) * reading.outputs
                outputs += reading.outputs
            else:
                whole = values.setdefault(taker.name, np.zeros(taker.shape))
                sign = 1.0 if taker is sharing[0][0].bias else -1.0
                whole.reshape(-1)[taker.entries().reshape(-1)] += sign * gain / outputs
        return Shifts(values=values, untaken=tuple(dict.fromkeys(untaken)))

    def _lost(
        self, mix: Mix, removed: np.ndarray, reading: Reading, state: Mapping[str, Tensor]
    ) -> np.ndarray:
        """Return the mean that each output of a reader loses with its lost inputs."""
        weights = np.split(self._weights(mix, state).numpy(), mix.groups)
        seen = np.split(np.where(removed[:, None], reading.mean, 0.0), mix.groups)
        pairs = zip(weights, seen, strict=True)
        return np.concatenate([np.tensordot(block, part, axes=2) for block, part in pairs])

    def _weights(self, mix: Mix, state: Mapping[str, Tensor]) -> Tensor:
        """Return a reader's weights as (outputs, inputs of a group, rest), float64."""
        flat = state[mix.parameter.name].detach().flatten().double()
        entries = torch.from_numpy(np.ascontiguousarray(mix.parameter.entries()))
        weights = flat[entries].movedim((mix.out_axis, mix.in_axis), (0, 1))
        return weights.reshape(*weights.shape[:2], -1)


def _takes_for(taker: Tracked, readers: Sequence[Mix], uses: Sequence[Tracked]) -> bool:
    """Whether what is added to a bias or running mean reaches nothing but these outputs, as it is.

    Args:
        taker: The bias or running mean.
        readers: Those that have it to take over for them; they must be uses of the same weights.
        uses: Every use of its tensor in the network.
    """
    entries = taker.entries().ravel()
    if len(np.unique(entries)) < len(entries) or len({mix.place for mix in readers}) > 1:
        return False
    touching = sum(bool(np.isin(use.entries(), entries).any()) for use in uses)
    return touching == len(readers)


def _read_entries(mix: Mix, entries: np.ndarray, read: np.ndarray) -> np.ndarray:
    if mix.groups == 1:
        taken: np.ndarray = np.compress(read, entries, axis=mix.in_axis)
        return taken.ravel()
    found = []
    rows = np.split(entries, mix.groups, axis=mix.out_axis)
    for block, part in zip(rows, np.split(read, mix.groups), strict=True):
        found.append(np.compress(part, block, axis=mix.in_axis).ravel())
    return np.concatenate(found)


def _joined(found: Sequence[np.ndarray]) -> np.ndarray:
    # By flags: sorting the hundred million entries of a wide linear layer takes a minute.
    flags = np.zeros(max(int(places.max(initial=-1)) for places in found) + 1, dtype=bool)
    for places in found:
        flags[places] = True
    return np.flatnonzero(flags)


def _parts(found: Mapping[str, list[np.ndarray]]) -> tuple[Part, ...]:
    return tuple(Part(tensor=name, entries=_joined(entries)) for name, entries in found.items())
