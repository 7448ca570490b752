"""Tensor -> small tensor: pure arithmetic, and accumulators that merge exactly.

Every accumulator holds plain sums in float64, to which each batch adds its own sum (taken in
float32, pairwise), so adding batches one by one, in shards, or merging two halves gives the same
result up to the rounding of float64 sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Intervals = tuple[tuple[float, float], ...]


def unit_axis(kind: str, ndim: int) -> int:
    """Return the axis that counts units: 1 behind convolutions, the last one elsewhere.

    Convolutions give (batch, channel, height, width); linear layers give (..., feature), also
    in networks that keep images as (batch, height, width, channel).
    """
    return 1 if kind == "conv" and ndim > 1 else ndim - 1


def _others(tensor: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(tensor.ndim) if i != axis)


def in_intervals(z: Float[Tensor, "*shape"], intervals: Intervals) -> Bool[Tensor, "*shape"]:
    """Return a boolean tensor, true where z lies in one of the closed intervals. NaN is false."""
    inside = torch.zeros_like(z, dtype=torch.bool)
    for low, high in intervals:
        if low == -math.inf:
            inside |= z <= high
        elif high == math.inf:
            inside |= z >= low
        else:
            inside |= (z >= low) & (z <= high)
    return inside


@dataclass(slots=True)
class UnitSums:
    """Sums over rows, a figure a unit, of one activation site.

    Attributes:
        rows: Rows seen (samples times positions).
        positive: Rows with z > 0, (units,) float64.
        saturated: Rows whose z lies in a saturated interval, (units,) float64.
        nonzero: Rows with h != 0, (units,) float64.
        abs_h: Sum of |h|, (units,) float64.
        gradient_rows: Rows whose gradient was seen.
        abs_gradient: Sum of |dL/dh| of the per-sample loss, (units,) float64.
    """

    rows: int
    positive: Tensor
    saturated: Tensor
    nonzero: Tensor
    abs_h: Tensor
    gradient_rows: int
    abs_gradient: Tensor

    @classmethod
    def empty(cls, units: int, device: torch.device | str = "cpu") -> UnitSums:
        """Return sums over no rows."""
        zeros = [torch.zeros(units, dtype=torch.float64, device=device) for _ in range(5)]
        return cls(0, zeros[0], zeros[1], zeros[2], zeros[3], 0, zeros[4])

    def add_input(self, z: Tensor, axis: int, intervals: Intervals) -> None:
        """Count the rows of a pre-activation; units on `axis`."""
        over = _others(z, axis)
        self.rows += z.numel() // z.shape[axis]
        self.positive += (z > 0).sum(over)
        if intervals:
            self.saturated += in_intervals(z, intervals).sum(over)

    def add_output(self, h: Tensor, axis: int) -> None:
        """Add the magnitudes of an activation's output; units on `axis`."""
        over = _others(h, axis)
        magnitude = h.abs()
        self.abs_h += magnitude.sum(over, dtype=torch.float32)
        self.nonzero += (h != 0).sum(over)

    def add_gradient(self, gradient: Tensor, axis: int, scale: float) -> None:
        """Add |gradient| times `scale`; units on `axis`."""
        self.gradient_rows += gradient.numel() // gradient.shape[axis]
        total = gradient.abs().sum(_others(gradient, axis), dtype=torch.float32)
        self.abs_gradient += total.double() * scale

    def merged(self, other: UnitSums) -> UnitSums:
        """Return the sums over both sets of rows."""
        return UnitSums(
            self.rows + other.rows,
            self.positive + other.positive,
            self.saturated + other.saturated,
            self.nonzero + other.nonzero,
            self.abs_h + other.abs_h,
            self.gradient_rows + other.gradient_rows,
            self.abs_gradient + other.abs_gradient,
        )


def dormant_score(mean_abs: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """Return each unit's mean magnitude over the layer's mean of it: (units,) -> (units,).

    A wholly silent layer scores 0 everywhere.

    Source:
        Sokar et al., "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", ICML 2023,
        arXiv:2302.12902.
    """
    mean = mean_abs.mean()
    return torch.where(mean > 0, mean_abs / mean, torch.zeros_like(mean_abs))


def dormant_fraction(mean_abs: Float[Tensor, " unit"], *, tau: float) -> float:
    """Return the share of units whose magnitude is at most tau times the layer's mean.

    Args:
        mean_abs: (units,) mean |h| or mean |dL/dh|.
        tau: Highest score still called dormant, in [0, 1).

    Returns:
        In [0, 1]; a wholly silent layer gives 1, any non-finite entry NaN.

    Raises:
        ValueError: Empty input, or tau outside [0, 1).
    """
    if mean_abs.numel() == 0 or not 0.0 <= tau < 1.0:
        raise ValueError(
            f"need at least one unit and tau in [0, 1); got {tuple(mean_abs.shape)}, {tau}"
        )
    if not bool(torch.isfinite(mean_abs).all()):
        return math.nan
    return float((mean_abs <= tau * mean_abs.mean()).double().mean())


def binary_entropy(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return -p log2 p - (1 - p) log2 (1 - p) in bits, elementwise; 0 at p = 0 and 1."""
    q = 1 - p
    return -(torch.xlogy(p, p) + torch.xlogy(q, q)) / math.log(2)


def as_matrix(weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out in"]:  # noqa: UP037, F821
    """Return a weight as (outputs, inputs), all but the first axis flattened."""
    return weight.reshape(weight.shape[0], -1)


def stable_rank(singular_values: Float[Tensor, " k"]) -> float:
    """Return ||W||_F^2 / ||W||_2^2 from singular values (k,); 0 for an all-zero matrix."""
    squared = singular_values.double() ** 2
    top = squared.max()
    return float(squared.sum() / top) if top > 0 else 0.0


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    """Return exp of the entropy of s / sum(s), from singular values (k,); 0 for all zeros.

    Source:
        Roy & Vetterli, "The effective rank", EUSIPCO 2007.
    """
    values = singular_values.double()
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values / total
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def kurtosis(values: Float[Tensor, "*shape"]) -> float:
    """Return the excess kurtosis over all entries (normal: 0); NaN when they are all equal."""
    centred = values.double() - values.double().mean()
    variance = (centred**2).mean()
    # Equal entries leave rounding residue of the mean, not a variance.
    if variance <= (values.double().abs().max() * 1e-12) ** 2:
        return math.nan
    return float((centred**4).mean() / variance**2 - 3)
