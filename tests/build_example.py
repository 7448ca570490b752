"""Measure the embedded example anew, for the page that opens on it.

python -m tests.build_example
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy

import core
from core.cli import main as run
from core.files.whole import companion_path
from dashboard.store import example

# So that the archive depends on what it holds only.
MADE = (2026, 1, 1, 0, 0, 0)
# Bits of a float32 that are left out.
DROPPED = 8


def rounded(values: np.ndarray) -> np.ndarray:
    """Return float32 values to 15 bits, about five digits: the rest would only fill the archive."""
    if values.dtype != np.float32:
        return values
    bits = (values.view(np.uint32) + (1 << (DROPPED - 1))) >> DROPPED << DROPPED
    return np.where(np.isfinite(values), bits.astype(np.uint32).view(np.float32), values)


def main() -> None:
    """Write the archive, with the digest of the code that made it as its comment."""
    arguments = ["measure", "--model", example.CHOICE.model, "--data", example.CHOICE.data]
    arguments += ["--samples", str(example.OPTIONS.samples), "--device", "cpu", "--inside"]
    with tempfile.TemporaryDirectory() as folder:
        if code := run([*arguments, "--out", str(Path(folder) / example.DIAGNOSIS)]):
            raise SystemExit(code)
        path = Path(folder) / example.DIAGNOSIS
        files = [companion_path(path, kind) for kind in ("units", "inside")]
        arrays = [safetensors.numpy.load(file.read_bytes()) for file in files]
        units = {key: rounded(values) for key, values in arrays[0].items()}
        core.write_diagnosis(core.read_diagnosis(path), units, path, inside=arrays[1])
        with zipfile.ZipFile(example.ARCHIVE, "w", zipfile.ZIP_LZMA) as archive:
            archive.comment = example.measuring_code().encode()
            for path in sorted(Path(folder).iterdir()):
                info = zipfile.ZipInfo(path.name, MADE)
                archive.writestr(info, path.read_bytes(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    main()
