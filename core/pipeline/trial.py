"""Plans -> a paired fine-tune of the untouched network and the edited ones, and its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from core.errors import OptionError, PlanError
from core.files.companions import resealed
from core.files.curves import curves_csv, curves_of
from core.files.plans import write_plan
from core.files.whole import write_whole
from core.load import ImageSet, decode, load_model
from core.pipeline.applying import edited_model, plain_state
from core.pipeline.batches import check_image_size, opened_images, outline_model
from core.pipeline.machine import choose_device, device_name, versions
from core.pipeline.progress import Progress, tick
from core.plan.making import check_plan, planned_size, untrained_sentence
from core.records import (
    ABComparison,
    DataSpec,
    ModelOutline,
    ModelSpec,
    ReinitPlan,
    RunRecord,
    StepRecord,
)
from core.trial.arms import Arm, Images, Settings
from core.trial.engine import finetune
from core.trial.verdict import UNTOUCHED, compare_curves

DEFAULT_STEPS = 60


DEFAULT_EVAL_EVERY = 10


DEFAULT_TRAIN_IMAGES = 600


DEFAULT_VAL_IMAGES = 160


DEFAULT_SEEDS = (0, 1, 2)


# Bytes; a file system takes 255, and a companion's ending and a number come after it.
LONGEST_NAME = 180


# Plans whose sizes differ by less are of about the same size.
ALIKE = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fine-tune ready to run: the record that repeats it, and the steps when iterated."""

    record: RunRecord
    steps: Iterator[StepRecord]


def prepare_trial(
    spec: ModelSpec,
    data: DataSpec,
    plans: Sequence[ReinitPlan],
    *,
    settings: Settings,
    seeds: Sequence[int] = DEFAULT_SEEDS,
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
        seeds: One head and batch order each.
        image_size: Side in pixels; None takes the model's default for short runs.
        train_images: At most so many, classes in turn; None takes all.
        val_images: As above, for validation.
        device: "auto", "cpu" or "cuda".
        keep_weights: Folder for each arm's trained weights, of the first seed; None keeps none.
        progress: Progress and stop.

    Raises:
        LimberError: Bad input, or stopped.
    """
    progress = progress or Progress()
    place = choose_device(device)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise OptionError("Seeds must be different whole numbers from 0, such as 0,1,2.")
    images = opened_images(data, progress)
    classes = len(images.outline.classes)
    progress.phase("loading the model")
    outline = outline_model(spec, classes=classes)
    size = outline.default_size if image_size is None else image_size
    check_image_size(outline, size)
    plans_by_arm, caveats = _arms_plans(plans, outline)
    progress.phase("reading the images")
    pixels = _pixels(
        images, outline, size=size, train=train_images, val=val_images, progress=progress
    )
    arms = _arms(spec, outline, plans_by_arm)
    record = RunRecord(
        model=spec,
        model_title=outline.title,
        classes=classes,
        backbone_sha256=outline.backbone_sha256,
        data=data,
        data_title=images.outline.title,
        data_fingerprint=images.outline.fingerprint,
        arms=tuple(arm.name for arm in arms),
        plans=plans_by_arm,
        seeds=tuple(seeds),
        steps=settings.steps,
        batch_size=min(settings.batch_size, len(pixels.train)),
        eval_every=settings.eval_every,
        image_size=size,
        train_images=len(pixels.train),
        val_images=len(pixels.val),
        optimizer="AdamW",
        lr=settings.lr,
        head_lr=settings.rate_of_head,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        device=place.type,
        device_name=device_name(place),
        dtype="float32",
        versions=versions(),
        caveats=(*images.outline.caveats, *caveats, *_size_caveats(plans_by_arm, outline)),
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


def _arms_plans(
    plans: Sequence[ReinitPlan], outline: ModelOutline
) -> tuple[dict[str, ReinitPlan], list[str]]:
    """Return the plan of each arm by the arm's name, and what the record must say of them.

    Raises:
        PlanError: A plan does not fit the network, or writes into the new head only.
    """
    by_arm: dict[str, ReinitPlan] = {}
    caveats = []
    for plan in plans:
        check_plan(plan, outline)
        trimmed, left_out = without_new_head(plan, outline)
        name = _free_name(plan.name, by_arm)
        by_arm[name] = trimmed
        caveats += [f'"{name}": {sentence}' for sentence in left_out]
        if trimmed.untrained:
            caveats.append(f'"{name}": {untrained_sentence(trimmed.untrained)}')
        if outline.spec.weights == "none" and any(target.entries for target in plan.targets):
            caveats.append(
                f'"{name}" chose entries on the random network of seed {plan.model.head_seed}; '
                "without weights to load each seed has another network, where they are any others."
            )
    return by_arm, caveats


def _pixels(
    images: ImageSet,
    outline: ModelOutline,
    *,
    size: int,
    train: int | None,
    val: int | None,
    progress: Progress,
) -> Images:
    """Return the images of both parts, decoded, at most so many of each.

    Raises:
        LimberError: Too few are wanted, one cannot be read, or stopped.
    """
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
                on_progress=lambda done, total: tick(progress, done, total, "images read"),
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


def _arms(spec: ModelSpec, outline: ModelOutline, plans: Mapping[str, ReinitPlan]) -> list[Arm]:
    """Return the untouched arm, and one for each plan."""
    head = frozenset(
        parameter.name for layer in outline.layers if layer.head for parameter in layer.parameters
    )
    classes = outline.classes
    untouched = Arm(name=UNTOUCHED, build=lambda seed: _untouched(spec, classes, seed), head=head)
    return [
        untouched,
        *(
            Arm(
                name=name,
                build=_builder(plan, classes),
                frozen=_frozen(outline, plan),
                head=head,
                rates=_rates(outline, plan),
            )
            for name, plan in plans.items()
        ),
    ]


def without_new_head(plan: ReinitPlan, outline: ModelOutline) -> tuple[ReinitPlan, tuple[str, ...]]:
    """Return what of a plan can be compared over several new heads, and what was left out.

    Arms of one seed share a head, and each seed has another. What a plan chose or computed on one
    head (its smallest weights, a shift of its biases) means nothing on the next; the columns that
    read a reset unit are 0 on any.

    Raises:
        PlanError: Nothing is left.
    """
    heads = {layer.name for layer in outline.layers if layer.head and not outline.own_head}
    targets, dropped = [], 0
    for target in plan.targets:
        entries = tuple(
            entry
            for entry in target.entries
            if target.layer not in heads or (target.granularity == "unit" and entry.write == "zero")
        )
        dropped += len(target.entries) - len(entries)
        if len(entries) == len(target.entries):
            targets.append(target)
        elif entries:
            names = {entry.tensor for entry in entries}
            targets.append(
                target.model_copy(
                    update={
                        "entries": entries,
                        "parameters": tuple(n for n in target.parameters if n in names),
                        "buffers": tuple(n for n in target.buffers if n in names),
                    }
                )
            )
    if not dropped:
        return plan, ()
    if not targets:
        raise PlanError(
            f'Plan "{plan.name}" resets only the new head, which is another with each seed. '
            "Choose layers before it."
        )
    kept = plan.model_copy(update={"targets": tuple(targets)})
    said = (
        "what it writes into the new head is left out, because the arms of a comparison share "
        "their head and each seed has another."
    )
    return resealed(kept), (said,)


def _size_caveats(plans: Mapping[str, ReinitPlan], outline: ModelOutline) -> tuple[str, ...]:
    """Say which random controls reset more or less than the first plan does."""
    sizes = {name: planned_size(outline, plan) for name, plan in plans.items()}
    first = next(iter(sizes), "")
    rows = []
    for name, plan in plans.items():
        if name == first or plan.rule is None or plan.rule.name != "random":
            continue
        own, other = sizes[name].parameters, sizes[first].parameters
        if not 1 / ALIKE <= own / max(other, 1) <= ALIKE:
            rows.append(
                f'"{name}" resets {100 * sizes[name].fraction:.2g} % of the parameters and '
                f'"{first}" {100 * sizes[first].fraction:.2g} %: no layers nearer in size were '
                "left, and their sizes may explain a difference between the two."
            )
    return tuple(rows)


def _free_name(name: str, taken: Mapping[str, ReinitPlan]) -> str:
    if name == UNTOUCHED:
        name = "plan"
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name} {number}"
    return free


def _untouched(spec: ModelSpec, classes: int, seed: int) -> nn.Module:
    return load_model(spec, classes=classes, head_seed=seed).module


def _builder(plan: ReinitPlan, classes: int) -> Callable[[int], nn.Module]:
    return lambda seed: edited_model(plan, classes=classes, head_seed=seed)[0].module


def _frozen(outline: ModelOutline, plan: ReinitPlan) -> frozenset[str]:
    return frozenset(
        parameter.name
        for layer in outline.layers
        if layer.name in set(plan.freeze)
        for parameter in layer.parameters
    )


def _rates(outline: ModelOutline, plan: ReinitPlan) -> dict[str, float]:
    factors = {rate.layer: rate.factor for rate in plan.learning_rates}
    return {
        parameter.name: factors[layer.name]
        for layer in outline.layers
        if layer.name in factors
        for parameter in layer.parameters
    }


def write_run(
    record: RunRecord, steps: Sequence[StepRecord], out: Path, *, finished: bool
) -> ABComparison:
    """Write a run's folder: `curves.csv`, `summary.json` and `plans/ARM.json`.

    Raises:
        LimberError: The folder cannot be written.
    """
    comparison = compare_curves(curves_of(steps))
    comparison = comparison.model_copy(update={"caveats": (*record.caveats, *comparison.caveats)})
    write_whole(out / "curves.csv", curves_csv(steps))
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
    return asdict(step)
