"""The fast measurement against the slow truth, and against what can be said without either."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.catalogue.metrics import list_metrics, metric_names
from core.errors import DataError, ModelError
from core.measure import Measured, figures_of, gauging, measure_network
from core.measure.figures import RANKS, WIDEST_SPECTRUM, _weight_figures
from tests.reference import FORWARDS, Truth, truth
from tests.zoo import BATCH_SIZE, BATCHES, CLASSES, ZOO, outline_of

# The network runs in float32 (rounding 6e-8 an operation) and some hundred roundings lie between
# a pixel and a gradient; where they cancel, the relative error of what is left grows tenfold.
FLOAT32 = 1e-5
# These count rows, units or entries. No case has a value near the edge at which a count jumps,
# so only the division and the float32 of a stored array are left.
COUNTED = 1e-7
COUNTS = frozenset(
    {
        "saturated_fraction",
        "dead_fraction",
        "rarely_active_fraction",
        "dormant_fraction",
        "near_zero_output_fraction",
        "activation_srank",
        "grad_zero_fraction",
        "grad_dormant_fraction",
        "sign_entropy",
        "near_zero_fraction",
        "unit_saturated_fraction",
    }
)
# Those that need no pass of their own.
LAYER_METRICS = tuple(
    metric.name
    for metric in list_metrics()
    if metric.level == "layer" and metric.family != "transfer"
)
# Moments of the weights themselves from one read: sums over a few hundred float32 values at a
# time, added in float64.
WEIGHTS = frozenset({"weight_l2", "weight_mean", "weight_std", "weight_kurtosis"})
# Also in float64, through the eigenvalues of the weight's square: 1e-8 of the largest singular
# value each.
SPECTRA = frozenset({"stable_rank", "effective_rank", "isometry_distance", "power_law_alpha"})
# ||g||^4 over a squared norm: the error of a gradient's norm up to six times.
SIXFOLD = frozenset({"optimization_readiness"})
# What the spread between batches is part of, and so how the samples were cut into them.
BETWEEN_BATCHES = frozenset({"grad_snr", "optimization_readiness"})


def tolerance(metric: str) -> float:
    if metric in WEIGHTS:
        return 1e-6
    if metric in SPECTRA:
        return 1e-7
    if metric in SIXFOLD:
        return 6 * FLOAT32
    return COUNTED if metric in COUNTS else FLOAT32


@cache
def expected(case: str) -> Truth:
    network = ZOO[case]
    return truth(network.module(), network.batches(), FORWARDS[case], network.order)


@cache
def measured(case: str) -> Measured:
    network = ZOO[case]
    return measure_network(network.module(), network.batches(), network.outline().layers)


@pytest.mark.parametrize("case", ZOO)
def test_no_case_puts_a_value_on_the_edge_at_which_a_count_jumps(case: str) -> None:
    # Ten times what float32 moves a value by on its way.
    assert expected(case).edge_distance >= 1e-5


@pytest.mark.parametrize("case", ZOO)
@pytest.mark.parametrize("metric", LAYER_METRICS)
def test_layer_metric_equals_the_reference(metric: str, case: str) -> None:
    truths = expected(case).metrics
    wanted = {name: figures[metric][0] for name, figures in truths.items()}
    # A mean near 0 is as uncertain as the entries are wide.
    spread = {
        name: (figures["weight_std"][0] or 0.0) * (metric == "weight_mean")
        for name, figures in truths.items()
    }

    found = {name: figures[metric].value for name, figures in measured(case).metrics.items()}

    assert found == {
        name: None
        if value is None
        else pytest.approx(
            value, rel=tolerance(metric), abs=max(1e-12, tolerance(metric) * spread[name])
        )
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("case", ZOO)
@pytest.mark.parametrize("metric", metric_names("unit"))
def test_unit_metric_equals_the_reference(metric: str, case: str) -> None:
    wanted = {name: units.get(metric) for name, units in expected(case).units.items()}

    found = {name: units.get(metric) for name, units in measured(case).units.items()}

    for name, values in wanted.items():
        if values is None:
            assert found[name] is None, name
        else:
            # Stored as float32; a small unit's error is that of the sums of its large siblings.
            loose = max(tolerance(metric), COUNTED) * float(np.abs(values).max())
            assert found[name] is not None, name
            assert found[name].dtype == np.float32
            assert found[name].shape == values.shape, name
            np.testing.assert_allclose(found[name], values, rtol=FLOAT32, atol=loose)


@pytest.mark.parametrize("case", ZOO)
def test_every_figure_says_how_many_it_was_computed_over(case: str) -> None:
    wanted = {
        (name, metric): count
        for name, figures in expected(case).metrics.items()
        for metric, (_, count) in figures.items()
    }

    found = {
        (name, metric): figure.n
        for name, figures in measured(case).metrics.items()
        for metric, figure in figures.items()
    }

    assert found == wanted


@pytest.mark.parametrize("case", ZOO)
def test_loss_is_the_mean_over_all_samples(case: str) -> None:
    found = measured(case)

    assert found.loss == pytest.approx(expected(case).loss, rel=FLOAT32)
    assert (found.samples, found.batches) == (BATCHES * BATCH_SIZE, BATCHES)


@pytest.mark.parametrize("case", ZOO)
def test_each_layer_has_exactly_the_metrics_of_the_registry(case: str) -> None:
    names = set(LAYER_METRICS)

    odd = {
        layer: set(figures) ^ names
        for layer, figures in measured(case).metrics.items()
        if set(figures) != names
    }

    assert odd == {}


def test_the_zoo_yields_exactly_the_unit_metrics_of_the_registry() -> None:
    yielded = {
        metric for case in ZOO for units in measured(case).units.values() for metric in units
    }

    assert yielded == set(metric_names("unit"))


@pytest.mark.parametrize("metric", LAYER_METRICS)
def test_the_zoo_gives_every_metric_more_than_one_value(metric: str) -> None:
    # Otherwise the comparison with the reference would hold for a constant.
    values = {
        round(figures[metric].value, 9)
        for case in ZOO
        for figures in measured(case).metrics.values()
        if figures[metric].value is not None
    }

    assert len(values) > 1


@pytest.mark.parametrize("case", ZOO)
def test_a_figure_is_missing_exactly_when_it_says_why(case: str) -> None:
    odd = [
        (layer, metric, figure)
        for layer, figures in measured(case).metrics.items()
        for metric, figure in figures.items()
        if (figure.value is None) != bool(figure.reason)
    ]

    assert odd == []


@pytest.mark.parametrize(
    ("case", "layer", "metric", "reason"),
    [
        ("frozen", "third", "grad_l2", "the layer is frozen: it gets no gradient"),
        ("frozen", "first", "unit_grad_mean_abs_mean", "no gradient flows through this activation"),
        ("vit", "cls_token", "stable_rank", "the weight is a vector: it has no rank"),
        (
            "vit",
            "head",
            "saturated_fraction",
            "the layer feeds no activation function to which its units can be followed",
        ),
        ("tied", "left", "dead_fraction", "only a rectifier can hold a unit at exactly 0"),
        ("residual_cnn", "norm", "weight_kurtosis", "all entries are equal"),
    ],
)
def test_a_metric_that_does_not_apply_says_why(
    case: str, layer: str, metric: str, reason: str
) -> None:
    assert measured(case).metrics[layer][metric].reason == reason


@pytest.mark.parametrize("case", ZOO)
def test_the_units_counted_are_those_of_the_activation_or_of_the_weight(case: str) -> None:
    wanted = {
        layer: len(units["unit_mean_abs" if "unit_mean_abs" in units else "unit_weight_l2"])
        for layer, units in expected(case).units.items()
        if units.keys() & {"unit_mean_abs", "unit_weight_l2"}
    }

    assert measured(case).unit_counts == wanted


# What depends on how the samples were cut into batches, and what must not.


def cut(
    batches: list[tuple[Tensor, Tensor]], sizes: tuple[int, ...]
) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.cat([each for each, _ in batches]).split(sizes)
    labels = torch.cat([each for _, each in batches]).split(sizes)
    return list(zip(inputs, labels, strict=True))


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (7, 1), (1,) * 8])
@pytest.mark.parametrize("case", ["vit", "functional", "frozen", "tied"])
def test_figures_do_not_depend_on_the_batch_size_without_a_norm_over_the_batch(
    case: str, sizes: tuple[int, ...]
) -> None:
    network = ZOO[case]
    whole = measured(case)

    found = measure_network(
        network.module(), cut(network.batches(), sizes), network.outline().layers
    )

    for layer, figures in whole.metrics.items():
        for metric, figure in figures.items():
            if metric not in BETWEEN_BATCHES and figure.value is not None:
                assert found.metrics[layer][metric].value == pytest.approx(
                    figure.value, rel=FLOAT32, abs=1e-9
                ), (layer, metric)


@pytest.mark.parametrize("case", ["tied", "vit"])
def test_gradient_signal_to_noise_weighs_batches_by_their_samples(
    case: str,
) -> None:
    network = ZOO[case]
    batches = cut(network.batches(), (5, 2, 1))
    wanted = truth(network.module(), batches, FORWARDS[case], network.order).metrics

    found = measure_network(network.module(), batches, network.outline().layers).metrics

    assert {layer: figures["grad_snr"].value for layer, figures in found.items()} == {
        layer: pytest.approx(figures["grad_snr"][0], rel=1e-3) for layer, figures in wanted.items()
    }


def test_gradient_signal_to_noise_is_missing_when_every_batch_is_the_same() -> None:
    network = ZOO["vit"]
    batch = network.batches()[0]

    found = measure_network(network.module(), [batch, batch, batch], network.outline().layers)

    assert {figures["grad_snr"].reason for figures in found.metrics.values()} == {
        "the gradient is the same in every batch"
    }


def test_one_batch_gives_no_signal_to_noise() -> None:
    network = ZOO["vit"]

    found = measure_network(network.module(), network.batches()[:1], network.outline().layers)

    assert found.metrics["head"]["grad_snr"].reason == "needs two batches or more"


@pytest.mark.parametrize("case", ["residual_cnn", "depthwise"])
def test_the_memory_format_changes_no_figure(case: str) -> None:
    network = ZOO[case]
    module = network.module().to(memory_format=torch.channels_last)
    batches = [
        (inputs.contiguous(memory_format=torch.channels_last), labels)
        for inputs, labels in network.batches()
    ]

    found = measure_network(module, batches, network.outline().layers)

    for layer, figures in measured(case).metrics.items():
        for metric, figure in figures.items():
            if figure.value is not None:
                assert found.metrics[layer][metric].value == pytest.approx(
                    figure.value, rel=10 * FLOAT32, abs=1e-7
                ), (layer, metric)


def test_two_measurements_give_the_same_bits() -> None:
    network = ZOO["depthwise"]

    again = measure_network(network.module(), network.batches(), network.outline().layers)

    assert again.metrics == measured("depthwise").metrics


# Autocast keeps 8 bits (bfloat16) or 11 (float16) of each product; a count moves by the values
# that then lie on the other side of its edge.
MIXED = {torch.bfloat16: 0.1, torch.float16: 0.02}


@pytest.mark.parametrize("dtype", MIXED, ids=str)
@pytest.mark.parametrize("case", ["residual_cnn", "depthwise", "vit", "swiglu", "multi_head"])
def test_mixed_precision_finds_what_float32_finds(case: str, dtype: torch.dtype) -> None:
    network = ZOO[case]
    module = network.module()

    with gauging(module, network.outline().layers, dtype=dtype) as gauge:
        for i, (inputs, labels) in enumerate(network.batches()):
            gauge.add(inputs, labels, first=i * len(inputs))
    found = figures_of(gauge.summed)

    assert found.loss == pytest.approx(expected(case).loss, rel=MIXED[dtype])
    for layer, figures in measured(case).metrics.items():
        for metric in ("grad_l2", "grad_mean_abs", "weight_grad_mean_abs", "activation_mean_abs"):
            value = figures[metric].value
            # Gradients that the loss was scaled for have been scaled back.
            assert found.metrics[layer][metric].value == (
                None if value is None else pytest.approx(value, rel=3 * MIXED[dtype])
            ), (layer, metric)
        share = figures["saturated_fraction"].value
        if share is not None:
            assert found.metrics[layer]["saturated_fraction"].value == pytest.approx(
                share, abs=MIXED[dtype]
            )


def test_a_float16_gradient_too_small_for_float16_is_still_measured() -> None:
    # Gradients of 1e-8: without scaling the loss float16 would show them as 0.
    module = Probe(nn.Tanh(), 3)
    with torch.no_grad():
        module.head.weight *= 1e-4
    rows = torch.tensor([[5e-4, 1e-3, -1e-3], [1e-4, 2e-4, 3e-4]])
    batch = (rows.reshape(2, 3, 1, 1), torch.arange(2))
    layers = outline_of(module, size=1).layers

    found = {}
    for dtype in (torch.float32, torch.float16):
        with gauging(module, layers, dtype=dtype) as gauge:
            gauge.add(*batch, first=0)
        found[dtype] = figures_of(gauge.summed).metrics["probe"]["grad_l2"].value

    assert found[torch.float32] < 1e-7
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.02)


class NormAfterAddition(nn.Module):
    """A norm that feeds its activation itself, with its channels on axis 1 or last."""

    def __init__(self, norm: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = norm
        self.act = nn.ReLU()
        self.head = nn.Linear(6, CLASSES)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * 2
        x = x.permute(0, 2, 3, 1) if self.channels_last else x
        return self.head(self.act(self.norm(x)).mean((1, 2) if self.channels_last else (2, 3)))


@pytest.mark.parametrize(
    ("norm", "channels_last"),
    [
        (nn.BatchNorm2d(6), False),
        (nn.InstanceNorm2d(6, affine=True), False),
        (nn.GroupNorm(2, 6), False),
        (nn.LayerNorm(6), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_units_behind_a_norm_are_its_channels(norm: nn.Module, channels_last: bool) -> None:
    module = NormAfterAddition(norm, channels_last=channels_last)
    batch = (torch.randn(2, 3, 7, 7), torch.tensor([0, 1]))

    found = measure_network(module, [batch], outline_of(module, size=7).layers)

    assert found.unit_counts["norm"] == 6
    assert found.metrics["norm"]["saturated_fraction"].n == 2 * 5 * 5


# Closed forms: the pre-activations are the pixels themselves.


class Probe(nn.Module):
    """Hands its pixels to an activation through an identity matrix."""

    def __init__(self, activation: nn.Module, units: int) -> None:
        super().__init__()
        self.probe = nn.Linear(units, units)
        self.act = activation
        self.head = nn.Linear(units, CLASSES)
        nn.init.eye_(self.probe.weight)
        nn.init.zeros_(self.probe.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.probe(x.flatten(1))))


def probed(module: nn.Module, rows: list[tuple[float, ...]]) -> Measured:
    """Measure on rows of pre-activations, in one batch."""
    units = len(rows[0])
    inputs = torch.tensor(rows).reshape(len(rows), 3, 1, units // 3)
    labels = torch.arange(len(rows)) % CLASSES
    # The outline is taken on square images, and three values make one of a single pixel.
    layers = outline_of(module, size=math.isqrt(units // 3)).layers
    return measure_network(module, [(inputs, labels)], layers)


@pytest.mark.parametrize(
    ("activation", "flat", "steep"),
    [
        # sech^2 z < 0.01 beyond arcosh 10 = 2.993.
        (nn.Tanh(), (2.994, -2.994, 40.0), (2.992, -2.992, 0.0)),
        # s (1 - s) < 0.01 beyond log((1 + sqrt 0.96) / (1 - sqrt 0.96)) = 4.585.
        (nn.Sigmoid(), (4.586, -4.586, 60.0), (4.584, -4.584, 0.0)),
        # Phi(z) + z phi(z): the lower tail, the minimum at -0.7518, and beyond it all of z.
        (nn.GELU(), (-3.07, -30.0, -0.7518), (-3.06, -0.72, -0.79)),
        (nn.GELU(), (-5.0, -0.76, -0.74), (0.0, 5.0, 50.0)),
        (nn.ReLU(), (0.0, -1e-6, -5.0), (1e-6, 1.0, 70.0)),
        (nn.ReLU6(), (0.0, 6.0, 7.0), (1e-6, 5.999999, 3.0)),
        (nn.Hardswish(), (-3.001, -1.5, -50.0), (-2.999, 3.001, 0.0)),
        (nn.LeakyReLU(0.2), (), (-1.0, 0.0, 1.0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_saturated_fraction_of_known_pre_activations(
    activation: nn.Module, flat: tuple[float, ...], steep: tuple[float, ...]
) -> None:
    rows = [each for each in (flat, steep) if each]

    found = probed(Probe(activation, 3), rows)

    share = len(flat) / (len(flat) + len(steep))
    assert found.metrics["probe"]["saturated_fraction"].value == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("spread", [1.0, 2.0, 5.0])
def test_tanh_of_a_normal_is_saturated_as_its_tails_say(spread: float) -> None:
    rows, units = 2048, 48
    draw = torch.Generator().manual_seed(7)
    z = spread * torch.randn((rows, units), generator=draw)

    found = probed(Probe(nn.Tanh(), units), [tuple(row) for row in z.tolist()])

    # 2 (1 - Phi(arcosh(10) / s)), within five standard errors of so many draws.
    share = math.erfc(math.acosh(10) / spread / math.sqrt(2))
    error = math.sqrt(share * (1 - share) / (rows * units))
    value = found.metrics["probe"]["saturated_fraction"].value
    assert value == pytest.approx(share, abs=5 * error)
    beyond = float((z.abs() > math.acosh(10)).double().mean())
    assert value == pytest.approx(beyond, abs=1 / (rows * units))


class Gated(nn.Module):
    """A squeeze-excitation whose gates are planted: so many shut, so many wide open."""

    def __init__(self, shut: int, wide_open: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.gate = nn.Conv2d(16, 16, 1)
        self.sigmoid = nn.Sigmoid()
        self.head = nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.gate.weight *= 0.01
            self.gate.bias.zero_()
            self.gate.bias[:shut] = -20.0
            self.gate.bias[shut : shut + wide_open] = 20.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("shut", "wide_open"), [(0, 0), (5, 0), (3, 4), (8, 8)])
def test_planted_saturated_gates_are_found(shut: int, wide_open: int) -> None:
    module = Gated(shut, wide_open)
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4) % CLASSES)

    found = measure_network(module, [batch], outline_of(module, size=8).layers)

    figures = found.metrics["gate"]
    assert figures["saturated_fraction"].value == (shut + wide_open) / 16
    # Of a span of 1 about 1/2 a saturated gate is off by half of it: rho_B counts it as 1.
    assert figures["rho_b"].value == pytest.approx((shut + wide_open) / 16, abs=0.02)
    assert [bool(share) for share in found.units["gate"]["unit_saturated_fraction"]] == [
        *([True] * (shut + wide_open)),
        *([False] * (16 - shut - wide_open)),
    ]


def test_a_softplus_is_judged_by_its_own_steepness() -> None:
    # Its slope is the sigmoid of beta z: at beta 5 below 0.01 from z = -0.919 down.
    found = probed(Probe(nn.Softplus(beta=5.0), 3), [(-0.93, -2.0, -4.0), (-0.91, 0.0, 1.0)])

    assert found.metrics["probe"]["saturated_fraction"].value == pytest.approx(0.5, abs=1e-12)


def test_planted_dead_and_dormant_units_are_found() -> None:
    dead, faint, loud = -1.0, 0.001, 1.0

    found = probed(Probe(nn.ReLU(), 3), [(dead, faint, loud), (2 * dead, faint, loud)])

    figures = found.metrics["probe"]
    assert figures["dead_fraction"].value == pytest.approx(1 / 3)
    assert figures["dormant_fraction"].value == pytest.approx(2 / 3)
    assert figures["activation_mean_abs"].value == pytest.approx(1.001 / 3)
    np.testing.assert_allclose(
        found.units["probe"]["unit_dormant_score"],
        np.array([0.0, 0.003, 3.0]) / 1.001,
        rtol=1e-6,  # float32 of the stored array
    )


def test_a_unit_that_fires_on_a_single_sample_is_not_dead() -> None:
    rows = [(-1.0, 1.0, 1.0)] * 5 + [(1e-6, 1.0, 1.0)]

    found = probed(Probe(nn.ReLU(), 3), rows)

    assert found.metrics["probe"]["dead_fraction"].value == 0.0


def test_sign_entropy_is_one_bit_for_a_unit_that_is_on_half_of_the_time() -> None:
    found = probed(Probe(nn.ReLU(), 3), [(1.0, 1.0, -1.0), (-1.0, 1.0, -1.0)])

    assert found.metrics["probe"]["sign_entropy"].value == pytest.approx(1 / 3, abs=1e-12)


def test_a_wholly_silent_layer_is_wholly_dead_and_dormant() -> None:
    found = probed(Probe(nn.ReLU(), 3), [(-1.0, -2.0, -3.0)] * 2)

    figures = found.metrics["probe"]
    assert [figures[name].value for name in ("dead_fraction", "dormant_fraction")] == [1.0, 1.0]
    assert found.units["probe"]["unit_dormant_score"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
def test_ranks_of_a_weight_whose_rank_is_known(rank: int) -> None:
    left = torch.linalg.qr(torch.randn(12, 12)).Q[:, :rank]
    right = torch.linalg.qr(torch.randn(12, 12)).Q[:, :rank]
    module = Probe(nn.ReLU(), 12)
    with torch.no_grad():
        module.probe.weight.copy_(3.0 * left @ right.T)

    found = probed(module, [(1.0,) * 12]).metrics["probe"]

    # Each of the 12 - rank singular values that should be 0 is left at some 1e-7.
    assert found["effective_rank"].value == pytest.approx(rank, rel=1e-4)
    assert found["stable_rank"].value == pytest.approx(rank, rel=1e-5)


def test_a_weight_too_wide_for_a_spectrum_says_so() -> None:
    weight = torch.zeros(WIDEST_SPECTRUM + 1, WIDEST_SPECTRUM + 1)
    weight[0, 0] = 1.0

    figures = _weight_figures(weight)

    assert figures["weight_l2"].value == pytest.approx(1.0, rel=1e-6)
    assert {figures[name].value for name in RANKS} == {None}
    assert "a spectrum is taken up to 2,048" in (figures["effective_rank"].reason or "")


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_has_reasons_and_no_figures(odd: float) -> None:
    figures = _weight_figures(torch.tensor([[1.0, odd], [2.0, 3.0]]))

    assert {figure.value for figure in figures.values()} == {None}
    assert {figure.reason for figure in figures.values()} == {
        "the weight holds values that are not finite"
    }


def test_a_head_of_zeros_lets_no_gradient_through() -> None:
    module = Probe(nn.Tanh(), 3)
    nn.init.zeros_(module.head.weight)

    found = probed(module, [(0.5, 1.0, -1.0), (0.1, 0.2, 0.3)])

    figures = found.metrics["probe"]
    zero = ("grad_l2", "grad_mean_abs", "relative_grad_norm", "weight_grad_mean_abs")
    assert [figures[name].value for name in zero] == [0.0] * 4
    assert figures["unit_grad_mean_abs_mean"].value == 0.0
    assert figures["grad_dormant_fraction"].value == 1.0
    assert found.units["probe"]["unit_grad_l2"].tolist() == [0.0, 0.0, 0.0]
    assert found.metrics["head"]["grad_l2"].value > 0


def test_a_weight_of_zeros_has_no_relative_gradient_and_no_kurtosis() -> None:
    module = Probe(nn.Tanh(), 3)
    nn.init.zeros_(module.head.weight)

    figures = probed(module, [(0.5, 1.0, -1.0)]).metrics["head"]

    assert figures["relative_grad_norm"].reason == "the weight is all zero"
    assert figures["weight_kurtosis"].reason == "all entries are equal"
    assert (figures["stable_rank"].value, figures["effective_rank"].value) == (0.0, 0.0)


def test_gradients_at_units_are_those_of_one_sample_by_the_chain_rule() -> None:
    module = Probe(nn.Identity(), 3)
    module.act = nn.Tanh()
    row = (0.5, 1.0, -1.0)
    weight, bias = module.head.weight.detach().double(), module.head.bias.detach().double()
    shares = torch.softmax(weight @ torch.tanh(torch.tensor(row).double()) + bias, dim=0)
    shares[0] -= 1.0  # the label is the first class

    found = probed(module, [row])

    np.testing.assert_allclose(
        found.units["probe"]["unit_grad_mean_abs"],
        (weight.T @ shares).abs().numpy(),
        rtol=FLOAT32,
    )


def test_a_weight_that_is_not_finite_has_no_rank_and_no_false_figures() -> None:
    module = Probe(nn.ReLU(), 3)
    with torch.no_grad():
        module.probe.weight[0, 0] = math.nan

    figures = probed(module, [(1.0, 1.0, 1.0)] * 2).metrics["probe"]

    assert figures["stable_rank"].reason == "the weight holds values that are not finite"
    reason = "the activation holds values that are not finite"
    assert figures["dormant_fraction"].reason == reason
    assert figures["activation_effective_rank"].reason == reason
    assert figures["weight_l2"].value is None


def test_a_unit_that_is_not_a_number_is_not_called_dead() -> None:
    module = Probe(nn.ReLU(), 3)
    with torch.no_grad():
        module.probe.weight[0, 0] = math.nan

    figures = probed(module, [(1.0, 1.0, 1.0)] * 2).metrics["probe"]

    assert figures["dead_fraction"].value != pytest.approx(1 / 3)


def test_a_wholly_frozen_network_is_measured_by_its_weights_and_activations() -> None:
    module = Probe(nn.ReLU(), 3).requires_grad_(False)

    found = probed(module, [(1.0, -1.0, -1.0)] * 2)

    assert found.metrics["probe"]["saturated_fraction"].value == pytest.approx(2 / 3)
    assert found.metrics["probe"]["grad_l2"].reason == "the layer is frozen: it gets no gradient"


# Errors a person can act on.


def test_no_images_at_all_is_an_error() -> None:
    network = ZOO["vit"]

    with pytest.raises(DataError, match=r"not a single image to measure on. Ask for at least one"):
        measure_network(network.module(), [], network.outline().layers)


def test_a_single_image_before_a_norm_over_the_batch_is_an_error() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    layers = outline_of(module, size=3).layers

    with pytest.raises(
        DataError, match=r"batch of one image cannot be normalised.*Use a batch size"
    ):
        measure_network(module, [(torch.randn(1, 3, 3, 3), torch.tensor([0]))], layers)


def test_images_of_a_wrong_size_are_an_error() -> None:
    network = ZOO["vit"]
    batch = (torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))

    with pytest.raises(ModelError, match=r"cannot run on inputs of \(2, 3, 12, 12\).*image size"):
        measure_network(network.module(), [batch], network.outline().layers)
