"""One layer from inside: its units, and the distribution of its weights."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from dashboard import words
from dashboard.charts.axes import HEATMAP_MARGIN, flat_bar, metric_axis, row_label, scaled, span_of
from dashboard.charts.palette import ARM_COLOURS

if TYPE_CHECKING:
    from core.catalogue.metrics import MetricInfo

UNIT_COLUMNS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnitRow:
    label: str
    colours: np.ndarray
    texts: list[str]


def unit_heatmap(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]],
    infos: Sequence[MetricInfo],
    *,
    by: str | None = None,
) -> go.Figure:
    """Return a layer's units, two rows per metric: the values, and the fresh twin's below.

    Above `UNIT_COLUMNS` units, neighbours share a column, which shows the stiffest of them. A
    click on a column reports its first unit.

    Args:
        figures: Metric to the network's and the twin's figures (units,).
        infos: The metrics, from top to bottom.
        by: The metric that orders the units, the stiffest first; None keeps their own order.
    """
    shown = [info for info in infos if info.name in figures]
    if not shown:
        return go.Figure()
    order = _order(figures, shown, by)
    rows = [row for info in shown for row in _pair(info, *figures[info.name], order)]
    widest = max(row.colours.size for row in rows)
    colours = np.full((len(rows), widest), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        colours[index, : row.colours.size] = row.colours
    units = [str(units[0]) for units in _columns(order)]
    figure = go.Figure(
        go.Heatmap(
            z=colours,
            y=np.arange(len(rows)),
            customdata=[units + [""] * (widest - len(units))] * len(rows),
            hovertext=[row.texts + [""] * (widest - len(row.texts)) for row in rows],
            hovertemplate="%{hovertext}<extra></extra>",
            ygap=1,
            colorscale="Cividis",
            zmin=0,
            zmax=1,
            colorbar={
                **flat_bar("within the pair of rows"),
                "tickvals": [0, 1],
                "ticktext": ["low", "high"],
            },
        )
    )
    figure.update_layout(
        xaxis={
            "title": {"text": "unit" if by is None else "units, stiffest first"},
            "showticklabels": by is None and order.size <= UNIT_COLUMNS,
            "showgrid": False,
            "zeroline": False,
        },
        yaxis=metric_axis([row.label for row in rows]),
        margin=HEATMAP_MARGIN,
    )
    return figure


def _order(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]],
    infos: Sequence[MetricInfo],
    by: str | None,
) -> np.ndarray:
    """Return the units in the order in which they are drawn."""
    units = max(figures[info.name][0].size for info in infos)
    info = next((info for info in infos if info.name == by), None)
    if info is None or figures[info.name][0].size != units:
        return np.arange(units)
    values = np.nan_to_num(np.asarray(figures[info.name][0], dtype=np.float64))
    return np.argsort(values if info.bad == "low" else -values, kind="stable")


def _columns(order: np.ndarray) -> list[np.ndarray]:
    """Return the units of each column."""
    return np.array_split(order, min(len(order), UNIT_COLUMNS))


def _pair(
    info: MetricInfo, values: np.ndarray, twin: np.ndarray, order: np.ndarray
) -> Iterator[_UnitRow]:
    """Yield a metric's row and its twin's, on one scale."""
    low, high = span_of(np.concatenate([np.ravel(values), np.ravel(twin)]), info.scale)
    title = html.escape(info.title)
    # A figure of other units, such as heads, has its own order.
    columns = _columns(order if values.size == order.size else np.arange(values.size))
    rows = ((row_label(info.title), "", values), ("fresh twin", "Fresh twin: ", twin))
    for label, whose, figures in rows:
        numbers = np.asarray(figures, dtype=np.float64)
        worst = np.fmin.reduce if info.bad == "low" else np.fmax.reduce
        binned = np.array([worst(numbers[units]) for units in columns])
        texts = [
            f"{_units_text(units)}<br>{whose}{title}: {words.figure(value)}"
            for units, value in zip(columns, binned, strict=True)
        ]
        yield _UnitRow(label=label, colours=scaled(binned, low, high, info.scale), texts=texts)


def _units_text(units: np.ndarray) -> str:
    if len(units) == 1:
        return f"unit {units[0]}"
    if units[-1] - units[0] == len(units) - 1:
        return f"units {units[0]} to {units[-1]}, the stiffest of them"
    return f"{len(units)} units, unit {units[0]} first, the stiffest of them"


def weight_histogram(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]], *, dark: bool = False
) -> go.Figure:
    """Return the density of a layer's weights as bars and its twin's as a line.

    Args:
        figures: Has "histogram_counts" (bins,) and "histogram_edges" (bins + 1,), each with the
            twin's.
        dark: Whether the page's background is dark.
    """
    figure = go.Figure()
    for which, name in enumerate(("network", "fresh twin")):
        counts, edges = (figures[f"histogram_{part}"][which] for part in ("counts", "edges"))
        width = np.diff(edges)
        density = counts / max(float(counts.sum()), 1.0) / width
        centre = (edges[:-1] + edges[1:]) / 2
        hover = "%{x:.3g}: %{customdata:,} weights<extra>" + name + "</extra>"
        if which == 0:
            figure.add_bar(
                x=centre,
                y=density,
                width=width,
                name=name,
                customdata=counts,
                marker={"color": ARM_COLOURS[dark][0], "line": {"width": 0}},
                hovertemplate=hover,
            )
        else:
            figure.add_scatter(
                x=centre,
                y=density,
                name=name,
                customdata=counts,
                mode="lines",
                line={"color": ARM_COLOURS[dark][1], "width": 2, "shape": "hvh"},
                hovertemplate=hover,
            )
    figure.update_layout(
        bargap=0,
        xaxis={"title": {"text": "weight"}, "zeroline": False},
        yaxis={"title": {"text": "density"}, "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 32, "b": 8},
    )
    return figure
