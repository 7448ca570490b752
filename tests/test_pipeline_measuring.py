"""How a measurement is cut into batches, and what it says where that leaves no interval."""

from __future__ import annotations

import pytest

import core
from core.pipeline.measuring import FEWEST_BATCHES, MeasureSettings, batch_size_for

SPEC = core.resolve_model("timm:test_resnet", weights="none")
DATA = core.resolve_data("bloodmnist")


@pytest.mark.parametrize("images", [*range(2, 200), 1000, 10_001])
def test_no_image_is_left_alone_and_four_batches_are_taken_where_there_are_enough(
    images: int,
) -> None:
    size = batch_size_for(images)

    assert 2 <= size <= max(33, images)
    assert images % size != 1
    if images >= 12:
        assert -(-images // size) >= FEWEST_BATCHES - 1


def test_so_few_images_as_one_batch_once_took_have_intervals() -> None:
    found, _ = core.diagnose(SPEC, DATA, MeasureSettings(samples=32, image_size=32, device="cpu"))

    assert (found.header.batches, found.header.batch_size) == (4, 8)
    assert found.layers[0].ratio_intervals
    assert not any("One batch" in note for note in found.header.notes)


def test_one_batch_says_that_nothing_can_be_told_from_noise() -> None:
    settings = MeasureSettings(samples=8, batch_size=8, image_size=32, device="cpu")

    found, _ = core.diagnose(SPEC, DATA, settings)

    assert not any(layer.ratio_intervals for layer in found.layers)
    assert any(
        note.startswith("One batch: no figure has an interval") for note in found.header.notes
    )
