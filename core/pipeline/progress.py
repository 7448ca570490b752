"""How a caller follows a long stage and stops it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.errors import Stopped


@dataclass(frozen=True, slots=True)
class Progress:
    """How a caller follows a long stage and stops it; the default follows nothing.

    Attributes:
        phase: Called with a few words when another part begins.
        advance: Called with (done, total, unit).
        should_stop: Asked often; true ends the stage soon.
    """

    phase: Callable[[str], None] = lambda words: None
    advance: Callable[[int, int, str], None] = lambda done, total, unit: None
    should_stop: Callable[[], bool] = lambda: False


def tick(progress: Progress, done: int, total: int, unit: str) -> None:
    """Say how many images are read.

    Raises:
        Stopped: Where that is wanted.
    """
    if progress.should_stop():
        raise Stopped("Stopped while reading the images; nothing was written.")
    progress.advance(done, total, unit)
