"""Curves -> the figures of each arm and seed that a trial compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from jaxtyping import Bool, Float

from core.records import UNTOUCHED, ArmCurve, ImageNoise, Measure

MEASURES: tuple[Measure, ...] = (
    "final_val_accuracy",
    "mean_val_accuracy",
    "steps_to_target",
    "loss_gain",
)
# Rounding to whole images moves each of two accuracies by up to half an image.
ROUNDING = math.sqrt(2 / 12)
# Two-sided 95 %.
Z = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The curves that got to the last step, and the seeds in which all arms did.

    Attributes:
        curves: By arm and seed.
        seeds: In rising order.
        steps: The last step.
    """

    curves: Mapping[tuple[str, int], ArmCurve]
    seeds: tuple[int, ...]
    steps: int

    def finals(self, arm: str) -> list[float]:
        """Return the arm's final accuracy under each seed, in [0, 1]."""
        return [accuracies(self.curves[arm, seed])[-1][1] for seed in self.seeds]


def finished(
    curves: Sequence[ArmCurve], arms: Sequence[str], seeds: Sequence[int], steps: int
) -> Finished:
    """Return the curves of these arms and seeds whose last evaluation is at the last step."""
    by_key = {
        (curve.arm, curve.seed): curve
        for curve in curves
        if curve.arm in arms
        and curve.seed in seeds
        and any(step.step == steps and step.val_accuracy is not None for step in curve.steps)
    }
    whole = tuple(seed for seed in sorted(set(seeds)) if all((arm, seed) in by_key for arm in arms))
    return Finished(curves=by_key, seeds=whole, steps=steps)


def accuracies(curve: ArmCurve) -> list[tuple[int, float]]:
    """Return the evaluations after step 0 as (step, accuracy in [0, 1])."""
    return [
        (step.step, step.val_accuracy)
        for step in curve.steps
        if step.step > 0 and step.val_accuracy is not None
    ]


def losses(curve: ArmCurve) -> list[float]:
    """Return the training losses in nats, a step each."""
    return [step.train_loss for step in curve.steps if step.train_loss is not None]


def targets(found: Finished) -> dict[int, float]:
    """Return the accuracy to reach under each seed: what the untouched network ends with.

    It is the mean over the other seeds. Under its own seed the untouched network would get there
    by definition and any other arm by luck only, so that two equal arms would differ.
    """
    finals = dict(zip(found.seeds, found.finals(UNTOUCHED), strict=True))
    return {
        seed: mean([value for other, value in finals.items() if other != seed] or [finals[seed]])
        for seed in found.seeds
    }


def steps_to(curve: ArmCurve, target: float) -> int | None:
    """Return the step of the first evaluation at or above the target; None if there is none."""
    return next((step for step, accuracy in accuracies(curve) if accuracy >= target), None)


def paired(
    found: Finished, arm: str, rival: str, measure: Measure
) -> tuple[Float[np.ndarray, " seed"], tuple[int, int]]:
    """Return the arm's figure minus the rival's under each seed.

    Args:
        found: What is finished.
        arm: The arm.
        rival: What it is held against.
        measure: Which figure. Of "steps_to_target" the difference is the log of the rival's steps
            over the arm's, with the last step where the target was never reached: a bound that
            lies nearer to no difference.

    Returns:
        Shape (seeds,), and in how many seeds the arm and the rival did not reach the target.
    """
    goal = targets(found) if measure == "steps_to_target" else {}
    values, unreached = [], [0, 0]
    for seed in found.seeds:
        mine, other = found.curves[arm, seed], found.curves[rival, seed]
        if measure == "final_val_accuracy":
            values.append(accuracies(mine)[-1][1] - accuracies(other)[-1][1])
        elif measure == "mean_val_accuracy":
            common = dict(accuracies(other))
            values.append(mean(a - common[s] for s, a in accuracies(mine) if s in common))
        elif measure == "loss_gain":
            pairs = list(zip(losses(mine), losses(other), strict=False))
            values.append(mean(theirs - ours for ours, theirs in pairs) if pairs else 0.0)
        else:
            taken = [steps_to(curve, goal[seed]) for curve in (mine, other)]
            unreached = [n + (t is None) for n, t in zip(unreached, taken, strict=True)]
            ours, theirs = (found.steps if t is None else t for t in taken)
            values.append(math.log(theirs / ours))
    return np.array(values, dtype=np.float64), (unreached[0], unreached[1])


def least_spread(
    found: Finished, arm: str, rival: str, measure: Measure, images: int | None
) -> float:
    """Return the standard deviation that a difference has at least, by how finely it is known.

    Accuracies are rounded to whole images, and a target is reached somewhere between two
    evaluations: equal figures are not known without error.

    Args:
        found: What is finished.
        arm: The arm.
        rival: What it is held against.
        measure: Which figure; of "steps_to_target" on the logarithm.
        images: Validation images; None where nobody knows.
    """
    if measure in ("final_val_accuracy", "mean_val_accuracy"):
        return 0.0 if images is None else ROUNDING / images
    if measure != "steps_to_target":
        return 0.0
    goal = targets(found)
    variances = []
    for seed in found.seeds:
        for name in (arm, rival):
            curve = found.curves[name, seed]
            taken = steps_to(curve, goal[seed]) or found.steps
            before = max([0, *(step for step, _ in accuracies(curve) if step < taken)])
            variances.append(((taken - before) / taken) ** 2 / 12)
    return math.sqrt(2 * mean(variances)) if variances else 0.0


def bits(right: Bool[np.ndarray, " image"]) -> str:
    """Return answers as hexadecimal digits, the first image in the highest bit.

    Args:
        right: Whether each image was right, shape (images,).
    """
    return np.packbits(right).tobytes().hex()


def from_bits(text: str, images: int) -> Bool[np.ndarray, " image"] | None:
    """Return answers from `bits`, shape (images,); None where they are of another length."""
    try:
        packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    except ValueError:
        return None
    return np.unpackbits(packed)[:images].astype(bool) if len(packed) * 8 >= images else None


def image_noise(found: Finished, arm: str, images: int) -> ImageNoise | None:
    """Return what these images can tell of an arm and the untouched network.

    Args:
        found: What is finished.
        arm: The arm.
        images: Validation images.

    Returns:
        None where answers were not kept.
    """
    rows = []
    for seed in found.seeds:
        pair = [
            from_bits(text, images) if (text := _answers(found.curves[name, seed])) else None
            for name in (arm, UNTOUCHED)
        ]
        if pair[0] is None or pair[1] is None:
            return None
        rows.append(pair[0].astype(np.float64) - pair[1])
    if not rows or images < 2:
        return None
    differences = np.stack(rows)
    error = differences.mean(0).std(ddof=1) / math.sqrt(images)
    return ImageNoise(
        arm=arm,
        images=images,
        discordant=float(np.abs(differences).mean()),
        resolvable=float(Z * error),
    )


def _answers(curve: ArmCurve) -> str | None:
    return curve.steps[-1].answers
