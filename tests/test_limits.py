"""A process ends beyond its memory or time, and a want of memory is told from other faults."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import ModelError
from core.limits import free_memory, is_no_memory

ROOT = Path(__file__).resolve().parent.parent


def _limited(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("mebibytes", [200, 2900])
def test_memory_beyond_the_limit_is_refused(mebibytes: int) -> None:
    ended = _limited(
        "from core.limits import limit_memory\n"
        "limit_memory(300, lambda: None)\n"
        f"try: bytearray({mebibytes} << 20)\n"
        "except MemoryError: raise SystemExit(7)\n"
    )

    assert ended.returncode == (7 if mebibytes > 300 else 0), ended.stderr


@pytest.mark.parametrize("work", ["time.sleep(60)", "any(False for _ in iter(int, 1))"])
def test_time_beyond_the_limit_ends_the_process(work: str) -> None:
    begun = time.monotonic()

    ended = _limited(
        "import os, time\nfrom core.limits import limit_time\n"
        f"limit_time(1, lambda: os._exit(7))\n{work}\n"
    )

    assert ended.returncode == 7
    assert time.monotonic() - begun < 20


def test_a_reader_that_lets_no_thread_run_is_ended_by_the_system() -> None:
    ended = _limited(
        "import signal\nfrom core import limits\nlimits.HARD_AFTER_S = 0\n"
        # One step of a thread in five minutes is none: as if one call in C held on to it all.
        "import sys; sys.setswitchinterval(300)\n"
        "limits.limit_time(1, lambda: None)\nany(False for _ in iter(int, 1))\n"
    )

    assert ended.returncode == -14


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory"
            ),
            True,
        ),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("the shapes differ"), False),
        (ModelError("not a state dict"), False),
    ],
)
def test_a_want_of_memory_is_told_from_other_errors(error: Exception, is_it: bool) -> None:
    wrapped = ModelError("cannot be read")
    wrapped.__cause__ = error

    assert is_no_memory(wrapped) == is_it
    assert is_no_memory(error) == is_it


def test_free_memory_is_a_number_of_bytes_that_this_process_fits_into() -> None:
    free = free_memory()

    assert free is not None
    assert 2**20 < free < 2**50
