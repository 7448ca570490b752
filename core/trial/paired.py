"""Paired differences of several arms -> what may be claimed jointly, by sign flips.

Every row is one comparison (an arm against its rival), every column one seed. Under the null of a
row the two arms of a seed could change places, which turns the sign of that column; flipping whole
columns keeps what rows have in common. The largest studentised mean over all rows, over all
patterns of signs, gives one critical value for the whole family (max-T; Westfall and Young 1993,
Resampling-Based Multiple Testing), so that the chance of any false claim is at most `ALPHA`
whatever the rows share.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

ALPHA = 0.05
# Below, no pattern of signs is rare enough for one claim to stand on: 2 / 2^n is 0.25 at three.
CLAIM_SEEDS = 8
# All patterns are gone through up to so many seeds; beyond, so many are drawn.
ENUMERATED, DRAWN = 14, 1 << 14
# A trial is futile where fewer of the ways to go on than this end in a claim.
FUTILE = 0.10
# Ways to go on that are looked at.
WAYS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """What sign flips say of a family of comparisons.

    Attributes:
        mean: Mean difference of each row.
        low, high: Simultaneous bounds; NaN with fewer than two seeds.
        p: Chance, if no row had a difference, of a largest studentised mean as large as the row's;
            NaN with fewer than two seeds.
    """

    mean: Float[np.ndarray, " row"]
    low: Float[np.ndarray, " row"]
    high: Float[np.ndarray, " row"]
    p: Float[np.ndarray, " row"]


def sign_patterns(seeds: int) -> Float[np.ndarray, "pattern seed"]:
    """Return patterns of signs, the unflipped one first: all of them, or many drawn ones.

    Args:
        seeds: How many.

    Returns:
        Entries 1 or -1, shape (2^seeds, seeds), or (`DRAWN`, seeds) beyond `ENUMERATED` seeds. A
        pattern and its opposite give the same size of mean, so drawn ones start with +1.
    """
    if seeds <= ENUMERATED:
        return np.array(list(itertools.product((1.0, -1.0), repeat=seeds)))
    signs = np.random.default_rng(0).choice((1.0, -1.0), size=(DRAWN, seeds))
    signs[0] = 1.0
    return signs


def studentised(
    differences: Float[np.ndarray, "row seed"],
    signs: Float[np.ndarray, "pattern seed"],
    floor: Float[np.ndarray, " row"],
) -> Float[np.ndarray, "pattern row"]:
    """Return the size of each row's mean over its standard error, under each pattern of signs.

    Args:
        differences: Shape (rows, seeds).
        signs: Shape (patterns, seeds).
        floor: Least standard deviation of each row, shape (rows,): figures of finite resolution
            that all agree are not without error.

    Returns:
        Shape (patterns, rows), 0 where a row is 0 throughout.
    """
    n = differences.shape[1]
    means = signs @ differences.T / n
    squares = (differences**2).sum(1)
    # Signs do not change the squares, so the variance follows from the mean alone.
    variance = np.maximum((squares - n * means**2) / (n - 1), floor**2)
    # What rounding leaves of a row without spread counts as none.
    variance[variance <= 1e-12 * squares / n] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(means) / np.sqrt(variance / n)
    return np.where(np.abs(means) > 1e-12 * np.sqrt(squares / n), ratio, 0.0)


def jointly(
    differences: Float[np.ndarray, "row seed"],
    floor: Float[np.ndarray, " row"] | None = None,
    *,
    alpha: float = ALPHA,
) -> Joint:
    """Return means, simultaneous intervals and joint p values of paired differences.

    From `CLAIM_SEEDS` seeds on, the bounds are the mean plus and minus the critical value of max-T
    times the standard error, so an interval without 0 and p <= alpha are one statement. With fewer
    the patterns are too few for a critical value, and Student's t with Sidak's correction stands in
    (Sidak 1967): for a first look, not for a claim.

    Args:
        differences: Shape (rows, seeds), finite.
        floor: Least standard deviation of each row, shape (rows,); None for 0.
        alpha: Chance of any false claim over all rows.
    """
    rows, n = differences.shape
    floor = np.zeros(rows) if floor is None else floor
    mean = differences.mean(1) if n else np.full(rows, np.nan)
    if n < 2 or not rows:
        unknown = np.full(rows, np.nan)
        return Joint(mean=mean, low=unknown, high=unknown, p=unknown)
    own = np.maximum(differences.std(1, ddof=1), floor) / math.sqrt(n)
    flipped = studentised(differences, sign_patterns(n), floor)
    largest = flipped.max(1)
    # A flip that gives the same figures by another order of adding must count as equal.
    tolerance = 1e-9 * np.where(np.isfinite(flipped[0]), flipped[0], 1.0)
    p = (largest[:, None] >= flipped[0] - tolerance).mean(0)
    if n >= CLAIM_SEEDS:
        critical = critical_value(largest, alpha=alpha)
    else:
        critical = float(stats.t.ppf((1 + (1 - alpha) ** (1 / rows)) / 2, n - 1))
    # Differences that all agree flip to nothing; Student's t then says what rounding leaves.
    agrees = differences.std(1, ddof=1) < floor
    least = float(stats.t.ppf(1 - alpha / 2, n - 1))
    half = np.where(agrees, max(critical, least), critical) * own
    return Joint(mean=mean, low=mean - half, high=mean + half, p=p)


def critical_value(largest: Float[np.ndarray, " pattern"], *, alpha: float = ALPHA) -> float:
    """Return the least value that at most a share alpha of the patterns exceeds.

    Args:
        largest: The largest studentised mean of each pattern, shape (patterns,).
        alpha: The share.
    """
    ordered = np.sort(largest)
    # A pattern and its opposite give the same figure up to rounding.
    return float(ordered[len(ordered) - 1 - math.floor(alpha * len(ordered))]) * (1 + 1e-9)


def claims(
    differences: Float[np.ndarray, "row seed"],
    floor: Float[np.ndarray, " row"] | None = None,
    *,
    alpha: float = ALPHA,
) -> Bool[np.ndarray, " row"]:
    """Return which rows differ from 0, by the joint test alone; none before `CLAIM_SEEDS` seeds.

    Args:
        differences: Shape (rows, seeds).
        floor: As for `jointly`.
        alpha: Chance of any false claim.
    """
    if differences.shape[1] < CLAIM_SEEDS:
        return np.zeros(len(differences), dtype=bool)
    joint = jointly(differences, floor, alpha=alpha)
    return np.asarray((joint.low > 0) | (joint.high < 0))


def chance_of_a_claim(
    differences: Float[np.ndarray, "row seed"],
    planned: int,
    floor: Float[np.ndarray, " row"] | None = None,
) -> float:
    """Return the share of ways to go on that end in any claim at the planned number of seeds.

    The seeds to come are drawn from those that are done (conditional power). Of several rows the
    one that looks best was lucky too, so means are drawn in by 1 - 1/T^2, T the row's studentised
    mean, to 0 where T is at most 1 (James and Stein 1961). Stopping on it makes no claim, so it
    spends no error.

    Args:
        differences: Those that are done, shape (rows, seeds), two seeds or more.
        planned: Seeds in the end.
        floor: As for `jointly`.
    """
    done = differences.shape[1]
    missing = planned - done
    if missing <= 0:
        return float(claims(differences, floor).any())
    if done**missing <= WAYS:
        ways = np.array(list(itertools.product(range(done), repeat=missing)))
    else:
        ways = np.random.default_rng(0).integers(0, done, size=(WAYS, missing))
    mean = differences.mean(1, keepdims=True)
    least = np.zeros(len(differences)) if floor is None else floor
    size = studentised(differences, np.ones((1, done)), least)[0]
    kept = np.clip(1 - 1 / np.maximum(size, 1) ** 2, 0, 1)[:, None]
    spread = (differences - mean) * math.sqrt(done / (done - 1))
    to_come = kept * mean + spread
    ended = [
        claims(np.concatenate([differences, to_come[:, way]], axis=1), floor).any() for way in ways
    ]
    return float(np.mean(ended))
