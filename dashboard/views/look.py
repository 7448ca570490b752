"""Look: where the network is stiff for these images, and which layers to reset."""

from __future__ import annotations

import streamlit as st

from core.records import Diagnosis
from dashboard import charts, frame, store, words
from dashboard.parts import layer, measuring, picking, planner, recent, strip

FINDINGS_PX = 120
# How many findings stand above the heatmap; the others are one click away.
SHOWN_FINDINGS = 3


def page() -> None:
    """Draw the page."""
    space = store.current()
    _welcome()
    run = store.live_run("measure")
    stored = store.latest_diagnosis()
    if stored is None and run is None and store.wants_example():
        store.start_measure(space.measure_options)
        st.rerun()
    stale = stored is not None and store.is_stale(stored.diagnosis, space.choice)
    _title(space, stored, stale=stale, live=run is not None)
    if run is not None:
        measuring.live(run)
    last = next(iter(store.all_runs("measure")), None)
    if last is not None and not last.live and (stored is None or last.id != stored.run_id):
        frame.outcome(last)
    if stored is None and run is None:
        measuring.first(space, store.model_outline(space.choice).default_size)
    if stored is None:
        if run is not None:
            # Placeholders of the right size, so that nothing jumps when the results come.
            st.skeleton(FINDINGS_PX)
            st.skeleton(charts.heatmap_height(len(words.MAIN_METRICS)))
        else:
            strip.sizes(space, store.model_outline(space.choice))
    else:
        _findings(stored.diagnosis, disabled=stale)
        opened = strip.strip(space, stored.diagnosis, stale=stale)
        if opened is not None:
            with opened:
                layer.panel(space, stored, stale=stale)
    _plan(space, None if stored is None or stale else stored.diagnosis)
    if stored is not None:
        _about(space, stored.diagnosis)


def _welcome() -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(
            "**Limber** shows where a pretrained network is stiff for your images, and resets "
            "layers before you fine-tune.",
            width="content",
        )
        frame.link("choose", "Bring your own")
        recent.earlier(store.current())


def _title(space: store.Workspace, stored: store.Stored | None, *, stale: bool, live: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Where is it stiff?", width="content")
        if stored is None:
            return
        header = stored.diagnosis.header
        st.caption(
            words.escape(
                f"{header.model_title} on {header.data_title}: "
                f"{words.count(header.samples, 'image')} of {header.image_size} px, next to a "
                "fresh twin."
            ),
            width="content",
        )
        if not live:
            measuring.again(space, store.model_outline(space.choice).default_size)
    if stale and stored is not None:
        header = stored.diagnosis.header
        st.warning(
            words.escape(
                f"This was measured on {header.model_title} with {header.data_title}, before you "
                "changed the network or the images. Measure again to see your present choice."
            )
        )


def _findings(diagnosis: Diagnosis, *, disabled: bool) -> None:
    found = diagnosis.findings
    if not found:
        st.markdown(
            "Nothing stands out by these checks. The heatmap may still show where layers "
            "differ from the fresh twin."
        )
        return
    strip.findings(found[:SHOWN_FINDINGS], key="findings", disabled=disabled)
    with st.container(horizontal=True, vertical_alignment="center"):
        if len(found) > SHOWN_FINDINGS:
            with st.popover(
                words.count(len(found) - SHOWN_FINDINGS, "more finding"),
                type="tertiary",
                icon=":material/expand_more:",
            ):
                strip.findings(found[SHOWN_FINDINGS:], key="findings_more", disabled=disabled)
        st.caption("A click on a finding picks its layers, and only these.", width="content")


def _plan(space: store.Workspace, diagnosis: Diagnosis | None) -> None:
    """Draw what makes the plan: by hand, by rule, the new values, a look ahead."""
    with st.spinner("Loading the network", show_time=True):
        outline = store.model_outline(space.choice)
    picking.drop_unknown(space, outline)
    st.subheader("Your plan")
    picking.summary(space, outline)
    planner.by_rule(space)
    picking.pattern_row(outline)
    picking.table(space, outline, diagnosis)
    if space.picks.plan_file is None:
        picking.new_values(space)
    else:
        picking.made(outline)
    if space.picks.layers:
        planner.ahead(outline)
        with st.container(horizontal=True):
            frame.link("watch", "Next: watch it against the untouched network")
            frame.link("export", "Export the plan")


def _about(space: store.Workspace, diagnosis: Diagnosis) -> None:
    """Draw what the measurement was taken on and which checks judge it."""
    header = diagnosis.header
    st.subheader("About this measurement")
    measured = f"{header.model_title} on {header.data_title}: {words.measured_line(header)}"
    lines = (measured, words.overhead_line(header), *header.notes)
    remarks = (words.remark_line(remark) for remark in diagnosis.remarks)
    st.caption("  \n".join(words.escape(line) for line in (*lines, *remarks) if line))
    measuring.checks(space)
    frame.link("glossary", "What the metrics mean")


page()
