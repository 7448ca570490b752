"""The queue and the workspace when disks, machines, people and other servers interfere."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from streamlit.testing.v1 import AppTest

from core.errors import LimberError
from dashboard.store import run_folder
from dashboard.store import runs as run_room
from dashboard.store import workspace as workspace_room
from dashboard.store.runs import RunQueue
from dashboard.store.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
APP = str(ROOT / "dashboard" / "main.py")
SPACE = "0123456789abcdef"
PATIENCE_S = 60.0

# Stands in for `python -m core`, in milliseconds: says a step, then does what it is told.
WORKER = """
import json, os, pathlib, sys, time
arguments = sys.argv[1:]
value = lambda flag: pathlib.Path(arguments[arguments.index(flag) + 1])
events = value("--events").open("a")
def say(**event):
    events.write(json.dumps({**event, "t": 1e12}) + chr(10)); events.flush()
say(event="step", arm="plan", seed=0, step=0, train_loss=None, val_accuracy=0.5, wall_s=0.0)
"""
FINISH = 'say(event="done", out="x")'
WAIT = """
while not value("--stop-file").exists(): time.sleep(0.01)
say(event="stopped")
"""
# Says nothing any more and ends well, as a worker whose events have no room.
SILENT = ""
SHORT = "time.sleep(0.3); " + FINISH

Act = Callable[[str], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "POLL_S": 0.02,
        "AGAIN_S": 0.1,
        "TERM_AFTER_S": 0.2,
        "KILL_AFTER_S": 0.5,
    }.items():
        monkeypatch.setattr(run_room, name, value)


@pytest.fixture
def queue(limber_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    own = RunQueue()
    monkeypatch.setattr(run_room, "queue", own)
    yield own
    for run in own.live():
        own.stop(run.id)
    wait_until(lambda: not own.live())
    own.close()


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Act:
    """Replace the worker by one that does what it is told."""

    def set_act(act: str) -> None:
        def launch(argv: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", WORKER + act, *argv],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

        monkeypatch.setattr(RunQueue, "_launch", staticmethod(launch))

    return set_act


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def folder() -> Path:
    return workspace_room.home() / "workspaces" / SPACE


def start(queue: RunQueue, kind: Any = "finetune") -> str:
    def argv(place: Path) -> list[str]:
        return ["--events", str(place / "events.jsonl"), "--stop-file", str(place / "stop")]

    return queue.start(kind, folder(), argv, {})


def state(queue: RunQueue, run_id: str) -> str:
    view = queue.view(folder(), run_id)
    assert view is not None
    return view.state


def record(run_id: str) -> dict[str, Any]:
    return json.loads((folder() / "runs" / run_id / "run.json").read_text("utf-8"))


def failing(
    monkeypatch: pytest.MonkeyPatch, number: int, suffix: str = "run.json"
) -> Callable[[bool], None]:
    """Let every write of such a file fail, until told otherwise."""
    fails = [False]
    real = workspace_room.write_atomically

    def write(path: Path, text: str, **how: bool) -> None:
        if fails[0] and path.name == suffix:
            raise OSError(number, os.strerror(number), str(path))
        real(path, text, **how)

    monkeypatch.setattr(run_folder, "write_atomically", write)
    monkeypatch.setattr(workspace_room, "write_atomically", write)

    def set_fails(now: bool) -> None:
        fails[0] = now

    return set_fails


# A disk that takes nothing

TROUBLES = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE]


@pytest.mark.parametrize("number", TROUBLES, ids=errno.errorcode.get)
def test_a_run_that_ends_on_a_full_disk_holds_nobody_up_and_is_saved_later(
    number: int, queue: RunQueue, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(WAIT)
    full = failing(monkeypatch, number)
    first = start(queue)
    wait_until(lambda: state(queue, first) == "running")
    full(True)
    queue.stop(first)

    wait_until(lambda: not queue.live())

    assert state(queue, first) == "stopped"
    assert record(first)["state"] == "running"
    assert "saved as soon as there is room" in queue.troubles()[0]
    with pytest.raises(LimberError, match="Nothing was started"):
        start(queue)
    full(False)
    act(FINISH)
    second = start(queue)
    wait_until(lambda: state(queue, second) == "done")
    wait_until(lambda: not queue.troubles())
    assert record(first)["state"] == "stopped"
    assert {path.name for path in (folder() / "runs").iterdir()} == {first, second}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_run_for_which_the_machine_has_no_room_waits(
    number: int, queue: RunQueue, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(FINISH)
    real, refuse = RunQueue._launch, [True]

    def launch(*words: Any) -> subprocess.Popen[bytes]:
        if refuse[0]:
            raise OSError(number, os.strerror(number))
        return real(*words)

    monkeypatch.setattr(RunQueue, "_launch", staticmethod(launch))

    run_id = start(queue)
    time.sleep(0.3)

    view = queue.view(folder(), run_id)
    assert view is not None
    assert view.state == "queued"
    assert view.phase.startswith("Waiting until ")
    assert queue.troubles()
    refuse[0] = False
    wait_until(lambda: state(queue, run_id) == "done")
    assert not queue.troubles()


@pytest.mark.parametrize("error", [ValueError("embedded null byte"), FileNotFoundError(2, "no")])
def test_a_run_that_can_never_start_fails_and_the_next_one_runs(
    error: Exception, queue: RunQueue, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(FINISH)
    real, wrong = RunQueue._launch, [error]

    def launch(*words: Any) -> subprocess.Popen[bytes]:
        if wrong:
            raise wrong.pop()
        return real(*words)

    monkeypatch.setattr(RunQueue, "_launch", staticmethod(launch))

    first, second = start(queue), start(queue)

    wait_until(lambda: state(queue, second) == "done")
    assert state(queue, first) == "failed"


def test_without_a_thread_to_be_had_the_pages_look_after_the_runs(
    queue: RunQueue, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    act(FINISH)
    monkeypatch.setattr(threading.Thread, "start", refuse)

    first, second = start(queue), start(queue)
    wait_until(lambda: not queue.live())

    assert [state(queue, run_id) for run_id in (first, second)] == ["done", "done"]


def test_a_worker_whose_events_had_no_room_is_judged_by_its_exit_code(
    queue: RunQueue, act: Act
) -> None:
    act(SILENT)
    good = start(queue)
    wait_until(lambda: state(queue, good) == "done")
    act("sys.exit(2)")
    bad = start(queue)
    wait_until(lambda: state(queue, bad) == "failed")

    view = queue.view(folder(), bad)
    assert view is not None
    assert "exit code 2" in str(view.message)


# Lanes


def test_light_jobs_pass_what_holds_the_device(queue: RunQueue, act: Act) -> None:
    act(WAIT)
    long, behind = start(queue, "finetune"), start(queue, "measure")
    act(SHORT)
    light = [start(queue, kind) for kind in ("plan", "preview", "apply")]

    places = {run.id: run.queue_place for run in queue.live()}
    assert [places[run_id] for run_id in (long, behind, *light)] == [0, 1, 0, 1, 2]
    wait_until(lambda: all(state(queue, run_id) == "done" for run_id in light))

    assert [state(queue, run_id) for run_id in (long, behind)] == ["running", "queued"]
    ends = [queue.view(folder(), run_id).ended for run_id in light]  # type: ignore[union-attr]
    assert ends == sorted(ends)


@pytest.mark.parametrize("kind", ["finetune", "plan"])
def test_stop_ends_a_run_of_either_lane_and_the_next_one_begins(
    kind: str, queue: RunQueue, act: Act
) -> None:
    act(WAIT)
    first, second, third = (start(queue, kind) for _ in range(3))

    queue.stop(second)
    queue.stop(first)
    wait_until(lambda: state(queue, third) == "running")

    assert [state(queue, run_id) for run_id in (first, second)] == ["stopped", "stopped"]


# What people do to folders


def deleted(path: Path) -> bool:
    """Delete a folder; again where a worker wrote into it meanwhile."""
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


@pytest.mark.parametrize("early", [True, False], ids=["before its first event", "after it"])
def test_a_run_whose_folder_is_deleted_is_ended_and_not_brought_back(
    queue: RunQueue, act: Act, early: bool
) -> None:
    act(WAIT)
    first, second, third = (start(queue) for _ in range(3))
    wait_until(lambda: state(queue, first) == "running")
    events = folder() / "runs" / first / "events.jsonl"
    wait_until(lambda: early or (events.is_file() and events.stat().st_size))
    for run_id in (first, second):
        wait_until(partial(deleted, folder() / "runs" / run_id))

    wait_until(lambda: state(queue, third) == "running")

    views = [queue.view(folder(), run_id) for run_id in (first, second)]
    assert all(view is not None and view.state == "failed" for view in views)
    assert all("was deleted" in str(view.message) for view in views if view is not None)
    assert [path.name for path in (folder() / "runs").iterdir()] == [third]


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "another kind": lambda path: path.write_text("[1, 2]"),
    "odd values": lambda path: path.write_text('{"kind": "no", "state": 3}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "no text": lambda path: path.write_bytes(b"\xff\x00" * 50),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "huge": lambda path: os.truncate(path, 10**11),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_record_that_cannot_be_read_is_shown_as_such_and_stops_nobody(
    how: str, queue: RunQueue, act: Act
) -> None:
    act(FINISH)
    spoilt, good = start(queue), start(queue)
    wait_until(lambda: not queue.live())
    SPOILT[how](folder() / "runs" / spoilt / "run.json")
    queue.close()
    later = RunQueue()
    later.recover()

    views = {run.id: run for run in later.runs(folder())}

    assert views[good].state == "done"
    assert views[spoilt].state == "failed"
    assert "cannot be read" in str(views[spoilt].message)
    third = start(later)
    wait_until(lambda: state(later, third) == "done")
    assert next(iter(later.runs(folder()))).id == third
    later.close()


def test_a_worker_whose_record_was_spoilt_keeps_its_place_on_the_device(
    queue: RunQueue, act: Act
) -> None:
    act(WAIT)
    run_id = start(queue)
    wait_until(lambda: state(queue, run_id) == "running")
    queue.close()
    (folder() / "runs" / run_id / "run.json").write_text("{")
    later = RunQueue()
    later.recover()

    second = start(later)

    assert [state(later, each) for each in (run_id, second)] == ["running", "queued"]
    later.stop(run_id)
    wait_until(lambda: state(later, second) == "running")
    later.stop(second)
    wait_until(lambda: not later.live())
    later.close()


@pytest.mark.parametrize("how", ["truncated", "replaced", "deleted", "a folder", "noise"])
def test_events_that_somebody_spoils_do_not_hold_the_run_up(
    how: str, queue: RunQueue, act: Act
) -> None:
    act(WAIT.replace('say(event="stopped")', "time.sleep(0.1); " + FINISH))
    run_id = start(queue)
    events = folder() / "runs" / run_id / "events.jsonl"
    wait_until(lambda: queue.view(folder(), run_id).steps)  # type: ignore[union-attr]
    if how == "truncated":
        os.truncate(events, 0)
    elif how == "noise":
        with events.open("ab") as file:
            file.write(
                b'\n\n{"event": "step"}\n[]\nnull\n{"event": "progress", "done": "x"}\n\xff\n'
            )
    else:
        events.unlink()
        if how == "replaced":
            events.write_text('{"event": "phase", "name": "another"}\n' * 100)
        elif how == "a folder":
            events.mkdir()

    (events.parent / "stop").touch()
    wait_until(lambda: not queue.live())

    assert state(queue, run_id) in ("done", "stopped")
    view = queue.view(folder(), run_id)
    assert view is not None
    assert len(view.steps) == (0 if how in ("truncated", "replaced") else 1)


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_spoils_neither_order_nor_duration(
    jump: float, queue: RunQueue, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(WAIT)
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    first = start(queue)
    wait_until(lambda: state(queue, first) == "running")
    ahead[0] = jump
    queue.stop(first)
    wait_until(lambda: not queue.live())
    second = start(queue)
    queue.stop(second)
    wait_until(lambda: not queue.live())

    runs = queue.runs(folder())

    assert [run.id for run in runs] == [second, first]
    assert all(0 <= run.wall_s < PATIENCE_S for run in runs)


# Other servers


def test_a_second_server_looks_and_stops_and_never_rewrites(queue: RunQueue, act: Act) -> None:
    act(WAIT)
    first, second, light = start(queue), start(queue), start(queue, "plan")
    wait_until(lambda: state(queue, first) == "running")
    before = {run_id: record(run_id) for run_id in (first, second, light)}
    later = RunQueue()
    later.recover()

    assert {run.id: (run.state, run.queue_place) for run in later.live()} == {
        first: ("running", 0),
        light: ("running", 0),
        second: ("queued", 1),
    }
    assert f"process {os.getpid()}" in later.troubles()[0]
    with pytest.raises(LimberError, match="LIMBER_HOME"):
        start(later)
    assert {run_id: record(run_id) for run_id in before} == before
    for run_id in (second, first):
        later.stop(run_id)
        wait_until(lambda run_id=run_id: state(queue, run_id) == "stopped")
    assert state(later, first) == "stopped"
    later.close()


def test_the_next_server_takes_over_what_runs_and_what_waits(queue: RunQueue, act: Act) -> None:
    act(WAIT)
    first, second, third = start(queue), start(queue), start(queue, "plan")
    wait_until(lambda: state(queue, third) == "running")
    later = RunQueue()
    later.recover()
    queue.close()
    act(FINISH)

    wait_until(lambda: not later.troubles())

    assert [state(later, each) for each in (first, second, third)] == [
        "running",
        "queued",
        "running",
    ]
    later.stop(first)
    later.stop(third)
    wait_until(lambda: not later.live())
    assert [state(later, each) for each in (first, second, third)] == ["stopped", "done", "stopped"]
    later.close()


@pytest.mark.parametrize("known", [True, False], ids=["id saved", "id not saved"])
@pytest.mark.parametrize("ended", [False, True], ids=["at work", "through"])
def test_a_worker_is_found_again_though_its_start_was_never_written_down(
    ended: bool, known: bool, queue: RunQueue, act: Act
) -> None:
    act(SHORT if ended else WAIT)
    run_id = start(queue)
    wait_until(lambda: queue.view(folder(), run_id).steps)  # type: ignore[union-attr]
    queue.close()
    if ended:
        time.sleep(0.8)
    path = folder() / "runs" / run_id / "run.json"
    kept = json.loads(path.read_text("utf-8")) | {"state": "queued", "started": None}
    path.write_text(json.dumps(kept | ({} if known else {"pid": None})), "utf-8")
    later = RunQueue()
    later.recover()

    assert state(later, run_id) == ("done" if ended else "running")
    later.stop(run_id)
    wait_until(lambda: not later.live())
    events = (path.parent / "events.jsonl").read_text("utf-8")
    assert events.count('"step": 0') == 1
    later.close()


def test_another_process_of_the_same_number_is_no_worker(queue: RunQueue, act: Act) -> None:
    act(WAIT)
    run_id = start(queue)
    wait_until(lambda: queue.view(folder(), run_id).steps)  # type: ignore[union-attr]
    pid = record(run_id)["pid"]
    queue.close()
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    path = folder() / "runs" / run_id / "run.json"
    path.write_text(json.dumps(record(run_id) | {"pid": os.getpid()}), "utf-8")
    later = RunQueue()
    later.recover()

    assert state(later, run_id) == "failed"
    later.close()


def test_a_folder_without_locks_is_used_and_said(
    queue: RunQueue, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(FINISH)
    monkeypatch.setattr("core.files.claims.lock", lambda handle: None)

    run_id = start(queue)
    wait_until(lambda: state(queue, run_id) == "done")

    assert "has no locks" in queue.troubles()[0]


def test_a_deleted_home_is_claimed_anew(queue: RunQueue, act: Act, limber_home: Path) -> None:
    import shutil

    act(FINISH)
    start(queue)
    wait_until(lambda: not queue.live())
    shutil.rmtree(limber_home)

    run_id = start(queue)
    wait_until(lambda: state(queue, run_id) == "done")

    assert json.loads((limber_home / run_room.LOCK).read_text("utf-8"))["pid"] == os.getpid()


# The workspace


def test_two_servers_that_change_one_workspace_lose_nothing(limber_home: Path) -> None:
    one, two = Workspace(SPACE), Workspace(SPACE)
    rounds = 20

    def change(space: Workspace, name: str) -> None:
        for turn in range(rounds):
            space.change_picks(layers=(*space.picks.layers, f"{name}{turn}"))

    threads = [threading.Thread(target=change, args=words) for words in ((one, "a"), (two, "b"))]
    one.choose(data="pneumonia")
    two.set_judging(workspace_room.Judging(preset="seed-paper"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = Workspace(SPACE)
    assert (found.choice.data, found.judging.preset) == ("pneumonia", "seed-paper")
    # Each change was made to what the file held, so that undo walks through all of them.
    undone = 0
    while found.can_undo:
        found.undo()
        undone += 1
    assert undone == 2 * rounds
    one.refresh()
    two.refresh()
    assert one.picks == two.picks == found.picks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE])
def test_a_workspace_on_a_full_disk_is_kept_in_memory_and_saved_later(
    number: int, limber_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_room, "AGAIN_S", 0.0)
    full = failing(monkeypatch, number, "workspace.json")
    kept = Workspace(SPACE)
    kept.choose(data="pneumonia")
    full(True)
    fresh = Workspace("fedcba9876543210")
    for space in (kept, fresh):
        space.change_picks(layers=("a",))
        space.refresh()

        assert space.picks.layers == ("a",)
        assert "kept in memory" in str(space.trouble)
    full(False)
    # Another server writes to it before this one can.
    Workspace(SPACE).set_judging(workspace_room.Judging(preset="seed-paper"))
    for space in (kept, fresh):
        space.refresh()

        assert space.trouble is None
        assert Workspace(space.id).picks.layers == ("a",)
    assert Workspace(SPACE).judging.preset == "seed-paper"
    assert Workspace(SPACE).choice.data == "pneumonia"
    left = {path.name for path in kept.folder.iterdir()}
    assert left == {"workspace.json", ".lock"}


@pytest.mark.parametrize("call", ["write_text", "replace"])
def test_nothing_is_left_of_a_file_that_found_no_room(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Path, call)

    def refuse(self: Path, *words: Any, **how: Any) -> None:
        real(self, *words, **how) if call == "write_text" else None
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, call, refuse)

    with pytest.raises(OSError, match="No space left"):
        workspace_room.write_atomically(tmp_path / "a.json", "x")

    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_cannot_be_read_now_is_never_written_over(
    limber_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace_room, "AGAIN_S", 0.0)
    Workspace(SPACE).choose(data="pneumonia")
    file = folder() / "workspace.json"
    before = file.read_bytes()
    real = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self == file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        space = Workspace(SPACE)
        space.change_picks(layers=("a",))

        assert "Permission denied" in str(space.trouble)
    assert file.read_bytes() == before
    space.refresh()
    found = Workspace(SPACE)
    assert (found.choice.data, found.picks.layers) == ("pneumonia", ("a",))


# Pages


def opened() -> AppTest:
    app = AppTest.from_file(APP, default_timeout=2 * PATIENCE_S)
    app.query_params["w"] = SPACE
    return app.run()


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "The disk is full"), (errno.EROFS, "Read-only")]
)
def test_a_session_opens_on_a_disk_that_takes_nothing_and_says_so(
    number: int, says: str, queue: RunQueue, limber_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **how: object) -> None:
        raise OSError(number, os.strerror(number), str(limber_home))

    monkeypatch.setattr(workspace_room, "write_atomically", refuse)
    monkeypatch.setattr(run_room, "take", refuse)

    app = opened()
    app.switch_page("views/look.py").run()

    assert not app.exception
    said = "\n".join(warning.value.replace("\\", "") for warning in app.warning)
    assert says in said
    assert "No run can be started until then." in said
    app.button(key="measure_start").click().run()
    assert not app.exception
    assert says in app.error[0].value.replace("\\", "")


def test_every_page_of_a_second_server_says_whose_the_folder_is(
    queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = RunQueue()
    owner.recover(address="http://127.0.0.1:8501")

    app = opened()
    app.switch_page("views/look.py").run()

    assert not app.exception
    (warning,) = app.warning
    # An address in a name is held apart, so that no link is made of it.
    said = warning.value.replace("\\", "").replace("\u2060", "")
    assert f"Another Limber (process {os.getpid()}, http://127.0.0.1:8501" in said
    app.button(key="measure_start").click().run()
    assert "start new ones there" in app.error[0].value.replace("\\", "")
    owner.close()
