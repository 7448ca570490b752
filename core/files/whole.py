"""Files that are written whole or not at all, and what lies next to them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from core.errors import OptionError, Remedy
from core.files.disk import no_room, trouble

CompanionKind = Literal["masks", "units", "inside", "arrays"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Raises:
        OptionError: The folder cannot be made or written to, or a link lies there.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_symlink():
        # A file that takes the place of a link would not be where the link leads.
        raise OptionError(f'"{path}" is a link. Remove it, or give the place it leads to.')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            # mkstemp makes the file private; a result should be as readable as any other.
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        remedy = Remedy.START_AGAIN if no_room(error) else Remedy.OTHER_PLACE
        raise OptionError(trouble(error, path), remedy) from error


def companion_path(path: Path, what: CompanionKind) -> Path:
    """Return where the companion of a JSON file lies: masks of a plan, or units of a diagnosis.

    No two files share one: "a.json" has "a.masks.safetensors", and a file whose name does not end
    in .json, such as "a", has "a.masks-of.safetensors".
    """
    if path.suffix == ".json":
        return path.with_name(f"{path.stem}.{what}.safetensors")
    return path.with_name(f"{path.name}.{what}-of.safetensors")
