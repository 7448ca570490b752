"""The form that starts a trial: against what, judged by what, trained how, for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

import core
from core.catalogue.trials import OUTCOMES, SCHEDULES, OutcomeInfo
from core.records import MARGINS, ModelOutline, ReinitPlan
from core.trial.paired import CLAIM_SEEDS
from dashboard import frame, store, words

NUMBER_PX = 130
WIDE_NUMBER_PX = 190
RUN_KEY = "watched_run"
QUICK_SEEDS = 3
MOST_SEEDS = 64
# Two seeds at five rates.
SWEEP_ARMS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the form asks for.

    Attributes:
        options: How to train and what to judge; its seeds are those of the quick look.
        others: More plans.
        verdict_seeds: Seeds of a verdict.
    """

    options: store.TrainOptions
    others: tuple[ReinitPlan, ...]
    verdict_seeds: int

    def with_seeds(self, many: int) -> store.TrainOptions:
        """Return the options with so many seeds."""
        return self.options.model_copy(update={"seeds": tuple(range(many))})

    def seconds(self, many: int) -> float | None:
        """Return how long it takes with so many seeds; None before anything was timed."""
        return store.finetune_seconds(
            self.with_seeds(many), plans=1 + len(self.others), sweep_arms=SWEEP_ARMS
        )


def form(space: store.Workspace, outline: ModelOutline) -> None:
    """Draw the form; both of its buttons start a trial of the present plan."""
    kept = space.train_options or store.train_defaults(outline, store.data_outline(space.choice))
    size = store.pick_size(outline)
    touched = words.touch_sentence(size.layers, size.tensors, size.parameters, size.total)
    st.text(words.clean(f"{space.picks.name}: {touched}"))
    rivals = _rivals(kept)
    with st.expander("Settings", key="train_settings"):
        judged = _judged(kept)
        trained = _trained(kept, outline.size_multiple)
        quick, verdict = _seeds(kept)
    others: tuple[ReinitPlan, ...] = ()
    options = None
    with frame.showing_errors():
        others = _more_plans(outline)
        options = store.TrainOptions.model_validate(
            {
                **trained,
                **judged,
                "seeds": tuple(range(quick)),
                "random_control": "random" in rivals,
                "rivals": tuple(name for name in rivals if name != "random"),
            }
        )
        frame.warn_of_other_images(store.present_plan(outline))
    if options is None:
        return
    wish = Wish(options=options, others=others, verdict_seeds=verdict)
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(
            words.escape(f"Quick look, {words.count(quick, 'seed')}"),
            type="primary",
            key="train_start",
            icon=":material/play_arrow:",
        ):
            _start(wish, outline, quick)
        if st.button(
            words.escape(f"Verdict, {verdict} seeds"),
            key="train_verdict",
            icon=":material/balance:",
        ):
            _start(wish, outline, verdict)
    _estimate(wish, quick)


def _start(wish: Wish, outline: ModelOutline, seeds: int) -> None:
    with frame.showing_errors():
        plan = store.present_plan(outline)
        st.session_state[RUN_KEY] = store.start_finetune(wish.with_seeds(seeds), plan, wish.others)
        st.rerun()


def _rivals(kept: store.TrainOptions) -> Sequence[str]:
    infos = {info.name: info for info in core.list_rivals()}
    chosen = [*(["random"] if kept.random_control else []), *kept.rivals]
    names = st.pills(
        "Against the untouched network, and",
        list(infos),
        selection_mode="multi",
        default=[name for name in chosen if name in infos],
        key="train_rivals",
        format_func=lambda name: infos[name].arm[0].upper() + infos[name].arm[1:],
        help=words.RIVALS_HELP,
    )
    for name in names:
        st.caption(words.escape(f"{infos[name].title}: {infos[name].does}"))
    return names


def _more_plans(outline: ModelOutline) -> tuple[ReinitPlan, ...]:
    earlier = store.earlier_plans(outline)
    if not earlier:
        return ()
    labels = st.multiselect(
        "More plans",
        list(earlier),
        key="train_more_plans",
        format_func=words.escape,
        help=words.MORE_PLANS_HELP,
        placeholder="None",
    )
    return tuple(earlier[label] for label in labels if label in earlier)


def _judged(kept: store.TrainOptions) -> dict[str, Any]:
    """Draw what is judged, and return it by names in `TrainOptions`."""
    infos: dict[str, OutcomeInfo] = {info.name: info for info in OUTCOMES}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        outcome = st.selectbox(
            "Judged by",
            list(infos),
            index=list(infos).index(kept.outcome),
            key="train_outcome",
            width=220,
            format_func=lambda name: infos[name].title,
            help=words.OUTCOME_HELP,
        )
        own = 100 * MARGINS[infos[outcome].name]
        same = outcome == kept.outcome and kept.margin is not None
        margin = st.number_input(
            f"Margin ({infos[outcome].unit})",
            0.0,
            99.0,
            float(kept.margin) if same and kept.margin is not None else own,
            0.5,
            # Another outcome has another unit, and so another field.
            key=f"train_margin_{outcome}",
            width=WIDE_NUMBER_PX,
            help=words.MARGIN_HELP,
        )
        sweep = st.checkbox(
            "Find the learning rate first",
            kept.sweep,
            key="train_sweep",
            help=words.SWEEP_HELP,
        )
    st.caption(words.escape(infos[outcome].reads))
    return {"outcome": outcome, "margin": float(margin), "sweep": sweep}


def _seeds(kept: store.TrainOptions) -> tuple[int, int]:
    many = len(kept.seeds)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        quick = number(
            "Seeds, quick look",
            1,
            CLAIM_SEEDS - 1,
            many if many < CLAIM_SEEDS else QUICK_SEEDS,
            1,
            "quick_seeds",
            words.QUICK_SEEDS_HELP,
            width=WIDE_NUMBER_PX,
        )
        verdict = number(
            "Seeds, verdict",
            CLAIM_SEEDS,
            MOST_SEEDS,
            max(CLAIM_SEEDS, many),
            1,
            "verdict_seeds",
            words.VERDICT_SEEDS_HELP,
            width=WIDE_NUMBER_PX,
        )
    return quick, verdict


def _trained(kept: store.TrainOptions, multiple: int) -> dict[str, Any]:
    """Draw how arms are trained, and return it by names in `TrainOptions`.

    Args:
        kept: What the fields show at first.
        multiple: The image size must be a multiple of it.
    """
    with st.container(horizontal=True, vertical_alignment="bottom"):
        steps = number("Steps", 1, 100_000, kept.steps, 10, "steps")
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
        numbers = {
            "batch_size": number("Batch size", 2, 4096, kept.batch_size, 8, "batch"),
            "image_size": number(
                "Image size (px)",
                multiple,
                2048,
                kept.image_size,
                multiple,
                "size",
                words.SIZE_HELP,
            ),
            "train_images": number(
                "Training images", 2, 10_000_000, kept.train_images, 64, "images"
            ),
            "val_images": number(
                "Validation images", 2, 10_000_000, kept.val_images, 64, "val_images"
            ),
            "eval_every": number(
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
        optimizer = st.text_input(
            "Optimiser",
            kept.optimizer,
            key="train_optimizer",
            width=NUMBER_PX,
            help=words.OPTIMIZER_HELP,
        )
        schedule = st.selectbox(
            "Schedule",
            SCHEDULES,
            index=SCHEDULES.index(kept.schedule) if kept.schedule in SCHEDULES else 0,
            key="train_schedule",
            width=NUMBER_PX,
            help=words.SCHEDULE_HELP,
        )
        device = frame.device_field(kept.device, key="train_device")
    return {
        "steps": steps,
        "lr": float(lr),
        **numbers,
        "optimizer": optimizer.strip() or "adamw",
        "schedule": schedule,
        "augment": _augment(kept),
        "device": device,
        "keep_weights": st.checkbox(
            "Keep the trained weights",
            kept.keep_weights,
            key="train_keep_weights",
            help=words.KEEP_WEIGHTS_HELP,
        ),
    }


def _augment(kept: store.TrainOptions) -> tuple[str, ...]:
    infos = {info.name: info for info in core.list_augmentations()}
    names = st.pills(
        "Training images are changed by",
        list(infos),
        selection_mode="multi",
        default=[name for name in kept.augment if name in infos],
        key="train_augment",
        format_func=lambda name: infos[name].title,
        help=words.AUGMENT_HELP,
    )
    for name in names:
        info = infos[name]
        careful = f" Leave it out {info.careful}." if info.careful else ""
        st.caption(words.escape(f"{info.title}: {info.does}{careful}"))
    return tuple(name for name in infos if name in names)


def number(
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
    """Draw a field for a whole number and return it."""
    found = st.number_input(
        label,
        least,
        most,
        min(max(value, least), most),
        step,
        key=f"train_{name}",
        width=width,
        help=help_text,
    )
    return int(found)


def _estimate(wish: Wish, quick: int) -> None:
    """Say how long both buttons take; time a few steps where nobody has."""

    @store.guarded
    def draw() -> None:
        run = store.estimate_run(wish.options)
        if run is None and not store.live_runs():
            with frame.showing_errors():
                store.start_estimate(wish.options)
                run = store.estimate_run(wish.options)
        seconds = [wish.seconds(quick), wish.seconds(wish.verdict_seeds)]
        if seconds[0] is not None and seconds[1] is not None:
            st.caption(words.trial_estimate((quick, seconds[0]), (wish.verdict_seeds, seconds[1])))
        elif run is None or run.live:
            st.caption("Timing a few steps, to say how long this takes.")
        else:
            why = run.message or "it said nothing"
            st.caption(words.escape(f"How long this takes is not known. Timing it failed: {why}"))
        if was_live and run is not None and not run.live:
            st.rerun()

    was_live = (run := store.estimate_run(wish.options)) is None or run.live
    st.fragment(draw, run_every=frame.LIVE_EVERY_S if was_live else None)()
