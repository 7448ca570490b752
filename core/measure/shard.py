"""What measuring some batches leaves: sums that merge, so that shards give what one pass gives.

A shard's size depends only on the network, never on the number of images. Everything in it is a
sum, a count, moments over batches (Chan et al.), or a sample of rows chosen by a hash of the
image's number, so that merging shards in any order gives the same figures up to the rounding of
sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.reductions import Moments

# Rows kept at each activation for its rank; more would cost more than they tell.
RANK_ROWS = 256
# Positions of one image that may be among them.
ROWS_AN_IMAGE = 8


def hashed(numbers: np.ndarray, *, salt: int) -> np.ndarray:
    """Return well-mixed uint64 of whole numbers (any shape), the same on every machine.

    Source:
        The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
    """
    x = numbers.astype(np.uint64) + np.uint64(salt & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def positions(samples: np.ndarray, count: int, *, most: int, salt: int) -> np.ndarray:
    """Return which positions of each image are looked at, one in each of equal stretches.

    Args:
        samples: (n,) numbers of the images.
        count: Positions an image has.
        most: How many to choose; all of them where there are no more.
        salt: Makes different places choose differently.

    Returns:
        (n, min(most, count)) int64, strictly ascending along a row.
    """
    chosen = min(most, count)
    if chosen == count:
        return np.broadcast_to(np.arange(count), (len(samples), count)).copy()
    edges = np.arange(chosen + 1) * count // chosen
    numbers = samples.astype(np.uint64)[:, None] * np.uint64(most) + np.arange(
        chosen, dtype=np.uint64
    )
    offset = hashed(numbers, salt=salt) % np.diff(edges).astype(np.uint64)
    return edges[:-1] + offset.astype(np.int64)


def best_keys(held: np.ndarray, offered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the keys held afterwards, which offered ones are new, and what places they take.

    Args:
        held: (kept,) uint64.
        offered: (n,) uint64.
    """
    old = len(held)
    best = np.argsort(np.concatenate([held, offered]), kind="stable")[:RANK_ROWS]
    new = best[best >= old] - old
    if not len(new):
        # The same array, so that samples that held one go on holding one.
        return held, new, new
    stays = np.zeros(old, dtype=bool)
    stays[best[best < old]] = True
    places = np.concatenate([np.flatnonzero(~stays), np.arange(old, len(best))])
    after = np.concatenate([held, np.zeros(len(best) - old, dtype=np.uint64)])
    after[places] = offered[new]
    return after, new, places


# One array, so that samples that hold nothing hold the same.
NO_KEYS = np.empty(0, dtype=np.uint64)


class RowSample:
    """The rows of one activation with the smallest keys among all that were offered.

    The rows lie in one block that is written into: a new one every batch would leave memory in
    pieces too small for the activations.

    Attributes:
        keys: (kept,) uint64 on the host, in no order.
        offered: How many were offered.
    """

    def __init__(self) -> None:
        self.keys = NO_KEYS
        self.offered = 0
        self._rows: Tensor | None = None

    def add(
        self, keys: np.ndarray, take: Callable[[np.ndarray], Tensor], *, offered: int | None = None
    ) -> None:
        """Offer rows with their keys.

        Args:
            keys: (n,) uint64.
            take: Returns the rows (m, units) at the places asked for, (m,) of n.
            offered: How many they stand for; None for n.
        """
        after, new, places = best_keys(self.keys, keys)
        rows = take(new) if len(new) else None
        where = torch.from_numpy(places)
        self.take_in(after, where, rows, offered=len(keys) if offered is None else offered)

    def take_in(
        self, after: np.ndarray, where: Tensor, rows: Tensor | None, *, offered: int
    ) -> None:
        """Take rows whose places are known.

        Args:
            after: (kept,) uint64, the keys held afterwards; see `best_keys`.
            where: (new,) int64, places of the new rows.
            rows: (new, units), or None for none.
            offered: How many were offered.
        """
        self.offered += offered
        if rows is None:
            return
        if self._rows is None:
            self._rows = torch.empty(
                (RANK_ROWS, rows.shape[1]), dtype=torch.float32, device=rows.device
            )
        self._rows.index_copy_(0, where.to(rows.device, non_blocking=True), rows.float())
        self.keys = after

    def settled(self) -> tuple[np.ndarray, Tensor | None]:
        """Return the keys (kept,) in ascending order and their rows (kept, units) float32."""
        order = np.argsort(self.keys, kind="stable")
        return self.keys[order], None if self._rows is None else self._at(order)

    def merged(self, other: RowSample) -> RowSample:
        """Return the sample of everything offered to either."""
        both = RowSample()
        for shard in (self, other):
            both.add(shard.keys, shard._at, offered=shard.offered)
        return both

    def _at(self, places: np.ndarray) -> Tensor:
        if self._rows is None:
            raise ValueError("no row was kept")
        index = torch.from_numpy(places).to(self._rows.device, non_blocking=True)
        return self._rows.index_select(0, index)


@dataclass(slots=True)
class SiteSums:
    """Sums over the rows of one activation, a column a unit.

    Attributes:
        rows: Rows seen (images times positions).
        sums: (5, units) float64: |h|, z > 0, z saturated, |h| near zero, |h - middle|.
        gradient_rows: Rows whose gradient was seen.
        gradient: (units,) float64, sum of |dL_n/dh|.
        sample: Rows of h for its rank.
    """

    rows: int
    sums: Tensor
    gradient_rows: int
    gradient: Tensor
    sample: RowSample

    @classmethod
    def empty(cls, units: int, device: torch.device) -> SiteSums:
        """Return sums over no rows."""
        double = torch.float64
        return cls(
            0,
            torch.zeros((5, units), dtype=double, device=device),
            0,
            torch.zeros(units, dtype=double, device=device),
            RowSample(),
        )

    def merged(self, other: SiteSums) -> SiteSums:
        """Return the sums over both sets of rows."""
        return SiteSums(
            self.rows + other.rows,
            self.sums + other.sums,
            self.gradient_rows + other.gradient_rows,
            self.gradient + other.gradient,
            self.sample.merged(other.sample),
        )


@dataclass(slots=True)
class HeadSums:
    """Sums of attention entropy, a figure a head.

    Attributes:
        rows: (heads,) int64, queries looked at that see two keys or more.
        entropy: (heads,) float64, sum of entropy over its largest possible value.
    """

    rows: Tensor
    entropy: Tensor

    def merged(self, other: HeadSums) -> HeadSums:
        """Return the sums over both sets of queries."""
        return HeadSums(self.rows + other.rows, self.entropy + other.entropy)


@dataclass(slots=True)
class GradientTotal:
    """The gradient of one weight, summed over images.

    Attributes:
        total: Shape of the weight; sum of dL_n/dW.
        squares: 0-d float64: sum over batches of ||sum over its images||^2 / images.
        reached: Batches in which a gradient came.
    """

    total: Tensor
    squares: Tensor
    reached: int = 0

    def merged(self, other: GradientTotal) -> GradientTotal:
        """Return the sums over both sets of batches."""
        return GradientTotal(
            self.total + other.total, self.squares + other.squares, self.reached + other.reached
        )


@dataclass(slots=True)
class Shard:
    """Everything that measuring some whole batches leaves.

    Attributes:
        samples: Images.
        batches: Batches.
        loss: 0-d float64, summed cross-entropy.
        sites: By name of the activation's site.
        heads: By name of the attention's site.
        gradients: By `state_dict` name of the parameter; tied ones once.
        moments: Over batches, of the figures a batch gives by itself; see `BATCH_FIGURES`.
    """

    samples: int
    batches: int
    loss: Tensor
    sites: dict[str, SiteSums] = field(default_factory=dict)
    heads: dict[str, HeadSums] = field(default_factory=dict)
    gradients: dict[str, GradientTotal] = field(default_factory=dict)
    moments: Moments | None = None

    def merged(self, other: Shard) -> Shard:
        """Return what measuring the batches of both would leave.

        Raises:
            ValueError: The two come from different networks.
        """
        if self.batches and other.batches and self.gradients.keys() != other.gradients.keys():
            raise ValueError("the shards are of different networks")
        moments = (
            self.moments.merged(other.moments)
            if self.moments is not None and other.moments is not None
            else self.moments or other.moments
        )
        return Shard(
            self.samples + other.samples,
            self.batches + other.batches,
            self.loss + other.loss,
            _joined(self.sites, other.sites),
            _joined(self.heads, other.heads),
            _joined(self.gradients, other.gradients),
            moments,
        )


def _joined(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(left)
    for name, sums in right.items():
        both[name] = both[name].merged(sums) if name in both else sums
    return both


def shard_state(shard: Shard) -> dict[str, Tensor]:
    """Return a shard as named tensors on the host, for a file; `shard_from` reads it back.

    The shapes depend only on the network: sums (figures, units), sampled rows (rows, units).
    """
    state: dict[str, Tensor] = {
        "header": torch.tensor([shard.samples, shard.batches], dtype=torch.int64),
        "loss": shard.loss,
    }
    for name, site in shard.sites.items():
        key = f"site/{name}/"
        keys, rows = site.sample.settled()
        state |= {
            f"{key}counts": torch.tensor([site.rows, site.gradient_rows, site.sample.offered]),
            f"{key}sums": site.sums,
            f"{key}gradient": site.gradient,
            f"{key}keys": torch.from_numpy(keys.view(np.int64)),
            f"{key}sample": torch.empty(0, site.sums.shape[1]) if rows is None else rows,
        }
    for name, heads in shard.heads.items():
        state |= {
            f"heads/{name}/counts": heads.rows,
            f"heads/{name}/entropy": heads.entropy,
        }
    for name, gradient in shard.gradients.items():
        state |= {
            f"gradient/{name}/counts": torch.tensor([gradient.reached]),
            f"gradient/{name}/total": gradient.total,
            f"gradient/{name}/squares": gradient.squares,
        }
    if shard.moments is not None:
        state |= {
            "moments/count": shard.moments.count,
            "moments/mean": shard.moments.mean,
            "moments/m2": shard.moments.m2,
        }
    # Copies: what was returned must not change when measuring goes on.
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _taker(rows: Tensor) -> Callable[[np.ndarray], Tensor]:
    return lambda places: rows.index_select(0, torch.from_numpy(places))


def shard_from(state: Mapping[str, Tensor]) -> Shard:
    """Return the shard that `shard_state` wrote, from tensors in the same shapes.

    Raises:
        KeyError: Parts are missing.
        ValueError: Parts do not fit each other.
    """
    samples, batches = (int(each) for each in state["header"])
    shard = Shard(samples, batches, state["loss"])
    names = {tuple(key.split("/", 1)) for key in state if "/" in key}
    for kind, rest in sorted(names):
        name, _, part = rest.rpartition("/")
        if part != "counts":
            continue
        held = state[f"{kind}/{rest}"]
        counts = [int(each) for each in held]
        key = f"{kind}/{name}/"
        if len(counts) < (3 if kind == "site" else 1):
            raise ValueError(f"{kind}/{name} lacks counts")
        if kind == "site":
            keys = state[f"{key}keys"].numpy().view(np.uint64)
            rows, sums, gradient = (
                state[f"{key}{each}"] for each in ("sample", "sums", "gradient")
            )
            units = gradient.shape[-1] if gradient.ndim else 0
            if (rows.shape, sums.shape) != ((len(keys), units), (5, units)):
                raise ValueError(f"site/{name} holds tensors that do not fit each other")
            sample = RowSample()
            sample.add(keys, _taker(rows), offered=counts[2])
            shard.sites[name] = SiteSums(counts[0], sums, counts[1], gradient, sample)
        elif kind == "heads":
            shard.heads[name] = HeadSums(held, state[f"{key}entropy"])
        else:
            shard.gradients[name] = GradientTotal(
                state[f"{key}total"], state[f"{key}squares"], counts[0]
            )
    if "moments/count" in state:
        shard.moments = Moments(state["moments/count"], state["moments/mean"], state["moments/m2"])
    return shard
