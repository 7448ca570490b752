"""Earlier work on this machine: the list of workspaces, read without opening any of them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dashboard.store.workspace import WORKSPACE_ID, WorkspaceState, home

# Nobody looks beyond this many; the newest stay.
MOST = 500

_known: dict[Path, tuple[object, Work | None]] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One workspace as a list shows it.

    Attributes:
        id: Its name in the address.
        name: What a person called it; may be empty.
        model, checkpoint, data: The choice, as the command line takes it.
        used: When anything in it was last written, in seconds since 1970.
        runs: How many runs it has.
    """

    id: str
    name: str
    model: str
    checkpoint: str | None
    data: str
    used: float
    runs: int


def recent_work(*, without: str) -> tuple[Work, ...]:
    """Return the workspaces in which something was done, the last used first.

    Args:
        without: Id of the workspace that is open. Workspaces that cannot be read are left out,
            and so are those that nobody changed.
    """
    with _lock:
        works = [work for work in map(_work, _folders()) if work is not None and work.id != without]
    return tuple(sorted(works, key=lambda work: work.used, reverse=True)[:MOST])


def _folders() -> Iterator[Path]:
    with suppress(OSError), os.scandir(home() / "workspaces") as entries:
        for entry in entries:
            if WORKSPACE_ID.fullmatch(entry.name):
                yield Path(entry.path)


def _work(folder: Path) -> Work | None:
    file, runs = folder / "workspace.json", folder / "runs"
    try:
        state = file.stat()
    except OSError:
        _known.pop(folder, None)
        return None
    changed, count = state.st_mtime, 0
    with suppress(OSError):
        changed = max(changed, runs.stat().st_mtime)
    mark = (state.st_mtime_ns, state.st_size, changed)
    known = _known.get(folder)
    if known is None or known[0] != mark:
        with suppress(OSError), os.scandir(runs) as entries:
            count = sum(1 for entry in entries if not entry.name.startswith("."))
        known = _known[folder] = (mark, _read(folder, file, used=changed, runs=count))
    return known[1]


def _read(folder: Path, file: Path, *, used: float, runs: int) -> Work | None:
    try:
        state = WorkspaceState.model_validate(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None
    if not runs and state == WorkspaceState():
        return None
    return Work(
        id=folder.name,
        name=state.name,
        model=state.choice.model,
        checkpoint=state.choice.checkpoint,
        data=state.choice.data,
        used=used,
        runs=runs,
    )
