"""Earlier work is listed and comes back at a click."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dashboard import store
from dashboard.store import workspace as workspace_room
from tests.pages import (
    WORKSPACE,
    assert_well,
    earlier,
    open_app,
    put_work,
    shown,
    space,
)

pytestmark = pytest.mark.usefixtures("fresh_queue")


def test_earlier_work_is_listed_the_last_used_first_and_opens_at_a_click() -> None:
    workspace_room.workspace(put_work(1, runs=2)).set_name("second look")
    os.utime(space().folder.parent / f"{1:016x}" / "workspace.json", (1e9, 1e9))
    put_work(2, checkpoint="somewhere/mine.pth")
    workspace_room.workspace(f"{3:016x}")  # opened and left as it was
    app = open_app()

    assert earlier(app) == [
        "EfficientNet-Lite0 from mine.pth on Chest X-rays (pneumonia), no runs, 09 Sep 2001",
        "second look, EfficientNet-Lite0 on Chest X-rays (pneumonia), 2 runs, 09 Sep 2001",
    ]
    app.session_state["left_over"] = 1
    app.button(key=f"open_{1:016x}").click().run()

    assert_well(app)
    assert app.query_params["w"] in (f"{1:016x}", [f"{1:016x}"])
    assert "left_over" not in app.session_state
    assert app.text_input(key="work_name").value == "second look"
    assert "Chest X-rays" in shown(app)
    app.button(key="start_fresh").click().run()
    assert_well(app)
    assert "BloodMNIST" in shown(app)
    assert len(earlier(app)) == 2


def test_without_earlier_work_the_list_says_so() -> None:
    app = open_app()

    assert earlier(app) == []
    assert "There is none on this machine yet" in shown(app)
    assert app.button(key="start_fresh").disabled


def test_a_name_is_kept_with_the_work() -> None:
    app = open_app()

    app.text_input(key="work_name").set_value(" X-rays, first try ").run()

    assert_well(app)
    assert space().name == "X-rays, first try"


def test_a_few_are_shown_and_the_rest_on_demand() -> None:
    for number in range(1, 12):
        put_work(number)
    app = open_app()

    before = len(earlier(app))
    app.button(key="earlier_show_more").click().run()

    assert (before, len(earlier(app))) == (8, 11)


@pytest.mark.parametrize(
    "content", ["", "{half", "[]", "null", '{"choice": 3}', '{"version": 9}', "[" * 100_000, "\0"]
)
def test_work_that_cannot_be_read_does_not_break_the_list(limber_home: Path, content: str) -> None:
    put_work(1)
    broken = limber_home / "workspaces" / f"{2:016x}"
    broken.mkdir()
    (broken / "workspace.json").write_text(content, encoding="utf-8")
    (limber_home / "workspaces" / f"{3:016x}").write_text("a file")
    (limber_home / "workspaces" / "no workspace").mkdir()
    (limber_home / "workspaces" / f"{4:016x}").symlink_to("nowhere")
    (limber_home / "workspaces" / f"{5:016x}" / "workspace.json").mkdir(parents=True)

    assert [work.id for work in store.recent_work(without=WORKSPACE)] == [f"{1:016x}"]


def test_work_that_is_gone_when_it_is_clicked_gives_a_sentence(limber_home: Path) -> None:
    put_work(1)
    app = open_app()
    shutil.rmtree(limber_home / "workspaces" / f"{1:016x}")

    app.button(key=f"open_{1:016x}").click().run()

    assert_well(app)
    assert "no longer on this machine" in app.info[0].value
    assert app.query_params["w"] in (WORKSPACE, [WORKSPACE])
    assert earlier(app) == []
