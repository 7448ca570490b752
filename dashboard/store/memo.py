"""A small cache for values that take seconds to make: shared by all sessions, and bounded.

`st.cache_resource` cannot say whether it has a value without computing it, and it forgets
failures: a page without internet access would wait for the same refusal at every rerun.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from core.errors import LimberError

T = TypeVar("T")

REFUSAL_KEPT_S = 20.0


class Memo(Generic[T]):
    """Values by key, each made once; the least recently used is dropped first."""

    def __init__(self, *, max_entries: int) -> None:
        """Start empty."""
        self._max_entries = max_entries
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._refusals: dict[Hashable, tuple[float, LimberError]] = {}
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> T | None:
        """Return the value if it has been made."""
        with self._lock:
            return self._values.get(key)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value, and make it first if needed.

        Raises:
            LimberError: `make` raised it, now or less than `REFUSAL_KEPT_S` ago.
        """
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]
                when, refusal = self._refusals.get(key, (0.0, None))
            if refusal is not None and time.monotonic() - when < REFUSAL_KEPT_S:
                raise refusal
            try:
                value = make()
            except LimberError as error:
                with self._lock:
                    self._refusals = {
                        old: kept
                        for old, kept in self._refusals.items()
                        if time.monotonic() - kept[0] < REFUSAL_KEPT_S
                    }
                    self._refusals[key] = (time.monotonic(), error)
                raise
            with self._lock:
                self._values[key] = value
                self._refusals.pop(key, None)
                while len(self._values) > self._max_entries:
                    old, _ = self._values.popitem(last=False)
                    self._making.pop(old, None)
            return value

    def forget_refusal(self, key: Hashable) -> None:
        """Let the next `get` try again at once, because a person asked for it."""
        with self._lock:
            self._refusals.pop(key, None)
