"""The table of layers and the fields of the plan follow the pick, whatever changed it."""

from __future__ import annotations

from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.pages import assert_well, open_app, put_measurement, space

pytestmark = pytest.mark.usefixtures("fresh_queue")


def table(app: AppTest) -> Any:
    (layers,) = [each.proto for each in app.dataframe if "Frozen" in each.value.columns]
    return layers


def test_a_pick_from_elsewhere_makes_a_new_table_so_that_old_ticks_cannot_take_it_back() -> None:
    put_measurement()
    app = open_app()
    first = table(app).id

    app.run()
    unchanged = table(app).id
    app.button(key="findings_0").click().run()
    picked = table(app).id
    app.button(key="undo").click().run()

    assert_well(app)
    assert first == unchanged
    assert len({first, picked, table(app).id}) == 3
    assert space().picks.layers == ()
