"""Curves of a fine-tune <-> CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.errors import OptionError
from core.records import ArmCurve, StepRecord

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
