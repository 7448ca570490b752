"""The one way out to the terminal: lines that steer nothing, JSON, and no library in between."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from core.text import json_text, one_line, printable


def say(line: str) -> None:
    """Print one line of a result; names in it may come from anywhere."""
    print(printable(line))


def say_error(line: str) -> None:
    """Print one line on stderr; where that is a file on a full disk, the exit code has to do."""
    with suppress(OSError):
        print(one_line(line), file=sys.stderr, flush=True)


def say_json(content: Any, *, indent: int | None = 1) -> None:
    """Print JSON that any terminal can show and any reader takes.

    Args:
        content: What `json.dumps` takes; a text is JSON already and is printed as it is.
        indent: Spaces a level.
    """
    text = content
    if not isinstance(content, str):
        text = json.dumps(content, indent=indent, ensure_ascii=False)
    text = json_text(text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        # As escapes of JSON, which the terminal's own way to show a strange letter is not.
        text = json.dumps(json.loads(text), indent=indent)
    print(text)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the warnings of libraries off the terminal while a command runs.

    A person reads one line that says what is wrong, not three pages before it. Filters are left
    alone, so that `python -W error` still raises; whoever gives `-W` is shown everything.
    """
    if sys.warnoptions:
        yield
        return
    shown, level = warnings.showwarning, logging.root.manager.disable
    warnings.showwarning = lambda *args, **kwargs: None
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        warnings.showwarning = shown
        logging.disable(level)
