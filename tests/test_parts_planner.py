"""A rule that chooses makes the plan, and the plan stays whole."""

from __future__ import annotations

import json

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

    app = open_app("look")
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


def test_a_plan_that_was_chosen_on_other_images_says_so_wherever_it_is_used() -> None:
    plan = core.plan_by_rule(
        core.resolve_model("tf_efficientnet_lite0"),
        "weight-magnitude",
        {"percent": 10.0},
        classes=8,
        wish=core.Wish(layers=PICKED),
    )
    shown = core.outline_data(core.resolve_data("bloodmnist")).fingerprint

    for seen, warned in (("0" * 64, True), (shown, False), (None, False)):
        evidence = plan.evidence.model_copy(update={"data_fingerprint": seen})
        given = core.resealed(plan.model_copy(update={"evidence": evidence}))
        assert given.companion is not None
        assert given.companion_bytes is not None
        files = [("plan.json", core.plan_json(given).encode(), "application/json")]
        files.append((given.companion.file, given.companion_bytes, "application/octet-stream"))
        app = open_app("export")
        app.file_uploader(key="plan_upload_0").set_value(files).run()
        for page in ("look", "watch", "export"):
            app = open_app(page)
            said = [warning.value for warning in app.warning if "other images" in warning.value]
            assert bool(said) is warned, (page, seen)


def test_a_plan_made_without_data_is_taken_under_the_head_of_the_chosen_images() -> None:
    network = core.outline_model(core.resolve_model("tf_efficientnet_lite0"))
    plan = core.make_plan(network, core.match_layers(network, "blocks.6*"))
    assert plan.model.head == "own"

    app = open_app("export")
    document = core.plan_json(plan).encode()
    app.file_uploader(key="plan_upload_0").set_value(("plan.json", document, "application/json"))
    app.run()

    assert_well(app)
    assert not app.error
    assert space().picks.layers == tuple(target.layer for target in plan.targets)
    shown = json.loads(
        next(code.value for code in open_app("export").code if code.language == "json")
    )
    assert (shown["model"]["head"], shown["model"]["classes"]) == ("new", 8)
