"""Watch one forward and one backward pass a batch, and read each tensor once.

Hard parts, and how they are met. In-place activations overwrite what we want to read, so
pre-activations are read before the call, or, where the output tells the same (ReLU and its
like), not at all. Module backward hooks break on in-place networks, so gradients of outputs come
from tensor hooks and those of weights from `torch.autograd.grad`, which never touches `.grad`.
The loss is the sum over images: gradients at units are those of one image's loss, whatever the
batch size. Nothing here waits for the device; figures are taken to the host after the last batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any, ParamSpec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.catalogue.metrics import DORMANT_TAU, NEAR_ZERO_OUTPUT, RARELY_ACTIVE
from core.errors import DataError, ModelError
from core.measure.kernels import ROWS, Intervals, Limits, Reader, Want, backend, gradient_totals
from core.measure.shard import (
    NO_KEYS,
    ROWS_AN_IMAGE,
    GradientTotal,
    HeadSums,
    Shard,
    SiteSums,
    best_keys,
    hashed,
    positions,
)
from core.network.activations import Activation, saturated_intervals
from core.network.attention import Attention
from core.network.hooks import Hooks, batch_statistics, checkpoints_opened, module_kept
from core.network.trace import OtherPassError, Site, Watch, first_tensor, watched
from core.records import LayerInfo
from core.reductions import Moments, binary_entropy
from core.seeding import random_state_kept

P = ParamSpec("P")

# Figures that one batch gives by itself, in the order in which moments hold them.
BATCH_FIGURES = (
    "grad_l2",
    "grad_mean_abs",
    "relative_grad_norm",
    "weight_grad_mean_abs",
    "grad_zero_fraction",
    "unit_grad_mean_abs_mean",
    "grad_dormant_fraction",
    "saturated_fraction",
    "rho_b",
    "dead_fraction",
    "rarely_active_fraction",
    "dormant_fraction",
    "near_zero_output_fraction",
    "activation_mean_abs",
    "sign_entropy",
    "attention_entropy",
)
# Queries of one image that attention entropy looks at.
QUERIES_AN_IMAGE = 8
# float16 gradients of small losses vanish below 6e-8; the loss is scaled up first.
LARGEST_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-8

EMPTY = "the weight has no entries"
RUN_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)


def main_parameter(layer: LayerInfo) -> str:
    """Return the `state_dict` name of the parameter a layer's figures speak of: its largest."""
    return max(layer.parameters, key=lambda parameter: parameter.count).name


def output_tells(activation: Activation) -> bool:
    """Return whether sign and saturation of z can be read off h, so that z need not be read."""
    if activation.name == "hardtanh":
        return activation.settings[0] <= 0 < activation.settings[1]
    return activation.name in ("relu", "relu6")


class _Ear:
    """How one activation is read, set up once, and what its reads of the batch in hand gave.

    While a pass runs, next to nothing of Python is in a cache and every step of it is slow, so
    that all but the reads themselves waits until the pass is over.

    Attributes:
        site: The activation.
        layer: Place of the layer that feeds it.
        units: How many it has.
        rows: Rows read.
        before: (5, units) float64 of z; None where h tells the same.
        sums: (5, units) float64 of h.
        gradient: (units,) float64, sum of |dL_n/dh|; None until it came.
    """

    def __init__(
        self, site: Site, layer: int, shape: torch.Size, axis: int, dtype: torch.dtype
    ) -> None:
        self.site, self.layer, self.shape, self.axis = site, layer, shape, axis
        self.units = shape[axis]
        self.rows = shape.numel() // max(self.units, 1)
        self.before: Tensor | None = None
        self.sums = torch.empty(0)
        self.gradient: Tensor | None = None
        want, limits = _wanted_of(site.activation, dtype)
        self.read = Reader(axis, want, limits)
        self.read_gradient = Reader(axis, Want.ABSOLUTE)
        self.read_before: Reader | None = None
        if not output_tells(site.activation):
            intervals = Limits(saturated_intervals(site.activation))
            self.read_before = Reader(axis, Want.POSITIVE | Want.INSIDE, intervals)


@dataclass(frozen=True, slots=True)
class _Offer:
    """Which rows of activations of one size are kept of a batch, and whose places they take.

    Attributes:
        before: Keys held before it; (kept,) uint64.
        after: Keys held after it.
        offered: How many rows were offered.
        images: (new,) entries of the first axis.
        places: (new,) positions in them.
        flat: (new,) on the device: both as one number.
        where: (new,) on the device: which kept rows they replace.
    """

    before: np.ndarray
    after: np.ndarray
    offered: int
    images: np.ndarray
    places: np.ndarray
    flat: Tensor
    where: Tensor


class Gauge:
    """One network under watch. Use it only through `watching`."""

    def __init__(
        self, module: nn.Module, layers: Sequence[LayerInfo], watch: Watch, *, dtype: torch.dtype
    ) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self.module, self.layers, self.dtype = module, layers, dtype
        self._watch = watch
        self.weights = {layer.name: parameters[main_parameter(layer)] for layer in layers}
        names: dict[int, str] = {}
        for layer in layers:
            weight = self.weights[layer.name]
            if weight.requires_grad and weight.numel():
                names.setdefault(id(weight), main_parameter(layer))
        self._keys = names
        self._wanted = {name: parameters[name] for name in names.values()}
        self.device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        self._norms = {
            name: weight.detach().double().norm() for name, weight in self._wanted.items()
        }
        self._feeders = {layer.activation: i for i, layer in enumerate(layers) if layer.activation}
        self._asking = {layer.attention: i for i, layer in enumerate(layers) if layer.attention}
        self.shard = Shard(0, 0, torch.zeros((), dtype=torch.float64, device=self.device))
        for name, weight in self._wanted.items():
            like = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self.shard.gradients[name] = GradientTotal(
                torch.zeros_like(weight, dtype=like, requires_grad=False),
                torch.zeros((), dtype=torch.float64, device=self.device),
            )
        self.sites: dict[str, Site] = {}
        self.backend = backend(self.device, torch.float32)
        self._hooks: Hooks
        self._first = 0
        self._rows = 0
        self._scale = LARGEST_SCALE if dtype == torch.float16 else 1.0
        self._settled = dtype != torch.float16
        self._ears: dict[str, _Ear] = {}
        # Of the batch in hand: which activations were read, attention by layer, and which rows
        # of an activation of so many positions are kept.
        self._reads: list[_Ear] = []
        self._rows_taken: list[tuple[str, _Offer, Tensor | None]] = []
        self._attention: dict[int, Tensor] = {}
        self._heads: list[tuple[str, HeadSums]] = []
        # Whether the network writes into its input; None before the first pass.
        self._writes: bool | None = None
        self._offers: dict[tuple[int, int, int], _Offer] = {}
        self._segments: tuple[tuple[int, ...], Tensor, Tensor] | None = None
        # Wall time spent on reading, of the whole of `add`; says little where work is queued.
        self.reading_s = 0.0
        self.whole_s = 0.0

    def gradient_of(self, layer: str) -> str | None:
        """Return under which name a layer's gradient is summed; None for a frozen one."""
        return self._keys.get(id(self.weights[layer]))

    def why_no_gradient(self, layer: LayerInfo) -> str:
        """Return why a layer's gradient is not summed, where `gradient_of` gives none."""
        weight = self.weights[layer.name]
        if not weight.numel():
            return EMPTY
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        if any(parameters[each.name].requires_grad for each in layer.parameters):
            name = main_parameter(layer)
            return f"{name} is frozen: it gets no gradient, though others of its layer do"
        return "the layer is frozen: it gets no gradient"

    def add(self, inputs: Tensor, labels: Tensor, *, first: int) -> Tensor:
        """Measure one batch.

        Args:
            inputs: (n, 3, height, width), normalised, on the module's device.
            labels: (n,).
            first: Number of the first image among all that are measured; the others follow.

        Returns:
            (layers, figures) float64 on the device: what this batch gives by itself, in the
            order of `BATCH_FIGURES`; NaN where a figure does not apply.

        Raises:
            DataError: A batch of one image meets a batch norm.
            ModelError: The forward or backward pass failed.
        """
        began = perf_counter()
        self._first, self._rows = first, len(inputs)
        if not self._settled:
            self._settle(inputs, labels)
        try:
            try:
                loss, gradients = self._pass(inputs, labels)
            except OtherPassError:
                # A network that goes another way with other images is named anew.
                self._watch.forget()
                loss, gradients = self._pass(inputs, labels)
        except RUN_ERRORS as error:
            raise _explained(error, inputs, labels) from error
        passed = perf_counter()
        self._check_reads()
        norms = self._add_gradients(gradients)
        del gradients
        self._add_reads()
        self.shard.samples += self._rows
        self.shard.batches += 1
        self.shard.loss = self.shard.loss + loss.detach().double()
        figures = self._batch_figures(norms)
        moments = Moments.of(figures)
        before = self.shard.moments
        self.shard.moments = moments if before is None else before.merged(moments)
        ended = perf_counter()
        self.reading_s += ended - passed
        self.whole_s += ended - began
        return figures

    def learn_sites(self, inputs: Tensor, labels: Tensor) -> None:
        """Run one batch to learn which activations there are, and forget its sums."""
        held, known = self.shard, dict(self.sites)
        self.shard = Shard(0, 0, torch.zeros_like(held.loss))
        for name, each in held.gradients.items():
            self.shard.gradients[name] = GradientTotal(
                torch.zeros_like(each.total), torch.zeros_like(each.squares)
            )
        try:
            self.add(inputs, labels, first=0)
        finally:
            self.shard = held
        self.sites |= known

    def _pass(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its gradients; reads wait to be added."""
        self._reads, self._rows_taken, self._heads = [], [], []
        self._attention, self._offers = {}, {}
        with torch.enable_grad(), self._watch.kept() as self._hooks:
            with self._watch.forward(
                before_activation=self._timed(self._before),
                after_activation=self._timed(self._after),
                on_attention=self._timed(self._attended) if self._asking else None,
            ):
                loss = self._loss(inputs, labels)
            for ear in self._reads:
                # Of a gradient taken inside the forward: it is not the loss's.
                ear.gradient = None
            return loss, self._gradients(loss)

    def _timed(self, call: Callable[P, None]) -> Callable[P, None]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> None:
            began = perf_counter()
            call(*args, **kwargs)
            self.reading_s += perf_counter() - began

        return timed

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        mixed = self.dtype in (torch.float16, torch.bfloat16)
        # The batch is wanted again: by the twin, and where a pass is repeated.
        given = inputs if self._writes is False else inputs.clone()
        version = given._version
        try:
            with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
                logits = first_tensor(self.module(given))
        finally:
            written = given._version != version
            if written and given is inputs:
                raise ModelError(
                    "The network writes into its input, and did not in the batches before. "
                    "Give it a copy of its input in its forward."
                )
        self._writes = self._writes or written
        if logits is None:
            raise TypeError("the network returned no tensor")
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, reduction="sum")

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        if not self._wanted:
            return {}
        found = torch.autograd.grad(
            loss * self._scale if self._scale != 1.0 else loss,
            list(self._wanted.values()),
            allow_unused=True,
        )
        return {
            name: gradient
            for name, gradient in zip(self._wanted, found, strict=True)
            if gradient is not None
        }

    def _settle(self, inputs: Tensor, labels: Tensor) -> None:
        """Halve the scale of the loss until no float16 gradient overflows. Waits for the device."""
        while self._scale > SMALLEST_SCALE:
            try:
                with torch.enable_grad(), self._watch.kept():
                    gradients = self._gradients(self._loss(inputs, labels))
            except RUN_ERRORS as error:
                raise _explained(error, inputs, labels) from error
            if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
                break
            self._scale /= 2
        # Later batches may be a little larger.
        self._scale /= 4
        self._settled = True

    def _add_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add this batch's gradients to the sums; return (4,) sums of each by name."""
        if not gradients:
            return {}
        held = [self.shard.gradients[name] for name in gradients]
        sums = gradient_totals(
            [self._wanted[name] for name in gradients],
            list(gradients.values()),
            [each.total for each in held],
            scale=1 / self._scale,
        )
        for each, square in zip(held, (sums[:, 0] / self._rows).unbind(), strict=True):
            each.squares = each.squares + square
            each.reached += 1
        return dict(zip(gradients, sums.unbind(), strict=True))

    def _batch_figures(self, norms: dict[str, Tensor]) -> Tensor:
        """Return (layers, figures) of this batch, all layers in the same few operations."""
        table = torch.full(
            (len(BATCH_FIGURES), len(self.layers)),
            math.nan,
            dtype=torch.float64,
            device=self.device,
        )
        if norms:
            places = [
                i for i, layer in enumerate(self.layers) if self.gradient_of(layer.name) in norms
            ]
            keys = [self.gradient_of(self.layers[i].name) or "" for i in places]
            index = _on(places, self.device)
            square, absolute, product, zeros = torch.stack([norms[key] for key in keys], 1)
            size = _on([float(self._wanted[key].numel()) for key in keys], self.device)
            length = square.sqrt() / self._rows
            table[_row("grad_l2"), index] = length
            table[_row("grad_mean_abs"), index] = absolute / (size * self._rows)
            norm = torch.stack([self._norms[key] for key in keys])
            table[_row("relative_grad_norm"), index] = length / norm
            table[_row("weight_grad_mean_abs"), index] = product / (size * self._rows)
            table[_row("grad_zero_fraction"), index] = zeros / size
        if self._reads:
            self._site_figures(table)
        if self._attention:
            index = _on(list(self._attention), self.device)
            table[_row("attention_entropy"), index] = torch.stack(list(self._attention.values()))
        return table.T.contiguous()

    def _site_figures(self, table: Tensor) -> None:
        reads = self._reads
        widths = tuple(read.sums.shape[1] for read in reads)
        if self._segments is None or self._segments[0] != widths:
            # (units, sites): which site a unit belongs to, and the same as a mean over units.
            owner = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
            mean = torch.zeros(sum(widths), len(widths), dtype=torch.float64)
            mean[torch.arange(len(owner)), owner] = 1 / torch.tensor(widths).double()[owner]
            self._segments = widths, owner.to(self.device), mean.to(self.device)
        _, owner, mean = self._segments
        index = _on([read.layer for read in reads], self.device)
        rows = _on([float(read.rows) for read in reads], self.device)[owner]
        absolute, positive, inside, near, offset = (
            torch.cat([read.sums for read in reads], 1) / rows
        )
        at_units = torch.cat(
            [
                torch.full_like(read.sums[0], math.nan) if read.gradient is None else read.gradient
                for read in reads
            ]
        )
        at_units = at_units / rows
        by_unit = torch.stack([absolute, inside, near, offset, binary_entropy(positive), at_units])
        # In a product one site's NaN would reach all others.
        broken_units = ~by_unit.isfinite()
        means = torch.where(broken_units, 0.0, by_unit) @ mean
        means = torch.where(broken_units.double() @ mean > 0, math.nan, means)
        shares = (
            torch.stack(
                [
                    (absolute <= DORMANT_TAU * means[0][owner]).double(),
                    (positive == 0).double(),
                    (positive < RARELY_ACTIVE).double(),
                    (at_units <= DORMANT_TAU * means[5][owner]).double(),
                ]
            )
            @ mean
        )
        # A unit that holds NaN counts nowhere, so what was counted would be a guess.
        broken = torch.where(means[0].isfinite(), 0.0, math.nan)
        at_broken = torch.where(means[5].isfinite(), 0.0, math.nan)
        spans = [read.site.activation.bounds or (math.nan, math.nan) for read in reads]
        factor = _on([2 / (high - low) for low, high in spans], self.device)
        rectifies = _on(
            [0.0 if read.site.activation.rectifies else math.nan for read in reads], self.device
        )
        for name, values in (
            ("activation_mean_abs", means[0] + broken),
            ("saturated_fraction", means[1] + broken),
            ("near_zero_output_fraction", means[2] + broken),
            ("rho_b", means[3] * factor),
            ("sign_entropy", means[4] + broken),
            ("unit_grad_mean_abs_mean", means[5] + at_broken),
            ("dormant_fraction", shares[0] + broken),
            ("dead_fraction", shares[1] + rectifies + broken),
            ("rarely_active_fraction", shares[2] + rectifies + broken),
            ("grad_dormant_fraction", shares[3] + at_broken),
        ):
            table[_row(name), index] = values

    def _samples(self, entries: int) -> np.ndarray:
        """Return numbers for the entries of a tensor's first axis: images, or windows of them."""
        if self._rows and entries % self._rows == 0:
            return np.arange(entries) + self._first * (entries // self._rows)
        return np.arange(entries)

    def _ear(self, site: Site, z: Tensor) -> _Ear | None:
        """Return how an activation is read; None for one that belongs to no layer."""
        ear = self._ears.get(site.name)
        if ear is not None and ear.shape == z.shape and ear.site.activation == site.activation:
            return ear
        place = self._feeders.get(site.name)
        if place is None or z.ndim <= max(1, axis := self.layers[place].unit_axis):
            return None
        ear = self._ears[site.name] = _Ear(site, place, z.shape, axis, z.dtype)
        return ear

    def _before(self, site: Site, z: Tensor) -> None:
        ear = self._ear(site, z)
        if ear is not None:
            ear.before = None if ear.read_before is None else ear.read_before(z)

    def _after(self, site: Site, h: Tensor) -> None:
        ear = self._ear(site, h)
        if ear is None:
            return
        ear.sums, ear.gradient = ear.read(h), None
        self._take_rows(site.name, h.detach(), ear.axis)
        self._reads.append(ear)

        def on_gradient(gradient: Tensor) -> None:
            began = perf_counter()
            ear.gradient = ear.read_gradient(gradient)[0]
            self.reading_s += perf_counter() - began

        self._hooks.gradient(h, on_gradient)

    def _check_reads(self) -> None:
        """Refuse an activation of another width before anything of the batch is added.

        Raises:
            ModelError: With the activation and both widths.
        """
        for ear in self._reads:
            known = self.shard.sites.get(ear.site.name)
            if known is not None and known.sums.shape[1] != ear.units:
                raise ModelError(
                    f'The activation "{ear.site.name}" had {known.sums.shape[1]} units in earlier '
                    f"batches and has {ear.units} in this one, so that no figure speaks of a unit. "
                    "Give batches that it treats alike."
                )

    def _add_reads(self) -> None:
        """Add what was read of the batch in hand to the sums."""
        for name, sums in self._heads:
            heads = self.shard.heads.get(name)
            self.shard.heads[name] = sums if heads is None else heads.merged(sums)
        for ear in self._reads:
            known = self.shard.sites.get(ear.site.name)
            if known is None:
                known = SiteSums.empty(ear.units, ear.sums.device)
                self.shard.sites[ear.site.name] = known
                self.sites[ear.site.name] = ear.site
            if ear.before is not None:
                ear.sums += ear.before
            if ear.site.activation.rectifies:
                ear.sums[ROWS[Want.INSIDE]] += ear.rows - ear.sums[ROWS[Want.POSITIVE]]
            known.sums += ear.sums
            known.rows += ear.rows
            if ear.gradient is not None:
                if self._scale != 1.0:
                    ear.gradient /= self._scale
                known.gradient += ear.gradient
                known.gradient_rows += ear.rows
        for name, offer, rows in self._rows_taken:
            sample = self.shard.sites[name].sample
            sample.take_in(offer.after, offer.where, rows, offered=offer.offered)

    def _take_rows(self, name: str, h: Tensor, axis: int) -> None:
        """Take some rows of h for the sample that its rank is taken from.

        The choice depends on the number of the image and of positions alone, so that all
        activations of one size share it.
        """
        last = h.movedim(axis, -1)
        size = last.shape[0], math.prod(last.shape[1:-1])
        # Samples of one size hold one array of keys.
        known = self.shard.sites.get(name)
        keys = NO_KEYS if known is None else known.sample.keys
        offer = self._offers.get((*size, id(keys)))
        if offer is None:
            offer = self._offers[*size, id(keys)] = self._offered(size, keys)
        rows = None
        if len(offer.flat) and last.is_contiguous():
            # In the order of memory a position is one number, whatever the number of axes.
            rows = last.flatten(0, -2).index_select(0, offer.flat)
        elif len(offer.flat):
            inside = np.unravel_index(offer.places, last.shape[1:-1]) if last.ndim > 2 else ()
            rows = last[tuple(_on(each, h.device) for each in (offer.images, *inside))]
        self._rows_taken.append((name, offer, rows))

    def _offered(self, size: tuple[int, int], held: np.ndarray) -> _Offer:
        samples = self._samples(size[0])
        chosen = positions(samples, size[1], most=ROWS_AN_IMAGE, salt=size[1])
        numbers = samples[:, None].astype(np.uint64) * np.uint64(2**24)
        keys = hashed(numbers + chosen.astype(np.uint64), salt=1).ravel()
        after, new, where = best_keys(held, keys)
        images = np.repeat(np.arange(size[0]), chosen.shape[1])[new]
        places = chosen.ravel()[new]
        flat = _on(images * size[1] + places, self.device)
        return _Offer(held, after, len(keys), images, places, flat, _on(where, self.device))

    def _attended(self, name: str, inside: str, attention: Attention) -> None:
        del inside
        place = self._asking.get(name)
        if place is None:
            return
        batch, _, queries, _ = attention.shape
        if batch == 0 or queries == 0:
            return
        whole = attention.entries or batch
        samples = self._samples(whole)[:: attention.every]
        windows = max(1, whole // max(self._rows, 1))
        most = max(1, QUERIES_AN_IMAGE // windows)
        chosen = positions(samples, queries, most=most, salt=queries)
        entropy, chooses = attention.entropy(_on(chosen, self.device))
        sums = HeadSums(chooses.sum((0, 2)), entropy.double().sum((0, 2)))
        self._heads.append((name, sums))
        self._attention[place] = (sums.entropy / sums.rows).mean()


def _row(name: str) -> int:
    return BATCH_FIGURES.index(name)


def _on(values: list[float] | list[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return numbers as a tensor on the device, without waiting for it."""
    if isinstance(values, np.ndarray):
        held = torch.from_numpy(values)
    else:
        held = torch.tensor(
            values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64
        )
    return held.to(device, non_blocking=True)


@cache
def _wanted_of(activation: Activation, dtype: torch.dtype) -> tuple[Want, Limits]:
    want, middle = Want.ABSOLUTE | Want.NEAR, 0.0
    intervals: Intervals = ()
    if output_tells(activation):
        want |= Want.POSITIVE
        intervals = saturated_intervals(activation)
        if activation.rectifies:
            # What is not positive is saturated: no need to count it twice.
            intervals = tuple(each for each in intervals if each[1] > 0)
        # Outputs at a bound are at the number next to it that their type has.
        intervals = tuple(
            (torch.tensor(low, dtype=dtype).item(), torch.tensor(high, dtype=dtype).item())
            for low, high in intervals
        )
        if intervals:
            want |= Want.INSIDE
    if activation.bounds is not None:
        want |= Want.OFFSET
        middle = sum(activation.bounds) / 2
    return want, Limits(intervals, middle, NEAR_ZERO_OUTPUT)


def _eager() -> AbstractContextManager[Any]:
    """Have compiled parts run as written: what is compiled cannot be watched."""
    # Nothing is compiled before this is loaded, and loading it takes a second.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


@contextmanager
def watching(
    module: nn.Module, layers: Sequence[LayerInfo], *, dtype: torch.dtype = torch.float32
) -> Iterator[Gauge]:
    """Put a network under watch; it is exactly as it was after the block.

    Norms with running statistics use the batch's own inside and do not update theirs; everything
    else is in eval mode.

    Args:
        module: On its device.
        layers: The layers to report on, from the outline of the same architecture.
        dtype: float32, or float16 or bfloat16 to run under autocast.
    """
    with (
        _eager(),
        checkpoints_opened(),
        module_kept(module),
        random_state_kept(0),
        watched(module) as watch,
    ):
        batch_statistics(module)
        yield Gauge(module, layers, watch, dtype=dtype)


def _explained(error: Exception, inputs: Tensor, labels: Tensor) -> Exception:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "more than 1 value per channel" in first:
        return DataError(
            "A batch of one image cannot be normalised over the batch. Use a batch size of 2 or "
            "more, and a number of samples that does not leave a single image over."
        )
    return ModelError(
        f"The network cannot run on inputs of {tuple(inputs.shape)} with labels up to "
        f"{int(labels.max())}: {first[:200]}. Check the image size."
    )
