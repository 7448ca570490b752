"""The pass over features, against slower ways to the same numbers and against known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.catalogue.metrics import list_metrics
from core.load import load_model, open_images, resolve_data, resolve_model
from core.load.images import choose_items
from core.measure import TRANSFER_NAMES, pooled_features, transfer_figures
from core.measure.features import (
    FITTED,
    FOLDS,
    linear_cka,
    logme,
    probe_accuracy,
    probe_folds,
)
from core.network.hooks import batch_statistics, module_kept
from core.network.outline import outline_module
from core.pipeline.batches import read_batch
from tests.zoo import ZOO


def features_of(images: int, units: int, seed: int) -> Tensor:
    """Features of uneven directions, as those of a network are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn((images, units), generator=draw) * torch.logspace(0, -2, units)


def labels_of(images: int, classes: int) -> Tensor:
    return torch.arange(images) % classes


def slow_probe(features: Tensor, labels: Tensor) -> float:
    """Ridge regression with an intercept, solved fold by fold and penalty by penalty."""
    x, folds = features.double().numpy(), probe_folds(labels).numpy()
    y = np.eye(int(labels.max()) + 1)[labels.numpy()]
    best = (math.inf, 0.0)
    for power in range(-4, 3):
        error, hits = 0.0, 0
        for fold in range(FOLDS):
            inside = folds != fold
            centre, mean = x[inside].mean(0), y[inside].mean(0)
            centred = x[inside] - centre
            scale = float((centred**2).sum()) / inside.sum()
            square = centred.T @ centred + 10.0**power * scale * np.eye(x.shape[1])
            weights = np.linalg.solve(square, centred.T @ (y[inside] - mean))
            guess = (x[~inside] - centre) @ weights + mean
            error += float(((guess - y[~inside]) ** 2).sum())
            hits += int((guess.argmax(1) == y[~inside].argmax(1)).sum())
        best = min(best, (error, hits / len(x)))
    return best[1]


def evidence(x: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """The log density of y ~ N(0, I / beta + X X' / alpha), with no algebra in between."""
    covariance = np.eye(len(x)) / beta + x @ x.T / alpha
    _, determinant = np.linalg.slogdet(2 * math.pi * covariance)
    return float(-(determinant + y @ np.linalg.solve(covariance, y)) / 2)


def slow_logme(features: Tensor, labels: Tensor) -> float:
    """The evidence at its largest, found by trying ever finer grids of both precisions."""
    x = features.double().numpy()
    found = []
    for target in np.eye(int(labels.max()) + 1)[labels.numpy()].T:
        centre, width, best = (0.0, 0.0), 12.0, -math.inf
        for _ in range(12):
            for a in np.linspace(centre[0] - width, centre[0] + width, 9):
                for b in np.linspace(centre[1] - width, centre[1] + width, 9):
                    value = evidence(x, target, math.exp(a), math.exp(b))
                    if value > best:
                        best, centre_next = value, (float(a), float(b))
            centre, width = centre_next, width / 2
        found.append(best / len(x))
    return float(np.mean(found))


def slow_cka(left: Tensor, right: Tensor) -> float:
    """||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features, in the space of units."""
    x, y = (each.double().numpy() for each in (left, right))
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


SIZES = [(40, 6, 3), (25, 60, 2), (60, 12, 5)]


@pytest.mark.parametrize(("images", "units", "classes"), SIZES)
def test_the_probe_is_ridge_regression_on_left_out_images(
    images: int, units: int, classes: int
) -> None:
    features, labels = features_of(images, units, 1), labels_of(images, classes)
    features[:, 0] += labels

    assert probe_accuracy(features, labels) == pytest.approx(slow_probe(features, labels))


@pytest.mark.parametrize(("images", "units", "classes"), SIZES[:1] + SIZES[2:])
def test_logme_is_the_largest_evidence_there_is(images: int, units: int, classes: int) -> None:
    features, labels = features_of(images, units, 2), labels_of(images, classes)
    features[:, 0] += labels

    # The grid's last points are 1e-3 apart.
    assert logme(features, labels) == pytest.approx(slow_logme(features, labels), abs=1e-6)


GRID = 0.02


def gridded_logme(features: Tensor, labels: Tensor, *, low: float, high: float) -> float:
    """The largest evidence on a fine grid of log(beta / alpha), from the covariance of labels.

    y ~ N(0, c (I + X X' beta / alpha)), and c = 1 / beta is best at the mean square of whitened y.
    """
    x, labels = features.double().numpy(), labels.unique(return_inverse=True)[1]
    n = len(x)
    values, vectors = np.linalg.eigh(x @ x.T)
    turned = (vectors.T @ np.eye(int(labels.max()) + 1)[labels.numpy()]) ** 2
    ratios = np.exp(np.arange(low, high, GRID))[:, None] / values.max()
    spread = 1 + ratios * values.clip(min=0)
    scale = (1 / spread) @ turned / n
    found = -(np.log(spread).sum(1)[:, None] + n * np.log(2 * math.pi * scale) + n) / 2
    return float(found.max(0).mean() / n)


def held_to_the_grid(features: Tensor, labels: Tensor, *, low: float, high: float) -> None:
    found = logme(features, labels)
    missed = gridded_logme(features, labels, low=low, high=high) - found
    # Between two points a maximum rises by its curvature, below 1/4, times GRID^2 / 8.
    assert -(GRID**2) / 32 < missed < 1e-8


# Layers narrower and wider than the images are many, and of every kind; the iteration of the
# published code stops at a lower maximum in most of them.
REAL = {
    "tf_efficientnet_lite0": (
        96,
        *("conv_stem", "blocks.1.0.bn2", "blocks.1.1.bn2", "blocks.2.1.bn2", "blocks.4.0.bn2"),
        *("blocks.1.0.conv_pwl", "blocks.6.0.conv_pwl", "conv_head", "classifier"),
    ),
    "vit_small_patch14_dinov2": (
        56,
        *("patch_embed.proj", "blocks.0.norm2", "blocks.0.attn.qkv", "blocks.3.attn.qkv"),
        *("blocks.1.ls1", "blocks.10.mlp.fc1", "blocks.11.attn.qkv", "head"),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_logme_of_real_layers_is_the_highest_of_their_maxima(name: str) -> None:
    size, *chosen = REAL[name]
    images, loaded = (
        open_images(resolve_data("bloodmnist")),
        load_model(resolve_model(name), classes=8),
    )
    items = choose_items(images.splits["train"], 64, seed=0)
    inputs, labels = read_batch(
        images, items, loaded.card.preprocessing, size=size, device=torch.device("cpu")
    )
    layers = outline_module(loaded.module, loaded.card, loaded.head).layers
    batch_statistics(loaded.module)
    features = pooled_features(
        loaded.module, inputs, [layer for layer in layers if layer.name in chosen]
    )

    assert len(features) == len(chosen)
    for each in features.values():
        held_to_the_grid(each, labels, low=-20.0, high=40.0)


@given(
    decades=st.lists(st.floats(0, 3), min_size=1, max_size=20),
    told=st.lists(st.integers(0, 19), max_size=4),
    images=st.integers(6, 24),
    classes=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_logme_is_the_highest_maximum_whatever_the_spectrum(
    decades: list[float], told: list[int], images: int, classes: int, seed: int
) -> None:
    """Spectra with gaps, and labels that directions far apart in size tell of."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=draw)
    # The last images would be fitted exactly by as many directions, to within rounding.
    count = min(len(decades), images - classes - 1) if images > classes + 1 else 1
    directions = torch.randn((images, count), generator=draw, dtype=torch.float64)
    for place in told:
        if place < count:
            directions[:, place] += 3 * (labels == place % classes)
    sizes = 10.0 ** -torch.tensor(decades[:count], dtype=torch.float64)
    features = torch.linalg.qr(directions).Q * sizes

    # The smallest square is e^-14, and the best ratio may lie some way below it.
    held_to_the_grid(features, labels, low=-55.0, high=75.0)


def shared(n: int, whole: float, value: float) -> float:
    """Return the evidence an image at a value of sum log u / 2 - n log(Q / whole) / 2."""
    return (value - n / 2 * math.log(whole)) / n + (math.log(n / (2 * math.pi)) - 1) / 2


def test_features_that_say_nothing_leave_labels_to_noise() -> None:
    labels = labels_of(24, 3)
    features = torch.where(torch.arange(24) % 6 < 3, 1.0, -1.0)[:, None]
    assert logme(features, labels) == pytest.approx(shared(24, 8, 0.0), abs=1e-8)


@pytest.mark.parametrize("width", [1, 5, 40])
def test_labels_fitted_exactly_have_a_finite_evidence(width: int) -> None:
    n = 24
    features = torch.full((n, width), 0.3)
    # One direction: u = FITTED / (n - 1) makes log u - n log(FITTED + u) largest.
    u = FITTED / (n - 1)
    wanted = shared(n, n, (math.log(u) - n * math.log(FITTED + u)) / 2)
    assert logme(features, torch.zeros(n, dtype=torch.int64)) == pytest.approx(wanted, abs=1e-8)


def test_labels_of_the_features_own_spread_have_no_noise() -> None:
    """As many directions as images, each as wide as the label in it: r goes to 0."""
    n = 12
    basis = torch.linalg.qr(features_of(n, n, 7).double()).Q
    label = basis.T @ torch.ones(n, dtype=torch.float64)
    features = basis * label
    wanted = shared(n, n, float(-(label**2).log().sum()) / 2)
    assert logme(features, torch.zeros(n, dtype=torch.int64)) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize(("images", "units"), [(30, 8), (12, 40), (16, 16)])
def test_logme_knows_no_rotation_scale_order_copy_or_absent_class(images: int, units: int) -> None:
    features, labels = features_of(images, units, 8).double(), labels_of(images, 3)
    found = logme(features, labels)
    turn = torch.linalg.qr(features_of(units, units, 9).double()).Q
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    for one, other in (
        (features @ turn, labels),
        (features * 1e-6, labels),
        (features[order], labels[order]),
        (torch.cat([features, features], 1), labels),
        (torch.cat([features, torch.zeros(images, 3)], 1), labels),
        (features, labels * 4 + 1),
    ):
        assert logme(one, other) == pytest.approx(found, abs=3e-8)


@pytest.mark.parametrize(("images", "units", "classes"), SIZES)
def test_cka_of_images_is_that_of_units(images: int, units: int, classes: int) -> None:
    left, right = features_of(images, units, 3), features_of(images, units + 3, 4)
    right[:, :units] += left / classes

    assert linear_cka(left, right) == pytest.approx(slow_cka(left, right), rel=1e-9)


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_cka_sees_neither_rotation_nor_scale_nor_shift(seed: int, scale: float) -> None:
    features = features_of(30, 8, seed)
    turned = torch.linalg.qr(features_of(8, 8, seed + 1).double()).Q

    found = linear_cka(features, scale * (features.double() @ turned) + 3.0)

    assert found == pytest.approx(1.0, abs=1e-6)


def test_classes_that_lie_apart_are_read_without_error_and_noise_is_not() -> None:
    labels = labels_of(100, 4)
    apart = torch.nn.functional.one_hot(labels).float() + 0.01 * features_of(100, 4, 5)
    noise = features_of(100, 4, 6)

    assert probe_accuracy(apart, labels) == 1.0
    # Chance is 1/4; five standard errors of 100 draws.
    assert probe_accuracy(noise, labels) == pytest.approx(0.25, abs=5 * math.sqrt(0.1875 / 100))
    assert logme(apart, labels) > logme(noise, labels) + 1


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_folds_are_alike_in_size_and_in_classes(counts: list[int], seed: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]

    dealt = probe_folds(labels)

    sizes = torch.bincount(dealt, minlength=FOLDS)
    assert int(sizes.max() - sizes.min()) <= 1
    for label, count in enumerate(counts):
        mine = torch.bincount(dealt[labels == label], minlength=FOLDS)
        assert int(mine.sum()) == count
        assert int(mine.max() - mine.min()) <= 1


@pytest.mark.parametrize("case", ZOO)
def test_each_layer_has_the_transfer_metrics_or_a_reason(case: str) -> None:
    network = ZOO[case]
    layers = network.outline().layers
    own, twin = network.module(), network.module()
    batches = network.batches()
    labels = torch.cat([each for _, each in batches])
    pooled = []
    for module in (own, twin):
        with module_kept(module):
            batch_statistics(module)
            parts = [pooled_features(module, inputs, layers) for inputs, _ in batches]
        pooled.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    mine, fresh = transfer_figures(pooled[0], pooled[1], labels, layers)

    wanted = {metric.name for metric in list_metrics() if metric.family == "transfer"}
    assert wanted == set(TRANSFER_NAMES)
    for layer in layers:
        for figures in (mine[layer.name], fresh[layer.name]):
            assert figures.keys() == wanted
            assert all((each.value is None) == bool(each.reason) for each in figures.values())
        if mine[layer.name]["cka_twin"].value is not None:
            # The twin here is the network itself.
            assert mine[layer.name]["cka_twin"].value == pytest.approx(1.0, abs=1e-9)
        assert fresh[layer.name]["cka_twin"].value is None
    assert any(mine[layer.name]["logme"].value is not None for layer in layers)


def test_features_of_nothing_have_a_reason_and_no_figure() -> None:
    outline = ZOO["tied"].outline()
    names = [layer.name for layer in outline.layers]
    nothing = dict.fromkeys(names, torch.zeros(20, 4))

    found, _ = transfer_figures(nothing, nothing, labels_of(20, 2), outline.layers)

    assert found[names[0]]["logme"].reason == "the features are all zero: there is no evidence"
    assert found[names[0]]["cka_twin"].reason == "the features are the same for all images"


def test_features_are_means_over_positions() -> None:
    network = ZOO["residual_cnn"]
    module, (inputs, _) = network.module().eval(), network.batches()[0]

    found = pooled_features(module, inputs, network.outline().layers)

    stem = module.stem(inputs).mean((2, 3))
    torch.testing.assert_close(found["stem"], stem.detach())
