"""The rules there are, with their sources and options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from core.errors import PlanError
from core.records.base import Value


class RuleInfo(Value):
    """One way to choose what is reset.

    Attributes:
        name: Key in a plan and on the command line.
        title: Plain words.
        description: What is selected.
        source: Paper, or whose judgement it is.
        granularity: What it selects.
        options: Its numbers and words with their defaults; None means that it must be given.
        choices: Allowed words of options that are words.
        needs: What it looks at beside the weights.
        scheme: What is written unless another scheme is named.
    """

    name: str
    title: str
    description: str
    source: str
    granularity: Literal["layer", "unit", "weight", "any"]
    options: dict[str, float | str | None] = {}
    choices: dict[str, tuple[str, ...]] = {}
    needs: Literal["nothing", "images", "a diagnosis", "a plan"] = "nothing"
    scheme: str = "architecture"


SEED_PAPER = "Coetzer et al. 2026, arXiv:2603.20860"


PERCENT: dict[str, float | str | None] = {"percent": 10.0}


RULES: tuple[RuleInfo, ...] = (
    RuleInfo(
        name="by-hand",
        title="By hand",
        description="The layers a person clicked, ticked or named by glob, regular expression or "
        "layer type, or single units of them.",
        source="your judgement",
        granularity="any",
    ),
    RuleInfo(
        name="last-blocks",
        title="The last blocks",
        description="The last N blocks and what follows them, but not a new head.",
        source="Zhang et al., Revisiting Few-sample BERT Fine-tuning, ICLR 2021, arXiv:2006.05987",
        granularity="layer",
        options={"blocks": 1.0},
    ),
    RuleInfo(
        name="threshold",
        title="A figure beyond a limit",
        description="Layers (or units, for a figure by unit) of which a figure, or its ratio to "
        "the fresh twin's, lies above or below a limit.",
        source="your judgement on a diagnosis",
        granularity="any",
        options={"metric": None, "threshold": None, "side": "above", "of": "value"},
        choices={"side": ("above", "below"), "of": ("value", "ratio")},
        needs="a diagnosis",
    ),
    RuleInfo(
        name="weight-magnitude",
        title="Smallest weights",
        description="In each tensor with two axes or more the given percentage of entries with "
        "the least |w|, the head included; of each bias as many, which become 0.",
        source=f"{SEED_PAPER} (W)",
        granularity="weight",
        options=PERCENT,
        scheme="mean",
    ),
    RuleInfo(
        name="weight-gradient",
        title="Weights that matter least to the loss",
        description="As above by |w g|, g being the gradient summed over one pass of the training "
        "images. Norms use each batch's own statistics and keep their running ones. Two schemes "
        "differ from the authors' published code: with bias-mean (BA) and normal-tenth (Dist3) "
        "that code writes 0 into biases and leaves matrices alone; here both write what they "
        "write after |w|.",
        source=f"{SEED_PAPER} (WG)",
        granularity="weight",
        options=PERCENT,
        needs="images",
        scheme="mean",
    ),
    RuleInfo(
        name="swr",
        title="Selective weight re-initialisation",
        description="In each parameter the given percentage of entries of least utility, or with a "
        "threshold all of at most that many times the mean utility. Utility is |w g|, |w| or drawn "
        "at random.",
        source="Hernandez-Garcia et al. 2025, arXiv:2508.00212",
        granularity="weight",
        options={"percent": 10.0, "threshold": "", "utility": "gradient"},
        choices={"utility": ("gradient", "magnitude", "random")},
        needs="images",
    ),
    RuleInfo(
        name="redo",
        title="Dormant units (ReDo)",
        description="Units whose mean |activation| is at most tau times the mean over their layer, "
        "wherever they are read. What makes them is redrawn, what reads them becomes 0.",
        source="Sokar et al., ICML 2023, arXiv:2302.12902",
        granularity="unit",
        options={"threshold": 0.025},
        needs="a diagnosis",
    ),
    RuleInfo(
        name="grama",
        title="Units without gradient (GraMa)",
        description="As ReDo by the mean |gradient| at the unit's activation.",
        source="Liu et al. 2025, arXiv:2505.24061",
        granularity="unit",
        options={"threshold": 0.025},
        needs="a diagnosis",
    ),
    RuleInfo(
        name="cbp",
        title="Units that contribute least (continual backpropagation)",
        description="Of each layer the given percentage of units with the least mean |outgoing "
        "weight| times mean |activation|, taken where the unit is read: behind pooling, and place "
        "by place where a flattened image is read. The mean that a reader loses goes into its "
        "bias or, without one, off the running mean of the norm right behind it, so that the mean "
        "of its output stays. The published code (gnt.py) has this step too, but sets the means of "
        "the chosen units to zero before it uses them, so that its biases gain nothing; its code "
        "for convolutions has no such step.",
        source="Dohare et al., Nature 2024; code: shibhansh/loss-of-plasticity",
        granularity="unit",
        options={"percent": 5.0},
        needs="images",
        scheme="kaiming-normal",
    ),
    RuleInfo(
        name="gxd",
        title="Units that are cheapest to replace (GXD)",
        description="Of each layer the given percentage of units with the least |gradient x "
        "(activation - its mean)|, the first-order cost of replacing the unit by its mean.",
        source="arXiv:2605.06834",
        granularity="unit",
        options={"percent": 5.0},
        needs="images",
    ),
    RuleInfo(
        name="random",
        title="Random control",
        description="As much as another plan selects, drawn at random: as many weights of each "
        "tensor, units of each layer, or layers of the same kinds and near in size (the plan's "
        "note says how near); or a percentage of each tensor. The control every comparison "
        "needs.",
        source="arXiv:2508.00212 compares with random choice",
        granularity="any",
        options={"percent": 10.0},
        needs="a plan",
    ),
)


def rule_named(name: str) -> RuleInfo:
    """Return a rule by name.

    Raises:
        PlanError: There is none of that name.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise PlanError(
        f'There is no rule "{name}". Known: {", ".join(rule.name for rule in RULES)}. See python '
        "-m core list rules."
    )


def rule_options(
    rule: RuleInfo, given: Mapping[str, float | str | None]
) -> dict[str, float | str | None]:
    """Return a rule's options with the given ones put in.

    Raises:
        PlanError: An option it does not take, a word or number it does not allow, or one missing.
    """
    chosen = dict(rule.options)
    for key, value in given.items():
        if value is None:
            continue
        if key not in chosen:
            takes = ", ".join(f"--{name}" for name in rule.options) or "no options"
            raise PlanError(f'The rule "{rule.name}" takes no --{key}. It takes {takes}.')
        if key in rule.choices and value not in rule.choices[key]:
            raise PlanError(
                f'--{key} is "{value}"; the rule "{rule.name}" knows '
                f"{', '.join(rule.choices[key])}."
            )
        chosen[key] = value
    for key, value in chosen.items():
        if value is None:
            raise PlanError(f'The rule "{rule.name}" needs --{key}.')
        low, high = {"percent": (0.0, 100.0), "blocks": (1.0, 1e6)}.get(key, (None, None))
        if low is not None and not (isinstance(value, int | float) and low <= value <= high):  # type: ignore[operator]
            raise PlanError(f"--{key} is {value}; give a number from {low:g} to {high:g}.")
        if key == "threshold" and value != "":
            _check_threshold(rule, float(value))
    return chosen


def _check_threshold(rule: RuleInfo, value: float) -> None:
    if not math.isfinite(value):
        raise PlanError(f"--threshold is {value}; give a finite number.")
    if value < 0 and rule.name != "threshold":
        raise PlanError(
            f'--threshold is {value:g}; what the rule "{rule.name}" compares with it is never '
            "below 0. Give 0 or more."
        )


def list_rules() -> tuple[RuleInfo, ...]:
    """Return the ways to choose what is reset."""
    return RULES
