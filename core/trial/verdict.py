"""Paired curves -> difference with an interval, and one honest sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Literal

from scipy import stats

from core.records import ABComparison, ArmCurve, ArmDifference

# The untouched network, and the arm that resets as much at random.
UNTOUCHED = "untouched"
RANDOM_CONTROL = "random control"
CONFIDENCE = 0.95

Measure = Literal["final_val_accuracy", "mean_val_accuracy", "loss_gain"]


def compare_curves(curves: Sequence[ArmCurve]) -> ABComparison:
    """Compare every arm with the untouched network and with the random control, paired by seed.

    Only steps that both arms of a pair have taken count, so an unfinished run can be compared.

    Args:
        curves: One a pair of arm and seed, steps in order; the arms the others are held against
            are `UNTOUCHED` and, if there is one, `RANDOM_CONTROL`.

    Returns:
        Differences with 95 % t intervals over seeds, and a sentence. Pairs without a common
        evaluation after step 0 do not count, nor do seeds that got less far than others of the
        same arm; a caveat says how many.
    """
    differences, behind = _against(UNTOUCHED, curves)
    plans = [curve for curve in curves if curve.arm != UNTOUCHED]
    from_random, _ = _against(RANDOM_CONTROL, plans)
    sentences = [_sentence(differences, "the untouched network")]
    if from_random:
        sentences.append(_sentence(from_random, "the random control"))
    return ABComparison(
        untouched=UNTOUCHED,
        differences=tuple(differences),
        from_random=tuple(from_random),
        sentence=" ".join(sentences),
        caveats=_caveats(differences, behind),
    )


def _against(rival: str, curves: Sequence[ArmCurve]) -> tuple[list[ArmDifference], int]:
    """Return each other arm's differences from one, and how many pairs are behind the others."""
    by_key = {(curve.arm, curve.seed): curve for curve in curves}
    arms = [arm for arm in dict.fromkeys(curve.arm for curve in curves) if arm != rival]
    differences: list[ArmDifference] = []
    behind = 0
    for arm in arms:
        seeds = sorted(
            {seed for name, seed in by_key if name == arm}
            & {seed for name, seed in by_key if name == rival}
        )
        pairs = [_paired(by_key[rival, seed], by_key[arm, seed]) for seed in seeds]
        told = [pair for pair in pairs if pair is not None]
        if not told:
            continue
        # Early and late steps do not average to anything: what counts is as far as any pair got.
        furthest = max(last for last, _ in told)
        whole = [figures for last, figures in told if last == furthest]
        behind += len(told) - len(whole)
        measures: tuple[Measure, ...] = ("final_val_accuracy", "mean_val_accuracy", "loss_gain")
        for i, measure in enumerate(measures):
            differences.append(_difference(arm, measure, [pair[i] for pair in whole]))
    return differences, behind


def _paired(rival: ArmCurve, arm: ArmCurve) -> tuple[int, tuple[float, float, float]] | None:
    """Return the last step both were evaluated at, and the three differences up to it."""
    mine = {step.step: step for step in arm.steps}
    theirs = {step.step: step for step in rival.steps}
    common = sorted(mine.keys() & theirs.keys())
    accuracies = [
        (step, a, c)
        for step in common
        if step > 0
        and (a := mine[step].val_accuracy) is not None
        and (c := theirs[step].val_accuracy) is not None
    ]
    losses = [
        (step, a, c)
        for step in common
        if (a := mine[step].train_loss) is not None and (c := theirs[step].train_loss) is not None
    ]
    if not accuracies or not losses:
        return None
    last, final, beside = accuracies[-1]
    return last, (
        final - beside,
        mean(a - c for _, a, c in accuracies),
        mean(c - a for step, a, c in losses if step <= last),
    )


def _difference(arm: str, measure: Measure, values: list[float]) -> ArmDifference:
    centre = mean(values)
    low = high = None
    if len(values) >= 2:
        half = (
            float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
            * stdev(values)
            / math.sqrt(len(values))
        )
        low, high = centre - half, centre + half
    if low is None or high is None:
        verdict = "one seed: no interval"
    elif low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    else:
        verdict = "no detectable difference"
    return ArmDifference(
        arm=arm,
        measure=measure,
        seeds=len(values),
        mean=centre,
        low=low,
        high=high,
        verdict=verdict,
    )


def _sentence(differences: Sequence[ArmDifference], other: str) -> str:
    rows = [difference for difference in differences if difference.measure == "final_val_accuracy"]
    if not rows:
        return "No pair of arms has reached an evaluation yet."
    parts = []
    for row in rows:
        points = f"{100 * row.mean:+.1f} points of validation accuracy"
        seeds = f"{row.seeds} seed" + ("" if row.seeds == 1 else "s")
        if row.low is None or row.high is None:
            parts.append(
                f'"{row.arm}" against {other}: {points} ({seeds}: no interval, so '
                "nothing can be said yet)"
            )
        else:
            interval = f"95 % interval {100 * row.low:+.1f} to {100 * row.high:+.1f}, {seeds}"
            parts.append(f'"{row.arm}" against {other}: {row.verdict}, {points} ({interval})')
    return "; ".join(parts) + "."


def _caveats(differences: Sequence[ArmDifference], behind: int) -> tuple[str, ...]:
    rows: list[str] = []
    if behind:
        pairs = "1 pair of arms" if behind == 1 else f"{behind} pairs of arms"
        rest = (
            "is not as far as the others and does"
            if behind == 1
            else ("are not as far as the others and do")
        )
        rows.append(f"{pairs} {rest} not count.")
    fewest = min((difference.seeds for difference in differences), default=0)
    if 0 < fewest < 5:
        rows.append(
            f"The interval rests on {fewest} seed{'' if fewest == 1 else 's'}; with fewer than "
            "five it is wide, and several arms compared at once find a difference by chance more "
            "often than 1 time in 20."
        )
    if differences:
        rows.append(
            "One learning rate was tried. Where it is too low for the untouched network, any "
            "reset can look like a gain: repeat with a higher and a lower rate."
        )
    return tuple(rows)
