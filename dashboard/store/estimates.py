"""How long a run will take, judging by the last one of the same network."""

from __future__ import annotations

from core.errors import LimberError
from dashboard.store.measurements import diagnosis_of
from dashboard.store.own_runs import all_runs
from dashboard.store.runs import RunKind, RunView
from dashboard.store.session import current
from dashboard.store.workspace import Choice, MeasureOptions, TrainOptions


def measure_seconds(options: MeasureOptions, default_size: int) -> float | None:
    """Guess how long a measurement takes from the last one of this network; None without one."""
    for run in _finished("measure"):
        try:
            stored = diagnosis_of(run)
        except LimberError:
            continue
        if stored is not None:
            header = stored.diagnosis.header
            area = ((options.image_size or default_size) / header.image_size) ** 2
            return run.wall_s * area * options.samples / header.samples
    return None


def finetune_seconds(options: TrainOptions) -> float | None:
    """Guess how long a fine-tune takes from the last one of this network; None without one."""
    for run in _finished("finetune"):
        facts, steps = run.facts, len(run.steps)
        if steps and facts.get("batch_size") and facts.get("image_size"):
            pixel_s = run.wall_s / steps / facts["batch_size"] / facts["image_size"] ** 2
            arms = 3 if options.random_control else 2
            work = options.steps * len(options.seeds) * arms
            return pixel_s * work * options.batch_size * options.image_size**2
    return None


def _finished(kind: RunKind) -> list[RunView]:
    wanted = current().choice.model_key
    return [
        run
        for run in all_runs(kind)
        if run.state in ("done", "stopped")
        and Choice.model_validate(run.facts.get("choice", {})).model_key == wanted
    ]
