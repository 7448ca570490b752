"""Measurements on disk: the newest, how it is judged, and whether it still fits the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import core
from core.errors import LimberError
from core.records import Diagnosis
from dashboard.store.memo import Memo
from dashboard.store.own_runs import all_runs
from dashboard.store.runs import RunView
from dashboard.store.session import current
from dashboard.store.values import changed_at, data_spec, model_spec, outline_if_ready
from dashboard.store.workspace import Choice

if TYPE_CHECKING:
    import numpy as np

_diagnoses: Memo[Diagnosis] = Memo(max_entries=8)
_units: Memo[Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]] = Memo(max_entries=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A measurement on disk and the run that made it."""

    run: RunView
    path: Path
    diagnosis: Diagnosis


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

    So whoever goes back to an earlier network finds its measurement again.
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
        # Checks come and go with versions; limits kept for one that is gone are dropped.
        return core.rejudge(diagnosis)


def is_stale(diagnosis: Diagnosis, choice: Choice) -> bool:
    """Whether the network or the images have changed since it was measured."""
    header = diagnosis.header
    if header.model != model_spec(choice) or header.data != data_spec(choice):
        return True
    outline, data = outline_if_ready(choice)
    if data is not None and data.fingerprint != header.data_fingerprint:
        return True
    return outline is not None and outline.backbone_sha256 != header.backbone_sha256


def units_of(stored: Stored) -> Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """Return each layer's figures per unit, as pairs of the network's and the fresh twin's."""
    key = (str(stored.path), changed_at(str(stored.path)))
    return _units.get(key, lambda: core.read_units(stored.path))
