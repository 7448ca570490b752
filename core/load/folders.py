"""A folder -> its image files; what is no file that can be read is counted and left out."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import DataError
from core.files.inputs import open_input
from core.load.pictures import IMAGE_SUFFIXES, PLAIN, Look, look_at

MAX_ENTRIES = 1_000_000
MAX_DEPTH = 64

NOWHERE = "links that lead nowhere or in a circle"
BACK = "links back to a folder above them"
NO_FILE = "pipes, sockets or devices"
CLOSED = "files or folders that cannot be read"


@dataclass(slots=True)
class Found:
    """What lies in a folder and below.

    Attributes:
        files: Path below the folder to size in bytes and time of the last change, in order.
        skipped: What was left out, and how often.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def note(self) -> str:
        """What was left out, in words; empty where nothing was."""
        if not self.skipped:
            return ""
        rows = [f"{what} ({count:,})" for what, count in sorted(self.skipped.items())]
        return f"Left out of the folder: {', '.join(rows)}."


def walk(folder: Path) -> Found:
    """List the image files below a folder, links to files and folders followed.

    A link that leads back to a folder above it ends there. Hidden files and folders are passed
    over, and so are files that are no images by their names.

    Raises:
        DataError: There is far more in it than a data set has, or it is too deep.
        OSError: The folder itself cannot be listed.
    """
    walked = Found()
    mark = folder.stat()
    _walk(str(folder), "", ((mark.st_dev, mark.st_ino),), walked, Counter())
    walked.files = dict(sorted(walked.files.items()))
    return walked


def _walk(
    folder: str,
    below: str,
    above: tuple[tuple[int, int], ...],
    found: Found,
    seen: Counter[str],
) -> None:
    if len(above) > MAX_DEPTH:
        raise DataError(f'"{folder}" lies more than {MAX_DEPTH} folders deep. Flatten the folder.')
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        if not below:
            raise
        found.skipped[CLOSED] += 1
        return
    seen["entries"] += len(entries)
    if seen["entries"] > MAX_ENTRIES:
        raise DataError(
            f'"{folder}" and the folders beside it hold more than {MAX_ENTRIES:,} files. Choose a '
            "folder that holds only the images."
        )
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = f"{below}{entry.name}"
        is_image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122
        try:
            if not is_image and entry.is_file(follow_symlinks=False):
                continue
            mark = entry.stat()
        except OSError as error:
            led_astray = error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
            found.skipped[NOWHERE if led_astray else CLOSED] += 1
            continue
        if stat.S_ISDIR(mark.st_mode):
            here = (mark.st_dev, mark.st_ino)
            if here in above:
                found.skipped[BACK] += 1
            else:
                _walk(entry.path, f"{name}/", (*above, here), found, seen)
        elif is_image and stat.S_ISREG(mark.st_mode):
            found.files[name] = (mark.st_size, mark.st_mtime_ns)
        elif is_image:
            found.skipped[NO_FILE] += 1


def look_at_files(folder: Path, found: Found) -> dict[str, Look]:
    """Return what the heads of the files tell; those that cannot be opened are left out, counted.

    Only what is not `PLAIN` is returned: most folders hold nothing else.
    """
    looks: dict[str, Look] = {}
    for name in list(found.files):
        try:
            with open_input(folder / name) as stream:
                look = look_at(stream)
        except OSError:
            del found.files[name]
            found.skipped[CLOSED] += 1
            continue
        if look != PLAIN:
            looks[name] = look
    return looks
