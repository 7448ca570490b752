"""The chosen images: how many of each class, and which intensities they hold."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

from core.records import DataOutline, IntensityRange
from dashboard import words
from dashboard.charts.palette import ACCENT, ARM_COLOURS, QUIET


def class_bars(data: DataOutline, *, dark: bool = False) -> go.Figure:
    """Return the images per class, one bar per split."""
    figure = go.Figure()
    shown = [html.escape(name) for name in data.classes]
    for index, (split, counts) in enumerate(data.counts.items()):
        figure.add_bar(
            y=shown,
            x=np.array(counts),
            name=split,
            orientation="h",
            marker={"color": ARM_COLOURS[dark][0] if index == 0 else QUIET[dark]},
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


def intensity_bars(intensities: IntensityRange, *, dark: bool = False) -> go.Figure:
    """Return the pixels of deep images over their stored intensity, each bar in its shown grey.

    Two lines mark the range; what lies beyond them is cut off.

    Args:
        intensities: The range and its histogram.
        dark: Whether the page's background is dark.
    """
    middles, width, greys = _grey_bins(intensities)
    counts = np.array(intensities.histogram, dtype=np.float64)
    shares = counts / max(1.0, counts.sum())
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
    ends = ((intensities.low, "black", "left"), (intensities.high, "white", "right"))
    for value, name, side in ends:
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


def _grey_bins(intensities: IntensityRange) -> tuple[np.ndarray, float, list[int]]:
    """Return each bin's middle, the width of all, and the grey in which each is shown."""
    low, high = intensities.low, intensities.high
    first, last = min(low, intensities.lowest), max(high, intensities.highest)
    bins = len(intensities.histogram)
    # Halved: the difference of two doubles may be beyond the largest one.
    width = 2 * (last / 2 - first / 2) / max(1, bins)
    middles = first + width * (np.arange(bins) + 0.5)
    inside = np.clip((middles / 2 - low / 2) / (high / 2 - low / 2), 0, 1)
    return middles, width, [round(255 * share) for share in inside]
