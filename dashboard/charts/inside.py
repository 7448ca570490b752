"""A layer from inside: what its units are fed, and where the activation passes nothing back."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from dashboard import words
from dashboard.charts.palette import ACCENT, ARM_COLOURS, INK, QUIET

MARGIN = {"l": 8, "r": 8, "t": 40, "b": 8}
LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "font": {"size": 11}}
# Widths by which the open bins at both ends are drawn, in widths of their neighbours.
OPEN_END = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How often each value occurs, in bins.

    Attributes:
        edges: (bins + 1,) ends of the bins; the outermost may be infinite.
        counts: (bins,) of the network.
        twin: (bins,) of the fresh twin; None where there is none.
        flat: (bins,) whether the activation is saturated there; None where that has no meaning.
    """

    edges: np.ndarray
    counts: np.ndarray
    twin: np.ndarray | None = None
    flat: np.ndarray | None = None

    def share_flat(self, twin: bool = False) -> float | None:
        """Return the share of values inside the flat bins."""
        counts = self.twin if twin else self.counts
        if self.flat is None or counts is None or not counts.sum():
            return None
        return float(counts[self.flat.astype(bool)].sum() / counts.sum())

    def drawn_edges(self) -> np.ndarray:
        """Return the edges with the open ends closed."""
        edges = self.edges.astype(np.float64).copy()
        widths = np.diff(edges[1:-1])
        usual = float(np.median(widths[widths > 0])) if (widths > 0).any() else 1.0
        if not np.isfinite(edges[0]):
            edges[0] = edges[1] - OPEN_END * usual
        if not np.isfinite(edges[-1]):
            edges[-1] = edges[-2] + OPEN_END * usual
        return edges


def saturation_figure(
    spread: Spread,
    curve: Mapping[str, np.ndarray],
    *,
    activation: str,
    dark: bool = False,
) -> go.Figure:
    """Return the distribution of pre-activations with the activation and its derivative over it.

    The parts in which the derivative is practically 0 are shaded: the area of the bars inside is
    the share of saturated inputs.

    Args:
        spread: Of the pre-activations.
        curve: "x", "h" and "slope", each (points,): the activation and its derivative.
        activation: Its name.
        dark: Whether the page's background is dark.
    """
    edges = spread.drawn_edges()
    figure = _density(spread, edges, what="inputs", dark=dark)
    for low, high in _runs(edges, spread.flat):
        figure.add_vrect(
            x0=low, x1=high, fillcolor=ACCENT[dark], opacity=0.14, line_width=0, layer="below"
        )
    for values, name, dash in (
        (curve["h"], activation, "solid"),
        (curve["slope"], "its derivative", "dot"),
    ):
        figure.add_scatter(
            x=curve["x"],
            y=values,
            yaxis="y2",
            name=name,
            mode="lines",
            line={"color": INK[dark], "width": 1.5, "dash": dash},
            hovertemplate="%{x:.3g}: %{y:.3g}<extra>" + html.escape(name) + "</extra>",
        )
    inside = np.concatenate([curve["slope"], curve["h"][np.abs(curve["h"]) < 1.5]])
    top = float(np.nanmax(inside, initial=1.0)) * 1.1
    figure.update_layout(
        xaxis={
            "title": {"text": "input of the activation"},
            "zeroline": True,
            "range": [float(edges[0]), float(edges[-1])],
        },
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "range": [min(0.0, float(np.nanmin(inside, initial=0.0))), top],
            "showgrid": False,
            "zeroline": False,
            "title": {"text": "activation, derivative"},
            "dtick": 0.5,
        },
    )
    return figure


def spread_figure(spread: Spread, title: str, *, dark: bool = False) -> go.Figure:
    """Return a distribution by itself, such as that of a gate's other factor."""
    figure = _density(spread, spread.drawn_edges(), what="values", dark=dark)
    figure.update_layout(xaxis={"title": {"text": title}})
    return figure


def _density(spread: Spread, edges: np.ndarray, *, what: str, dark: bool) -> go.Figure:
    widths = np.diff(edges)
    figure = go.Figure()
    for name, counts in (("network", spread.counts), ("fresh twin", spread.twin)):
        if counts is None:
            continue
        share = counts / max(float(counts.sum()), 1.0)
        density = np.divide(share, widths, out=np.zeros(len(share)), where=widths > 0)
        hover = "%{customdata[0]} to %{customdata[1]}: %{customdata[2]} of the " + what
        custom = [
            [_end(low), _end(high), words.percent(float(part))]
            for low, high, part in zip(spread.edges[:-1], spread.edges[1:], share, strict=True)
        ]
        if name == "network":
            figure.add_bar(
                x=(edges[:-1] + edges[1:]) / 2,
                y=density,
                width=widths,
                name=name,
                customdata=custom,
                marker={"color": ARM_COLOURS[dark][0], "line": {"width": 0}},
                hovertemplate=hover + "<extra>network</extra>",
            )
        else:
            figure.add_scatter(
                x=np.repeat(edges, 2)[1:-1],
                y=np.repeat(density, 2),
                name=name,
                mode="lines",
                line={"color": ARM_COLOURS[dark][1], "width": 2},
                hoverinfo="skip",
            )
    figure.update_layout(
        bargap=0,
        yaxis={"title": {"text": "density"}, "rangemode": "tozero", "showticklabels": False},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def _end(value: float) -> str:
    if np.isfinite(value):
        return words.figure(float(value))
    return "below" if value < 0 else "above"


def _runs(edges: np.ndarray, flat: np.ndarray | None) -> list[tuple[float, float]]:
    """Return the ends of each run of flat bins."""
    if flat is None:
        return []
    runs: list[tuple[float, float]] = []
    for place in np.flatnonzero(flat):
        low, high = float(edges[place]), float(edges[place + 1])
        if runs and runs[-1][1] == low:
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
    return runs


def class_bars_of(
    shares: np.ndarray, twin: np.ndarray | None, classes: Sequence[str], *, dark: bool = False
) -> go.Figure:
    """Return the share of saturated inputs by class, (classes,), the fresh twin's as marks."""
    names = [words.clean(name) for name in classes]
    figure = go.Figure(
        go.Bar(
            x=shares,
            y=names,
            orientation="h",
            name="network",
            marker={"color": ARM_COLOURS[dark][0]},
            hovertemplate="%{y}: %{x:.1%}<extra>network</extra>",
        )
    )
    if twin is not None:
        figure.add_scatter(
            x=twin,
            y=names,
            mode="markers",
            name="fresh twin",
            marker={"color": ARM_COLOURS[dark][1], "symbol": "line-ns-open", "size": 14},
            hovertemplate="%{y}: %{x:.1%}<extra>fresh twin</extra>",
        )
    figure.update_layout(
        xaxis={"tickformat": ".0%", "rangemode": "tozero", "title": {"text": "saturated inputs"}},
        yaxis={"autorange": "reversed", "automargin": True},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def gradient_figure(
    spread: Spread,
    *,
    twin: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    dark: bool = False,
) -> go.Figure:
    """Return the distribution of gradient entries on a signed logarithmic axis.

    The bin around 0 is left out: it has no place on such an axis.

    Args:
        spread: Of the network's gradient; edges symmetric around 0.
        twin: The fresh twin's edges and counts, which may reach other decades.
        dark: Whether the page's background is dark.
    """
    figure = go.Figure()
    least = min(
        float(np.abs(edges[edges != 0]).min())
        for edges in (spread.edges, twin[0])
        if edges is not None
    )
    for which, (name, edges, counts) in enumerate(
        (("network", spread.edges, spread.counts), ("fresh twin", *twin))
    ):
        if edges is None or counts is None:
            continue
        kept = ~((edges[:-1] < 0) & (edges[1:] > 0))
        places = np.sign(edges) * np.log10(np.abs(edges) / least)
        labels = [
            f"{_end(low)} to {_end(high)}"
            for low, high in zip(edges[:-1][kept], edges[1:][kept], strict=True)
        ]
        trace = {
            "x": ((places[:-1] + places[1:]) / 2)[kept],
            "y": counts[kept] / max(float(counts.sum()), 1.0),
            "name": name,
            "customdata": labels,
            "hovertemplate": "%{customdata}: %{y:.2%}<extra>" + name + "</extra>",
        }
        if which == 0:
            figure.add_bar(
                **trace,
                width=np.diff(places)[kept],
                marker={"color": ARM_COLOURS[dark][0], "line": {"width": 0}},
            )
        else:
            figure.add_scatter(
                **trace, mode="lines", line={"color": ARM_COLOURS[dark][1], "shape": "hvh"}
            )
    reach = int(max(abs(place) for place in figure.data[0].x)) + 1
    decades = range(2, reach + 1, 2)
    figure.update_layout(
        bargap=0,
        xaxis={
            "title": {"text": "gradient entry, signed logarithmic"},
            "tickvals": [*(-place for place in decades), 0, *decades],
            "ticktext": [
                *(f"-{least * 10.0**place:.0e}" for place in decades),
                "0",
                *(f"{least * 10.0**place:.0e}" for place in decades),
            ],
        },
        yaxis={"title": {"text": "share"}, "tickformat": ".0%", "rangemode": "tozero"},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def batches_figure(
    values: np.ndarray, twin: np.ndarray | None, title: str, *, dark: bool = False
) -> go.Figure:
    """Return a figure of the gradient by batch, (batches,), the fresh twin's next to it."""
    figure = go.Figure()
    for which, (name, series) in enumerate((("network", values), ("fresh twin", twin))):
        if series is not None:
            figure.add_scatter(
                x=np.arange(1, len(series) + 1),
                y=series,
                name=name,
                mode="lines+markers",
                line={"color": ARM_COLOURS[dark][which], "width": 2},
                hovertemplate="batch %{x}: %{y:.3g}<extra>" + name + "</extra>",
            )
    figure.update_layout(
        xaxis={"title": {"text": "batch"}, "dtick": max(1, len(values) // 8)},
        yaxis={"title": {"text": title}, "rangemode": "tozero"},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def spectrum_figure(
    values: np.ndarray,
    twin: np.ndarray | None,
    tail: Mapping[str, float] | None,
    *,
    dark: bool = False,
) -> go.Figure:
    """Return the singular values by rank on logarithmic axes, with the fitted tail.

    Args:
        values: (k,) of the network.
        twin: (k,) of the fresh twin.
        tail: "alpha" and "x_min" of a power law p(x) ~ x^-alpha for eigenvalues x above x_min.
        dark: Whether the page's background is dark.
    """
    figure = go.Figure()
    for which, (name, series) in enumerate((("network", values), ("fresh twin", twin))):
        if series is None:
            continue
        ordered = np.sort(series[series > 0])[::-1]
        figure.add_scatter(
            x=np.arange(1, len(ordered) + 1),
            y=ordered,
            name=name,
            mode="lines+markers" if len(ordered) < 40 else "lines",
            line={"color": ARM_COLOURS[dark][which], "width": 2},
            hovertemplate="number %{x}: %{y:.3g}<extra>" + name + "</extra>",
        )
    if tail is not None:
        squares = np.sort(values[values > 0] ** 2)[::-1]
        inside = squares >= tail["x_min"]
        if inside.any() and tail["alpha"] > 1:
            ranks = np.arange(1, int(inside.sum()) + 1)
            # P(X > x) = (x / x_min)^(1 - alpha), turned round.
            fitted = np.sqrt(tail["x_min"]) * (ranks / len(ranks)) ** (-0.5 / (tail["alpha"] - 1))
            figure.add_scatter(
                x=ranks,
                y=fitted,
                name=f"fitted tail, alpha {tail['alpha']:.2f}",
                mode="lines",
                line={"color": QUIET[dark], "width": 2, "dash": "dash"},
                hoverinfo="skip",
            )
    figure.update_layout(
        xaxis={"type": "log", "title": {"text": "rank"}, "dtick": 1},
        yaxis={"type": "log", "title": {"text": "singular value"}, "exponentformat": "power"},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def sorted_units_figure(
    values: np.ndarray, twin: np.ndarray | None, title: str, *, dark: bool = False
) -> go.Figure:
    """Return a figure by unit in falling order, (units,), the fresh twin's next to it."""
    figure = go.Figure()
    for which, (name, series) in enumerate((("network", values), ("fresh twin", twin))):
        if series is None:
            continue
        order = np.argsort(-series)
        figure.add_scatter(
            x=np.arange(1, len(order) + 1),
            y=series[order],
            customdata=order,
            name=name,
            mode="lines",
            line={"color": ARM_COLOURS[dark][which], "width": 2},
            hovertemplate="unit %{customdata}: %{y:.3g}<extra>" + name + "</extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "units, largest first"}},
        yaxis={"title": {"text": title}, "rangemode": "tozero"},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def carried_bars(
    states: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    title: str,
    marked: Sequence[bool] = (),
    dark: bool = False,
) -> go.Figure:
    """Return a bar for each name and state, (bars,), with marks below those that are reset."""
    figure = go.Figure()
    for which, (state, values) in enumerate(states.items()):
        figure.add_bar(
            x=np.arange(len(values)),
            y=values,
            customdata=[words.clean(name) for name in names],
            name=state,
            marker={"color": ARM_COLOURS[dark][which], "line": {"width": 0}},
            hovertemplate="%{customdata}: %{y:.3g}<extra>" + html.escape(state) + "</extra>",
        )
    places = [place for place, mark in enumerate(marked) if mark]
    if places:
        low = min(0.0, *(float(values.min()) for values in states.values()))
        figure.add_scatter(
            x=places,
            y=[low] * len(places),
            mode="markers",
            name="reset by your plan",
            marker={"symbol": "triangle-up", "size": 7, "color": ACCENT[dark]},
            hoverinfo="skip",
        )
    figure.update_layout(
        xaxis={"title": {"text": "units in order"}, "showticklabels": False},
        yaxis={"title": {"text": title}},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure


def head_bars(entropy: np.ndarray, twin: np.ndarray | None, *, dark: bool = False) -> go.Figure:
    """Return the attention entropy of each head, (heads,), the fresh twin's as marks."""
    heads = [f"head {place}" for place in range(len(entropy))]
    figure = go.Figure(
        go.Bar(
            x=heads,
            y=entropy,
            name="network",
            marker={"color": ARM_COLOURS[dark][0]},
            hovertemplate="%{x}: %{y:.3g}<extra>network</extra>",
        )
    )
    if twin is not None:
        figure.add_scatter(
            x=heads,
            y=twin,
            mode="markers",
            name="fresh twin",
            marker={"color": ARM_COLOURS[dark][1], "symbol": "line-ew-open", "size": 16},
            hovertemplate="%{x}: %{y:.3g}<extra>fresh twin</extra>",
        )
    figure.update_layout(
        yaxis={"title": {"text": "attention entropy, 0 to 1"}, "range": [0, 1.05]},
        legend=LEGEND,
        margin=MARGIN,
    )
    return figure
