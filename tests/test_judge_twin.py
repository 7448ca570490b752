"""The fresh twin as reference: where there is no ratio to it, and what it shows as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import core
from core.catalogue.checks import PRESETS, preset_named
from core.catalogue.metrics import METRICS
from core.judge import judge, judgement
from core.measure import Measured, measure_network
from core.pipeline.measuring import MeasureSettings, diagnose
from core.records import Diagnosis, LayerReport, MetricValue, Ratio, ratio_of
from dashboard import charts, words
from tests.test_judge import report
from tests.zoo import ZOO

INFOS = {info.name: info for info in METRICS}
ABSOLUTE = [
    (preset.name, rule)
    for preset in PRESETS
    for rule in preset.checks
    if not rule.compare.startswith("ratio")
]


@pytest.mark.parametrize(
    ("value", "twin", "kind"),
    [
        (0.687, 0.0, "twin-zero"),
        (0.687, -0.0, "twin-zero"),
        # Rounding noise in place of an exact 0, and the nearest that single precision can tell.
        (1e-2, 1e-12, "twin-zero"),
        (-1e-2, 1e-12, "twin-zero"),
        (1.0, 2.0**-24, "twin-zero"),
        (1.0, 2.0**-23, "ratio"),
        # Small against other layers, but not against each other.
        (3e-12, 1e-12, "ratio"),
        (1e-23, 2e-23, "ratio"),
        (5e-324, 5e-324, "ratio"),
        # The network's own 0 is a figure like any other.
        (0.0, 0.5, "ratio"),
        (0.0, -0.5, "ratio"),
        (1e-12, 1e-2, "ratio"),
        (0.0, 0.0, "both-zero"),
        (-0.0, 0.0, "both-zero"),
        (0.2, -0.1, "signs"),
        (-1e-200, 1e-200, "signs"),
        (0.2, None, "no-twin"),
        (0.2, math.nan, "no-twin"),
        (0.2, math.inf, "no-twin"),
        (None, 0.0, "missing"),
        (math.nan, 1.0, "missing"),
        (-math.inf, 1.0, "missing"),
    ],
)
def test_there_is_one_definition_of_the_ratio(
    value: float | None, twin: float | None, kind: str
) -> None:
    found = ratio_of(value, twin)

    assert found.kind == kind
    assert (found.value is not None) == (kind == "ratio")


@given(st.one_of(st.none(), st.floats()), st.one_of(st.none(), st.floats()))
def test_a_ratio_is_a_finite_number_or_has_a_kind_that_says_why_not(
    value: float | None, twin: float | None
) -> None:
    found = ratio_of(value, twin)

    if found.value is None:
        assert found.kind not in ("ratio", "noise")
        assert words.RATIO_WORDS[found.kind] or found.kind == "missing"
    else:
        assert value is not None
        assert twin is not None
        assert 0 <= found.value < math.inf
        assert found.value == value / twin


def test_noise_is_a_ratio_whose_interval_contains_1_and_a_twin_of_0_is_none() -> None:
    assert ratio_of(0.9, 1.0, (0.5, 1.5)) == Ratio(kind="noise", value=0.9)
    assert ratio_of(0.9, 1.0, (0.5, 0.99)).kind == "ratio"
    assert ratio_of(1e-2, 1e-12, (0.5, 1e30)).kind == "twin-zero"


# Checks beside the twin.


def read(rule: Any, value: float | None) -> dict[str, float | None]:
    return {rule.metric: value}


@pytest.mark.parametrize("preset", [preset.name for preset in PRESETS])
@given(figures=st.lists(st.floats(0, 20), min_size=16, max_size=16))
def test_a_network_that_is_its_own_twin_gets_no_finding(preset: str, figures: list[float]) -> None:
    metrics = sorted({rule.metric for rule in preset_named(preset).checks})
    layers = []
    for place in range(4):
        own: dict[str, float | None] = {
            metric: min(value, 1.0) if INFOS[metric].unit == "share" else value * 10.0**-place
            for metric, value in zip(metrics, figures[place:], strict=False)
        }
        layers.append(report(f"layer{place}", own=own, fresh=own))

    assert judge(layers, preset=preset) == ()


@pytest.mark.parametrize(
    ("preset", "rule"), ABSOLUTE, ids=[f"{name}-{rule.name}" for name, rule in ABSOLUTE]
)
def test_an_absolute_check_names_apart_what_the_twin_shows_as_well(preset: str, rule: Any) -> None:
    # Beyond the limit by a little, and far from it on the other side.
    tripped, well = {
        "above": (rule.threshold * 1.02 + 1e-3, rule.threshold / 50),
        "below": (rule.threshold * 0.98, rule.threshold * 50),
        "first_over_last_below": (rule.threshold * 1e-6, 1.0),
    }[rule.compare]
    if rule.compare == "below" and INFOS[rule.metric].unit == "share":
        well = 0.99
    last = report("last", own=read(rule, 1e-5), fresh=read(rule, 1e-5))
    if rule.compare == "first_over_last_below":
        tripped, last = 1e-10, report("last", own=read(rule, 1e-5), fresh=read(rule, 1e-5))
        more = [last]
    else:
        more = []

    def judged(twin: float | None) -> core.judge.Judgement:
        layer = report("layer", own=read(rule, tripped), fresh=read(rule, twin))
        return judgement([layer, *more], preset=preset)

    alone, both, without = judged(well), judged(tripped), judged(None)

    assert [finding.layers for finding in alone.findings] == [("layer",)]
    assert alone.remarks == ()
    assert both.findings == ()
    (remark,) = both.remarks
    assert (remark.why, remark.check, remark.layers) == ("as-twin", rule.name, ("layer",))
    assert remark.sentence.startswith("As in the fresh twin (1 layer there): 1 layer ")
    # Nothing excuses it where the twin has no figure.
    assert [finding.layers for finding in without.findings] == [("layer",)]


@pytest.mark.parametrize(
    ("metric", "rule", "own", "twin", "speaks"),
    [
        ("dead_fraction", "dead-units", 0.6, 0.06, True),
        ("dead_fraction", "dead-units", 0.3, 0.06, False),
        ("dead_fraction", "dead-units", 1.0, 0.9, True),
        ("grad_mean_abs", "vanishing-gradient", 0.0, 5e-8, True),
        ("grad_mean_abs", "vanishing-gradient", 1e-12, 5e-8, True),
        ("grad_mean_abs", "vanishing-gradient", 2e-8, 5e-8, False),
        ("grad_mean_abs", "vanishing-gradient", 5e-8, 0.0, False),
        ("attention_entropy", "collapsed-attention", 0.01, 0.19, True),
        ("attention_entropy", "collapsed-attention", 0.15, 0.19, False),
    ],
)
def test_what_is_far_worse_than_in_the_twin_is_a_finding_although_the_twin_shows_it_too(
    metric: str, rule: str, own: float, twin: float, speaks: bool
) -> None:
    found = judgement([report(own={metric: own}, fresh={metric: twin})])

    assert [finding.check for finding in found.findings] == ([rule] if speaks else [])
    assert [remark.check for remark in found.remarks] == ([] if speaks else [rule])


def alphas(pairs: list[tuple[float, float]]) -> list[LayerReport]:
    return [
        report(f"layer{i}", own={"power_law_alpha": own}, fresh={"power_law_alpha": twin})
        for i, (own, twin) in enumerate(pairs)
    ]


def test_a_check_that_trips_as_often_the_other_way_round_cannot_tell_the_two_apart() -> None:
    mixed = alphas([(7.0, 5.0), (6.5, 5.5), (5.0, 8.0), (5.9, 6.1), (9.0, 9.0)])

    found = judgement(mixed, preset="weightwatcher")

    assert found.findings == ()
    (remark,) = found.remarks
    assert remark.layers == ("layer0", "layer1", "layer4")
    assert remark.sentence == (
        "As in the fresh twin (3 layers there): 3 layers have a spectrum with a power-law exponent "
        "above 6."
    )


def test_layers_that_clearly_outnumber_the_twins_are_a_finding() -> None:
    found = judgement(alphas([(7.0, 5.0)] * 12 + [(5.0, 8.0)] * 2), preset="weightwatcher")

    (finding,) = found.findings
    assert finding.layers == tuple(f"layer{i}" for i in range(12))


def test_one_layer_of_the_twin_does_not_hide_what_is_far_beyond_it() -> None:
    sick = [
        report(f"s{i}", own={"dead_fraction": 0.5}, fresh={"dead_fraction": 0.01}) for i in "ab"
    ]
    odd = [report("odd", own={"dead_fraction": 0.0}, fresh={"dead_fraction": 0.1})]

    (finding,) = judge([*sick, *odd])

    assert finding.layers == ("sa", "sb")


@pytest.mark.parametrize("twin", [0.0, 1e-12])
def test_a_check_on_the_ratio_says_where_the_twin_is_0(twin: float) -> None:
    layers = [
        report("open", own={"relative_grad_norm": 0.1}, fresh={"relative_grad_norm": 1.0}),
        report("closed", own={"relative_grad_norm": 0.7}, fresh={"relative_grad_norm": twin}),
        report("both", own={"relative_grad_norm": 0.0}, fresh={"relative_grad_norm": 0.0}),
    ]

    found = judgement(layers)

    assert [finding.layers for finding in found.findings] == [("open",)]
    (remark,) = found.remarks
    assert (remark.why, remark.layers) == ("twin-zero", ("closed",))
    assert remark.sentence == (
        'In 1 layer the fresh twin\'s figure for "Relative gradient norm" is 0: there is no ratio, '
        'and "weak-gradient" passes them over.'
    )


@pytest.mark.parametrize(
    ("own", "finds"), [(0.9, ["saturated"]), (0.49, [])], ids=["over the floor", "under it"]
)
def test_a_share_over_its_floor_is_more_than_any_multiple_of_none(
    own: float, finds: list[str]
) -> None:
    found = judgement([report(own={"saturated_fraction": own}, fresh={"saturated_fraction": 0.0})])

    assert [finding.check for finding in found.findings] == finds


def test_figures_that_are_no_finite_numbers_are_named() -> None:
    broken = {"grad_l2": math.nan, "dead_fraction": math.inf}
    layers = [report("well", own={"grad_l2": 1.0}), report("broken", own=broken, fresh=broken)]

    found = judgement(layers)

    assert found.findings == ()
    (remark,) = found.remarks
    assert (remark.why, remark.layers) == ("not-finite", ("broken",))
    assert remark.sentence == (
        'In 1 layer 4 figures are not finite (grad_l2 of "broken" first), and no check looks '
        "there. Check the weights and measure again."
    )


# Real networks.


@pytest.mark.parametrize(
    ("name", "seed"),
    [("timm:resnet18", 0), ("timm:test_vit", 0), ("timm:test_vit", 1)],
)
def test_no_check_of_any_preset_finds_anything_in_a_random_network(name: str, seed: int) -> None:
    spec, data = core.resolve_model(name, weights="none"), core.resolve_data("bloodmnist")

    found, _ = diagnose(
        spec, data, MeasureSettings(samples=8, batch_size=4, image_size=32, seed=seed)
    )

    assert {preset.name: judge(found.layers, preset=preset.name) for preset in PRESETS} == {
        preset.name: () for preset in PRESETS
    }
    if name == "timm:resnet18":
        # Its zero-initialised norms close 16 convolutions.
        (remark,) = [each for each in found.remarks if each.check == "vanishing-gradient"]
        assert len(remark.layers) == 16


def dead(module: Any) -> None:
    module.norm.bias.fill_(-100.0)


def closed(module: Any) -> None:
    module.block.norm2.weight.zero_()


def untouched(module: Any) -> None:
    pass


@cache
def measured(case: str, plant: Callable[[Any], None]) -> Measured:
    module = ZOO[case].module()
    with torch.no_grad():
        plant(module)
    return measure_network(module, ZOO[case].batches(), ZOO[case].outline().layers)


def reports(
    case: str, own: Callable[[Any], None], fresh: Callable[[Any], None] = untouched
) -> list[LayerReport]:
    metrics, twin = measured(case, own).metrics, measured(case, fresh).metrics
    return [
        report(layer.name, kind=layer.kind, head=layer.head).model_copy(
            update={"metrics": metrics[layer.name], "twin_metrics": twin[layer.name]}
        )
        for layer in ZOO[case].outline().layers
    ]


@pytest.mark.parametrize("case", ZOO)
def test_no_network_of_the_zoo_is_found_wanting_beside_itself(case: str) -> None:
    layers = reports(case, untouched)

    assert [judge(layers, preset=preset.name) for preset in PRESETS] == [()] * len(PRESETS)


@pytest.mark.parametrize(
    ("plant", "preset", "rule", "layer"),
    [
        (dead, "limber", "dead-units", "stem"),
        (dead, "limber", "dormant-units", "stem"),
        (dead, "sagemaker-debugger", "dead-relu", "stem"),
        (dead, "fastai", "near-zero-outputs", "stem"),
        (dead, "redo", "dormant-units", "stem"),
        (closed, "limber", "vanishing-gradient", "block.conv1"),
        (closed, "sagemaker-debugger", "vanishing-gradient", "block.conv1"),
        (closed, "autotrainer", "dying-relu", "block.conv1"),
    ],
)
def test_a_planted_fault_is_found_unless_the_twin_has_it_too(
    plant: Callable[[Any], None], preset: str, rule: str, layer: str
) -> None:
    alone = judge(reports("residual_cnn", plant), preset=preset)
    both = judge(reports("residual_cnn", plant, plant), preset=preset)

    assert layer in {finding.check: finding.layers for finding in alone}[rule]
    assert both == ()


# What a person sees.


@cache
def shown() -> Diagnosis:
    """Layers in which the twin's figures are as they can be beside the network's."""
    pairs: dict[str, tuple[float | None, float | None]] = {
        "ratio": (0.2, 0.1),
        "noise": (0.2, 0.19),
        "both-zero": (0.0, 0.0),
        "twin-zero": (0.687, 0.0),
        "rounding": (1e-2, 1e-12),
        "no-twin": (0.2, None),
        "missing": (None, 0.1),
    }
    layers = []
    for place, (name, (own, twin)) in enumerate(pairs.items()):
        metrics = ("grad_l2", "dead_fraction")
        made = report(
            name,
            index=place,
            own=dict.fromkeys(metrics, own),
            fresh=dict.fromkeys(metrics, twin),
            ratio_intervals=dict.fromkeys(metrics, (0.9, 1.2)) if name == "noise" else {},
        )
        if own is None:
            absent = MetricValue(value=None, reason="frozen")
            made = made.model_copy(update={"metrics": dict.fromkeys(metrics, absent)})
        layers.append(made)
    return Diagnosis.model_construct(layers=tuple(layers))


def heatmap(view: charts.HeatView, *, dark: bool = False) -> Any:
    infos = [INFOS["grad_l2"], INFOS["dead_fraction"]]
    return charts.layer_heatmap(shown(), infos, view=view, fade=True, dark=dark)


@pytest.mark.parametrize("dark", [False, True])
def test_a_dot_and_no_colour_marks_the_cells_without_a_ratio(dark: bool) -> None:
    figure = heatmap("ratio", dark=dark)

    colours = np.asarray(figure.data[0].z)
    (dots,) = (trace for trace in figure.data if trace.type == "scatter")
    names = [layer.name for layer in shown().layers]
    for row in range(2):
        marked = {names[x] for x, y in zip(dots.x, dots.y, strict=True) if y == row + 1}
        coloured = {name for name, z in zip(names, colours[row], strict=True) if np.isfinite(z)}
        assert marked == {"twin-zero", "rounding", "no-twin"}
        assert coloured == {"ratio", "noise", "both-zero"}
        assert colours[row][names.index("both-zero")] == 0
    assert dots.showlegend
    assert dots.name == words.NO_RATIO_MORE
    # The pointer goes through to the cell and its text.
    assert dots.hoverinfo == "skip"


@pytest.mark.parametrize("view", ["value", "twin"])
def test_other_views_have_no_dots(view: charts.HeatView) -> None:
    assert [trace.type for trace in heatmap(view).data].count("scatter") == 0
    assert words.dots(view) == ""


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ("twin-zero", "fresh twin 0, the fresh twin's value is 0: no ratio"),
        ("rounding", "fresh twin 1.00e-12, the fresh twin's value is 0 to rounding: no ratio"),
        ("no-twin", "the fresh twin has no value: no ratio (not measured)"),
        ("both-zero", "fresh twin 0, the same"),
        ("noise", "these images cannot tell it from the fresh twin"),
        ("ratio", "fresh twin 0.1, 2 times"),
        ("missing", "not applicable: frozen"),
    ],
)
def test_the_tooltip_of_a_cell_says_how_it_stands_to_the_twin(layer: str, says: str) -> None:
    texts = heatmap("ratio").data[0].hovertext
    place = [each.name for each in shown().layers].index(layer)

    assert says in texts[0][place]
    assert says in texts[1][place]
