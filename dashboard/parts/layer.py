"""One layer, opened next to the strip: its saturation, units, weights, gradients, figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import streamlit as st

from core.records import Diagnosis, LayerReport
from dashboard import charts, frame, plot, store, words
from dashboard.parts import after, carrying, saturation, strip

UNITS = "unit_heatmap"
UNIT_ROW_PX = 24
HISTOGRAM_PX = 220


def panel(space: store.Workspace, stored: store.Stored, *, stale: bool) -> None:
    """Draw the layer that is open."""
    diagnosis = stored.diagnosis
    name = strip.opened_layer(diagnosis)
    layer = None if name is None else diagnosis.layer(name)
    if name is None or layer is None:
        return
    _head(space, diagnosis, layer, stale=stale)
    figures = store.units_of(stored).get(name, {})
    inside = store.inside_of(stored)
    looks = inside.get(name, {})
    drawers = {
        "Saturation": lambda: saturation.saturation(space, stored, layer, looks),
        "Units": lambda: _units(figures),
        "Weights": lambda: _weights(figures, looks),
        "Gradients": lambda: _gradients(diagnosis, layer, inside),
        "Carries": lambda: carrying.carrying(space, layer),
        "After training": lambda: after.after(layer),
        "Figures": lambda: _numbers(layer),
    }
    if "head_attention_entropy" in figures:
        drawers["Attention"] = lambda: saturation.attention(inside, looks, figures)
    for tab, draw in zip(st.tabs(list(drawers)), drawers.values(), strict=True):
        with tab:
            draw()


def _head(space: store.Workspace, diagnosis: Diagnosis, layer: LayerReport, *, stale: bool) -> None:
    names = [layer.name for layer in diagnosis.layers]
    here = names.index(layer.name)
    with st.container(horizontal=True, vertical_alignment="center", gap="xxsmall"):
        st.markdown(f"#### {words.escape(layer.name)}", width="stretch")
        picked = layer.name in space.picks.layers
        st.button(
            "Picked" if picked else "Pick",
            key="layer_pick",
            icon=":material/check:" if picked else ":material/add:",
            help="Take the layer out of your plan" if picked else "Put the layer into your plan",
            on_click=_toggle,
            args=(layer.name,),
            disabled=stale,
        )
        for icon, label, step in (("chevron_left", "Previous", -1), ("chevron_right", "Next", 1)):
            st.button(
                "",
                key=f"layer_{label.lower()}",
                icon=f":material/{icon}:",
                help=f"{label} layer",
                on_click=strip.show,
                args=(names[(here + step) % len(names)],),
            )
        st.button(
            "",
            key="layer_close",
            icon=":material/close:",
            help="Close the layer",
            on_click=strip.show,
            args=(None,),
        )
    st.caption(words.escape(_layer_line(layer)))


def _weights(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]],
    looks: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
) -> None:
    dark = frame.is_dark()
    if {"histogram_counts", "histogram_edges"} <= figures.keys():
        plot.plot(
            charts.weight_histogram(figures, dark=dark),
            key="weight_histogram",
            height=HISTOGRAM_PX,
            alt="Histogram of the layer's weights, with the fresh twin's as a line",
        )
    else:
        st.caption("There is no histogram of this layer's weights.")
    if "singular_values" in looks:
        tail = looks["tail"][0] if "tail" in looks else None
        plot.plot(
            charts.spectrum_figure(
                *looks["singular_values"],
                None if tail is None else {"alpha": float(tail[0]), "x_min": float(tail[1])},
                dark=dark,
            ),
            key="spectrum",
            height=HISTOGRAM_PX,
            alt="Singular values of the layer's weight by rank, with the fitted tail",
        )
        st.caption(
            "A steep fall means that few directions carry the weight. The dashed line is the "
            "power law behind the figure alpha; no label follows from it alone."
        )
    if "unit_weight_l2" in figures:
        plot.plot(
            charts.sorted_units_figure(*figures["unit_weight_l2"], "norm of the unit", dark=dark),
            key="kernel_norms",
            height=HISTOGRAM_PX,
            alt="Weight norms of the layer's units, largest first, with the fresh twin's",
        )


def _gradients(
    diagnosis: Diagnosis,
    layer: LayerReport,
    inside: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray | None]]],
) -> None:
    looks = inside.get(layer.name, {})
    if "gradient_zeros" not in looks:
        reason = layer.metrics["grad_l2"].reason if "grad_l2" in layer.metrics else None
        st.caption(words.escape(reason or saturation.NOT_LOOKED))
        return
    dark = frame.is_dark()
    zeros, twin_zeros = looks["gradient_zeros"]
    line = f"{words.percent(float(zeros[0]))} of the gradient's entries are exactly 0"
    if twin_zeros is not None:
        line += f"; in the fresh twin {words.percent(float(twin_zeros[0]))}"
    st.markdown(words.escape(f"{line}."))
    if "gradient_counts" in looks:
        own, twin = looks["gradient_counts"]
        edges, twin_edges = looks["gradient_edges"]
        plot.plot(
            charts.gradient_figure(
                charts.Spread(edges=edges, counts=own), dark=dark, twin=(twin_edges, twin)
            ),
            key="gradient_spread",
            height=HISTOGRAM_PX,
            alt="Distribution of the layer's gradient entries on a signed logarithmic axis",
        )
    by_batch = inside.get("batches", {}).get("figures")
    if by_batch is not None and len(by_batch[0]) > 1:
        place = [report.name for report in diagnosis.layers].index(layer.name)
        series = by_batch[0][:, :, place, 0]
        plot.plot(
            charts.batches_figure(series[:, 0], series[:, 1], "gradient norm", dark=dark),
            key="gradient_batches",
            height=HISTOGRAM_PX,
            alt="Gradient norm of each batch, with the fresh twin's",
        )
        snr = layer.metrics.get("grad_snr")
        if snr is not None and snr.value is not None:
            st.caption(
                f"Signal to noise over the batches: {words.figure(snr.value)}. Below 1 the batches "
                "disagree on the direction more than they agree."
            )


def _units(figures: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw the layer's figures per unit; a click on a unit opens it."""
    shown = [info for info in store.metric_infos() if info.level == "unit" and info.name in figures]
    if not shown:
        st.caption("This layer has no figures per unit.")
        return
    titles = {None: "In their own order"} | {
        info.name: f"By {info.title.lower()}" for info in shown
    }
    by = st.selectbox(
        "Units", tuple(titles), format_func=titles.__getitem__, key="unit_order", width=320
    )
    plot.plot(
        charts.unit_heatmap(figures, shown, by=by),
        key=UNITS,
        height=110 + 2 * UNIT_ROW_PX * len(shown),
        on_event=_open_unit,
        hatch_missing=True,
        alt=f"Heatmap of {len(shown)} metrics per unit of the layer, the fresh twin below each",
    )
    widest = max(figures[info.name][0].size for info in shown)
    if widest > charts.UNIT_COLUMNS:
        st.caption(
            f"{widest:,} units in {charts.UNIT_COLUMNS:,} columns; each shows its stiffest unit."
        )
    st.caption("Click a unit to see its saturation under Saturation.")


@store.act
def _open_unit() -> None:
    event = plot.read_event(UNITS)
    if event is not None and event.names[0].isdecimal():
        st.session_state[saturation.UNIT] = int(event.names[0])
        st.toast(f"Unit {event.names[0]:s} is open under Saturation")


def _numbers(layer: LayerReport) -> None:
    """Draw the table of the layer's figures."""
    st.dataframe(
        _number_rows(layer),
        hide_index=True,
        key="layer_numbers",
        placeholder=words.NO_VALUE,
        height="content",
        column_config={
            "Metric": st.column_config.TextColumn(pinned=True, width=250),
            "Value": st.column_config.TextColumn(width=105),
            "n": st.column_config.NumberColumn(
                help="How many values the figure was computed from: rows for activations, batches "
                "for gradients, entries for weights.",
                format="localized",
            ),
            "\N{PLUS-MINUS SIGN} 95 %": st.column_config.TextColumn(
                help="Half of the 95 % interval, from the spread between batches. A dash means "
                "that the figure does not vary with the images.",
            ),
            "Interval of the ratio": st.column_config.TextColumn(
                help="95 % interval of value over twin, from batches measured in pairs. Where it "
                "contains 1, these images cannot tell the layer from the fresh twin's.",
            ),
            "At most": st.column_config.TextColumn(
                help="The largest rank that this many rows allow. Only ranks have one.",
            ),
            "How to read it": st.column_config.TextColumn(width="large"),
        },
    )


@store.act
def _toggle(name: str) -> None:
    layers = store.current().picks.layers
    others = tuple(layer for layer in layers if layer != name)
    frame.set_layers(others if name in layers else (*layers, name))


def _layer_line(layer: LayerReport) -> str:
    parts = [layer.type, f"{layer.parameters:,} parameters"]
    if layer.units is not None:
        parts.append(words.count(layer.units, "unit"))
    if layer.activation_type:
        parts.append(f"feeds {layer.activation_type}")
    if layer.head:
        parts.append("the new head")
    return ", ".join(parts)


def _number_rows(layer: LayerReport) -> pd.DataFrame:
    rows = []
    for info in store.metric_infos():
        value, twin = layer.metrics.get(info.name), layer.twin_metrics.get(info.name)
        if info.level != "layer" or value is None:
            continue
        missing = value.value is None
        ratio = layer.ratio(info.name)
        rows.append(
            {
                "Metric": info.title,
                "Value": words.not_there(value.reason or "").partition(":")[0]
                if missing
                else words.figure(value.value),
                "\N{PLUS-MINUS SIGN} 95 %": words.figure(value.half_width),
                "Fresh twin": words.figure(twin.value if twin else None),
                "Against the twin": words.against_twin(ratio, twin.value if twin else None),
                "Interval of the ratio": ""
                if ratio.value is None
                else words.ratio_range(layer.ratio_intervals.get(info.name)),
                "n": None if missing else value.n,
                "At most": words.figure(value.cap),
                "How to read it": value.reason if missing else info.reads,
            }
        )
    return pd.DataFrame(rows)
