"""Report + thresholds -> findings: named rules a person can read, change and argue with.

Static figures change sign as predictors from setting to setting (Lyle et al. 2023), so a finding
says what stands out and never what to do; the short fine-tune is the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from core.catalogue.metrics import METRICS
from core.errors import OptionError
from core.records import Diagnosis, Finding, LayerReport, Remark
from core.records.base import Value

Compare = Literal["above", "below", "ratio_above", "ratio_below", "first_over_last_below"]

# Of two layers that trip one check, the worse is still a finding from so many times the other on;
# of shares the odds are compared, so that 0.99 beside 0.9 counts as much as 0.1 beside 0.01.
FAR_BEYOND = 10.0
# Standard deviations of a count that two networks that do not differ leave to chance.
CHANCE_DEVIATIONS = 2.0


class JudgeRule(Value):
    """One rule: its name, the metric it looks at, its threshold, and how it compares.

    Attributes:
        name: Key; unique within a preset.
        metric: Which metric it looks at.
        compare: "above" or "below" looks at the value, "ratio_above" or "ratio_below" at value
            over twin, "first_over_last_below" at the first trained layer's value over the last
            one's. Rules on the ratio say nothing where the images measured cannot tell the
            network from its twin; the others say nothing of what the twin shows as well.
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
        description="Its built-in rules DeadRelu and VanishingGradient with its limits; it has no "
        "twin, so it would also count layers that are as at initialisation. Its rules on the ratio "
        "of update to weight need an optimiser's step, which a measurement does not take.",
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
        "2021) with its limits, as far as one measurement shows them. It has no twin: of a network "
        "with zero-initialised norms it would call the fresh state sick.",
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
        "and leaves the limit to the eye; limit and comparison with the twin are ours.",
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
        "arXiv:2302.12902). The paper also tries 0.1; tau is fixed here, the share is not. The "
        "paper resets every such unit, and so does the rule redo; this check names layers that "
        "have more of them than the twin.",
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
        description="Exponents outside 2 to 6 (Martin & Mahoney). Layers of random networks lie "
        "on both sides of 6, so that the upper limit counts only where clearly more layers exceed "
        "it than in the twin. The exponents are ours, not WeightWatcher's (see the metric).",
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
    """Return a diagnosis with the findings and remarks of a preset; nothing is measured.

    Args:
        diagnosis: As measured.
        preset: Name of a set of rules.
        thresholds: Other limits than the preset's, by rule name.

    Raises:
        OptionError: There is no such preset or rule, or a threshold is no number from 0.
    """
    chosen = preset_named(preset)
    limits = checked_thresholds(chosen, thresholds or {})
    found = judgement(diagnosis.layers, preset=preset, thresholds=limits)
    return diagnosis.model_copy(
        update={
            "preset": chosen.name,
            "thresholds": {
                rule.name: limits[rule.name]
                for rule in chosen.rules
                if limits[rule.name] != rule.threshold
            },
            "findings": found.findings,
            "remarks": found.remarks,
        }
    )


class Judgement(Value):
    """What stands out, the most severe first, and what the checks passed over."""

    findings: tuple[Finding, ...]
    remarks: tuple[Remark, ...]


def judge(
    layers: Sequence[LayerReport],
    *,
    preset: str = DEFAULT_PRESET,
    thresholds: Mapping[str, float] | None = None,
) -> tuple[Finding, ...]:
    """Return the findings of `judgement`."""
    return judgement(layers, preset=preset, thresholds=thresholds).findings


def judgement(
    layers: Sequence[LayerReport],
    *,
    preset: str = DEFAULT_PRESET,
    thresholds: Mapping[str, float] | None = None,
) -> Judgement:
    """Return what stands out, and what would but for the fresh twin.

    A check on an absolute figure does not count a layer in which the twin trips it too, unless
    the network is `FAR_BEYOND` times further out. Nor does it count layers that only the network
    trips in, where by chance about as many would trip in the twin alone: limits taken from
    trained networks (power-law exponents) run through the middle of what random ones show.

    A check on the ratio passes over layers whose twin is 0, unless the rule asks for more than a
    floor of its own: any share above it is then more than so many times none.

    Args:
        layers: Reports in forward order. The head is left out: it is new.
        preset: Name of a set of rules.
        thresholds: Other limits, by rule name.

    Raises:
        OptionError: There is no such preset or rule, or a threshold is no number from 0.
    """
    chosen = preset_named(preset)
    limits = checked_thresholds(chosen, thresholds or {})
    findings, remarks = [], []
    weighty = [layer for layer in layers if not layer.head and layer.kind != "norm"]
    for rule in chosen.rules:
        limit = limits[rule.name]
        says = rule.says.format(threshold=limit, percent=100 * limit)
        if rule.compare.startswith("ratio"):
            hits, without = _beyond_twin(rule, limit, weighty)
            if without:
                remarks.append(_no_ratio(rule, without))
        else:
            hits, alike, theirs = _unlike_twin(_readings(rule, limit, weighty), rule)
            if alike:
                sentence = f"As in the fresh twin ({_layers(theirs)} there): {_said(says, alike)}"
                remarks.append(
                    Remark(
                        why="as-twin",
                        rule=rule.name,
                        metric=rule.metric,
                        sentence=sentence,
                        layers=tuple(alike),
                    )
                )
        if hits:
            findings.append(
                Finding(
                    rule=rule.name,
                    severity=rule.severity,
                    layers=tuple(hits),
                    metric=rule.metric,
                    threshold=limit,
                    sentence=_said(says, hits),
                )
            )
    order = {"warning": 0, "notice": 1, "info": 2}
    return Judgement(
        findings=tuple(sorted(findings, key=lambda finding: order[finding.severity])),
        remarks=(*remarks, *_not_finite(layers)),
    )


def _said(says: str, layers: Sequence[str]) -> str:
    return f"{_layers(len(layers))} {_singular(says, len(layers))}."


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _no_ratio(rule: JudgeRule, layers: Sequence[str]) -> Remark:
    title = _METRICS[rule.metric].title.partition(" (")[0]
    return Remark(
        why="twin-zero",
        rule=rule.name,
        metric=rule.metric,
        sentence=f'In {_layers(len(layers))} the fresh twin\'s figure for "{title}" is 0: there is '
        f'no ratio, and "{rule.name}" passes them over.',
        layers=tuple(layers),
    )


def _not_finite(layers: Sequence[LayerReport]) -> list[Remark]:
    """Return a remark on figures that broken weights or older versions left as NaN or infinite."""
    odd = {
        layer.name: [
            metric
            for figures in (layer.metrics, layer.twin_metrics)
            for metric, figure in figures.items()
            if figure.value is not None and not math.isfinite(figure.value)
        ]
        for layer in layers
    }
    names = [name for name, metrics in odd.items() if metrics]
    if not names:
        return []
    count = sum(len(metrics) for metrics in odd.values())
    figures = "1 figure is no finite number" if count == 1 else f"{count} figures are not finite"
    return [
        Remark(
            why="not-finite",
            rule="",
            metric="",
            sentence=f"In {_layers(len(names))} {figures} ({odd[names[0]][0]} of "
            f'"{names[0]}" first), and no check looks there. Check the weights and measure again.',
            layers=tuple(names),
        )
    ]


def _beyond_twin(
    rule: JudgeRule, limit: float, layers: Sequence[LayerReport]
) -> tuple[list[str], list[str]]:
    """Return the layers beyond a limit on the ratio, and those without a ratio: the twin is 0."""
    hits: list[str] = []
    without: list[str] = []
    for layer in layers:
        figure, ratio = layer.metrics.get(rule.metric), layer.ratio(rule.metric)
        if figure is None or figure.value is None or figure.value < rule.floor:
            continue
        if ratio.kind == "twin-zero":
            more = rule.compare == "ratio_above" and rule.floor > 0
            (hits if more else without).append(layer.name)
        elif ratio.kind == "ratio" and _COMPARE[rule.compare](ratio.value or 0.0, limit):
            hits.append(layer.name)
    return hits, without


class _Reading(NamedTuple):
    """A layer under a check on absolute figures: the network's, its twin's, and who trips it."""

    layer: str
    value: float
    twin: float | None
    tripped: bool
    twin_tripped: bool


def _readings(rule: JudgeRule, limit: float, layers: Sequence[LayerReport]) -> list[_Reading]:
    if rule.compare == "first_over_last_below":
        return _first_over_last(rule, limit, layers)

    def trips(value: float | None) -> bool:
        if value is None or not math.isfinite(value) or value < rule.floor:
            return False
        return _COMPARE[rule.compare](value, limit)

    found = []
    for layer in layers:
        value, twin = _values(layer, rule.metric)
        if value is not None:
            found.append(_Reading(layer.name, value, twin, trips(value), trips(twin)))
    return found


def _first_over_last(
    rule: JudgeRule, limit: float, layers: Sequence[LayerReport]
) -> list[_Reading]:
    """Return the reading of the first trained layer, whose value is its figure over the last's."""
    trained = [layer for layer in layers if _values(layer, rule.metric)[0] is not None]
    if len(trained) < 2:
        return []
    ends = [_values(layer, rule.metric) for layer in (trained[0], trained[-1])]
    shares: list[float | None] = []
    tripped = []
    for first, last in zip(*ends, strict=True):
        share = None if first is None or last is None or last <= 0 else first / last
        small = first is not None and (rule.ceiling is None or first < rule.ceiling)
        shares.append(share)
        tripped.append(small and share is not None and share < limit)
    if shares[0] is None:
        return []
    return [_Reading(trained[0].name, shares[0], shares[1], tripped[0], tripped[1])]


def _values(layer: LayerReport, metric: str) -> tuple[float | None, float | None]:
    own, twin = layer.metrics.get(metric), layer.twin_metrics.get(metric)
    return None if own is None else own.value, None if twin is None else twin.value


def _unlike_twin(readings: Sequence[_Reading], rule: JudgeRule) -> tuple[list[str], list[str], int]:
    """Return the layers that trip a check, those that do as in the twin, and how many do there."""
    tripped = [each for each in readings if each.tripped]
    far = {each.layer for each in tripped if each.twin is None or _far_beyond(rule, each)}
    alone = {each.layer for each in tripped if not each.twin_tripped}
    back = sum(each.twin_tripped and not each.tripped for each in readings)
    near = len(alone - far)
    if back and near - back <= CHANCE_DEVIATIONS * math.sqrt(near + back):
        alone = set()
    hits = [each.layer for each in tripped if each.layer in far | alone]
    alike = [each.layer for each in tripped if each.layer not in far | alone]
    return hits, alike, sum(each.twin_tripped for each in readings)


def _far_beyond(rule: JudgeRule, reading: _Reading) -> bool:
    value, twin = reading.value, reading.twin
    if twin is None or value == twin:
        return False
    if _METRICS[rule.metric].unit == "share" and rule.compare != "first_over_last_below":
        value, twin = (each / (1 - each) if each < 1 else math.inf for each in (value, twin))
    if rule.compare == "above":
        return value >= FAR_BEYOND * twin
    return FAR_BEYOND * value <= twin


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


_METRICS = {info.name: info for info in METRICS}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "above": lambda value, limit: value > limit,
    "below": lambda value, limit: value < limit,
    "ratio_above": lambda value, limit: value >= limit,
    "ratio_below": lambda value, limit: value <= limit,
}
