"""Runs of this workspace, the measurements they left, and the plan they try."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import core
from core.errors import LimberError
from core.plan import PlanSize
from core.records import (
    DataOutline,
    Diagnosis,
    Evidence,
    ModelOutline,
    Pattern,
    PlanPreview,
    ReinitPlan,
    ReinitReceipt,
)
from dashboard.store.memo import Memo
from dashboard.store.runs import RunKind, RunView, queue
from dashboard.store.session import current
from dashboard.store.values import (
    changed_at,
    data_outline,
    data_spec,
    model_outline,
    model_spec,
    model_title,
    outline_if_ready,
    rule_infos,
    scheme_infos,
    size_of,
)
from dashboard.store.workspace import Choice, MeasureOptions, TrainOptions

if TYPE_CHECKING:
    import numpy as np

_plans: Memo[ReinitPlan] = Memo(max_entries=8)
_sizes: Memo[PlanSize] = Memo(max_entries=32)
_diagnoses: Memo[Diagnosis] = Memo(max_entries=8)
_units: Memo[Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]] = Memo(max_entries=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A measurement on disk and the run that made it."""

    run: RunView
    path: Path
    diagnosis: Diagnosis


def all_runs(kind: RunKind | None = None) -> tuple[RunView, ...]:
    """Return this workspace's runs, newest first."""
    return queue.runs(current().folder, kind)


def live_runs(kind: RunKind | None = None) -> tuple[RunView, ...]:
    """Return this workspace's runs that go on or wait, the running ones first."""
    folder = current().folder / "runs"
    mine = [run for run in queue.live() if run.folder.parent == folder]
    return tuple(run for run in mine if kind in (None, run.kind))


def live_run(kind: RunKind | None = None) -> RunView | None:
    """Return the first of this workspace's runs that go on or wait."""
    return next(iter(live_runs(kind)), None)


def stop_run(run_id: str) -> None:
    """Ask a run of this workspace to stop."""
    if queue.view(current().folder, run_id) is not None:
        queue.stop(run_id)


def _model_arguments(choice: Choice) -> list[str]:
    arguments = ["--model", choice.model]
    if choice.checkpoint:
        arguments += ["--checkpoint", choice.checkpoint]
    elif choice.weights == "none":
        arguments += ["--weights", "none"]
    return arguments


def _worker_files(folder: Path) -> list[str]:
    return ["--events", str(folder / "events.jsonl"), "--stop-file", str(folder / "stop")]


def start_measure(options: MeasureOptions) -> str:
    """Put a measurement of the chosen network on the chosen data into the queue."""
    space = current()
    choice = space.choice
    size = options.image_size or model_outline(choice).default_size
    space.set_measure(options)

    def argv(folder: Path) -> list[str]:
        return [
            "measure",
            *_model_arguments(choice),
            "--data",
            choice.data,
            "--samples",
            str(options.samples),
            "--batch-size",
            str(options.batch_size),
            "--image-size",
            str(size),
            "--device",
            options.device,
            "--dtype",
            options.dtype,
            "--seed",
            str(options.seed),
            # They cost little beside a pass, and the page draws them.
            "--histograms",
            *(["--transfer"] if options.transfer else []),
            "--out",
            str(folder / "diagnosis.json"),
            *_worker_files(folder),
        ]

    return queue.start(
        "measure",
        space.folder,
        argv,
        {
            "choice": choice.model_dump(mode="json"),
            "title": model_title(choice),
            "samples": options.samples,
            "image_size": size,
            "device": options.device,
        },
    )


def start_finetune(options: TrainOptions, plan: ReinitPlan) -> str:
    """Put a fine-tune of the plan against the untouched network into the queue."""
    space = current()
    choice = space.choice
    space.set_train(options)
    numbers = {
        "--steps": options.steps,
        "--batch-size": options.batch_size,
        "--lr": options.lr,
        "--eval-every": options.eval_every,
        "--image-size": options.image_size,
        "--train-images": options.train_images,
        "--val-images": options.val_images,
    }

    def argv(folder: Path) -> list[str]:
        path = folder / "plan.json"
        core.write_plan(plan, path)
        arguments = [
            "finetune",
            *_model_arguments(choice),
            "--data",
            choice.data,
            "--plan",
            str(path),
        ]
        if options.random_control:
            arguments.append("--random-control")
        for flag, number in numbers.items():
            arguments += [flag, str(number)]
        return [
            *arguments,
            "--seeds",
            ",".join(map(str, options.seeds)),
            "--device",
            options.device,
            "--out",
            str(folder),
            *_worker_files(folder),
        ]

    return queue.start(
        "finetune",
        space.folder,
        argv,
        {
            "choice": choice.model_dump(mode="json"),
            "title": model_title(choice),
            "plan": plan.name,
            "layers": [target.layer for target in plan.targets],
            "steps": options.steps,
            "seeds": list(options.seeds),
            "random_control": options.random_control,
            "batch_size": options.batch_size,
            "image_size": options.image_size,
        },
    )


def start_apply(plan: ReinitPlan) -> str:
    """Put the writing of the edited weights into the queue."""
    space = current()

    def argv(folder: Path) -> list[str]:
        path = folder / "plan.json"
        core.write_plan(plan, path)
        return [
            "apply",
            str(path),
            "--out",
            str(folder / "reinit.safetensors"),
            *_worker_files(folder),
        ]

    return queue.start(
        "apply",
        space.folder,
        argv,
        {
            "choice": space.choice.model_dump(mode="json"),
            "title": model_title(space.choice),
            "plan": plan.name,
            "plan_json": core.plan_json(plan),
        },
    )


def receipt_of(run: RunView) -> ReinitReceipt | None:
    """Return what an applying run says it changed, or None when it left no receipt."""
    try:
        return ReinitReceipt.model_validate(run.result["receipt"])
    except (KeyError, ValueError):
        return None


def measure_seconds(options: MeasureOptions, default_size: int) -> float | None:
    """Guess how long a measurement takes from the last one of this network; None without one."""
    for run in _finished("measure"):
        stored = diagnosis_of(run)
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
            each = run.wall_s / steps / facts["batch_size"] / facts["image_size"] ** 2
            arms = 3 if options.random_control else 2
            work = options.steps * len(options.seeds) * arms
            return each * work * options.batch_size * options.image_size**2
    return None


def _finished(kind: RunKind) -> list[RunView]:
    wanted = current().choice.model_key
    return [
        run
        for run in all_runs(kind)
        if run.state in ("done", "stopped")
        and Choice.model_validate(run.facts.get("choice", {})).model_key == wanted
    ]


def diagnosis_of(run: RunView) -> Stored | None:
    """Return what a measuring run wrote, or None when it wrote nothing."""
    path = run.folder / "diagnosis.json"
    changed = changed_at(str(path))
    if changed is None:
        return None
    return Stored(
        run=run,
        path=path,
        diagnosis=_diagnoses.get((str(path), changed), lambda: core.read_diagnosis(path)),
    )


def latest_diagnosis() -> Stored | None:
    """Return the newest measurement of the present choice, else the newest of any.

    Going back to an earlier network thus finds its measurement again.
    """
    wanted = current().choice.model_dump(mode="json")
    finished = [run for run in all_runs("measure") if not run.live]
    ordered = sorted(finished, key=lambda run: run.facts.get("choice") != wanted)
    for run in ordered:
        stored = diagnosis_of(run)
        if stored is not None:
            return replace(stored, diagnosis=_judged(stored.diagnosis))
    return None


def _judged(diagnosis: Diagnosis) -> Diagnosis:
    judging = current().judging
    try:
        return core.rejudge(diagnosis, preset=judging.preset, thresholds=judging.thresholds)
    except LimberError:
        # Rules come and go with versions; what a person kept of an old one is let go.
        return core.rejudge(diagnosis)


def is_stale(diagnosis: Diagnosis, choice: Choice) -> bool:
    """Whether model or data are other than when it was measured."""
    header = diagnosis.header
    if header.model != model_spec(choice) or header.data != data_spec(choice):
        return True
    outline, data = outline_if_ready(choice)
    if data is not None and data.fingerprint != header.data_fingerprint:
        return True
    return outline is not None and outline.backbone_sha256 != header.backbone_sha256


def units_of(stored: Stored) -> Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """Return each layer's figures by unit, the twin's beside them."""
    key = (str(stored.path), changed_at(str(stored.path)))
    return _units.get(key, lambda: core.read_units(stored.path))


def pick_patterns(outline: ModelOutline) -> tuple[Pattern, ...]:
    """Return how the present pick came about: patterns that still hold, then single names."""
    picks = current().picks
    chosen = set(picks.layers)
    kept: list[Pattern] = []
    covered: set[str] = set()
    for pattern in picks.patterns:
        try:
            names = set(core.match_layers(outline, pattern.text, syntax=pattern.syntax))
        except LimberError:
            continue
        if names <= chosen:
            kept.append(pattern)
            covered |= names
    singles = [Pattern(text=name, syntax="name") for name in picks.layers if name not in covered]
    return (*kept, *singles)


def present_plan(outline: ModelOutline) -> ReinitPlan:
    """Return the present plan: what a rule made or a person loaded, else the pick.

    Raises:
        PlanError: The core refuses it, e.g. for tied parameters, or its file is gone.
    """
    picks = current().picks
    if picks.plan_file is None:
        return plan_from_picks(outline)
    path = current().folder / picks.plan_file

    def read() -> ReinitPlan:
        words = {"name": picks.name, "freeze": picks.freeze}
        return core.resealed(core.read_plan(path).model_copy(update=words))

    # Sealing hashes the companion, megabytes of it: once a change, not once a rerun.
    return _plans.get((str(path), changed_at(str(path)), picks.name, picks.freeze), read)


def pick_size(outline: ModelOutline) -> PlanSize:
    """Return what the present plan would touch."""
    picks = current().picks
    if picks.plan_file is None:
        return size_of(outline, picks.layers)
    path = str(current().folder / picks.plan_file)
    key = (path, changed_at(path), outline.backbone_sha256)
    return _sizes.get(key, lambda: core.planned_size(outline, present_plan(outline)))


def keep_plan(plan: ReinitPlan) -> str:
    """Keep a plan in a file of the workspace and return the file's place in its folder."""
    place = f"plans/{secrets.token_hex(8)}/plan.json"
    core.write_plan(plan, current().folder / place)
    return place


def take_plan(plan: ReinitPlan) -> None:
    """Make a plan the present one; undo brings the old one back.

    Whole layers under one scheme and seed become a pick, which can be changed by hand. Any other
    plan stays as it is, and so does one that resets and freezes the same layer.
    """
    space = current()
    whole = all(target.granularity == "layer" and not target.entries for target in plan.targets)
    alike = {(target.scheme.model_dump_json(), target.seed) for target in plan.targets}
    first = plan.targets[0]
    space.change_picks(
        layers=tuple(target.layer for target in plan.targets),
        freeze=plan.freeze,
        patterns=_told_patterns(plan),
        name=plan.name,
        scheme=first.scheme.name,
        scheme_parameters=dict(first.scheme.parameters),
        seed=first.seed,
        plan_file=None if whole and len(alike) == 1 and not plan.untrained else keep_plan(plan),
    )


def _told_patterns(plan: ReinitPlan) -> tuple[Pattern, ...]:
    """Return the patterns of a plan that are tried again as the pick changes.

    They are provenance and a stranger's: a thousand expressions that take their time would hold
    up the page.
    """
    slow = [each for each in plan.patterns if each.syntax == "regex"]
    quick = [each for each in plan.patterns if each.syntax in ("glob", "type")]
    return (*quick[:200], *slow[:4])


def start_plan(rule: str, options: Mapping[str, object], scheme: str, seed: int) -> str:
    """Put the making of a plan by a rule into the queue."""
    space = current()
    choice = space.choice
    stored = latest_diagnosis()
    known = stored is not None and not is_stale(stored.diagnosis, choice)
    needs = next((info.needs for info in rule_infos() if info.name == rule), "nothing")
    draws = next((info.needs_data for info in scheme_infos() if info.name == scheme), False)

    def argv(folder: Path) -> list[str]:
        arguments = ["plan", *_model_arguments(choice), "--rule", rule, "--scheme", scheme]
        for name, value in options.items():
            arguments += [f"--{name}", str(value)]
        if known and stored is not None and (needs == "a diagnosis" or draws):
            arguments += ["--diagnosis", str(stored.path)]
        elif needs in ("a diagnosis", "images") or draws:
            size = space.measure_options.image_size
            arguments += ["--data", choice.data]
            arguments += ["--image-size", str(size)] if size else []
        else:
            arguments += ["--classes", str(len(data_outline(choice).classes))]
        arguments += ["--device", space.measure_options.device, "--seed", str(seed)]
        return [
            *arguments,
            "--name",
            rule,
            "--out",
            str(folder / "plan.json"),
            *_worker_files(folder),
        ]

    return queue.start(
        "plan",
        space.folder,
        argv,
        {"choice": choice.model_dump(mode="json"), "title": model_title(choice), "plan": rule},
    )


def plan_of(run: RunView) -> ReinitPlan | None:
    """Return the plan that a planning run made, or None when it made none."""
    path = run.folder / "plan.json"
    return core.read_plan(path) if path.is_file() else None


def start_preview(plan: ReinitPlan) -> str:
    """Put a preview of the plan on the chosen images into the queue."""
    space = current()
    choice = space.choice

    def argv(folder: Path) -> list[str]:
        path = folder / "plan.json"
        core.write_plan(plan, path)
        size = space.measure_options.image_size
        return [
            "preview",
            str(path),
            "--data",
            choice.data,
            *(["--image-size", str(size)] if size else []),
            "--device",
            space.measure_options.device,
            "--out",
            str(folder / "preview.json"),
            *_worker_files(folder),
        ]

    return queue.start(
        "preview",
        space.folder,
        argv,
        {
            "choice": choice.model_dump(mode="json"),
            "title": model_title(choice),
            "plan": plan.name,
            "plan_json": core.plan_json(plan),
        },
    )


def preview_of(run: RunView) -> PlanPreview | None:
    """Return what a preview found, or None when it left nothing."""
    path = run.folder / "preview.json"
    if not path.is_file():
        return None
    return PlanPreview.model_validate_json(path.read_bytes())


def plan_from_picks(outline: ModelOutline) -> ReinitPlan:
    """Return the layers that are picked as a plan.

    Raises:
        PlanError: The core refuses it, e.g. for tied parameters.
    """
    picks = current().picks
    stored = latest_diagnosis()
    evidence = None
    if stored is not None and not is_stale(stored.diagnosis, current().choice):
        evidence = Evidence(
            diagnosis_sha256=hashlib.sha256(stored.path.read_bytes()).hexdigest(),
            data_fingerprint=stored.diagnosis.header.data_fingerprint,
        )
    known = {layer.name for layer in outline.layers}
    return core.make_plan(
        outline,
        tuple(name for name in picks.layers if name in known),
        scheme=picks.scheme,
        scheme_parameters=picks.scheme_parameters,
        seed=picks.seed,
        name=picks.name,
        patterns=pick_patterns(outline),
        freeze=picks.freeze,
        evidence=evidence,
        resets_buffers=next(
            (info.resets_buffers for info in scheme_infos() if info.name == picks.scheme), True
        ),
    )


def plan_model(plan: ReinitPlan) -> str:
    """Return the name by which the choice finds the plan's network."""
    prefix = "" if plan.model.source == "embedded" else f"{plan.model.source}:"
    return f"{prefix}{plan.model.name}"


def train_defaults(outline: ModelOutline, data: DataOutline) -> TrainOptions:
    """Return the core's own numbers for a short fine-tune, no more images than there are."""
    from core import pipeline

    train = sum(data.counts.get("train", ())) or pipeline.DEFAULT_TRAIN_IMAGES
    val = sum(data.counts.get("val", ())) or pipeline.DEFAULT_VAL_IMAGES
    return TrainOptions(
        steps=pipeline.DEFAULT_STEPS,
        batch_size=pipeline.DEFAULT_BATCH_SIZE,
        lr=outline.default_lr,
        eval_every=pipeline.DEFAULT_EVAL_EVERY,
        seeds=pipeline.DEFAULT_SEEDS,
        image_size=outline.default_size,
        train_images=min(train, pipeline.DEFAULT_TRAIN_IMAGES),
        val_images=min(val, pipeline.DEFAULT_VAL_IMAGES),
    )
