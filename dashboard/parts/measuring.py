"""The part of Look that measures: how, how far it is, and which checks make the findings."""

from __future__ import annotations

import streamlit as st

from dashboard import frame, store, words

DTYPES = ("float32", "bfloat16", "float16")
NUMBER_PX = 130


def first(space: store.Workspace, default_size: int) -> None:
    """Draw the form for a network that is not measured on these images yet."""
    st.markdown(
        "This network is not measured on these images yet. They pass once through it and once "
        "through a fresh twin: a copy of its architecture with random weights. That takes seconds "
        "on a GPU and about a minute on a CPU. Nothing is trained or changed."
    )
    with st.container(border=True):
        form(space, default_size, measured=False)


def again(space: store.Workspace, default_size: int) -> None:
    """Draw the button under which the form of a measured network lies."""
    with st.popover("Measure again", icon=":material/refresh:"):
        form(space, default_size, measured=True)


def form(space: store.Workspace, default_size: int, *, measured: bool) -> None:
    """Draw the fields of a measurement and the button that starts it."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        options = _options(space, default_size)
        space.set_measure(options)
        if st.button(
            "Measure now" if measured else "Measure",
            key="measure_start",
            type="primary",
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


def live(run: store.RunView) -> None:
    """Draw how far a measurement is, until it ends."""

    @store.guarded
    def draw() -> None:
        now = store.live_run("measure")
        if now is None or now.id != run.id:
            st.rerun()
        with st.container(border=True):
            frame.progress(now)
            frame.stop_button(now, key="stop_measure")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def checks(space: store.Workspace) -> None:
    """Draw the preset of checks and its limits."""
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
