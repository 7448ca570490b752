"""Report + thresholds -> findings: named rules a person can read, change and argue with.

Static figures change sign as predictors from setting to setting (Lyle et al. 2023), so a finding
says what stands out and never what to do; the short fine-tune is the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from core.records import Finding, LayerReport
from core.records.base import Value


class JudgeRule(Value):
    """One rule: its name, the metric it looks at, its threshold, and how it compares.

    `compare` is "above" or "below" on the value, or "ratio_above" / "ratio_below" on value
    over twin. `floor` is the least value (or, for ratios, the least value of the network
    itself) below which nothing is said.
    """

    name: str
    metric: str
    compare: Literal["above", "below", "ratio_above", "ratio_below"]
    threshold: float
    floor: float = 0.0
    severity: Literal["info", "notice", "warning"] = "notice"
    says: str
    source: str


RULES: tuple[JudgeRule, ...] = (
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
        name="inflated-weights",
        metric="weight_l2",
        compare="ratio_above",
        threshold=4.0,
        severity="info",
        says="have weights more than {threshold:g} times as large as at initialisation",
        source="ours: weight norm against the fresh twin",
    ),
)


def judge(
    layers: Sequence[LayerReport], *, thresholds: Mapping[str, float] | None = None
) -> tuple[Finding, ...]:
    """Return what stands out, the most severe first.

    Args:
        layers: Reports in forward order. The head is left out: it is new.
        thresholds: Other thresholds, by rule name.

    Raises:
        KeyError: A threshold names no rule.
    """
    changed = dict(thresholds or {})
    unknown = changed.keys() - {rule.name for rule in RULES}
    if unknown:
        raise KeyError(f"no such rule: {', '.join(sorted(unknown))}")
    findings = []
    for rule in RULES:
        limit = changed.get(rule.name, rule.threshold)
        hits = [
            layer.name
            for layer in layers
            if not layer.head and layer.kind != "norm" and _holds(rule, limit, layer)
        ]
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


def _singular(says: str, count: int) -> str:
    if count != 1:
        return says
    verb, _, rest = says.partition(" ")
    return (
        f"{ {'get': 'gets', 'are': 'is', 'feed': 'feeds', 'have': 'has'}.get(verb, verb) } {rest}"
    )


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
    value = layer.ratio(rule.metric) if rule.compare.startswith("ratio") else figure.value
    return value is not None and _COMPARE[rule.compare](value, limit)
