"""The part of Look that makes the plan by hand: patterns, the table, the new values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

import core
from core.errors import LimberError
from core.records import Diagnosis, LayerInfo, LayerReport, ModelOutline, ParameterInfo, Pattern
from dashboard import frame, store, words

TABLE = "pick_table"
REFUSED = "pattern_refused"
# How many tables there have been, and which rows the present one has ticked.
TICKED = "pick_table_ticked"
TABLE_PX = 430

Columns = dict[str, Sequence[object]]


def summary(space: store.Workspace, outline: ModelOutline) -> None:
    """Say what the plan would touch."""
    size = store.pick_size(outline)
    st.markdown(
        words.escape(words.touch_sentence(size.layers, size.tensors, size.parameters, size.total))
    )
    whole = space.picks.plan_file is None
    if whole and set(outline.head) & set(space.picks.layers) and not outline.own_head:
        st.caption("The head is already new, and the same in every arm, so a plan leaves it out.")


def drop_unknown(space: store.Workspace, outline: ModelOutline) -> None:
    """Drop picks that the network does not have."""
    known = {layer.name for layer in outline.layers}
    picks = space.picks
    if not known.issuperset((*picks.layers, *picks.freeze)):
        space.change_picks(
            layers=tuple(name for name in picks.layers if name in known),
            freeze=tuple(name for name in picks.freeze if name in known),
        )


def pattern_row(outline: ModelOutline) -> None:
    """Draw picking and freezing by a pattern of names."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Pick by",
            tuple(words.SYNTAXES),
            format_func=words.SYNTAXES.__getitem__,
            key="pattern_syntax",
            width=190,
        )
        st.text_input(
            "Pattern",
            key="pattern_text",
            placeholder=f"{outline.layers[-1].stage}*",
            width=280,
            help=words.GLOB_HELP,
        )
        for action, help_text in (
            ("Add", "Add the layers that match."),
            ("Remove", "Remove the layers that match from the pick."),
            ("Only", "Pick the layers that match and no others."),
            ("Freeze", "Freeze the layers that match: training leaves them as they are."),
            ("Unfreeze", "Let the layers that match train again."),
        ):
            st.button(
                words.escape(action),
                key=f"pattern_{action.lower()}",
                on_click=_by_pattern,
                args=(outline, action),
                help=help_text,
            )
    if REFUSED in st.session_state:
        st.error(words.escape(st.session_state.pop(REFUSED)))


@store.act
def _by_pattern(outline: ModelOutline, action: str) -> None:
    text = str(st.session_state.get("pattern_text", "")).strip()
    syntax = st.session_state.get("pattern_syntax", "glob")
    if not text:
        store.notice("info", "Type a pattern first, for example blocks.5*.")
        return
    try:
        names = core.match_layers(outline, text, syntax=syntax)
    except LimberError as error:
        # The top of the page may be out of sight.
        st.session_state[REFUSED] = words.sentence(error)
        return
    space = store.current()
    picks = space.picks
    pattern = Pattern(text=text, syntax=syntax)
    order = [layer.name for layer in outline.layers]

    def ordered(chosen: set[str]) -> tuple[str, ...]:
        return tuple(name for name in order if name in chosen)

    if action in ("Add", "Remove", "Only"):
        patterns = picks.patterns
        layers = set(picks.layers) - set(names)
        if action == "Add":
            patterns = tuple(dict.fromkeys((*picks.patterns, pattern)))
            layers = {*picks.layers, *names}
        elif action == "Only":
            patterns, layers = (pattern,), set(names)
        if not frame.set_layers(layers, patterns=patterns):
            return
    elif action == "Freeze":
        frame.change_picks(freeze=ordered({*picks.freeze, *names}))
    else:
        space.change_picks(freeze=ordered(set(picks.freeze) - set(names)))
    st.toast(f"{words.count(len(names), 'layer')} matched")


def table(space: store.Workspace, outline: ModelOutline, diagnosis: Diagnosis | None) -> None:
    """Draw the table of layers; ticked rows are picked."""
    picks = space.picks
    names = [layer.name for layer in outline.layers]
    rows = [row for row, name in enumerate(names) if name in set(picks.layers)]
    # The pick is the authority: whatever changed it, the ticks follow before the table is drawn.
    key = _table_key(rows)
    st.session_state[key] = {"selection": {"rows": rows}}
    frozen = set(picks.freeze)
    columns: Columns = {
        "Layer": [words.clean(name) for name in names],
        "Frozen": [name in frozen for name in names],
        "Type": [layer.type for layer in outline.layers],
        "Stage": [layer.stage for layer in outline.layers],
        "Shape": [words.shape(_largest(layer).shape) for layer in outline.layers],
        "Parameters": [layer.count for layer in outline.layers],
    }
    config: dict[str, Any] = {
        "Layer": st.column_config.TextColumn(pinned=True, width="medium"),
        "Frozen": st.column_config.CheckboxColumn(width="small", help=words.FREEZE_HELP),
        "Parameters": st.column_config.NumberColumn(format="localized"),
    }
    if diagnosis is not None:
        measured, how = _measured_columns([diagnosis.layer(name) for name in names])
        columns |= measured
        config |= how
    st.dataframe(
        pd.DataFrame(columns),
        hide_index=True,
        key=key,
        placeholder=words.NO_VALUE,
        on_select=functools.partial(_on_rows, key),
        height=TABLE_PX,
        selection_mode="multi-row",
        column_config=config,
        alt="Layers in forward order; ticked rows are picked",
    )


def _table_key(rows: list[int]) -> str:
    """Return the key of a table with these ticks: a new one where something else changed the pick.

    A browser that has not drawn the new ticks yet still sends the old ones with the next click. In
    the same table they would count as ticked by hand and take the change back.
    """
    turn, ticked = st.session_state.get(TICKED, (0, rows))
    if ticked != rows:
        turn += 1
    st.session_state[TICKED] = (turn, rows)
    return f"{TABLE}_{turn}"


def _largest(layer: LayerInfo) -> ParameterInfo:
    return max(layer.parameters, key=lambda parameter: parameter.count)


def _measured_columns(
    reports: Sequence[LayerReport | None],
) -> tuple[Columns, dict[str, Any]]:
    """Return the columns that a measurement adds, and how each is shown."""
    columns: Columns = {}
    config: dict[str, Any] = {}
    zero: list[list[str]] = [[] for _ in reports]
    infos = {info.name: info for info in store.metric_infos()}
    for info in (infos[name] for name in words.MAIN_METRICS if name in infos):
        title = info.title.split(" (")[0]
        if info.unit == "share":
            config[title] = st.column_config.ProgressColumn(
                min_value=0, max_value=1, format="percent", help=words.metric_help(info)
            )
            columns[title] = [_value(report, info.name) for report in reports]
            continue
        ratios = [None if report is None else report.ratio(info.name) for report in reports]
        for row, ratio in enumerate(ratios):
            if ratio is not None and ratio.kind == "twin-zero":
                zero[row].append(title)
        config[f"{title}, ratio"] = st.column_config.NumberColumn(
            format="%.3g", help="Value divided by the fresh twin's. " + words.metric_help(info)
        )
        columns[f"{title}, ratio"] = [None if ratio is None else ratio.value for ratio in ratios]
    if any(zero):
        # A column of numbers, which can be sorted, cannot hold words.
        columns["No ratio: twin is 0"] = [", ".join(titles) for titles in zero]
        config["No ratio: twin is 0"] = st.column_config.TextColumn(
            width="medium", help=words.NO_RATIO_HELP
        )
    return columns, config


def _value(report: LayerReport | None, metric: str) -> float | None:
    figure = None if report is None else report.metrics.get(metric)
    return None if figure is None else figure.value


@store.act
def _on_rows(key: str) -> None:
    space = store.current()
    outline, _ = store.outline_if_ready(space.choice)
    turn, _ = st.session_state[TICKED]
    # The ticks of a table that has been replaced are old, though the browser still sends them.
    if outline is None or key != f"{TABLE}_{turn}":
        return
    rows = st.session_state[key]["selection"]["rows"]
    layers = tuple(layer.name for row, layer in enumerate(outline.layers) if row in set(rows))
    if set(layers) != set(space.picks.layers) and frame.set_layers(layers):
        st.session_state[TICKED] = (turn, sorted(rows))


def made(outline: ModelOutline) -> None:
    """Say what a plan of units or weights does."""
    with frame.showing_errors():
        plan = store.present_plan(outline)
        frame.warn_of_other_images(plan)
        rule = "" if plan.rule is None else f" Chosen by the rule {plan.rule.name}."
        size = store.pick_size(outline)
        text = words.plan_words(plan, outline.title, size.parameters, size.total)
        st.markdown(words.escape(f"{text}{rule} {plan.evidence.note}".strip()))
    st.caption(
        "It resets units or single weights; the heatmap and the table show only their layers. "
        "Clear it to pick layers by hand; Undo brings it back."
    )


def new_values(space: store.Workspace) -> None:
    """Draw where the new values come from."""
    picks = space.picks
    infos = {info.name: info for info in store.scheme_infos()}
    if picks.scheme not in infos:
        space.change_picks(scheme=next(iter(infos)), scheme_parameters={})
        picks = space.picks
    info = infos[picks.scheme]
    # As with the table: the workspace is the authority, so that undo reaches these fields too.
    st.session_state.update(
        {"scheme": picks.scheme, "pick_seed": picks.seed, "plan_name": words.clean(picks.name)}
    )
    st.subheader("New values")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Scheme",
            list(infos),
            key="scheme",
            width=300,
            help=words.SCHEME_HELP,
            format_func=lambda name: infos[name].title,
            on_change=_on_scheme,
        )
        for name, default in info.parameters.items():
            key = f"scheme_{name}"
            st.session_state[key] = float(picks.scheme_parameters.get(name, default))
            st.number_input(
                name,
                key=key,
                width=150,
                format="%g",
                step=0.05,
                on_change=_on_parameter,
                args=(name,),
            )
        st.number_input(
            "Seed",
            0,
            2**31 - 1,
            step=1,
            key="pick_seed",
            width=120,
            on_change=_on_field,
            args=("pick_seed", "seed"),
            help="The same seed gives the same new values on any machine.",
        )
        st.text_input(
            "Name of the plan",
            key="plan_name",
            width=200,
            max_chars=60,
            on_change=_on_field,
            args=("plan_name", "name"),
            help=words.PLAN_NAME_HELP,
        )
    st.caption(words.escape(f"{info.description} Source: {info.source}"))


@store.act
def _on_scheme() -> None:
    store.current().change_picks(scheme=st.session_state["scheme"], scheme_parameters={})


@store.act
def _on_parameter(name: str) -> None:
    space = store.current()
    space.change_picks(
        scheme_parameters={
            **space.picks.scheme_parameters,
            name: float(st.session_state[f"scheme_{name}"]),
        }
    )


@store.act
def _on_field(key: str, field: str) -> None:
    value = st.session_state[key]
    if field == "name":
        value = value.strip() or "plan"
    store.current().change_picks(**{field: value})
