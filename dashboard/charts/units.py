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
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]], infos: Sequence[MetricInfo]
) -> go.Figure:
    """Return a layer's units, two rows per metric: the values, and the fresh twin's below.

    Above `UNIT_COLUMNS` units, neighbours share a column, which shows the stiffest of them.
    """
    rows = [
        row for info in infos if info.name in figures for row in _pair(info, *figures[info.name])
    ]
    if not rows:
        return go.Figure()
    widest = max(row.colours.size for row in rows)
    colours = np.full((len(rows), widest), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        colours[index, : row.colours.size] = row.colours
    figure = go.Figure(
        go.Heatmap(
            z=colours,
            y=np.arange(len(rows)),
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
            "title": {"text": "unit"},
            "showticklabels": widest <= UNIT_COLUMNS,
            "showgrid": False,
            "zeroline": False,
        },
        yaxis=metric_axis([row.label for row in rows]),
        margin=HEATMAP_MARGIN,
    )
    return figure


def _pair(info: MetricInfo, values: np.ndarray, twin: np.ndarray) -> Iterator[_UnitRow]:
    """Yield a metric's row and its twin's, on one scale."""
    low, high = span_of(np.concatenate([np.ravel(values), np.ravel(twin)]), info.scale)
    title = html.escape(info.title)
    rows = ((row_label(info.title), "", values), ("fresh twin", "Fresh twin: ", twin))
    for label, whose, figures in rows:
        binned, first, last = _binned(np.asarray(figures, dtype=np.float64), info.bad)
        texts = [
            f"{_units_text(from_unit, to_unit)}<br>{whose}{title}: {words.figure(value)}"
            for from_unit, to_unit, value in zip(first, last, binned, strict=True)
        ]
        yield _UnitRow(label=label, colours=scaled(binned, low, high, info.scale), texts=texts)


def _binned(values: np.ndarray, bad: str | None) -> tuple[np.ndarray, list[int], list[int]]:
    if values.size <= UNIT_COLUMNS:
        places = list(range(values.size))
        return values, places, places
    edges = np.linspace(0, values.size, UNIT_COLUMNS + 1).astype(int)
    choose = np.fmin.reduceat if bad == "low" else np.fmax.reduceat
    return choose(values, edges[:-1]), edges[:-1].tolist(), (edges[1:] - 1).tolist()


def _units_text(first: int, last: int) -> str:
    return f"unit {first}" if first == last else f"units {first} to {last}"


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
