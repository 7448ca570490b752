"""Which files of this machine a page may name: all of them, or only those in a few folders.

Where other machines can reach the server, or `LIMBER_ROOTS` is set, paths are confined to the
working directory, the folders of that setting, and what was uploaded here.
"""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import LimberError
from dashboard import gate
from dashboard.store.workspace import home

ROOTS_VARIABLE = "LIMBER_ROOTS"
TORCHVISION = "torchvision:"


def confined() -> bool:
    """Whether paths are confined."""
    return gate.beyond() or bool(os.environ.get(ROOTS_VARIABLE))


def roots() -> tuple[Path, ...]:
    """Return the folders that paths may lead into, as somebody named them."""
    named = os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep)
    own = (Path.cwd(), home() / "workspaces")
    return (*own, *(Path(name).expanduser().absolute() for name in named if name))


def permitted_path(path: str) -> str:
    """Return the path if a page may name it: as it is, or with its links resolved if confined.

    Raises:
        LimberError: It leads elsewhere. The sentence does not tell whether anything is there, and
            a path that plainly leads elsewhere is refused before the disk is asked.
    """
    if not confined():
        return path
    refusal = LimberError(
        f'"{path}" is outside the folders that this server reads. Upload the file, or let whoever '
        f"runs the server name its folder in {ROOTS_VARIABLE}."
    )
    named = Path(path)
    try:
        allowed = [_spellings(root) for root in roots()]
        # Resolved without a look at the disk: how long it takes would tell what is there.
        plain = Path(os.path.normpath(named.expanduser().absolute()))
        if not any(plain.is_relative_to(root) for spellings in allowed for root in spellings):
            raise refusal
        real = Path(os.path.realpath(named.expanduser()))
        if not any(real.is_relative_to(resolved) for _, resolved in allowed):
            raise refusal
        if real.exists() and not (real.is_dir() or real.is_file()):
            # A device or a pipe: reading it may never end.
            raise refusal
    except (OSError, ValueError, RuntimeError):
        raise refusal from None
    return str(real)


def permitted_data(name: str, known: frozenset[str]) -> str:
    """Return the name of a data set if a page may use it; a path in it as `permitted_path` does.

    Args:
        name: As the command line takes it.
        known: Names of the embedded sets, which are not paths.

    Raises:
        LimberError: It is a path that leads elsewhere.
    """
    if name in known:
        return name
    if name.startswith(TORCHVISION):
        kind, colon, folder = name.removeprefix(TORCHVISION).partition(":")
        return f"{TORCHVISION}{kind}{colon}{permitted_path(folder) if folder else ''}"
    return permitted_path(name) if name.strip() else name


def _spellings(root: Path) -> tuple[Path, Path]:
    return Path(os.path.normpath(root)), Path(os.path.realpath(root))
