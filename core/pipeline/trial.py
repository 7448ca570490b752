"""Plans -> a paired fine-tune of the untouched network and the edited ones, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from core.catalogue.trials import AUGMENTATIONS, find_rival
from core.errors import OptionError
from core.files.curves import curves_csv, curves_of, write_answers
from core.files.plans import write_plan
from core.files.whole import write_whole
from core.load import ImageSet, decode
from core.pipeline.applying import plain_state
from core.pipeline.arms import arms_plans, plan_arms, rival_arm, size_caveats
from core.pipeline.batches import check_image_size, opened_images, outline_model
from core.pipeline.machine import choose_device, device_name, versions
from core.pipeline.progress import Progress, tick
from core.pipeline.sweeping import fitted_probe, sweep_rates
from core.records import (
    MARGINS,
    ABComparison,
    DataSpec,
    ModelOutline,
    ModelSpec,
    Outcome,
    ReinitPlan,
    RunRecord,
    StepRecord,
    TrialDesign,
)
from core.trial.arms import Images, Settings
from core.trial.engine import finetune
from core.trial.recipe import check_recipe
from core.trial.verdict import compare_curves

DEFAULT_STEPS = 60


DEFAULT_EVAL_EVERY = 10


DEFAULT_TRAIN_IMAGES = 600


# All: every image less is noise more.
DEFAULT_VAL_IMAGES: int | None = None


DEFAULT_SEEDS = (0, 1, 2)


# Bytes; a file system takes 255, and a companion's ending and a number come after it.
LONGEST_NAME = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fine-tune ready to run: the record that repeats it, and the steps when iterated."""

    record: RunRecord
    steps: Iterator[StepRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """What a trial is judged by, named before it runs.

    Attributes:
        outcome: The primary outcome.
        margin: Differences inside it are equivalent: a share of accuracy, for "steps" a ratio less
            1; None takes the outcome's own.
        sweep: Whether the learning rate is the best of several for the untouched network.
        rivals: Keys of `core.list_rivals`, one arm each.
    """

    outcome: Outcome = "final"
    margin: float | None = None
    sweep: bool = False
    rivals: tuple[str, ...] = ()

    @property
    def margin_used(self) -> float:
        """The margin that counts."""
        return MARGINS[self.outcome] if self.margin is None else self.margin


def prepare_trial(
    spec: ModelSpec,
    data: DataSpec,
    plans: Sequence[ReinitPlan],
    *,
    settings: Settings,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    judging: Judging | None = None,
    image_size: int | None = None,
    train_images: int | None = DEFAULT_TRAIN_IMAGES,
    val_images: int | None = DEFAULT_VAL_IMAGES,
    device: str = "auto",
    keep_weights: Path | None = None,
    progress: Progress | None = None,
) -> Trial:
    """Check everything, read the images, and return a trial whose steps run when iterated.

    Args:
        spec: The model.
        data: The images. A plan that writes into a head must have been made for as many classes.
        plans: One arm each, next to the untouched network; a random control
            (`core.random_control`) is a plan like the others.
        settings: Shared by all arms.
        seeds: One head, batch order and stream of augmentations each.
        judging: What is judged, and the rivals; None takes the final accuracy and none.
        image_size: Side in pixels; None takes the model's default for short runs.
        train_images: At most so many, classes in turn; None takes all.
        val_images: As above, for validation.
        device: "auto", "cpu" or "cuda".
        keep_weights: Folder for each arm's trained weights, of the first seed; None keeps none.
        progress: Progress and stop.

    Raises:
        LimberError: Bad input, or stopped.
    """
    progress, judging = progress or Progress(), judging or Judging()
    place = choose_device(device)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise OptionError("Seeds must be different whole numbers from 0, such as 0,1,2.")
    if not 0 <= judging.margin_used < 1:
        raise OptionError("The margin must be 0 or more, and below 100.")
    check_recipe(settings.optimizer, settings.schedule)
    infos = [find_rival(name) for name in dict.fromkeys(judging.rivals) if name != "random"]
    images = opened_images(data, progress)
    classes = len(images.outline.classes)
    progress.phase("loading the model")
    outline = outline_model(spec, classes=classes)
    size = outline.default_size if image_size is None else image_size
    check_image_size(outline, size)
    plans_by_arm, caveats = arms_plans(plans, outline)
    own_plans = tuple(
        name
        for name, plan in plans_by_arm.items()
        if plan.rule is None or plan.rule.name != "random"
    )
    arms = plan_arms(spec, outline, plans_by_arm)
    by_rival: dict[str, str] = {}
    for info in infos:
        arm, plan = rival_arm(info, spec, outline, taken=[each.name for each in arms])
        arms.append(arm)
        by_rival[arm.name] = info.name
        if plan is not None:
            plans_by_arm[arm.name] = plan
    progress.phase("reading the images")
    pixels = read_pixels(
        images, outline, size=size, train=train_images, val=val_images, progress=progress
    )
    probe = fitted_probe(spec, outline, pixels, place, progress) if len(arms) > 1 else None
    sweep = None
    if judging.sweep:
        sweep = sweep_rates(
            arms[0], pixels, settings, trial_seeds=seeds, device=place, progress=progress
        )
        settings = replace(settings, lr=sweep.best)
    counts = torch.bincount(pixels.val_labels)
    design = TrialDesign(
        outcome=judging.outcome,
        margin=judging.margin_used,
        arms=tuple(arm.name for arm in arms),
        plans=own_plans,
        seeds=tuple(seeds),
        steps=settings.steps,
        val_images=len(pixels.val),
        chance=float(counts.max()) / len(pixels.val),
        probe=None if probe is None else probe.accuracy,
        probe_slack=0.0 if probe is None else probe.slack,
        sweep=sweep,
    )
    record = RunRecord(
        model=spec,
        model_title=outline.title,
        classes=classes,
        backbone_sha256=outline.backbone_sha256,
        data=data,
        data_title=images.outline.title,
        data_fingerprint=images.outline.fingerprint,
        arms=design.arms,
        plans=plans_by_arm,
        rivals=by_rival,
        design=design,
        seeds=tuple(seeds),
        steps=settings.steps,
        batch_size=min(settings.batch_size, len(pixels.train)),
        eval_every=settings.eval_every,
        image_size=size,
        train_images=len(pixels.train),
        val_images=len(pixels.val),
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        augment=settings.augment,
        label_smoothing=settings.label_smoothing,
        ema=settings.ema,
        lr=settings.lr,
        head_lr=settings.rate_of_head,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        device=place.type,
        device_name=device_name(place),
        dtype="bfloat16" if settings.bf16 else "float32",
        versions=versions(),
        caveats=(
            *images.outline.caveats,
            *caveats,
            *size_caveats(plans_by_arm, outline),
            *_augment_caveats(settings),
        ),
        intensities=images.outline.intensities,
    )
    progress.phase("fine-tuning")
    steps = finetune(
        arms,
        pixels,
        settings,
        seeds=seeds,
        device=place,
        should_stop=progress.should_stop,
        on_trained=_keeper(keep_weights, record),
    )
    return Trial(record=record, steps=steps)


def _augment_caveats(settings: Settings) -> tuple[str, ...]:
    """Say which augmentations could change what an image shows."""
    wary = [info for info in AUGMENTATIONS if info.name in settings.augment and info.careful]
    if not wary:
        return ()
    said = "; ".join(f"{info.title.lower()} ({info.name}) {info.careful}" for info in wary)
    return (f"Training images are augmented. Leave out {said}.",)


def trained_files(arms: Sequence[str]) -> dict[str, str]:
    """Return arm to the name of the file that holds its trained weights."""
    return {arm: f"{file}.safetensors" for arm, file in zip(arms, _file_names(arms), strict=True)}


def _keeper(folder: Path | None, record: RunRecord) -> Callable[[str, int, nn.Module], None]:
    """Return what writes an arm's trained weights into the folder."""
    files = trained_files(record.arms)

    def keep(arm: str, seed: int, model: nn.Module) -> None:
        if folder is not None and seed == record.seeds[0]:
            state = plain_state(model)
            data = safetensors.torch.save(dict(sorted(state.items())), metadata={"format": "pt"})
            write_whole(folder / files[arm], data)

    return keep


def read_pixels(
    images: ImageSet,
    outline: ModelOutline,
    *,
    size: int,
    train: int | None,
    val: int | None,
    progress: Progress | None = None,
) -> Images:
    """Return the images of both parts, decoded, at most so many of each.

    Args:
        images: The opened set.
        outline: The network, for what it takes.
        size: Side in pixels.
        train: At most so many; None takes all.
        val: As above, for validation.
        progress: Progress and stop.

    Raises:
        LimberError: Too few are wanted, one cannot be read, or stopped.
    """
    told = progress or Progress()
    decoded: list[tuple[Tensor, Tensor]] = []
    for split, limit in (("train", train), ("val", val)):
        if limit is not None and limit < 2:
            raise OptionError(f"{limit} images are too few; give 2 or more.")
        decoded.append(
            decode(
                images,
                split,
                outline.preprocessing,
                size=size,
                limit=limit,
                seed=0,
                on_progress=lambda done, total: tick(told, done, total, "images read"),
            )
        )
    (train_pixels, train_labels), (val_pixels, val_labels) = decoded
    return Images(
        train=train_pixels,
        train_labels=train_labels,
        val=val_pixels,
        val_labels=val_labels,
        mean=outline.preprocessing.mean,
        std=outline.preprocessing.std,
    )


def write_run(
    record: RunRecord, steps: Sequence[StepRecord], out: Path, *, finished: bool
) -> ABComparison:
    """Write a run's folder: `curves.csv`, `answers.safetensors`, `summary.json`, `plans/ARM.json`.

    Raises:
        LimberError: The folder cannot be written.
    """
    comparison = compare_curves(curves_of(steps), record.design)
    comparison = comparison.model_copy(update={"caveats": (*record.caveats, *comparison.caveats)})
    write_whole(out / "curves.csv", curves_csv(steps))
    write_answers(steps, out)
    for file, plan in zip(_file_names(record.plans), record.plans.values(), strict=True):
        write_plan(plan, out / "plans" / f"{file}.json")
    last: dict[str, dict[str, float | None]] = {}
    for step in steps:
        if step.val_accuracy is not None:
            last.setdefault(step.arm, {})[str(step.seed)] = step.val_accuracy
    summary = {
        "finished": finished,
        "steps_done": len([step for step in steps if step.step > 0]),
        "final_val_accuracy": last,
        "wall_s": max((step.wall_s for step in steps), default=0.0),
        "comparison": comparison.model_dump(mode="json"),
        "record": record.model_dump(mode="json"),
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return comparison


def _file_names(names: Iterable[str]) -> list[str]:
    """Return names of files for arms: no odd letters, short enough, each another."""
    taken: list[str] = []
    for name in names:
        safe = "".join(c if c.isalnum() or c in "-_ ." else "_" for c in name)
        safe = safe.encode()[:LONGEST_NAME].decode(errors="ignore").strip(". ") or "plan"
        free, number = safe, 1
        # Some file systems take capitals for the same.
        while free.casefold() in {name_taken.casefold() for name_taken in taken}:
            number += 1
            free = f"{safe} {number}"
        taken.append(free)
    return taken


def step_event(step: StepRecord) -> dict[str, object]:
    """Return a step as the fields of an event."""
    fields = asdict(step)
    if step.answers is None:
        del fields["answers"]
    return fields
