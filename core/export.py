"""Values -> files: whole or not at all, and snippets for one's own trainer."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from core.errors import OptionError
from core.files.disk import no_room, trouble
from core.files.plans import arrays_of, plan_json, sealed
from core.records import ArmCurve, ReinitPlan, StepRecord

CURVE_COLUMNS = ("arm", "seed", "step", "train_loss", "val_accuracy", "wall_s")

Companion = Literal["masks", "units"]
Trainer = Literal["timm", "torchvision", "torch", "lightning", "hf"]
TRAINERS: tuple[Trainer, ...] = ("timm", "torchvision", "torch", "lightning", "hf")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Raises:
        OptionError: The folder cannot be made or written to.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            # mkstemp makes the file private; a result should be as readable as any other.
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        way = "Choose another place with --out."
        if no_room(error):
            way = "Then start again, or choose another place with --out."
        raise OptionError(f"{trouble(error, path)} {way}") from error


def companion_path(path: Path, what: Companion) -> Path:
    """Return where the companion of a JSON file lies: masks of a plan, or units of a diagnosis.

    No two files share one: "a.json" has "a.masks.safetensors", and a file whose name does not end
    in .json, such as "a", has "a.masks-of.safetensors".
    """
    if path.suffix == ".json":
        return path.with_name(f"{path.stem}.{what}.safetensors")
    return path.with_name(f"{path.name}.{what}-of.safetensors")


def named_after(plan: ReinitPlan, path: Path) -> ReinitPlan:
    """Return a plan whose companion, if it has one, is named after the plan's file.

    Raises:
        PlanError: The plan came without its companion.
    """
    name = companion_path(path, "masks").name
    if plan.companion is None or plan.companion.file == name:
        return plan
    renamed = plan.companion.model_copy(update={"file": name})
    return sealed(plan.model_copy(update={"companion": renamed}), arrays_of(plan))


def write_plan(plan: ReinitPlan, path: Path) -> ReinitPlan:
    """Write a plan and, where it has one, its companion beside it; return what was written.

    Args:
        plan: With its companion attached, if it names one; the companion is named after the file.
        path: The plan's file.

    Raises:
        OptionError: The place cannot be written to.
        PlanError: The plan came without its companion.
    """
    plan = named_after(plan, path)
    if plan.companion is not None:
        arrays_of(plan)
        assert plan.companion_bytes is not None
        write_whole(path.parent / plan.companion.file, plan.companion_bytes)
    write_whole(path, plan_json(plan))
    return plan


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
        ArmCurve(arm=arm, seed=seed, steps=tuple(sorted(each, key=lambda step: step.step)))
        for (arm, seed), each in gathered.items()
    )


def snippet(plan: ReinitPlan, trainer: str = "timm", *, weights: str = "reinit.safetensors") -> str:
    """Return code that starts training from an exported plan.

    Args:
        plan: The plan the weights were made from.
        trainer: "timm" (its own training script), "torchvision", "torch" (any loop),
            "lightning" (a callback) or "hf" (the Trainer's model_init).
        weights: Name of the exported file.

    Raises:
        OptionError: Unknown trainer.
    """
    if trainer not in TRAINERS:
        raise OptionError(f'There is no snippet for "{trainer}". Known: {", ".join(TRAINERS)}.')
    model = plan.model
    build = _constructor(plan)
    apply = 'apply_plan(model, ".")  # loads, freezes what the plan freezes, checks every bit\n'
    if trainer == "timm" and model.source != "torchvision":
        name = _timm_name(plan)
        extra = "".join(f" {key}={value!r}" for key, value in model.kwargs.items())
        kwargs = f" \\\n    --model-kwargs{extra}" if extra else ""
        note = (
            "# Frozen layers and learning rates: the script has no option by layer; use the torch\n"
            "# snippet.\n"
            if plan.freeze or plan.learning_rates
            else ""
        )
        return (
            f"{note}# timm's training script. --initial-checkpoint keeps the head that is in the\n"
            "# file; --pretrained-path would draw a new one.\n"
            f"python train.py --data-dir DATA --model {name} \\\n"
            f"    --initial-checkpoint {weights} --num-classes {model.classes}{kwargs}\n"
        )
    library = "import torchvision\n" if model.source == "torchvision" else "import timm\n"
    if trainer == "torchvision" or (trainer == "timm" and model.source == "torchvision"):
        return (
            "# In torchvision's reference train.py, in place of the line that makes the model:\n"
            f"{library}from apply_plan import apply_plan\n\n{build}\n{apply}"
        )
    if trainer == "lightning":
        return (
            f"{library}import lightning\nfrom apply_plan import lightning_callback\n\n"
            f"# In your module's __init__: self.{build}\n"
            'start = lightning_callback(".", attribute="model")\n'
            "lightning.Trainer(callbacks=[start]).fit(YourModule(), data)\n"
        )
    if trainer == "hf":
        return (
            f"{library}from apply_plan import model_init\nfrom transformers import Trainer\n\n"
            f"def build():\n    {build}\n    return model  # wrapped as your Trainer needs it\n\n"
            'start = model_init(build, ".")\n'
            "Trainer(model_init=start, args=arguments, train_dataset=data).train()\n"
        )
    return (
        f"{library}from apply_plan import apply_plan, parameter_groups\n\n{build}\n{apply}"
        'groups = parameter_groups(model, ".", lr=1e-3, weight_decay=0.01)\n'
        "optimizer = torch.optim.AdamW(groups)  # ... then your own loop, as for any model\n"
    ).replace("import t", "import torch\nimport t", 1)


def _timm_name(plan: ReinitPlan) -> str:
    # Embedded models carry timm's own names; a test holds the catalogue to it.
    return plan.model.name.split(".", 1)[0] if plan.model.source == "timm" else plan.model.name


def _constructor(plan: ReinitPlan) -> str:
    model = plan.model
    kwargs = "".join(f", {key}={value!r}" for key, value in model.kwargs.items())
    if model.source == "torchvision":
        return (
            f"model = torchvision.models.get_model({model.name!r}, weights=None, "
            f"num_classes={model.classes}{kwargs})"
        )
    return f"model = timm.create_model({_timm_name(plan)!r}, num_classes={model.classes}{kwargs})"
