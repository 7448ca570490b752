"""Figures and a preset -> findings: named checks a person can read, change and argue with.

Static figures change sign as predictors from setting to setting (Lyle et al. 2023), so a finding
says what stands out and never what to do; the short fine-tune is the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from core.catalogue.checks import DEFAULT_PRESET, Check, checked_thresholds, preset_named
from core.catalogue.metrics import METRICS
from core.records import Diagnosis, Finding, LayerReport, Remark
from core.records.base import Value

# Of two layers that trip one check, the worse is still a finding from so many times the other on;
# of shares the odds are compared, so that 0.99 beside 0.9 counts as much as 0.1 beside 0.01.
FAR_BEYOND = 10.0


# Standard deviations of a count that two networks that do not differ leave to chance.
CHANCE_DEVIATIONS = 2.0


def rejudge(
    diagnosis: Diagnosis,
    *,
    preset: str = DEFAULT_PRESET,
    thresholds: Mapping[str, float] | None = None,
) -> Diagnosis:
    """Return a diagnosis with the findings and remarks of a preset; nothing is measured.

    Args:
        diagnosis: As measured.
        preset: Name of a set of checks.
        thresholds: Other limits than the preset's, by check name.

    Raises:
        OptionError: There is no such preset or check, or a threshold is no number from 0.
    """
    chosen = preset_named(preset)
    limits = checked_thresholds(chosen, thresholds or {})
    judged = judgement(diagnosis.layers, preset=preset, thresholds=limits)
    return diagnosis.model_copy(
        update={
            "preset": chosen.name,
            "thresholds": {
                check.name: limits[check.name]
                for check in chosen.checks
                if limits[check.name] != check.threshold
            },
            "findings": judged.findings,
            "remarks": judged.remarks,
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

    A check on the ratio passes over layers whose twin is 0, unless the check asks for more than a
    floor of its own: any share above it is then more than so many times none.

    Args:
        layers: Reports in forward order. The head is left out: it is new.
        preset: Name of a set of checks.
        thresholds: Other limits, by check name.

    Raises:
        OptionError: There is no such preset or check, or a threshold is no number from 0.
    """
    chosen = preset_named(preset)
    limits = checked_thresholds(chosen, thresholds or {})
    findings, remarks = [], []
    weighty = [layer for layer in layers if not layer.head and layer.kind != "norm"]
    for check in chosen.checks:
        limit = limits[check.name]
        says = check.predicate(limit)
        if check.compare.startswith("ratio"):
            hits, without = _beyond_twin(check, limit, weighty)
            if without:
                remarks.append(_no_ratio(check, without))
        else:
            hits, alike, theirs = _unlike_twin(_readings(check, limit, weighty), check)
            if alike:
                sentence = f"As in the fresh twin ({_layers(theirs)} there): {_said(says, alike)}"
                remarks.append(
                    Remark(
                        why="as-twin",
                        check=check.name,
                        metric=check.metric,
                        sentence=sentence,
                        layers=tuple(alike),
                    )
                )
        if hits:
            findings.append(
                Finding(
                    check=check.name,
                    severity=check.severity,
                    layers=tuple(hits),
                    metric=check.metric,
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


def _no_ratio(check: Check, layers: Sequence[str]) -> Remark:
    title = _METRICS[check.metric].title.partition(" (")[0]
    return Remark(
        why="twin-zero",
        check=check.name,
        metric=check.metric,
        sentence=f'In {_layers(len(layers))} the fresh twin\'s figure for "{title}" is 0: there is '
        f'no ratio, and "{check.name}" passes them over.',
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
            check="",
            metric="",
            sentence=f"In {_layers(len(names))} {figures} ({odd[names[0]][0]} of "
            f'"{names[0]}" first), and no check looks there. Check the weights and measure again.',
            layers=tuple(names),
        )
    ]


def _beyond_twin(
    check: Check, limit: float, layers: Sequence[LayerReport]
) -> tuple[list[str], list[str]]:
    """Return the layers beyond a limit on the ratio, and those without a ratio: the twin is 0."""
    hits: list[str] = []
    without: list[str] = []
    for layer in layers:
        figure, ratio = layer.metrics.get(check.metric), layer.ratio(check.metric)
        if figure is None or figure.value is None or figure.value < check.floor:
            continue
        if ratio.kind == "twin-zero":
            more = check.compare == "ratio_above" and check.floor > 0
            (hits if more else without).append(layer.name)
        elif ratio.kind == "ratio" and _COMPARE[check.compare](ratio.value or 0.0, limit):
            hits.append(layer.name)
    return hits, without


class _Reading(NamedTuple):
    """A layer under a check on absolute figures: the network's, its twin's, and who trips it."""

    layer: str
    value: float
    twin: float | None
    tripped: bool
    twin_tripped: bool


def _readings(check: Check, limit: float, layers: Sequence[LayerReport]) -> list[_Reading]:
    if check.compare == "first_over_last_below":
        return _first_over_last(check, limit, layers)

    def trips(value: float | None) -> bool:
        if value is None or not math.isfinite(value) or value < check.floor:
            return False
        return _COMPARE[check.compare](value, limit)

    readings = []
    for layer in layers:
        value, twin = _values(layer, check.metric)
        if value is not None:
            readings.append(_Reading(layer.name, value, twin, trips(value), trips(twin)))
    return readings


def _first_over_last(check: Check, limit: float, layers: Sequence[LayerReport]) -> list[_Reading]:
    """Return the reading of the first trained layer, whose value is its figure over the last's."""
    trained = [layer for layer in layers if _values(layer, check.metric)[0] is not None]
    if len(trained) < 2:
        return []
    ends = [_values(layer, check.metric) for layer in (trained[0], trained[-1])]
    shares: list[float | None] = []
    tripped = []
    for first, last in zip(*ends, strict=True):
        share = None if first is None or last is None or last <= 0 else first / last
        small = first is not None and (check.ceiling is None or first < check.ceiling)
        shares.append(share)
        tripped.append(small and share is not None and share < limit)
    if shares[0] is None:
        return []
    return [_Reading(trained[0].name, shares[0], shares[1], tripped[0], tripped[1])]


def _values(layer: LayerReport, metric: str) -> tuple[float | None, float | None]:
    own, twin = layer.metrics.get(metric), layer.twin_metrics.get(metric)
    return None if own is None else own.value, None if twin is None else twin.value


def _unlike_twin(readings: Sequence[_Reading], check: Check) -> tuple[list[str], list[str], int]:
    """Return the layers that trip a check, those that do as in the twin, and how many do there."""
    tripped = [reading for reading in readings if reading.tripped]
    far = {each.layer for each in tripped if each.twin is None or _far_beyond(check, each)}
    alone = {each.layer for each in tripped if not each.twin_tripped}
    back = sum(reading.twin_tripped and not reading.tripped for reading in readings)
    near = len(alone - far)
    if back and near - back <= CHANCE_DEVIATIONS * math.sqrt(near + back):
        alone = set()
    hits = [each.layer for each in tripped if each.layer in far | alone]
    alike = [each.layer for each in tripped if each.layer not in far | alone]
    return hits, alike, sum(reading.twin_tripped for reading in readings)


def _far_beyond(check: Check, reading: _Reading) -> bool:
    value, twin = reading.value, reading.twin
    if twin is None or value == twin:
        return False
    if _METRICS[check.metric].unit == "share" and check.compare != "first_over_last_below":
        value, twin = (share / (1 - share) if share < 1 else math.inf for share in (value, twin))
    if check.compare == "above":
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
