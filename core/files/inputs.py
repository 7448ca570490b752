"""Files a person names, read without trust: only ordinary files, of a size that can be meant.

Opening a pipe waits for a writer that may never come, a device never ends, and a small file may
stand for a large one. Every file that a command or a page is told to read comes through here.
What is wrong is an `OSError` whose `strerror` is a phrase for people, so that callers say it in
their own sentence.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import OptionError

CHUNK = 2**20


def input_status(path: Path) -> os.stat_result:
    """Return the status of an ordinary file, its links followed.

    Raises:
        OSError: It is not there, not readable as a name, or is a folder, pipe, socket or device.
            `strerror` says which.
    """
    try:
        status = path.stat()
    except ValueError as error:
        raise OSError(errno.EINVAL, "its name holds a NUL or is no text") from error
    what = _other_than_file(status.st_mode)
    if what is not None:
        raise OSError(errno.EINVAL, f"it is a {what}, not a file")
    return status


def _other_than_file(mode: int) -> str | None:
    for holds, what in (
        (stat.S_ISREG, None),
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "pipe"),
        (stat.S_ISSOCK, "socket"),
    ):
        if holds(mode):
            return what
    return "device"


def is_input(path: Path) -> bool:
    """Whether an ordinary file is there; whatever keeps one from finding out means no."""
    try:
        input_status(path)
    except OSError:
        return False
    return True


def is_there(path: Path) -> bool:
    """Whether anything is there; whatever keeps one from finding out means no."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def open_input(path: Path) -> BinaryIO:
    """Open an ordinary file for reading; never waits for a pipe.

    Raises:
        OSError: As `input_status`, or it may not be read.
    """
    input_status(path)
    # Between the look and the opening it may have become a pipe: then this does not wait either.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        what = _other_than_file(os.fstat(handle).st_mode)
        if what is not None:
            raise OSError(errno.EINVAL, f"it is a {what}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_input(path: Path, *, most: int) -> bytes:
    """Return the content of an ordinary file of at most `most` bytes.

    Raises:
        OSError: As `open_input`, or it is larger.
    """
    with open_input(path) as file:
        left, parts = most, []
        # The size is a claim: some files of the system say 0 and hold more.
        if os.fstat(file.fileno()).st_size <= most:
            while left >= 0 and (part := file.read(min(CHUNK, left + 1))):
                parts.append(part)
                left -= len(part)
            if left >= 0:
                return b"".join(parts)
    raise OSError(errno.EFBIG, f"it is larger than {in_words(most)}")


def bytes_allowed(variable: str, default_gb: float) -> int:
    """Return a limit in bytes that a variable of the environment may change, in gigabytes.

    Raises:
        OptionError: The variable holds no number above 0.
    """
    text = os.environ.get(variable, "")
    try:
        number = float(text) if text else default_gb
    except ValueError:
        number = 0.0
    if not 0 < number < 2**20:
        raise OptionError(f'{variable} is "{text}"; give a number of gigabytes above 0.')
    return int(number * 2**30)


def in_words(count: int) -> str:
    """Return a number of bytes as people say it: "64 MiB", "2.9 GiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"


class JSONError(ValueError):
    """Not JSON, or JSON that cannot be meant; the message is a phrase for people."""


def strict_json(data: bytes | str, *, most_values: int) -> Any:
    """Return the content of JSON text.

    Args:
        data: The text; bytes are UTF-8, with or without a mark of the byte order.
        most_values: Numbers, texts, lists and objects that are read. Each takes some 60 bytes of
            memory at least, whatever little it takes in the file.

    Raises:
        JSONError: Not UTF-8, not JSON, an object with a key twice, a number JSON does not have
            (NaN, Infinity, thousands of digits), nested by the thousand, or of more values than
            `most_values`.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise JSONError("it is not UTF-8 text") from error
    # Every value but the first follows a comma, an opening bracket or a colon. Counting them
    # takes no memory, and parsing takes a great deal.
    values = sum(text.count(mark) for mark in ",[{")
    if values > most_values:
        raise JSONError(f"it has {values:,} values; at most {most_values:,} are read")
    try:
        return json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        detail = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise JSONError(detail) from error
    except RecursionError as error:
        raise JSONError("it is nested too deeply") from error
    except JSONError:
        raise
    except ValueError as error:
        # A number of thousands of digits; the rest of the message is advice to programmers.
        raise JSONError(str(error).partition(";")[0]) from error


class KeyTwiceError(JSONError):
    """A key stands twice in one object: which one counts is anyone's guess."""

    def __init__(self, key: str) -> None:
        super().__init__(f'it has the key "{key[:80]}" twice in one place')
        self.key = key


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise KeyTwiceError(next(key for key, count in counts.items() if count > 1))
    return table


def _no_number(word: str) -> Any:
    raise JSONError(f"{word} is not a number JSON has")
