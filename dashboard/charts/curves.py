"""Curves of a short fine-tune: one line per arm, over steps."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from core.records import UNTOUCHED, ArmCurve
from dashboard.charts.palette import ARM_COLOURS, ARM_DASHES, QUIET

Measure = Literal["train_loss", "val_accuracy"]
Points = tuple[np.ndarray, np.ndarray]

CURVE_POINTS = 500


def arm_styles(arms: Sequence[str], *, dark: bool = False) -> dict[str, tuple[str, str]]:
    """Return colour and dash of each arm; the untouched one is always grey."""
    styles = {UNTOUCHED: (QUIET[dark], "solid")}
    others = [arm for arm in arms if arm != UNTOUCHED]
    for index, arm in enumerate(others):
        colours = ARM_COLOURS[dark]
        styles[arm] = (colours[index % len(colours)], ARM_DASHES[index % len(ARM_DASHES)])
    return styles


def arm_order(curves: Sequence[ArmCurve]) -> list[str]:
    """Return the arms, the untouched one first, the rest in the order they began."""
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    return sorted(arms, key=lambda arm: arm != UNTOUCHED)


def curve_figure(
    curves: Sequence[ArmCurve],
    measure: Measure,
    *,
    last_step: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """Return one measure over steps: means with bands over the seeds that have finished.

    A seed that is still running is a thin line, so that its missing end does not bend the mean.

    Args:
        curves: All arms and seeds so far.
        measure: What to draw.
        last_step: End of the step axis, known before the run gets there.
        dark: Whether the page's background is dark.
    """
    figure = go.Figure()
    arms = arm_order(curves)
    styles = arm_styles(arms, dark=dark)
    end = last_step or max((curve.steps[-1].step for curve in curves if curve.steps), default=1)
    for arm in arms:
        _add_arm(figure, [curve for curve in curves if curve.arm == arm], measure, end, styles[arm])
    accuracy = measure == "val_accuracy"
    figure.update_layout(
        xaxis={
            "title": {"text": "step"},
            "range": [-0.015 * end, 1.015 * end],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "title": {"text": "validation accuracy" if accuracy else "training loss (nats)"},
            "tickformat": ".0%" if accuracy else None,
            "rangemode": "tozero",
            # Before the first validation there is nothing to fit the axis to.
            "range": [0, 1] if accuracy and not figure.data else None,
        },
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "itemwidth": 30},
        margin={"l": 8, "r": 12, "t": 36, "b": 8},
    )
    return figure


def _add_arm(
    figure: go.Figure,
    curves: Sequence[ArmCurve],
    measure: Measure,
    end: int,
    style: tuple[str, str],
) -> None:
    """Draw one arm: the mean of its finished seeds with a band, the others as lines."""
    colour, dash = style
    series = [(_series(curve, measure), curve) for curve in curves]
    series = [(points, curve) for points, curve in series if points[0].size]
    finished = [points for points, curve in series if curve.steps[-1].step >= end]
    under_way = [points for points, curve in series if curve.steps[-1].step < end]
    line = {"color": colour, "dash": dash, "width": 2.5}
    common = {
        "mode": "lines+markers" if measure == "val_accuracy" else "lines",
        "hovertemplate": _curve_hover(measure),
    }
    if finished:
        steps = finished[0][0]
        values = np.stack([np.interp(steps, x, y) for x, y in finished])
        if len(finished) > 1:
            _add_band(figure, steps, values, curves[0].arm, colour)
        figure.add_scatter(
            x=steps,
            y=values.mean(0),
            line=line,
            marker={"size": 6},
            name=html.escape(curves[0].arm),
            legendgroup=curves[0].arm,
            **common,
        )
    for index, (x, y) in enumerate(under_way):
        figure.add_scatter(
            x=x,
            y=y,
            line={**line, "width": 1.2} if finished else line,
            marker={"size": 4},
            name=html.escape(curves[0].arm),
            legendgroup=curves[0].arm,
            showlegend=not finished and index == 0,
            opacity=0.75 if finished else 1.0,
            **common,
        )


def _add_band(
    figure: go.Figure, steps: np.ndarray, values: np.ndarray, arm: str, colour: str
) -> None:
    """Fill from the lowest to the highest seed; `values` is (seeds, steps)."""
    figure.add_scatter(
        x=np.concatenate([steps, steps[::-1]]),
        y=np.concatenate([values.max(0), values.min(0)[::-1]]),
        fill="toself",
        fillcolor=_faint(colour),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=arm,
    )


def _series(curve: ArmCurve, measure: Measure) -> Points:
    points = [
        (step.step, value)
        for step in curve.steps
        if (value := getattr(step, measure)) is not None and math.isfinite(value)
    ]
    x = np.array([point[0] for point in points], dtype=np.float64)
    y = np.array([point[1] for point in points], dtype=np.float64)
    if measure == "train_loss" and y.size > 4:
        width = min(9, max(3, y.size // 12))
        padded = np.concatenate([np.full(width - 1, y[0]), y])
        y = np.convolve(padded, np.ones(width) / width, mode="valid")
    if x.size > CURVE_POINTS:
        kept = np.unique(np.linspace(0, x.size - 1, CURVE_POINTS).astype(int))
        x, y = x[kept], y[kept]
    return x, y


def _curve_hover(measure: Measure) -> str:
    number = "%{y:.1%}" if measure == "val_accuracy" else "%{y:.3f}"
    return "step %{x:.0f}: " + number + "<extra>%{fullData.name}</extra>"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def spark(curves: Sequence[ArmCurve], arm: str) -> list[float]:
    """Return the arm's mean validation accuracy over its evaluations, for a line in a table."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        if curve.arm == arm:
            for step in curve.steps:
                if step.val_accuracy is not None:
                    by_step.setdefault(step.step, []).append(step.val_accuracy)
    return [float(np.mean(by_step[step])) for step in sorted(by_step)]
