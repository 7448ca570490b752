"""What a running command tells the world: a line on the terminal, events in a file, a stop.

A page follows a command through the file, one JSON object a line, and stops it by creating
another file. A heartbeat tells a slow command from a dead one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from core.cli.terminal import say_error
from core.errors import OptionError
from core.files.claims import lock
from core.files.disk import no_room, trouble
from core.files.inputs import is_input, is_there, open_input
from core.text import json_text, one_line

HEARTBEAT_S = 2.0
LEAST_GAP_S = 0.1
# Events that mean nothing later: on a full disk they are not kept until there is room.
PASSING = ("heartbeat", "progress")
# Time left is read off the last few seconds, not off the start, which holds the warm-up.
WINDOW = 30


class Events:
    """The voice of one command. Use as a context manager; all methods are thread-safe.

    Args:
        path: File to append events to; None writes none.
        stop_file: Its appearance asks the command to stop; None for none.
        terminal: Whether to show progress on stderr.
    """

    def __init__(self, path: Path | None, stop_file: Path | None, *, terminal: bool) -> None:
        self._path = path
        self._stop_file = stop_file
        self._terminal = terminal
        self._file: IO[bytes] | None = None
        self._unwritten: list[bytes] = []
        self._why = ""
        self._refused = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._stop = threading.Event()
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._unit = ""
        self._last = 0.0
        self._shown = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Events:
        """Open the file, start the heartbeat, and take SIGTERM and Ctrl-C as a wish to stop."""
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _refuse_other_files(self._path)
                # Without waiting: a pipe that nobody reads is refused, and one whose reader is
                # slow gets its lines late instead of holding up the command.
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
                handle = os.open(self._path, flags, 0o666)
                self._file = os.fdopen(handle, "ab", buffering=0)
            except (OSError, ValueError) as error:
                if no_room(error):
                    raise OptionError(f"{trouble(error, self._path)} Or leave --events out.") from (
                        error
                    )
                why = error.strerror if isinstance(error, OSError) else error
                raise OptionError(f'--events "{self._path}" cannot be written ({why}).') from error
            if lock(self._file.fileno()) is False:
                self._file.close()
                raise OptionError(
                    f'--events "{self._path}" is being written by another command. Give a new name.'
                )
            # A machine without a free thread still works, only more quietly.
            with suppress(RuntimeError):
                threading.Thread(target=self._beat, daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            for number, handler in (
                (signal.SIGTERM, lambda *_: self._stop.set()),
                (signal.SIGINT, self._interrupted),
            ):
                self._handlers[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeat and close the file."""
        self._ended.set()
        for number, before in self._handlers.items():
            signal.signal(number, before)
        with self._lock:
            if self._file is not None:
                self._write()
                with suppress(OSError):
                    self._file.close()
                self._file = None
        self._clear()
        if self._unwritten and not self._refused:
            say_error(
                f'limber: --events "{self._path}" could not be written to its end ({self._why}).'
            )

    def _interrupted(self, *_: object) -> None:
        if self._stop.is_set():
            # The second time a person means now.
            raise KeyboardInterrupt
        self._stop.set()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self.emit("heartbeat", pid=os.getpid())

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event, written at once, or as soon as there is room on the disk.

        A full disk does not end the work: whether its result can be written shows at its end, and
        what could not be told by then is said on stderr, unless a refusal is the last word.
        """
        line = json_text(
            json.dumps({"event": event, "t": time.time(), **fields}, ensure_ascii=False)
        )
        self._refused = self._refused or event == "error"
        with self._lock:
            if self._file is None or (not self._write() and event in PASSING):
                return
            self._unwritten.append(line.encode("utf-8", "backslashreplace") + b"\n")
            self._write()

    def _write(self) -> bool:
        """Write what is not written yet; return whether nothing is left."""
        assert self._file is not None
        while self._unwritten:
            try:
                written = self._file.write(self._unwritten[0]) or 0
            except OSError as error:
                self._why = error.strerror or type(error).__name__
                return False
            if written < len(self._unwritten[0]):
                # A full disk takes a part of a line; the rest follows where that ends.
                self._unwritten[0] = self._unwritten[0][written:]
                return False
            self._unwritten.pop(0)
        return True

    def should_stop(self) -> bool:
        """Return whether somebody asked for a stop."""
        if not self._stop.is_set() and self._stop_file is not None and is_there(self._stop_file):
            self._stop.set()
        return self._stop.is_set()

    def phase(self, words: str) -> None:
        """Announce the next part of the work."""
        self._marks.clear()
        self.emit("phase", name=words)
        self._show(f"{words} ...")

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far it is, at most ten times a second; the last one always."""
        now = time.monotonic()
        if unit != self._unit:
            self._marks.clear()
            self._unit = unit
        self._marks.append((now, done))
        if now - self._last < LEAST_GAP_S and done < total:
            return
        self._last = now
        eta = None
        (first_time, first_done) = self._marks[0]
        if done > first_done:
            eta = (total - done) * (now - first_time) / (done - first_done)
        self.emit("progress", done=done, total=total, unit=unit, eta_s=eta)
        left = "" if eta is None else f", {eta:.0f} s left"
        self._show(f"{done} of {total} {unit}{left}")

    def step(self, fields: Mapping[str, Any]) -> None:
        """Report one optimiser step."""
        self.emit("step", **fields)

    def _show(self, words: str) -> None:
        if self._terminal:
            self._shown = True
            sys.stderr.write(f"\r\x1b[2K{one_line(words, longest=200)}")
            sys.stderr.flush()

    def _clear(self) -> None:
        if self._terminal and self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def _refuse_other_files(path: Path) -> None:
    """Raise if a file is there that no command wrote its events to: a plan, weights, an image."""
    if not is_input(path) or not path.stat().st_size:
        return
    with open_input(path) as file:
        first = file.readline(2**16)
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "event" not in content:
        raise OptionError(
            f'--events "{path}" is a file of another kind, to which nothing is appended. Give a '
            "new name."
        )
