"""Starting runs: the command line of each kind of run, and the facts kept with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import core
from core.records import DataOutline, ModelOutline, ReinitPlan
from dashboard.store import runs
from dashboard.store.measurements import is_stale, latest_diagnosis
from dashboard.store.own_runs import all_runs, live_runs, stop_run, trained_of
from dashboard.store.present_plan import plan_digest
from dashboard.store.runs import RunKind, RunView
from dashboard.store.session import current
from dashboard.store.values import (
    data_outline,
    model_outline,
    model_title,
    rule_infos,
    scheme_infos,
)
from dashboard.store.workspace import Choice, MeasureOptions, TrainOptions

# Where a set does not say how many validation images it has: all of them.
MOST_VAL_IMAGES = 10_000_000


def train_defaults(outline: ModelOutline, data: DataOutline) -> TrainOptions:
    """Return the core's defaults for a short fine-tune, with no more images than there are."""
    from core.pipeline import trial
    from core.pipeline.batches import DEFAULT_BATCH_SIZE

    train = sum(data.counts.get("train", ())) or trial.DEFAULT_TRAIN_IMAGES
    val = sum(data.counts.get("val", ())) or MOST_VAL_IMAGES
    return TrainOptions(
        steps=trial.DEFAULT_STEPS,
        batch_size=DEFAULT_BATCH_SIZE,
        lr=outline.default_lr,
        eval_every=trial.DEFAULT_EVAL_EVERY,
        seeds=trial.DEFAULT_SEEDS,
        image_size=outline.default_size,
        train_images=min(train, trial.DEFAULT_TRAIN_IMAGES),
        val_images=val,
    )


def start_measure(options: MeasureOptions) -> str:
    """Put a measurement of the chosen network on the chosen data into the queue."""
    space = current()
    choice = space.choice
    size = options.image_size or model_outline(choice).default_size
    space.set_measure(options)
    numbers = {
        "--samples": options.samples,
        "--image-size": size,
        "--seed": options.seed,
    }
    if options.batch_size is not None:
        numbers["--batch-size"] = options.batch_size

    def argv(folder: Path) -> list[str]:
        arguments = ["measure", *_model_arguments(choice), "--data", choice.data]
        arguments += _flags(numbers)
        arguments += ["--device", options.device, "--dtype", options.dtype]
        # It costs about as much as the passes themselves, and a layer then opens at once.
        arguments.append("--inside")
        if options.transfer:
            arguments.append("--transfer")
        return [*arguments, "--out", str(folder / "diagnosis.json"), *_worker_files(folder)]

    return _start(
        "measure", argv, {"samples": options.samples, "image_size": size, "device": options.device}
    )


def start_finetune(
    options: TrainOptions, plan: ReinitPlan, others: Sequence[ReinitPlan] = ()
) -> str:
    """Put a fine-tune of plans against the untouched network into the queue.

    Args:
        options: How to train and what to judge; kept for the next time.
        plan: The present plan; a random control takes its size.
        others: More plans, an arm each.
    """
    space = current()
    choice = space.choice
    space.set_train(options)
    # Both at once would slow each other down, and time the wrong thing.
    for timing in live_runs("estimate"):
        stop_run(timing.id)

    def argv(folder: Path) -> list[str]:
        arguments = ["finetune", *_model_arguments(choice), "--data", choice.data]
        arguments += ["--plan", _write_plan(plan, folder)]
        for number, other in enumerate(others, start=2):
            arguments += ["--plan", _write_plan(other, folder, name=f"plan {number}.json")]
        if options.random_control:
            arguments.append("--random-control")
        if options.keep_weights:
            arguments.append("--keep-weights")
        for rival in options.rivals:
            arguments += ["--rival", rival]
        arguments += _training_arguments(options)
        arguments += ["--seeds", ",".join(map(str, options.seeds)) + ","]
        return [*arguments, "--out", str(folder), *_worker_files(folder)]

    return _start(
        "finetune",
        argv,
        {
            "plan": plan.name,
            "plan_sha256": plan_digest(plan),
            "layers": [target.layer for target in plan.targets],
            "others": [other.name for other in others],
            "rivals": list(options.rivals),
            "outcome": options.outcome,
            "steps": options.steps,
            "seeds": list(options.seeds),
            "random_control": options.random_control,
            "batch_size": options.batch_size,
            "image_size": options.image_size,
        },
    )


def start_estimate(options: TrainOptions) -> str:
    """Put two seconds of a fine-tune into the queue, to be timed."""
    choice = current().choice

    def argv(folder: Path) -> list[str]:
        arguments = ["finetune", "--estimate", *_model_arguments(choice), "--data", choice.data]
        return [*arguments, *_training_arguments(options), *_worker_files(folder)]

    return _start("estimate", argv, pace_facts(options))


def pace_facts(options: TrainOptions) -> dict[str, object]:
    """Return what the time of a step depends on."""
    return {
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "device": options.device,
        "optimizer": options.optimizer,
        "augment": list(options.augment),
    }


def _training_arguments(options: TrainOptions) -> list[str]:
    numbers = {
        "--steps": options.steps,
        "--batch-size": options.batch_size,
        "--lr": options.lr,
        "--eval-every": options.eval_every,
        "--image-size": options.image_size,
        "--train-images": options.train_images,
        "--val-images": options.val_images,
        "--device": options.device,
        "--outcome": options.outcome,
        "--optimizer": options.optimizer,
        "--schedule": options.schedule,
        "--augment": ",".join(options.augment) or "none",
    }
    if options.margin is not None:
        numbers["--margin"] = options.margin
    return [*_flags(numbers), *(["--sweep"] if options.sweep else [])]


def start_apply(plan: ReinitPlan) -> str:
    """Put a run that writes the edited weights into the queue."""

    def argv(folder: Path) -> list[str]:
        arguments = ["apply", _write_plan(plan, folder)]
        return [*arguments, "--out", str(folder / "reinit.safetensors"), *_worker_files(folder)]

    return _start("apply", argv, {"plan": plan.name, "plan_json": core.plan_json(plan)})


def start_plan(rule: str, options: Mapping[str, object], scheme: str, seed: int) -> str:
    """Put a run in which a rule makes a plan into the queue."""
    space = current()
    choice = space.choice
    device = space.measure_options.device
    sources = _plan_sources(rule, scheme)

    def argv(folder: Path) -> list[str]:
        arguments = ["plan", *_model_arguments(choice), "--rule", rule, "--scheme", scheme]
        arguments += _flags({f"--{name}": value for name, value in options.items()})
        arguments += [*sources, "--device", device, "--seed", str(seed), "--name", rule]
        return [*arguments, "--out", str(folder / "plan.json"), *_worker_files(folder)]

    return _start("plan", argv, {"plan": rule})


def start_preview(plan: ReinitPlan) -> str:
    """Put a preview of the plan on the chosen images into the queue."""
    space = current()
    data, options = space.choice.data, space.measure_options

    def argv(folder: Path) -> list[str]:
        arguments = ["preview", _write_plan(plan, folder), "--data", data]
        if options.image_size:
            arguments += ["--image-size", str(options.image_size)]
        arguments += ["--device", options.device, "--out", str(folder / "preview.json")]
        return [*arguments, *_worker_files(folder)]

    return _start("preview", argv, {"plan": plan.name, "plan_json": core.plan_json(plan)})


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeWish:
    """What a person wants to see of a layer.

    Attributes:
        layer: Which.
        method: Key of a method, or "auto".
        plan: Also after this plan; None leaves it out.
        trained: Files of trained weights, each another state.
    """

    layer: str
    method: str
    plan: ReinitPlan | None
    trained: tuple[Path, ...] = ()

    @property
    def facts(self) -> dict[str, object]:
        """What a run that shows it was started with."""
        plan = "" if self.plan is None else core.plan_json(self.plan)
        trained = [str(path) for path in self.trained]
        return {
            "layer": self.layer,
            "method": self.method,
            "plan_json": plan,
            "trained": trained,
        }


def attribute_run(wish: AttributeWish) -> RunView | None:
    """Return the newest run of this wish on the chosen network and images, or None."""
    facts = wish.facts | {"choice": current().choice.model_dump(mode="json")}
    for run in all_runs("attribute"):
        if all(run.facts.get(name) == value for name, value in facts.items()):
            return run
    return None


def start_attribute(wish: AttributeWish) -> str:
    """Put a look at what a layer carries into the queue."""
    space = current()
    choice, options = space.choice, space.measure_options

    def argv(folder: Path) -> list[str]:
        arguments = ["attribute", *_model_arguments(choice), "--data", choice.data]
        arguments += ["--layer", wish.layer, "--method", wish.method]
        if wish.plan is not None:
            arguments += ["--plan", _write_plan(wish.plan, folder)]
        for path in wish.trained:
            arguments += ["--trained", str(path)]
        if options.image_size:
            arguments += ["--image-size", str(options.image_size)]
        # The features need no trained head, so all states can be compared.
        arguments += ["--target", "features", "--device", options.device]
        arguments += ["--out", str(folder / "attribution.json")]
        return [*arguments, *_worker_files(folder)]

    return _start("attribute", argv, wish.facts)


def start_remeasure(run: RunView, arm: str) -> str:
    """Put a measurement of what a fine-tune made of an arm into the queue."""
    space = current()
    choice, options = space.choice, space.measure_options
    checkpoint = trained_of(run)[arm]

    def argv(folder: Path) -> list[str]:
        arguments = ["measure", "--model", choice.model, "--checkpoint", str(checkpoint)]
        arguments += ["--data", choice.data, "--device", options.device]
        numbers = {"--samples": options.samples, "--seed": options.seed}
        if options.image_size:
            numbers["--image-size"] = options.image_size
        arguments += _flags(numbers)
        return [*arguments, "--out", str(folder / "diagnosis.json"), *_worker_files(folder)]

    return _start("after", argv, {"of": run.id, "arm": arm})


def _start(kind: RunKind, argv: Callable[[Path], list[str]], facts: Mapping[str, object]) -> str:
    """Queue a run of this workspace; the chosen network and images are kept with its facts."""
    space = current()
    chosen = {
        "choice": space.choice.model_dump(mode="json"),
        "title": model_title(space.choice),
    }
    return runs.queue.start(kind, space.folder, argv, {**chosen, **facts})


def _plan_sources(rule: str, scheme: str) -> list[str]:
    """Return the arguments for what a rule or scheme looks at besides the weights."""
    space = current()
    choice = space.choice
    stored = latest_diagnosis()
    fits = stored is not None and not is_stale(stored.diagnosis, choice)
    needs = next((info.needs for info in rule_infos() if info.name == rule), "nothing")
    draws = next((info.needs_data for info in scheme_infos() if info.name == scheme), False)
    if fits and stored is not None and (needs == "a diagnosis" or draws):
        return ["--diagnosis", str(stored.path)]
    if needs in ("a diagnosis", "images") or draws:
        size = space.measure_options.image_size
        return ["--data", choice.data, *(["--image-size", str(size)] if size else [])]
    return ["--classes", str(len(data_outline(choice).classes))]


def _flags(values: Mapping[str, object]) -> list[str]:
    return [part for flag, value in values.items() for part in (flag, str(value))]


def _model_arguments(choice: Choice) -> list[str]:
    arguments = ["--model", choice.model]
    if choice.checkpoint:
        arguments += ["--checkpoint", choice.checkpoint]
    elif choice.weights == "none":
        arguments += ["--weights", "none"]
    return arguments


def _write_plan(plan: ReinitPlan, folder: Path, *, name: str = "plan.json") -> str:
    path = folder / name
    core.write_plan(plan, path)
    return str(path)


def _worker_files(folder: Path) -> list[str]:
    return ["--events", str(folder / "events.jsonl"), "--stop-file", str(folder / "stop")]
