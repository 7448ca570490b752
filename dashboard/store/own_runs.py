"""The runs of this session's workspace: listed, stopped, and what they left in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import core
from core.records import PlanPreview, ReinitPlan, ReinitReceipt
from core.records.attribution import Attribution
from dashboard.store import runs
from dashboard.store.runs import RunKind, RunView
from dashboard.store.session import current

if TYPE_CHECKING:
    import numpy as np


def all_runs(kind: RunKind | None = None) -> tuple[RunView, ...]:
    """Return this workspace's runs, newest first."""
    return runs.queue.runs(current().folder, kind)


def live_runs(kind: RunKind | None = None) -> tuple[RunView, ...]:
    """Return the runs of this workspace that run or wait, the running ones first."""
    folder = current().folder / "runs"
    mine = [run for run in runs.queue.live() if run.folder.parent == folder]
    return tuple(run for run in mine if kind in (None, run.kind))


def live_run(kind: RunKind | None = None) -> RunView | None:
    """Return the first run of this workspace that runs or waits."""
    return next(iter(live_runs(kind)), None)


def stop_run(run_id: str) -> None:
    """Ask a run of this workspace to stop."""
    if runs.queue.view(current().folder, run_id) is not None:
        runs.queue.stop(run_id)


def plan_of(run: RunView) -> ReinitPlan | None:
    """Return the plan that a planning run made, or None if it made none."""
    path = run.folder / "plan.json"
    return core.read_plan(path) if path.is_file() else None


def preview_of(run: RunView) -> PlanPreview | None:
    """Return what a preview measured, or None if it left nothing."""
    path = run.folder / "preview.json"
    if not path.is_file():
        return None
    return PlanPreview.model_validate_json(path.read_bytes())


def trained_of(run: RunView) -> dict[str, Path]:
    """Return arm to the file of its trained weights, of the arms whose weights a run kept."""
    folder = run.folder / "weights"
    try:
        record = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))["record"]
        arms = [str(arm) for arm in record["arms"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    # The names of files are the core's, which may leave out letters of an arm's name.
    from core.pipeline.trial import trained_files

    files = {arm: folder / name for arm, name in trained_files(arms).items()}
    return {arm: path for arm, path in files.items() if path.is_file()}


def trained_run() -> RunView | None:
    """Return the newest fine-tune of the present choice that kept weights, or None."""
    wanted = current().choice.model_dump(mode="json")
    for run in all_runs("finetune"):
        if not run.live and run.facts.get("choice") == wanted and trained_of(run):
            return run
    return None


def remeasured(run: RunView, arm: str) -> RunView | None:
    """Return the newest measurement of what a fine-tune made of an arm, or None."""
    for again in all_runs("after"):
        if again.facts.get("of") == run.id and again.facts.get("arm") == arm:
            return again
    return None


def attribution_of(run: RunView) -> tuple[Attribution, Mapping[str, np.ndarray]] | None:
    """Return what an attribution found, with its arrays, or None if it left nothing."""
    path = run.folder / "attribution.json"
    if not path.is_file():
        return None
    return core.read_attribution(path)


def receipt_of(run: RunView) -> ReinitReceipt | None:
    """Return what an applying run says it changed, or None if it left no receipt."""
    try:
        return ReinitReceipt.model_validate(run.result["receipt"])
    except (KeyError, ValueError):
        return None
