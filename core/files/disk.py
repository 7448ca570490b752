"""What to say where a disk takes no more: which folder, how much is free, what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeGuard

# Full, over quota, or larger than this process may write (`ulimit -f`): room may come back.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def no_room(error: BaseException) -> TypeGuard[OSError]:
    """Whether a write failed because there is no room for it."""
    return isinstance(error, OSError) and error.errno in NO_ROOM


def nearest_folder(path: Path) -> Path:
    """Return the path if it is a folder, else the nearest folder above it."""
    place = path
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def free_bytes(path: Path) -> int | None:
    """Return the bytes that may still be written below a path; None where nobody can say."""
    try:
        return shutil.disk_usage(nearest_folder(path)).free
    except OSError:
        return None


def settle_temporary_folder() -> None:
    """Let libraries learn where temporary files go, though nothing can be written there now.

    Python looks for a folder that takes a file and, on a full disk, finds none. torch asks for its
    name alone, in the middle of training, and would end there.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ.get("TMPDIR") or ("/tmp" if os.name == "posix" else os.curdir)


def size(count: float) -> str:
    """Return a number of bytes in words, such as 12.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def trouble(error: OSError, path: Path) -> str:
    """Return why a place cannot be written to and what to do, in one or two sentences.

    Args:
        error: What the system said.
        path: The file or folder that was to be written.
    """
    folder = nearest_folder(path)
    if error.errno == errno.EDQUOT:
        return f'Your quota on the disk of "{folder}" is used up. Delete what you do not need.'
    if error.errno == errno.EFBIG:
        return (
            f'"{path}" would become larger than this process may write. Raise the limit '
            "(ulimit -f)."
        )
    if error.errno == errno.ENOSPC:
        if _out_of_names(folder):
            return (
                f'The disk is full: "{folder}" has no room for one more file, however small (no '
                "inodes are left). Delete files there."
            )
        free = free_bytes(folder)
        left = "" if free is None else f" has {size(free)} free"
        return f'The disk is full: "{folder}"{left}. Delete what you do not need there.'
    return f'"{path}" cannot be written ({error.strerror or type(error).__name__}).'


def _out_of_names(folder: Path) -> bool:
    if not hasattr(os, "statvfs"):
        return False
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    # Some file systems have no fixed number of inodes and say 0 of 0.
    return status.f_files > 0 and status.f_favail == 0
