"""The parts of Pick that work in the background: a rule that chooses, and a look ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import streamlit as st

import core
from core.catalogue.rules import RuleInfo, RuleOption
from core.errors import LimberError
from core.records import ModelOutline, PlanPreview
from dashboard import frame, store, words

PLAN_RUN = "plan_run"
# Once used, the box stays open: with another value Streamlit would make a new, closed one.
RULES_OPEN = "rules_open"
PREVIEW_PX = 300


def by_rule(space: store.Workspace) -> None:
    """Draw the choice of a rule, its run, and what became of it."""
    with st.expander("Choose by a published rule", expanded=RULES_OPEN in st.session_state):
        run = store.live_run("plan")
        if run is None:
            _taken()
        # It stays while the rule runs: Streamlit forgets what a field held once it is gone.
        _form(space, busy=run is not None)
        if run is not None:
            _live(run)


def _form(space: store.Workspace, *, busy: bool) -> None:
    infos = {info.name: info for info in store.rule_infos()}
    schemes = {info.name: info for info in store.scheme_infos()}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(
            "Rule",
            list(infos),
            key="rule",
            width=420,
            help=words.RULE_HELP,
            format_func=lambda rule: f"{infos[rule].title} ({rule})",
        )
        info = infos[name]
        options = {
            option.name: _field(info, option) for option in info.takes if not option.instead_of
        }
    fitting = [
        scheme.name
        for scheme in schemes.values()
        if info.granularity == "any" or info.granularity in scheme.granularities
    ]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        scheme_name = st.selectbox(
            "New values",
            fitting,
            index=fitting.index(info.scheme),
            key=f"rule_scheme_{name}",
            width=330,
            help=words.SCHEME_HELP,
            format_func=lambda scheme: schemes[scheme].title,
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, 1, key="rule_seed", width=120)
        if st.button("Make the plan", key="rule_start", type="primary", disabled=busy):
            with frame.showing_errors():
                st.session_state[PLAN_RUN] = store.start_plan(name, options, scheme_name, int(seed))
                st.session_state[RULES_OPEN] = True
                st.rerun()
    st.caption(words.escape(f"{info.description} Source: {info.source}."))
    if info.needs == "a diagnosis" and not _measured(space):
        st.caption("This rule needs a measurement. It is made first and takes about a minute.")


def _measured(space: store.Workspace) -> bool:
    stored = store.latest_diagnosis()
    return stored is not None and not store.is_stale(stored.diagnosis, space.choice)


def _field(info: RuleInfo, option: RuleOption) -> float | str:
    """Draw the field of a rule's option and return what it holds."""
    place = f"rule_{info.name}_{option.name}"
    if option.kind == "metric":
        titles = {metric.name: metric.title for metric in store.metric_infos()}
        return st.selectbox(
            option.label, list(titles), key=place, width=260, format_func=titles.__getitem__
        )
    if option.kind == "word":
        return st.selectbox(
            option.label,
            list(option.choices),
            key=place,
            width=200,
            format_func=option.choices.__getitem__,
        )
    if option.kind == "whole":
        least, most = int(option.low or 0), int(min(option.high or 1000, 1000))
        first = int(option.default or least)
        return st.number_input(option.label, least, most, first, 1, key=place, width=110)
    start = 0.5 if option.default is None else float(option.default)
    # Shares in percent go by whole steps, limits by fine ones.
    step = 1.0 if option.high == 100 else 0.025
    return st.number_input(
        option.label, option.low, option.high, start, step, key=place, width=120, format="%g"
    )


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
    """Take over the plan of a run that has just ended."""
    run = frame.run_now("plan", st.session_state.get(PLAN_RUN, ""))
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
    run = next((run for run in runs if run.facts.get("plan_json") == text), None)
    if run is not None and run.live:
        _live_preview(run)
        return
    preview = store.preview_of(run) if run is not None else None
    if run is not None and preview is None:
        frame.outcome(run)
    if preview is None:
        st.markdown(
            "Runs the network with and without the plan on a few images. You see how much the "
            "weights, the activations and the outputs change, and whether the edit does too "
            "much or nothing. It takes seconds."
        )
        if st.button("Look ahead", key="preview_start"):
            with frame.showing_errors():
                store.start_preview(plan)
                st.rerun()
        return
    _preview(preview)


def _live_preview(run: store.RunView) -> None:
    @store.guarded
    def draw() -> None:
        now = frame.run_now("preview", run.id)
        if now is None or not now.live:
            st.rerun()
        frame.progress(now)
        frame.stop_button(now, key="stop_preview")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def _preview(preview: PlanPreview) -> None:
    with st.container(horizontal=True):
        st.metric("Divergence of the outputs", words.nats(preview.output_kl), help=words.KL_HELP)
        st.metric("Same prediction", words.share(preview.agreement), help=words.AGREEMENT_HELP)
        st.metric(
            "Accuracy before and after",
            f"{words.share(preview.accuracy_before)}, {words.share(preview.accuracy_after)}",
            help=words.HEAD_HELP,
        )
        st.metric("Weights touched", words.short(preview.parameters_touched))
    for warning in preview.warnings:
        st.warning(words.escape(warning))
    rows = [layer for layer in preview.layers if layer.reset]
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
        placeholder=words.NO_VALUE,
        height=min(PREVIEW_PX, 38 + 35 * len(rows)),
        column_config={
            "Layer": st.column_config.TextColumn(pinned=True, width="medium"),
            "Relative change": st.column_config.NumberColumn(format="%.3g", help=words.CHANGE_HELP),
            "Mean |h| before": st.column_config.NumberColumn(
                format="%.3g", help="Mean size of the activations after the layer."
            ),
            "Mean |h| after": st.column_config.NumberColumn(format="%.3g"),
            "Saturated before": st.column_config.NumberColumn(
                format="percent", help="Share of pre-activations with a derivative near zero."
            ),
            "Saturated after": st.column_config.NumberColumn(format="percent"),
        },
        alt="What the plan changes in each layer",
    )
    measured_on = (
        f"On {preview.samples} images of {preview.data_title}, {preview.device}, {preview.dtype}."
    )
    st.caption(words.escape(" ".join((measured_on, *preview.notes))))


def _side(pairs: Sequence[tuple[float, float] | None], side: int) -> list[float]:
    return _column([None if pair is None else pair[side] for pair in pairs])


def _column(values: Sequence[float | None]) -> list[float]:
    # Only numbers: a None would turn the column into objects, which do not sort as numbers.
    return [math.nan if value is None else value for value in values]
