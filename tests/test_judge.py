"""Each rule of judgement, by a report made for it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from core.judge import RULES, judge
from core.metrics import metric_names
from core.records import Finding, LayerReport, MetricValue


def report(name: str = "layer", **changed: Any) -> LayerReport:
    """A layer of which nothing can be said; `own` and `fresh` hold figures by metric."""
    given: dict[str, Any] = {
        "type": "Conv2d",
        "stage": "layer",
        "kind": "conv",
        "index": 0,
        "parameters": 10,
        "units": 4,
        "activation": None,
        "activation_type": None,
        "head": False,
        **changed,
    }
    figures = {
        side: {metric: MetricValue(value=value, n=1) for metric, value in values.items()}
        for side, values in (("metrics", given.pop("own", {})), ("twin", given.pop("fresh", {})))
    }
    return LayerReport(name=name, metrics=figures["metrics"], twin_metrics=figures["twin"], **given)


def found(*layers: LayerReport) -> dict[str, Finding]:
    return {finding.rule: finding for finding in judge(layers)}


@pytest.mark.parametrize(
    ("rule", "hit", "miss"),
    [
        (
            "vanishing-gradient",
            {"own": {"grad_mean_abs": 0.9e-7}},
            {"own": {"grad_mean_abs": 1.1e-7}},
        ),
        (
            "weak-gradient",
            {"own": {"relative_grad_norm": 0.2}, "fresh": {"relative_grad_norm": 1.0}},
            {"own": {"relative_grad_norm": 0.3}, "fresh": {"relative_grad_norm": 1.0}},
        ),
        (
            "saturated",
            {"own": {"saturated_fraction": 0.8}, "fresh": {"saturated_fraction": 0.6}},
            {"own": {"saturated_fraction": 0.7}, "fresh": {"saturated_fraction": 0.6}},
        ),
        ("dead-units", {"own": {"dead_fraction": 0.06}}, {"own": {"dead_fraction": 0.05}}),
        ("dormant-units", {"own": {"dormant_fraction": 0.11}}, {"own": {"dormant_fraction": 0.1}}),
        (
            "inflated-weights",
            {"own": {"weight_l2": 4.0}, "fresh": {"weight_l2": 1.0}},
            {"own": {"weight_l2": 3.9}, "fresh": {"weight_l2": 1.0}},
        ),
    ],
)
def test_a_rule_speaks_beyond_its_threshold_and_not_before(
    rule: str, hit: dict[str, Any], miss: dict[str, Any]
) -> None:
    findings = found(report("hit", **hit), report("miss", **miss))

    assert list(findings) == [rule]
    assert findings[rule].layers == ("hit",)


def test_every_rule_has_been_tried_above_and_looks_at_a_metric_there_is() -> None:
    assert [rule.name for rule in RULES] == [
        *("vanishing-gradient", "weak-gradient", "saturated"),
        *("dead-units", "dormant-units", "inflated-weights"),
    ]
    assert {rule.metric for rule in RULES} <= set(metric_names())


def test_a_healthy_network_gets_no_finding() -> None:
    own = {
        "grad_mean_abs": 1e-3,
        "relative_grad_norm": 1.0,
        "saturated_fraction": 0.5,
        "dead_fraction": 0.0,
        "dormant_fraction": 0.0,
        "weight_l2": 1.0,
    }

    assert judge([report(own=own, fresh=own)]) == ()


def test_saturation_below_half_is_not_spoken_of_however_much_it_grew() -> None:
    layer = report(own={"saturated_fraction": 0.49}, fresh={"saturated_fraction": 0.01})

    assert judge([layer]) == ()


@pytest.mark.parametrize("fresh", [{}, {"weight_l2": 0.0}], ids=["missing", "zero"])
def test_a_ratio_needs_a_twin_above_nought(fresh: dict[str, float]) -> None:
    assert judge([report(own={"weight_l2": 50.0}, fresh=fresh)]) == ()


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_figure_that_is_missing_or_no_number_is_not_judged(value: float | None) -> None:
    own = {rule.metric: value for rule in RULES}

    assert judge([report(own=own, fresh={rule.metric: 1.0 for rule in RULES})]) == ()


@pytest.mark.parametrize("changed", [{"head": True}, {"kind": "norm"}], ids=["head", "norm"])
def test_head_and_norms_are_left_out(changed: dict[str, Any]) -> None:
    assert judge([report(own={"dead_fraction": 1.0}, **changed)]) == ()


def test_the_sentence_names_how_many_and_the_threshold() -> None:
    own = {"dead_fraction": 0.5}

    one = found(report("a", own=own))["dead-units"]
    two = found(report("a", own=own), report("b", own=own))["dead-units"]

    assert one.sentence == "1 layer has more than 5 % of units that never fire."
    assert two.sentence == "2 layers have more than 5 % of units that never fire."
    assert (two.layers, two.metric, two.threshold) == (("a", "b"), "dead_fraction", 0.05)


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_one_layer_is_spoken_of_in_the_singular(rule: str) -> None:
    own = {
        "grad_mean_abs": 0.0,
        "relative_grad_norm": 0.1,
        "saturated_fraction": 1.0,
        "dead_fraction": 1.0,
        "dormant_fraction": 1.0,
        "weight_l2": 9.0,
    }
    fresh = {"relative_grad_norm": 1.0, "saturated_fraction": 0.5, "weight_l2": 1.0}

    sentence = found(report(own=own, fresh=fresh))[rule].sentence

    assert sentence.split()[:2] == ["1", "layer"]
    assert sentence.split()[2] in ("gets", "is", "feeds", "has")


def test_warnings_come_first_and_remarks_last() -> None:
    layer = report(
        own={"weight_l2": 9.0, "dormant_fraction": 1.0, "dead_fraction": 1.0},
        fresh={"weight_l2": 1.0},
    )

    findings = judge([layer])

    assert [finding.severity for finding in findings] == ["warning", "notice", "info"]


def test_a_threshold_can_be_changed_and_is_then_the_one_that_is_said() -> None:
    layer = report(own={"dead_fraction": 0.3})

    assert judge([layer], thresholds={"dead-units": 0.4}) == ()
    (finding,) = judge([layer], thresholds={"dead-units": 0.2})
    assert finding.threshold == 0.2
    assert "more than 20 %" in finding.sentence


def test_a_threshold_for_no_rule_is_refused() -> None:
    with pytest.raises(KeyError, match="no such rule: dead-unit"):
        judge([], thresholds={"dead-unit": 0.2})
