"""Each rule of judgement, by a report made for it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from core.catalogue.checks import PRESETS, list_presets, preset_named
from core.catalogue.metrics import metric_names
from core.errors import OptionError
from core.judge import judge, rejudge
from core.records import (
    DataSpec,
    Diagnosis,
    DiagnosisHeader,
    Finding,
    LayerReport,
    MetricValue,
    ModelSpec,
)

RULES = preset_named("limber").checks


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


@pytest.fixture
def diagnosis() -> Diagnosis:
    """What a person measured: two layers, one of them sick."""
    header = DiagnosisHeader(
        model=ModelSpec(source="timm", name="resnet18"),
        model_title="ResNet-18",
        classes=2,
        backbone_sha256="0" * 64,
        data=DataSpec(source="folder", name="photos"),
        data_title="photos",
        data_fingerprint="0" * 64,
        split="train",
        samples=1,
        batches=1,
        batch_size=1,
        image_size=32,
        device="cpu",
        device_name="cpu",
        dtype="float32",
        seed=0,
        batch_norm="batch",
        loss=1.0,
        twin_loss=1.0,
        wall_s=1.0,
        versions={},
    )
    layers = (
        report("sick", own={"dead_fraction": 0.5, "dormant_fraction": 0.6}),
        report("well", own={"dead_fraction": 0.0, "dormant_fraction": 0.0}),
    )
    return rejudge(Diagnosis(header=header, layers=layers))


def found(*layers: LayerReport) -> dict[str, Finding]:
    return {finding.check: finding for finding in judge(layers)}


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
            "collapsed-features",
            {
                "own": {"activation_effective_rank": 4.0},
                "fresh": {"activation_effective_rank": 9.0},
            },
            {
                "own": {"activation_effective_rank": 4.6},
                "fresh": {"activation_effective_rank": 9.0},
            },
        ),
        (
            "collapsed-attention",
            {"own": {"attention_entropy": 0.19}},
            {"own": {"attention_entropy": 0.21}},
        ),
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


@pytest.mark.parametrize(
    ("preset", "rule", "hit", "miss"),
    [
        (
            "sagemaker-debugger",
            "dead-relu",
            {"rarely_active_fraction": 0.51},
            {"rarely_active_fraction": 0.5},
        ),
        (
            "sagemaker-debugger",
            "vanishing-gradient",
            {"grad_mean_abs": 0.9e-7},
            {"grad_mean_abs": 1.1e-7},
        ),
        ("autotrainer", "dying-relu", {"grad_zero_fraction": 0.71}, {"grad_zero_fraction": 0.7}),
        (
            "fastai",
            "near-zero-outputs",
            {"near_zero_output_fraction": 0.76},
            {"near_zero_output_fraction": 0.75},
        ),
        ("redo", "dormant-units", {"dormant_fraction": 0.001}, {"dormant_fraction": 0.0}),
        ("weightwatcher", "alpha-low", {"power_law_alpha": 1.9}, {"power_law_alpha": 2.0}),
        ("weightwatcher", "alpha-high", {"power_law_alpha": 6.1}, {"power_law_alpha": 6.0}),
    ],
)
def test_rules_of_other_tools_speak_beyond_their_thresholds(
    preset: str, rule: str, hit: dict[str, float], miss: dict[str, float]
) -> None:
    findings = judge([report("hit", own=hit), report("miss", own=miss)], preset=preset)

    assert [(finding.check, finding.layers) for finding in findings] == [(rule, ("hit",))]


@pytest.mark.parametrize(
    ("first", "last", "speaks"),
    [(0.9e-6, 1e-3, True), (1.1e-6, 1e-3, False), (1e-4, 1.0, False), (1e-9, 0.0, False)],
    ids=["far below the last", "not far below", "not small by itself", "no gradient at all"],
)
def test_autotrainer_holds_the_first_layer_against_the_last(
    first: float, last: float, speaks: bool
) -> None:
    layers = [
        report("first", own={"grad_l2": first}),
        report("frozen", own={"grad_l2": None}),
        report("last", own={"grad_l2": last}),
        report("head", own={"grad_l2": 1e9}, head=True),
    ]

    findings = judge(layers, preset="autotrainer")

    assert [finding.layers for finding in findings] == ([("first",)] if speaks else [])


def test_every_rule_has_been_tried_above_and_looks_at_a_metric_there_is() -> None:
    assert [rule.name for preset in list_presets() for rule in preset.checks] == [
        *("vanishing-gradient", "weak-gradient", "saturated", "dead-units", "dormant-units"),
        *("collapsed-features", "collapsed-attention", "inflated-weights"),
        *("dead-relu", "vanishing-gradient"),
        *("vanishing-gradient", "dying-relu"),
        *("near-zero-outputs", "dormant-units", "alpha-low", "alpha-high"),
    ]
    assert {rule.metric for preset in PRESETS for rule in preset.checks} <= set(metric_names())
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        assert len({rule.name for rule in preset.checks}) == len(preset.checks)


@pytest.mark.parametrize(
    ("interval", "speaks"), [((0.05, 0.2), True), ((0.05, 1.01), False), (None, True)]
)
def test_a_rule_on_the_ratio_is_silent_where_the_images_cannot_tell(
    interval: tuple[float, float] | None, speaks: bool
) -> None:
    layer = report(
        own={"relative_grad_norm": 0.1},
        fresh={"relative_grad_norm": 1.0},
        ratio_intervals={} if interval is None else {"relative_grad_norm": interval},
    )

    assert bool(judge([layer])) == speaks


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
        "activation_effective_rank": 1.0,
        "attention_entropy": 0.1,
        "weight_l2": 9.0,
    }
    fresh = {
        "relative_grad_norm": 1.0,
        "saturated_fraction": 0.5,
        "activation_effective_rank": 9.0,
        "weight_l2": 1.0,
    }

    sentence = found(report(own=own, fresh=fresh))[rule].sentence

    assert sentence.split()[:2] == ["1", "layer"]
    assert sentence.split()[2] in ("gets", "is", "feeds", "has", "spreads", "asks")


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"thresholds": {"dead-unit": 0.2}},
            'The preset "limber" has no check "dead-unit". It has vanishing-gradient, .*',
        ),
        (
            {"preset": "redo", "thresholds": {"saturated": 0.2}},
            'The preset "redo" has no check "saturated". It has dormant-units.',
        ),
        (
            {"thresholds": {"dead-units": -1.0}},
            'The threshold of "dead-units" is -1; give a number from 0.',
        ),
        ({"thresholds": {"dead-units": math.nan}}, ".* is nan; give a number from 0."),
        ({"preset": "nosuch"}, 'There is no preset "nosuch". There are limber, .*'),
    ],
)
def test_what_is_no_preset_rule_or_threshold_is_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        judge([], **given)


def test_a_diagnosis_is_judged_again_and_says_by_what(diagnosis: Diagnosis) -> None:
    mild = rejudge(diagnosis, thresholds={"dead-units": 0.9, "dormant-units": 0.1})
    other = rejudge(mild, preset="redo")

    assert mild.thresholds == {"dead-units": 0.9}
    assert (other.preset, other.thresholds) == ("redo", {})
    assert {finding.check for finding in mild.findings} == {"dormant-units"}
    assert {finding.check for finding in other.findings} == {"dormant-units"}
    assert mild.layers == other.layers == diagnosis.layers
    assert rejudge(other) == diagnosis
