"""FIRE, DASH, and shrink and perturb by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.catalogue.schemes import list_schemes, scheme_numbers
from core.edit.draws import Request, dash_factors, draw, newton_schulz
from core.errors import PlanError, Remedy
from core.plan.making import make_plan
from tests.zoo import ZOO


def asked(old: Tensor, fresh: Tensor | None = None, **numbers: float) -> Request:
    return Request(
        old=old,
        fresh=torch.zeros_like(old) if fresh is None else fresh,
        generator=torch.Generator().manual_seed(0),
        numbers=numbers,
    )


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (200, 64)])
def test_fire_gives_an_isometry_on_square_and_tall_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    found = newton_schulz(matrix, 30)

    # The columns are orthonormal to the rounding of thirty products in float64.
    assert torch.allclose(found.T @ found, torch.eye(shape[1]).double(), atol=1e-10)
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(found, u @ v, atol=1e-8)  # of all isometries the nearest


def test_fire_at_its_default_of_ten_steps_is_close_on_a_real_spread_of_singular_values() -> None:
    matrix = torch.eye(64) + 0.05 * torch.randn(
        (64, 64), generator=torch.Generator().manual_seed(2)
    )

    found = draw("fire", asked(matrix, **scheme_numbers("fire", {}))).double()

    assert torch.allclose(found.T @ found, torch.eye(64).double(), atol=1e-3)


def test_fire_on_a_wide_matrix_keeps_rows_orthonormal() -> None:
    matrix = torch.randn((8, 40), generator=torch.Generator().manual_seed(3))

    found = newton_schulz(matrix, 30)

    assert torch.allclose(found @ found.T, torch.eye(8).double(), atol=1e-10)


def test_fire_scales_by_shape_and_treats_each_place_of_a_kernel_alone() -> None:
    kernel = torch.randn((32, 8, 3, 3), generator=torch.Generator().manual_seed(4))

    found = draw("fire", asked(kernel, steps=30, scale=1)).double()

    scale = math.sqrt(32 / 8) / 9
    for place in found.flatten(2).unbind(2):
        assert torch.allclose(place.T @ place, scale**2 * torch.eye(8).double(), atol=1e-6)
    bare = draw("fire", asked(kernel, steps=30, scale=0)).double()
    assert torch.allclose(scale * bare, found, atol=1e-6)


def test_fire_resets_the_running_statistics_of_the_norm_that_reads_it_and_says_so() -> None:
    (info,) = (each for each in list_schemes() if each.name == "fire")
    outline = ZOO["residual_cnn"].outline()

    plan = make_plan(outline, ["stem"], scheme="fire", resets_buffers=info.resets_buffers)

    buffers = {name for target in plan.targets for name in target.buffers}
    assert {"norm.running_mean", "norm.running_var"} <= buffers
    assert "Running statistics of a norm that reads the layer's output" in info.description


def test_fire_leaves_vectors_and_zero_matrices_alone() -> None:
    vector = torch.arange(4.0)

    assert torch.equal(draw("fire", asked(vector, steps=10, scale=1)), vector)
    assert not draw("fire", asked(torch.zeros(3, 3), steps=10, scale=1)).any()


def test_dash_clips_the_cosine_from_below() -> None:
    # Rows along, across, against and at sixty degrees to their direction.
    weight = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    direction = torch.tensor([[5.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [1.0, math.sqrt(3)]])

    found = dash_factors(weight, direction, 0.3)

    assert torch.allclose(found, torch.tensor([1.0, 0.3, 0.3, 0.5]), atol=1e-6)


def test_dash_looks_at_each_kernel_of_a_convolution_and_at_a_bias_as_a_whole() -> None:
    weight = torch.ones(2, 3, 2, 2)
    direction = torch.ones(2, 3, 2, 2)
    direction[1, 2] = -1

    found = dash_factors(weight, direction, 0.1)

    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(0.1)
    assert (found.flatten()[:5] == 1).all()
    assert dash_factors(torch.ones(4), -torch.ones(4), 0.2).tolist() == pytest.approx(0.2)


def test_dash_is_refused_where_a_kernel_is_one_number() -> None:
    with pytest.raises(PlanError, match="Leave 1x1 convolutions out"):
        dash_factors(torch.ones(4, 3, 1, 1), torch.ones(4, 3, 1, 1), 0.3)


def test_dash_without_gradients_says_where_they_come_from() -> None:
    with pytest.raises(PlanError, match="DASH needs gradients") as caught:
        draw("dash", asked(torch.ones(2, 2)))

    assert caught.value.remedy is Remedy.PLAN_WITH_IMAGES


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    shrink=st.floats(-2, 2),
    perturb=st.floats(-2, 2),
)
def test_shrink_and_perturb_is_linear_and_the_identity_at_one_and_nothing(
    values: list[float], shrink: float, perturb: float
) -> None:
    old = torch.tensor(values)
    fresh = old.flip(0)

    same = draw("shrink-perturb", asked(old, fresh, shrink=1.0, perturb=0.0))
    made = draw("shrink-perturb", asked(old, fresh, shrink=shrink, perturb=perturb))

    assert torch.equal(same, old)
    truth = shrink * old.double() + perturb * fresh.double()
    assert torch.allclose(
        made.double(), truth, rtol=1e-5, atol=1e-5 * float(old.abs().max() + 1e-9)
    )
