"""Background runs: one queue for the whole server, one worker process at a time.

A worker is the command line itself in a process group of its own, so that a Stop reaches its
data loaders too and the page's process never trains. What it says goes through a file of events
that one thread tails; nothing here touches streamlit, because threads have no session.

Hard part: the server may die while a worker lives. Each run's folder therefore says everything
needed to take it up again: the process id, who started it, and the events so far. A worker that
still beats is adopted, a dead one is marked as such.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from core.records import ArmCurve, StepRecord
from dashboard.store.workspace import ROOT, home, write_atomically

log = logging.getLogger("limber.runs")

RunKind = Literal["measure", "finetune", "apply", "plan", "preview"]
RunState = Literal["queued", "running", "stopping", "done", "stopped", "failed"]
LIVE: frozenset[str] = frozenset({"queued", "running", "stopping"})
RUN_ID = re.compile(r"[a-z]{3,10}-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
POLL_S = 0.1
TERM_AFTER_S = 3.0
KILL_AFTER_S = 5.0
HEARTBEAT_LOST_S = 15.0
POSIX = os.name == "posix"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What a page may know of a run at one moment.

    Attributes:
        facts: What it was started with, for titles and for telling whether it is stale.
        done, total, unit, eta_s: Progress as the worker told it last; total 0 before it did.
        message: The one sentence to show when it failed.
        result: What the worker handed out when it was done.
        queue_place: Runs before it in the queue; 0 when it is not waiting.
    """

    id: str
    kind: RunKind
    state: RunState
    folder: Path
    facts: Mapping[str, Any]
    created: float
    started: float | None = None
    ended: float | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    eta_s: float | None = None
    message: str | None = None
    steps: tuple[StepRecord, ...] = ()
    caveats: tuple[str, ...] = ()
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

    @property
    def wall_s(self) -> float:
        """Seconds it has run."""
        if self.started is None:
            return 0.0
        return max(0.0, (self.ended or time.time()) - self.started)

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
class _Run:
    view: RunView
    argv: tuple[str, ...]
    pid: int | None = None
    process: subprocess.Popen[bytes] | None = None
    stop_asked: float | None = None
    last_event: float = 0.0
    offset: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    saw_stopped: bool = False
    saw_done: bool = False
    error: str | None = None


class RunQueue:
    """All runs of this server. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Start empty; `recover` looks at what an earlier server left behind."""
        self._lock = threading.RLock()
        self._waiting: deque[str] = deque()
        self._runs: dict[str, _Run] = {}
        self._active: str | None = None
        self._recovered: set[Path] = set()

    def start(
        self,
        kind: RunKind,
        folder: Path,
        argv: Callable[[Path], Sequence[str]],
        facts: Mapping[str, Any],
    ) -> str:
        """Put a run into the queue and return its id.

        Args:
            kind: What it does.
            folder: Folder of the workspace; the run gets one of its own below it.
            argv: Arguments after `python -m core`, given the run's folder.
            facts: JSON values kept with the run.
        """
        run_id = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        run_folder = folder / "runs" / run_id
        run_folder.mkdir(parents=True)
        view = RunView(
            id=run_id,
            kind=kind,
            state="queued",
            folder=run_folder,
            facts=dict(facts),
            created=time.time(),
        )
        run = _Run(view=view, argv=tuple(argv(run_folder)))
        with self._lock:
            self._runs[run_id] = run
            self._waiting.append(run_id)
            self._save(run)
            self._start_next()
        return run_id

    def stop(self, run_id: str) -> None:
        """Ask a run to stop: a file first, then signals to its whole process group."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is None or not run.view.live or run.stop_asked is not None:
                return
            if run.view.state == "queued":
                self._waiting.remove(run_id)
                self._end(run, "stopped", None)
                return
            run.stop_asked = time.monotonic()
            run.view = replace(run.view, state="stopping")
            with contextlib.suppress(OSError):
                (run.view.folder / "stop").touch()
            self._save(run)

    def view(self, folder: Path, run_id: str) -> RunView | None:
        """Return a run of the workspace in `folder`, from memory or from disk."""
        if not RUN_ID.fullmatch(run_id):
            return None
        with self._lock:
            run = self._runs.get(run_id)
            if run is None:
                run = _read_run(folder / "runs" / run_id)
                if run is None:
                    return None
                self._runs[run_id] = run
            if run.view.folder.parent != folder / "runs":
                return None
            return self._snapshot(run)

    def runs(self, folder: Path, kind: RunKind | None = None) -> tuple[RunView, ...]:
        """Return the runs of a workspace, newest first."""
        try:
            names = sorted((path.name for path in (folder / "runs").iterdir()), reverse=True)
        except FileNotFoundError:
            return ()
        wanted = [name for name in names if kind is None or name.startswith(f"{kind}-")]
        found = [self.view(folder, name) for name in wanted]
        views = [view for view in found if view is not None]
        return tuple(sorted(views, key=lambda view: view.created, reverse=True))

    def live(self) -> tuple[RunView, ...]:
        """Return every run that has not ended, of all workspaces, the running one first."""
        with self._lock:
            names = [self._active] if self._active else []
            names += [name for name in self._waiting if name not in names]
            return tuple(self._snapshot(self._runs[name]) for name in names)

    def recover(self) -> None:
        """Adopt workers that outlived their server; mark the dead ones. Cheap when repeated."""
        base = home() / "workspaces"
        with self._lock:
            if base in self._recovered:
                return
            self._recovered.add(base)
            for path in sorted(base.glob("*/runs/*/run.json")):
                run = _read_run(path.parent)
                if run is None or not run.view.live or run.view.id in self._runs:
                    continue
                self._runs[run.view.id] = run
                if run.view.state == "queued":
                    self._end(run, "stopped", "The program was closed before this run began.")
                elif run.pid is not None and _is_our_worker(run):
                    self._adopt(run)
                else:
                    self._conclude(run, None)

    def _snapshot(self, run: _Run) -> RunView:
        place = 0
        if run.view.state == "queued" and run.view.id in self._waiting:
            place = self._waiting.index(run.view.id) + (1 if self._active else 0)
        return replace(run.view, steps=tuple(run.steps), queue_place=place)

    def _start_next(self) -> None:
        if self._active is not None or not self._waiting:
            return
        run = self._runs[self._waiting.popleft()]
        folder = run.view.folder
        with (folder / "stdout.log").open("wb") as out, (folder / "stderr.log").open("wb") as err:
            try:
                run.process = self._launch(run.argv, out, err)
            except OSError as error:
                self._end(run, "failed", f"The worker could not be started: {error}.")
                self._start_next()
                return
        run.pid = run.process.pid
        run.last_event = time.time()
        run.view = replace(run.view, state="running", started=time.time())
        self._active = run.view.id
        self._save(run)
        self._pump_in_thread(run)

    @staticmethod
    def _launch(argv: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        # Not multiprocessing: its "spawn" would run the whole page script again in the child.
        return subprocess.Popen(
            [sys.executable, "-m", "core", *argv],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=POSIX,
        )

    def _adopt(self, run: _Run) -> None:
        if self._active is None:
            self._active = run.view.id
        self._pump_in_thread(run)

    def _pump_in_thread(self, run: _Run) -> None:
        threading.Thread(target=self._pump, args=(run,), daemon=True, name=run.view.id).start()

    def _pump(self, run: _Run) -> None:
        try:
            while True:
                code = run.process.poll() if run.process else None
                alive = code is None if run.process else _is_our_worker(run)
                with self._lock:
                    self._take_events(run)
                    if not alive:
                        self._conclude(run, code)
                        return
                    self._press(run)
                time.sleep(POLL_S)
        except Exception:
            log.exception("run %s could not be followed", run.view.id)
            with self._lock:
                self._end(run, "failed", "Limber lost track of this run. See the log.")

    def _press(self, run: _Run) -> None:
        if run.stop_asked is None or run.pid is None:
            return
        waited = time.monotonic() - run.stop_asked
        if waited > KILL_AFTER_S:
            _signal_group(run, kill=True)
        elif waited > TERM_AFTER_S:
            _signal_group(run, kill=False)

    def _take_events(self, run: _Run) -> None:
        _read_events(run)

    def _conclude(self, run: _Run, code: int | None) -> None:
        _read_events(run)
        if run.error is not None and not run.stop_asked:
            self._end(run, "failed", run.error)
        elif run.saw_stopped or (run.stop_asked is not None and not run.saw_done):
            self._end(run, "stopped", None)
        elif run.saw_done:
            self._end(run, "done", None)
        elif code is None:
            self._end(run, "failed", "The program was closed and the worker ended with it.")
        elif code < 0:
            self._end(
                run,
                "failed",
                "The worker was ended from outside. The machine may have "
                "run out of memory: try a smaller batch or smaller images.",
            )
        else:
            self._end(run, "failed", _last_line(run.view.folder / "stderr.log", code))

    def _end(self, run: _Run, state: RunState, message: str | None) -> None:
        run.view = replace(run.view, state=state, message=message, ended=time.time(), eta_s=None)
        run.process = None
        self._save(run)
        if self._active == run.view.id:
            self._active = None
            self._start_next()

    @staticmethod
    def _save(run: _Run) -> None:
        view = run.view
        document = {
            "id": view.id,
            "kind": view.kind,
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
        write_atomically(view.folder / "run.json", json.dumps(document, indent=1))


def _read_run(folder: Path) -> _Run | None:
    try:
        document = json.loads((folder / "run.json").read_text("utf-8"))
        view = RunView(
            id=folder.name,
            kind=document["kind"],
            state=document["state"],
            folder=folder,
            facts=document["facts"],
            created=document["created"],
            started=document["started"],
            ended=document["ended"],
            message=document["message"],
        )
        run = _Run(view=view, argv=tuple(document["argv"]), pid=document["pid"])
        if document.get("stop_asked"):
            run.stop_asked = time.monotonic()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _read_events(run)
    return run


def _read_events(run: _Run) -> None:
    """Fold the events that came since the last call; a half-written last line waits."""
    try:
        with (run.view.folder / "events.jsonl").open("rb") as file:
            file.seek(run.offset)
            text = file.read()
    except FileNotFoundError:
        return
    whole, newline, _ = text.rpartition(b"\n")
    if not newline:
        return
    run.offset += len(whole) + 1
    for line in whole.split(b"\n"):
        try:
            event = json.loads(line)
            _fold(run, event)
        except (ValueError, KeyError, TypeError):
            log.warning("run %s wrote an event that cannot be read", run.view.id)


def _fold(run: _Run, event: Mapping[str, Any]) -> None:
    run.last_event = float(event.get("t", time.time()))
    kind = event["event"]
    if kind == "record":
        caveats = tuple(map(str, event["record"].get("caveats", ())))
        run.view = replace(run.view, caveats=caveats)
    elif kind == "step":
        run.steps.append(
            StepRecord(
                arm=event["arm"],
                seed=event["seed"],
                step=event["step"],
                train_loss=_number(event["train_loss"]),
                val_accuracy=_number(event["val_accuracy"]),
                wall_s=event["wall_s"],
            )
        )
    elif kind == "progress":
        run.view = replace(
            run.view,
            done=int(event["done"]),
            total=int(event["total"]),
            unit=str(event.get("unit", "")),
            eta_s=event.get("eta_s"),
        )
    elif kind == "phase":
        # The numbers so far were those of the part before.
        run.view = replace(run.view, phase=str(event["name"]), done=0, total=0, eta_s=None)
    elif kind == "error":
        run.error = str(event["message"])
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


def _is_our_worker(run: _Run) -> bool:
    """Whether the run's process lives and is still the one that was started.

    Process ids are used again, so the command line must name the run's folder where the system
    shows it; elsewhere a recent heartbeat has to do.
    """
    if run.pid is None:
        return False
    arguments = Path(f"/proc/{run.pid}/cmdline")
    if Path("/proc/self/cmdline").exists():
        try:
            return run.view.id.encode() in arguments.read_bytes()
        except OSError:
            return False
    _read_events(run)
    return time.time() - run.last_event < HEARTBEAT_LOST_S


def _signal_group(run: _Run, *, kill: bool) -> None:
    with contextlib.suppress(OSError):
        if POSIX and run.pid is not None:
            os.killpg(run.pid, signal.SIGKILL if kill else signal.SIGTERM)
        elif run.process is not None:
            run.process.kill()


def _last_line(path: Path, code: int) -> str:
    """Return the last line a worker wrote when it ended on a person's mistake, else a sentence."""
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        if code == 2 and lines:
            return lines[-1].strip().removeprefix("error: ")
    return f"The worker ended unexpectedly (exit code {code}). Its log: {path}"


queue = RunQueue()
