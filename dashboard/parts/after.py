"""The part of an open layer that asks whether its stiffness went: measured again after training."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from core.records import UNTOUCHED, Diagnosis, LayerReport
from dashboard import frame, store, words


def after(layer: LayerReport) -> None:
    """Draw the layer's main figures before and after the last fine-tune, of each arm."""
    run = store.trained_run()
    if run is None:
        st.caption(
            "Nothing is trained yet, or without keeping the weights. Start a fine-tune under Watch "
            "with the weights kept, then measure both networks again here."
        )
        return
    arms = _arms(run)
    again = {arm: store.remeasured(run, arm) for arm in arms}
    live = [found for found in again.values() if found is not None and found.live]
    if live:
        _live(live[0])
        return
    done = {arm: store.diagnosis_of(found) for arm, found in again.items() if found is not None}
    measured = {arm: stored.diagnosis for arm, stored in done.items() if stored is not None}
    if len(measured) < len(arms):
        for found in again.values():
            if found is not None and found.state != "done":
                frame.outcome(found)
        st.markdown(
            "Measures the untouched network and the edited one again, after the fine-tune, on the "
            "same images."
        )
        if st.button("Measure both again", key="after_start"):
            with frame.showing_errors():
                for arm in arms:
                    if arm not in measured:
                        store.start_remeasure(run, arm)
                st.rerun()
        return
    _table(layer, measured)


def _arms(run: store.RunView) -> list[str]:
    """Return the arms to compare: the untouched one and the plan."""
    kept = store.trained_of(run)
    plan = str(run.facts.get("plan", ""))
    others = [arm for arm in kept if arm != UNTOUCHED]
    chosen = plan if plan in others else next(iter(others), "")
    return [arm for arm in (UNTOUCHED, chosen) if arm in kept]


def _live(run: store.RunView) -> None:
    @store.guarded
    def draw() -> None:
        now = frame.run_now("after", run.id)
        if now is None or not now.live:
            st.rerun()
        frame.progress(now)
        frame.stop_button(now, key="stop_after")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def _table(layer: LayerReport, measured: dict[str, Diagnosis]) -> None:
    infos = {info.name: info for info in store.metric_infos()}
    rows = []
    for name in words.MAIN_METRICS:
        before = layer.metrics.get(name)
        if before is None or before.value is None:
            continue
        twin = layer.twin_metrics.get(name)
        row = {"Metric": infos[name].title.split(" (")[0], "As it came": words.figure(before.value)}
        for arm, diagnosis in measured.items():
            report = diagnosis.layer(layer.name)
            figure = None if report is None else report.metrics.get(name)
            row[f"After: {words.clean(arm)}"] = words.figure(figure.value if figure else None)
        rows.append(row | {"Fresh twin": words.figure(twin.value if twin else None)})
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        key="after_table",
        placeholder=words.NO_VALUE,
        height="content",
        column_config={"Metric": st.column_config.TextColumn(pinned=True, width=150)},
        alt="The layer's main figures before and after the fine-tune",
    )
    header = next(iter(measured.values())).header
    st.caption(
        words.escape(
            f"{words.count(header.samples, 'image')} of {header.image_size} px, the first seed of "
            "the last fine-tune. One seed says nothing about chance: look at Watch for that."
        )
    )
