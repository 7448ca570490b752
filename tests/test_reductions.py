"""Properties of the arithmetic that every figure goes through."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from core.load.models import ASSETS
from core.measure.kernels import Intervals, Limits, Want, unit_sums
from core.measure.shard import RowSample, SiteSums
from core.network.activations import (
    FUNCTIONS,
    SATURATION_EPS,
    Activation,
    activation_of,
    derivative,
    saturated_intervals,
)
from core.reductions import (
    FEWEST_EIGENVALUES,
    as_matrix,
    binary_entropy,
    dormant_fraction,
    dormant_score,
    effective_rank,
    isometry_distance,
    kurtosis,
    power_law_alpha,
    rank_for,
    singular_values,
    stable_rank,
    unit_axis,
)

ACTIVATIONS = (
    *(
        Activation(name)
        for name in (
            *("relu", "relu6", "selu", "gelu", "gelu_tanh", "silu", "mish"),
            *("hardswish", "hardsigmoid", "sigmoid", "tanh", "softsign"),
        )
    ),
    Activation("hardtanh", (-1.0, 1.0)),
    Activation("hardtanh", (0.0, 6.0)),
    Activation("hardtanh", (-2.0, 0.5)),
    Activation("leaky_relu", (0.01,)),
    Activation("leaky_relu", (0.005,)),
    Activation("leaky_relu", (-0.2,)),
    Activation("elu", (1.0,)),
    Activation("elu", (0.005,)),
    Activation("celu", (1.0,)),
    Activation("celu", (0.25,)),
)
PIECEWISE = frozenset({"relu", "relu6", "hardtanh", "leaky_relu", "hardsigmoid"})
# Where one of them bends.
KINKS = (-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 6.0, 20.0)


def named(activation: Activation) -> str:
    return " ".join([activation.name, *(f"{each:g}" for each in activation.settings)])


def inside(z: Tensor, intervals: Intervals) -> list[bool]:
    """Which of these values a read counts as inside: each is a unit of its own."""
    counts = unit_sums(z[None], 1, Want.POSITIVE | Want.INSIDE, Limits(intervals))[2]
    return (counts > 0).tolist()


# Saturated intervals.

anywhere = st.one_of(
    st.floats(-12.0, 12.0, width=32),
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from(KINKS),
    st.sampled_from([math.nextafter(kink, side) for kink in KINKS for side in (-9.0, 99.0)]),
)


@pytest.mark.parametrize("eps", [SATURATION_EPS, 0.2])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=named)
@given(values=st.lists(anywhere, min_size=1, max_size=40))
@example(values=list(KINKS))
@example(values=[step / 64 for step in range(-640, 641)])
def test_saturated_intervals_hold_exactly_the_z_with_a_small_derivative(
    activation: Activation, eps: float, values: list[float]
) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    intervals = saturated_intervals(activation, eps)
    # An end found by bisection is right to 1e-12, not to the last bit.
    clear = torch.ones_like(z, dtype=torch.bool)
    if activation.name not in PIECEWISE:
        for end in (each for interval in intervals for each in interval):
            clear &= (z - end).abs() > 1e-12

    found = torch.tensor(inside(z, intervals))

    assert found[clear].tolist() == (derivative(activation, z).abs() < eps)[clear].tolist()


@pytest.mark.parametrize(
    "activation", [each for each in ACTIVATIONS if each.name in PIECEWISE], ids=named
)
def test_kinks_are_counted_as_autograd_counts_them_in_float32(activation: Activation) -> None:
    z = torch.tensor(KINKS, dtype=torch.float32)

    found = inside(z, saturated_intervals(activation))

    assert found == (derivative(activation, z).abs() < SATURATION_EPS).tolist()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=named)
def test_saturated_intervals_are_sorted_and_apart(activation: Activation) -> None:
    ends = [end for interval in saturated_intervals(activation) for end in interval]

    assert ends == sorted(set(ends))


def test_every_activation_that_is_caught_has_its_intervals_checked_here() -> None:
    caught = {
        activation.name
        for function in FUNCTIONS
        if (activation := activation_of(function, (torch.zeros(1),), {})) is not None
    }

    # Softplus has settings of its own to be checked by.
    assert caught <= {activation.name for activation in ACTIVATIONS} | {"softplus"}


def test_softplus_is_saturated_where_its_sigmoid_is_small() -> None:
    (activation,) = {
        found
        for function in FUNCTIONS
        if (found := activation_of(function, (torch.zeros(1),), {})) is not None
        and found.name == "softplus"
    }

    ((low, high),) = saturated_intervals(activation)

    assert (low, high) == (-math.inf, pytest.approx(math.log(0.01 / 0.99), abs=1e-9))


@given(alpha=st.floats(0.05, 40.0))
@example(alpha=20.0)
def test_a_celu_of_any_width_has_its_tail(alpha: float) -> None:
    ((low, high),) = saturated_intervals(Activation("celu", (alpha,)))

    # Its slope is exp(z / alpha) below 0.
    assert (low, high) == (-math.inf, pytest.approx(alpha * math.log(SATURATION_EPS), rel=1e-9))


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1])
def test_an_eps_outside_its_range_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="must lie strictly between 0 and 1"):
        saturated_intervals(Activation("tanh"), eps)


def test_not_a_number_is_in_no_interval() -> None:
    z = torch.tensor([math.nan, -math.inf, math.inf])

    assert inside(z, ((-math.inf, math.inf),)) == [False, True, True]
    assert inside(z, ((-math.inf, 0.0), (1.0, math.inf))) == [False, True, True]


@pytest.mark.parametrize(
    ("activation", "rectifies", "bounds"),
    [
        (Activation("relu"), True, None),
        (Activation("relu6"), True, (0.0, 6.0)),
        (Activation("hardtanh", (0.0, 6.0)), True, (0.0, 6.0)),
        (Activation("hardtanh", (-1.0, 1.0)), False, (-1.0, 1.0)),
        (Activation("hardswish"), False, None),
        (Activation("sigmoid"), False, (0.0, 1.0)),
    ],
    ids=lambda value: named(value) if isinstance(value, Activation) else None,
)
def test_rectifiers_and_bounds(
    activation: Activation, rectifies: bool, bounds: tuple[float, float] | None
) -> None:
    assert (activation.rectifies, activation.bounds) == (rectifies, bounds)


# Dormant units.


@st.composite
def layers_with_silent_units(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Activations (rows, units) with some units silent, the others within a factor of ten."""
    units, rows = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    silent = draw(st.integers(0, units - 1))
    loud = st.floats(1.0, 10.0, width=32)
    values = draw(
        st.lists(
            st.lists(loud, min_size=units - silent, max_size=units - silent),
            min_size=rows,
            max_size=rows,
        )
    )
    return torch.cat([torch.zeros(rows, silent), torch.tensor(values)], dim=1), silent


def mean_abs(h: Tensor) -> Tensor:
    return unit_sums(h, 1, Want.ABSOLUTE)[0] / len(h)


@given(
    layer=layers_with_silent_units(),
    scale=st.floats(2.0**-60, 2.0**60),
    seed=st.integers(0, 2**32),
    tau=st.floats(0.0, 0.05),
)
def test_rescaling_a_layer_and_permuting_its_units_leaves_the_silenced_share(
    layer: tuple[Tensor, int], scale: float, seed: int, tau: float
) -> None:
    h, silent = layer
    order = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(seed))

    found = dormant_fraction(mean_abs((h * scale)[:, order]), tau=tau)

    assert found == silent / h.shape[1]


@given(layer=layers_with_silent_units())
def test_dormant_scores_average_to_one_and_agree_with_the_fraction(
    layer: tuple[Tensor, int],
) -> None:
    magnitude = mean_abs(layer[0])

    scores = dormant_score(magnitude)

    assert float(scores.mean()) == pytest.approx(1.0)
    assert dormant_fraction(magnitude, tau=0.025) == float((scores <= 0.025).double().mean())


@given(units=st.integers(1, 9), tau=st.floats(0.0, 0.99))
def test_a_silent_layer_is_wholly_dormant_and_scores_nothing(units: int, tau: float) -> None:
    silence = torch.zeros(units, dtype=torch.float64)

    assert dormant_fraction(silence, tau=tau) == 1.0
    assert dormant_score(silence).tolist() == [0.0] * units


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_unit_that_is_not_finite_makes_the_share_not_a_number(odd: float) -> None:
    assert math.isnan(dormant_fraction(torch.tensor([0.0, 1.0, odd]), tau=0.025))


@pytest.mark.parametrize(("units", "tau"), [(0, 0.025), (3, 1.0), (3, -0.1)])
def test_no_units_or_a_tau_outside_its_range_are_refused(units: int, tau: float) -> None:
    with pytest.raises(ValueError, match=r"need at least one unit and tau in \[0, 1\)"):
        dormant_fraction(torch.ones(units), tau=tau)


# Sums by unit.

INTERVALS = ((-math.inf, -2.0), (3.0, math.inf))


def sums_of(z: Tensor, axis: int) -> SiteSums:
    """Read z, its ReLU and a gradient as measuring does."""
    rows = z.numel() // z.shape[axis]
    sums = unit_sums(z.relu(), axis, Want.ABSOLUTE | Want.NEAR, Limits(near=1.0))
    sums += unit_sums(z, axis, Want.POSITIVE | Want.INSIDE, Limits(INTERVALS))
    gradient = unit_sums(z - 1, axis, Want.ABSOLUTE)[0]
    return SiteSums(rows, sums, rows, gradient, RowSample())


def merged(parts: list[SiteSums]) -> SiteSums:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    return whole


def fields(sums: SiteSums) -> dict[str, object]:
    absolute, positive, saturated, near, _ = sums.sums.tolist()
    return {
        "rows": sums.rows,
        "absolute": absolute,
        "positive": positive,
        "saturated": saturated,
        "near": near,
        "gradient_rows": sums.gradient_rows,
        "gradient": sums.gradient.tolist(),
    }


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    axis=st.sampled_from([1, 3]),
    cuts=st.lists(st.integers(0, 8), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_sums_merged_over_any_split_equal_one_pass(
    shape: tuple[int, ...], axis: int, cuts: list[int], seed: int
) -> None:
    # Whole numbers, whose sums are exact: any difference is a row lost or counted twice.
    z = torch.randint(-5, 6, shape, generator=torch.Generator().manual_seed(seed)).float()
    edges = [0, *sorted(min(cut, shape[0]) for cut in cuts), shape[0]]
    parts = [z[low:high] for low, high in pairwise(edges)]

    found = merged([sums_of(part, axis) for part in parts])

    assert fields(found) == fields(sums_of(z, axis))


@given(
    rows=st.integers(2, 40),
    cut=st.integers(1, 39),
    seed=st.integers(0, 2**32),
)
def test_sums_of_fractions_agree_to_the_rounding_of_float32(rows: int, cut: int, seed: int) -> None:
    assume(cut < rows)
    z = torch.randn((rows, 5), generator=torch.Generator().manual_seed(seed))
    one_pass = sums_of(z, 1)

    found = sums_of(z[:cut], 1).merged(sums_of(z[cut:], 1))

    # Forty terms, each rounded to 6e-8 of the running sum.
    torch.testing.assert_close(found.sums, one_pass.sums, rtol=40 * 6e-8, atol=0.0)
    torch.testing.assert_close(found.gradient, one_pass.gradient, rtol=40 * 6e-8, atol=0.0)


def test_sums_count_what_their_names_say() -> None:
    # Two samples of two units at two positions; the second sample is the mirror of the first.
    z = torch.tensor([[[-3.0, 1.0], [0.0, 4.0]]])
    z = torch.cat([z, -z])

    sums = sums_of(z, 1)

    assert fields(sums) == {
        "rows": 4,
        "absolute": [4.0, 4.0],
        "positive": [2.0, 1.0],
        "saturated": [2.0, 2.0],
        # Rectified: 0, 1, 3, 0 and 0, 4, 0, 0.
        "near": [3.0, 3.0],
        "gradient_rows": 4,
        "gradient": [4 + 0 + 2 + 2.0, 1 + 3 + 1 + 5.0],
    }


def test_the_distance_from_a_middle_is_summed() -> None:
    h = torch.tensor([[0.0, 6.0], [1.0, 3.0]])

    offset = unit_sums(h, 1, Want.ABSOLUTE | Want.NEAR | Want.OFFSET, Limits(middle=3.0))[4]

    assert offset.tolist() == [3 + 2.0, 3 + 0.0]


def test_a_value_that_is_not_a_number_counts_nowhere_and_shows_in_the_sums() -> None:
    everything = Limits(((-math.inf, math.inf),), near=1.0)
    want = Want.ABSOLUTE | Want.POSITIVE | Want.INSIDE | Want.NEAR | Want.OFFSET

    sums = unit_sums(torch.tensor([[math.nan, 0.5]]), 1, want, everything)

    assert sums[1:4].tolist() == [[0.0, 1.0]] * 3
    assert [math.isnan(each) for each in sums[[0, 4], 0].tolist()] == [True, True]


def test_small_terms_are_not_lost_beside_a_large_sum() -> None:
    # In float32 a million and a hundredth is a million: batches are summed in float64.
    parts = [sums_of(torch.tensor([[each]]), 1) for each in [1e6] + [1e-2] * 100]

    whole = merged(parts)

    assert float(whole.sums[0]) == pytest.approx(1e6 + 1.0, abs=1e-6)


def test_more_intervals_than_a_read_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="5 intervals; at most 4"):
        Limits(((0.0, 1.0),) * 5)


@pytest.mark.parametrize(
    ("kind", "shape", "units", "axis"),
    [
        ("conv", (2, 5, 3, 3), None, 1),
        ("conv", (2, 5, 9), 5, 1),
        ("conv", (2, 5), None, 1),
        ("linear", (2, 5), None, 1),
        ("linear", (2, 9, 5), 5, 2),
        # Turned round before the activation.
        ("conv", (2, 9, 5), 5, 2),
        ("linear", (2, 5, 9), 5, 1),
        # A gate took half of them; both axes fit; neither fits.
        ("linear", (2, 9, 5), 10, 2),
        ("conv", (2, 5, 5), 5, 1),
        ("conv", (2, 4, 9), 5, 1),
    ],
)
def test_units_are_channels_behind_convolutions_and_features_elsewhere(
    kind: str, shape: tuple[int, ...], units: int | None, axis: int
) -> None:
    assert unit_axis(kind, shape, units) == axis


# Entropy, ranks and kurtosis.


@given(p=st.floats(0.0, 1.0))
def test_entropy_lies_between_nothing_and_one_bit_and_is_symmetric(p: float) -> None:
    forth, back = binary_entropy(torch.tensor([p, 1 - p], dtype=torch.float64)).tolist()

    assert 0.0 <= forth <= 1.0 + 1e-15
    assert forth == pytest.approx(back, abs=1e-12)


@pytest.mark.parametrize(("p", "bits"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.25, 0.8112781)])
def test_entropy_of_known_shares(p: float, bits: float) -> None:
    assert float(binary_entropy(torch.tensor(p, dtype=torch.float64))) == pytest.approx(bits)


spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


@given(values=spectra, zeros=st.integers(0, 4))
def test_ranks_lie_between_one_and_the_number_of_directions_in_use(
    values: list[float], zeros: int
) -> None:
    s = torch.tensor([*values, *[0.0] * zeros], dtype=torch.float64)

    effective, stable = effective_rank(s), stable_rank(s)

    # Energy is more uneven than amplitude, so the stable rank never exceeds the effective one.
    assert 1.0 - 1e-9 <= stable <= effective + 1e-9 <= len(values) + 2e-9


@given(values=spectra, scale=st.floats(1e-6, 1e6))
def test_ranks_do_not_depend_on_scale_or_order(values: list[float], scale: float) -> None:
    s = torch.tensor(values, dtype=torch.float64)

    turned = s.flip(0) * scale

    assert effective_rank(turned) == pytest.approx(effective_rank(s), rel=1e-9)
    assert stable_rank(turned) == pytest.approx(stable_rank(s), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_equal_singular_values_give_their_number(rank: int) -> None:
    s = torch.tensor([2.5] * rank + [0.0] * 3)

    assert effective_rank(s) == pytest.approx(rank)
    assert stable_rank(s) == pytest.approx(rank)


def test_ranks_of_nothing_are_zero() -> None:
    assert (effective_rank(torch.zeros(3)), stable_rank(torch.zeros(3))) == (0.0, 0.0)


@given(values=spectra, share=st.floats(0.01, 1.0))
def test_as_many_directions_as_the_share_needs_and_no_more(
    values: list[float], share: float
) -> None:
    ordered = sorted(values, reverse=True)
    total = math.fsum(ordered)

    count = rank_for(torch.tensor(values, dtype=torch.float64), share=share)

    # Rounding of a dozen terms may tip a sum that meets the share exactly.
    assert math.fsum(ordered[:count]) >= share * total * (1 - 1e-11)
    assert math.fsum(ordered[: count - 1]) < share * total * (1 + 1e-11)


@pytest.mark.parametrize(
    ("values", "count"),
    [([1.0] * 100, 99), ([98.0, 1.0, 1.0], 2), ([5.0, 0.0, 0.0], 1), ([0.0, 0.0], 0)],
)
def test_directions_for_99_percent_of_known_spectra(values: list[float], count: int) -> None:
    assert rank_for(torch.tensor(values)) == count


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_singular_values_are_those_of_the_decomposition(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(
        (rows, columns), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    wanted = torch.linalg.svdvals(matrix)

    found = singular_values(matrix)

    # The root of a rounding of float64: 1e-8 of the largest.
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=3e-8 * float(wanted[0]))


@given(rows=st.integers(2, 6), columns=st.integers(2, 6), seed=st.integers(0, 2**32))
def test_distance_from_isometry_is_that_of_the_smaller_square(
    rows: int, columns: int, seed: int
) -> None:
    matrix = torch.randn(
        (rows, columns), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    square = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
    wanted = float(((square - torch.eye(len(square))) ** 2).sum()) / len(square)

    found = isometry_distance(singular_values(matrix), rows=rows, columns=columns)

    assert found == pytest.approx(wanted, rel=1e-9)


@given(scale=st.floats(1e-9, 1e9), seed=st.integers(0, 2**32))
def test_a_power_law_does_not_depend_on_scale_or_order(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(40, dtype=torch.float64, generator=generator) ** -0.8

    found = power_law_alpha(values.flip(0) * scale)

    assert found == pytest.approx(power_law_alpha(values), rel=1e-6)


def closest_tail(values: Tensor, *, shortest: int, both_edges: bool = True) -> float:
    """The exponent of the tail of so many values or more that lies closest to its law."""
    rising = sorted(values.tolist())
    best = (math.inf, math.nan)
    for start in range(len(rising) - shortest + 1):
        tail = torch.tensor(rising[start:], dtype=torch.float64)
        logs = (tail / tail[0]).log()
        alpha = 1 + len(tail) / float(logs.sum())
        law, lower = 1 - (-(alpha - 1) * logs).exp(), torch.arange(len(tail)) / len(tail)
        gaps = [law - lower, law - lower - 1 / len(tail)]
        distance = max(float(gap.abs().max()) for gap in gaps[: 2 if both_edges else 1])
        best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("count", [20, 40, 99, 100, 120, 200, 384])
@pytest.mark.parametrize("slope", [1.5, 3.0, 8.0])
def test_the_tail_of_a_power_law_is_a_tenth_of_the_values_and_ten_at_least(
    count: int, slope: float
) -> None:
    """A few values that follow a law, and below them a crowd that spoils every longer tail."""
    floor = max(10, count // 10)
    few = floor - 2
    law = -(1 - (torch.arange(few, dtype=torch.float64) + 0.5) / few).log() / (slope - 1)
    crowd = torch.linspace(-1e-3, 0, count - few, dtype=torch.float64)
    values = torch.cat([crowd, law]).exp()

    found = power_law_alpha(values)

    assert found == pytest.approx(closest_tail(values, shortest=floor), rel=1e-9)
    # Another floor gives another exponent, or this would show nothing.
    for other in (floor - 1, floor + 1, max(10, count // 8), max(10, count // 12)):
        if other != floor:
            assert abs(closest_tail(values, shortest=other) - found) > 0.01


@pytest.mark.parametrize(
    ("layer", "theirs"),
    [
        # What WeightWatcher 0.7.7 gives for layers of the embedded ViT.
        ("blocks.5.attn.proj", 12.945302746387073),
        ("blocks.3.attn.qkv", 4.803545795520561),
        ("blocks.10.mlp.fc2", 6.178256059430337),
        ("blocks.0.mlp.fc1", 4.028236079430525),
    ],
)
def test_without_the_two_named_differences_the_exponent_is_weightwatchers(
    layer: str, theirs: float
) -> None:
    with safe_open(ASSETS / "weights" / "vit_small_patch14_dinov2.fp16.safetensors", "pt") as file:
        eigenvalues = singular_values(file.get_tensor(f"{layer}.weight")) ** 2

    assert closest_tail(eigenvalues, shortest=2, both_edges=False) == pytest.approx(theirs)
    ours = closest_tail(eigenvalues, shortest=len(eigenvalues) // 10)
    assert power_law_alpha(eigenvalues) == pytest.approx(ours, rel=1e-9)
    assert abs(ours - theirs) > 0.05


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(1, 2, FEWEST_EIGENVALUES - 1),
        torch.cat([torch.linspace(1, 2, FEWEST_EIGENVALUES - 1), torch.zeros(30)]),
        torch.full((40,), 3.0),
        torch.zeros(40),
        torch.zeros(0),
    ],
    ids=["too few", "too few that are not 0", "all equal", "all 0", "none"],
)
def test_too_few_or_equal_eigenvalues_have_no_power_law(values: Tensor) -> None:
    assert math.isnan(power_law_alpha(values))


@given(
    values=st.lists(st.floats(-100.0, 100.0, width=32), min_size=2, max_size=20),
    scale=st.sampled_from([0.125, 3.0, 1024.0]),
    shift=st.sampled_from([-4.0, 0.0, 16.0]),
)
def test_kurtosis_depends_on_neither_scale_nor_place_and_has_its_lower_bound(
    values: list[float], scale: float, shift: float
) -> None:
    entries = torch.tensor(values, dtype=torch.float64)
    assume(float(entries.std()) > 1e-2)

    found = kurtosis(entries)

    assert found >= -2.0 - 1e-9
    assert kurtosis(entries * scale + shift) == pytest.approx(found, rel=1e-6, abs=1e-6)


def test_kurtosis_of_known_sets() -> None:
    assert kurtosis(torch.tensor([-1.0, 1.0])) == pytest.approx(-2.0)
    # One entry in nine stands out: (1/9)(8/9)((8/9)^3 + (1/9)^3) / ((1/9)(8/9))^2 - 3.
    assert kurtosis(torch.tensor([1.0] + [0.0] * 8)) == pytest.approx(4.125)


@given(value=st.floats(-1e6, 1e6, width=32), count=st.integers(1, 50))
def test_equal_entries_have_no_kurtosis(value: float, count: int) -> None:
    assert math.isnan(kurtosis(torch.full((count,), value)))


def test_a_weight_becomes_outputs_by_inputs() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)

    assert as_matrix(weight)[1].tolist() == [float(each) for each in range(12, 24)]
    assert as_matrix(torch.zeros(5)).shape == (5, 1)
