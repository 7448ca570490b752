"""Tensor -> small tensor: pure arithmetic, and moments that merge exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def unit_axis(kind: str, shape: Sequence[int], units: int | None = None) -> int:
    """Return the axis that counts units: 1 behind convolutions, the last one elsewhere.

    Convolutions give (batch, channel, height, width); linear layers give (..., feature), also
    in networks that keep images as (batch, height, width, channel). Some networks turn one into
    the other before the activation: where the usual axis has not as many entries as the layer
    has units, and the other one has, it is the other one.

    Args:
        kind: Of the layer.
        shape: Of what it made, or of what became of that.
        units: How many the layer has; None where nobody knows.
    """
    last = len(shape) - 1
    usual, other = (1, last) if kind == "conv" and last > 0 else (last, min(1, last))
    return other if units is not None and shape[usual] != units == shape[other] else usual


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations, entry by entry; entries may be missing (NaN).

    Attributes:
        count: float64, how many values each entry has seen.
        mean: float64, same shape.
        m2: float64, same shape; sum of (x - mean)^2.

    Source:
        Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, values: Float[Tensor, "*shape"]) -> Moments:
        """Return the moments of one value an entry; NaN stands for none."""
        there = ~values.isnan()
        value = torch.where(there, values.double(), 0.0)
        return cls(there.double(), value, torch.zeros_like(value))

    def merged(self, other: Moments) -> Moments:
        """Return the moments over the values of both; any order and grouping gives the same."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0.0)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta**2 * self.count * share,
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
    return weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))


def stable_rank(singular_values: Float[Tensor, " k"]) -> float:
    """Return ||W||_F^2 / ||W||_2^2 from singular values (k,); 0 for an all-zero matrix.

    Source:
        Rudelson & Vershynin, "Sampling from large matrices", JACM 2007.
    """
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


def rank_for(singular_values: Float[Tensor, " k"], *, share: float = 0.99) -> int:
    """Return how many singular values it takes for that share of their sum (srank); 0 for zeros.

    Args:
        singular_values: (k,), in any order.
        share: In (0, 1].

    Source:
        Kumar et al., "Implicit Under-Parameterization", ICLR 2021, arXiv:2010.14498, with
        delta = 1 - share.
    """
    values = singular_values.double().sort(descending=True).values
    total = values.sum()
    if total <= 0:
        return 0
    reached = values.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.double().argmax()) + 1


def isometry_distance(singular_values: Float[Tensor, " k"], *, rows: int, columns: int) -> float:
    """Return ||W'W - I||_F^2 over its smaller side, from the singular values of W.

    Args:
        singular_values: (min(rows, columns),).
        rows: Outputs.
        columns: Inputs.

    Returns:
        sum (s^2 - 1)^2 / k with k = min(rows, columns): W'W where W is tall, WW' where it is
        wide, since the larger of the two can never be the identity. 0 for an isometry.

    Source:
        The deviation that FIRE (arXiv:2602.08040) drives to 0. We divide by k, so that layers
        of different width compare.
    """
    squares = singular_values.double() ** 2
    return float(((squares - 1) ** 2).sum() / min(rows, columns))


# Fewer eigenvalues than this fit any power law.
FEWEST_EIGENVALUES = 20
# Eigenvalues of a float32 weight that differ by less are equal but for rounding.
EQUAL_SPREAD = 1e-6


def power_law_alpha(eigenvalues: Float[Tensor, " k"]) -> float:
    """Return the exponent that `power_law_tail` fits; NaN where there is none.

    Args:
        eigenvalues: (k,) of W'W, not negative.

    Source:
        Clauset, Shalizi & Newman 2009, arXiv:0706.1062; see `power_law_tail`.
    """
    tail = power_law_tail(eigenvalues)
    return math.nan if tail is None else tail[0]


def power_law_tail(eigenvalues: Float[Tensor, " k"]) -> tuple[float, float, int] | None:
    """Return a power law fitted to the upper tail of a spectrum; None if there are too few.

    The tail begins at that eigenvalue for which the fitted law comes closest to the empirical
    distribution (Kolmogorov-Smirnov distance); the exponent is the maximum-likelihood one,
    alpha = 1 + n / sum log(x / x_min).

    Args:
        eigenvalues: (k,) of W'W, not negative.

    Returns:
        alpha > 1, the eigenvalue at which the tail begins, and how many the tail holds. None
        below `FEWEST_EIGENVALUES` positive eigenvalues or when all are equal.

    Source:
        Clauset, Shalizi & Newman 2009, arXiv:0706.1062, as Martin & Mahoney apply it to layers
        (WeightWatcher 0.7.7). There a tail may hold two values, and the distance compares the
        law with the lower edge of each step of the empirical distribution alone. We let the tail
        be no shorter than a tenth of the spectrum and never fewer than ten values, because
        shorter ones fit anything, and compare both edges. Without these two differences the
        exponents agree to 1e-11 on the same eigenvalues.
    """
    values = eigenvalues.double()
    values = values[values > values.max() * 1e-12].sort().values if values.numel() else values
    n = values.numel()
    if n < FEWEST_EIGENVALUES:
        return None
    logs = values.log()
    starts = torch.arange(n - max(10, n // 10) + 1, device=values.device)
    tail = n - starts
    # Sum of log(x / x_min) over each tail, from sums over suffixes.
    suffix = logs.flip(0).cumsum(0).flip(0)[starts]
    spread = suffix - tail * logs[starts]
    alpha = 1 + tail / spread
    # Rows are tails, columns values: distance of both distribution functions at each value.
    model = 1 - torch.exp((1 - alpha)[:, None] * (logs[None] - logs[starts][:, None]))
    place = torch.arange(n, device=values.device)[None] - starts[:, None]
    inside = place >= 0
    below, upto = place / tail[:, None], (place + 1) / tail[:, None]
    gap = torch.maximum((model - below).abs(), (model - upto).abs())
    distance = torch.where(inside, gap, 0.0).amax(1)
    uneven = spread > EQUAL_SPREAD * tail
    distance = torch.where(uneven, distance, torch.inf)
    best = int(distance.argmin())
    if not uneven[best]:
        return None
    return float(alpha[best]), float(values[best]), int(tail[best])


def singular_values(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " k"]:
    """Return the singular values of a finite matrix, from the eigenvalues of its smaller square.

    Args:
        matrix: (rows, columns), any float dtype.

    Returns:
        (min(rows, columns),) float64, descending. Values below about 1e-8 of the largest drown
        in rounding: the square is taken in float64, ten times faster than a decomposition of
        the matrix and far below what any figure here can show.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    return torch.linalg.eigvalsh(_lower_square(wide), UPLO="L").clamp(min=0).sqrt().flip(0)


_STRIPE = 128


def _lower_square(matrix: Tensor) -> Tensor:
    """Return A A' where only the lower triangle is filled in: half of the products suffice."""
    rows = matrix.shape[0]
    square = torch.zeros((rows, rows), dtype=matrix.dtype, device=matrix.device)
    for begin in range(0, rows, _STRIPE):
        end = begin + _STRIPE
        square[begin:, begin:end] = matrix[begin:] @ matrix[begin:end].T
    return square


def kurtosis(values: Float[Tensor, "*shape"]) -> float:
    """Return the excess kurtosis over all entries (normal: 0); NaN when they are all equal."""
    centred = values.double() - values.double().mean()
    variance = (centred**2).mean()
    # Equal entries leave rounding residue of the mean, not a variance.
    if variance <= (values.double().abs().max() * 1e-12) ** 2:
        return math.nan
    return float((centred**4).mean() / variance**2 - 3)
