"""The checks there are, in presets, with their limits and sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from core.errors import OptionError
from core.records.base import Value

Compare = Literal["above", "below", "ratio_above", "ratio_below", "first_over_last_below"]


class Check(Value):
    """One check: its name, the metric it looks at, its threshold, and how it compares.

    Attributes:
        name: Key; unique within a preset.
        metric: Which metric it looks at.
        compare: "above" or "below" looks at the value, "ratio_above" or "ratio_below" at value
            over twin, "first_over_last_below" at the first trained layer's value over the last
            one's. Checks on the ratio say nothing where the images measured cannot tell the
            network from its twin; the others say nothing of what the twin shows as well.
        threshold: The limit; people may change it.
        floor: The least value below which nothing is said.
        ceiling: The value from which nothing is said; None for no such value.
        severity: How loudly.
        says: The predicate of the sentence; {threshold} and {percent} are filled in.
        source: Where check and threshold come from.
    """

    name: str
    metric: str
    compare: Compare
    threshold: float
    floor: float = 0.0
    ceiling: float | None = None
    severity: Literal["info", "notice", "warning"] = "notice"
    says: str
    source: str

    def predicate(self, limit: float | None = None) -> str:
        """Return `says` with its limit filled in: the check's own, or another."""
        value = self.threshold if limit is None else limit
        return self.says.format(threshold=value, percent=100 * value)


class Preset(Value):
    """A named set of checks.

    Attributes:
        name: Key.
        title: Name for people.
        description: What it is, and what of the original cannot be expressed here.
        checks: In the order in which they are tried.
    """

    name: str
    title: str
    description: str
    checks: tuple[Check, ...] = Field(validation_alias="rules", serialization_alias="rules")


_LIMBER = (
    Check(
        name="vanishing-gradient",
        metric="grad_mean_abs",
        compare="below",
        threshold=1e-7,
        severity="warning",
        says="get practically no gradient (mean below {threshold:g})",
        source="limit of Amazon SageMaker Debugger's VanishingGradient",
    ),
    Check(
        name="weak-gradient",
        metric="relative_grad_norm",
        compare="ratio_below",
        threshold=0.25,
        says="get a gradient that, relative to the weight, is under {threshold:g} times the fresh "
        "twin's",
        source="ours: relative gradient norm against the fresh twin",
    ),
    Check(
        name="saturated",
        metric="saturated_fraction",
        compare="ratio_above",
        threshold=1.3,
        floor=0.5,
        says="feed activations with over half of the inputs saturated, at least {threshold:g} "
        "times the fresh twin's share",
        source="ours: saturated share against the fresh twin",
    ),
    Check(
        name="dead-units",
        metric="dead_fraction",
        compare="above",
        threshold=0.05,
        severity="warning",
        says="have more than {percent:g} % of units that never fire",
        source="ours; SageMaker Debugger flags layers over 50 %",
    ),
    Check(
        name="dormant-units",
        metric="dormant_fraction",
        compare="above",
        threshold=0.1,
        says="have more than {percent:g} % of units that hardly ever fire",
        source="ReDo's score, arXiv:2302.12902; the share is ours",
    ),
    Check(
        name="collapsed-features",
        metric="activation_effective_rank",
        compare="ratio_below",
        threshold=0.5,
        says="spread outputs over under {threshold:g} times as many directions as the fresh twin",
        source="ours: effective rank of the outputs against the fresh twin",
    ),
    Check(
        name="collapsed-attention",
        metric="attention_entropy",
        compare="below",
        threshold=0.2,
        says="ask for attention that falls on few keys (entropy below {threshold:g} of the "
        "largest possible)",
        source="ours; entropy collapse is described in arXiv:2303.06296",
    ),
    Check(
        name="inflated-weights",
        metric="weight_l2",
        compare="ratio_above",
        threshold=4.0,
        severity="info",
        says="have weights more than {threshold:g} times as large as at initialisation",
        source="ours: weight norm against the fresh twin",
    ),
)


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="limber",
        title="Limber",
        description="Against the fresh twin wherever a figure means little by itself.",
        checks=_LIMBER,
    ),
    Preset(
        name="sagemaker-debugger",
        title="Amazon SageMaker Debugger",
        description="Its built-in rules DeadRelu and VanishingGradient with its limits; it has no "
        "twin, so it would also count layers that are as at initialisation. Its rules on the ratio "
        "of update to weight need an optimiser's step, which a measurement does not take.",
        checks=(
            Check(
                name="dead-relu",
                metric="rarely_active_fraction",
                compare="above",
                threshold=0.5,
                severity="warning",
                says="have more than {percent:g} % of units active less than 1 % of the time",
                source="SageMaker Debugger, DeadRelu",
            ),
            Check(
                name="vanishing-gradient",
                metric="grad_mean_abs",
                compare="below",
                threshold=1e-7,
                severity="warning",
                says="get practically no gradient (mean below {threshold:g})",
                source="SageMaker Debugger, VanishingGradient",
            ),
        ),
    ),
    Preset(
        name="autotrainer",
        title="AutoTrainer",
        description="Its symptoms of vanishing gradients and dying ReLU (Zhang et al., ICSE "
        "2021) with its limits, as far as one measurement shows them. It has no twin: of a network "
        "with zero-initialised norms it would call the fresh state sick.",
        checks=(
            Check(
                name="vanishing-gradient",
                metric="grad_l2",
                compare="first_over_last_below",
                threshold=1e-3,
                ceiling=1e-4,
                severity="warning",
                says="are the first to be trained and get less than {threshold:g} of the last "
                "layer's gradient, and less than 1e-4",
                source="AutoTrainer, ||g_first|| / ||g_last|| and ||g_first||",
            ),
            Check(
                name="dying-relu",
                metric="grad_zero_fraction",
                compare="above",
                threshold=0.7,
                severity="warning",
                says="have more than {percent:g} % of gradient entries that are exactly 0",
                source="AutoTrainer, dying ReLU",
            ),
        ),
    ),
    Preset(
        name="fastai",
        title="fastai",
        description="The near-zero band of its ActivationStats, |h| <= 0.05. It draws the share "
        "and leaves the limit to the eye; limit and comparison with the twin are ours.",
        checks=(
            Check(
                name="near-zero-outputs",
                metric="near_zero_output_fraction",
                compare="above",
                threshold=0.75,
                says="hand on outputs of which more than {percent:g} % are near zero",
                source="fastai, ActivationStats; the limit is ours",
            ),
        ),
    ),
    Preset(
        name="redo",
        title="ReDo",
        description="Any unit whose score is at most tau = 0.025 (Sokar et al. 2023, "
        "arXiv:2302.12902). The paper also tries 0.1; tau is fixed here, the share is not. The "
        "paper resets every such unit, and so does the rule redo; this check names layers that "
        "have more of them than the twin.",
        checks=(
            Check(
                name="dormant-units",
                metric="dormant_fraction",
                compare="above",
                threshold=0.0,
                says="have more than {percent:g} % of units that hardly ever fire",
                source="ReDo, arXiv:2302.12902",
            ),
        ),
    ),
    Preset(
        name="weightwatcher",
        title="WeightWatcher",
        description="Exponents outside 2 to 6 (Martin & Mahoney). Layers of random networks lie "
        "on both sides of 6, so that the upper limit counts only where clearly more layers exceed "
        "it than in the twin. The exponents are ours, not WeightWatcher's (see the metric).",
        checks=(
            Check(
                name="alpha-low",
                metric="power_law_alpha",
                compare="below",
                threshold=2.0,
                severity="info",
                says="have a spectrum with a power-law exponent below {threshold:g}",
                source="WeightWatcher, useful range 2 to 6",
            ),
            Check(
                name="alpha-high",
                metric="power_law_alpha",
                compare="above",
                threshold=6.0,
                severity="info",
                says="have a spectrum with a power-law exponent above {threshold:g}",
                source="WeightWatcher, useful range 2 to 6",
            ),
        ),
    ),
)


DEFAULT_PRESET = "limber"


def preset_named(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        OptionError: There is none.
    """
    for preset in PRESETS:
        if preset.name == name:
            return preset
    names = ", ".join(preset.name for preset in PRESETS)
    raise OptionError(f'There is no preset "{name}". There are {names}.')


def checked_thresholds(preset: Preset, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the limit of each check of a preset, with a person's changes.

    Raises:
        OptionError: A change names no check of the preset, or is no number from 0.
    """
    limits = {check.name: check.threshold for check in preset.checks}
    for name, value in thresholds.items():
        if name not in limits:
            raise OptionError(
                f'The preset "{preset.name}" has no check "{name}". It has {", ".join(limits)}.'
            )
        if not math.isfinite(value) or value < 0:
            raise OptionError(f'The threshold of "{name}" is {value:g}; give a number from 0.')
        limits[name] = value
    return limits


def list_presets() -> tuple[Preset, ...]:
    """Return the sets of rules there are, the default one first."""
    return PRESETS
