"""What a layer carries: asked for once, kept, and said with its method, baseline, cost and n."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import core
from core.catalogue.attributions import METHODS
from dashboard import store, words
from dashboard.parts import carrying
from dashboard.store.runs import RunQueue
from tests.pages import WAIT_FOR_STOP, assert_well, open_app, put_run, shown, wait_until

pytestmark = pytest.mark.usefixtures("fresh_queue")

LAYER = "blocks.3.1.conv_pw"


def test_a_look_is_queued_shown_and_stopped(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    app = open_app()
    app.selectbox(key="strip_layer").set_value(LAYER).run()

    app.button(key="carrying_start").click().run()
    assert_well(app)
    wait_until(lambda: fresh_queue.live()[0].total == 60)
    app.run()

    (run,) = fresh_queue.live()
    assert run.kind == "attribute"
    assert run.facts["layer"] == LAYER
    app.button(key="stop_attribute").click().run()
    wait_until(lambda: not fresh_queue.live())
    app.run()
    assert_well(app)
    assert "Stopped" in shown(app)


@pytest.mark.parametrize("method", ["gradcam", "ablation"])
def test_a_view_says_method_target_cost_and_n(method: str) -> None:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")
    settings = core.AttributeSettings(method=method, images=2, image_size=32, device="cpu")
    folder = put_run(
        "attribute", facts={"layer": LAYER, "method": method, "plan_json": "", "trained": []}
    )
    core.write_attribution(
        *core.attribute(spec, data, LAYER, settings), folder / "attribution.json"
    )
    app = open_app()
    app.selectbox(key="strip_layer").set_value(LAYER).run()

    app.selectbox(key="carrying_method").set_value(method).run()

    assert_well(app)
    said = shown(app).replace("\\", "")
    (info,) = [info for info in METHODS if info.name == method]
    assert f"{info.captum} of Captum" in said
    assert "2 images" in said
    assert "half the squared norm" in said
    assert info.source in said


def test_bars_by_block_say_what_stood_in_and_what_the_plan_resets() -> None:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")
    settings = core.AttributeSettings(images=2, image_size=32, device="cpu")
    folder = put_run(
        "attribute",
        facts={"layer": "blocks", "method": "ablation", "plan_json": "", "trained": []},
    )
    plan = core.make_plan(core.outline_model(spec, classes=8), [LAYER])
    attribution, arrays = core.attribute(spec, data, "blocks", settings, plan=plan)
    core.write_attribution(attribution, arrays, folder / "attribution.json")
    app = open_app()
    app.selectbox(key="strip_layer").set_value(LAYER).run()

    app.selectbox(key="carrying_method").set_value("blocks").run()

    assert_well(app)
    assert attribution.reset is not None
    assert [share > 0 for share in attribution.reset].count(True) == 1
    said = shown(app).replace("\\", "")
    assert f"resets 1 block of {len(attribution.names)}" in said
    assert "residual blocks gave the input" in said


def test_groups_of_units_are_named() -> None:
    assert carrying._group(3, 1) == "unit 3"
    assert carrying._group(3, 4) == "units 12 to 15"


def test_a_damaged_view_is_a_sentence_and_the_plan_stays() -> None:
    folder = put_run(
        "attribute", facts={"layer": LAYER, "method": "auto", "plan_json": "", "trained": []}
    )
    (folder / "attribution.json").write_text('{"a":', encoding="utf-8")
    app = open_app()

    app.selectbox(key="strip_layer").set_value(LAYER).run()

    assert_well(app)
    assert "cannot be read as an attribution" in shown(app)
    assert app.button(key="carrying_start")


def test_another_plan_asks_for_another_look() -> None:
    outline = core.outline_model(core.resolve_model("tf_efficientnet_lite0"), classes=8)
    plans = (None, core.make_plan(outline, [LAYER]), core.make_plan(outline, ["conv_stem"]))

    facts = [
        store.AttributeWish(layer=LAYER, method="auto", plan=plan).facts["plan_json"]
        for plan in plans
    ]

    assert len(set(facts)) == 3
    assert words.RUN_TITLES["attribute"]
