"""Heatmaps with one column a layer: the metrics of a diagnosis, or the sizes of an outline."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import plotly.graph_objects as go

from core.records import Diagnosis, LayerReport, ModelOutline
from dashboard import words
from dashboard.charts.axes import (
    HEATMAP_MARGIN,
    flat_bar,
    metric_axis,
    picked_columns,
    row_label,
    scaled,
    span_of,
    stage_axis,
)
from dashboard.charts.palette import ACCENT, DIVERGING, FADED, FROZEN, INK, MARKED

if TYPE_CHECKING:
    from core.catalogue.metrics import MetricInfo

HeatView = Literal["value", "twin", "ratio"]

# Ratios beyond a factor of eight look alike; the number is in the hover text.
RATIO_LIMIT_LOG2 = 3.0
# The row on top of the heatmap, in which a click picks a layer.
PLAN_ROW = "Your plan"
# Characters of a line of hover text.
HOVER_WIDTH = 56
# Diameter of the mark "no ratio". It is a shape, because every colour belongs to the scale.
MARK_PX = 4
# By how much the mark of the largest figure of its row is wider.
MARK_GROWS_PX = 5
UNRATIOED = ("twin-zero", "signs", "no-twin")


def layer_heatmap(
    diagnosis: Diagnosis,
    infos: Sequence[MetricInfo],
    *,
    view: HeatView,
    fade: bool = False,
    scale: str = "auto",
    picked: Sequence[str] = (),
    frozen: Sequence[str] = (),
    opened: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Return metrics by layers, forward order from left to right, below a row for the plan.

    Values and twin values of a row share one scale from its lowest to its highest figure, so
    the eye can compare the two views. Cells without a figure are left empty. In the view of ratios,
    a cell that has a figure but no ratio (the twin's may be 0) shows a dot on its own background.

    Args:
        diagnosis: What was measured.
        infos: The rows, from top to bottom, at y = 1, 2, ...; the plan's is at y = 0.
        view: Which of the three numbers colours a cell.
        fade: Whether to fade cells in which the network cannot be told from its twin.
        scale: "auto" spreads a row's values as its metric says; else "linear" or "log".
        picked: Layers that the plan resets.
        frozen: Layers that the plan freezes.
        opened: Layer to mark as the one shown in detail.
        dark: Whether the page's background is dark.
    """
    layers = diagnosis.layers
    names = [layer.name for layer in layers]
    if scale != "auto":
        infos = [info.model_copy(update={"scale": scale}) for info in infos]
    colours = _colours(layers, infos, view)
    figure = go.Figure(
        go.Heatmap(
            z=colours,
            x=np.arange(len(layers)),
            y=np.arange(1, len(infos) + 1),
            customdata=[names] * len(infos),
            hovertext=[[_cell_text(layer, info) for layer in layers] for info in infos],
            # The browser puts these before each cell's own text; see plot.js.
            meta={
                "columns": [_column_text(layer) for layer in layers],
                "rows": [_row_text(info) for info in infos],
            },
            hovertemplate="%{hovertext}<extra></extra>",
            xgap=1,
            ygap=2,
            **_colour_scale(view, dark=dark),
        )
    )
    if fade:
        _fade_noise(figure, layers, infos, colours, dark=dark)
    if view == "ratio":
        _mark_no_ratio(figure, layers, infos, dark=dark)
    _add_plan_row(figure, layers, dark=dark)
    axis = stage_axis(
        [layer.stage for layer in layers], len(infos) + 1, picked_columns(names, picked), dark=dark
    )
    axis["shapes"] += [
        *_plan_cells(names, picked, ACCENT[dark]),
        *_plan_cells(names, frozen, FROZEN[dark]),
    ]
    figure.update_layout(
        **axis,
        yaxis=metric_axis(
            [f"<b>{PLAN_ROW}</b>", *(row_label(info.title, info.bad) for info in infos)]
        ),
        margin=HEATMAP_MARGIN,
    )
    if opened in names:
        _mark_opened(figure, names.index(opened), len(infos) + 1, dark=dark)
    return figure


def _add_plan_row(figure: go.Figure, layers: Sequence[LayerReport], *, dark: bool) -> None:
    """Add the row in which a click picks a layer.

    Its cells do not change with the plan, so that a browser that has them need not read the
    heatmap again; what is picked or frozen lies on them as shapes.
    """
    figure.add_heatmap(
        z=np.zeros((1, len(layers)), dtype=np.float32),
        x=np.arange(len(layers)),
        y=[0],
        customdata=[[layer.name for layer in layers]],
        hovertext=[
            [
                f"<b>{html.escape(layer.name)}</b>  {html.escape(layer.type)}<br>"
                f"{layer.parameters:,} parameters<br>Click to put it into your plan or to take it "
                "out"
                for layer in layers
            ]
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        colorscale=[[0, FADED[dark]], [1, FADED[dark]]],
        xgap=1,
        ygap=6,
        showscale=False,
    )


def _plan_cells(names: Sequence[str], chosen: Sequence[str], colour: str) -> list[dict[str, Any]]:
    """Return a filled cell of the plan's row for each run of neighbouring layers."""
    return [
        {
            "type": "rect",
            "x0": first - 0.5,
            "x1": last + 0.5,
            "y0": -0.4,
            "y1": 0.4,
            "fillcolor": colour,
            "line": {"width": 0},
            "layer": "above",
        }
        for first, last in picked_columns(names, chosen)
    ]


def _colours(
    layers: Sequence[LayerReport], infos: Sequence[MetricInfo], view: HeatView
) -> np.ndarray:
    """Return each cell's place on the colour scale, (rows, layers); NaN where it has none."""
    colours = np.full((len(infos), len(layers)), np.nan, dtype=np.float32)
    for row, info in enumerate(infos):
        if view == "ratio":
            colours[row] = [_log2_ratio(layer, info) for layer in layers]
        else:
            colours[row] = _row_colours(layers, info, view)
    return colours


def _colour_scale(view: HeatView, *, dark: bool) -> dict[str, Any]:
    if view == "ratio":
        ticks = {"tickvals": [-3, 0, 3], "ticktext": ["1/8", "1", "8"]}
        return {
            "colorscale": DIVERGING[dark],
            "zmin": -RATIO_LIMIT_LOG2,
            "zmax": RATIO_LIMIT_LOG2,
            "colorbar": {**flat_bar("times the fresh twin"), **ticks},
        }
    ticks = {"tickvals": [0, 1], "ticktext": ["low", "high"]}
    return {
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": 1,
        "colorbar": {**flat_bar("within the row"), **ticks},
    }


def _fade_noise(
    figure: go.Figure,
    layers: Sequence[LayerReport],
    infos: Sequence[MetricInfo],
    colours: np.ndarray,
    *,
    dark: bool,
) -> None:
    """Fade the coloured cells in which the network cannot be told from its twin."""
    noise = [[layer.ratio(info.name).kind == "noise" for layer in layers] for info in infos]
    faded = np.array(noise, dtype=bool) & np.isfinite(colours)
    _cover(figure, faded, FADED[dark], opacity=0.8)


def _mark_opened(figure: go.Figure, column: int, rows: int, *, dark: bool) -> None:
    figure.add_shape(
        type="rect",
        x0=column - 0.5,
        x1=column + 0.5,
        y0=-0.5,
        y1=rows - 0.5,
        line={"color": INK[dark], "width": 2, "dash": "dot"},
    )


def _cover(
    figure: go.Figure, covered: np.ndarray, colour: str, *, opacity: float | None = None
) -> None:
    """Lay one colour over the cells that are marked in `covered`, (rows, layers)."""
    rows, columns = covered.shape
    figure.add_heatmap(
        z=np.where(covered, np.float32(1), np.float32(np.nan)),
        x=np.arange(columns),
        y=np.arange(1, rows + 1),
        xgap=1,
        ygap=2,
        colorscale=[[0, colour], [1, colour]],
        opacity=opacity,
        showscale=False,
        # The cell below it answers the pointer.
        hoverinfo="skip",
    )


def _mark_no_ratio(
    figure: go.Figure, layers: Sequence[LayerReport], infos: Sequence[MetricInfo], *, dark: bool
) -> None:
    """Draw a dot into the cells that have a figure but no ratio, and explain it in the legend."""
    kinds = [[layer.ratio(info.name).kind for layer in layers] for info in infos]
    unratioed = np.isin(np.array(kinds).reshape(len(infos), len(layers)), UNRATIOED)
    if not unratioed.any():
        return
    _cover(figure, unratioed, MARKED[dark])
    rows, columns = np.nonzero(unratioed)
    only_zero = all(
        kinds[row][column] == "twin-zero" for row, column in zip(rows, columns, strict=True)
    )
    figure.add_scatter(
        x=columns,
        y=rows + 1,
        mode="markers",
        marker={
            "symbol": "circle",
            "size": _mark_sizes(layers, infos)[rows, columns],
            "color": INK[dark],
        },
        name=words.NO_RATIO if only_zero else words.NO_RATIO_MORE,
        showlegend=True,
        hoverinfo="skip",
    )
    figure.update_layout(
        legend={
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 11},
            "itemclick": False,
            "itemdoubleclick": False,
        }
    )


def _mark_sizes(layers: Sequence[LayerReport], infos: Sequence[MetricInfo]) -> np.ndarray:
    """Return each mark's diameter, (rows, layers): the larger the figure in its row, the larger."""
    sizes = np.full((len(infos), len(layers)), float(MARK_PX))
    for row, info in enumerate(infos):
        figures = np.abs(_figures(layers, info.name, twin=False))
        largest = np.nanmax(figures, initial=0.0)
        if largest > 0:
            sizes[row] += MARK_GROWS_PX * np.nan_to_num(figures) / largest
    return sizes


def layer_strip(
    outline: ModelOutline, *, picked: Sequence[str] = (), dark: bool = False
) -> go.Figure:
    """Return one row of layers coloured by size, for picking before anything is measured."""
    layers = outline.layers
    sizes = np.array([[math.log10(max(1, layer.count)) for layer in layers]], dtype=np.float32)
    hover = [
        [
            f"{html.escape(layer.name)}<br>{html.escape(layer.type)}, "
            f"{words.short(layer.count)} parameters"
            for layer in layers
        ]
    ]
    low, high = int(np.floor(sizes.min(initial=0))), int(np.ceil(sizes.max(initial=1)))
    powers = list(range(low, high + 1))
    figure = go.Figure(
        go.Heatmap(
            z=sizes,
            x=np.arange(len(layers)),
            y=[0],
            customdata=[[layer.name for layer in layers]],
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            xgap=1,
            colorscale="Cividis",
            zmin=low,
            zmax=high,
            colorbar={
                **flat_bar("parameters"),
                "tickvals": powers[::2],
                "ticktext": [words.short(10**power) for power in powers[::2]],
            },
        )
    )
    figure.update_layout(
        **stage_axis(
            [layer.stage for layer in layers],
            1,
            picked_columns([layer.name for layer in layers], picked),
            dark=dark,
        ),
        yaxis=metric_axis(["Layers"]),
        margin=HEATMAP_MARGIN,
    )
    return figure


def _log2_ratio(layer: LayerReport, info: MetricInfo) -> float:
    ratio = layer.ratio(info.name)
    if ratio.kind == "both-zero":
        return 0.0
    if ratio.value is None:
        return math.nan
    factor = ratio.value
    if info.unit == "share":
        # One dead unit where the twin has none is not worth a glaring cell.
        pair = (layer.metrics[info.name].value, layer.twin_metrics[info.name].value)
        value, twin = (max(share or 0.0, words.LEAST_SHARE) for share in pair)
        factor = value / twin
    if factor == 0:
        return -RATIO_LIMIT_LOG2
    return max(-RATIO_LIMIT_LOG2, min(RATIO_LIMIT_LOG2, math.log2(factor)))


def _row_colours(layers: Sequence[LayerReport], info: MetricInfo, view: HeatView) -> np.ndarray:
    both = [_figures(layers, info.name, twin) for twin in (False, True)]
    low, high = span_of(np.concatenate(both), info.scale)
    return scaled(both[view == "twin"], low, high, info.scale)


def _figures(layers: Sequence[LayerReport], metric: str, twin: bool) -> np.ndarray:
    measured = ((layer.twin_metrics if twin else layer.metrics).get(metric) for layer in layers)
    return np.array(
        [
            math.nan if figure is None or figure.value is None else figure.value
            for figure in measured
        ],
        dtype=np.float64,
    )


def _column_text(layer: LayerReport) -> str:
    """Return the first line of what the pointer shows in any cell of a layer."""
    shape = f", {layer.units:,} units" if layer.units else ""
    return f"<b>{html.escape(layer.name)}</b>  {html.escape(layer.type)}{shape}<br>"


def _row_text(info: MetricInfo) -> str:
    """Return what the pointer shows of a metric: its title, its meaning, which way worries."""
    meaning = textwrap.wrap(words.meaning(info), HOVER_WIDTH)
    return "".join(
        f"{line}<br>"
        for line in (
            html.escape(info.title),
            *(f"<i>{html.escape(part)}</i>" for part in meaning),
        )
    )


def _cell_text(layer: LayerReport, info: MetricInfo) -> str:
    """Return what the pointer shows of one figure, below the texts of its column and row."""
    value, twin = layer.metrics.get(info.name), layer.twin_metrics.get(info.name)
    if value is None or value.value is None:
        reason = value.reason if value is not None and value.reason else "not measured"
        return html.escape(words.not_there(reason))
    parts = (words.figure(value.value), words.plus_minus(value), words.at_most(value))
    lines = [f"{' '.join(part for part in parts if part)} (n = {value.n:,})"]
    ratio = layer.ratio(info.name)
    if twin is not None and twin.value is not None:
        relation = words.against_twin(ratio, twin.value)
        lines.append(
            f"fresh twin {words.figure(twin.value)}" + (f", {relation}" if relation else "")
        )
    elif ratio.kind == "no-twin":
        reason = twin.reason if twin is not None and twin.reason else "not measured"
        lines.append(html.escape(f"{words.RATIO_WORDS['no-twin']} ({reason})"))
    interval = words.ratio_range(layer.ratio_intervals.get(info.name))
    if interval and ratio.value is not None:
        lines.append(f"95 % interval of the ratio: {interval}")
    if ratio.kind == "noise":
        lines.append("these images cannot tell it from the fresh twin")
    return "<br>".join(lines)
