"""The closer look: shares read off its distributions are the figures, and figures do not move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import core
from core.errors import OptionError
from core.measure import Measured, figures_of, gauging
from core.measure import inside as inside_module
from core.measure.inside import (
    Inside,
    gradient_arrays,
    inside_arrays,
    settle,
    weight_arrays,
)
from core.network.activations import _FORMULAS, Activation
from core.network.trace import traced_forward
from core.pipeline.measuring import MeasureSettings
from tests.zoo import BATCHES, CLASSES, ZOO, outline_of

SETTINGS: dict[str, tuple[float, ...]] = {
    "hardtanh": (-0.5, 1.5),
    "leaky_relu": (0.005,),
    "elu": (1.3,),
    "celu": (0.7,),
    "softplus": (2.0, 20.0),
}
# What the embedded CNN and ViT are measured on here.
EMBEDDED = {"tf_efficientnet_lite0": 64, "vit_small_patch14_dinov2": 56}

Arrays = dict[str, dict[str, np.ndarray]]
Batches = Sequence[tuple[Tensor, Tensor]]


class OneActivation(nn.Module):
    """A wide layer before one activation."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.head = nn.Linear(12, CLASSES)
        self.activation = activation
        with torch.no_grad():
            # Far out on both sides, so that every flat part is reached.
            self.first.weight.mul_(25.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.first(x)).mean((2, 3)))


def batches_of(size: int, seed: int = 0) -> Batches:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(4, 3, size, size, generator=draw),
            torch.randint(CLASSES, (4,), generator=draw),
        )
        for _ in range(BATCHES)
    ]


def looked_at(module: nn.Module, size: int, batches: Batches) -> tuple[Measured, Arrays]:
    outline = outline_of(module, size=size)
    with gauging(module, outline.layers) as gauge:
        gauge.inside = Inside(CLASSES, [layer.name for layer in outline.layers])
        gauge.learn_sites(*batches[0])
        settle(gauge.inside, gauge.inside, torch.device("cpu"))
        for place, (inputs, labels) in enumerate(batches):
            gauge.add(inputs, labels, first=4 * place)
    return figures_of(gauge.summed), inside_arrays(gauge.inside)


def share_inside(arrays: dict[str, np.ndarray]) -> float:
    counts = arrays["counts"].sum(0, dtype=np.int64)
    return float(counts[arrays["flat"].astype(bool)].sum() / counts.sum())


@pytest.mark.parametrize("name", sorted(_FORMULAS))
def test_the_shaded_share_of_each_activation_is_the_figure(name: str) -> None:
    torch.manual_seed(1)
    module = OneActivation(Activation(name, SETTINGS.get(name, ())))

    measured, arrays = looked_at(module, 8, batches_of(8))

    figure = measured.metrics["first"]["saturated_fraction"].value
    assert figure is not None
    assert share_inside(arrays["first"]) == pytest.approx(figure, abs=1e-6)
    if SETTINGS.get(name) != (0.005,) or name == "leaky_relu":
        assert 0 < figure <= 1


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_shaded_shares_of_a_network_are_its_figures_by_layer_and_unit(name: str) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    module = case.build()

    measured, arrays = looked_at(module, case.size, batches_of(case.size))

    seen = {layer: found for layer, found in arrays.items() if "counts" in found}
    figures = {
        layer: metrics["saturated_fraction"].value
        for layer, metrics in measured.metrics.items()
        if metrics["saturated_fraction"].value is not None
    }
    assert set(seen) == set(figures)
    for layer, found in seen.items():
        assert share_inside(found) == pytest.approx(figures[layer], abs=1e-6)
        flat = found["flat"].astype(bool)
        by_unit = found["counts"][:, flat].sum(1) / found["counts"].sum(1)
        expected = measured.units[layer]["unit_saturated_fraction"]
        np.testing.assert_allclose(by_unit, expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_looking_inside_moves_no_figure(name: str) -> None:
    case = ZOO[name]
    batches = batches_of(case.size)
    torch.manual_seed(0)
    module = case.build()
    outline = outline_of(module, size=case.size)
    with gauging(module, outline.layers) as gauge:
        for place, (inputs, labels) in enumerate(batches):
            gauge.add(inputs, labels, first=4 * place)
    plain = figures_of(gauge.summed)

    measured, _ = looked_at(module, case.size, batches)

    assert measured.metrics == plain.metrics
    for layer, figures in plain.units.items():
        for metric, values in figures.items():
            np.testing.assert_array_equal(values, measured.units[layer][metric])


def pre_activations(module: nn.Module, inputs: Tensor) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad(), traced_forward(module, before_activation=lambda _, z: kept.append(z + 0)):
        module(inputs)
    return kept[0]


def test_classes_and_images_are_those_of_the_pre_activations() -> None:
    torch.manual_seed(3)
    module = OneActivation(Activation("relu")).eval()
    batches = batches_of(8, seed=5)
    z = torch.cat([pre_activations(module, inputs) for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])

    _, arrays = looked_at(module, 8, batches)

    found = arrays["first"]
    for label in range(CLASSES):
        share = (z[labels == label] <= 0).float().mean((0, 2, 3)).numpy()
        np.testing.assert_allclose(found["by_class"][label], share, atol=1e-3)
    means = z.mean((2, 3))
    order = means.argsort(0, descending=True)
    np.testing.assert_array_equal(found["strongest"], order[:3].numpy())
    np.testing.assert_array_equal(found["weakest"], order.flip(0)[:3].numpy())
    np.testing.assert_allclose(
        found["strongest_value"], means.gather(0, order[:3]).numpy(), rtol=2e-3
    )


def test_a_gate_shows_both_factors() -> None:
    case = ZOO["swiglu"]
    torch.manual_seed(0)

    _, arrays = looked_at(case.build(), case.size, batches_of(case.size))

    assert arrays["gate"]["factor_counts"].sum() > 0
    assert (np.diff(arrays["gate"]["factor_edges"]) > 0).all()


def test_attention_rows_sum_to_one_and_give_the_entropy_of_the_figures() -> None:
    case = ZOO["multi_head"]
    torch.manual_seed(0)
    module = case.build()

    _, arrays = looked_at(module, case.size, batches_of(case.size))

    kept = [found["attention"] for found in arrays.values() if "attention" in found]
    for weights in kept:
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=5e-3)


def test_the_tail_is_the_law_behind_the_exponent_in_the_table() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))

    found = weight_arrays(weight)

    alpha, least, held = found["tail"]
    values = found["singular_values"].astype(np.float64) ** 2
    tail = values[values >= least * (1 - 1e-5)]
    assert len(tail) == held
    assert alpha == pytest.approx(1 + len(tail) / np.log(tail / least).sum(), rel=1e-4)


def test_gradients_are_counted_on_both_sides_of_zero() -> None:
    gradient = torch.tensor([0.0, 0.0, 1e-3, -1e-3, 0.5, -0.5, 1e-12, 0.5])

    found = gradient_arrays(gradient)

    assert found["gradient_zeros"][0] == pytest.approx(0.25)
    assert found["gradient_counts"].sum() == len(gradient)
    edges, counts = found["gradient_edges"], found["gradient_counts"]
    assert counts[edges[:-1] > 0.1].sum() == 2
    assert counts[edges[1:] < -0.1].sum() == 1
    # Zeros, and what is too small for the axis.
    assert counts[(edges[:-1] < 0) & (edges[1:] > 0)].sum() == 3


def test_a_gradient_of_zeros_or_with_nan_has_no_distribution() -> None:
    assert set(gradient_arrays(torch.zeros(5))) == {"gradient_zeros"}
    assert gradient_arrays(torch.tensor([1.0, torch.nan])) == {}


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_the_embedded_networks_shares_are_their_figures(name: str, tmp_path: Any) -> None:
    spec, data = core.resolve_model(name), core.resolve_data("bloodmnist")
    settings = MeasureSettings(samples=8, batch_size=4, image_size=EMBEDDED[name], device="cpu")

    diagnosis, units, inside = core.diagnose_inside(spec, data, settings)

    written = core.write_diagnosis(diagnosis, units, tmp_path / "d.json", inside=inside)
    looks = core.read_inside(tmp_path / "d.json")
    assert written.header.inside_file == "d.inside.safetensors"
    checked = 0
    for layer in written.layers:
        figures = layer.metrics["saturated_fraction"], layer.twin_metrics["saturated_fraction"]
        if figures[0].value is None:
            continue
        edges, flat = (looks[layer.name][what][0] for what in ("edges", "flat"))
        assert len(edges) == len(flat) + 1
        for figure, counts in zip(figures, looks[layer.name]["counts"], strict=True):
            assert counts is not None
            share = share_inside({"counts": counts, "flat": flat})
            assert share == pytest.approx(figure.value, abs=1e-6)
        checked += 1
    assert checked >= 10
    assert looks["images"]["thumbnails"][0].shape == (8, 32, 32, 3)
    assert looks["images"]["labels"][0].shape == (8,)
    if name.startswith("vit"):
        attention = next(found["attention"][0] for found in looks.values() if "attention" in found)
        np.testing.assert_allclose(attention.sum(-1), 1.0, atol=5e-3)


def test_what_nobody_looked_at_says_how_to_look(tmp_path: Any) -> None:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")
    settings = MeasureSettings(samples=4, batch_size=2, image_size=32, device="cpu")
    core.write_diagnosis(*core.diagnose(spec, data, settings), tmp_path / "d.json")

    with pytest.raises(OptionError, match="did not look inside"):
        core.read_inside(tmp_path / "d.json")


@pytest.mark.parametrize(("rows", "units"), [(12544 * 16, 32), (3136 * 32, 144), (7, 5)])
def test_a_range_is_learnt_from_every_unit(rows: int, units: int) -> None:
    z = torch.arange(units).expand(rows, units).contiguous()

    some = inside_module._sampled(z)

    assert len(some.unique()) == units
