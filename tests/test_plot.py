"""The component that draws figures: what it sends to the browser and takes from it."""

from __future__ import annotations

import json
import re
from typing import Any

import plotly.graph_objects as go
import pytest

from dashboard import plot
from tests.pages import (
    HOSTILE,
    STEERING,
)


def test_a_figure_shows_no_name_that_steers_it_and_knows_its_layers_by_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(plot, "_component", lambda: lambda **given_: sent.update(given_) or {})
    figure = go.Figure(
        go.Heatmap(
            z=[[1.0]],
            y=[HOSTILE],
            customdata=[[HOSTILE]],
            hovertext=[[HOSTILE]],
            hovertemplate=HOSTILE,
            name=HOSTILE,
        ),
        layout={"title": {"text": HOSTILE}, "xaxis": {"ticktext": [HOSTILE], "tickvals": [0]}},
    )

    plot.plot(figure, key="k", height=100, alt=HOSTILE)

    (trace,) = json.loads(sent["data"]["traces"])
    assert trace.pop("customdata") == [[HOSTILE]]
    for shown_part in (trace, json.loads(sent["data"]["layout"]), sent["data"]["alt"]):
        texts = json.dumps(shown_part, ensure_ascii=False)
        assert "evil" in texts
        assert not STEERING.search(texts)
        assert not re.search(r"\\u00[01]", texts.replace("\\\\", "")), texts


@pytest.mark.parametrize(
    ("event", "names"),
    [
        ({"kind": "click", "names": ["a", "b", "a"], "x": "a", "y": 2}, ("a", "b")),
        ({"kind": "box", "names": ["a"], "additive": True}, ("a",)),
        ({"kind": "click", "names": []}, None),
        ({"kind": "click", "names": [3]}, None),
        ({"kind": "hover", "names": ["a"]}, None),
        ({"names": ["a"]}, None),
        ("click", None),
        (None, None),
    ],
)
def test_an_event_is_what_the_browser_should_send_or_none(
    event: object, names: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot.st, "session_state", {"chart": {"event": event}})

    read = plot.read_event("chart")

    assert (None if read is None else read.names) == names
    if read is not None and isinstance(event, dict):
        assert read.additive is bool(event.get("additive", False))
        assert (read.kind, read.x, read.y) == (event["kind"], event.get("x"), event.get("y"))


@pytest.mark.parametrize(("alt", "height"), [(" ", 100), ("Layers by metric", 0)])
def test_a_figure_without_words_or_room_is_refused(alt: str, height: int) -> None:
    with pytest.raises(ValueError, match=r"Say in one sentence|Give a positive one"):
        plot.plot(go.Figure(), key="k", height=height, alt=alt)
