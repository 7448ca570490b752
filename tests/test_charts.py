"""Figures show what the records say: means over seeds that are through, the pick, no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import core
from core.records import UNTOUCHED, ArmCurve, StepRecord
from dashboard import charts, words
from dashboard.charts.axes import picked_columns
from dashboard.charts.curves import arm_styles
from tests.pages import ROOT

BEFORE = ROOT / "tests" / "written_before"


def curve(arm: str, seed: int, accuracies: list[float | None]) -> ArmCurve:
    """A curve with a training loss of 1 / step, evaluated where an accuracy is given."""
    steps = tuple(
        StepRecord(
            arm=arm,
            seed=seed,
            step=step,
            train_loss=1.0 / step if step else None,
            val_accuracy=accuracy,
            wall_s=float(step),
        )
        for step, accuracy in enumerate(accuracies)
    )
    return ArmCurve(arm=arm, seed=seed, steps=steps)


def test_the_mean_is_over_seeds_that_are_through_and_a_late_one_is_its_own_line() -> None:
    curves = [
        curve("plan", 0, [0.0, 0.2, 0.4]),
        curve("plan", 1, [0.2, 0.4, 0.8]),
        curve("plan", 2, [0.9, 1.0]),
    ]

    figure = charts.curve_figure(curves, "val_accuracy", last_step=2)

    band, mean, late = figure.data
    assert list(mean.y) == pytest.approx([0.1, 0.3, 0.6])
    assert list(band.y) == pytest.approx([0.2, 0.4, 0.8, 0.4, 0.2, 0.0])
    assert list(late.y) == pytest.approx([0.9, 1.0])
    assert [trace.showlegend for trace in (band, late)] == [False, False]


def test_the_untouched_arm_comes_first_and_looks_the_same_whoever_else_is_there() -> None:
    curves = [curve(arm, 0, [0.1]) for arm in ("plan", UNTOUCHED, "other")]

    order = charts.arm_order(curves)

    assert order == [UNTOUCHED, "plan", "other"]
    alone, among = arm_styles([UNTOUCHED]), arm_styles(order)
    assert alone[UNTOUCHED] == among[UNTOUCHED]
    assert len(set(among.values())) == 3


def test_the_line_in_a_table_skips_steps_without_a_look_at_the_validation_images() -> None:
    curves = [curve("plan", 0, [0.1, None, 0.5]), curve("plan", 1, [0.3, None, None])]

    assert charts.spark(curves, "plan") == pytest.approx([0.2, 0.5])


def test_neighbouring_picks_are_one_outline() -> None:
    names = ["a", "b", "c", "d", "e"]

    assert picked_columns(names, ["e", "b", "a", "gone"]) == [(0, 1), (4, 4)]


def test_a_heatmap_has_room_for_its_rows_before_there_are_data() -> None:
    heights = [charts.heatmap_height(rows) for rows in range(5)]

    # One row would leave no room for its label.
    assert heights[0] == heights[1] == heights[2]
    assert np.all(np.diff(heights[2:]) > 0)


def unit_infos() -> list[Any]:
    wanted = ("unit_saturated_fraction", "unit_mean_abs")
    return [info for info in core.list_metrics() if info.name in wanted]


def test_units_stand_in_their_order_or_the_stiffest_first() -> None:
    saturated = np.array([0.2, 0.9, 0.5], dtype=np.float32)
    figures = {
        "unit_saturated_fraction": (saturated, saturated),
        "unit_mean_abs": (1 - saturated, 1 - saturated),
    }

    plain = charts.unit_heatmap(figures, unit_infos())
    ordered = charts.unit_heatmap(figures, unit_infos(), by="unit_saturated_fraction")
    by_mean = charts.unit_heatmap(figures, unit_infos(), by="unit_mean_abs")

    assert list(plain.data[0].customdata[0]) == ["0", "1", "2"]
    assert list(ordered.data[0].customdata[0]) == ["1", "2", "0"]
    # A low mean is stiff.
    assert list(by_mean.data[0].customdata[0]) == ["1", "2", "0"]
    assert "unit 1" in ordered.data[0].hovertext[0][0]
    assert "0.9" in ordered.data[0].hovertext[0][0]


def test_many_units_share_columns_that_show_the_stiffest() -> None:
    units = 2 * charts.UNIT_COLUMNS
    saturated = np.zeros(units, dtype=np.float32)
    saturated[3] = 1.0

    figure = charts.unit_heatmap({"unit_saturated_fraction": (saturated, saturated)}, unit_infos())

    texts = figure.data[0].hovertext[0]
    assert len(texts) == charts.UNIT_COLUMNS
    assert "units 2 to 3" in texts[1]
    assert texts[1].endswith(": 1")
    assert texts[2].endswith(": 0")


def test_a_folded_stage_is_a_column_that_shows_its_stiffest_layer() -> None:
    diagnosis = core.read_diagnosis(BEFORE / "diagnosis.json")
    infos = [info for info in core.list_metrics() if info.name in words.MAIN_METRICS]
    stage = charts.stages(diagnosis)[0]
    members = [layer for layer in diagnosis.layers if layer.stage == stage]

    shown = charts.folded(diagnosis, {stage}, infos)

    assert len(shown.layers) == len(diagnosis.layers) - len(members) + 1
    summary = shown.layer(f"{charts.FOLDED}{stage}")
    assert summary is not None
    assert summary.parameters == sum(member.parameters for member in members)
    for info in infos:
        values = [
            value
            for member in members
            if info.name in member.metrics
            and (value := member.metrics[info.name].value) is not None
        ]
        if values:
            worst = min(values) if info.bad == "low" else max(values)
            assert summary.metrics[info.name].value == worst
    assert charts.folded(diagnosis, (), infos) == diagnosis
