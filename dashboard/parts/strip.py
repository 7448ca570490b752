"""The strip of layers, where looking and picking happen, and the findings above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from core.records import Diagnosis, Finding, ModelOutline
from dashboard import charts, frame, plot, store, words

if TYPE_CHECKING:
    from core.catalogue.metrics import MetricInfo

HEATMAP = "strip"
OPENED = "opened_layer"
SEARCH = "strip_layer"
FOLD = "strip_fold"
TOP = 10
SEVERITY_ICONS = {
    "warning": ":material/warning:",
    "notice": ":material/visibility:",
    "info": ":material/info:",
}
SCALES = {"auto": "Each metric's own", "linear": "Linear", "log": "Logarithmic"}
# Parts of the width that the strip and an open layer take.
SHARES = (5, 4)
CLOSED = (1, 0.001)
PHONE_LABELS_PX = 150
PHONE_LAYER_PX = 9


@dataclass(frozen=True, slots=True)
class View:
    """What a person wants to see of the strip.

    Attributes:
        colour: Which number colours a cell.
        infos: The rows.
        fade: Whether to fade what is noise.
        scale: "auto", "linear" or "log".
        fold: Stages that are one column.
    """

    colour: charts.HeatView
    infos: list[MetricInfo]
    fade: bool
    scale: str
    fold: tuple[str, ...]


def findings(shown: Sequence[Finding], *, key: str, disabled: bool = False) -> None:
    """List findings as sentences; a click on one picks its layers."""
    with st.container(gap=None, key=key):
        for index, finding in enumerate(shown):
            st.button(
                words.escape(words.finding_line(finding)),
                key=f"{key}_{index}",
                type="tertiary",
                icon=SEVERITY_ICONS[finding.severity],
                on_click=_pick_finding,
                disabled=disabled,
                args=(finding.layers,),
                wrap=True,
                help="Pick these layers, and only these. Undo brings the old pick back.",
            )


@store.act
def _pick_finding(layers: tuple[str, ...]) -> None:
    if frame.set_layers(layers, patterns=()):
        st.toast(f"{words.count(len(layers), 'layer')} picked")


def strip(space: store.Workspace, diagnosis: Diagnosis, *, stale: bool) -> DeltaGenerator | None:
    """Draw the strip of a measured network.

    Returns:
        The place for the open layer, next to the strip; None while no layer is open.
    """
    view = _controls(diagnosis)
    drawn = charts.folded(diagnosis, view.fold, view.infos) if view.fold else diagnosis
    names = [layer.name for layer in drawn.layers]
    opened = opened_layer(diagnosis)
    # Always two columns: in another place on the page the browser would draw the strip anew.
    place, beside = st.columns(SHARES if opened is not None else CLOSED, gap="small")
    picks = space.picks
    with place:
        with _scrolling(len(names)):
            plot.plot(
                charts.layer_heatmap(
                    drawn,
                    view.infos,
                    view=view.colour,
                    fade=view.fade,
                    scale=view.scale,
                    picked=() if stale else picks.layers,
                    frozen=() if stale else picks.freeze,
                    opened=opened,
                    dark=frame.is_dark(),
                ),
                key=HEATMAP,
                height=charts.heatmap_height(len(view.infos) + 1),
                on_event=_on_cells,
                hatch_missing=True,
                alt=f"Heatmap of {len(view.infos)} metrics by {len(names)} layers in forward "
                "order. The first row is your plan",
            )
        st.caption(words.escape(_legend(view)))
    return None if opened is None else beside


def _legend(view: View) -> str:
    faded = "Faded: these images cannot tell it from the fresh twin. " if view.fade else ""
    return (
        "\N{BLACK UP-POINTING TRIANGLE} high is stiff, \N{BLACK DOWN-POINTING TRIANGLE} low is "
        f"stiff. Hatched: not applicable, or not measured. {words.dots(view.colour)}{faded}Click a "
        f'cell to open its layer, or its place in the row "{charts.PLAN_ROW}" to pick it. Hold '
        "Shift or drag a box to pick several. Keys: Tab to the heatmap, arrows, Enter."
    )


def sizes(space: store.Workspace, outline: ModelOutline) -> None:
    """Draw the strip of a network that is not measured: its layers by size."""
    with _scrolling(len(outline.layers)):
        plot.plot(
            charts.layer_strip(outline, picked=space.picks.layers, dark=frame.is_dark()),
            key=HEATMAP,
            height=charts.heatmap_height(2),
            on_event=_on_cells,
            alt=f"Strip of {len(outline.layers)} layers in forward order, by size",
        )
    st.caption("Click a layer to pick it or to unpick it. Measuring adds a row for each metric.")


def opened_layer(diagnosis: Diagnosis) -> str | None:
    """Return the layer that is open, if this diagnosis has it."""
    name = st.session_state.get(OPENED)
    return name if name is not None and diagnosis.layer(name) is not None else None


def show(name: str | None) -> None:
    """Open a layer, or none."""
    st.session_state[OPENED] = name


def _controls(diagnosis: Diagnosis) -> View:
    """Draw the choice of colours and rows; return what was chosen."""
    layer_infos = [info for info in store.metric_infos() if info.level == "layer"]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        colour = st.segmented_control(
            "Colour",
            tuple(words.VIEWS),
            default="ratio",
            required=True,
            format_func=words.VIEWS.__getitem__,
            key="strip_view",
            wrap=True,
            help=words.VIEW_HELP,
        )
        rows = st.segmented_control(
            "Metrics",
            tuple(words.METRIC_CHOICES),
            default="main",
            required=True,
            key="strip_rows",
            wrap=True,
            format_func=words.METRIC_CHOICES.__getitem__,
        )
        st.selectbox(
            "Layer",
            [layer.name for layer in diagnosis.layers],
            index=None,
            placeholder="Find a layer",
            key=SEARCH,
            width=170,
            on_change=_on_search,
        )
        with st.popover("More"):
            fade = st.toggle("Fade noise", value=True, key="strip_fade", help=words.FADE_HELP)
            scale = st.selectbox(
                "Scale of values",
                tuple(SCALES),
                format_func=SCALES.__getitem__,
                key="strip_scale",
                help="How values and twin values spread over the colours. Ratios are always "
                "logarithmic.",
            )
            fold = st.multiselect(
                "Fold stages",
                charts.stages(diagnosis),
                key=FOLD,
                placeholder="none",
                help="A folded stage is one column, which shows the stiffest of its layers. A "
                "click on it unfolds it.",
            )
            _top(diagnosis, layer_infos)
    chosen = {
        "main": [info for info in layer_infos if info.name in words.MAIN_METRICS],
        "all": layer_infos,
    }.get(rows or "main", [info for info in layer_infos if info.family == rows])
    # A row without a figure for this network would be hatched from end to end.
    filled = [info for info in chosen if _anywhere(diagnosis, info)]
    return View(colour or "ratio", filled or chosen, fade and colour == "ratio", scale, tuple(fold))


def _top(diagnosis: Diagnosis, infos: Sequence[MetricInfo]) -> None:
    """Draw the choice of the stiffest layers by one metric."""
    judged = {info.name: info for info in infos if info.bad and _anywhere(diagnosis, info)}
    name = st.selectbox(
        f"The {TOP} stiffest layers by",
        tuple(judged),
        format_func=lambda metric: judged[metric].title,
        key="strip_top",
    )
    st.button(
        f"Pick these {TOP:d}",
        key="strip_top_pick",
        on_click=_pick_top,
        args=(name, diagnosis),
        disabled=name is None,
    )


@store.act
def _pick_top(name: str, diagnosis: Diagnosis) -> None:
    info = next(info for info in store.metric_infos() if info.name == name)
    figures = {
        layer.name: layer.metrics[name].value
        for layer in diagnosis.layers
        if name in layer.metrics and not layer.head
    }
    known = {layer: value for layer, value in figures.items() if value is not None}
    worst = sorted(known, key=lambda layer: known[layer], reverse=info.bad == "high")
    _pick_finding(tuple(worst[:TOP]))


def _anywhere(diagnosis: Diagnosis, info: MetricInfo) -> bool:
    return any(
        layer.metrics[info.name].value is not None
        for layer in diagnosis.layers
        if info.name in layer.metrics
    )


@contextmanager
def _scrolling(layers: int) -> Iterator[None]:
    """Hold a chart of that many layers; on a phone it scrolls sideways."""
    with st.container(key="layers_scroll"):
        # In the container, so that it takes no room of its own on the page.
        st.html(
            "<style>@media (max-width: 640px) { .st-key-layers_scroll > div { min-width: "
            f"{PHONE_LABELS_PX + PHONE_LAYER_PX * layers}px; }} }}</style>"
        )
        yield


@store.act
def _on_search() -> None:
    name = st.session_state.get(SEARCH)
    if name is not None:
        show(str(name))
        # So that the same layer can be found again.
        st.session_state[SEARCH] = None


@store.act
def _on_cells() -> None:
    event = plot.read_event(HEATMAP)
    if event is None:
        return
    unfolded = [
        name.removeprefix(charts.FOLDED) for name in event.names if name.startswith(charts.FOLDED)
    ]
    if event.kind == "click" and unfolded:
        kept = [stage for stage in st.session_state.get(FOLD, []) if stage not in unfolded]
        st.session_state[FOLD] = kept
        return
    space = store.current()
    stored = store.latest_diagnosis()
    layers = space.picks.layers
    # Row 0 is the plan, or the only one of a network that is not measured.
    picks = event.kind == "box" or event.additive or event.y == 0
    if not picks:
        show(event.names[0])
        return
    if stored is not None and store.is_stale(stored.diagnosis, space.choice):
        st.toast("This was measured before you changed the network or the images. Measure again.")
        return
    named = [name for name in event.names if not name.startswith(charts.FOLDED)]
    new = [name for name in named if name not in layers]
    if event.kind == "click" and not new:
        frame.set_layers(name for name in layers if name not in event.names)
    else:
        frame.set_layers((*layers, *new))
