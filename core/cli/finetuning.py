"""The command that trains several arms side by side and says whether a reset helped."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli.events import Events
from core.cli.options import (
    add_data,
    add_events,
    add_model,
    as_json,
    check_out,
    name_list,
    only_given,
    otherwise,
    progress_of,
    real_number,
    seed_list,
    whole_number,
)
from core.cli.terminal import say
from core.errors import LimberError, OptionError, PlanError

if TYPE_CHECKING:
    from core.pipeline.progress import Progress
    from core.pipeline.trial import Trial
    from core.records import DataSpec, ModelSpec, StepRecord
    from core.trial.arms import Settings


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `finetune`."""
    tune = commands.add_parser("finetune", help="short fine-tunes: untouched against plans")
    add_model(tune)
    add_data(tune, required=True)
    tune.add_argument("--plan", type=Path, action="append", default=[], help="repeat for more arms")
    tune.add_argument(
        "--keep-weights",
        action="store_true",
        help="keep each arm's trained weights, of the first seed, in OUT/weights",
    )
    tune.add_argument(
        "--random-control",
        action="store_true",
        help="add an arm that resets as much, drawn at random",
    )
    tune.add_argument(
        "--rival",
        action="append",
        default=[],
        help="add an arm that a plan has to beat; repeat for more (see list rivals)",
    )
    tune.add_argument(
        "--outcome",
        default="final",
        choices=("final", "auc", "steps"),
        help="what is judged, named before the run (default final)",
    )
    tune.add_argument(
        "--margin",
        type=real_number,
        help="differences inside it are equivalent: points, of steps percent (default 1, 10)",
    )
    tune.add_argument(
        "--sweep",
        action="store_true",
        help="take the learning rate that is best for the untouched network",
    )
    tune.add_argument("--steps", type=whole_number, help="optimiser steps (default 60)")
    tune.add_argument("--batch-size", type=whole_number, help="images a step (default 32)")
    tune.add_argument(
        "--seeds",
        type=seed_list,
        help="how many, such as 8, or which, such as 3,4,5 (default 3; a verdict takes 8)",
    )
    tune.add_argument("--lr", type=real_number, help="learning rate (default: the model's)")
    tune.add_argument(
        "--head-lr", type=real_number, help="learning rate of the new head (default: 3e-3 at least)"
    )
    tune.add_argument("--optimizer", default="adamw", help="timm's name (default adamw)")
    tune.add_argument(
        "--schedule", default="cosine", help="of the learning rate, timm's name (default cosine)"
    )
    tune.add_argument(
        "--warmup", type=whole_number, help="steps over which the rate rises (default 5)"
    )
    tune.add_argument("--weight-decay", type=real_number, help="default 0.01")
    tune.add_argument(
        "--augment",
        type=name_list,
        help="crop, flip, colour, trivial, erase, with commas, or none (default crop,flip)",
    )
    tune.add_argument("--label-smoothing", type=real_number, help="default 0")
    tune.add_argument("--ema", type=real_number, help="decay of a moving average (default none)")
    tune.add_argument("--bf16", action="store_true", help="run passes in bfloat16")
    tune.add_argument(
        "--eval-every", type=whole_number, help="steps from one evaluation on (default 10)"
    )
    tune.add_argument("--image-size", type=whole_number, help="side in pixels")
    tune.add_argument("--train-images", type=whole_number, help="at most so many (default 600)")
    tune.add_argument("--val-images", type=whole_number, help="at most so many (default all)")
    tune.add_argument("--device", default="auto", help="auto, cpu or cuda")
    tune.add_argument("--out", type=Path, help="folder for the run")
    tune.add_argument(
        "--estimate",
        action="store_true",
        help="train for two seconds, say how long the run would take, and write nothing",
    )
    add_events(tune)
    tune.set_defaults(run=_finetune)


def _check_run(options: argparse.Namespace) -> None:
    """Refuse a folder that holds another run, or plans that this one would write over."""
    for name in ("curves.csv", "answers.safetensors", "summary.json", "plans", "weights"):
        if (options.out / name).exists():
            raise OptionError(
                f'--out "{options.out}" holds a run already ("{name}"); give another folder.'
            )


def _finetune(options: argparse.Namespace, events: Events) -> None:
    if options.out is None and not options.estimate:
        raise OptionError("--out is missing. Give a folder for the run.")
    if not options.estimate:
        check_out(options, folder=True)
        _check_run(options)
    import core
    from core.catalogue.trials import augmentations, find_rival
    from core.files.plans import read_plan
    from core.load import resolve_data, resolve_model

    plans = [read_plan(path) for path in options.plan]
    rivals = [find_rival(name).name for name in options.rival]
    if options.random_control:
        rivals.append("random")
    if not plans and "random" in rivals:
        raise PlanError("A random control needs a plan whose size it takes: give --plan.")
    data = resolve_data(options.data)
    spec = resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
    from core.pipeline import trial as trials
    from core.pipeline.batches import DEFAULT_BATCH_SIZE, opened_images, outline_model
    from core.trial.arms import Settings

    progress = progress_of(events)
    images = opened_images(data, progress).outline
    classes = len(images.classes)
    settings = Settings(
        steps=otherwise(options.steps, trials.DEFAULT_STEPS),
        batch_size=otherwise(options.batch_size, DEFAULT_BATCH_SIZE),
        head_lr=options.head_lr,
        eval_every=otherwise(options.eval_every, trials.DEFAULT_EVAL_EVERY),
        lr=outline_model(spec, classes=classes).default_lr if options.lr is None else options.lr,
        optimizer=options.optimizer,
        schedule=options.schedule,
        bf16=options.bf16,
        **only_given(
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            augment=None if options.augment is None else augmentations(options.augment),
            label_smoothing=options.label_smoothing,
            ema=options.ema,
        ),
    )
    if options.estimate:
        _estimate(options, spec, data, settings, images.counts, progress, events)
        return
    if "random" in rivals:
        sight = core.Sight(data=data, samples=options.train_images, image_size=options.image_size)
        control = core.random_control(plans[0], seed=0, sight=sight, progress=progress)
        plans.append(control)
    trial = trials.prepare_trial(
        spec,
        data,
        plans,
        settings=settings,
        judging=trials.Judging(
            outcome=options.outcome,
            margin=None if options.margin is None else options.margin / 100,
            sweep=options.sweep,
            rivals=tuple(rivals),
        ),
        device=options.device,
        progress=progress,
        **only_given(
            seeds=options.seeds,
            image_size=options.image_size,
            train_images=options.train_images,
            val_images=options.val_images,
        ),
        keep_weights=options.out / "weights" if options.keep_weights else None,
    )
    record = trial.record
    events.emit("record", record=as_json(record))
    total = len(record.arms) * len(record.seeds) * record.steps
    steps: list[StepRecord] = []
    try:
        done = _follow(trial, steps, total, events)
    except LimberError:
        # One arm that diverges must not take with it what hours have brought.
        if steps:
            trials.write_run(record, steps, options.out, finished=False)
        raise
    finished = done == total
    comparison = trials.write_run(record, steps, options.out, finished=finished)
    if finished:
        events.emit("done", out=str(options.out))
    else:
        events.emit("stopped", out=str(options.out))
    say(
        f"{record.model_title} on {record.data_title}: {done} of {total} steps"
        f"{'' if finished else ' (stopped)'} -> {options.out}"
    )
    for note in images.notes:
        say(f"  note: {note}")
    if len(record.arms) > 1:
        say(f"  {comparison.sentence}")
        if comparison.what_next:
            say(f"  {comparison.what_next}")
    for caveat in comparison.caveats if len(record.arms) > 1 else images.caveats:
        say(f"  {caveat}")


def _follow(trial: Trial, steps: list[StepRecord], total: int, events: Events) -> int:
    """Run a trial's steps, tell and gather them, and return how many were training steps."""
    from core.pipeline.trial import step_event

    done = 0
    for step in trial.steps:
        steps.append(step)
        events.step(step_event(step))
        if step.step > 0:
            done += 1
            events.progress(done, total, "steps")
    return done


def _estimate(
    options: argparse.Namespace,
    spec: ModelSpec,
    data: DataSpec,
    settings: Settings,
    counts: Mapping[str, Sequence[int]],
    progress: Progress,
    events: Events,
) -> None:
    """Say how long the run would take."""
    from core.pipeline import trial as trials
    from core.pipeline.estimating import measure_pace
    from core.pipeline.sweeping import SWEEP_ARMS

    pace = measure_pace(
        spec,
        data,
        settings=settings,
        image_size=options.image_size,
        device=options.device,
        progress=progress,
    )
    limits = (
        trials.DEFAULT_TRAIN_IMAGES if options.train_images is None else options.train_images,
        options.val_images,
    )
    train, val = (
        there if limit is None else min(limit, there)
        for limit, there in zip(
            limits, (sum(counts.get(split, ())) for split in ("train", "val")), strict=True
        )
    )
    arms = 1 + len(options.plan) + len(options.rival) + options.random_control
    seconds = pace.seconds(
        arms=arms,
        seeds=len(options.seeds or trials.DEFAULT_SEEDS),
        steps=settings.steps,
        eval_every=settings.eval_every,
        images=(train, val),
        sweep=SWEEP_ARMS if options.sweep else 0,
    )
    events.emit("done", pace=as_json(pace), seconds=seconds)
    say(
        f"About {seconds:.0f} s for {arms} arms on {pace.device}: {1000 * pace.step_s:.0f} ms a "
        f"step of {pace.batch_size} images of {pace.image_size} px."
    )
