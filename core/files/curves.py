"""Curves of a fine-tune <-> CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from core.errors import OptionError
from core.files.whole import write_whole
from core.records import ArmCurve, StepRecord

ANSWERS = "answers.safetensors"
CURVE_COLUMNS = ("arm", "seed", "step", "train_loss", "val_accuracy", "wall_s")


def curves_csv(steps: Iterable[StepRecord]) -> str:
    """Return steps as CSV with the columns of `CURVE_COLUMNS`; a missing figure is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    for step in steps:
        writer.writerow(
            [
                step.arm,
                step.seed,
                step.step,
                "" if step.train_loss is None else repr(step.train_loss),
                "" if step.val_accuracy is None else repr(step.val_accuracy),
                f"{step.wall_s:.3f}",
            ]
        )
    return buffer.getvalue()


def write_answers(steps: Iterable[StepRecord], folder: Path) -> None:
    """Write which validation images each arm got right at its last step, where it is known.

    `answers.safetensors` holds "ARM/SEED" to bytes, eight images each, the first in the highest
    bit.

    Raises:
        LimberError: The folder cannot be written.
    """
    arrays = {
        f"{step.arm}/{step.seed}": np.frombuffer(bytes.fromhex(step.answers), dtype=np.uint8)
        for step in steps
        if step.answers is not None
    }
    if arrays:
        data = safetensors.numpy.save(dict(sorted(arrays.items())))
        write_whole(folder / ANSWERS, data)


def _read_answers(folder: Path) -> dict[str, str]:
    """Return "ARM/SEED" to answers; empty where there are none that can be read."""
    try:
        arrays = safetensors.numpy.load((folder / ANSWERS).read_bytes())
    except (OSError, ValueError, KeyError, safetensors.SafetensorError):
        return {}
    return {key: values.tobytes().hex() for key, values in arrays.items()}


def read_curves(path: Path) -> tuple[ArmCurve, ...]:
    """Read `curves.csv` (or the run folder that holds it) back into curves.

    Raises:
        OptionError: There is no such file, or it is not one of ours.
    """
    file = path / "curves.csv" if path.is_dir() else path
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        steps = [
            StepRecord(
                arm=row["arm"],
                seed=int(row["seed"]),
                step=int(row["step"]),
                train_loss=float(row["train_loss"]) if row["train_loss"] else None,
                val_accuracy=float(row["val_accuracy"]) if row["val_accuracy"] else None,
                wall_s=float(row["wall_s"]),
            )
            for row in rows
        ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise OptionError(f'"{file}" cannot be read as curves ({error}).') from error
    answers = _read_answers(file.parent)
    last = {(step.arm, step.seed): i for i, step in enumerate(steps)}
    for (arm, seed), i in last.items():
        steps[i] = replace(steps[i], answers=answers.get(f"{arm}/{seed}"))
    return curves_of(steps)


def curves_of(steps: Sequence[StepRecord]) -> tuple[ArmCurve, ...]:
    """Return steps gathered by arm and seed, in the order in which they first appear."""
    gathered: dict[tuple[str, int], list[StepRecord]] = {}
    for step in steps:
        gathered.setdefault((step.arm, step.seed), []).append(step)
    return tuple(
        ArmCurve(arm=arm, seed=seed, steps=tuple(sorted(points, key=lambda step: step.step)))
        for (arm, seed), points in gathered.items()
    )
