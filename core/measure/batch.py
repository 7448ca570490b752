"""What the reads of one batch gave, and how an activation is read.

While a pass runs, next to nothing of Python is in a cache and every step of it is slow, so that
all but the reads themselves waits until the pass is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from core.catalogue.metrics import NEAR_ZERO_OUTPUT
from core.measure.kernels import Intervals, Limits, Reader, Want
from core.measure.shard import HeadSums
from core.network.activations import Activation, saturated_intervals
from core.network.trace import Site


def output_tells(activation: Activation) -> bool:
    """Return whether sign and saturation of z can be read off h, so that z need not be read."""
    if activation.name == "hardtanh":
        return activation.settings[0] <= 0 < activation.settings[1]
    return activation.name in ("relu", "relu6")


@cache
def wanted_of(activation: Activation, dtype: torch.dtype) -> tuple[Want, Limits]:
    """Return which sums of an activation's output are taken, and their limits.

    Args:
        activation: Which one.
        dtype: Of its output; outputs at a bound are at the number next to it that this type has.
    """
    want, middle = Want.ABSOLUTE | Want.NEAR, 0.0
    intervals: Intervals = ()
    if output_tells(activation):
        want |= Want.POSITIVE
        intervals = saturated_intervals(activation)
        if activation.rectifies:
            # What is not positive is saturated: no need to count it twice.
            intervals = tuple(interval for interval in intervals if interval[1] > 0)
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


class Ear:
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
        want, limits = wanted_of(site.activation, dtype)
        self.read = Reader(axis, want, limits)
        self.read_gradient = Reader(axis, Want.ABSOLUTE)
        self.read_before: Reader | None = None
        if not output_tells(site.activation):
            intervals = Limits(saturated_intervals(site.activation))
            self.read_before = Reader(axis, Want.POSITIVE | Want.INSIDE, intervals)


@dataclass(frozen=True, slots=True)
class Offer:
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


@dataclass(slots=True)
class Batch:
    """The batch in hand.

    Attributes:
        first: Number of its first image among all that are measured.
        rows: How many images it has.
        reads: Which activations were read, in the order in which they ran.
        rows_taken: Of an activation the rows that its rank is taken from, as offered.
        attention: Place of a layer to its mean attention entropy.
        heads: Name of an attention and its sums by head.
        offers: Number of images, positions and id of the held keys to an offer.
    """

    first: int = 0
    rows: int = 0
    reads: list[Ear] = field(default_factory=list)
    rows_taken: list[tuple[str, Offer, Tensor | None]] = field(default_factory=list)
    attention: dict[int, Tensor] = field(default_factory=dict)
    heads: list[tuple[str, HeadSums]] = field(default_factory=list)
    offers: dict[tuple[int, int, int], Offer] = field(default_factory=dict)

    def images(self, entries: int) -> np.ndarray:
        """Return numbers (entries,) for a tensor's first axis: images, or windows of them."""
        if self.rows and entries % self.rows == 0:
            return np.arange(entries) + self.first * (entries // self.rows)
        return np.arange(entries)


def on_device(values: list[float] | list[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return numbers as a tensor of their shape on the device, without waiting for it."""
    if isinstance(values, np.ndarray):
        held = torch.from_numpy(values)
    else:
        held = torch.tensor(
            values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64
        )
    return held.to(device, non_blocking=True)
