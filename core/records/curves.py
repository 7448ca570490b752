"""What short fine-tunes produced and how the arms compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from core.records.base import Value
from core.records.outline import IntensityRange
from core.records.plan import ReinitPlan
from core.records.specs import DataSpec, ModelSpec

Outcome = Literal["final", "auc", "steps"]
Measure = Literal["final_val_accuracy", "mean_val_accuracy", "steps_to_target", "loss_gain"]

# What a person names before the run, and the figure it is read from.
OUTCOMES: Mapping[Outcome, Measure] = MappingProxyType(
    {
        "final": "final_val_accuracy",
        "auc": "mean_val_accuracy",
        "steps": "steps_to_target",
    }
)
# Differences of accuracy below one point, and of steps below a tenth, count as none.
MARGINS: Mapping[Outcome, float] = MappingProxyType({"final": 0.01, "auc": 0.01, "steps": 0.1})

# The untouched network, and the arm that resets as much at random.
UNTOUCHED = "untouched"
RANDOM_CONTROL = "random control"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimiser step of one arm.

    Attributes:
        arm: "untouched", a plan's name or a rival's.
        seed: Seed of head, batch order and augmentation, shared by all arms.
        step: From 1; step 0 is the state before training and has no loss.
        train_loss: Cross-entropy of the batch, in nats, before the step; None at step 0.
        val_accuracy: Share of validation images right, in [0, 1]; None between evaluations.
        wall_s: Seconds since the run began.
        answers: At the last step, which validation images were right: bits, the first image
            highest, as hexadecimal digits; None before.
    """

    arm: str
    seed: int
    step: int
    train_loss: float | None
    val_accuracy: float | None
    wall_s: float
    answers: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCurve:
    """All steps of one arm under one seed."""

    arm: str
    seed: int
    steps: tuple[StepRecord, ...]


class RateSweep(Value):
    """The untouched network at several learning rates, before the trial.

    Attributes:
        rates: In rising order.
        accuracies: Final validation accuracy of each, in [0, 1], mean over the seeds.
        seeds: Of the sweep; none of them is a seed of the trial.
        best: The rate with the highest accuracy, which the trial takes.
    """

    rates: tuple[float, ...]
    accuracies: tuple[float, ...]
    seeds: tuple[int, ...]
    best: float

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried."""
        return self.best in (self.rates[0], self.rates[-1])


class TrialDesign(Value):
    """What is fixed before a trial, so that its verdict cannot be chosen after it.

    Attributes:
        outcome: The one figure that is judged: accuracy at the end, its mean over the
            evaluations, or the steps to the untouched network's final accuracy.
        margin: Differences inside it count as equivalent: a share of accuracy in [0, 1], for
            "steps" a ratio less 1.
        arms: The untouched one first; only these are judged, jointly.
        plans: Those that edit weights, held against the random control as well.
        seeds: All that are planned.
        steps: Optimiser steps of each arm.
        val_images: How many; None where it is not known.
        chance: Share of the largest class among them; None where it is not known.
        probe: Accuracy on them of a linear probe of the untouched network, fitted to the training
            images; None where none was fitted.
        probe_slack: How far below it noise of the images alone may bring an equal network.
        sweep: The rates that were tried; None where one was given.
    """

    outcome: Outcome = "final"
    margin: float = Field(default=0.01, ge=0)
    arms: tuple[str, ...]
    plans: tuple[str, ...] = ()
    seeds: tuple[int, ...]
    steps: int
    val_images: int | None = None
    chance: float | None = None
    probe: float | None = None
    probe_slack: float = 0.0
    sweep: RateSweep | None = None


class Pace(Value):
    """How long the parts of a fine-tune take on one machine, in seconds.

    Attributes:
        step_s: One training step of one arm.
        image_s: One validation image of one arm.
        read_s: Reading one image.
        build_s: Making one network.
        batch_size: Images a step.
        image_size: Side in pixels.
        device: "cpu" or "cuda".
    """

    step_s: float
    image_s: float
    read_s: float
    build_s: float
    batch_size: int
    image_size: int
    device: str

    def seconds(
        self,
        *,
        arms: int,
        seeds: int,
        steps: int,
        eval_every: int,
        images: tuple[int, int],
        sweep: int = 0,
    ) -> float:
        """Return how long a trial takes.

        Args:
            arms: With the untouched one.
            seeds: Of the trial.
            steps: Of each arm.
            eval_every: Steps from one evaluation to the next.
            images: For training and for validation.
            sweep: Arms and seeds of a sweep of rates before it.
        """
        train, val = images
        evaluations = 1 + math.ceil(steps / eval_every)
        one = self.build_s + steps * self.step_s
        trial = arms * seeds * (one + evaluations * val * self.image_s)
        before = sweep * (one + 2 * val * self.image_s)
        # The images are read once, and the linear probe looks at each.
        return trial + before + (train + val) * (self.read_s + self.image_s)


class ArmDifference(Value):
    """Arm minus its rival (the untouched network or the random control), paired by seed.

    Attributes:
        arm: The arm that is compared.
        measure: What is compared: "final_val_accuracy", "mean_val_accuracy" (over the
            evaluations after step 0), "steps_to_target" (the rival's steps to the untouched
            network's final accuracy over the arm's: a ratio, above 1 is faster) or "loss_gain"
            (mean over steps of the rival's training loss minus the arm's, so that positive is
            better, as for the accuracies).
        seeds: Number of pairs.
        mean: Mean difference; of "steps_to_target" the geometric mean of the ratios.
        low, high: Bounds of the 95 % interval, simultaneous over all comparisons of the measure;
            None with fewer than two seeds.
        verdict: Of the primary outcome: "better", "worse", "equivalent", "inconclusive" or
            "screening". None for other measures, which describe, and where a trial is too weak.
        p: Joint sign-flip p value over all comparisons; None with fewer than two seeds.
        unreached: Of "steps_to_target": seeds in which the arm, and in which the rival, never got
            there. The last step stands in, so the ratio is a bound.
    """

    arm: str
    measure: Measure
    seeds: int
    mean: float
    low: float | None
    high: float | None
    verdict: str | None
    p: float | None = None
    unreached: tuple[int, int] = (0, 0)


class ImageNoise(Value):
    """What the validation images alone can tell apart, for one arm and the untouched network.

    Attributes:
        arm: The arm.
        images: How many.
        discordant: Share of images that exactly one of the two has right, mean over seeds.
        resolvable: A difference of accuracy below this may be luck of these images: 1.96 standard
            errors over images of the answers' difference, averaged over seeds.
    """

    arm: str
    images: int
    discordant: float
    resolvable: float


class ABComparison(Value):
    """Every arm against the untouched network, and the sentence a person reads first.

    Attributes:
        untouched: The untouched arm's name.
        differences: Of all arms and measures.
        from_random: The same against the random control, where there is one.
        sentence: What may be said.
        caveats: What it must not hide.
        outcome: What is judged.
        margin: As in the design.
        state: "too early" (fewer than two seeds), "screening", "claim" or "weak" (no verdict).
        planned: Seeds that are planned.
        weak: Why there is no verdict.
        what_next: What to do about it.
        going_on: Share of ways to go on that end in a claim, at half the seeds; else None.
        image_noise: One an arm, where answers were kept.
    """

    untouched: str = Field(validation_alias="control", serialization_alias="control")
    differences: tuple[ArmDifference, ...]
    from_random: tuple[ArmDifference, ...] = ()
    sentence: str
    caveats: tuple[str, ...] = ()
    outcome: Outcome = "final"
    margin: float = 0.01
    state: Literal["too early", "screening", "claim", "weak"] = "screening"
    planned: int = 0
    weak: tuple[str, ...] = ()
    what_next: str = ""
    going_on: float | None = None
    image_noise: tuple[ImageNoise, ...] = ()


class RunRecord(Value):
    """Everything needed to repeat a fine-tune."""

    schema_version: Literal[1] = 1
    model: ModelSpec
    model_title: str
    classes: int
    backbone_sha256: str
    data: DataSpec
    data_title: str
    data_fingerprint: str
    arms: tuple[str, ...]
    plans: dict[str, ReinitPlan]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    eval_every: int
    image_size: int
    train_images: int
    val_images: int
    optimizer: str
    lr: float
    head_lr: float
    weight_decay: float
    warmup_steps: int
    device: str
    device_name: str
    dtype: str
    versions: dict[str, str]
    # Since trials have rivals and a verdict of their own; records from before have none of these.
    schedule: str = "constant"
    augment: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    ema: float = 0.0
    # Arms that are rivals, and which.
    rivals: dict[str, str] = {}
    design: TrialDesign | None = None
    # What a comparison of these arms must not hide.
    caveats: tuple[str, ...] = ()
    # Which stored numbers were black and white, where images have more than eight bits.
    intensities: tuple[IntensityRange, ...] = ()
