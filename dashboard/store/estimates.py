"""How long a run will take, judging by the last one of the same network, or by a timed probe."""

from __future__ import annotations

from core.errors import LimberError
from core.records import Pace
from dashboard.store.measurements import diagnosis_of
from dashboard.store.own_runs import all_runs
from dashboard.store.runs import RunKind, RunView
from dashboard.store.session import current
from dashboard.store.starts import pace_facts
from dashboard.store.workspace import Choice, MeasureOptions, TrainOptions

# Of starting Python, torch and reading the weights.
START_S = 6.0


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


def estimate_run(options: TrainOptions) -> RunView | None:
    """Return the newest timing of these options on the chosen network and images, or None."""
    facts = pace_facts(options) | {"choice": current().choice.model_dump(mode="json")}
    for run in all_runs("estimate"):
        # One that was stopped, for a fine-tune to start, has timed nothing.
        stopped = run.state in ("stopping", "stopped")
        if not stopped and all(run.facts.get(name) == value for name, value in facts.items()):
            return run
    return None


def finetune_seconds(options: TrainOptions, *, plans: int, sweep_arms: int) -> float | None:
    """Return how long a fine-tune will take; None where nothing was timed.

    Args:
        options: How to train.
        plans: Arms with a plan, the random control left out.
        sweep_arms: Runs that a sweep of rates adds.
    """
    run = estimate_run(options)
    if run is None:
        return None
    try:
        pace = Pace.model_validate(run.result["pace"])
    except (KeyError, ValueError):
        return None
    return START_S + pace.seconds(
        arms=1 + plans + options.random_control + len(options.rivals),
        seeds=len(options.seeds),
        steps=options.steps,
        eval_every=options.eval_every,
        images=(options.train_images, options.val_images),
        sweep=sweep_arms if options.sweep else 0,
    )


def _finished(kind: RunKind) -> list[RunView]:
    wanted = current().choice.model_key
    return [
        run
        for run in all_runs(kind)
        if run.state in ("done", "stopped")
        and Choice.model_validate(run.facts.get("choice", {})).model_key == wanted
    ]
