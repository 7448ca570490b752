"""The rules there are, with their sources and options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import computed_field

from core.errors import PlanError, Remedy
from core.records.base import Value


class RuleOption(Value):
    """A number or word that a rule takes: the command line's option and the page's field.

    Attributes:
        name: Key in a plan, and the option's name.
        label: On the page.
        help: What it is, for the command line.
        kind: "number", "whole" (a whole number), "word" (one of `choices`) or "metric" (a name of
            the catalogue's metrics).
        default: None where it must be given; "" for no value.
        low, high: Range of a number; None where open.
        choices: Allowed words, with what the page calls them.
        instead_of: Another option that it takes the place of. The page offers that one.
    """

    name: str
    label: str
    help: str
    kind: Literal["number", "whole", "word", "metric"] = "number"
    default: float | str | None = None
    low: float | None = None
    high: float | None = None
    choices: dict[str, str] = {}
    instead_of: str = ""


class RuleInfo(Value):
    """One way to choose what is reset.

    Attributes:
        name: Key in a plan and on the command line.
        title: Plain words.
        description: What is selected.
        source: Paper, or whose judgement it is.
        granularity: What it selects.
        takes: Its options, in the order in which a form shows them.
        needs: What it looks at besides the weights.
        needs_only: Option to the words for which it needs that; empty where it always does.
        scheme: What is written unless another scheme is named.
    """

    name: str
    title: str
    description: str
    source: str
    granularity: Literal["layer", "unit", "weight", "any"]
    takes: tuple[RuleOption, ...] = ()
    needs: Literal["nothing", "images", "a diagnosis", "a plan"] = "nothing"
    needs_only: dict[str, tuple[str, ...]] = {}
    scheme: str = "architecture"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def options(self) -> dict[str, float | str | None]:
        """Name of an option to its default; None means that it must be given."""
        return {option.name: option.default for option in self.takes}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Name of an option that is a word to the words it may be."""
        return {option.name: tuple(option.choices) for option in self.takes if option.choices}

    def looks(self, chosen: Mapping[str, float | str | None]) -> bool:
        """Whether it needs what `needs` names, with these options (None for the default)."""
        return self.needs in ("images", "a diagnosis") and all(
            (self.options[name] if chosen.get(name) is None else chosen[name]) in words
            for name, words in self.needs_only.items()
        )


SEED_PAPER = "Coetzer et al. 2026, arXiv:2603.20860"


def _percent(default: float) -> RuleOption:
    return RuleOption(
        name="percent",
        label="Share (%)",
        help="share that is chosen, 0 to 100",
        default=default,
        low=0,
        high=100,
    )


def _limit(
    default: float | str | None, *, low: float | None = 0, instead_of: str = ""
) -> RuleOption:
    return RuleOption(
        name="threshold",
        label="Limit",
        help="limit of the rule",
        default=default,
        low=low,
        instead_of=instead_of,
    )


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
        takes=(
            RuleOption(
                name="blocks",
                label="Blocks",
                help="how many of the last blocks",
                kind="whole",
                default=1.0,
                low=1,
                high=1e6,
            ),
        ),
    ),
    RuleInfo(
        name="threshold",
        title="A figure beyond a limit",
        description="Layers (or units, for a figure by unit) of which a figure, or its ratio to "
        "the fresh twin's, lies above or below a limit.",
        source="your judgement on a diagnosis",
        granularity="any",
        takes=(
            RuleOption(
                name="metric",
                label="Figure",
                help="figure of the rule threshold (see: list metrics)",
                kind="metric",
            ),
            _limit(None, low=None),
            RuleOption(
                name="side",
                label="Side",
                help="of the rule threshold: above or below",
                kind="word",
                default="above",
                choices={"above": "above the limit", "below": "below the limit"},
            ),
            RuleOption(
                name="of",
                label="Measured as",
                help="of the rule threshold: value, or ratio to the fresh twin's",
                kind="word",
                default="value",
                choices={"value": "the value", "ratio": "the ratio to the fresh twin"},
            ),
        ),
        needs="a diagnosis",
    ),
    RuleInfo(
        name="weight-magnitude",
        title="Smallest weights",
        description="In each tensor with two axes or more the given percentage of entries with "
        "the least |w|, the head included; of each bias as many, which become 0.",
        source=f"{SEED_PAPER} (W)",
        granularity="weight",
        takes=(_percent(10.0),),
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
        takes=(_percent(10.0),),
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
        takes=(
            _percent(10.0),
            _limit("", instead_of="percent"),
            RuleOption(
                name="utility",
                label="Utility",
                help="of the rule swr: gradient, magnitude or random",
                kind="word",
                default="gradient",
                choices={
                    "gradient": "|weight x gradient|",
                    "magnitude": "|weight|",
                    "random": "drawn at random",
                },
            ),
        ),
        needs="images",
        needs_only={"utility": ("gradient",)},
    ),
    RuleInfo(
        name="redo",
        title="Dormant units (ReDo)",
        description="Units whose mean |activation| is at most tau times the mean over their layer, "
        "wherever they are read. What makes them is redrawn, what reads them becomes 0.",
        source="Sokar et al., ICML 2023, arXiv:2302.12902",
        granularity="unit",
        takes=(_limit(0.025),),
        needs="a diagnosis",
    ),
    RuleInfo(
        name="grama",
        title="Units without gradient (GraMa)",
        description="As ReDo by the mean |gradient| at the unit's activation.",
        source="Liu et al. 2025, arXiv:2505.24061",
        granularity="unit",
        takes=(_limit(0.025),),
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
        takes=(_percent(5.0),),
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
        takes=(_percent(5.0),),
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
        takes=(_percent(10.0),),
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
        f'There is no rule "{name}". Known: {", ".join(rule.name for rule in RULES)}.',
        Remedy.LIST_RULES,
    )


def rule_options(
    rule: RuleInfo, given: Mapping[str, float | str | None]
) -> dict[str, float | str | None]:
    """Return a rule's options with the given ones put in.

    Raises:
        PlanError: An option it does not take, a word or number it does not allow, or one missing.
    """
    known = {option.name: option for option in rule.takes}
    chosen = dict(rule.options)
    for name, value in given.items():
        if value is None:
            continue
        if name not in known:
            takes = ", ".join(f'"{option}"' for option in known) or "no options"
            raise PlanError(
                f'The rule "{rule.name}" takes no "{name}". It takes {takes}.',
                Remedy.NO_OPTION,
                option=name,
            )
        other = known[name].instead_of
        if other and given.get(other) is not None:
            raise PlanError(
                f'The rule "{rule.name}" takes "{other}" or "{name}", and both are given.',
                Remedy.NO_OPTION,
                option=name,
            )
        chosen[name] = value
    for name, value in chosen.items():
        _check_option(rule, known[name], value)
    return chosen


def _check_option(rule: RuleInfo, option: RuleOption, value: float | str | None) -> None:
    """Raise unless a rule's option may have that value.

    Raises:
        PlanError: It is missing, or a word or number that is not allowed.
    """
    name = option.name
    if value is None:
        raise PlanError(
            f'The rule "{rule.name}" needs a "{name}".', Remedy.GIVE_OPTION, option=name
        )
    if option.choices and value not in option.choices:
        odd, must = f'"{value}"', " or ".join(option.choices)
    elif option.kind not in ("number", "whole") or value == "":
        return
    else:
        low = -math.inf if option.low is None else option.low
        high = math.inf if option.high is None else option.high
        number = value if isinstance(value, int | float) else math.nan
        if low <= number <= high and math.isfinite(number):
            return
        odd, must = f"{value}", "a finite number"
        if option.high is not None:
            must = f"a number from {low:g} to {high:g}"
        elif math.isfinite(number):
            must = f"{low:g} or more, because what it is compared with is never below {low:g}"
    raise PlanError(
        f'The "{name}" of the rule "{rule.name}" must be {must}; it is {odd}.',
        Remedy.OTHER_OPTION,
        option=name,
    )


def list_rules() -> tuple[RuleInfo, ...]:
    """Return the ways to choose what is reset."""
    return RULES


def rule_option_names() -> dict[str, RuleOption]:
    """Return every option that any rule takes, by name, in the order of the table."""
    options: dict[str, RuleOption] = {}
    for rule in RULES:
        for option in rule.takes:
            options.setdefault(option.name, option)
    return options
