"""Watch: short fine-tunes of the plan against the untouched network."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.errors import LimberError
from core.records import ABComparison, ArmCurve, ArmDifference, ModelOutline
from core.trial.verdict import compare_curves
from dashboard import charts, frame, plot, store, words

CURVE_PX = 340
NUMBER_PX = 130
WIDE_NUMBER_PX = 190
RUN_KEY = "watched_run"


def page() -> None:
    """Draw the page."""
    space = store.current()
    st.subheader("Does the reset help?")
    live = store.live_run("finetune")
    past = store.all_runs("finetune")
    if not space.picks.layers and not past:
        frame.waits_for(
            "look",
            "There is no plan yet. Pick at least one layer; then you can watch its reset against "
            "the untouched network.",
        )
        return
    if live is None and space.picks.layers:
        with st.spinner("Loading the network", show_time=True):
            outline = store.model_outline(space.choice)
        with st.expander("Start a fine-tune", expanded=not past, key="start_finetune_box"):
            _form(space, outline)
    elif live is None:
        frame.link("look", "Pick layers to start another fine-tune")
    if not past:
        st.caption(
            "Two charts will appear here: training loss and validation accuracy of the "
            "untouched network, of your plan, and of a random control of the same size."
        )
        return
    _watch(past)


def _form(space: store.Workspace, outline: ModelOutline) -> None:
    kept = space.train_options or store.train_defaults(outline, store.data_outline(space.choice))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        steps = _number("Steps", 1, 100_000, kept.steps, 10, "steps")
        seeds = st.text_input(
            "Seeds",
            ", ".join(map(str, kept.seeds)),
            key="train_seeds",
            width=NUMBER_PX,
            help=words.SEEDS_HELP,
        )
        numbers = _numbers(kept, outline.size_multiple)
        device = frame.device_field(kept.device, key="train_device")
    random_control = st.checkbox(
        "Random control of the same size",
        kept.random_control,
        key="train_random_control",
        help=words.RANDOM_CONTROL_HELP,
    )
    keep_weights = st.checkbox(
        "Keep the trained weights",
        kept.keep_weights,
        key="train_keep_weights",
        help=words.KEEP_WEIGHTS_HELP,
    )
    size = store.pick_size(outline)
    touched = words.touch_sentence(size.layers, size.tensors, size.parameters, size.total)
    st.text(words.clean(f"{space.picks.name}: {touched}"))
    options = None
    with frame.showing_errors():
        options = store.TrainOptions(
            **numbers,
            steps=steps,
            seeds=_seeds(seeds),
            device=device,
            random_control=random_control,
            keep_weights=keep_weights,
        )
    with frame.showing_errors():
        frame.warn_of_other_images(store.present_plan(outline))
    seconds = store.finetune_seconds(options) if options else None
    st.caption(words.estimate(seconds) if seconds else "")
    if st.button("Start", type="primary", key="train_start", disabled=not options) and options:
        with frame.showing_errors():
            plan = store.present_plan(outline)
            st.session_state[RUN_KEY] = store.start_finetune(options, plan)
            st.rerun()


def _numbers(kept: store.TrainOptions, multiple: int) -> dict[str, Any]:
    """Draw the numbers after steps and seeds, and return them by their names in `TrainOptions`.

    Args:
        kept: What the fields show at first.
        multiple: The image size must be a multiple of it.
    """
    lr = st.number_input(
        "Learning rate",
        0.0,
        10.0,
        kept.lr,
        format="%g",
        key="train_lr",
        width=NUMBER_PX,
        step=1e-4,
        help=words.LR_HELP,
    )
    return {
        "lr": float(lr),
        "batch_size": _number("Batch size", 2, 4096, kept.batch_size, 8, "batch"),
        "image_size": _number(
            "Image size (px)", multiple, 2048, kept.image_size, multiple, "size", words.SIZE_HELP
        ),
        "train_images": _number("Training images", 2, 10_000_000, kept.train_images, 64, "images"),
        "val_images": _number(
            "Validation images", 2, 10_000_000, kept.val_images, 64, "val_images"
        ),
        "eval_every": _number(
            "Validate every (steps)",
            1,
            100_000,
            kept.eval_every,
            5,
            "every",
            words.EVAL_HELP,
            width=WIDE_NUMBER_PX,
        ),
    }


def _number(
    label: str,
    least: int,
    most: int,
    value: int,
    step: int,
    name: str,
    help_text: str | None = None,
    *,
    width: int = NUMBER_PX,
) -> int:
    number = st.number_input(
        label,
        least,
        most,
        value,
        step,
        key=f"train_{name}",
        width=width,
        help=help_text,
    )
    return int(number)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.replace(",", " ").split()))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise LimberError(
            f'The seeds "{text}" cannot be read. Give whole numbers from 0, separated by '
            "commas: 0, 1, 2."
        )
    return seeds


def _watch(past: tuple[store.RunView, ...]) -> None:
    titles = {run.id: _title(run) for run in past}
    if st.session_state.get(RUN_KEY) not in titles:
        st.session_state[RUN_KEY] = past[0].id
    if len(past) > 1:
        st.selectbox("Run", list(titles), key=RUN_KEY, format_func=titles.__getitem__)
    else:
        st.text(words.clean(titles[past[0].id]))
    wanted = st.session_state[RUN_KEY]
    shown = next(run for run in past if run.id == wanted)

    @store.guarded
    def draw() -> None:
        now = frame.run_now("finetune", wanted)
        if now is None or (shown.live and not now.live):
            st.rerun()
        _run(now)

    st.fragment(draw, run_every=frame.LIVE_EVERY_S if shown.live else None, key=wanted)()


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
    comparison = _compare(curves)
    st.subheader("Verdict so far" if run.live else "Verdict")
    st.markdown(
        words.escape(
            comparison.sentence
            if comparison
            else "No step is done yet."
            if run.live
            else "There is nothing to compare: no arm got far enough."
        )
    )
    if comparison is not None:
        for caveat in (*run.caveats, *comparison.caveats):
            st.caption(words.escape(caveat))
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
        _arms(curves, comparison)
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


def _compare(curves: tuple[ArmCurve, ...]) -> ABComparison | None:
    if len({curve.arm for curve in curves}) < 2:
        return None
    try:
        return compare_curves(curves)
    except LimberError:
        # Too early: an arm has no evaluation in common with the untouched one yet.
        return None


def _arms(curves: tuple[ArmCurve, ...], comparison: ABComparison | None) -> None:
    rows = []
    differences: dict[tuple[str, str], ArmDifference] = {
        (difference.arm, difference.measure): difference
        for difference in (comparison.differences if comparison else ())
    }
    for arm in charts.arm_order(curves):
        line = charts.spark(curves, arm)
        row: dict[str, object] = {
            "Arm": words.clean(arm),
            "Seeds": len({curve.seed for curve in curves if curve.arm == arm}),
            "Accuracy": line,
            "Last": line[-1] if line else None,
        }
        for measure, title in words.DIFFERENCES.items():
            difference = differences.get((arm, measure))
            row[title] = words.difference_line(difference) if difference else ""
        final = differences.get((arm, "final_val_accuracy"))
        row["Verdict"] = words.clean(final.verdict or "") if final else ""
        rows.append(row)
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        key="arms",
        column_config={
            "Arm": st.column_config.TextColumn(pinned=True),
            "Accuracy": st.column_config.LineChartColumn(
                help="Validation accuracy over the run, mean over seeds."
            ),
            "Last": st.column_config.NumberColumn(format="percent"),
            **{
                title: st.column_config.TextColumn(help=words.DIFFERENCE_HELP[measure])
                for measure, title in words.DIFFERENCES.items()
            },
        },
    )


page()
