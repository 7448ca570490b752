"""Files of earlier versions open, and mean the same bits.

tests/written_before/ was written on 2026-11-25 by the command line, on `timm:test_resnet` with
random weights of seed 0: a diagnosis (16 blood cells of 32 px), plans of layers, units (with ReDo)
and weights (with the least |w|), a short fine-tune, and the digests of what applying them gave.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import core
from core.pipeline.applying import edited_model
from core.records import ABComparison, RunRecord

BEFORE = Path(__file__).parent / "written_before"


@pytest.mark.parametrize("name", ["layers", "units", "weights"])
def test_a_plan_still_makes_the_same_weights(name: str) -> None:
    digests = json.loads((BEFORE / "after.json").read_text(encoding="utf-8"))

    _, receipt = edited_model(core.read_plan(BEFORE / f"{name}.json"))

    assert receipt.after_sha256 == digests[name]


@pytest.mark.parametrize("name", ["layers", "units", "weights"])
def test_a_plan_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    plan = core.read_plan(BEFORE / f"{name}.json")

    core.write_plan(plan, tmp_path / f"{name}.json")

    for path in BEFORE.glob(f"{name}.*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_diagnosis_is_judged_and_written_as_before(tmp_path: Path) -> None:
    path = BEFORE / "diagnosis.json"
    diagnosis, units = core.read_diagnosis(path), core.read_units(path)

    again = core.rejudge(diagnosis)
    arrays = {
        f"{prefix}{layer}/{metric}": values
        for layer, figures in units.items()
        for metric, (own, twin) in figures.items()
        for prefix, values in (("", own), ("twin/", twin))
    }
    core.write_diagnosis(diagnosis, arrays, tmp_path / "diagnosis.json")

    assert diagnosis.remarks
    assert (again.findings, again.remarks) == (diagnosis.findings, diagnosis.remarks)
    assert (tmp_path / "diagnosis.json").read_bytes() == path.read_bytes()


def test_a_run_opens_and_its_figures_are_as_before() -> None:
    summary = json.loads((BEFORE / "run" / "summary.json").read_text(encoding="utf-8"))
    record = RunRecord.model_validate(summary["record"])

    found = core.compare_curves(core.read_curves(BEFORE / "run"))

    told = ABComparison.model_validate(summary["comparison"])
    assert record.arms == ("untouched", "plan", "random control")
    assert record.design is None
    means = {(row.arm, row.measure): (row.mean, row.seeds) for row in found.differences}
    assert told.differences
    for row in told.differences:
        assert means[row.arm, row.measure] == (row.mean, row.seeds)
    # What it claimed by itself of each arm, over so few seeds, it claims no more.
    assert {row.verdict for row in found.differences} == {"screening", None}
