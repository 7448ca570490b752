"""The verdict of a trial: one row a comparison, with its interval and the margin."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go

from core.records import OUTCOMES, RANDOM_CONTROL, UNTOUCHED, ABComparison, ArmDifference
from dashboard.charts.palette import ARM_COLOURS, INK, QUIET

ROW_PX = 34
FRAME_PX = 78
# Symbol and place in the list of colours; a verdict is told by its shape and its word as well.
LOOKS = {
    "better": ("triangle-up", 0),
    "worse": ("triangle-down", 1),
    "equivalent": ("square", 2),
}
# Names longer than this push the plot off a phone.
LONGEST_NAME = 30


def forest_rows(found: ABComparison) -> list[tuple[ArmDifference, str]]:
    """Return the primary comparisons in the order they are drawn, each with its rival."""
    measure = OUTCOMES[found.outcome]
    rows = [(row, UNTOUCHED) for row in found.differences if row.measure == measure]
    rows += [(row, RANDOM_CONTROL) for row in found.from_random if row.measure == measure]
    return rows


def forest_height(found: ABComparison) -> int:
    """Return the height of the figure in CSS pixels."""
    return FRAME_PX + ROW_PX * max(1, len(forest_rows(found)))


def forest_figure(found: ABComparison, *, dark: bool = False) -> go.Figure:
    """Return the forest plot of a trial's primary outcome.

    Accuracies are in points, speed is a ratio on a logarithmic axis. The margin inside which arms
    count as equivalent is a band.

    Args:
        found: With two finished seeds or more.
        dark: Whether the page's background is dark.
    """
    ratio = found.outcome == "steps"
    scale = 1.0 if ratio else 100.0
    neutral = 1.0 if ratio else 0.0
    rows = forest_rows(found)
    figure = go.Figure()
    places = [len(rows) - 1 - i for i in range(len(rows))]
    for place, (row, rival) in zip(places, rows, strict=True):
        symbol, colour = _look(row, dark=dark)
        centre = scale * row.mean
        bounds = (row.low, row.high)
        finite = [scale * b if b is not None and math.isfinite(b) else centre for b in bounds]
        figure.add_scatter(
            x=finite,
            y=[place, place],
            mode="lines",
            line={"color": colour, "width": 3},
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=[centre],
            y=[place],
            mode="markers",
            marker={"symbol": symbol, "size": 12, "color": colour},
            hovertemplate=_hover(row, rival, scale=scale, ratio=ratio) + "<extra></extra>",
            showlegend=False,
        )
    shapes = []
    if found.margin > 0:
        low, high = (
            (1 / (1 + found.margin), 1 + found.margin)
            if ratio
            else (-scale * found.margin, scale * found.margin)
        )
        shapes.append(
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": low,
                "x1": high,
                "y0": 0,
                "y1": 1,
                "fillcolor": QUIET[dark],
                "opacity": 0.18,
                "line": {"width": 0},
                "layer": "below",
            }
        )
    shapes.append(
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": neutral,
            "x1": neutral,
            "y0": 0,
            "y1": 1,
            "line": {"color": INK[dark], "width": 1},
        }
    )
    figure.update_layout(
        shapes=shapes,
        xaxis={
            "title": {"text": _axis(found)},
            "type": "log" if ratio else "linear",
            "range": _range(rows, found, scale=scale, ratio=ratio),
            "zeroline": False,
        },
        yaxis={
            "tickvals": places,
            "ticktext": [_name(row, rival) for row, rival in rows],
            "range": [-0.6, len(rows) - 0.4],
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
        annotations=[
            {
                "x": 1.0,
                "xref": "paper",
                "xanchor": "left",
                "y": place,
                "yref": "y",
                "text": f" {row.verdict or 'no verdict'}, n = {row.seeds}",
                "showarrow": False,
                "align": "left",
            }
            for place, (row, _) in zip(places, rows, strict=True)
        ],
        margin={"l": 8, "r": 140, "t": 8, "b": 8},
    )
    return figure


def _look(row: ArmDifference, *, dark: bool) -> tuple[str, str]:
    symbol, place = LOOKS.get(row.verdict or "", ("circle", -1))
    return symbol, QUIET[dark] if place < 0 else ARM_COLOURS[dark][place]


def _name(row: ArmDifference, rival: str) -> str:
    name = row.arm if len(row.arm) <= LONGEST_NAME else row.arm[: LONGEST_NAME - 1] + "…"
    against = "" if rival == UNTOUCHED else " against random"
    return html.escape(name) + against


def _axis(found: ABComparison) -> str:
    words = {
        "final": "final accuracy: arm less untouched (points)",
        "auc": "accuracy over the run: arm less untouched (points)",
        "steps": "speed to the target: times that of the untouched",
    }
    return words[found.outcome]


def _range(
    rows: Sequence[tuple[ArmDifference, str]], found: ABComparison, *, scale: float, ratio: bool
) -> list[float]:
    """Return the axis' ends: all intervals, the margin and no difference are in sight."""
    neutral = 1.0 if ratio else 0.0
    values = [neutral, 1 + found.margin if ratio else scale * found.margin]
    values += [1 / (1 + found.margin) if ratio else -scale * found.margin]
    for row, _ in rows:
        values += [
            scale * value
            for value in (row.low, row.mean, row.high)
            if value is not None and math.isfinite(value) and (value > 0 or not ratio)
        ]
    low, high = min(values), max(values)
    if ratio:
        # Beyond a hundred times, an interval says no more than that it is wide.
        low, high = math.log10(max(low, 0.01)), math.log10(min(high, 100.0))
    space = 0.06 * (high - low) or 0.1
    return [low - space, high + space]


def _hover(row: ArmDifference, rival: str, *, scale: float, ratio: bool) -> str:
    def number(value: float | None) -> str:
        if value is None:
            return "?"
        return f"{value:.2f}" if ratio else f"{scale * value:+.1f}"

    against = "the untouched network" if rival == UNTOUCHED else "the random control"
    lines = [
        f"{html.escape(row.arm)} against {against}",
        f"{number(row.mean)} ({number(row.low)} to {number(row.high)})",
        f"{row.seeds} seeds" + ("" if row.p is None else f", joint p = {row.p:.3f}"),
    ]
    return "<br>".join(lines)
