"""Watch: short fine-tunes of the plan against the untouched network."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.records import ModelOutline
from dashboard import charts, frame, plot, store, words
from dashboard.parts import starting, verdict
from dashboard.parts.starting import RUN_KEY

CURVE_PX = 340


def page() -> None:
    """Draw the page."""
    space = store.current()
    st.subheader("Does the reset help?")
    live = store.live_run("finetune")
    past = store.all_runs("finetune")
    outline: ModelOutline | None = None
    if not space.picks.layers and not past:
        frame.waits_for(
            "look",
            "There is no plan yet. Pick at least one layer; then you can watch its reset against "
            "the untouched network.",
        )
        return
    if space.picks.layers:
        with st.spinner("Loading the network", show_time=True):
            outline = store.model_outline(space.choice)
    if live is None and outline is not None:
        with st.container(border=True, key="start_finetune_box"):
            starting.form(space, outline)
    elif live is None:
        frame.link("look", "Pick layers to start another fine-tune")
    if not past:
        st.caption(
            "Three pictures will appear here: how each arm compares with the untouched network, "
            "training loss, and validation accuracy."
        )
        return
    _watch(past, outline)


def _watch(past: tuple[store.RunView, ...], outline: ModelOutline | None) -> None:
    titles = {run.id: _title(run) for run in past}
    if st.session_state.get(RUN_KEY) not in titles:
        st.session_state[RUN_KEY] = past[0].id
    if len(past) > 1:
        st.selectbox("Run", list(titles), key=RUN_KEY, format_func=titles.__getitem__)
    else:
        st.text(words.clean(titles[past[0].id]))
    wanted = st.session_state[RUN_KEY]
    shown = next(run for run in past if run.id == wanted)
    if outline is not None and not _is_present(shown, outline):
        st.info(
            "This run is not of your current plan, network and images. Its verdict says nothing "
            "of those.",
            icon=":material/history:",
        )

    @store.guarded
    def draw() -> None:
        now = frame.run_now("finetune", wanted)
        if now is None or (shown.live and not now.live):
            st.rerun()
        _run(now)

    st.fragment(draw, run_every=frame.LIVE_EVERY_S if shown.live else None, key=wanted)()


def _is_present(run: store.RunView, outline: ModelOutline) -> bool:
    choice = store.current().choice.model_dump(mode="json")
    return run.facts.get("choice") == choice and store.is_present_plan(run, outline)


def _title(run: store.RunView) -> str:
    facts = run.facts
    when = time.strftime("%d %b %H:%M", time.localtime(run.created))
    layers = words.count(len(facts.get("layers", [])), "layer")
    return words.clean(
        f"{when}  {facts.get('plan', 'plan')} on {facts.get('title', '')}: {layers}, "
        f"{facts.get('steps')} steps, {words.count(len(facts.get('seeds', [])), 'seed')}, "
        f"{words.RUN_STATES[run.state]}"
    )


def _run(run: store.RunView) -> None:
    if run.live:
        with st.container(border=True):
            frame.progress(run)
            frame.stop_button(run, key="stop_finetune")
    else:
        frame.outcome(run)
    curves = run.curves()
    found = verdict.compared(run, curves)
    verdict.verdict(run, found)
    steps = run.facts.get("steps")
    left, right = st.columns(2)
    drawn: tuple[tuple[DeltaGenerator, charts.Measure, str], ...] = (
        (left, "train_loss", "Training loss"),
        (right, "val_accuracy", "Validation accuracy"),
    )
    for column, measure, title in drawn:
        with column:
            plot.plot(
                charts.curve_figure(curves, measure, last_step=steps, dark=frame.is_dark()),
                key=f"curve_{measure}_{run.id}",
                height=CURVE_PX,
                alt=f"{title} over steps, one line per arm",
            )
    st.caption(words.BAND_NOTE)
    if curves:
        verdict.arms_table(curves, found)
    if not run.live:
        _results(run)


def _results(run: store.RunView) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        for name, mime in (("curves.csv", "text/csv"), ("summary.json", "application/json")):
            path = run.folder / name
            if path.is_file():
                st.download_button(
                    words.escape(f"Download {name}"),
                    functools.partial(Path.read_bytes, path),
                    file_name=name,
                    mime=mime,
                    key=f"download_{name}",
                    on_click="ignore",
                    icon=":material/download:",
                )
        frame.link("export", "Next: export the plan")


page()
