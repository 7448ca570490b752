"""What the heatmaps share: their axes, their bar of colours, and the scale of a row."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from dashboard.charts.palette import ACCENT, QUIET

ROW_PX = 28
TOP_PX = 58
BAR_PX = 200
STAGES_PX = 64
HEATMAP_MARGIN = {"l": 8, "r": 8, "t": TOP_PX, "b": 8}
LABEL_CHARACTERS = 24
# A row with more layers than this leaves its extremes out of the scale.
TRIM_FROM = 20
# Share of the axis that a stage's label takes on a wide page.
STAGE_ROOM = 0.06


def heatmap_height(rows: int) -> int:
    """Return the height in pixels of a heatmap of that many rows, with or without data."""
    return TOP_PX + STAGES_PX + ROW_PX * max(2, rows)


def picked_columns(names: Sequence[str], picked: Sequence[str]) -> list[tuple[int, int]]:
    """Return runs of neighbouring picked columns as (first, last)."""
    chosen = set(picked)
    groups: list[tuple[int, int]] = []
    for column, name in enumerate(names):
        if name in chosen:
            if groups and groups[-1][1] == column - 1:
                groups[-1] = (groups[-1][0], column)
            else:
                groups.append((column, column))
    return groups


def row_label(title: str, bad: str | None = None) -> str:
    """Return a metric's title as a row is labelled: without its bracket, in short lines.

    Args:
        title: Of the metric.
        bad: Which end is stiff, "high" or "low": an arrow says it.
    """
    arrow = {"high": " \N{BLACK UP-POINTING TRIANGLE}", "low": " \N{BLACK DOWN-POINTING TRIANGLE}"}
    plain = title.split(" (", maxsplit=1)[0] + arrow.get(bad or "", "")
    return "<br>".join(html.escape(line) for line in textwrap.wrap(plain, LABEL_CHARACTERS))


def metric_axis(labels: Sequence[str]) -> dict[str, object]:
    """Return the axis of a heatmap's rows, the first on top."""
    return {
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "autorange": "reversed",
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "tickfont": {"size": 11},
        "fixedrange": True,
    }


def stage_axis(
    stages: Sequence[str], rows: int, groups: Sequence[tuple[int, int]], *, dark: bool
) -> dict[str, Any]:
    """Return the axis of layers and its shapes: lines between stages, frames around picks.

    Args:
        stages: Each column's stage.
        rows: How many rows the heatmap has.
        groups: First and last columns of the picked layers.
        dark: Whether the page's background is dark.
    """
    spans: list[tuple[str, int, int]] = []
    for column, stage in enumerate(stages):
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], column)
        else:
            spans.append((stage, column, column))
    shapes = [_stage_line(first, dark=dark) for _, first, _ in spans[1:]]
    shapes += [_pick_frame(first, last, rows, dark=dark) for first, last in groups]
    labelled = _readable(spans, max(1, len(stages)))
    return {
        "xaxis": {
            "tickvals": [(first + last) / 2 for _, first, last in labelled],
            "ticktext": [html.escape(stage) for stage, _, _ in labelled],
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "tickfont": {"size": 11},
            "automargin": True,
            "range": [-0.5, max(0.5, len(stages) - 0.5)],
        },
        "shapes": shapes,
    }


def _stage_line(first: int, *, dark: bool) -> dict[str, object]:
    return {
        "type": "line",
        "x0": first - 0.5,
        "x1": first - 0.5,
        "xref": "x",
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": QUIET[dark], "width": 1},
        "opacity": 0.6,
    }


def _pick_frame(first: int, last: int, rows: int, *, dark: bool) -> dict[str, object]:
    return {
        "type": "rect",
        "x0": first - 0.5,
        "x1": last + 0.5,
        "y0": -0.5,
        "y1": rows - 0.5,
        "line": {"color": ACCENT[dark], "width": 2},
        "layer": "above",
    }


def _readable(spans: Sequence[tuple[str, int, int]], columns: int) -> list[tuple[str, int, int]]:
    """Keep the stages whose labels have room, the widest first."""
    kept: list[tuple[str, int, int]] = []
    for span in sorted(spans, key=lambda span: span[1] - span[2]):
        centre = (span[1] + span[2]) / 2
        if all(abs(centre - (other[1] + other[2]) / 2) >= STAGE_ROOM * columns for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: span[1])


def flat_bar(title: str) -> dict[str, object]:
    """Return a bar of colours that lies flat above the figure."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "ypad": 8,
        "xpad": 6,
        "len": BAR_PX,
        "lenmode": "pixels",
        "thickness": 8,
        "outlinewidth": 0,
        "title": {"text": title, "side": "top", "font": {"size": 11}},
        "tickfont": {"size": 11},
    }


def span_of(values: np.ndarray, scale: str) -> tuple[float, float]:
    """Return the ends of a row's colour scale.

    Args:
        values: Every figure that shares the scale, of any shape; what is not finite is left out.
        scale: "log" or "linear".

    Returns:
        The ends, as logarithms to base 10 on a logarithmic scale; 0 and 1 where no figure is left.
    """
    finite = values[np.isfinite(values)]
    if scale == "log":
        finite = np.log10(finite[finite > 0])
    if not finite.size:
        return 0.0, 1.0
    if finite.size > TRIM_FROM:
        # Otherwise one freak layer would leave the rest of its row in one colour.
        low, high = np.percentile(finite, [1, 99])
    else:
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def scaled(values: np.ndarray, low: float, high: float, scale: str) -> np.ndarray:
    """Return each figure's place between the two ends that `span_of` gives, in [0, 1].

    On a logarithmic scale 0 lies at the lower end and what is below 0 has no place (NaN).
    """
    if scale == "log":
        values = np.where(values > 0, values, np.where(values == 0, 10.0**low, np.nan))
        values = np.log10(values)
    if high <= low:
        return np.where(np.isnan(values), np.nan, 0.5).astype(np.float32)
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
