"""A rule that chooses makes the plan, and the plan stays whole."""

from __future__ import annotations

import pytest

import core
from tests.pages import (
    PICKED,
    assert_well,
    open_app,
    space,
)

pytestmark = pytest.mark.usefixtures("fresh_queue")


def test_the_plan_of_a_rule_stays_whole_until_it_is_cleared() -> None:
    plan = core.plan_by_rule(
        core.resolve_model("tf_efficientnet_lite0"),
        "weight-magnitude",
        {"percent": 10.0},
        classes=8,
        wish=core.Wish(name="weight-magnitude", layers=PICKED),
    )
    app = open_app("export")
    files = [("plan.json", core.plan_json(plan).encode(), "application/json")]
    assert plan.companion is not None
    assert plan.companion_bytes is not None
    files.append((plan.companion.file, plan.companion_bytes, "application/octet-stream"))
    app.file_uploader(key="plan_upload_0").set_value(files).run()
    assert_well(app)
    assert space().picks.plan_file is not None
    before = space().picks

    app = open_app("pick")
    app.text_input(key="pattern_text").set_value("blocks.4*").run()
    app.button(key="pattern_add").click().run()

    assert_well(app)
    assert space().picks == before
    assert "The plan stays as it is" in app.toast[0].value

    app.button(key="clear").click().run()
    app.button(key="pattern_add").click().run()

    assert_well(app)
    picks = space().picks
    assert picks.layers
    assert (picks.plan_file, picks.scheme, picks.name) == (None, "architecture", "plan")
    app.button(key="undo").click().run()
    app.button(key="undo").click().run()
    assert space().picks == before
