"""Runs in the background: their order, their end, and what a later server makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dashboard.store import runs as run_room
from dashboard.store.runs import RunQueue
from tests.pages import (
    CRASH,
    FINISH,
    IGNORE_STOP,
    WAIT_FOR_STOP,
    put_run,
    space,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("fresh_queue")


def start(queue: RunQueue) -> str:
    def argv(folder: Path) -> list[str]:
        return ["--events", str(folder / "events.jsonl"), "--stop-file", str(folder / "stop")]

    return queue.start("finetune", space().folder, argv, {})


def test_a_worker_that_ignores_stop_is_ended_with_its_group(
    worker: Callable[[str], None], fresh_queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_room, "TERM_AFTER_S", 0.2)
    monkeypatch.setattr(run_room, "KILL_AFTER_S", 0.5)
    worker(IGNORE_STOP)
    run_id = start(fresh_queue)
    wait_until(lambda: bool(fresh_queue.view(space().folder, run_id).steps))

    fresh_queue.stop(run_id)
    wait_until(lambda: not fresh_queue.live())

    assert fresh_queue.view(space().folder, run_id).state == "stopped"


def test_runs_wait_their_turn(worker: Callable[[str], None], fresh_queue: RunQueue) -> None:
    worker(WAIT_FOR_STOP)
    first, second = start(fresh_queue), start(fresh_queue)
    assert fresh_queue.view(space().folder, second).state == "queued"

    fresh_queue.stop(first)
    wait_until(lambda: fresh_queue.view(space().folder, second).state == "running")

    assert fresh_queue.view(space().folder, first).state == "stopped"


def test_a_crash_is_told_with_the_place_of_the_log(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(CRASH)
    run_id = start(fresh_queue)

    wait_until(lambda: not fresh_queue.live())

    view = fresh_queue.view(space().folder, run_id)
    assert view.state == "failed"
    assert "exit code 7" in str(view.message)
    assert "stderr.log" in str(view.message)


def test_a_worker_that_outlived_its_server_is_adopted(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    run_id = start(fresh_queue)
    wait_until(lambda: fresh_queue.view(space().folder, run_id).total == 60)

    later = RunQueue()
    later.recover()
    adopted = later.live()
    later.stop(run_id)
    wait_until(lambda: not later.live())

    assert [run.id for run in adopted] == [run_id]
    assert len(adopted[0].steps) == 22
    assert later.view(space().folder, run_id).state == "stopped"


def test_a_run_whose_worker_died_with_its_server_is_marked_failed() -> None:
    folder = put_run("finetune", state="running")

    later = RunQueue()
    later.recover()

    view = later.view(space().folder, folder.name)
    assert view.state == "failed"


def test_a_finished_run_is_done(worker: Callable[[str], None], fresh_queue: RunQueue) -> None:
    worker(FINISH)
    run_id = start(fresh_queue)

    wait_until(lambda: not fresh_queue.live())

    view = fresh_queue.view(space().folder, run_id)
    assert view.state == "done"
    assert {curve.arm for curve in view.curves()} == {"untouched", "plan"}
