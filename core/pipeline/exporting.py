"""A plan packed for another trainer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from core.files.companions import plan_json
from core.files.plans import named_after, write_plan
from core.files.snippets import TRAINERS, snippet
from core.files.whole import write_whole
from core.pipeline.applying import reset_weights
from core.pipeline.progress import Progress
from core.portable import SCRIPT
from core.records import (
    ReinitPlan,
    ReinitReceipt,
)
from core.text import printable


def export_plan(
    plan: ReinitPlan, folder: Path, *, progress: Progress | None = None
) -> ReinitReceipt:
    """Write all that another trainer needs, and return the receipt.

    The folder gets `plan.json` (and its companion), `reinit.safetensors`, `apply_plan.py` and
    `USE.md` with a snippet for each trainer.

    Raises:
        LimberError: The plan does not fit, or the folder cannot be written.
    """
    (progress or Progress()).phase("applying the plan")
    # Before the weights are made: the receipt holds this very plan's digest.
    plan = named_after(plan, folder / "plan.json")
    receipt = reset_weights(plan, folder / "reinit.safetensors")
    write_plan(plan, folder / "plan.json")
    write_whole(folder / "apply_plan.py", SCRIPT.read_text(encoding="utf-8"))
    parts = [f"# {printable(plan.name)}\n\n{_files(plan, receipt)}"]
    for trainer in TRAINERS:
        if plan.model.source == "torchvision" and trainer == "timm":
            continue
        parts.append(f"## {trainer}\n\n```\n{snippet(plan, trainer)}```\n")
    write_whole(folder / "USE.md", "\n".join(parts))
    return receipt


def _files(plan: ReinitPlan, receipt: ReinitReceipt) -> str:
    digest = hashlib.sha256(plan_json(plan).encode()).hexdigest()
    return (
        f"- `plan.json`: what is reset, {receipt.parameters_touched:,} of "
        f"{receipt.parameters_total:,} parameters (SHA-256 {digest}).\n"
        "- `reinit.safetensors`: the edited weights (state SHA-256 "
        f"{receipt.after_sha256}).\n"
        "- `apply_plan.py`: loads, freezes and checks; needs only torch and safetensors.\n"
    )
