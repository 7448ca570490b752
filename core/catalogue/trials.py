"""The tables of a trial: outcomes, rivals, augmentations and schedules. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from core.errors import OptionError
from core.records.base import Value
from core.records.curves import Outcome

Augmentation = Literal["crop", "flip", "colour", "trivial", "erase"]
RivalName = Literal[
    "random",
    "lp-ft",
    "auto-rgn",
    "llrd",
    "probe",
    "rate-up",
    "rate-down",
    "shrink-perturb",
    "mean-var",
]


class OutcomeInfo(Value):
    """What a trial may judge.

    Attributes:
        name: Key.
        title: Plain words.
        reads: What it is and when to take it.
        unit: Of its margin.
    """

    name: Outcome
    title: str
    reads: str
    unit: str


class RivalInfo(Value):
    """A way to train that a plan has to beat.

    Attributes:
        name: Key.
        arm: What its arm is called.
        title: Plain words.
        does: What it does, in the units of the trial.
        resets: Whether it changes weights before training.
        needs_plan: Whether it is made from a plan.
        source: Paper.
    """

    name: RivalName
    arm: str
    title: str
    does: str
    resets: bool
    needs_plan: bool = False
    source: str


class AugmentationInfo(Value):
    """One change of a training image, drawn anew for every image and step.

    Attributes:
        name: Key.
        title: Plain words.
        does: What it does.
        careful: When it would change what an image shows; "" for never.
    """

    name: Augmentation
    title: str
    does: str
    careful: str = ""


OUTCOMES: tuple[OutcomeInfo, ...] = (
    OutcomeInfo(
        name="final",
        title="Final accuracy",
        reads="Validation accuracy after the last step: does the reset end higher?",
        unit="points",
    ),
    OutcomeInfo(
        name="auc",
        title="Accuracy over the run",
        reads="Mean validation accuracy over all evaluations after step 0: is it ahead on the way?",
        unit="points",
    ),
    OutcomeInfo(
        name="steps",
        title="Steps to target",
        reads="How many times fewer steps it takes to the untouched network's final accuracy (its "
        "mean over the other seeds). Where the target is not reached, the last step stands in and "
        "the ratio is a bound.",
        unit="percent",
    ),
)

RIVALS: tuple[RivalInfo, ...] = (
    RivalInfo(
        name="random",
        arm="random control",
        title="Random control",
        does="Resets as much as the first plan, drawn at random.",
        resets=True,
        needs_plan=True,
        source="the control every comparison needs",
    ),
    RivalInfo(
        name="lp-ft",
        arm="LP-FT",
        title="Head first, then all (LP-FT)",
        does="For the first half of the steps only the new head trains and the rest stands still, "
        "norms included; then all trains, with a fresh optimiser and schedule.",
        resets=False,
        source="Kumar et al. 2022, arXiv:2202.10054",
    ),
    RivalInfo(
        name="auto-rgn",
        arm="Auto-RGN",
        title="Layer-wise rates by relative gradient (Auto-RGN)",
        does="At the start of each pass over the images every tensor's rate is multiplied by its "
        "gradient norm over its own norm, mean over five batches, divided by the largest of the "
        "backbone. Norms do not train; the new head keeps its rate.",
        resets=False,
        source="Lee et al. 2022, arXiv:2210.11466",
    ),
    RivalInfo(
        name="llrd",
        arm="rate decay",
        title="Layer-wise rate decay",
        does="Each stage trains at 0.75 times the rate of the stage behind it; the head at the "
        "full rate.",
        resets=False,
        source="Howard and Ruder 2018, arXiv:1801.06146 (discriminative fine-tuning)",
    ),
    RivalInfo(
        name="probe",
        arm="linear probe",
        title="Frozen backbone (linear probe)",
        does="Only the new head trains; the rest stands still, norms included.",
        resets=False,
        source="Kornblith et al. 2018, arXiv:1805.08974",
    ),
    RivalInfo(
        name="rate-up",
        arm="3x rate",
        title="Untouched at 3 times the rate",
        does="The untouched network at three times the trial's learning rate.",
        resets=False,
        source="a tuned rate closes much of a plasticity gap (arXiv:2106.00042)",
    ),
    RivalInfo(
        name="rate-down",
        arm="rate / 3",
        title="Untouched at a third of the rate",
        does="The untouched network at a third of the trial's learning rate.",
        resets=False,
        source="a tuned rate closes much of a plasticity gap (arXiv:2106.00042)",
    ),
    RivalInfo(
        name="shrink-perturb",
        arm="shrink and perturb",
        title="Shrink and perturb",
        does="Every layer but a new head becomes 0.4 times itself plus 0.1 times a fresh draw.",
        resets=True,
        source="Ash and Adams 2019, arXiv:1910.08475",
    ),
    RivalInfo(
        name="mean-var",
        arm="mean and spread",
        title="Same mean and spread",
        does="Every layer but a new head is redrawn with the mean and variance of each of its "
        "tensors: what remains of pretraining is the scale.",
        resets=True,
        source="reference without features",
    ),
)

AUGMENTATIONS: tuple[AugmentationInfo, ...] = (
    AugmentationInfo(
        name="crop",
        title="Crop",
        does="A part of 80 to 100 % of the area, at 3:4 to 4:3, resized to the whole.",
        careful="where size tells the class",
    ),
    AugmentationInfo(
        name="flip",
        title="Flip left and right",
        does="Mirrors every other image.",
        careful="where left and right matter: digits and letters, sided anatomy, road signs",
    ),
    AugmentationInfo(
        name="colour",
        title="Colours",
        does="Brightness, contrast and saturation by up to 30 %, hue by up to 5 %.",
        careful="where colour or grey level tells the class: stains, CT numbers, ripeness",
    ),
    AugmentationInfo(
        name="trivial",
        title="TrivialAugment",
        does="One of 14 changes at a random strength (Mueller and Hutter 2021, arXiv:2103.10158).",
        careful="where orientation, colour or grey level tells the class",
    ),
    AugmentationInfo(
        name="erase",
        title="Erase a patch",
        does="Blackens 2 to 20 % of every other image (Zhong et al. 2017, arXiv:1708.04896).",
        careful="where a small part tells the class",
    ),
)
DEFAULT_AUGMENT: tuple[Augmentation, ...] = ("crop", "flip")

# By timm's names; those that need no more than a length and a warm-up.
SCHEDULES = ("cosine", "constant", "poly", "tanh", "wsd", "rsqrt")


def list_rivals() -> tuple[RivalInfo, ...]:
    """Return the ways to train that a plan has to beat."""
    return RIVALS


def list_augmentations() -> tuple[AugmentationInfo, ...]:
    """Return what can be done to training images, in the order in which it is applied."""
    return AUGMENTATIONS


def find_rival(name: str) -> RivalInfo:
    """Return a rival by its key.

    Raises:
        OptionError: There is none.
    """
    for info in RIVALS:
        if info.name == name:
            return info
    known = ", ".join(info.name for info in RIVALS)
    raise OptionError(f'There is no rival "{name}". There are: {known}.')


def augmentations(names: Iterable[str]) -> tuple[Augmentation, ...]:
    """Return augmentations by their keys, each once, in the order in which they are applied.

    Raises:
        OptionError: There is no such augmentation.
    """
    wanted = set(names)
    found = tuple(info.name for info in AUGMENTATIONS if info.name in wanted)
    unknown = sorted(wanted - set(found))
    if unknown:
        known = ", ".join(info.name for info in AUGMENTATIONS)
        raise OptionError(f'There is no augmentation "{unknown[0]}". There are: {known}, or none.')
    return found
