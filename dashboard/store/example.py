"""The embedded example, measured ahead, so that the first page opens on a picture.

It is taken only while the code that measures is the code that made it; weights and images are
compared like those of any other measurement. It travels as an archive, a quarter of its size, and
is unpacked once. `python -m tests.build_example` makes it anew.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import secrets
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

from dashboard.store.workspace import ROOT, Choice, MeasureOptions, home

ARCHIVE = ROOT / "assets" / "example.zip"
DIAGNOSIS = "diagnosis.json"
CHOICE = Choice()
OPTIONS = MeasureOptions()
# What a figure in a diagnosis depends on.
CODE = (
    "catalogue/metrics.py",
    "load",
    "measure",
    "network",
    "pipeline/batches.py",
    "pipeline/measuring.py",
    "pixels.py",
    "records/diagnosis.py",
    "reductions.py",
    "seeding.py",
)


@functools.cache
def measuring_code() -> str:
    """Return a digest of the code that measures; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in _files():
        text = path.read_text(encoding="utf-8")
        digest.update(path.name.encode())
        digest.update((_bare(text) if path.suffix == ".py" else text).encode())
    return digest.hexdigest()


def _files() -> list[Path]:
    core = ROOT / "core"
    files = [core / part for part in CODE if part.endswith(".py")]
    for folder in (core / part for part in CODE if not part.endswith(".py")):
        files += [path for path in folder.rglob("*") if path.suffix in (".py", ".c")]
    return sorted(files)


def _bare(text: str) -> str:
    """Return a module's syntax tree without its docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Expr(ast.Constant(""))
    return ast.dump(tree)


def example_path(choice: Choice) -> Path | None:
    """Return where the example's measurement lies; None if it is not of this choice and code."""
    if choice != CHOICE:
        return None
    # A damaged archive raises whatever its bytes happen to mean; without it, the page measures.
    with suppress(Exception):
        if made_by() == measuring_code():
            return _unpacked() / DIAGNOSIS
    return None


def unpack_anew() -> None:
    """Remove what was unpacked, because it was damaged since; it is unpacked again when needed."""
    shutil.rmtree(_folder(), ignore_errors=True)


@functools.cache
def made_by() -> str:
    """Return the digest of the code that made the example."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        return archive.comment.decode()


def _folder() -> Path:
    return home() / "example" / made_by()[:16]


def _unpacked() -> Path:
    """Return the folder that holds the example's files, unpacked once on each machine."""
    folder = _folder()
    if not (folder / DIAGNOSIS).is_file():
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            with zipfile.ZipFile(ARCHIVE) as archive:
                archive.extractall(partial)
            # Another server may have been faster; its files are the same.
            with suppress(OSError):
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
