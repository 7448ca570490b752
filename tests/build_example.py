"""Measure the embedded example anew, for the page that opens on it.

python -m tests.build_example
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from core.cli import main as run
from dashboard.store import example

# So that the archive depends on what it holds only.
MADE = (2026, 1, 1, 0, 0, 0)


def main() -> None:
    """Write the archive, with the digest of the code that made it as its comment."""
    arguments = ["measure", "--model", example.CHOICE.model, "--data", example.CHOICE.data]
    arguments += ["--samples", str(example.OPTIONS.samples), "--device", "cpu", "--inside"]
    with tempfile.TemporaryDirectory() as folder:
        if code := run([*arguments, "--out", str(Path(folder) / example.DIAGNOSIS)]):
            raise SystemExit(code)
        with zipfile.ZipFile(example.ARCHIVE, "w", zipfile.ZIP_LZMA) as archive:
            archive.comment = example.measuring_code().encode()
            for path in sorted(Path(folder).iterdir()):
                info = zipfile.ZipInfo(path.name, MADE)
                archive.writestr(info, path.read_bytes(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    main()
