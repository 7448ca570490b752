"""A closer look at each layer while it is measured: distributions, classes, images, attention.

The same tensors are read as for the figures, in the same passes, so that a share read off a
distribution is the share in the table. It costs a pass over each activation more, and is taken
only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.measure.batch import Batch, Ear
from core.network.activations import Activation, derivative, saturated_intervals
from core.network.attention import Attention
from core.reductions import FEWEST_EIGENVALUES, as_matrix, power_law_tail, singular_values

Arrays = dict[str, np.ndarray]

# Bins between the ends of what the first batch shows; the ends of flat parts come on top.
BINS = 32
# Share of values left out at each end of that range, and how many values it is taken from.
OUTSIDE = 0.001
RANGE_SAMPLE = 200_000
# Images that a unit's list of strongest and weakest holds.
EXTREMES = 3
# Images whose attention is kept.
ATTENTION_IMAGES = 4
# Queries whose attention is computed at once.
QUERIES_AT_ONCE = 128
CURVE_POINTS = 201
# Decades of the signed logarithmic axis of gradients, below the largest entry; bins a decade.
DECADES = 6
BINS_A_DECADE = 4
# Values that one step of counting looks at, which bounds its memory.
CHUNK = 4_000_000
WIDEST_SPECTRUM = 2048
PRODUCTS = frozenset(
    {
        torch.mul,
        Tensor.mul,
        Tensor.mul_,
        Tensor.__mul__,
        Tensor.__rmul__,
        Tensor.__imul__,
    }
)


@dataclass(slots=True)
class Seen:
    """What was collected of one activation.

    Attributes:
        activation: The function.
        low, high: Range of the first batch; NaN before it.
        edges: (bins - 1,) float32 inner edges on the device; None before the first batch.
        flat: (bins,) bool on the device: whether a bin lies in a saturated interval.
        counts: (units, bins) int64 of pre-activations.
        by_class: (classes, units) float64, saturated pre-activations.
        rows: (classes,) float64, pre-activations of a unit.
        strongest, weakest: (few, units) means over positions, with the images' numbers.
        factor: (values,) of the other factor of a gate, from the first batch.
    """

    activation: Activation
    low: float = math.nan
    high: float = math.nan
    edges: Tensor | None = None
    flat: Tensor | None = None
    counts: Tensor | None = None
    by_class: Tensor | None = None
    rows: Tensor | None = None
    strongest: tuple[Tensor, Tensor] | None = None
    weakest: tuple[Tensor, Tensor] | None = None
    factor: Tensor | None = None


@dataclass(slots=True)
class _Reading:
    """What one batch adds to a `Seen`, held back until its pass has ended well."""

    layer: str
    counts: Tensor
    saturated: Tensor
    positions: int
    means: Tensor


@dataclass(slots=True)
class Inside:
    """The closer look at one network.

    Attributes:
        classes: How many classes there are.
        seen: Layer name to what was collected of the activation that it feeds.
        attention: Layer name to the first query's attention, which is the class token's where
            there is one, and the mean over queries; (images, heads, keys) float32 each.
        ranging: Whether ranges are being learnt, and nothing is counted yet.
    """

    classes: int
    layers: Sequence[str]
    seen: dict[str, Seen] = field(default_factory=dict)
    attention: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ranging: bool = True
    _labels: Tensor = field(default_factory=lambda: torch.empty(0))
    _first: int = 0
    _pending: list[_Reading] = field(default_factory=list)
    _outputs: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def begin(self, labels: Tensor, first: int) -> None:
        """Begin the pass of a batch with these labels, (n,); `first` numbers its first image."""
        self._labels, self._first = labels, first
        self._pending.clear()
        self._outputs.clear()

    def before(self, ear: Ear, z: Tensor) -> None:
        """Read the pre-activations of one activation, of the shape that its ear knows."""
        name = self.layers[ear.layer]
        last = z.detach().movedim(ear.axis, -1)
        if self.ranging:
            self._learn_range(name, ear.site.activation, last)
            return
        seen = self.seen.get(name)
        images = len(self._labels)
        # Windows of an image lie one after the other.
        if seen is not None and seen.edges is not None and len(last) % images == 0:
            rows = last.reshape(images, -1, last.shape[-1])
            self._pending.append(_counted(name, seen, rows))

    def after(self, ear: Ear, h: Tensor) -> None:
        """Remember an output, of any shape, to find what it is multiplied with."""
        if self.ranging:
            self._outputs[id(h)] = (h, self.layers[ear.layer])

    def called(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        inside: frozenset[str],
    ) -> None:
        """Notice the product of a gate: an activation's output times a tensor of its shape."""
        del kwargs, result, inside
        if function not in PRODUCTS or len(args) < 2:
            return
        for one, other in ((args[0], args[1]), (args[1], args[0])):
            h, name = self._outputs.get(id(one), (None, ""))
            if h is None or h is not one or not isinstance(other, Tensor):
                continue
            if other.shape == h.shape:
                self.seen[name].factor = _sampled(other.detach())

    def attended(self, layer: int, attention: Attention, batch: Batch) -> None:
        """Keep the attention of the first images; windows of images are left out."""
        name = self.layers[layer]
        entries, _, queries, _ = attention.shape
        if not self.ranging or name in self.attention or attention.every != 1:
            return
        if entries != batch.rows or (attention.entries or entries) != entries:
            return
        if not attention.heads_apart:
            return
        few = min(ATTENTION_IMAGES, entries)
        some, device = attention.first(few), self._labels.device
        total = torch.zeros((), device=device)
        first = torch.empty(0)
        # A part of the queries at a time: all weights of a large image are gigabytes.
        for start in range(0, queries, QUERIES_AT_ONCE):
            stop = min(queries, start + QUERIES_AT_ONCE)
            chosen = torch.arange(start, stop, device=device).expand(few, stop - start)
            weights = some.weights_of(chosen)
            total = total + weights.sum(2)
            first = weights[:, :, 0] if start == 0 else first
        self.attention[name] = (first.cpu(), (total / queries).cpu())

    def commit(self) -> None:
        """Add what the pass that has just ended read."""
        for reading in self._pending:
            self._add(self.seen[reading.layer], reading)
        self._pending.clear()
        self._outputs.clear()

    def _learn_range(self, name: str, activation: Activation, z: Tensor) -> None:
        some = _sampled(z)
        some = some[some.isfinite()]
        known = self.seen.setdefault(name, Seen(activation))
        if len(some):
            ends = torch.quantile(some, torch.tensor([OUTSIDE, 1 - OUTSIDE], device=some.device))
            known.low = min(_or(known.low, ends[0]), float(ends[0]))
            known.high = max(_or(known.high, ends[1]), float(ends[1]))

    def _add(self, seen: Seen, reading: _Reading) -> None:
        images = int(reading.means.shape[0])
        share = torch.zeros(
            (self.classes, images), dtype=torch.float64, device=reading.means.device
        )
        share[self._labels, torch.arange(images, device=share.device)] = 1.0
        by_class = share @ reading.saturated.double()
        rows = share.sum(1) * reading.positions
        seen.counts = _plus(seen.counts, reading.counts)
        seen.by_class, seen.rows = _plus(seen.by_class, by_class), _plus(seen.rows, rows)
        numbers = torch.arange(self._first, self._first + images, device=share.device)
        seen.strongest = _extremes(seen.strongest, reading.means, numbers, largest=True)
        seen.weakest = _extremes(seen.weakest, reading.means, numbers, largest=False)


def settle(own: Inside, twin: Inside, device: torch.device) -> None:
    """Choose the bins of each layer from what both networks showed; counting may begin."""
    for name, seen in own.seen.items():
        other = twin.seen.get(name)
        ranges = [(seen.low, seen.high)] + ([] if other is None else [(other.low, other.high)])
        known = [(low, high) for low, high in ranges if math.isfinite(low) and math.isfinite(high)]
        if known:
            low, high = min(low for low, _ in known), max(high for _, high in known)
            seen.edges, seen.flat = _bins(seen.activation, low, high, device)
            if other is not None:
                other.edges, other.flat = seen.edges, seen.flat
    own.ranging = twin.ranging = False


def _bins(
    activation: Activation, low: float, high: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return inner edges (bins - 1,) and whether each bin (bins,) is saturated.

    A bin holds what is above its lower edge and at most its upper one. A closed interval of
    saturation begins at the number below its lower end, so that both ends lie where counting
    for the figures puts them.
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
    infinity = np.float32(math.inf)
    intervals = saturated_intervals(activation)
    ends = [np.nextafter(np.float32(start), -infinity) for start, _ in intervals]
    ends += [np.float32(stop) for _, stop in intervals]
    grid = np.linspace(low, high, BINS + 1, dtype=np.float32)
    edges = np.unique([*grid, *(end for end in ends if np.isfinite(end))]).astype(np.float32)
    # One number of each bin tells for all of it: its upper edge, or the number above the last.
    inside = [*edges, np.nextafter(edges[-1], infinity)]
    flat = [
        any(
            np.nextafter(np.float32(start), -infinity) < z <= np.float32(stop)
            for start, stop in intervals
        )
        for z in inside
    ]
    return torch.from_numpy(edges).to(device), torch.tensor(flat, device=device)


def _counted(name: str, seen: Seen, rows: Tensor) -> _Reading:
    """Count pre-activations (images, positions, units) into their bins."""
    assert seen.edges is not None
    assert seen.flat is not None
    images, positions, units = rows.shape
    bins = len(seen.edges) + 1
    counts = torch.zeros(units * bins, dtype=torch.int64, device=rows.device)
    saturated = torch.empty((images, units), dtype=torch.float32, device=rows.device)
    offsets = torch.arange(units, device=rows.device, dtype=torch.int32) * bins
    step = max(1, CHUNK // max(1, positions * units))
    for start in range(0, images, step):
        part = rows[start : start + step].float().contiguous()
        place = torch.bucketize(part, seen.edges, out_int32=True)
        saturated[start : start + step] = seen.flat[place.long()].sum(1, dtype=torch.float32)
        counts += torch.bincount((place + offsets).flatten(), minlength=units * bins)
    means = rows.mean(1, dtype=torch.float32)
    return _Reading(name, counts.view(units, bins), saturated, positions, means)


def _sampled(z: Tensor) -> Tensor:
    flat = z.reshape(-1)
    step = max(1, len(flat) // RANGE_SAMPLE)
    # A step that shares a factor with the number of units would see the same few of them always.
    while math.gcd(step, z.shape[-1]) > 1:
        step += 1
    return flat[::step].float()


def _or(known: float, other: Tensor) -> float:
    return known if math.isfinite(known) else float(other)


def _plus(known: Tensor | None, more: Tensor) -> Tensor:
    return more if known is None else known + more


def _extremes(
    known: tuple[Tensor, Tensor] | None, means: Tensor, numbers: Tensor, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """Return the largest or smallest means, (few, units), and whose they are."""
    values, whose = means, numbers[:, None].expand(means.shape)
    if known is not None:
        values, whose = torch.cat([known[0], values]), torch.cat([known[1], whose])
    # Stable, so that of equals the earlier image stands first.
    order = torch.sort(values, dim=0, descending=largest, stable=True).indices[:EXTREMES]
    return values.gather(0, order), whose.gather(0, order)


def inside_arrays(inside: Inside, *, twin: bool = False) -> dict[str, Arrays]:
    """Return layer to arrays of the distribution, classes, images, gate and attention.

    "edges" (bins + 1,) with infinite ends, "flat" (bins,), "counts" (units, bins), "curve_x",
    "curve_h", "curve_slope" (points,), "by_class" (classes, units) shares, NaN for a class
    without images, "strongest", "weakest" (few, units) numbers of images, their "_value"s,
    "factor_edges", "factor_counts", "attention" (images, heads, keys): the first query's row,
    which is the class token's where there is one, and "attention_mean", the mean over queries.

    Args:
        inside: After the last batch.
        twin: Leave out what the network's and the twin's have in common, and the twin's images.
    """
    arrays: dict[str, Arrays] = {}
    for name, seen in inside.seen.items():
        if seen.edges is not None and seen.counts is not None:
            arrays[name] = _distribution(seen)
            if seen.factor is not None:
                arrays[name] |= _factor(seen.factor)
            if twin:
                arrays[name] = {what: arrays[name][what] for what in ("counts", "by_class")}
    for name, (first, mean) in () if twin else inside.attention.items():
        more = {"attention": first.half().numpy(), "attention_mean": mean.half().numpy()}
        arrays[name] = arrays.get(name, {}) | more
    return arrays


def _distribution(seen: Seen) -> Arrays:
    assert seen.edges is not None
    assert seen.flat is not None
    assert seen.counts is not None
    assert seen.by_class is not None
    assert seen.rows is not None
    assert seen.strongest is not None
    assert seen.weakest is not None
    edges = seen.edges.cpu().numpy()
    x = torch.linspace(float(edges[0]), float(edges[-1]), CURVE_POINTS, dtype=torch.float64)
    share = seen.by_class / seen.rows[:, None]
    arrays: Arrays = {
        "edges": np.concatenate([[-np.inf], edges, [np.inf]]).astype(np.float32),
        "flat": seen.flat.cpu().numpy().astype(np.uint8),
        "counts": seen.counts.cpu().numpy().astype(np.uint32),
        "curve_x": x.numpy().astype(np.float32),
        "curve_h": seen.activation(x).numpy().astype(np.float32),
        "curve_slope": derivative(seen.activation, x).numpy().astype(np.float32),
        "by_class": share.cpu().numpy().astype(np.float16),
    }
    for name, (values, whose) in (("strongest", seen.strongest), ("weakest", seen.weakest)):
        arrays[name] = whose.cpu().numpy().astype(np.int32)
        arrays[f"{name}_value"] = values.cpu().numpy().astype(np.float16)
    return arrays


def _factor(values: Tensor) -> Arrays:
    finite = values[values.isfinite()].cpu().numpy()
    if not len(finite):
        return {}
    low, high = np.quantile(finite, [OUTSIDE, 1 - OUTSIDE])
    counts, edges = np.histogram(finite, bins=BINS, range=(low, max(high, low + 1e-6)))
    return {
        "factor_edges": edges.astype(np.float32),
        "factor_counts": counts.astype(np.uint32),
    }


def weight_arrays(weight: Tensor) -> Arrays:
    """Return a weight's spectrum: "singular_values" (k,) and "tail": alpha, x_min, how many."""
    if weight.ndim < 2 or not bool(weight.isfinite().all()):
        return {}
    matrix = as_matrix(weight)
    if not 2 <= min(matrix.shape) <= WIDEST_SPECTRUM:
        return {}
    values = singular_values(matrix)
    arrays = {"singular_values": values.cpu().numpy().astype(np.float32)}
    tail = power_law_tail(values**2) if len(values) >= FEWEST_EIGENVALUES else None
    if tail is not None:
        arrays["tail"] = np.array(tail, dtype=np.float64)
    return arrays


def gradient_arrays(gradient: Tensor) -> Arrays:
    """Return the histogram of a gradient's entries on a signed logarithmic axis.

    Returns:
        "gradient_edges" (bins + 1,) and "gradient_counts" (bins,); the bin in the middle holds
        what is smaller than the axis shows, and exact zeros, whose share is "gradient_zeros"
        (1,). Empty where all entries are 0 or one is not finite.
    """
    entries = gradient.detach().reshape(-1).float().cpu().numpy()
    if not len(entries) or not np.isfinite(entries).all():
        return {}
    largest = float(np.abs(entries).max())
    zeros = np.array([float((entries == 0).mean())])
    if largest == 0:
        return {"gradient_zeros": zeros}
    top = math.ceil(math.log10(largest))
    ends = np.logspace(top - DECADES, top, DECADES * BINS_A_DECADE + 1)
    edges = np.concatenate([-ends[::-1], ends])
    counts, _ = np.histogram(entries, bins=edges)
    return {
        "gradient_edges": edges.astype(np.float64),
        "gradient_counts": counts.astype(np.uint32),
        "gradient_zeros": zeros,
    }
