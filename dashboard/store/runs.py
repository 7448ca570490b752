"""Background runs: lanes of runs for the whole server, one worker process at a time in each.

A worker is the command line itself in its own process group, so that Stop also reaches its data
loaders and the page's process never trains. It reports through a file of events. Nothing here
touches streamlit, because threads have no session.

The hard part is that everything may fail at any moment. The server may die while a worker lives:
each run's folder holds everything needed to resume it. The disk may be full: a lane is freed before
anything is saved, and what could not be saved stays in memory until it can. There may be no thread
or process left: one keeper looks after all runs, pages do its work if it could not be started, and
a run that could not be launched waits. Another server may own the folder: then this one only looks
on until the other is gone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from core.errors import LimberError, OptionError
from core.files.claims import Claim, Holder, take
from core.files.disk import free_bytes, no_room, trouble
from dashboard.store.run_folder import (
    PASSING,
    POSIX,
    RUN_ID,
    Run,
    RunKind,
    RunState,
    RunView,
    discard,
    find_worker,
    has_begun,
    is_gone,
    last_line,
    read_events,
    read_record,
    run_folders,
    signal_group,
    stop_wanted,
    sweep,
    write_record,
)
from dashboard.store.workspace import ROOT, home

log = logging.getLogger("limber.runs")

__all__ = ["RUN_ID", "RunKind", "RunQueue", "RunState", "RunView", "queue"]

Lane = Literal["device", "light"]
# Light jobs take seconds. They share the device with a fine-tune rather than wait hours for it.
LANES: Mapping[RunKind, Lane] = {
    "measure": "device",
    "finetune": "device",
    "after": "device",
    "plan": "light",
    "preview": "light",
    "attribute": "light",
    "estimate": "light",
    "apply": "light",
}
SLOTS: Mapping[Lane, int] = {"device": 1, "light": 1}
POLL_S = 0.1
AGAIN_S = 1.0
TERM_AFTER_S = 3.0
KILL_AFTER_S = 5.0
LOCK = "server.lock"
# Below this a disk counts as full: a record would fit, but hardly a result.
LEAST_FREE = 1_000_000


@dataclass(slots=True)
class _Lane:
    slots: int
    waiting: deque[str] = field(default_factory=deque)
    active: list[str] = field(default_factory=list)
    # When to retry what the machine had no room for, by the monotonic clock.
    not_before: float = 0.0
    held_by: OSError | None = None


class RunQueue:
    """All runs of this server. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Start empty; `recover` looks at what an earlier server left behind."""
        self._lock = threading.RLock()
        self._lanes = {name: _Lane(slots) for name, slots in SLOTS.items()}
        self._runs: dict[str, Run] = {}
        self._number = 0
        self._unsaved: dict[str, OSError] = {}
        self._saved_at = 0.0
        self._keeper: threading.Thread | None = None
        self._base: Path | None = None
        self._claim: Claim | None = None
        self._holder: Holder | None = None
        self._refused: OSError | None = None
        self._claimed_at = 0.0
        self._address = ""

    # Starting, stopping, looking

    def start(
        self,
        kind: RunKind,
        folder: Path,
        argv: Callable[[Path], Sequence[str]],
        facts: Mapping[str, Any],
    ) -> str:
        """Put a run into its lane and return its id.

        Args:
            kind: What it does.
            folder: Folder of the workspace; the run gets one of its own below it.
            argv: Arguments after `python -m core`, given the run's folder.
            facts: JSON values kept with the run.

        Raises:
            LimberError: Another server owns the folder, or the record cannot be written.
        """
        run_id = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        run_folder = folder / "runs" / run_id
        with self._lock:
            self.recover(again=True)
            if self._claim is None:
                raise LimberError(self._elsewhere())
            self._number += 1
            view = RunView(
                id=run_id,
                kind=kind,
                state="queued",
                folder=run_folder,
                facts=dict(facts),
                created=time.time(),
                number=self._number,
            )
            try:
                run_folder.mkdir(parents=True)
                run = Run(view=view, argv=tuple(argv(run_folder)))
                # A run that nobody could find after a crash must not start at all.
                write_record(run)
            except OSError as error:
                discard(run_folder)
                raise OptionError(f"Nothing was started. {trouble(error, run_folder)}") from error
            except BaseException:
                discard(run_folder)
                raise
            self._runs[run_id] = run
            self._lane(run).waiting.append(run_id)
            self._fill()
            self._keep()
        return run_id

    def stop(self, run_id: str) -> None:
        """Ask a run to stop: a file first, then signals to its whole process group."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is None or not run.view.live or run.stop_asked is not None:
                return
            with contextlib.suppress(OSError):
                (run.view.folder / "stop").touch()
            if self._claim is None:
                # The file is the only way to reach a run of another server.
                return
            if run.view.state == "queued":
                self._end(run, "stopped", None)
                return
            self._ask_to_stop(run)

    def view(self, folder: Path, run_id: str) -> RunView | None:
        """Return a run of the workspace in `folder`, from memory or from disk."""
        if not RUN_ID.fullmatch(run_id):
            return None
        with self._lock:
            run = self._runs.get(run_id)
            if run is None or (self._claim is None and run.view.live):
                run = self._look(folder / "runs" / run_id, run)
            if run is None or run.view.folder.parent != folder / "runs":
                return None
            return run.snapshot(self._place(run))

    def runs(self, folder: Path, kind: RunKind | None = None) -> tuple[RunView, ...]:
        """Return the runs of a workspace, newest first."""
        try:
            names = [path.name for path in (folder / "runs").iterdir()]
        except OSError:
            return ()
        wanted = [name for name in names if kind is None or name.startswith(f"{kind}-")]
        views = [view for name in wanted if (view := self.view(folder, name)) is not None]
        return tuple(sorted(views, key=lambda view: (view.number, view.created), reverse=True))

    def live(self) -> tuple[RunView, ...]:
        """Return every run that has not ended, of all workspaces, the running ones first."""
        with self._lock:
            self.recover()
            self._tend_without_keeper()
            if self._claim is None:
                self._look_around()
            running = [name for lane in self._lanes.values() for name in lane.active]
            waiting = [name for lane in self._lanes.values() for name in lane.waiting]
            live = [self._runs[name] for name in (*running, *waiting)]
            return tuple(run.snapshot(self._place(run)) for run in live)

    def troubles(self) -> tuple[str, ...]:
        """Return what every page should say: a full disk, another server; usually nothing."""
        with self._lock:
            self.recover()
            said: list[str] = []
            for run_id, error in self._unsaved.items():
                said.append(
                    f"{trouble(error, self._runs[run_id].view.folder)} The state of the runs is "
                    "kept in memory and saved as soon as there is room."
                )
                break
            for lane in self._lanes.values():
                if not said and lane.held_by is not None:
                    said.append(trouble(lane.held_by, home()))
            free = free_bytes(home())
            if not said and free is not None and free < LEAST_FREE:
                said.append(trouble(OSError(errno.ENOSPC, ""), home()))
            if self._claim is None:
                said.append(self._elsewhere())
            elif not self._claim.locked:
                said.append(
                    f'The file system of "{home()}" has no locks. Do not start a second Limber on '
                    "this folder."
                )
            return tuple(said)

    # Who owns the folder

    def recover(self, *, again: bool = False, address: str = "") -> None:
        """Take the folder if nobody owns it, and resume what its last owner left.

        Workers that outlived their server are adopted, runs that waited wait again, and runs whose
        worker is gone are marked as ended. Cheap when repeated.

        Args:
            again: Ask at once, even if another server owned the folder a moment ago.
            address: Where a browser finds this server; another server's pages show it.
        """
        base = home()
        with self._lock:
            self._address = address or self._address
            now = time.monotonic()
            same = base == self._base
            if same and self._claim is not None and self._claim.ours:
                return
            if same and not again and now - self._claimed_at < AGAIN_S:
                return
            if self._claim is not None:
                self._claim.release()
            before = self._holder
            self._base, self._claimed_at = base, now
            self._claim, self._holder, self._refused = None, None, None
            try:
                base.mkdir(parents=True, exist_ok=True)
                taken = take(base / LOCK, what="", address=self._address, must_sign=False)
                if isinstance(taken, Holder):
                    self._holder = taken
                    if taken != before:
                        log.warning("%s belongs to %s", base, taken.words())
                    return
                self._claim = taken
                self._take_up(base)
            except OSError as error:
                if self._claim is not None:
                    self._claim.release()
                self._claim, self._refused = None, error

    def close(self) -> None:
        """Release the folder, as the end of this process would; workers go on."""
        with self._lock:
            if self._claim is not None:
                self._claim.release()
            self._claim, self._base = None, None
            for lane in self._lanes.values():
                lane.waiting.clear()
                lane.active.clear()
            self._runs.clear()
            self._unsaved.clear()

    def _elsewhere(self) -> str:
        if self._refused is not None:
            return f"{trouble(self._refused, home() / LOCK)} No run can be started until then."
        holder = (self._holder or Holder()).words()
        return (
            f'Another Limber ({holder}) has the folder "{home()}". You can watch and stop its runs '
            "here; start new ones there, or start this Limber with another folder in LIMBER_HOME."
        )

    def _take_up(self, base: Path) -> None:
        own = {name for lane in self._lanes.values() for name in (*lane.active, *lane.waiting)}
        for run_id in [name for name, run in self._runs.items() if run.view.live]:
            # It was read while another server owned the folder.
            if run_id not in own or self._runs[run_id].process is None:
                self._forget(run_id)
        records = [read_record(path) for path in run_folders(base)]
        unknown = [run for run in records if run is not None and run.view.id not in self._runs]
        self._number = max([self._number, *(run.view.number for run in unknown)])
        for run in sorted(unknown, key=lambda run: (run.view.number, run.view.created)):
            if run.view.live or run.spoilt:
                self._resume(run)
        self._fill()
        self._keep()

    def _resume(self, run: Run) -> None:
        """Resume a run that had not ended when its record was last written."""
        read_events(run)
        pid = find_worker(run)
        if pid is not None:
            # Even if the record was damaged meanwhile: a worker is running.
            self._runs[run.view.id] = run
            if run.spoilt or run.view.state == "queued":
                run.view = replace(
                    run.view, state="running", started=run.view.created, message=None
                )
            run.pid = pid
            self._lane(run).active.append(run.view.id)
            self._save(run)
        elif not run.spoilt:
            self._runs[run.view.id] = run
            if run.view.state == "queued" and not has_begun(run) and not stop_wanted(run):
                self._lane(run).waiting.append(run.view.id)
                sweep(run.view.folder)
            else:
                self._conclude(run, None)

    def _look(self, folder: Path, known: Run | None) -> Run | None:
        """Return a run as its folder describes it, keeping the events that were already read."""
        try:
            run = read_record(folder)
            if run is None or run.spoilt:
                return run
            if self._claim is not None and run.view.live:
                # Somebody copied it here while this server owned the folder.
                self._resume(run)
                return run
            if known is None:
                read_events(run)
        except OSError:
            return known
        if known is not None:
            known.view = replace(
                known.view,
                state=run.view.state,
                started=run.view.started,
                ended=run.view.ended,
                message=run.view.message,
            )
            run = known
            with contextlib.suppress(OSError):
                read_events(run)
        self._runs[run.view.id] = run
        return run

    def _look_around(self) -> None:
        """Read what another server's lanes hold."""
        for lane in self._lanes.values():
            lane.active.clear()
            lane.waiting.clear()
        live = []
        try:
            folders = run_folders(home())
        except OSError:
            folders = []
        for path in folders:
            known = self._runs.get(path.name)
            if known is None or known.view.live:
                run = self._look(path, known)
                if run is not None and run.view.live:
                    live.append(run)
        for run in sorted(live, key=lambda run: run.view.number):
            lane = self._lane(run)
            (lane.waiting if run.view.state == "queued" else lane.active).append(run.view.id)

    # Lanes

    def _lane(self, run: Run) -> _Lane:
        return self._lanes[LANES[run.view.kind]]

    def _place(self, run: Run) -> int:
        lane = self._lane(run)
        if run.view.state != "queued" or run.view.id not in lane.waiting:
            return 0
        return lane.waiting.index(run.view.id) + len(lane.active)

    def _forget(self, run_id: str) -> None:
        run = self._runs.pop(run_id)
        self._unsaved.pop(run_id, None)
        lane = self._lane(run)
        for names in (lane.waiting, lane.active):
            with contextlib.suppress(ValueError):
                names.remove(run_id)

    def _fill(self) -> None:
        for lane in self._lanes.values():
            while (
                self._claim is not None
                and lane.waiting
                and len(lane.active) < lane.slots
                and time.monotonic() >= lane.not_before
            ):
                run = self._runs[lane.waiting[0]]
                try:
                    lane.held_by = self._begin(run)
                except Exception as error:
                    log.exception("run %s could not be started", run.view.id)
                    message = f"The worker could not be started ({type(error).__name__})."
                    self._end(run, "failed", message)
                if lane.held_by is not None:
                    run.view = replace(run.view, phase=_waits_for(lane.held_by))
                    lane.not_before = time.monotonic() + AGAIN_S
                    break

    def _begin(self, run: Run) -> OSError | None:
        """Launch the worker of a waiting run; return the error that makes it wait, or None."""
        folder = run.view.folder
        if is_gone(folder):
            self._end(run, "failed", "The run's folder was deleted before it began.")
            return None
        if stop_wanted(run):
            self._end(run, "stopped", None)
            return None
        try:
            # If this cannot be written, the worker would fail at once, and so would all after it.
            write_record(run)
            with (
                (folder / "stdout.log").open("wb") as out,
                (folder / "stderr.log").open("wb") as err,
            ):
                run.process = self._launch(run.argv, out, err)
        except OSError as error:
            if no_room(error) or error.errno in PASSING:
                return error
            self._end(run, "failed", f"The worker could not be started ({error.strerror}).")
            return None
        run.pid = run.process.pid
        run.begun = run.heard = time.monotonic()
        run.view = replace(run.view, state="running", started=time.time(), phase="")
        lane = self._lane(run)
        lane.waiting.remove(run.view.id)
        lane.active.append(run.view.id)
        self._save(run)
        return None

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

    # Looking after what runs

    def _keep(self) -> None:
        """Make sure that the keeper runs while there is anything to look after."""
        if not self._busy() or self._kept():
            return
        self._keeper = threading.Thread(target=self._keep_on, daemon=True, name="runs")
        try:
            self._keeper.start()
        except RuntimeError:
            # No thread left: pages look after the runs whenever they ask, and try again.
            self._keeper = None

    def _kept(self) -> bool:
        return self._keeper is not None and self._keeper.is_alive()

    def _busy(self) -> bool:
        lanes = self._lanes.values()
        return self._claim is not None and (
            bool(self._unsaved) or any(lane.active or lane.waiting for lane in lanes)
        )

    def _keep_on(self) -> None:
        while True:
            with self._lock:
                try:
                    self._tend()
                except Exception:
                    log.exception("looking after the runs failed")
                if not self._busy():
                    self._keeper = None
                    return
            time.sleep(POLL_S)

    def _tend_without_keeper(self) -> None:
        if not self._kept() and self._busy():
            self._tend()
            self._keep()

    def _tend(self) -> None:
        for name in [name for lane in self._lanes.values() for name in lane.active]:
            run = self._runs[name]
            try:
                self._follow(run)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in PASSING:
                    continue
                log.exception("run %s could not be followed", name)
                signal_group(run, kill=True)
                self._end(run, "failed", "Limber lost track of this run. See the log.")
        for name in [name for lane in self._lanes.values() for name in lane.waiting]:
            if stop_wanted(self._runs[name]):
                self._end(self._runs[name], "stopped", None)
        self._fill()
        if self._unsaved and time.monotonic() - self._saved_at >= AGAIN_S:
            self._saved_at = time.monotonic()
            for name in list(self._unsaved):
                self._save(self._runs[name])

    def _follow(self, run: Run) -> None:
        code = run.process.poll() if run.process else None
        alive = code is None if run.process else find_worker(run) is not None
        read_events(run)
        if not alive:
            self._conclude(run, code)
            return
        if not run.lost and is_gone(run.view.folder):
            # Its results would have no place.
            run.lost = True
            signal_group(run, kill=False)
        if run.stop_asked is None and (run.lost or stop_wanted(run)):
            self._ask_to_stop(run)
        self._press(run)

    def _ask_to_stop(self, run: Run) -> None:
        run.stop_asked = time.monotonic()
        run.view = replace(run.view, state="stopping")
        self._save(run)
        self._keep()

    def _press(self, run: Run) -> None:
        if run.stop_asked is None or run.pid is None:
            return
        waited = time.monotonic() - run.stop_asked
        if waited > KILL_AFTER_S:
            signal_group(run, kill=True)
        elif waited > TERM_AFTER_S:
            signal_group(run, kill=False)

    def _conclude(self, run: Run, code: int | None) -> None:
        """End a run whose worker has ended.

        Args:
            run: The run.
            code: The worker's exit code; None if another server had started it.
        """
        read_events(run)
        # A worker ends by itself if its folder goes before it has opened its events.
        if run.lost or is_gone(run.view.folder):
            self._end(run, "failed", "The run's folder was deleted while it ran.")
        elif run.error is not None and not run.stop_asked:
            self._end(run, "failed", run.error)
        elif run.saw_stopped or (run.stop_asked is not None and not run.saw_done):
            self._end(run, "stopped", None)
        elif run.saw_done or code == 0:
            # Events may be lost on a full disk; an exit code never is.
            self._end(run, "done", None)
        elif code is None:
            self._end(run, "failed", "The program was closed, and the worker ended with it.")
        elif code < 0:
            self._end(
                run,
                "failed",
                "The worker was ended from outside. The machine may have run out of memory: try "
                "smaller batches or smaller images.",
            )
        else:
            self._end(run, "failed", _why(run, code))

    def _end(self, run: Run, state: RunState, message: str | None) -> None:
        run.view = replace(run.view, state=state, message=message, ended=run.ended_at(), eta_s=None)
        run.process = None
        # Before anything is saved: a slow or full disk must not hold up the runs behind it.
        lane = self._lane(run)
        for names in (lane.waiting, lane.active):
            with contextlib.suppress(ValueError):
                names.remove(run.view.id)
        self._save(run)
        sweep(run.view.folder)

    def _save(self, run: Run) -> None:
        """Write a run's record now, or as soon as the disk allows."""
        if run.spoilt:
            # Somebody may want to repair the damaged record.
            return
        try:
            write_record(run)
        except OSError as error:
            if is_gone(run.view.folder):
                self._unsaved.pop(run.view.id, None)
                return
            if run.view.id not in self._unsaved:
                log.warning("run %s could not be saved: %s", run.view.id, error)
            self._unsaved[run.view.id] = error
            self._keep()
        else:
            self._unsaved.pop(run.view.id, None)


def _waits_for(error: OSError) -> str:
    if no_room(error):
        return "Waiting until there is room on the disk"
    return f"Waiting until the machine can start a process ({error.strerror})"


def _why(run: Run, code: int) -> str:
    """Return why a worker ended whose events do not say so."""
    said = last_line(run.view.folder / "stderr.log", code)
    if said is not None:
        return said
    free = free_bytes(run.view.folder)
    if code == 2 and free is not None and free < LEAST_FREE:
        # There was no room for its own message either.
        return trouble(OSError(errno.ENOSPC, ""), run.view.folder)
    return (
        f"The worker ended unexpectedly (exit code {code}). Its log: "
        f"{run.view.folder / 'stderr.log'}"
    )


queue = RunQueue()
