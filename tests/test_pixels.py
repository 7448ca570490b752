"""Stored pixels become inputs by the one formula, colour by colour."""

from __future__ import annotations

import pytest
import torch

from core.pixels import normalised


def test_pixels_are_scaled_and_standardised_by_colour() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 1, 2)

    inputs = normalised(pixels, mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0))

    assert inputs.shape == (2, 3, 1, 2)
    assert inputs.dtype == torch.float32
    assert inputs[1, :, 0, 1].tolist() == pytest.approx([-1.0, 0.0, 0.5])


def test_every_stored_value_has_an_input_of_its_own_in_order() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)

    inputs = normalised(pixels, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    steps = inputs.flatten(2).diff(dim=2)
    assert (steps > 0).all()
    # Inputs of about 2 are rounded to 1e-7, which is 1e-5 of a step.
    for channel, spread in enumerate((0.229, 0.224, 0.225)):
        assert steps[0, channel].tolist() == pytest.approx([1 / 255 / spread] * 255, rel=1e-4)
