"""The sweep's table, and a slice of the sweep itself."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version

import pytest

from tests.sweep import TABLE, Candidate, Row, candidates, read_table, sweep_model

VERSIONS, ROWS = read_table()
# Every sixth of the sixty that took least: some ten seconds, and all kinds of networks.
SLICE = sorted(ROWS, key=lambda row: (row.seconds, row.parameters))[:60:6]


def named(row: Row | Candidate) -> tuple[str, str, str]:
    return row.library, row.family, row.model


def test_the_table_has_a_row_for_every_family_and_network_there_is() -> None:
    wanted = {named(each) for each in candidates()}
    found = {named(row) for row in ROWS}

    assert len(found) == len(ROWS)
    if all(version(name).partition("+")[0] == VERSIONS[name] for name in ("timm", "torchvision")):
        assert found == wanted
    else:
        # Libraries gain networks; none that was swept may have gone unseen.
        assert len(found & wanted) >= 0.9 * len(found)


def test_every_network_went_through_or_says_why_not() -> None:
    assert TABLE.stat().st_size < 40_000
    odd = {named(row): row.result for row in ROWS if row.result != "ok"}

    assert odd == {}
    for row in ROWS:
        assert row.layers > row.silent >= 0, row
        assert row.attributed <= row.sites, row
        # A network without activation functions has none to attribute.
        assert bool(row.attributed) == bool(row.sites), row


@pytest.mark.parametrize("row", SLICE, ids=lambda row: f"{row.library}-{row.model}")
def test_a_network_of_the_slice_goes_through_as_the_table_says(row: Row) -> None:
    found = sweep_model(Candidate(library=row.library, family=row.family, model=row.model))

    assert asdict(found) | {"seconds": 0} == asdict(row) | {"seconds": 0}
