"""Stages of a diagnosis folded to one column each, which shows the stiffest of their layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from core.records import Diagnosis, LayerReport, MetricValue
from dashboard import words

if TYPE_CHECKING:
    from core.catalogue.metrics import MetricInfo

# Begins the name of a folded column, which no layer's name can have: paths hold no blanks.
FOLDED = "stage "


def stages(diagnosis: Diagnosis) -> list[str]:
    """Return the stages that hold several layers, in forward order."""
    runs = [(stage, list(layers)) for stage, layers in _runs(diagnosis)]
    return list(dict.fromkeys(stage for stage, layers in runs if len(layers) > 1))


def folded(diagnosis: Diagnosis, fold: Collection[str], infos: Sequence[MetricInfo]) -> Diagnosis:
    """Return the diagnosis with one report for each folded stage.

    Each of its figures is that of the layer that is stiffest by it, with its twin's and its
    interval.

    Args:
        diagnosis: What was measured.
        fold: Names of stages.
        infos: The metrics that are shown.
    """
    reports: list[LayerReport] = []
    for stage, layers in _runs(diagnosis):
        members = list(layers)
        if stage in fold and len(members) > 1:
            reports.append(_summary(stage, members, infos))
        else:
            reports += members
    return diagnosis.model_copy(update={"layers": tuple(reports)})


def _runs(diagnosis: Diagnosis) -> list[tuple[str, list[LayerReport]]]:
    grouped = groupby(diagnosis.layers, key=lambda layer: layer.stage)
    return [(stage, list(layers)) for stage, layers in grouped]


def _summary(
    stage: str, members: Sequence[LayerReport], infos: Sequence[MetricInfo]
) -> LayerReport:
    metrics: dict[str, MetricValue] = {}
    twins: dict[str, MetricValue] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for info in infos:
        worst = _stiffest(members, info)
        if info.name in worst.metrics:
            metrics[info.name] = worst.metrics[info.name]
        if info.name in worst.twin_metrics:
            twins[info.name] = worst.twin_metrics[info.name]
        if info.name in worst.ratio_intervals:
            intervals[info.name] = worst.ratio_intervals[info.name]
    return members[0].model_copy(
        update={
            "name": f"{FOLDED}{stage}",
            "type": f"{words.count(len(members), 'layer')}, the stiffest of them",
            "parameters": sum(member.parameters for member in members),
            "units": None,
            "metrics": metrics,
            "twin_metrics": twins,
            "ratio_intervals": intervals,
        }
    )


def _stiffest(members: Sequence[LayerReport], info: MetricInfo) -> LayerReport:
    known = [
        (value, member)
        for member in members
        if info.name in member.metrics and (value := member.metrics[info.name].value) is not None
    ]
    if not known:
        return members[0]
    choose = min if info.bad == "low" else max
    return choose(known, key=lambda pair: pair[0])[1]
