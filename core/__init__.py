"""Limber's core: measure, pick, reset, compare and export, without a screen.

The public verbs are handed out here. Each is named once, in `__init__.pyi`, and imported when it
is first used, so that `import core` costs nothing and a listing does not wait for torch.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


def _homes() -> dict[str, str]:
    """Return the module of each public verb, read from the stub that type checkers read too."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        verb.name: str(line.module)
        for line in stub.body
        if isinstance(line, ast.ImportFrom)
        for verb in line.names
    }


_HOMES = _homes()
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a verb from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    verb = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = verb
    return verb
