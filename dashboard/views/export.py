"""Export: the plan in words and as JSON, the edited weights, a snippet for any trainer."""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
import streamlit as st

import core
from core.errors import LimberError, PlanError
from core.portable import SCRIPT
from core.records import ModelOutline, ReinitPlan, ReinitReceipt
from dashboard import frame, store, words

ANY_TRAINER = {"torch": "Plain PyTorch", "lightning": "Lightning", "hf": "HF Trainer"}
SNIPPETS = {
    "timm": {"timm": "timm train.py", **ANY_TRAINER},
    "embedded": {"timm": "timm train.py", **ANY_TRAINER},
    "torchvision": {"torchvision": "torchvision references", **ANY_TRAINER},
}
JSON_PX = 360


def page() -> None:
    """Draw the page."""
    space = store.current()
    st.subheader("How do I take it along?")
    with st.spinner("Loading the network", show_time=True):
        outline = store.model_outline(space.choice)
    if space.picks.layers:
        with frame.showing_errors():
            plan = store.present_plan(outline)
            frame.warn_of_other_images(plan)
            _words(plan, outline)
            left, right = st.columns(2, gap="large")
            with left:
                _json(plan)
            with right:
                _weights(plan)
                _snippet(plan)
    else:
        frame.waits_for(
            "look", "There is no plan yet. Pick at least one layer, or load a plan below."
        )
    _upload(space)


def _words(plan: ReinitPlan, outline: ModelOutline) -> None:
    size = store.pick_size(outline)
    st.subheader("The plan in words")
    st.markdown(words.escape(words.plan_words(plan, outline.title, size.parameters, size.total)))
    st.text(words.clean(", ".join(target.layer for target in plan.targets)))


def _json(plan: ReinitPlan) -> None:
    text = core.plan_json(plan)
    st.subheader("As JSON")
    st.download_button(
        "Download plan.json",
        text,
        file_name="plan.json",
        mime="application/json",
        key="download_plan",
        on_click="ignore",
        icon=":material/download:",
    )
    if plan.companion is not None and plan.companion_bytes is not None:
        st.download_button(
            words.escape(f"Download {plan.companion.file}"),
            plan.companion_bytes,
            file_name=plan.companion.file,
            mime="application/octet-stream",
            key="download_companion",
            on_click="ignore",
            icon=":material/download:",
            help=words.COMPANION_HELP,
        )
    st.code(words.code(text), language="json", height=JSON_PX)


def _weights(plan: ReinitPlan) -> None:
    st.subheader("The edited weights")
    run = next(
        (
            run
            for run in store.all_runs("apply")
            if run.facts.get("plan_json") == core.plan_json(plan)
        ),
        None,
    )
    if run is None or run.state in ("failed", "stopped"):
        if run is not None:
            frame.outcome(run)
        st.markdown(
            "Makes a safetensors file with the plan applied. "
            + (
                "The head is a new, random one for your classes; all else stays as it was."
                if plan.model.head == "new"
                else "All else stays as it was."
            )
        )
        if st.button("Write the weights", key="apply_start"):
            with frame.showing_errors():
                store.start_apply(plan)
                st.rerun()
        return

    @store.guarded
    def draw() -> None:
        now = frame.run_now("apply", run.id)
        if now is None or (run.live and not now.live):
            st.rerun()
        if now.live:
            frame.progress(now)
            frame.stop_button(now, key="stop_apply")
            return
        _written(now)

    st.fragment(draw, run_every=frame.LIVE_EVERY_S if run.live else None)()


def _written(run: store.RunView) -> None:
    path = run.folder / "reinit.safetensors"
    if not path.is_file():
        st.error("The weights were written but are no longer there. Write them again.")
        return
    st.download_button(
        f"Download reinit.safetensors ({words.short(path.stat().st_size)}B)",
        functools.partial(Path.read_bytes, path),
        file_name="reinit.safetensors",
        mime="application/octet-stream",
        key="download_weights",
        on_click="ignore",
        icon=":material/download:",
    )
    receipt = store.receipt_of(run)
    if receipt is not None:
        _receipt(receipt)


def _receipt(receipt: ReinitReceipt) -> None:
    touched, total = receipt.parameters_touched, receipt.parameters_total
    lines = (
        f"{touched:,} of {total:,} parameters were rewritten.",
        f"State before {receipt.before_sha256[:16]}",
        f"State after  {receipt.after_sha256[:16]}",
    )
    st.text("\n".join(words.clean(line) for line in lines))
    for warning in receipt.warnings:
        st.warning(words.escape(warning))
    with st.expander("What changed, tensor by tensor"):
        st.dataframe(
            pd.DataFrame(
                [
                    {
                        "Tensor": words.clean(change.name),
                        "Entries": change.entries,
                        "Changed": change.changed,
                        "Relative change": change.relative_change,
                        "Norm before": change.norm_before,
                        "Norm after": change.norm_after,
                    }
                    for change in receipt.changes
                ]
            ),
            hide_index=True,
            key="receipt",
            placeholder=words.NO_VALUE,
            column_config={
                "Tensor": st.column_config.TextColumn(pinned=True),
                "Relative change": st.column_config.NumberColumn(
                    format="%.3g",
                    help="Size of the difference divided by the size before: 1.4 is a fresh draw "
                    "of the same size.",
                ),
                "Norm before": st.column_config.NumberColumn(format="%.3g"),
                "Norm after": st.column_config.NumberColumn(format="%.3g"),
            },
        )


def _snippet(plan: ReinitPlan) -> None:
    st.subheader("In your own trainer")
    kinds = SNIPPETS[plan.model.source]
    kind = st.segmented_control(
        "Trainer",
        tuple(kinds),
        default=next(iter(kinds)),
        required=True,
        format_func=kinds.__getitem__,
        key="snippet_kind",
        wrap=True,
        label_visibility="collapsed",
    )
    text = core.snippet(plan, kind or next(iter(kinds)))
    st.code(words.code(text), language="bash" if kind == "timm" else "python", wrap_lines=True)
    st.download_button(
        "Download apply_plan.py",
        SCRIPT.read_text(encoding="utf-8"),
        file_name="apply_plan.py",
        mime="text/x-python",
        key="download_script",
        on_click="ignore",
        icon=":material/download:",
        help=words.SCRIPT_HELP,
    )


def _upload(space: store.Workspace) -> None:
    st.subheader("Load a plan")
    turn = st.session_state.setdefault("plan_upload_turn", 0)
    files = st.file_uploader(
        "plan.json, and the file of selected entries that belongs to it, if there is one",
        type=["json", "safetensors"],
        accept_multiple_files=True,
        key=f"plan_upload_{turn}",
        help="Its layers, scheme, seed and frozen layers become the present pick. Undo brings the "
        "old pick back.",
    )
    plan_file = next((file for file in files if file.name.endswith(".json")), None)
    if plan_file is None:
        if files:
            st.info("This file holds only selected entries. Give its plan.json as well.")
        return
    companion = next((file for file in files if file is not plan_file), None)
    try:
        with st.spinner(words.OPENING, show_time=True):
            plan = store.read_plan(
                plan_file.getvalue(), None if companion is None else companion.getvalue()
            )
        if plan.companion is not None and companion is None:
            raise PlanError(
                f'This plan keeps its selection in "{plan.companion.file}". Give both files.'
            )
        _take(space, plan)
    except LimberError as error:
        st.error(words.escape(words.sentence(error)))
        return
    # A new key empties the uploader, so that the next run does not load the file again.
    st.session_state["plan_upload_turn"] = turn + 1
    store.notice(
        "success", f"Plan {plan.name} is loaded: {words.count(len(plan.targets), 'layer')} picked."
    )
    st.rerun()


def _take(space: store.Workspace, plan: ReinitPlan) -> None:
    choice = space.choice
    wanted = plan.model.checkpoint
    if wanted is not None and wanted != choice.checkpoint:
        # A plan may come from a stranger, so only a person may open a file that it names.
        raise PlanError(
            f'This plan starts from the checkpoint "{wanted}". A plan does not open files here: '
            "choose that checkpoint under Choose, then load the plan again."
        )
    model = store.plan_model(plan)
    changes = {
        "model": model,
        "weights": "none" if plan.model.weights == "none" else "pretrained",
        "checkpoint": plan.model.checkpoint,
    }
    trial = choice.model_copy(update=changes)
    outline = store.model_outline(trial)
    core.check_plan(plan, outline)
    if trial != choice:
        space.choose(**changes)
    if plan.targets:
        store.take_plan(plan)
    else:
        space.change_picks(layers=(), freeze=plan.freeze, name=plan.name)


page()
