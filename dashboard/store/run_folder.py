"""A run's folder: its record, the events of its worker, and whether that worker still lives.

Everything needed to resume a run lies in the folder: what was started, the process id, and the
events so far. A person or another program may have changed anything in it; none of that raises an
exception. But where the machine is out of file handles or memory for the moment, nothing can be
said about a folder, and OSError tells the caller to ask again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from core.errors import error_told
from core.records import ArmCurve, StepRecord, TrialDesign
from dashboard.store.workspace import write_atomically
from dashboard.words import sentence

log = logging.getLogger("limber.runs")

RunKind = Literal[
    "measure", "finetune", "apply", "plan", "preview", "attribute", "after", "estimate"
]
RunState = Literal["queued", "running", "stopping", "done", "stopped", "failed"]
LIVE: frozenset[str] = frozenset({"queued", "running", "stopping"})
RUN_ID = re.compile(r"[a-z]{3,10}-[0-9]{8}-[0-9]{6}-[0-9a-f]{4,16}")
# Partial files, which commands and this program write before they rename them.
PARTIAL = re.compile(r"\..+\.([0-9a-z_]{8}|claim)")
HEARTBEAT_LOST_S = 15.0
# A record holds a plan's JSON at most; a larger file is not one of our records.
LARGEST_RECORD = 64_000_000
# Events are read in pieces, so that a huge file does not fill the memory.
PIECE = 8_000_000
# A machine that has no process, file handle or memory to give now may have one in a moment.
PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
POSIX = os.name == "posix"
PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What a page may know about a run at one moment.

    Attributes:
        facts: What it was started with; titles and the test for staleness use it.
        number: Its place in the order of starts, which does not depend on a clock.
        wall_s: Seconds it has run.
        done, total, unit, eta_s: Progress as the worker last told it; total is 0 before that.
        message: The one sentence to show when it failed.
        design: What a fine-tune is judged by; None before it says so, and of earlier versions.
        result: What the worker returned when it was done.
        queue_place: How many runs are before it in its lane; 0 when it is not waiting.
    """

    id: str
    kind: RunKind
    state: RunState
    folder: Path
    facts: Mapping[str, Any]
    created: float
    number: int = 0
    started: float | None = None
    ended: float | None = None
    wall_s: float = 0.0
    phase: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    eta_s: float | None = None
    message: str | None = None
    steps: tuple[StepRecord, ...] = ()
    caveats: tuple[str, ...] = ()
    design: TrialDesign | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    queue_place: int = 0

    @property
    def live(self) -> bool:
        """Whether it has not ended yet."""
        return self.state in LIVE

    @property
    def fraction(self) -> float:
        """Progress in [0, 1]."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def curves(self) -> tuple[ArmCurve, ...]:
        """Return the steps so far as curves, arms and seeds in the order they began."""
        grouped: dict[tuple[str, int], list[StepRecord]] = {}
        for step in self.steps:
            grouped.setdefault((step.arm, step.seed), []).append(step)
        return tuple(
            ArmCurve(arm=arm, seed=seed, steps=tuple(steps))
            for (arm, seed), steps in grouped.items()
        )


@dataclass(slots=True)
class Run:
    """A run as the queue keeps it: the view, and what only the queue needs.

    Attributes:
        heard: When its events last grew, by the monotonic clock.
        begun: When it was started, by the same clock; None if another server started it.
        lost: Its folder is gone, so it has no place for its results.
        spoilt: Its record cannot be read.
    """

    view: RunView
    argv: tuple[str, ...]
    pid: int | None = None
    process: subprocess.Popen[bytes] | None = None
    stop_asked: float | None = None
    begun: float | None = None
    heard: float = field(default_factory=time.monotonic)
    lost: bool = False
    spoilt: bool = False
    steps: list[StepRecord] = field(default_factory=list)
    saw_stopped: bool = False
    saw_done: bool = False
    error: str | None = None
    _offset: int = 0
    _inode: int | None = None

    def snapshot(self, queue_place: int = 0) -> RunView:
        """Return the view at this moment."""
        view = self.view
        wall_s = 0.0
        if view.live and self.begun is not None:
            wall_s = time.monotonic() - self.begun
        elif view.started is not None:
            wall_s = max(0.0, (view.ended or time.time()) - view.started)
        return replace(view, steps=tuple(self.steps), queue_place=queue_place, wall_s=wall_s)

    def ended_at(self) -> float:
        """Return when it ended; its duration is right even if somebody set the clock meanwhile."""
        if self.view.started is not None and self.begun is not None:
            return self.view.started + time.monotonic() - self.begun
        return time.time()


def write_record(run: Run) -> None:
    """Write a run's record.

    Raises:
        OSError: It cannot be written, or the folder is gone.
    """
    view = run.view
    document = {
        "id": view.id,
        "kind": view.kind,
        "number": view.number,
        "state": view.state,
        "facts": dict(view.facts),
        "created": view.created,
        "started": view.started,
        "ended": view.ended,
        "message": view.message,
        "argv": list(run.argv),
        "pid": run.pid,
        "server_pid": os.getpid(),
        "stop_asked": run.stop_asked is not None,
    }
    # The folder is never made again: whoever deletes it does not want it back.
    write_atomically(view.folder / "run.json", json.dumps(document, indent=1), make_folder=False)


def read_record(folder: Path) -> Run | None:
    """Read a run from its folder, without its events.

    Returns:
        None where there is no record, as in the folder of a start that failed. A record that
        cannot be read gives a failed run that says so.

    Raises:
        OSError: The machine cannot open a file at the moment.
    """
    path = folder / "run.json"
    if not RUN_ID.fullmatch(folder.name):
        return None
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return _unreadable(folder, error)
    try:
        if path.stat().st_size > LARGEST_RECORD or not path.is_file():
            raise ValueError("it is no record of a run")
        document = json.loads(path.read_bytes())
        view = RunView(
            id=folder.name,
            kind=_known(document["kind"], RunKind),
            state=_known(document["state"], RunState),
            folder=folder,
            facts=dict(document["facts"]),
            created=float(document["created"]),
            number=int(document.get("number", 0)),
            started=_number(document["started"]),
            ended=_number(document["ended"]),
            message=None if document["message"] is None else str(document["message"]),
        )
        pid = document["pid"]
        run = Run(
            view=view,
            argv=tuple(map(str, document["argv"])),
            pid=None if pid is None else int(pid),
        )
        if document.get("stop_asked"):
            run.stop_asked = time.monotonic()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _unreadable(folder, error)
    return run


def _unreadable(folder: Path, error: Exception) -> Run | None:
    if isinstance(error, OSError) and error.errno in PASSING:
        raise error
    kind, day, clock, _ = folder.name.split("-")
    if kind not in get_args(RunKind):
        return None
    with contextlib.suppress(ValueError, OverflowError):
        created = time.mktime(time.strptime(f"{day}{clock}", "%Y%m%d%H%M%S"))
        log.warning("the record of %s cannot be read: %s", folder.name, error)
        return Run(
            view=RunView(
                id=folder.name,
                kind=kind,  # type: ignore[arg-type]
                state="failed",
                folder=folder,
                facts={},
                created=created,
                message=f'The record of this run cannot be read: "{folder / "run.json"}".',
            ),
            argv=(),
            spoilt=True,
        )
    return None


def _known(word: Any, words: Any) -> Any:
    if word not in get_args(words):
        raise ValueError(f"{word!r} is none of {get_args(words)}")
    return word


def read_events(run: Run) -> None:
    """Take in the events since the last call; a half-written last line waits for the next one.

    If the file was emptied or replaced meanwhile, it is read from its beginning.

    Raises:
        OSError: The machine cannot open a file at the moment.
    """
    try:
        with (run.view.folder / "events.jsonl").open("rb") as file:
            state = os.fstat(file.fileno())
            if run._inode not in (None, state.st_ino) or state.st_size < run._offset:
                _forget(run)
            run._inode = state.st_ino
            while True:
                file.seek(run._offset)
                text = file.read(PIECE)
                whole, newline, _ = text.rpartition(b"\n")
                if not newline and len(text) == PIECE:
                    # No event is that long, so it can be skipped.
                    whole = text[:-1]
                elif not newline:
                    return
                run._offset += len(whole) + 1
                run.heard = time.monotonic()
                for line in whole.split(b"\n"):
                    _fold_line(run, line)
                if len(text) < PIECE:
                    return
    except OSError as error:
        if error.errno in PASSING:
            raise


def _forget(run: Run) -> None:
    run._offset = 0
    run.steps.clear()
    run.view = replace(run.view, caveats=(), result={}, phase="", done=0, total=0, eta_s=None)


def _fold_line(run: Run, line: bytes) -> None:
    if not line.strip():
        return
    try:
        _fold(run, json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        log.warning("run %s wrote an event that cannot be read", run.view.id)


def _fold(run: Run, event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if kind == "record":
        caveats = tuple(map(str, event["record"].get("caveats", ())))
        design = event["record"].get("design")
        run.view = replace(
            run.view,
            caveats=caveats,
            design=None if design is None else TrialDesign.model_validate(design),
        )
    elif kind == "step":
        run.steps.append(
            StepRecord(
                arm=str(event["arm"]),
                seed=int(event["seed"]),
                step=int(event["step"]),
                train_loss=_number(event["train_loss"]),
                val_accuracy=_number(event["val_accuracy"]),
                wall_s=float(event["wall_s"]),
                answers=None if event.get("answers") is None else str(event["answers"]),
            )
        )
    elif kind == "progress":
        run.view = replace(
            run.view,
            done=int(event["done"]),
            total=int(event["total"]),
            unit=str(event.get("unit", "")),
            eta_s=_number(event.get("eta_s")),
        )
    elif kind == "phase":
        # The numbers so far belong to the phase before.
        run.view = replace(run.view, phase=str(event["name"]), done=0, total=0, eta_s=None)
    elif kind == "heartbeat" and run.pid is None and event.get("pid") is not None:
        run.pid = int(event["pid"])
    elif kind == "error":
        run.error = sentence(error_told(event))
    elif kind == "stopped":
        run.saw_stopped = True
    elif kind == "done":
        run.saw_done = True
        run.view = replace(
            run.view,
            result={key: value for key, value in event.items() if key not in ("event", "t")},
        )


def _number(value: Any) -> float | None:
    # Non-finite numbers arrive as words, which float() reads.
    return None if value is None else float(value)


def is_gone(folder: Path) -> bool:
    """Whether a folder was deleted. One that cannot be reached for a moment is not gone."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return not folder.is_dir()


def stop_wanted(run: Run) -> bool:
    """Whether somebody left the file that asks a run to stop."""
    try:
        (run.view.folder / "stop").lstat()
    except OSError:
        return False
    return True


def run_folders(base: Path) -> list[Path]:
    """Return the folders of all runs of all workspaces, including those without a record.

    Raises:
        OSError: The machine cannot open a folder at the moment.
    """
    return [
        folder
        for space in _inside(base / "workspaces")
        for folder in _inside(space / "runs")
        if RUN_ID.fullmatch(folder.name)
    ]


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        if error.errno in PASSING:
            raise
        return []


def has_begun(run: Run) -> bool:
    """Whether its worker has written any event yet."""
    with contextlib.suppress(OSError):
        return (run.view.folder / "events.jsonl").stat().st_size > 0
    return False


def find_worker(run: Run) -> int | None:
    """Return the process that works on a run, or None.

    Systems reuse process ids, so the command line must name the run's folder where it can be read;
    elsewhere a recent event must do. If the id is not known, because the server was ended before it
    could write it down, all processes are searched.

    Raises:
        OSError: The machine cannot open a file at the moment.
    """
    if (PROC / "self" / "cmdline").exists():
        if run.pid is not None:
            return run.pid if _works_on(run.pid, run.view.id) else None
        pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
        return next((pid for pid in pids if _works_on(pid, run.view.id)), None)
    read_events(run)
    return run.pid if time.monotonic() - run.heard < HEARTBEAT_LOST_S else None


def _works_on(pid: int, run_id: str) -> bool:
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError as error:
        if error.errno in PASSING:
            raise
        return False
    # By the file of events: an editor or pager that has the folder open is not a worker.
    return any(
        flag == b"--events" and f"/{run_id}/".encode() in value for flag, value in pairwise(words)
    )


def signal_group(run: Run, *, kill: bool) -> None:
    """Ask the worker and all it started to end, or end them."""
    with contextlib.suppress(OSError):
        if POSIX and run.pid is not None:
            os.killpg(run.pid, signal.SIGKILL if kill else signal.SIGTERM)
        elif run.process is not None:
            run.process.kill()


def last_line(path: Path, code: int) -> str | None:
    """Return the last line a worker wrote when it ended on a person's mistake, else None."""
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        if code == 2 and lines:
            return lines[-1].strip().removeprefix("limber: ")
    return None


def sweep(folder: Path) -> None:
    """Remove the partial files that a killed process left in a run's folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.unlink()


def discard(folder: Path) -> None:
    """Remove the folder of a start that failed."""
    shutil.rmtree(folder, ignore_errors=True)
