"""The parts of Pick that work in the background: a rule that chooses, and a look ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import streamlit as st

import core
from core.errors import LimberError
from core.plan import RuleInfo
from core.records import ModelOutline, PlanPreview
from dashboard import frame, store, words

PLAN_RUN = "plan_run"
# Once used the box stays open: another value would make it another box, which begins anew.
RULES_OPEN = "rules_open"
PREVIEW_PX = 300


def by_rule(space: store.Workspace) -> None:
    """Draw the choice of a rule, its run, and what became of it."""
    with st.expander("Choose by a published rule", expanded=RULES_OPEN in st.session_state):
        run = store.live_run("plan")
        if run is not None:
            _live(run)
            return
        _taken()
        _form(space)


def _form(space: store.Workspace) -> None:
    infos = {info.name: info for info in store.rule_infos()}
    schemes = {info.name: info for info in store.scheme_infos()}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(
            "Rule",
            list(infos),
            key="rule",
            width=420,
            help=words.RULE_HELP,
            format_func=lambda each: f"{infos[each].title} ({each})",
        )
        info = infos[name]
        options = {
            key: value
            for key in info.options
            if (value := _field(info, key)) is not None and value != ""
        }
    fitting = [
        each.name
        for each in schemes.values()
        if info.granularity == "any" or info.granularity in each.granularities
    ]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        scheme = st.selectbox(
            "New values",
            fitting,
            index=fitting.index(info.scheme),
            key=f"rule_scheme_{name}",
            width=330,
            help=words.SCHEME_HELP,
            format_func=lambda each: schemes[each].title,
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, 1, key="rule_seed", width=120)
        if st.button("Make the plan", key="rule_start", type="primary"):
            with frame.said():
                st.session_state[PLAN_RUN] = store.start_plan(name, options, scheme, int(seed))
                st.session_state[RULES_OPEN] = True
                st.rerun()
    st.caption(words.escape(f"{info.description} Source: {info.source}."))
    if info.needs == "a diagnosis" and not _measured(space):
        st.caption("It looks at figures of the network, which are measured first: a minute or so.")


def _measured(space: store.Workspace) -> bool:
    stored = store.latest_diagnosis()
    return stored is not None and not store.is_stale(stored.diagnosis, space.choice)


def _field(info: RuleInfo, key: str) -> object:
    label, default = words.RULE_FIELDS[key], info.options[key]
    place = f"rule_{info.name}_{key}"
    if key == "metric":
        metrics = [each.name for each in store.metric_infos()]
        titles = {each.name: each.title for each in store.metric_infos()}
        return st.selectbox(
            label, metrics, key=place, width=260, format_func=lambda each: titles[each]
        )
    if key in info.choices:
        return st.selectbox(
            label,
            info.choices[key],
            key=place,
            width=200,
            format_func=lambda each: words.RULE_WORDS[each],
        )
    if key == "blocks":
        return st.number_input(label, 1, 1000, 1, 1, key=place, width=110)
    if key == "percent":
        # SWR takes a share or a limit; the page offers the share.
        return st.number_input(
            label, 0.0, 100.0, float(default or 0), 1.0, key=place, width=120, format="%g"
        )
    if info.name == "swr":
        return None
    start = 0.5 if default is None else float(default)
    return st.number_input(label, value=start, step=0.025, key=place, width=120, format="%g")


def _live(run: store.RunView) -> None:
    @store.guarded
    def draw() -> None:
        now = store.live_run("plan")
        if now is None or now.id != run.id:
            st.rerun()
        frame.progress(now)
        frame.stop_button(now, key="stop_plan")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def _taken() -> None:
    """Make the plan of a run that has just ended the present one."""
    wanted = st.session_state.get(PLAN_RUN)
    run = next((each for each in store.all_runs("plan") if each.id == wanted), None)
    if run is None:
        return
    if run.state != "done":
        frame.outcome(run)
        return
    del st.session_state[PLAN_RUN]
    plan = store.plan_of(run)
    if plan is None:
        st.error("The plan was made but is no longer there. Make it again.")
        return
    store.take_plan(plan)
    store.notice("success", f"The rule made a plan: {words.chosen(plan)}. Undo brings back yours.")
    st.rerun()


def ahead(outline: ModelOutline) -> None:
    """Draw what the present plan does before any training."""
    st.subheader("Before you train")
    try:
        plan = store.present_plan(outline)
    except LimberError as error:
        st.info(words.escape(words.sentence(error)))
        return
    text = core.plan_json(plan)
    runs = store.all_runs("preview")
    run = next((each for each in runs if each.facts.get("plan_json") == text), None)
    if run is not None and run.live:
        _live_preview(run)
        return
    found = store.preview_of(run) if run is not None else None
    if run is not None and found is None:
        frame.outcome(run)
    if found is None:
        st.markdown(
            "Runs the network with and without the plan on a few images: how much the weights, the "
            "activations and the answers change, and whether the edit does too much or nothing. "
            "It takes seconds."
        )
        if st.button("Look ahead", key="preview_start"):
            with frame.said():
                store.start_preview(plan)
                st.rerun()
        return
    _preview(found)


def _live_preview(run: store.RunView) -> None:
    @store.guarded
    def draw() -> None:
        now = next((each for each in store.all_runs("preview") if each.id == run.id), None)
        if now is None or not now.live:
            st.rerun()
        frame.progress(now)
        frame.stop_button(now, key="stop_preview")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def _preview(found: PlanPreview) -> None:
    with st.container(horizontal=True):
        st.metric("Divergence of the answers", words.nats(found.output_kl), help=words.KL_HELP)
        st.metric("Same answer", words.share(found.agreement), help=words.AGREEMENT_HELP)
        st.metric(
            "Accuracy before and after",
            f"{words.share(found.accuracy_before)}, {words.share(found.accuracy_after)}",
            help=words.HEAD_HELP,
        )
        st.metric("Weights touched", words.short(found.parameters_touched))
    for warning in found.warnings:
        st.warning(words.escape(warning))
    rows = [layer for layer in found.layers if layer.reset]
    st.dataframe(
        pd.DataFrame(
            {
                "Layer": [words.clean(row.layer) for row in rows],
                "Touched": [row.selected for row in rows],
                "Of": [row.parameters for row in rows],
                "Relative change": _column([row.relative_change for row in rows]),
                "Mean |h| before": _side([row.mean_abs for row in rows], 0),
                "Mean |h| after": _side([row.mean_abs for row in rows], 1),
                "Saturated before": _side([row.saturated_fraction for row in rows], 0),
                "Saturated after": _side([row.saturated_fraction for row in rows], 1),
            }
        ),
        hide_index=True,
        key="preview_table",
        height=min(PREVIEW_PX, 38 + 35 * len(rows)),
        column_config={
            "Layer": st.column_config.TextColumn(pinned=True, width="medium"),
            "Relative change": st.column_config.NumberColumn(format="%.3g", help=words.CHANGE_HELP),
            "Mean |h| before": st.column_config.NumberColumn(
                format="%.3g", help="Mean size of the activations behind the layer."
            ),
            "Mean |h| after": st.column_config.NumberColumn(format="%.3g"),
            "Saturated before": st.column_config.NumberColumn(
                format="percent", help="Share of pre-activations with a derivative near zero."
            ),
            "Saturated after": st.column_config.NumberColumn(format="percent"),
        },
        alt="What the plan changes in each layer",
    )
    place = f"On {found.samples} images of {found.data_title}, {found.device}, {found.dtype}."
    st.caption(words.escape(" ".join((place, *found.notes))))


def _side(pairs: Sequence[tuple[float, float] | None], place: int) -> list[float]:
    return _column([None if pair is None else pair[place] for pair in pairs])


def _column(values: Sequence[float | None]) -> list[float]:
    # Of numbers alone, so that a missing one leaves its cell empty instead of saying None.
    return [math.nan if value is None else value for value in values]
