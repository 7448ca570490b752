"""A slice of `python -m tests.fuzz`: other cases than its own run, so that the two add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import Tally, run_case, summary
from tests.fuzz.cases import KINDS, spread
from tests.fuzz.corpus import Corpus, build

SEED = 1
CASES = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build(tmp_path_factory.mktemp("fuzz") / "corpus")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"bombs"}))
def test_odd_input_gets_an_answer(
    kind: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []
    for index in range(CASES):
        scratch = tmp_path / str(index)
        scratch.mkdir()
        monkeypatch.chdir(scratch)

        found = run_case(kind, index, SEED, corpus, scratch)

        # How long it took and how much memory this process holds are for the command to judge.
        found["wrong"] = [each for each in found["wrong"] if not each[:1].isdigit()]
        if found["wrong"]:
            failures.append(found)

    assert failures == []


def test_every_kind_of_input_gets_cases_and_the_table_counts_them() -> None:
    counts = spread(5_000)
    tally = Tally()
    tally.add({"code": 2, "seconds": 0.1, "peak_bytes": 10**9, "wrong": []})
    tally.add({"code": None, "seconds": 0.0, "peak_bytes": 0, "wrong": ["no answer after 30 s"]})

    table = summary({"plans": tally}, 0)

    assert set(counts) == set(KINDS)
    assert sum(counts.values()) >= 5_000
    assert min(counts.values()) > 0
    assert table["kinds"]["plans"]["cases"] == 2
    assert table["failures"] == {"no answer after 30 s": 1}
