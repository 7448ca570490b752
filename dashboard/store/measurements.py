"""Measurements on disk: the newest, how it is judged, and whether it still fits the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import core
from core.errors import LimberError
from core.records import Diagnosis
from dashboard.store.example import CHOICE as EXAMPLE
from dashboard.store.example import example_path, unpack_anew
from dashboard.store.memo import Memo
from dashboard.store.own_runs import all_runs
from dashboard.store.runs import RunView
from dashboard.store.session import current
from dashboard.store.values import changed_at, data_spec, model_spec, outline_if_ready
from dashboard.store.workspace import Choice

if TYPE_CHECKING:
    import numpy as np

Inside = Mapping[str, Mapping[str, "tuple[np.ndarray, np.ndarray | None]"]]

_insides: Memo[Inside] = Memo(max_entries=2)
_diagnoses: Memo[Diagnosis] = Memo(max_entries=8)
_units: Memo[Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]] = Memo(max_entries=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A measurement on disk.

    Attributes:
        run_id: The run that made it; empty for the example that comes with the program.
        path: The diagnosis.
        diagnosis: What it says.
    """

    run_id: str
    path: Path
    diagnosis: Diagnosis


def diagnosis_of(run: RunView) -> Stored | None:
    """Return what a measuring run wrote, or None when it wrote nothing."""
    return _stored(run.folder / "diagnosis.json", run.id)


def _stored(path: Path, run_id: str) -> Stored | None:
    changed = changed_at(str(path))
    if changed is None:
        return None
    return Stored(
        run_id=run_id,
        path=path,
        diagnosis=_diagnoses.get((str(path), changed), lambda: core.read_diagnosis(path)),
    )


def latest_diagnosis() -> Stored | None:
    """Return the newest measurement of the present choice, else the newest of any.

    So whoever goes back to an earlier network finds its measurement again. The example that comes
    with the program counts as the oldest of its choice.
    """
    choice = current().choice
    wanted = choice.model_dump(mode="json")
    finished = [run for run in all_runs("measure") if not run.live]
    own = [run for run in finished if run.facts.get("choice") == wanted]
    others = [run for run in finished if run.facts.get("choice") != wanted]
    ways: list[Callable[[], Stored | None]] = [
        *(partial(diagnosis_of, run) for run in own),
        partial(_example, choice),
        *(partial(diagnosis_of, run) for run in others),
    ]
    damaged: LimberError | None = None
    # One after the other: reading all that was ever measured would take seconds.
    for way in ways:
        try:
            stored = way()
        except LimberError as error:
            damaged = damaged or error
            continue
        if stored is not None:
            return replace(stored, diagnosis=_judged(stored.diagnosis))
    if damaged is not None and not wants_example():
        raise damaged
    return None


def _example(choice: Choice) -> Stored | None:
    path = example_path(choice)
    try:
        stored = None if path is None else _stored(path, "")
    except LimberError:
        unpack_anew()
        path = example_path(choice)
        stored = None if path is None else _stored(path, "")
    return None if stored is None or is_stale(stored.diagnosis, choice) else stored


def wants_example() -> bool:
    """Whether the present choice is the example's, so that it is measured without being asked."""
    return current().choice == EXAMPLE and not all_runs("measure")


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


def inside_of(stored: Stored) -> Inside:
    """Return what was seen inside each layer; empty where nobody looked or it is gone."""
    if stored.diagnosis.header.inside_file is None:
        return {}

    def read() -> Inside:
        try:
            return core.read_inside(stored.path)
        except LimberError:
            return {}

    return _insides.get((str(stored.path), changed_at(str(stored.path))), read)


def units_of(stored: Stored) -> Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """Return each layer's figures per unit, as pairs of the network's and the fresh twin's.

    Empty where the file is gone; the layer opens without them.
    """
    key = (str(stored.path), changed_at(str(stored.path)))

    def read() -> Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
        try:
            return core.read_units(stored.path)
        except LimberError:
            return {}

    return _units.get(key, read)
