"""The script of every page: what it opens on, and what it does before anybody may see a page."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import words
from dashboard.store import workspace as workspace_room
from dashboard.store.runs import RunQueue
from tests.pages import (
    APP,
    PATIENCE_S,
    assert_well,
    open_app,
    outline,
    put_work,
    shown,
)

pytestmark = pytest.mark.usefixtures("fresh_queue")


def test_the_app_opens_on_the_embedded_example_already_measured(fresh_queue: RunQueue) -> None:
    app = open_app()

    text = shown(app)
    assert "EfficientNet-Lite0" in text
    assert "BloodMNIST (blood cells)" in text
    assert "Where is it stiff?" in text
    assert [button.key for button in app.button if str(button.key).startswith("findings_")]
    assert app.button(key="measure_start").label == "Measure now"
    assert not fresh_queue.live()


def test_bringing_ones_own_is_one_click_away() -> None:
    app = open_app()

    app.switch_page("views/choose.py").run()

    assert_well(app)
    assert words.head_sentence(outline()) in shown(app)


def test_a_malformed_workspace_in_the_address_never_becomes_a_path(limber_home: Path) -> None:
    app = AppTest.from_file(APP, default_timeout=PATIENCE_S)
    app.query_params["w"] = "../../outside"

    app.run()

    assert_well(app)
    assert workspace_room.WORKSPACE_ID.fullmatch("".join(app.query_params["w"]))
    assert not (limber_home.parent / "outside").exists()


def test_nothing_is_shown_or_kept_before_a_login_that_is_asked_for(limber_home: Path) -> None:
    put_work(1)
    app = AppTest.from_file(APP, default_timeout=PATIENCE_S)
    app.secrets["auth"] = {"client_id": "limber"}
    app.query_params["w"] = f"{1:016x}"

    app.run()

    assert_well(app)
    assert app.button(key="log_in")
    assert len(app.button) == 1
    assert "Chest" not in shown(app)
    assert [path.name for path in (limber_home / "workspaces").iterdir()] == [f"{1:016x}"]


def test_pages_that_anyone_could_reach_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashboard.gate.is_closed", lambda: True)

    app = AppTest.from_file(APP, default_timeout=PATIENCE_S).run()

    assert "streamlit run dashboard/app.py" in app.error[0].value
    assert not app.button
