"""The strip of layers: search, the stiffest ten, the open layer and its neighbours."""

from __future__ import annotations

import ast

import pytest

import core
from dashboard import charts, plot, store
from dashboard.parts import strip
from tests.pages import PICKED, ROOT, assert_well, open_app, shown, space

pytestmark = pytest.mark.usefixtures("fresh_queue")


def event(**facts: object) -> plot.PlotEvent:
    return plot.PlotEvent(**{"kind": "click", "names": PICKED[:1], "additive": False, **facts})


def after(monkeypatch: pytest.MonkeyPatch, happened: plot.PlotEvent) -> tuple[str, ...]:
    """Return what is picked after a person did that in the strip."""
    monkeypatch.setattr(store, "current", space)
    monkeypatch.setattr(store, "latest_diagnosis", lambda: None)
    monkeypatch.setattr(plot, "read_event", lambda key: happened)
    opened: list[str | None] = []
    monkeypatch.setattr(strip, "show", opened.append)
    strip._on_cells()
    return (*space().picks.layers, *(f"opened {name}" for name in opened))


def test_a_click_in_the_plans_row_picks_and_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    open_app()

    assert after(monkeypatch, event(y=0)) == PICKED[:1]
    assert after(monkeypatch, event(y=0)) == ()


def test_a_click_on_a_figure_opens_its_layer_and_picks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_app()

    assert after(monkeypatch, event(y=3)) == (f"opened {PICKED[0]}",)


@pytest.mark.parametrize("how", [{"additive": True, "y": 3}, {"kind": "box", "names": PICKED}])
def test_shift_and_a_box_pick_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, object]
) -> None:
    open_app()

    assert after(monkeypatch, event(**how)) == how.get("names", PICKED[:1])


def test_a_folded_stage_unfolds_at_a_click_and_is_never_picked() -> None:
    app = open_app()
    stage = app.multiselect(key="strip_fold").options[0]

    app.multiselect(key="strip_fold").set_value([stage]).run()

    assert_well(app)
    assert app.session_state["strip_fold"] == [stage]
    assert space().picks.layers == ()


def test_a_box_over_a_folded_stage_picks_the_layers_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_app()

    names = (f"{charts.FOLDED}blocks.1", *PICKED)
    assert after(monkeypatch, event(kind="box", names=names)) == PICKED


def test_search_opens_a_layer_and_its_neighbours_are_a_click_away() -> None:
    app = open_app()
    names = app.selectbox(key="strip_layer").options

    app.selectbox(key="strip_layer").set_value(names[5]).run()
    assert_well(app)
    assert f"#### {names[5]}".replace("_", "\\_") in shown(app)

    app.button(key="layer_next").click().run()
    assert app.session_state[strip.OPENED] == names[6]
    app.button(key="layer_previous").click().run()
    assert app.session_state[strip.OPENED] == names[5]
    app.button(key="layer_close").click().run()
    assert_well(app)
    assert not [button for button in app.button if button.key == "layer_close"]


def test_the_ten_stiffest_layers_by_a_metric_are_picked_at_a_click() -> None:
    app = open_app()
    diagnosis = core.read_diagnosis(store.example.example_path(space().choice))

    app.selectbox(key="strip_top").set_value("saturated_fraction").run()
    app.button(key="strip_top_pick").click().run()

    assert_well(app)
    figures = {
        layer.name: layer.metrics["saturated_fraction"].value or 0.0 for layer in diagnosis.layers
    }
    expected = sorted(figures, key=lambda name: figures[name], reverse=True)[:10]
    assert set(space().picks.layers) == set(expected)


def test_no_private_module_of_streamlit_is_imported() -> None:
    public = {
        "streamlit",
        "streamlit.delta_generator",
        "streamlit.testing.v1",
        "streamlit.components.v2.types",
    }
    private = []
    for path in sorted((ROOT / "dashboard").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # What only a type checker reads cannot break a newer Streamlit.
        unread = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in unread:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            private += [
                f"{path.name}: {name}"
                for name in names
                if name.partition(".")[0] == "streamlit" and name not in public
            ]

    assert private == []
