"""What every page shares: the sidebar, messages, the panel of a live run, links to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.errors import LimberError
from core.records import Pattern, ReinitPlan
from dashboard import store, words

if TYPE_CHECKING:
    pass

Step = Literal["look", "choose", "watch", "export", "glossary"]

TITLES: dict[Step, str] = {
    "look": "Look",
    "choose": "Choose",
    "watch": "Watch",
    "export": "Export",
    "glossary": "Glossary",
}
LIVE_EVERY_S = 0.5
DEVICES = ("auto", "cpu", "cuda")
# Findings are sentences to click: they start at the left and look like links. On a phone, charts of
# layers scroll sideways and are so wide that a finger can hit one layer.
STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding: 3.25rem 2rem 4rem; }
[class*="st-key-findings"] button {
  justify-content: flex-start; text-align: left; min-height: 1.75rem; padding: 0.1rem 0;
}
[class*="st-key-findings"] button > div { justify-content: flex-start; }
[class*="st-key-findings"] button p {
  text-decoration: underline; text-decoration-style: dotted; text-underline-offset: 0.2em;
}
/* The strip stays in sight while an open layer scrolls past it. */
@media (min-width: 641px) {
  [data-testid="stColumn"]:has(.st-key-layers_scroll) {
    position: sticky; top: 3.5rem; align-self: flex-start;
  }
}
@media (max-width: 640px) {
  [data-testid="stMainBlockContainer"] { padding: 3.25rem 1rem 4rem; }
  .st-key-layers_scroll { overflow-x: auto; }
  .st-key-layers_scroll::before {
    content: "Swipe sideways for the other layers"; position: sticky; left: 0;
    font-size: 0.875rem; opacity: 0.7;
  }
}
</style>"""
# In the dark theme the accent is too dim for text.
DARK_STYLE = """<style>
[data-variant="segmented_control"][aria-checked="true"],
[data-variant="pills"][aria-checked="true"], [data-variant="pills"][aria-pressed="true"],
[role="tab"][aria-selected="true"] { color: #7CC4CB !important; }
</style>"""
# While somebody types, the shortcuts of Undo and Redo would take back a pick instead of a word. So
# the key is caught before Streamlit sees it; the browser's own undo still works.
TYPING = """<script>
if (!window.limberTyping) {
  window.limberTyping = true;
  window.addEventListener("keydown", (event) => {
    const undo = (event.ctrlKey || event.metaKey) && "zy".includes(event.key.toLowerCase());
    const field = event.target.closest?.("input:not([type=checkbox]), textarea");
    if (undo && field) event.stopPropagation();
  }, true);
}
</script>"""


def device_field(device: str, *, key: str) -> str:
    """Draw the choice of a device and return it."""
    return st.selectbox(
        "Device",
        DEVICES,
        index=DEVICES.index(device),
        key=key,
        width=110,
        help=words.DEVICE_HELP,
    )


def file_name(path: str) -> str:
    """Return the last part of a path; where an upload lies on the server tells a person nothing."""
    return Path(path).name


def is_dark() -> bool:
    """Whether the page's background is dark."""
    return st.context.theme.type == "dark"


def login() -> None:
    """Ask for a login, if the secrets name a provider (OIDC) for it.

    For whoever has not logged in the script ends here: it makes no page, no list of work and no
    workspace.
    """
    if not store.asks_login() or st.user.get("is_logged_in"):
        return
    st.title("Limber")
    st.markdown("Whoever runs this server asks you to log in.")
    st.button("Log in", key="log_in", type="primary", on_click=st.login)
    st.stop()


def link(step: Step, label: str) -> None:
    """Link to a step of the work, keeping the workspace in the address."""
    st.page_link(
        f"views/{step}.py",
        label=words.escape(label),
        query_params={"w": store.current().id},
        icon=":material/arrow_forward:",
    )


def waits_for(step: Step, sentence: str) -> None:
    """Say what a step waits for, and link there."""
    with st.container(border=True):
        st.markdown(words.escape(sentence))
        link(step, f"Go to {TITLES[step]}")


def show_notice() -> None:
    """Show the message that the last action left."""
    left = store.take_notice()
    if left is None:
        return
    kind, text = left
    show = {"error": st.error, "success": st.success}.get(kind, st.info)
    show(words.escape(text))


def show_troubles() -> None:
    """Say what keeps the whole program from working: a full disk, another server."""
    for text in store.troubles():
        st.warning(words.escape(text), icon=":material/warning:")


def sidebar() -> Callable[[], None]:
    """Draw the sidebar; return a function that draws its facts again once more is known."""
    knew = store.outline_if_ready(store.current().choice)[0] is not None
    with st.sidebar:
        slot = st.empty()
        _facts(slot)
        _plan_actions()
        _running()
        st.html(TYPING, unsafe_allow_javascript=True)
        st.html(STYLE)
        if is_dark():
            st.html(DARK_STYLE)

    def refresh() -> None:
        if not knew:
            _facts(slot)

    return refresh


@store.guarded
def _facts(slot: DeltaGenerator) -> None:
    space = store.current()
    choice = space.choice
    outline, data = store.outline_if_ready(choice)
    picks = space.picks
    with slot.container(gap="small"):
        _fact("Model", outline.title if outline else choice.model)
        _fact("Data", data.title if data else choice.data)
        left, right = st.columns(2)
        with left:
            _fact("Device", space.measure_options.device)
        with right:
            _fact("Images to measure", f"{space.measure_options.samples:,}")
        if outline is None:
            line = (
                f"{words.count(len(picks.layers), 'layer')} picked"
                if picks.layers
                else "No layer picked"
            )
            more = ""
        else:
            size = store.pick_size(outline)
            line = words.plan_line(size.layers, size.parameters, size.total)
            more = words.plan_how(picks.scheme, store.plan_rule(outline), len(picks.freeze))
        _fact("Your plan", line)
        if more and picks.layers:
            st.caption(words.escape(more))


def _fact(label: str, text: str) -> None:
    with st.container(gap=None):
        st.caption(words.escape(label))
        st.text(words.clean(text))


@store.guarded
def _plan_actions() -> None:
    space = store.current()
    with st.container(horizontal=True, gap="xsmall"):
        st.button(
            "Undo",
            key="undo",
            on_click=_undo,
            disabled=not space.can_undo,
            shortcut="Ctrl+Z",
            help="Bring back the plan from before the last change.",
        )
        st.button(
            "Redo",
            key="redo",
            on_click=_redo,
            disabled=not space.can_redo,
            shortcut="Ctrl+Y",
            help="Make the change again that Undo took back.",
        )
        st.button(
            "Clear",
            key="clear",
            on_click=_clear,
            disabled=not (space.picks.layers or space.picks.freeze),
            help="Pick nothing. Undo brings it back.",
        )


@store.act
def _undo() -> None:
    store.current().undo()


@store.act
def _redo() -> None:
    store.current().redo()


@store.act
def _clear() -> None:
    store.current().change_picks(layers=(), freeze=(), patterns=())


def _running() -> None:
    runs = store.live_runs()

    @store.guarded
    def draw() -> None:
        now = store.live_runs()
        if {run.id for run in runs} - {run.id for run in now}:
            st.rerun()
        if not now:
            return
        st.caption("Running")
        for index, run in enumerate(now):
            progress(run)
            stop_button(run, key=f"stop_sidebar_{index}" if index else "stop_sidebar")

    st.fragment(draw, run_every=LIVE_EVERY_S if runs else None)()


def progress(run: store.RunView) -> None:
    """Draw how far a run is, always at the same height."""
    st.progress(
        run.fraction,
        text=words.escape(
            words.progress_line(
                run.kind,
                run.phase,
                run.done,
                run.total,
                run.unit,
                run.eta_s,
                run.queue_place,
                run.state,
            )
        ),
    )


def run_now(kind: store.RunKind, run_id: str) -> store.RunView | None:
    """Return a run of this workspace as it is at this moment."""
    return next((run for run in store.all_runs(kind) if run.id == run_id), None)


def stop_button(run: store.RunView, *, key: str) -> None:
    """Draw the button that ends a run."""
    st.button(
        "Stop",
        key=key,
        on_click=_stop,
        args=(run.id,),
        icon=":material/stop:",
        disabled=run.state == "stopping",
    )


@store.act
def _stop(run_id: str) -> None:
    store.stop_run(run_id)


def change_picks(**changes: object) -> None:
    """Change picked or frozen layers, and say which gave way, because no layer can be both."""
    space = store.current()
    way: words.GaveWay = "picked"
    if "freeze" in changes:
        way = "frozen" if space.picks.plan_file is None else "kept"
    gave_way = space.change_picks(**changes)
    if gave_way:
        store.notice("info", words.gave_way(gave_way, way))


def warn_of_other_images(plan: ReinitPlan) -> None:
    """Say so where a plan was chosen on other images than those that are chosen now."""
    if store.made_for_other_images(plan):
        st.warning(
            "This plan was chosen on other images than those that are chosen now. Make it again "
            "on the page Look, or choose its images again."
        )


def set_layers(layers: Iterable[str], *, patterns: tuple[Pattern, ...] | None = None) -> bool:
    """Pick these layers by hand, in forward order, and return whether that was done.

    It is not while a rule's plan of units or weights stands. A unit's weights lie in several
    layers, and a layer is reset in part: with a whole layer more or less it would be another plan.

    Args:
        layers: All that are to be picked.
        patterns: How they were named; None keeps those that stand.
    """
    space = store.current()
    if space.picks.plan_file is not None:
        st.toast(
            "The plan stays as it is: it resets parts of layers, so whole layers cannot be added "
            "or removed. Clear it to pick layers by hand."
        )
        return False
    outline, _ = store.outline_if_ready(space.choice)
    # In forward order, so that the same pick always makes the same plan.
    order = {layer.name: layer.index for layer in outline.layers} if outline else {}
    kept = tuple(sorted(dict.fromkeys(layers), key=lambda name: order.get(name, len(order))))
    if patterns is None:
        patterns = space.picks.patterns if kept else ()
    change_picks(layers=kept, patterns=patterns)
    return True


@contextmanager
def showing_errors() -> Iterator[None]:
    """Show an error that a person can mend as a sentence, and let the page go on."""
    try:
        yield
    except LimberError as error:
        st.error(words.escape(words.sentence(error)))


def outcome(run: store.RunView) -> None:
    """Say how a run ended, unless it ended well."""
    if run.state == "failed":
        st.error(words.escape(run.message or "The run failed."))
    elif run.state == "stopped":
        st.info("Stopped. What it had finished is kept.")
