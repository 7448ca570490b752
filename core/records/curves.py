"""What short fine-tunes produced and how the arms compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from core.records.base import Value
from core.records.outline import IntensityRange
from core.records.plan import ReinitPlan
from core.records.specs import DataSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimiser step of one arm.

    Attributes:
        arm: "untouched" or a plan's name.
        seed: Seed of head and batch order, shared by all arms.
        step: From 1; step 0 is the state before training and has no loss.
        train_loss: Cross-entropy of the batch, in nats, before the step; None at step 0.
        val_accuracy: Share of validation images right, in [0, 1]; None between evaluations.
        wall_s: Seconds since the run began.
    """

    arm: str
    seed: int
    step: int
    train_loss: float | None
    val_accuracy: float | None
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCurve:
    """All steps of one arm under one seed."""

    arm: str
    seed: int
    steps: tuple[StepRecord, ...]


class ArmDifference(Value):
    """Arm minus its rival (the untouched network or the random control), paired by seed.

    Attributes:
        arm: The arm that is compared.
        measure: What is compared: "final_val_accuracy", "mean_val_accuracy" (over the
            evaluations after step 0) or "loss_gain" (mean over steps of the rival's training loss
            minus the arm's, so that positive is better, as for the accuracies).
        seeds: Number of pairs.
        mean: Mean difference.
        low, high: Bounds of the 95 % t interval; None with fewer than two seeds.
        verdict: "better", "worse", "no detectable difference" or "one seed: no interval".
    """

    arm: str
    measure: Literal["final_val_accuracy", "mean_val_accuracy", "loss_gain"]
    seeds: int
    mean: float
    low: float | None
    high: float | None
    verdict: str


class ABComparison(Value):
    """Every arm against the untouched network, and the sentence a person reads first."""

    untouched: str = Field(validation_alias="control", serialization_alias="control")
    differences: tuple[ArmDifference, ...]
    # The same against the random control, where there is one.
    from_random: tuple[ArmDifference, ...] = ()
    sentence: str
    caveats: tuple[str, ...] = ()


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
    # What a comparison of these arms must not hide.
    caveats: tuple[str, ...] = ()
    # Which stored numbers were black and white, where images have more than eight bits.
    intensities: tuple[IntensityRange, ...] = ()
