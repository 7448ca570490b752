"""One way out to the terminal."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_line_prints_in_one_place() -> None:
    printing = {
        path.name
        for path in (ROOT / "core" / "cli").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }

    assert printing == {"terminal.py"}
