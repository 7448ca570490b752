"""Measure: where the network went stiff for these images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import streamlit as st

from core.records import LayerReport
from dashboard import charts, frame, plot, store, words

HEATMAP = "measure_heatmap"
DETAIL = "detail_layer"
UNIT_ROW_PX = 24
HISTOGRAM_PX = 220
DTYPES = ("float32", "bfloat16", "float16")
FINDINGS_PX = 160
NUMBER_PX = 130


def page() -> None:
    """Draw the page."""
    space = store.current()
    run = store.live_run("measure")
    stored = store.latest_diagnosis()
    if run is not None:
        _live(run)
    else:
        with st.spinner("Loading the network", show_time=True):
            default_size = store.model_outline(space.choice).default_size
        _form(space, default_size, measured=stored is not None)
        last = next(iter(store.all_runs("measure")), None)
        if last is not None and (stored is None or last.id != stored.run.id):
            frame.outcome(last)
    if stored is None:
        if run is None:
            st.caption(
                "Nothing is measured yet. Measuring runs the network, and its fresh twin (the same "
                "architecture with its own random initialisation), forwards and backwards once "
                "over this many of your images. With these numbers it takes about a minute on a "
                "CPU. Nothing is trained or changed."
            )
        else:
            # Placeholders of the right size, so that nothing jumps when the results come.
            st.skeleton(FINDINGS_PX)
            st.skeleton(charts.heatmap_height(len(words.MAIN_METRICS)))
        return
    _measured(space, stored)


def _form(space: store.Workspace, default_size: int, *, measured: bool) -> None:
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            options = _options(space, default_size)
            space.set_measure(options)
            if st.button(
                "Measure again" if measured else "Measure",
                key="measure_start",
                type="secondary" if measured else "primary",
            ):
                with frame.showing_errors():
                    store.start_measure(options)
                    st.rerun()
        seconds = store.measure_seconds(options, default_size)
        # An empty line reserves the space, so that nothing moves once there is an estimate.
        st.caption(words.estimate(seconds) if seconds else "")


def _options(space: store.Workspace, default_size: int) -> store.MeasureOptions:
    """Draw the fields and return what they hold."""
    kept = space.measure_options
    samples = _number("Images", 2, 100_000, kept.samples, 32, "samples", words.SAMPLES_HELP)
    batch = st.number_input(
        "Batch size",
        2,
        4096,
        kept.batch_size,
        8,
        placeholder="auto",
        width=NUMBER_PX,
        key="measure_batch",
        help=words.BATCH_HELP,
    )
    # Networks take only sizes that their patches or strides divide.
    multiple = store.model_outline(space.choice).size_multiple
    size = _number(
        "Image size (px)",
        multiple,
        2048,
        kept.image_size or default_size,
        multiple,
        "size",
        words.SIZE_HELP,
    )
    device = frame.device_field(kept.device, key="measure_device")
    seed = _number("Seed", 0, 2**31 - 1, kept.seed, 1, "seed", words.SEED_HELP)
    with st.popover("More"):
        dtype = st.selectbox(
            "Number format",
            DTYPES,
            index=DTYPES.index(kept.dtype),
            key="measure_dtype",
            help=words.DTYPE_HELP,
        )
        transfer = st.checkbox(
            "Transfer metrics (slower)",
            kept.transfer,
            key="measure_transfer",
            help=words.TRANSFER_HELP,
        )
    return store.MeasureOptions(
        samples=samples,
        batch_size=None if batch is None else int(batch),
        device=device,
        dtype=dtype,
        seed=seed,
        transfer=transfer,
        image_size=None if size == default_size else size,
    )


def _number(
    label: str, least: int, most: int, value: int, step: int, name: str, help_text: str
) -> int:
    number = st.number_input(
        label,
        least,
        most,
        value,
        step,
        width=NUMBER_PX,
        key=f"measure_{name}",
        help=help_text,
    )
    return int(number)


def _live(run: store.RunView) -> None:
    @store.guarded
    def draw() -> None:
        now = store.live_run("measure")
        if now is None or now.id != run.id:
            st.rerun()
        with st.container(border=True):
            frame.progress(now)
            frame.stop_button(now, key="stop_measure")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def _measured(space: store.Workspace, stored: store.Stored) -> None:
    diagnosis = stored.diagnosis
    header = diagnosis.header
    stale = store.is_stale(diagnosis, space.choice)
    if stale:
        st.warning(
            words.escape(
                f"This was measured on {header.model_title} with {header.data_title}, before you "
                "changed the network or the images. Measure again to see your present choice."
            )
        )
    st.subheader("Findings")
    frame.findings(diagnosis.findings, key="findings", disabled=stale)
    if not diagnosis.findings:
        st.markdown(
            "Nothing stands out by these checks. The heatmap may still show where layers "
            "differ from the fresh twin."
        )
    if diagnosis.remarks:
        remarks = (words.remark_line(remark) for remark in diagnosis.remarks)
        st.caption("  \n".join(words.escape(remark) for remark in remarks))
    _checks(space)
    measured = f"{header.model_title} on {header.data_title}: {words.measured_line(header)}"
    lines = (measured, words.overhead_line(header), *header.notes)
    st.caption("  \n".join(words.escape(line) for line in lines if line))

    _picture(space, stored)
    _detail(space, stored)
    if not stale:
        frame.link("pick", "Next: pick layers")
    with st.expander("What the metrics mean"):
        _glossary()


def _picture(space: store.Workspace, stored: store.Stored) -> None:
    """Draw the heatmap of all layers, with its controls and its legend in words."""
    diagnosis = stored.diagnosis
    chosen = frame.heatmap_controls("measure", diagnosis)
    infos = chosen.infos
    known = {layer.name for layer in diagnosis.layers}
    with frame.layers_scroll(len(diagnosis.layers)):
        plot.plot(
            charts.layer_heatmap(
                diagnosis,
                infos,
                view=chosen.view,
                fade=chosen.fade,
                dark=frame.is_dark(),
                opened=_opened(stored),
                picked=[name for name in space.picks.layers if name in known],
            ),
            key=HEATMAP,
            height=charts.heatmap_height(len(infos)),
            on_event=_open_layer,
            hatch_missing=True,
            alt=f"Heatmap of {len(infos)} metrics by {len(diagnosis.layers)} layers",
        )
    faded = "Faded: these images cannot tell it from the fresh twin. " if chosen.fade else ""
    st.caption(
        words.escape(
            f"Hatched: not applicable to that layer, or not measured. {words.dots(chosen.view)}"
            f"{faded}Click a cell to open its layer below. Orange outlines mark the layers you "
            "picked, a dotted one the open layer."
        )
    )


def _checks(space: store.Workspace) -> None:
    presets = {preset.name: preset for preset in store.presets()}
    judging = space.judging
    preset = presets.get(judging.preset) or next(iter(presets.values()))
    changed = len(judging.thresholds)
    with st.expander(
        f"Checks: {words.escape(preset.title)}"
        + (f", {words.count(changed, 'limit')} changed" if changed else ""),
        key="checks",
    ):
        st.selectbox(
            "Preset",
            tuple(presets),
            index=tuple(presets).index(preset.name),
            format_func=lambda name: presets[name].title,
            key="judge_preset",
            on_change=_set_preset,
            width=360,
            help=words.PRESET_HELP,
        )
        st.caption(words.escape(preset.description))
        with st.container(horizontal=True, vertical_alignment="bottom"):
            for check in preset.checks:
                st.number_input(
                    words.check_title(check),
                    0.0,
                    None,
                    judging.thresholds.get(check.name, check.threshold),
                    step=check.threshold / 5 or 0.01,
                    format="%.3g",
                    width=210,
                    key=_limit_key(preset.name, check.name),
                    on_change=_set_threshold,
                    args=(preset.name, check.name, check.threshold),
                    help=words.check_help(check),
                )
        st.button(
            "Back to the preset's limits",
            key="judge_reset",
            disabled=not changed,
            on_click=_reset_thresholds,
            args=(preset.name, tuple(judging.thresholds)),
        )


def _limit_key(preset: str, check: str) -> str:
    return f"limit_{preset}_{check}"


@store.act
def _set_preset() -> None:
    store.current().set_judging(store.Judging(preset=st.session_state["judge_preset"]))


@store.act
def _set_threshold(preset: str, check: str, usual: float) -> None:
    space = store.current()
    value = st.session_state[_limit_key(preset, check)]
    kept = {name: limit for name, limit in space.judging.thresholds.items() if name != check}
    if value is not None and value != usual:
        kept[check] = float(value)
    space.set_judging(store.Judging(preset=preset, thresholds=kept))


@store.act
def _reset_thresholds(preset: str, changed: tuple[str, ...]) -> None:
    for check in changed:
        st.session_state.pop(_limit_key(preset, check), None)
    store.current().set_judging(store.Judging(preset=preset))


@store.act
def _open_layer() -> None:
    event = plot.read_event(HEATMAP)
    if event is not None:
        st.session_state[DETAIL] = event.names[0]
        st.toast(words.escape(f"{event.names[0]} is open below"))


def _opened(stored: store.Stored) -> str:
    names = [layer.name for layer in stored.diagnosis.layers]
    if st.session_state.get(DETAIL) not in names:
        st.session_state[DETAIL] = next(
            (name for finding in stored.diagnosis.findings for name in finding.layers), names[0]
        )
    return str(st.session_state[DETAIL])


def _detail(space: store.Workspace, stored: store.Stored) -> None:
    diagnosis = stored.diagnosis
    names = [layer.name for layer in diagnosis.layers]
    st.subheader("One layer")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox("Layer", names, key=DETAIL, width=360)
        picked = name in space.picks.layers
        st.button(
            "Remove from the pick" if picked else "Add to the pick",
            key="detail_pick",
            on_click=_toggle,
            args=(name,),
            disabled=store.is_stale(diagnosis, space.choice),
        )
    layer = diagnosis.layer(name)
    if layer is None:
        return
    st.text(words.clean(_layer_line(layer)))
    figures = store.units_of(stored).get(name, {})
    _units(figures)
    if {"histogram_counts", "histogram_edges"} <= figures.keys():
        plot.plot(
            charts.weight_histogram(figures, dark=frame.is_dark()),
            key="weight_histogram",
            height=HISTOGRAM_PX,
            alt="Histogram of the layer's weights, with the fresh twin's as a line",
        )
    _numbers(layer)


def _units(figures: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw the layer's figures per unit."""
    shown = [info for info in store.metric_infos() if info.level == "unit" and info.name in figures]
    if not shown:
        st.caption("This layer has no figures per unit.")
        return
    plot.plot(
        charts.unit_heatmap(figures, shown),
        key="unit_heatmap",
        height=110 + 2 * UNIT_ROW_PX * len(shown),
        hatch_missing=True,
        alt=f"Heatmap of {len(shown)} metrics per unit of the layer, the fresh twin below each",
    )
    widest = max(figures[info.name][0].size for info in shown)
    if widest > charts.UNIT_COLUMNS:
        st.caption(
            f"{widest:,} units in {charts.UNIT_COLUMNS:,} columns; each shows its stiffest unit."
        )


def _numbers(layer: LayerReport) -> None:
    """Draw the table of the layer's figures."""
    st.dataframe(
        _number_rows(layer),
        hide_index=True,
        key="detail_numbers",
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


def _glossary() -> None:
    infos = store.metric_infos()
    tabs = st.tabs(list(words.FAMILIES.values()))
    for tab, family in zip(tabs, words.FAMILIES, strict=True):
        with tab:
            for info in infos:
                if info.family == family:
                    st.markdown(f"##### {words.escape(info.title)}")
                    st.markdown(words.metric_help(info))


page()
