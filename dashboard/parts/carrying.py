"""The part of an open layer that asks Captum what it carries, before and after the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import streamlit as st

from core.catalogue.attributions import METHODS, method_named
from core.errors import LimberError
from core.records import LayerReport, ReinitPlan
from core.records.attribution import Attribution
from dashboard import charts, frame, plot, store, words

PICTURE_PX = 96
BARS_PX = 240
# What `core.attribute` calls an ablation of every block.
BLOCKS = "blocks"
STATES = {"pretrained": "As it came", "planned": "After your plan"}
MAPPED = tuple(method.name for method in METHODS if method.name != "ablation")

Arrays = Mapping[str, np.ndarray]


def carrying(space: store.Workspace, layer: LayerReport) -> None:
    """Draw what the layer carries on some images, by a method that a person chooses."""
    titles = {"auto": "The one that suits the layer"} | {
        method.name: method.title for method in METHODS
    }
    titles[BLOCKS] = "What would be lost, block by block"
    method = st.selectbox(
        "Method",
        tuple(titles),
        format_func=titles.__getitem__,
        key="carrying_method",
        width=320,
        help="Captum's methods. Each says below how to read it, what it compares with, and what "
        "it cost.",
    )
    plan = _plan(space)
    wanted = store.AttributeWish(
        layer=BLOCKS if method == BLOCKS else layer.name,
        method="ablation" if method == BLOCKS else method,
        plan=plan,
        trained=_trained(),
    )
    run = store.attribute_run(wanted)
    if run is not None and run.live:
        _live(run)
        return
    view = None
    if run is not None:
        with frame.showing_errors():
            view = store.attribution_of(run)
        if view is None:
            frame.outcome(run)
    if view is None:
        after = " as it came"
        after += ", after your plan" if plan is not None else ""
        after += ", and after the last fine-tune" if wanted.trained else ""
        st.markdown(
            words.escape(
                "Asks how much this layer does for the features that enter the head (half their "
                f"squared norm), on four images:{after}. All on one scale; nothing is trained or "
                "changed."
            )
        )
        st.caption("About 10 s to 1 min on a CPU; ablation is the slowest.")
        if st.button("Look what it carries", key="carrying_start"):
            with frame.showing_errors():
                store.start_attribute(wanted)
                st.rerun()
        return
    _view(view[0], view[1])


def _plan(space: store.Workspace) -> ReinitPlan | None:
    outline, _ = store.outline_if_ready(space.choice)
    if outline is None or not space.picks.layers:
        return None
    try:
        return store.present_plan(outline)
    except LimberError:
        return None


def _trained() -> tuple[Path, ...]:
    """Return the weights of the last fine-tune that kept them: the untouched arm's, the plan's."""
    run = store.trained_run()
    kept = {} if run is None else store.trained_of(run)
    return tuple(list(kept.values())[:2])


def _live(run: store.RunView) -> None:
    @store.guarded
    def draw() -> None:
        now = frame.run_now("attribute", run.id)
        if now is None or not now.live:
            st.rerun()
        frame.progress(now)
        frame.stop_button(now, key="stop_attribute")

    st.fragment(draw, run_every=frame.LIVE_EVERY_S)()


def _view(view: Attribution, arrays: Arrays) -> None:
    if view.method == "ablation":
        _bars(view, arrays)
    elif view.grid is not None:
        _maps(view, arrays)
    else:
        _units(view, arrays)
    _facts(view)


def _maps(view: Attribution, arrays: Arrays) -> None:
    """Draw the images and each state's maps below them, all on one scale."""
    reach = max(float(np.abs(arrays[f"{state.name}/maps"]).max()) for state in view.states)
    images = arrays["images/thumbnails"]
    with st.container(horizontal=True, gap="small"):
        for place, pixels in enumerate(images):
            with st.container(width=PICTURE_PX, gap="xsmall"):
                st.image(charts.picture(pixels), width=PICTURE_PX, alt=f"Image {place + 1:d}")
                st.caption(words.escape(_class(view, place)))
    for state in view.states:
        st.markdown(f"**{words.escape(_title(state.name))}**")
        with st.container(horizontal=True, gap="small"):
            for place, grid in enumerate(arrays[f"{state.name}/maps"]):
                with st.container(width=PICTURE_PX, gap="xsmall"):
                    st.image(
                        charts.signed_picture(grid, reach, dark=frame.is_dark()),
                        width=PICTURE_PX,
                        alt=words.clean(f"Map of image {place + 1}, {state.name}"),
                    )
    st.caption(
        words.escape(
            f"Orange adds to the target ({view.target_words}), violet takes away, up to "
            f"{words.figure(reach)} at the ends of the scale, which is the same for all of these."
        )
    )


def _title(state: str) -> str:
    """Return the words for a state of the network."""
    return STATES.get(state, f"Trained, {state}")


def _class(view: Attribution, place: int) -> str:
    return view.classes[place] if place < len(view.classes) else f"class {view.labels[place]}"


def _units(view: Attribution, arrays: Arrays) -> None:
    plot.plot(
        charts.carried_bars(
            {_title(state.name): arrays[f"{state.name}/units"].mean(0) for state in view.states},
            [f"unit {place}" for place in range(arrays["pretrained/units"].shape[1])],
            title="carried, mean over the images",
            dark=frame.is_dark(),
        ),
        key="carried_units",
        height=BARS_PX,
        alt="What each unit of the layer carries, for each state of the network",
    )


def _bars(view: Attribution, arrays: Arrays) -> None:
    """Draw what would be lost without each group or block, next to what the plan resets."""
    whole = float(np.mean(view.states[0].outputs)) or 1.0
    count = arrays["pretrained/units"].shape[1]
    names = list(view.names) or [_group(place, view.group) for place in range(count)]
    reset = [share > 0 for share in view.reset or [0.0] * count]
    plot.plot(
        charts.carried_bars(
            {
                _title(state.name): arrays[f"{state.name}/units"].mean(0) / whole
                for state in view.states
            },
            names,
            title="share of the target lost",
            marked=reset,
            dark=frame.is_dark(),
        ),
        key="lost_units",
        height=BARS_PX,
        alt="By how much the target falls without each group of units of the layer",
    )
    what = "block" if view.names else "group"
    said = [
        f"Your plan resets none of these {what}s."
        if not any(reset)
        else f"Marks below the bars: your plan resets {words.count(sum(reset), what)} of "
        f"{count}, whole or in part. Where the bar is near 0, that loses nothing this target needs."
    ]
    if view.replaced:
        skipped = view.replaced.count("input")
        said.append(
            f"{words.count(skipped, 'residual block')} gave the input instead of the output; the "
            "others gave 0."
        )
    said += [f"No bar for {name}: {why}" for name, why in view.left_out.items()]
    st.caption("  \n".join(words.escape(line) for line in said))


def _group(place: int, group: int) -> str:
    if group == 1:
        return f"unit {place}"
    return f"units {place * group} to {(place + 1) * group - 1}"


def _facts(view: Attribution) -> None:
    """Say method, baseline, cost, n, and how far the view can be trusted."""
    method = method_named(view.method)
    n = words.count(len(view.labels), "image")
    seconds = sum(state.seconds for state in view.states)
    first = view.states[0]
    lines = [
        f"{method.title} ({method.captum} of Captum), {n}, {words.duration(seconds)} on "
        f"{view.device}. {method.reads}",
        f"Target: {view.target_words}.",
    ]
    if method.baseline:
        points = f", {view.steps} points" if view.steps and view.method != "ablation" else ""
        lines.append(f"Baseline: {method.baseline}{points}.")
    if first.gap is not None:
        lines.append(
            f"The values sum to the change of the target to within {words.percent(first.gap)}."
        )
    if first.infidelity is not None:
        lines.append(
            f"Infidelity {words.figure(first.infidelity)}: the mean squared error, in units of the "
            "target, of what these values predict for small changes of the layer's output."
        )
    elif view.why_no_infidelity:
        lines.append(f"Captum's infidelity is not taken: {view.why_no_infidelity}.")
    lines.append(f"Formula: {method.formula}. Source: {method.source}.")
    st.caption("  \n".join(words.escape(line) for line in lines))
