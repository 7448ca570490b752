"""The figures that one batch gives by itself, of which intervals are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.catalogue.metrics import DORMANT_TAU, RARELY_ACTIVE
from core.measure.batch import Batch, Ear, on_device
from core.measure.weights import Weights
from core.reductions import binary_entropy

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


class BatchTable:
    """Makes the table of a batch's figures; what batches of one kind share is made once.

    Args:
        weights: The network's.
        device: Where they are.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._norms = {
            name: weight.detach().double().norm() for name, weight in weights.trained.items()
        }
        self._segments: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def of(self, batch: Batch, norms: Mapping[str, Tensor]) -> Tensor:
        """Return (layers, figures) float64 of a batch, all layers in the same few operations.

        Args:
            batch: After its pass.
            norms: Parameter to the (4,) sums of its gradient.
        """
        table = torch.full(
            (len(BATCH_FIGURES), len(self._weights.layers)),
            math.nan,
            dtype=torch.float64,
            device=self._device,
        )
        if norms:
            places = [
                i
                for i, layer in enumerate(self._weights.layers)
                if self._weights.gradient_of(layer.name) in norms
            ]
            keys = [self._weights.gradient_of(self._weights.layers[i].name) or "" for i in places]
            index = on_device(places, self._device)
            square, absolute, product, zeros = torch.stack([norms[key] for key in keys], 1)
            size = on_device(
                [float(self._weights.trained[key].numel()) for key in keys], self._device
            )
            length = square.sqrt() / batch.rows
            table[_row("grad_l2"), index] = length
            table[_row("grad_mean_abs"), index] = absolute / (size * batch.rows)
            norm = torch.stack([self._norms[key] for key in keys])
            table[_row("relative_grad_norm"), index] = length / norm
            table[_row("weight_grad_mean_abs"), index] = product / (size * batch.rows)
            table[_row("grad_zero_fraction"), index] = zeros / size
        if batch.reads:
            self._add_sites(table, batch.reads)
        if batch.attention:
            index = on_device(list(batch.attention), self._device)
            table[_row("attention_entropy"), index] = torch.stack(list(batch.attention.values()))
        return table.T.contiguous()

    def _add_sites(self, table: Tensor, reads: Sequence[Ear]) -> None:
        widths = tuple(read.sums.shape[1] for read in reads)
        if self._segments is None or self._segments[0] != widths:
            # (units, sites): which site a unit belongs to, and the same as a mean over units.
            owner = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
            mean = torch.zeros(sum(widths), len(widths), dtype=torch.float64)
            mean[torch.arange(len(owner)), owner] = 1 / torch.tensor(widths).double()[owner]
            self._segments = widths, owner.to(self._device), mean.to(self._device)
        _, owner, mean = self._segments
        index = on_device([read.layer for read in reads], self._device)
        rows = on_device([float(read.rows) for read in reads], self._device)[owner]
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
        factor = on_device([2 / (high - low) for low, high in spans], self._device)
        rectifies = on_device(
            [0.0 if read.site.activation.rectifies else math.nan for read in reads], self._device
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


def _row(name: str) -> int:
    return BATCH_FIGURES.index(name)
