"""An open layer: saturation seen, by unit and class, weights, gradients, attention."""

from __future__ import annotations

import numpy as np
import pytest

import core
from core.records import LayerReport
from dashboard import store, words
from dashboard.parts import saturation
from tests.pages import assert_well, open_app, shown, space

pytestmark = pytest.mark.usefixtures("fresh_queue")

LAYER = "blocks.3.1.conv_pw"


def opened() -> LayerReport:
    layer = example().diagnosis.layer(LAYER)
    assert layer is not None
    return layer


def example() -> store.Stored:
    path = store.example.example_path(space().choice)
    assert path is not None
    return store.Stored(run_id="", path=path, diagnosis=core.read_diagnosis(path))


def test_the_share_in_words_is_the_figure_in_the_table() -> None:
    app = open_app()

    app.selectbox(key="strip_layer").set_value(LAYER).run()

    assert_well(app)
    value = opened().metrics["saturated_fraction"].value
    twin = opened().twin_metrics["saturated_fraction"].value
    said = shown(app).replace("\\", "")
    assert f"{words.share(value)} of the inputs of relu6" in said
    assert f"in the fresh twin {words.share(twin)}" in said


def test_a_unit_shows_its_own_share_and_the_images_that_drive_it() -> None:
    app = open_app()
    app.selectbox(key="strip_layer").set_value(LAYER).run()

    app.number_input(key="layer_unit").set_value(7).run()

    assert_well(app)
    by_unit = store.units_of(example())[LAYER]["unit_saturated_fraction"][0]
    said = shown(app).replace("\\", "")
    assert f"{words.share(float(by_unit[7]))} of the inputs of unit 7" in said
    assert "Drive it most" in said


def test_an_older_measurement_says_that_nobody_looked_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dashboard.store.inside_of", lambda stored: {})
    app = open_app()

    app.selectbox(key="strip_layer").set_value(LAYER).run()

    assert_well(app)
    assert saturation.NOT_LOOKED in shown(app).replace("\\", "")


def test_attention_lies_on_the_grid_of_patches_without_class_tokens() -> None:
    weights = np.arange(2 * 3 * 17, dtype=np.float32).reshape(2, 3, 17)

    grids = saturation._grids(weights)

    assert grids is not None
    assert grids.shape == (2, 3, 4, 4)
    assert grids[0, 0, 0, 0] == weights[0, 0, 1]
