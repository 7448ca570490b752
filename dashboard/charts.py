"""Records -> Plotly figures. Knows nothing of the page but whether its ground is dark."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go

from core.records import (
    ArmCurve,
    DataOutline,
    Diagnosis,
    IntensityRange,
    LayerReport,
    ModelOutline,
)
from core.trial.verdict import CONTROL
from dashboard import words

if TYPE_CHECKING:
    from core.catalogue.metrics import MetricInfo

HeatView = Literal["value", "twin", "ratio"]
Curve = Literal["train_loss", "val_accuracy"]

ACCENT = {False: "#D55E00", True: "#F0A35E"}
INK = {False: "#10181A", True: "#F4F7F7"}
QUIET = {False: "#6B7478", True: "#98A3A6"}
# Okabe and Ito without grey, which belongs to the control, in the order of the themes' lists.
ARM_COLOURS = {
    False: ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    True: ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"),
}
ARM_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# The middle is the page's ground, so that "no different from a fresh network" recedes.
DIVERGING = {
    False: [[0, "#3B1F7A"], [0.25, "#8E83C4"], [0.5, "#F4F2EE"], [0.75, "#E0913A"], [1, "#8A3D00"]],
    True: [[0, "#B9A7FF"], [0.25, "#6A5BA8"], [0.5, "#1E2528"], [0.75, "#A8631D"], [1, "#FFC071"]],
}
FADED = {False: "#D5D9DB", True: "#3A4448"}
# Ground and diameter of the mark "no ratio": a shape, which no colour of the scale has.
MARKED = {False: "#FFFFFF", True: "#0A0F11"}
MARK_PX = 5
UNRATIOED = ("twin-zero", "signs", "no-twin")
# Ratios beyond a factor of eight look alike; the number is in the hover text.
RATIO_LIMIT_LOG2 = 3.0
ROW_PX = 28
UNIT_COLUMNS = 256
CURVE_POINTS = 500
TRIM_FROM = 20
TOP_PX = 58
BAR_PX = 200
STAGES_PX = 64
LABEL_CHARACTERS = 24
# Share of the axis that a stage's label takes on a wide page.
STAGE_ROOM = 0.06


def layer_heatmap(
    diagnosis: Diagnosis,
    infos: Sequence[MetricInfo],
    *,
    view: HeatView,
    fade: bool = False,
    picked: Sequence[str] = (),
    opened: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """Return metrics by layers, forward order from left to right.

    Values and twin values of a row share one scale from its lowest to its highest figure, so
    the two views can be compared by eye. Cells without a figure are left empty. Where there is
    one, but no ratio to a twin of 0, the view of ratios has a dot on a ground of its own.

    Args:
        diagnosis: What was measured.
        infos: The rows, from top to bottom.
        view: Which of the three numbers colours a cell.
        fade: Whether to fade cells in which the network cannot be told from its twin.
        picked: Layers to outline.
        opened: Layer to mark as the one shown in detail.
        dark: Whether the page's ground is dark.
    """
    layers = diagnosis.layers
    z = np.full((len(infos), len(layers)), np.nan, dtype=np.float32)
    for row, info in enumerate(infos):
        if view == "ratio":
            z[row] = [_log2_ratio(layer, info) for layer in layers]
        else:
            z[row] = _row_scaled(layers, info, view)
    hover = [[_cell_text(layer, info) for layer in layers] for info in infos]
    names = [[layer.name for layer in layers]] * len(infos)
    if view == "ratio":
        colours = {
            "colorscale": DIVERGING[dark],
            "zmin": -RATIO_LIMIT_LOG2,
            "zmax": RATIO_LIMIT_LOG2,
        }
        ticks = {"tickvals": [-3, 0, 3], "ticktext": ["1/8", "1", "8"]}
        title = "times the fresh twin"
    else:
        colours = {"colorscale": "Cividis", "zmin": 0, "zmax": 1}
        ticks = {"tickvals": [0, 1], "ticktext": ["low", "high"]}
        title = "within the row"
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=np.arange(len(layers)),
            y=np.arange(len(infos)),
            customdata=names,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            xgap=1,
            ygap=2,
            colorbar={**_flat_bar(title), **ticks},
            **colours,
        )
    )
    if fade:
        uncertain = [[layer.ratio(info.name).kind == "noise" for layer in layers] for info in infos]
        figure.add_heatmap(
            z=np.where(np.array(uncertain, dtype=bool) & np.isfinite(z), 1.0, np.nan),
            x=np.arange(len(layers)),
            y=np.arange(len(infos)),
            xgap=1,
            ygap=2,
            colorscale=[[0, FADED[dark]], [1, FADED[dark]]],
            opacity=0.8,
            showscale=False,
            # What lies below it answers the pointer.
            hoverinfo="skip",
        )
    if view == "ratio":
        _mark_no_ratio(figure, layers, infos, dark=dark)
    figure.update_layout(
        **_stage_axis(
            [layer.stage for layer in layers],
            len(infos),
            picked_columns([layer.name for layer in layers], picked),
            dark=dark,
        ),
        yaxis=_metric_axis([_label(info.title) for info in infos]),
        margin={"l": 8, "r": 8, "t": TOP_PX, "b": 8},
    )
    for first, last in picked_columns(names[0] if names else [], [opened or ""]):
        figure.add_shape(
            type="rect",
            x0=first - 0.5,
            x1=last + 0.5,
            y0=-0.5,
            y1=len(infos) - 0.5,
            line={"color": INK[dark], "width": 2, "dash": "dot"},
        )
    return figure


def layer_strip(
    outline: ModelOutline, *, picked: Sequence[str] = (), dark: bool = False
) -> go.Figure:
    """Return one row of layers coloured by size, for picking before anything is measured."""
    layers = outline.layers
    z = np.array([[math.log10(max(1, layer.count)) for layer in layers]], dtype=np.float32)
    hover = [
        [
            f"{html.escape(layer.name)}<br>{html.escape(layer.type)}, "
            f"{words.short(layer.count)} parameters"
            for layer in layers
        ]
    ]
    low, high = int(np.floor(z.min(initial=0))), int(np.ceil(z.max(initial=1)))
    powers = list(range(low, high + 1))
    figure = go.Figure(
        go.Heatmap(
            z=z,
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
                **_flat_bar("parameters"),
                "tickvals": powers[::2],
                "ticktext": [words.short(10**power) for power in powers[::2]],
            },
        )
    )
    figure.update_layout(
        **_stage_axis(
            [layer.stage for layer in layers],
            1,
            picked_columns([layer.name for layer in layers], picked),
            dark=dark,
        ),
        yaxis=_metric_axis(["Layers"]),
        margin={"l": 8, "r": 8, "t": TOP_PX, "b": 8},
    )
    return figure


def heatmap_height(rows: int) -> int:
    """Return the pixels a heatmap of that many rows needs, known before there are data."""
    return TOP_PX + STAGES_PX + ROW_PX * max(2, rows)


def unit_heatmap(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]],
    infos: Sequence[MetricInfo],
    *,
    dark: bool = False,
) -> go.Figure:
    """Return a layer's units, two rows a metric: its value, and the fresh twin's below.

    Above `UNIT_COLUMNS` units, neighbours share a column and the one furthest to the metric's
    stiff end is shown.
    """
    del dark
    rows: list[np.ndarray] = []
    texts: list[list[str]] = []
    labels: list[str] = []
    for info in infos:
        pair = figures.get(info.name)
        if pair is None:
            continue
        low, high = _span(np.concatenate([np.ravel(each) for each in pair]), info.scale)
        for title, values in (("", pair[0]), ("twin", pair[1])):
            binned, first, last = _binned(np.asarray(values, dtype=np.float64), info.bad)
            rows.append(_scaled(binned, low, high, info.scale))
            labels.append("fresh twin" if title else _label(info.title))
            kind = "Fresh twin: " if title else ""
            texts.append(
                [
                    f"{_units_text(a, b)}<br>{kind}{html.escape(info.title)}: {words.figure(value)}"
                    for a, b, value in zip(first, last, binned, strict=True)
                ]
            )
    if not rows:
        return go.Figure()
    widest = max(row.size for row in rows)
    z = np.full((len(rows), widest), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        z[index, : row.size] = row
    figure = go.Figure(
        go.Heatmap(
            z=z,
            y=np.arange(len(rows)),
            hovertext=[text + [""] * (widest - len(text)) for text in texts],
            hovertemplate="%{hovertext}<extra></extra>",
            ygap=1,
            colorscale="Cividis",
            zmin=0,
            zmax=1,
            colorbar={
                **_flat_bar("within the pair of rows"),
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
        yaxis=_metric_axis(labels),
        margin={"l": 8, "r": 8, "t": TOP_PX, "b": 8},
    )
    return figure


def weight_histogram(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]], *, dark: bool = False
) -> go.Figure:
    """Return the density of a layer's weights as bars and its twin's as a line.

    Args:
        figures: Has "histogram_counts" (bins,) and "histogram_edges" (bins + 1,), each with the
            twin's.
        dark: Whether the page's ground is dark.
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


def class_bars(data: DataOutline, *, dark: bool = False) -> go.Figure:
    """Return images a class, one bar a split."""
    figure = go.Figure()
    shown = [html.escape(name) for name in data.classes]
    for place, (split, counts) in enumerate(data.counts.items()):
        figure.add_bar(
            y=shown,
            x=np.array(counts),
            name=split,
            orientation="h",
            marker={"color": ARM_COLOURS[dark][0] if place == 0 else QUIET[dark]},
            hovertemplate="%{y}, " + html.escape(split) + ": %{x:,} images<extra></extra>",
        )
    figure.update_layout(
        barmode="group",
        bargap=0.25,
        bargroupgap=0.0,
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
            "showticklabels": len(shown) <= 40,
        },
        xaxis={"title": {"text": "images"}, "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 32, "b": 8},
    )
    return figure


def intensity_bars(found: IntensityRange, *, dark: bool = False) -> go.Figure:
    """Return the pixels of deep images over their stored intensity, each bar in the grey it gets.

    The range is marked by two lines; beyond them lies what is cut off.

    Args:
        found: The range and the histogram that was taken with it.
        dark: Whether the page's ground is dark.
    """
    first, last = min(found.low, found.lowest), max(found.high, found.highest)
    counts = np.array(found.histogram, dtype=np.float64)
    steps = max(1, len(counts))
    # Halved: the difference of two doubles may be beyond the largest one.
    width = 2 * (last / 2 - first / 2) / steps
    middles = first + width * (np.arange(steps) + 0.5)[: len(counts)]
    shares = counts / max(1.0, counts.sum())
    inside = np.clip((middles / 2 - found.low / 2) / (found.high / 2 - found.low / 2), 0, 1)
    greys = [round(255 * share) for share in inside]
    figure = go.Figure(
        go.Bar(
            x=middles,
            y=shares,
            width=width,
            marker={
                "color": [f"rgb({grey}, {grey}, {grey})" for grey in greys],
                "line": {"color": QUIET[dark], "width": 1},
            },
            hovertext=[
                f"stored {words.figure(middle)}, shown {grey} of 255<br>{words.percent(share)}"
                for middle, grey, share in zip(middles, greys, shares, strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    for value, name, side in ((found.low, "black", "left"), (found.high, "white", "right")):
        figure.add_vline(
            x=value,
            line={"color": ACCENT[dark], "width": 2, "dash": "dot"},
            annotation={
                "text": name,
                "font": {"color": ACCENT[dark]},
                # Towards the middle, where there is room.
                "xanchor": side,
                "y": 1,
                "yanchor": "bottom",
            },
        )
    figure.update_layout(
        showlegend=False,
        bargap=0,
        xaxis={"title": {"text": "stored intensity"}, "showgrid": False},
        # Logarithmic: a black background would leave the rest no height.
        yaxis={
            "title": {"text": "share of pixels"},
            "type": "log",
            "dtick": 1,
            "tickformat": "~%",
        },
        margin={"l": 8, "r": 8, "t": 32, "b": 8},
    )
    return figure


def arm_styles(arms: Sequence[str], *, dark: bool = False) -> dict[str, tuple[str, str]]:
    """Return colour and dash of each arm; the control is grey whatever else there is."""
    styles = {CONTROL: (QUIET[dark], "solid")}
    others = [arm for arm in arms if arm != CONTROL]
    for place, arm in enumerate(others):
        colours = ARM_COLOURS[dark]
        styles[arm] = (colours[place % len(colours)], ARM_DASHES[place % len(ARM_DASHES)])
    return styles


def arm_order(curves: Sequence[ArmCurve]) -> list[str]:
    """Return the arms, the control first, the rest in the order they began."""
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    return sorted(arms, key=lambda arm: arm != CONTROL)


def curve_figure(
    curves: Sequence[ArmCurve],
    measure: Curve,
    *,
    last_step: int | None = None,
    dark: bool = False,
) -> go.Figure:
    """Return one measure over steps: means with bands over seeds that are through.

    A seed still under way is a thin line of its own, so that its missing end does not bend
    the mean.

    Args:
        curves: All arms and seeds so far.
        measure: What to draw.
        last_step: End of the step axis, known before the run gets there.
        dark: Whether the page's ground is dark.
    """
    figure = go.Figure()
    arms = arm_order(curves)
    styles = arm_styles(arms, dark=dark)
    end = last_step or max((c.steps[-1].step for c in curves if c.steps), default=1)
    for arm in arms:
        colour, dash = styles[arm]
        series = [(_series(curve, measure), curve) for curve in curves if curve.arm == arm]
        series = [(points, curve) for points, curve in series if points[0].size]
        through = [points for points, curve in series if curve.steps[-1].step >= end]
        under_way = [points for points, curve in series if curve.steps[-1].step < end]
        line = {"color": colour, "dash": dash, "width": 2.5}
        legend_shown = False
        if through:
            steps = through[0][0]
            stacked = np.stack([np.interp(steps, x, y) for x, y in through])
            if len(through) > 1:
                figure.add_scatter(
                    x=np.concatenate([steps, steps[::-1]]),
                    y=np.concatenate([stacked.max(0), stacked.min(0)[::-1]]),
                    fill="toself",
                    fillcolor=_faint(colour),
                    line={"width": 0},
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=arm,
                )
            figure.add_scatter(
                x=steps,
                y=stacked.mean(0),
                mode=_mode(measure),
                line=line,
                marker={"size": 6},
                name=html.escape(arm),
                legendgroup=arm,
                hovertemplate=_curve_hover(measure),
            )
            legend_shown = True
        for x, y in under_way:
            thin = {**line, "width": 1.2} if through else line
            figure.add_scatter(
                x=x,
                y=y,
                mode=_mode(measure),
                line=thin,
                marker={"size": 4},
                name=html.escape(arm),
                legendgroup=arm,
                showlegend=not legend_shown,
                opacity=0.75 if through else 1.0,
                hovertemplate=_curve_hover(measure),
            )
            legend_shown = True
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
            # Before the first look at the validation images there is nothing to fit the axis to.
            "range": [0, 1] if accuracy and not figure.data else None,
        },
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "itemwidth": 30},
        margin={"l": 8, "r": 12, "t": 36, "b": 8},
    )
    return figure


def spark(curves: Sequence[ArmCurve], arm: str) -> list[float]:
    """Return the arm's mean validation accuracy over its evaluations, for a line in a table."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        if curve.arm == arm:
            for step in curve.steps:
                if step.val_accuracy is not None:
                    by_step.setdefault(step.step, []).append(step.val_accuracy)
    return [float(np.mean(by_step[step])) for step in sorted(by_step)]


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


def _mark_no_ratio(
    figure: go.Figure, layers: Sequence[LayerReport], infos: Sequence[MetricInfo], *, dark: bool
) -> None:
    """Draw a dot into the cells that have a figure and no ratio, and its entry in the legend."""
    kinds = [[layer.ratio(info.name).kind for layer in layers] for info in infos]
    marked = [
        (row, column)
        for row, rows in enumerate(kinds)
        for column, kind in enumerate(rows)
        if kind in UNRATIOED
    ]
    if not marked:
        return
    ground = np.full((len(infos), len(layers)), np.nan, dtype=np.float32)
    for row, column in marked:
        ground[row, column] = 1.0
    figure.add_heatmap(
        z=ground,
        x=np.arange(len(layers)),
        y=np.arange(len(infos)),
        xgap=1,
        ygap=2,
        colorscale=[[0, MARKED[dark]], [1, MARKED[dark]]],
        showscale=False,
        # What lies below it answers the pointer.
        hoverinfo="skip",
    )
    only_zero = all(kinds[row][column] == "twin-zero" for row, column in marked)
    figure.add_scatter(
        x=np.array([column for _, column in marked]),
        y=np.array([row for row, _ in marked]),
        mode="markers",
        marker={"symbol": "circle", "size": MARK_PX, "color": INK[dark]},
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


def _log2_ratio(layer: LayerReport, info: MetricInfo) -> float:
    ratio = layer.ratio(info.name)
    if ratio.kind == "both-zero":
        return 0.0
    if ratio.value is None:
        return math.nan
    found = ratio.value
    if info.unit == "share":
        # One dead unit beside none is no eightfold difference worth a glaring cell.
        figures = (layer.metrics[info.name].value, layer.twin_metrics[info.name].value)
        value, twin = (max(each or 0.0, words.LEAST_SHARE) for each in figures)
        found = value / twin
    if found == 0:
        return -RATIO_LIMIT_LOG2
    return max(-RATIO_LIMIT_LOG2, min(RATIO_LIMIT_LOG2, math.log2(found)))


def _figures(layers: Sequence[LayerReport], metric: str, twin: bool) -> np.ndarray:
    found = ((layer.twin_metrics if twin else layer.metrics).get(metric) for layer in layers)
    return np.array(
        [math.nan if each is None or each.value is None else each.value for each in found],
        dtype=np.float64,
    )


def _row_scaled(layers: Sequence[LayerReport], info: MetricInfo, view: HeatView) -> np.ndarray:
    both = [_figures(layers, info.name, twin) for twin in (False, True)]
    low, high = _span(np.concatenate(both), info.scale)
    return _scaled(both[view == "twin"], low, high, info.scale)


def _span(values: np.ndarray, scale: str) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if scale == "log":
        finite = np.log10(finite[finite > 0])
    if not finite.size:
        return 0.0, 1.0
    if finite.size > TRIM_FROM:
        # One freak layer would otherwise leave the rest of its row in one colour.
        low, high = np.percentile(finite, [1, 99])
    else:
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _scaled(values: np.ndarray, low: float, high: float, scale: str) -> np.ndarray:
    if scale == "log":
        values = np.where(values > 0, values, np.where(values == 0, 10.0**low, np.nan))
        values = np.log10(values)
    if high <= low:
        return np.where(np.isnan(values), np.nan, 0.5).astype(np.float32)
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


def _cell_text(layer: LayerReport, info: MetricInfo) -> str:
    value, twin = layer.metrics.get(info.name), layer.twin_metrics.get(info.name)
    lines = [
        f"<b>{html.escape(layer.name)}</b>  {html.escape(layer.type)}",
        html.escape(info.title),
    ]
    if value is None or value.value is None:
        reason = value.reason if value is not None and value.reason else "not measured"
        return "<br>".join([*lines, html.escape(words.not_there(reason))])
    parts = (words.figure(value.value), words.plus_minus(value), words.at_most(value))
    lines.append(f"{' '.join(part for part in parts if part)} (n = {value.n:,})")
    ratio = layer.ratio(info.name)
    if twin is not None and twin.value is not None:
        relation = words.beside_twin(ratio, twin.value)
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
        lines.append("these images cannot tell it from a fresh one")
    return "<br>".join(lines)


def _label(title: str) -> str:
    plain = title.split(" (", maxsplit=1)[0]
    return "<br>".join(html.escape(line) for line in textwrap.wrap(plain, LABEL_CHARACTERS))


def _metric_axis(labels: Sequence[str]) -> dict[str, object]:
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


def _stage_axis(
    stages: Sequence[str], rows: int, groups: Sequence[tuple[int, int]], *, dark: bool
) -> dict[str, object]:
    spans: list[tuple[str, int, int]] = []
    for column, stage in enumerate(stages):
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], column)
        else:
            spans.append((stage, column, column))
    shapes: list[dict[str, object]] = [
        {
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
        for _, first, _ in spans[1:]
    ]
    for first, last in groups:
        # A bar above and an outline around: readable on every colour of the scale.
        shapes.append(
            {
                "type": "rect",
                "x0": first - 0.5,
                "x1": last + 0.5,
                "y0": -0.5,
                "y1": rows - 0.5,
                "line": {"color": ACCENT[dark], "width": 2},
                "layer": "above",
            }
        )
        shapes.append(
            {
                "type": "rect",
                "x0": first - 0.5,
                "x1": last + 0.5,
                "yref": "paper",
                "y0": 1,
                "y1": 1,
                "yanchor": "bottom",
                "line": {"color": ACCENT[dark], "width": 5},
            }
        )
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


def _readable(spans: Sequence[tuple[str, int, int]], columns: int) -> list[tuple[str, int, int]]:
    """Keep the stages whose labels have room, the widest first; the rest show on hovering."""
    kept: list[tuple[str, int, int]] = []
    for span in sorted(spans, key=lambda span: span[1] - span[2]):
        centre = (span[1] + span[2]) / 2
        if all(abs(centre - (other[1] + other[2]) / 2) >= STAGE_ROOM * columns for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: span[1])


def _flat_bar(title: str) -> dict[str, object]:
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


def _binned(values: np.ndarray, bad: str | None) -> tuple[np.ndarray, list[int], list[int]]:
    if values.size <= UNIT_COLUMNS:
        places = list(range(values.size))
        return values, places, places
    edges = np.linspace(0, values.size, UNIT_COLUMNS + 1).astype(int)
    choose = np.fmin.reduceat if bad == "low" else np.fmax.reduceat
    return choose(values, edges[:-1]), edges[:-1].tolist(), (edges[1:] - 1).tolist()


def _units_text(first: int, last: int) -> str:
    return f"unit {first}" if first == last else f"units {first} to {last}"


def _series(curve: ArmCurve, measure: str) -> tuple[np.ndarray, np.ndarray]:
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


def _mode(measure: str) -> str:
    return "lines+markers" if measure == "val_accuracy" else "lines"


def _curve_hover(measure: str) -> str:
    number = "%{y:.1%}" if measure == "val_accuracy" else "%{y:.3f}"
    return "step %{x:.0f}: " + number + "<extra>%{fullData.name}</extra>"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
