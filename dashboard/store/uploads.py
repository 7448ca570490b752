"""Uploaded files on disk: kept while something needs them, removed when refused or replaced.

A file's folder is named after its content, so uploading the same file again gives the same choice:
its picks and measurements are found, and nothing is inspected twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from core.errors import LimberError
from dashboard.store import runs
from dashboard.store.workspace import Choice, Workspace

Kind = Literal["data", "checkpoint"]
NAME_LETTERS = 80
DIGEST_LETTERS = 32

_looked_at: set[Path] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def upload(space: Workspace, kind: Kind, name: str, content: memoryview) -> Iterator[Path]:
    """Store an upload, yield its path, and afterwards remove what nothing needs any more.

    Within the block the upload may become the choice. If it does not, its file is removed. If it
    does, the upload that it replaces is removed, unless a run still reads that one.

    Args:
        space: The workspace that gets it.
        kind: What it is for; uploads of the other kind are not touched.
        name: What the browser called it; reduced to harmless letters.
        content: The file.

    Raises:
        LimberError: The disk cannot take it.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).name).lstrip(".")[-NAME_LETTERS:]
    digest = hashlib.sha256(content).hexdigest()[:DIGEST_LETTERS]
    folder = _folder(space, kind) / digest
    path = folder / (plain or "upload")
    with _lock:
        _looked_at.add(folder)
    try:
        try:
            if not path.exists() or path.stat().st_size != content.nbytes:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        except OSError as error:
            raise LimberError(
                f"The upload cannot be stored ({error.strerror}). Free some space, or give a path "
                "on this machine."
            ) from error
        yield path
    finally:
        with _lock:
            _looked_at.discard(folder)
        _tidy(space, kind)


def is_upload(space: Workspace, path: str | None) -> bool:
    """Whether a path is one of the workspace's uploads."""
    return path is not None and Path(path).is_relative_to(space.folder / "uploads")


def _folder(space: Workspace, kind: Kind) -> Path:
    return space.folder / "uploads" / kind


def _tidy(space: Workspace, kind: Kind) -> None:
    needed = _needed(space)
    with _lock, contextlib.suppress(OSError):
        for folder in _folder(space, kind).iterdir():
            if folder not in needed | _looked_at:
                shutil.rmtree(folder, ignore_errors=True)


def _needed(space: Workspace) -> set[Path]:
    choices = [space.choice]
    for run in runs.queue.live():
        with contextlib.suppress(ValueError):
            choices.append(Choice.model_validate(run.facts.get("choice", {})))
    named = [path for choice in choices for path in (choice.data, choice.checkpoint) if path]
    return {Path(path).parent for path in named}
