"""A Plotly figure that stays mounted, reports clicks on cells, and updates in place.

`st.plotly_chart` identifies a chart by its figure, so every change of the data
throws away zoom and legend, and it cannot report clicks on heatmap cells. This
component keeps one element per key and hands new figures to `Plotly.react`.

A callback reads what happened with `read_event`:

    def picked() -> None:
        event = plot.read_event("strip")
        if event is not None:
            store.select(event.names, extend=event.additive)

    plot.plot(figure, key="strip", height=320, alt="Layers by metric", on_event=picked)

Only points with a name report: a click on a point without `customdata` stays in
the browser, so a plain curve never causes a rerun.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import plotly
import plotly.graph_objects as go
import streamlit as st
from plotly.io.json import to_json_plotly
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from dashboard import words

if TYPE_CHECKING:
    from starlette.requests import Request
    from streamlit.components.v2.types import ComponentRenderer

__all__ = ["PlotEvent", "plot", "read_event", "routes"]

_EVENT = "event"
_FOLDER = Path(__file__).resolve().parent
# Under which address the browser finds each file. `plot.js` finds the others next to itself.
_FILES = {name: _FOLDER / name for name in ("plot.js", "cells.js", "plot.css")} | {
    "plotly.min.js": Path(plotly.__file__).resolve().parent / "package_data" / "plotly.min.js"
}
_ADDRESS = "/limber/plot"
# All that Streamlit hands to the browser. It would send a longer script again with every update.
_ENTRY = """
const address = new URL("ADDRESS/plot.js", location.origin);
const { default: draw } = await import(address);
export default draw;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotEvent:
    """What a person picked in a figure.

    Attributes:
        kind: "click" for one place (mouse, touch or keyboard), "box" for a dragged
            rectangle.
        names: Layer names from `customdata`, each once, from left to right. Never
            empty: places without a name do not report.
        additive: Shift, Ctrl or Meta was held, so the names extend a selection.
        x: Label of the clicked point on the x axis; None for a box.
        y: Label of the clicked point on the y axis; None for a box.
    """

    kind: Literal["click", "box"]
    names: tuple[str, ...]
    additive: bool
    x: str | float | None = None
    y: str | float | None = None


def plot(
    figure: go.Figure | dict[str, Any],
    *,
    key: str,
    height: int,
    alt: str,
    on_event: Callable[[], None] | None = None,
    hatch_missing: bool = False,
) -> PlotEvent | None:
    """Draw a figure, or update the one already drawn under this key.

    Zoom, legend and tool choice survive an update as long as the figure's
    `layout.uirevision` (by default the key) stays the same. The figure's own
    template is dropped: fonts and colours come from the page's theme, and whatever
    the figure sets explicitly wins over them.

    Args:
        figure: Traces and layout. Layer names travel in `customdata`: for a heatmap
            a 2-D array of the shape of z, for scatter and bars one entry a point;
            an entry is the name, or a list that begins with it, or None. Pass
            numbers as numpy arrays; they cross the wire as packed bytes. A dict is
            validated first, which costs a few milliseconds. `width`, `height` and
            frames are ignored.
        key: Identity of the element on the page, and its entry in session state.
        height: Height in CSS pixels, reserved before anything is drawn.
        alt: One sentence that says what the figure shows, for screen readers.
        on_event: Called once for each event, before the rerun, with no arguments;
            read the event with `read_event(key)`. Inside a fragment only the
            fragment reruns.
        hatch_missing: Hatch the background of the plot area, so that cells without a
            value read as "not applicable".

    Returns:
        The event that caused this run, or None. Reported in one run only.

    Raises:
        ValueError: `alt` is blank, or `height` is not positive.
    """
    if not alt.strip():
        raise ValueError(f"Plot {key!r} has no alt text. Say in one sentence what it shows.")
    if height <= 0:
        raise ValueError(f"Plot {key!r} asks for a height of {height} px. Give a positive one.")
    traces, layout = _texts(figure, key)
    result = _component()(
        key=key,
        data={
            "traces": traces,
            "layout": layout,
            "height": height,
            "alt": words.clean(alt),
            "hatch": hatch_missing,
            "file": key,
        },
        height=height,
        # Streamlit reports a trigger only if it has a callback.
        on_event_change=on_event if on_event is not None else _ignore,
    )
    return _parse(result.get(_EVENT))


def read_event(key: str) -> PlotEvent | None:
    """Return the event that caused this run, from inside a callback or after it.

    Args:
        key: The key given to `plot`.

    Returns:
        The event, or None if this run has another cause, the plot was not drawn
        in the last run, or the browser sent something malformed.
    """
    value = st.session_state.get(key)
    return _parse(value.get(_EVENT)) if isinstance(value, Mapping) else None


def _texts(figure: go.Figure | dict[str, Any], key: str) -> tuple[str, str]:
    """Return traces and layout as JSON.

    They are separate texts, because the browser keeps the parsed traces while their text stays
    the same. That makes a change of shapes cheap.
    """
    given = (figure if isinstance(figure, go.Figure) else go.Figure(figure)).to_dict()
    layout = _cleaned(given["layout"])
    layout.pop("template", None)
    layout.setdefault("uirevision", key)
    return to_json_plotly(_cleaned(given["data"])), to_json_plotly(layout)


def _cleaned(value: Any) -> Any:
    """Return part of a figure with every text in it cleaned: names may come from a stranger's file.

    Layer names in `customdata` are not shown and come back with a click, so they stay as they are.
    """
    if isinstance(value, str):
        return words.clean(value)
    if isinstance(value, Mapping):
        return {key: part if key == "customdata" else _cleaned(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(part) for part in value]
    return value


def _ignore() -> None:
    """Stand in for a missing callback."""


def _parse(payload: object) -> PlotEvent | None:
    """Check what the browser sent. Anything unexpected counts as no event, never as an error."""
    if not isinstance(payload, Mapping):
        return None
    kind, names = payload.get("kind"), payload.get("names")
    if kind not in ("click", "box") or not isinstance(names, list) or not names:
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    x, y = (
        value if isinstance(value := payload.get(axis), str | int | float) else None
        for axis in ("x", "y")
    )
    return PlotEvent(
        kind=kind,
        names=tuple(dict.fromkeys(names)),
        additive=payload.get("additive") is True,
        x=x,
        y=y,
    )


def routes() -> list[Route]:
    """Return the addresses from which the browser reads the component's files."""

    async def answer(request: Request) -> Response:
        path = _FILES.get(request.path_params["name"])
        # The browser asks each time whether its copy is still good, which costs no bytes.
        headers = {"Cache-Control": "no-cache"}
        return Response(status_code=404) if path is None else FileResponse(path, headers=headers)

    return [Route(_ADDRESS + "/{name}", answer, methods=["GET"])]


@functools.cache
def _component() -> ComponentRenderer:
    """Create the renderer once. It registers itself again with a later server."""
    base = str(st.get_option("server.baseUrlPath") or "").strip("/")
    script = _ENTRY.replace("ADDRESS", f"/{base}{_ADDRESS}" if base else _ADDRESS)
    return st.components.v2.component("limber.plot", js=script, isolate_styles=False)
