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
from core.records import ArmCurve, ReinitPlan, StepRecord

CURVE_COLUMNS = ("arm", "seed", "step", "train_loss", "val_accuracy", "wall_s")

Trainer = Literal["timm", "torchvision", "torch"]
TRAINERS: tuple[Trainer, ...] = ("timm", "torchvision", "torch")


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
        raise OptionError(
            f'"{path}" cannot be written ({error.strerror}). Choose another place with --out.'
        ) from error


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
    """Return code that starts training from the exported weights.

    Args:
        plan: The plan the weights were made from.
        trainer: "timm" (its own training script), "torchvision" or "torch" (any loop).
        weights: Name of the exported file.

    Raises:
        OptionError: Unknown trainer.
    """
    if trainer not in TRAINERS:
        raise OptionError(f'There is no snippet for "{trainer}". Known: {", ".join(TRAINERS)}.')
    model = plan.model
    build = _constructor(plan)
    freeze = _freeze_lines(plan)
    load = f"{build}\nmodel.load_state_dict(load_file({weights!r}), strict=True)\n{freeze}"
    if trainer == "timm" and model.source != "torchvision":
        name = _timm_name(plan)
        extra = "".join(f" {key}={value!r}" for key, value in model.kwargs.items())
        kwargs = f" \\\n    --model-kwargs{extra}" if extra else ""
        note = (
            "# Frozen layers: the script has no option by pattern; use the torch snippet.\n"
            if plan.freeze
            else ""
        )
        return (
            f"{note}# timm's training script. --initial-checkpoint keeps the head that is in the\n"
            "# file; --pretrained-path would draw a new one.\n"
            f"python train.py --data-dir DATA --model {name} \\\n"
            f"    --initial-checkpoint {weights} --num-classes {model.classes}{kwargs}\n"
        )
    head = "from safetensors.torch import load_file\n"
    library = "import torchvision\n" if model.source == "torchvision" else "import timm\n"
    if trainer == "torchvision" or (trainer == "timm" and model.source == "torchvision"):
        return (
            "# In torchvision's reference train.py, in place of the line that makes the model:\n"
            f"{library}{head}\n{load}"
        )
    return f"{library}{head}\n{load}# ... then your own optimiser and loop, as for any model.\n"


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


def _freeze_lines(plan: ReinitPlan) -> str:
    if not plan.freeze:
        return ""
    names = ", ".join(repr(name) for name in plan.freeze)
    return (
        f"for layer in ({names},):\n"
        "    for name, parameter in model.named_parameters():\n"
        "        if name == layer or name.rpartition('.')[0] == layer:\n"
        "            parameter.requires_grad_(False)\n"
    )
