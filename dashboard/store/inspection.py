"""A worker within limits opens files that came from elsewhere; the server never does.

An upload, or a path that somebody typed, may hold two megabytes that unpack to gigabytes. The
worker (`python -m core inspect`) ends itself, or is ended, when it takes too much memory or time.
What it prints is all that the server ever sees of the file: the outline, a few small pictures, or
one sentence. The server opens nothing after it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from core.errors import LimberError, error_told
from core.records import SampleImage
from dashboard.store.workspace import ROOT

MEMORY_VARIABLE = "LIMBER_INSPECT_MB"
# Twice what torch, timm and a network of ordinary size take (1.0 GiB, measured).
BASE_MB = 2048
# Weights are held as stored, as float32, and once more while they are copied into the network: at
# most eight times the size of a half-precision file. Images unpack to less.
TIMES_FILE = 8
SECONDS = 120
POLL_S = 0.05
# How much longer to wait for a worker that does not end itself in time.
GRACE_S = 6.0
ANSWER_BYTES = 128 * 2**20
AT_ONCE = 2
POSIX = os.name == "posix"

_slots = threading.BoundedSemaphore(AT_ONCE)


def _nothing() -> None:
    """Stand in where no page waits."""


# Called again and again while a page waits for a worker. If the page is gone or has moved on, it
# raises, and that ends the worker.
pulse: ContextVar[Callable[[], object]] = ContextVar("pulse", default=_nothing)


def memory_mb(paths: Sequence[Path]) -> int:
    """Return how much memory a worker gets for files, in MiB: a base plus a multiple of their size.

    It is at most three quarters of the machine's memory. `LIMBER_INSPECT_MB` overrides it.
    """
    given = os.environ.get(MEMORY_VARIABLE, "")
    if given.isascii() and given.isdigit():
        return int(given)
    wanted = BASE_MB + TIMES_FILE * sum(map(_size, paths)) // 2**20
    return min(wanted, _machine_mb() * 3 // 4) if _machine_mb() else wanted


def _machine_mb() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, OSError, ValueError):
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except (OSError, ValueError):
        return 0


def inspect(arguments: Sequence[str], *, files: Sequence[Path]) -> Mapping[str, Any]:
    """Let a worker open files, and return what it says about them.

    Args:
        arguments: After `python -m core inspect`.
        files: The files it opens; their size decides how much memory it gets.

    Returns:
        The worker's JSON.

    Raises:
        LimberError: What the worker told, or that it was ended.
    """
    limit = memory_mb(files)
    command = [sys.executable, "-m", "core", "inspect", *arguments, "--json"]
    command += ["--memory-mb", str(limit), "--seconds", str(SECONDS)]
    while not _slots.acquire(timeout=POLL_S):
        pulse.get()()
    try:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = _run(command, out, err)
            return _answer(code, out, err, files, limit)
    finally:
        _slots.release()


def _run(command: Sequence[str], out: IO[bytes], err: IO[bytes]) -> int | None:
    # One thread: each takes its own memory, and opening a file gains nothing from more.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=POSIX,
        )
    except OSError as error:
        raise LimberError(
            f"No worker can be started to open the file ({error.strerror})."
        ) from error
    deadline = time.monotonic() + SECONDS + GRACE_S
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
            pulse.get()()
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    with contextlib.suppress(OSError):
        if POSIX:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _answer(
    code: int | None, out: IO[bytes], err: IO[bytes], files: Sequence[Path], limit: int
) -> Mapping[str, Any]:
    if code == 0 and out.seek(0, os.SEEK_END) <= ANSWER_BYTES:
        out.seek(0)
        answer: Mapping[str, Any] = json.loads(out.read())
        return answer
    if code == 2:
        out.seek(0)
        # Without such an answer, or with half of one, its line on stderr has to do.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            raise error_told(json.loads(out.read(2**16))["error"])
    err.seek(0)
    lines = err.read(2**16).decode("utf-8", "replace").strip().splitlines()
    if code == 2 and lines:
        raise LimberError(lines[-1].removeprefix("limber: "))
    named = " and ".join(f'"{path.name}"' for path in files) or "What was asked for"
    if code is None:
        raise LimberError(f"{named} was not open after {SECONDS} seconds. Give a smaller file.")
    raise LimberError(
        f"{named} could not be opened: the worker that tried was ended (it may take {limit:,} MB "
        "of memory). The file may be damaged, or made to fill the memory; if it is sound, start "
        f"Limber with a higher {MEMORY_VARIABLE}."
    )


def sample_image(answer: Mapping[str, Any]) -> SampleImage:
    """Return a picture as the worker described it."""
    width, height = answer["original_size"]
    return SampleImage(
        label=str(answer["label"]),
        split=str(answer["split"]),
        name=str(answer["name"]),
        original_png=base64.b64decode(answer["original_png"]),
        input_png=base64.b64decode(answer["input_png"]),
        original_size=(int(width), int(height)),
    )
