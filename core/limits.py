"""How much memory and time this process may take, kept to by the system where it can.

A file from a stranger may hold anything: two megabytes that unpack to gigabytes, or a list that
takes hours to read. Size checks catch what somebody thought of; this catches the rest.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

MIB = 2**20
WATCH_S = 0.05
# After so long the system ends a process that is too deep in one call to end itself.
HARD_AFTER_S = 3
# What the libraries say of an allocation that was refused: C++'s allocators raise no MemoryError.
NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")


def free_memory() -> int | None:
    """Return how many bytes this machine can still give a process; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as told:  # noqa: PTH123 - no file of a person's
            for line in told:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def limit_memory(memory_mb: int, over: Callable[[], None]) -> None:
    """Let this process hold at most so much data, from now on and for good.

    On Linux an allocation beyond it fails (RLIMIT_DATA: heap and private mappings, which leaves
    code and shared file mappings out). Other systems do not keep to that limit, so a thread looks
    at the memory in use 20 times a second; Windows tells it nothing, and there is no limit there.

    Args:
        memory_mb: In MiB, what is in use already included.
        over: Called in that thread when the limit is passed.
    """
    try:
        import resource
    except ImportError:
        return
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory_mb * MIB
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    # Kilobytes everywhere but on macOS, where they are bytes.
    unit = 1 if sys.platform == "darwin" else 1024

    def watch() -> None:
        while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit <= memory_mb * MIB:
            time.sleep(WATCH_S)
        over()

    threading.Thread(target=watch, daemon=True).start()


def limit_time(seconds: int, over: Callable[[], None]) -> None:
    """Call `over` after so many seconds, in a thread; a little later the system ends the process.

    Args:
        seconds: From now.
        over: Should end the process.
    """
    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    if os.name == "posix":
        import signal

        # A thread waits for the interpreter, which one long call in C may hold; the alarm of the
        # system does not.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds + HARD_AFTER_S)


def is_no_memory(error: BaseException) -> bool:
    """Whether an error, or one it was raised from, says that memory was refused."""
    return any(
        isinstance(cause, MemoryError) or any(sign in str(cause) for sign in NO_MEMORY)
        for cause in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
