"""Trace one forward and one backward pass a batch, and read each tensor once.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ParamSpec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import DataError, ModelError
from core.measure.batch import Batch, Ear, Offer, on_device
from core.measure.inside import Inside
from core.measure.kernels import ROWS, Want, backend, gradient_totals
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
from core.measure.table import BatchTable
from core.measure.weights import Weights
from core.network.attention import Attention
from core.network.hooks import Hooks, batch_statistics, checkpoints_opened, module_kept
from core.network.trace import OtherPassError, Site, Tracing, first_tensor, traced
from core.records import LayerInfo
from core.reductions import Moments
from core.seeding import random_state_kept

P = ParamSpec("P")

# Queries of one image that attention entropy looks at.
QUERIES_AN_IMAGE = 8
# float16 gradients of small losses vanish below 6e-8; the loss is scaled up first.
LARGEST_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-8

RUN_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)


class LossScale:
    """By what the loss is multiplied so that float16 gradients neither vanish nor overflow."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.value = LARGEST_SCALE if dtype == torch.float16 else 1.0
        self._settled = dtype != torch.float16

    def up(self, loss: Tensor) -> Tensor:
        """Return the loss, a scalar, scaled up."""
        return loss if self.value == 1.0 else loss * self.value

    def settle(self, finite: Callable[[], bool]) -> None:
        """Halve the scale until no gradient of the first batch overflows; once.

        Args:
            finite: Runs the batch under the scale and says whether all gradients are finite.
        """
        if self._settled:
            return
        while self.value > SMALLEST_SCALE and not finite():
            self.value /= 2
        # Later batches may be a little larger.
        self.value /= 4
        self._settled = True


@dataclass(frozen=True, slots=True)
class Summed:
    """What figures are made of.

    Attributes:
        shard: The sums over all batches.
        weights: The network's.
        sites: Name of an activation to what it is.
        backend: By what means sums were taken.
    """

    shard: Shard
    weights: Weights
    sites: Mapping[str, Site]
    backend: str


class Gauge:
    """One network being measured. Use it only through `gauging`."""

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[LayerInfo],
        tracing: Tracing,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.module, self.dtype = module, dtype
        self.weights = Weights.of(module, layers)
        self.device = next(module.parameters(), torch.empty(0)).device
        self._tracing = tracing
        self._feeders = {layer.activation: i for i, layer in enumerate(layers) if layer.activation}
        self._asking = {layer.attention: i for i, layer in enumerate(layers) if layer.attention}
        self._table = BatchTable(self.weights, self.device)
        self.shard = Shard(0, 0, torch.zeros((), dtype=torch.float64, device=self.device))
        for name, weight in self.weights.trained.items():
            like = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self.shard.gradients[name] = GradientTotal(
                torch.zeros_like(weight, dtype=like, requires_grad=False),
                torch.zeros((), dtype=torch.float64, device=self.device),
            )
        self.sites: dict[str, Site] = {}
        self.backend = backend(self.device, torch.float32)
        self._hooks: Hooks
        self._scale = LossScale(dtype)
        self._ears: dict[str, Ear] = {}
        self._batch = Batch()
        # The closer look, where one was asked for.
        self.inside: Inside | None = None
        # Whether the network writes into its input; None before the first pass.
        self._writes: bool | None = None
        # Wall time spent on reading, of the whole of `add`; says little where work is queued.
        self.reading_s = 0.0
        self.whole_s = 0.0

    @property
    def summed(self) -> Summed:
        """All that was seen so far, for `figures_of`."""
        return Summed(self.shard, self.weights, self.sites, self.backend)

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
        try:
            self._scale.settle(lambda: self._trial(inputs, labels))
            try:
                loss, gradients = self._pass(inputs, labels, first)
            except OtherPassError:
                # A network that goes another way with other images is named anew.
                self._tracing.forget()
                loss, gradients = self._pass(inputs, labels, first)
        except RUN_ERRORS as error:
            raise _explained(error, inputs, labels) from error
        if self.inside is not None:
            self.inside.commit()
        passed = perf_counter()
        self._check_reads()
        norms = self._add_gradients(gradients)
        del gradients
        self._add_reads()
        self.shard.samples += self._batch.rows
        self.shard.batches += 1
        self.shard.loss = self.shard.loss + loss.detach().double()
        figures = self._table.of(self._batch, norms)
        moments = Moments.of(figures)
        before = self.shard.moments
        self.shard.moments = moments if before is None else before.merged(moments)
        ended = perf_counter()
        self.reading_s += ended - passed
        self.whole_s += ended - began
        return figures

    def learn_sites(self, inputs: Tensor, labels: Tensor) -> None:
        """Run one batch to learn which activations there are, and forget its sums.

        Args:
            inputs: (n, 3, h, w), on the network's device.
            labels: (n,).
        """
        held, known = self.shard, dict(self.sites)
        self.shard = Shard(0, 0, torch.zeros_like(held.loss))
        for name, gradient in held.gradients.items():
            self.shard.gradients[name] = GradientTotal(
                torch.zeros_like(gradient.total), torch.zeros_like(gradient.squares)
            )
        try:
            self.add(inputs, labels, first=0)
        finally:
            self.shard = held
        self.sites |= known

    def _pass(self, inputs: Tensor, labels: Tensor, first: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its gradients; reads wait to be added."""
        self._batch = Batch(first, len(inputs))
        look = self.inside
        if look is not None:
            look.begin(labels, first)
        with torch.enable_grad(), self._tracing.kept() as self._hooks:
            with self._tracing.forward(
                before_activation=self._timed(self._before),
                after_activation=self._timed(self._after),
                on_attention=self._timed(self._attended) if self._asking else None,
                on_call=look.called if look is not None and look.ranging else None,
            ):
                loss = self._loss(inputs, labels)
            for ear in self._batch.reads:
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
        if not self.weights.trained:
            return {}
        gradients = torch.autograd.grad(
            self._scale.up(loss),
            list(self.weights.trained.values()),
            allow_unused=True,
        )
        return {
            name: gradient
            for name, gradient in zip(self.weights.trained, gradients, strict=True)
            if gradient is not None
        }

    def _trial(self, inputs: Tensor, labels: Tensor) -> bool:
        """Return whether all gradients of a batch are finite. Waits for the device."""
        with torch.enable_grad(), self._tracing.kept():
            gradients = self._gradients(self._loss(inputs, labels))
        return all(bool(gradient.isfinite().all()) for gradient in gradients.values())

    def _add_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add this batch's gradients to the sums; return (4,) sums of each by name."""
        if not gradients:
            return {}
        held = [self.shard.gradients[name] for name in gradients]
        sums = gradient_totals(
            [self.weights.trained[name] for name in gradients],
            list(gradients.values()),
            [total.total for total in held],
            scale=1 / self._scale.value,
        )
        for total, square in zip(held, (sums[:, 0] / self._batch.rows).unbind(), strict=True):
            total.squares = total.squares + square
            total.reached += 1
        return dict(zip(gradients, sums.unbind(), strict=True))

    def _ear(self, site: Site, z: Tensor) -> Ear | None:
        """Return how an activation is read; None for one that belongs to no layer."""
        ear = self._ears.get(site.name)
        if ear is not None and ear.shape == z.shape and ear.site.activation == site.activation:
            return ear
        place = self._feeders.get(site.name)
        if place is None or z.ndim <= max(1, axis := self.weights.layers[place].unit_axis):
            return None
        ear = self._ears[site.name] = Ear(site, place, z.shape, axis, z.dtype)
        return ear

    def _before(self, site: Site, z: Tensor) -> None:
        ear = self._ear(site, z)
        if ear is not None:
            ear.before = None if ear.read_before is None else ear.read_before(z)
            if self.inside is not None:
                self.inside.before(ear, z)

    def _after(self, site: Site, h: Tensor) -> None:
        ear = self._ear(site, h)
        if ear is None:
            return
        ear.sums, ear.gradient = ear.read(h), None
        if self.inside is not None:
            self.inside.after(ear, h)
        self._take_rows(site.name, h.detach(), ear.axis)
        self._batch.reads.append(ear)

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
        for ear in self._batch.reads:
            known = self.shard.sites.get(ear.site.name)
            if known is not None and known.sums.shape[1] != ear.units:
                raise ModelError(
                    f'The activation "{ear.site.name}" had {known.sums.shape[1]} units in earlier '
                    f"batches and has {ear.units} in this one, so that no figure speaks of a unit. "
                    "Give batches that it treats alike."
                )

    def _add_reads(self) -> None:
        """Add what was read of the batch in hand to the sums."""
        for name, sums in self._batch.heads:
            heads = self.shard.heads.get(name)
            self.shard.heads[name] = sums if heads is None else heads.merged(sums)
        for ear in self._batch.reads:
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
                if self._scale.value != 1.0:
                    ear.gradient /= self._scale.value
                known.gradient += ear.gradient
                known.gradient_rows += ear.rows
        for name, offer, rows in self._batch.rows_taken:
            sample = self.shard.sites[name].sample
            sample.take_in(offer.after, offer.where, rows, offered=offer.offered)

    def _take_rows(self, name: str, h: Tensor, axis: int) -> None:
        """Take some rows of h for the sample that its rank is taken from.

        The choice depends only on the number of the image and of positions, so that all
        activations of one size share it.
        """
        last = h.movedim(axis, -1)
        size = last.shape[0], math.prod(last.shape[1:-1])
        # Samples of one size hold one array of keys.
        known = self.shard.sites.get(name)
        keys = NO_KEYS if known is None else known.sample.keys
        offer = self._batch.offers.get((*size, id(keys)))
        if offer is None:
            offer = self._batch.offers[*size, id(keys)] = self._offered(size, keys)
        rows = None
        if len(offer.flat) and last.is_contiguous():
            # In the order of memory a position is one number, whatever the number of axes.
            rows = last.flatten(0, -2).index_select(0, offer.flat)
        elif len(offer.flat):
            inside = np.unravel_index(offer.places, last.shape[1:-1]) if last.ndim > 2 else ()
            rows = last[tuple(on_device(places, h.device) for places in (offer.images, *inside))]
        self._batch.rows_taken.append((name, offer, rows))

    def _offered(self, size: tuple[int, int], held: np.ndarray) -> Offer:
        samples = self._batch.images(size[0])
        chosen = positions(samples, size[1], most=ROWS_AN_IMAGE, salt=size[1])
        numbers = samples[:, None].astype(np.uint64) * np.uint64(2**24)
        keys = hashed(numbers + chosen.astype(np.uint64), salt=1).ravel()
        after, new, where = best_keys(held, keys)
        images = np.repeat(np.arange(size[0]), chosen.shape[1])[new]
        places = chosen.ravel()[new]
        flat = on_device(images * size[1] + places, self.device)
        return Offer(held, after, len(keys), images, places, flat, on_device(where, self.device))

    def _attended(self, name: str, inside: str, attention: Attention) -> None:
        del inside
        place = self._asking.get(name)
        if place is None:
            return
        batch, _, queries, _ = attention.shape
        if batch == 0 or queries == 0:
            return
        whole = attention.entries or batch
        samples = self._batch.images(whole)[:: attention.every]
        if self.inside is not None:
            self.inside.attended(place, attention, self._batch)
        windows = max(1, whole // max(self._batch.rows, 1))
        most = max(1, QUERIES_AN_IMAGE // windows)
        chosen = positions(samples, queries, most=most, salt=queries)
        entropy, chooses = attention.entropy(on_device(chosen, self.device))
        if not attention.heads_apart:
            chooses, entropy = chooses.flatten(0, 1)[:, None], entropy.flatten(0, 1)[:, None]
        sums = HeadSums(chooses.sum((0, 2)), entropy.double().sum((0, 2)))
        self._batch.heads.append((name, sums))
        self._batch.attention[place] = (sums.entropy / sums.rows).mean()


def _eager() -> AbstractContextManager[Any]:
    """Have compiled parts run as written: what is compiled cannot be traced."""
    # Nothing is compiled before this is loaded, and loading it takes a second.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


@contextmanager
def gauging(
    module: nn.Module, layers: Sequence[LayerInfo], *, dtype: torch.dtype = torch.float32
) -> Iterator[Gauge]:
    """Measure a network inside the block, and leave it exactly as it was.

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
        traced(module) as tracing,
    ):
        batch_statistics(module)
        yield Gauge(module, layers, tracing, dtype=dtype)


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
