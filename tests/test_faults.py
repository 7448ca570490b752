"""A slice of `python -m tests.faults`: real servers and workers that end at random points."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import faults

# The cheapest real command there is; the others are the whole command's.
PLANS = (("plan",),)


@pytest.mark.parametrize("kills", [faults.server_kills, faults.worker_kills])
def test_kills_lose_nothing_and_leave_the_queue_alive(kills: Callable[..., faults.Counts]) -> None:
    counts = kills(1, random.Random(0), "", PLANS)

    assert counts["points"] == 1


def test_of_two_runs_with_one_out_one_is_refused_by_name() -> None:
    assert faults.one_out(1, random.Random(0), "{}")["refused by name"] == 1


def test_a_lost_run_is_noticed(tmp_path: Path) -> None:
    run = tmp_path / "workspaces" / "0" / "runs" / "plan-20261124-000000-aaaa"
    run.mkdir(parents=True)

    with pytest.raises(faults.Lost, match="has no record"):
        faults.check_home(tmp_path, {run.name: "done"})
    (run / "run.json").write_text('{"state": "done"}')
    with pytest.raises(faults.Lost, match="not shown"):
        faults.check_home(tmp_path, {})
    with pytest.raises(faults.Lost, match="no result"):
        faults.check_home(tmp_path, {run.name: "done"})
    (run / "plan.json").write_text("{half")
    with pytest.raises(faults.Lost, match="is torn"):
        faults.check_home(tmp_path, {run.name: "done"})
