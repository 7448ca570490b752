"""Report + thresholds -> findings: named rules a person can read, change and argue with.

Static figures change sign as predictors from setting to setting (Lyle et al. 2023), so a finding
says what stands out and never what to do; the short fine-tune is the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from core.errors import OptionError
from core.records import Diagnosis, Finding, LayerReport
from core.records.base import Value

Compare = Literal["above", "below", "ratio_above", "ratio_below", "first_over_last_below"]


class JudgeRule(Value):
    """One rule: its name, the metric it looks at, its threshold, and how it compares.

    Attributes:
        name: Key; unique within a preset.
        metric: Which metric it looks at.
        compare: "above" or "below" looks at the value, "ratio_above" or "ratio_below" at value
            over twin, "first_over_last_below" at the first trained layer's value over the last
            one's. Rules on the ratio say nothing where the images measured cannot tell the
            network from its twin.
        threshold: The limit; people may change it.
        floor: The least value below which nothing is said.
        ceiling: The value from which nothing is said; None for no such value.
        severity: How loudly.
        says: The predicate of the sentence; {threshold} and {percent} are filled in.
        source: Where rule and threshold come from.
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


class Preset(Value):
    """A named set of rules.

    Attributes:
        name: Key.
        title: Name for people.
        description: What it is, and what of the original cannot be expressed here.
        rules: In the order in which they are tried.
    """

    name: str
    title: str
    description: str
    rules: tuple[JudgeRule, ...]


_LIMBER = (
    JudgeRule(
        name="vanishing-gradient",
        metric="grad_mean_abs",
        compare="below",
        threshold=1e-7,
        severity="warning",
        says="get practically no gradient (mean below {threshold:g})",
        source="limit of Amazon SageMaker Debugger's VanishingGradient",
    ),
    JudgeRule(
        name="weak-gradient",
        metric="relative_grad_norm",
        compare="ratio_below",
        threshold=0.25,
        says="are pushed less than {threshold:g} times as hard, for their weight, as in a fresh "
        "network of the same shape",
        source="ours: relative gradient norm against the fresh twin",
    ),
    JudgeRule(
        name="saturated",
        metric="saturated_fraction",
        compare="ratio_above",
        threshold=1.3,
        floor=0.5,
        says="feed activations of which a larger share is saturated than in a fresh "
        "network ({threshold:g} times or more, and over half)",
        source="ours: saturated share against the fresh twin",
    ),
    JudgeRule(
        name="dead-units",
        metric="dead_fraction",
        compare="above",
        threshold=0.05,
        severity="warning",
        says="have more than {percent:g} % of units that never fire",
        source="ours; SageMaker Debugger flags layers over 50 %",
    ),
    JudgeRule(
        name="dormant-units",
        metric="dormant_fraction",
        compare="above",
        threshold=0.1,
        says="have more than {percent:g} % of units that hardly ever fire",
        source="ReDo's score, arXiv:2302.12902; the share is ours",
    ),
    JudgeRule(
        name="collapsed-features",
        metric="activation_effective_rank",
        compare="ratio_below",
        threshold=0.5,
        says="spread outputs over less than {threshold:g} times as many directions as a "
        "fresh network",
        source="ours: effective rank of the outputs against the fresh twin",
    ),
    JudgeRule(
        name="collapsed-attention",
        metric="attention_entropy",
        compare="below",
        threshold=0.2,
        says="ask for attention that falls on few keys (entropy below {threshold:g} of the "
        "largest possible)",
        source="ours; entropy collapse is described in arXiv:2303.06296",
    ),
    JudgeRule(
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
        rules=_LIMBER,
    ),
    Preset(
        name="sagemaker-debugger",
        title="Amazon SageMaker Debugger",
        description="Its built-in rules DeadRelu and VanishingGradient. Its rules on the ratio of "
        "update to weight need an optimiser's step, which a measurement does not take.",
        rules=(
            JudgeRule(
                name="dead-relu",
                metric="rarely_active_fraction",
                compare="above",
                threshold=0.5,
                severity="warning",
                says="have more than {percent:g} % of units active less than 1 % of the time",
                source="SageMaker Debugger, DeadRelu",
            ),
            JudgeRule(
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
        "2021), as far as one measurement shows them.",
        rules=(
            JudgeRule(
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
            JudgeRule(
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
        "and leaves the limit to the eye; the limit here is ours.",
        rules=(
            JudgeRule(
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
        "arXiv:2302.12902). The paper also tries 0.1; tau is fixed here, the share is not.",
        rules=(
            JudgeRule(
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
        description="Exponents outside 2 to 6 (Martin & Mahoney). Small random layers lie outside "
        "too: look at the twin's before you believe it.",
        rules=(
            JudgeRule(
                name="alpha-low",
                metric="power_law_alpha",
                compare="below",
                threshold=2.0,
                severity="info",
                says="have a spectrum with a power-law exponent below {threshold:g}",
                source="WeightWatcher, useful range 2 to 6",
            ),
            JudgeRule(
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
    """Return the limit of each rule of a preset, with a person's changes.

    Raises:
        OptionError: A change names no rule of the preset, or is no number from 0.
    """
    limits = {rule.name: rule.threshold for rule in preset.rules}
    for name, value in thresholds.items():
        if name not in limits:
            raise OptionError(
                f'The preset "{preset.name}" has no rule "{name}". It has {", ".join(limits)}.'
            )
        if not math.isfinite(value) or value < 0:
            raise OptionError(f'The threshold of "{name}" is {value:g}; give a number from 0.')
        limits[name] = value
    return limits


def list_presets() -> tuple[Preset, ...]:
    """Return the sets of rules there are, the default one first."""
    return PRESETS


def rejudge(
    diagnosis: Diagnosis,
    *,
    preset: str = DEFAULT_PRESET,
    thresholds: Mapping[str, float] | None = None,
) -> Diagnosis:
    """Return a diagnosis with the findings of a preset; nothing is measured.

    Args:
        diagnosis: As measured.
        preset: Name of a set of rules.
        thresholds: Other limits than the preset's, by rule name.

    Raises:
        OptionError: There is no such preset or rule, or a threshold is no number from 0.
    """
    chosen = preset_named(preset)
    limits = checked_thresholds(chosen, thresholds or {})
    return diagnosis.model_copy(
        update={
            "preset": chosen.name,
            "thresholds": {
                rule.name: limits[rule.name]
                for rule in chosen.rules
                if limits[rule.name] != rule.threshold
            },
            "findings": judge(diagnosis.layers, preset=preset, thresholds=limits),
        }
    )


def judge(
    layers: Sequence[LayerReport],
    *,
    preset: str = DEFAULT_PRESET,
    thresholds: Mapping[str, float] | None = None,
) -> tuple[Finding, ...]:
    """Return what stands out, the most severe first.

    Args:
        layers: Reports in forward order. The head is left out: it is new.
        preset: Name of a set of rules.
        thresholds: Other limits, by rule name.

    Raises:
        OptionError: There is no such preset or rule, or a threshold is no number from 0.
    """
    chosen = preset_named(preset)
    limits = checked_thresholds(chosen, thresholds or {})
    findings = []
    for rule in chosen.rules:
        limit = limits[rule.name]
        hits = _hits(rule, limit, layers)
        if hits:
            says = rule.says.format(threshold=limit, percent=100 * limit)
            subject = "1 layer" if len(hits) == 1 else f"{len(hits)} layers"
            findings.append(
                Finding(
                    rule=rule.name,
                    severity=rule.severity,
                    layers=tuple(hits),
                    metric=rule.metric,
                    threshold=limit,
                    sentence=f"{subject} {_singular(says, len(hits))}.",
                )
            )
    order = {"warning": 0, "notice": 1, "info": 2}
    return tuple(sorted(findings, key=lambda finding: order[finding.severity]))


def _hits(rule: JudgeRule, limit: float, layers: Sequence[LayerReport]) -> list[str]:
    weighty = [layer for layer in layers if not layer.head and layer.kind != "norm"]
    if rule.compare != "first_over_last_below":
        return [layer.name for layer in weighty if _holds(rule, limit, layer)]
    trained = [
        (layer.name, value)
        for layer in weighty
        if rule.metric in layer.metrics and (value := layer.metrics[rule.metric].value) is not None
    ]
    if len(trained) < 2:
        return []
    (name, first), (_, last) = trained[0], trained[-1]
    if rule.ceiling is not None and first >= rule.ceiling:
        return []
    return [name] if last > 0 and first / last < limit else []


_SINGULAR = {
    "are": "is",
    "ask": "asks",
    "feed": "feeds",
    "get": "gets",
    "hand": "hands",
    "have": "has",
    "spread": "spreads",
}


def _singular(says: str, count: int) -> str:
    verb, _, rest = says.partition(" ")
    return says if count != 1 else f"{_SINGULAR.get(verb, verb)} {rest}"


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "above": lambda value, limit: value > limit,
    "below": lambda value, limit: value < limit,
    "ratio_above": lambda value, limit: value >= limit,
    "ratio_below": lambda value, limit: value <= limit,
}


def _holds(rule: JudgeRule, limit: float, layer: LayerReport) -> bool:
    figure = layer.metrics.get(rule.metric)
    if figure is None or figure.value is None or figure.value < rule.floor:
        return False
    if not rule.compare.startswith("ratio"):
        return _COMPARE[rule.compare](figure.value, limit)
    value = layer.ratio(rule.metric)
    if value is None or layer.uncertain(rule.metric):
        return False
    return _COMPARE[rule.compare](value, limit)
