"""Attributions are Captum's own on the same tensors, and leave the network as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import (
    LayerConductance,
    LayerFeatureAblation,
    LayerGradCam,
    LayerIntegratedGradients,
)
from torch import Tensor, nn

import core
from core.attribution import (
    ablated,
    attributed,
    block_loss,
    class_target,
    explaining,
    features_target,
)
from core.catalogue.attributions import METHODS, method_named
from core.cli import main as run
from core.errors import LimberError, OptionError, PlanError, Stopped
from core.load import choose_items, load_model, open_images
from core.pipeline.attributing import AttributeSettings, attribute
from core.pipeline.batches import read_batch
from core.pipeline.progress import Progress
from core.records.attribution import Attribution

# The embedded CNN and ViT, a layer of each, and a side that keeps this fast.
NETWORKS = {
    "tf_efficientnet_lite0": ("blocks.3.1.conv_pw", 64),
    "vit_small_patch14_dinov2": ("blocks.5.mlp.fc1", 56),
}
METHOD_CLASSES = {
    "gradcam": LayerGradCam,
    "integrated-gradients": LayerIntegratedGradients,
    "conductance": LayerConductance,
}


def seen(name: str, images: int = 2) -> tuple[nn.Module, frozenset[str], Tensor, Tensor]:
    """The network, its head, and the images and labels that `attribute` takes."""
    data = open_images(core.resolve_data("bloodmnist"))
    loaded = load_model(core.resolve_model(name), classes=len(data.outline.classes), head_seed=0)
    items = choose_items(data.splits["val"], images, seed=0)
    inputs, labels = read_batch(
        data,
        items,
        loaded.card.preprocessing,
        size=NETWORKS[name][1],
        device=torch.device("cpu"),
    )
    return loaded.module, loaded.head, inputs.contiguous(), labels


def looked(name: str, method: str, **more: object) -> tuple[Attribution, dict[str, np.ndarray]]:
    layer, size = NETWORKS[name]
    settings = AttributeSettings(
        method=method, images=2, steps=8, image_size=size, device="cpu", **more
    )
    return attribute(core.resolve_model(name), core.resolve_data("bloodmnist"), layer, settings)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tf_efficientnet_lite0", "gradcam"),
        ("tf_efficientnet_lite0", "integrated-gradients"),
        ("tf_efficientnet_lite0", "conductance"),
        ("vit_small_patch14_dinov2", "integrated-gradients"),
        ("vit_small_patch14_dinov2", "conductance"),
    ],
)
def test_a_view_is_what_captum_gives_on_the_same_tensors(name: str, method: str) -> None:
    module, head, inputs, _ = seen(name)
    layer = NETWORKS[name][0]
    with explaining(module) as own:
        target = features_target(own, own.get_submodule(next(iter(head)).rpartition(".")[0]))
        options: dict[str, object] = {"relu_attributions": False}
        if method != "gradcam":
            options = {
                "baselines": torch.zeros_like(inputs),
                "n_steps": 8,
                "internal_batch_size": 32,
            }
        explainer = METHOD_CLASSES[method](target, own.get_submodule(layer))
        expected = explainer.attribute(inputs, **options).detach().float()

    attribution, arrays = looked(name, method)

    assert attribution.method == method
    if expected.ndim == 4:
        maps = expected.sum(1)
    else:
        tokens = expected.sum(2)
        maps = tokens[:, tokens.shape[1] - 16 :].reshape(-1, 4, 4)
    np.testing.assert_allclose(arrays["pretrained/maps"], maps.numpy(), rtol=1e-4, atol=1e-4)
    sums = expected.flatten(1).double().sum(1).numpy()
    np.testing.assert_allclose(attribution.states[0].sums, sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_an_ablation_is_captums_group_by_group(name: str) -> None:
    module, head, inputs, _ = seen(name)
    layer = NETWORKS[name][0]

    attribution, arrays = looked(name, "ablation")

    with explaining(module) as own, torch.no_grad():
        target = features_target(own, own.get_submodule(next(iter(head)).rpartition(".")[0]))
        part = own.get_submodule(layer)
        units = part.weight.shape[0]
        places = torch.arange(units) // attribution.group
        mask = places.view(1, -1, 1, 1) if name.startswith("tf") else places.view(1, 1, -1)
        expected = LayerFeatureAblation(target, part).attribute(
            inputs, layer_baselines=0, layer_mask=mask
        )
    one = expected[:, :, 0, 0] if expected.ndim == 4 else expected[:, 0]
    assert attribution.units == arrays["pretrained/units"].shape[1] <= 64
    np.testing.assert_allclose(
        arrays["pretrained/units"], one[:, :: attribution.group].numpy(), rtol=1e-4, atol=1e-4
    )


def test_the_sum_of_integrated_gradients_is_the_change_of_the_target() -> None:
    layer, size = NETWORKS["vit_small_patch14_dinov2"]
    settings = AttributeSettings(
        method="integrated-gradients", images=2, steps=64, image_size=size, device="cpu"
    )

    attribution, _ = attribute(
        core.resolve_model("vit_small_patch14_dinov2"),
        core.resolve_data("bloodmnist"),
        layer,
        settings,
    )

    (state,) = attribution.states
    assert state.gap is not None
    assert state.gap < 0.01
    assert state.baseline_outputs is not None
    change = np.subtract(state.outputs, state.baseline_outputs)
    np.testing.assert_allclose(state.sums, change, rtol=0.02, atol=0.02 * np.abs(change).max())
    assert state.infidelity is not None
    assert math.isfinite(state.infidelity)


def test_a_method_without_infidelity_says_why() -> None:
    attribution, _ = looked("tf_efficientnet_lite0", "gradcam")

    assert attribution.states[0].infidelity is None
    assert attribution.why_no_infidelity


def test_a_class_target_follows_its_image_through_repeated_batches() -> None:
    module, _, inputs, labels = seen("tf_efficientnet_lite0", images=3)
    with explaining(module) as own:
        target = class_target(own, labels)
        once, twice = target(inputs), target(torch.cat([inputs, inputs]))

    torch.testing.assert_close(twice, torch.cat([once, once]), rtol=1e-4, atol=1e-4)


def test_a_plan_adds_a_state_on_the_same_images(tmp_path: Path) -> None:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")
    outline = core.outline_model(spec, classes=8)
    before = core.make_plan(outline, ["blocks.2.0.conv_pw"])
    settings = AttributeSettings(method="gradcam", images=2, image_size=64, device="cpu")

    attribution, arrays = attribute(spec, data, "blocks.3.1.conv_pw", settings, plan=before)

    assert [state.name for state in attribution.states] == ["pretrained", "planned"]
    assert arrays["planned/maps"].shape == arrays["pretrained/maps"].shape
    assert not np.allclose(arrays["planned/maps"], arrays["pretrained/maps"])
    written = core.write_attribution(attribution, arrays, tmp_path / "a.json")
    again, held = core.read_attribution(tmp_path / "a.json")
    assert again == written
    np.testing.assert_array_equal(held["planned/maps"], arrays["planned/maps"])


def test_the_same_seed_gives_the_same_bytes() -> None:
    first = looked("tf_efficientnet_lite0", "conductance")[1]
    second = looked("tf_efficientnet_lite0", "conductance")[1]

    assert {key: value.tobytes() for key, value in first.items()} == {
        key: value.tobytes() for key, value in second.items()
    }


def test_the_network_is_left_as_it_was_also_after_an_error() -> None:
    module, head, inputs, _ = seen("tf_efficientnet_lite0")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]

    with explaining(module) as own:
        target = features_target(own, own.get_submodule(next(iter(head)).rpartition(".")[0]))
        layer = own.get_submodule("blocks.3.1.conv_pw")
        with pytest.raises(Stopped):
            attributed(own, layer, inputs, target, "gradcam", steps=4, should_stop=lambda: True)
        assert not [part for part in own.modules() if part._forward_hooks]

    assert [part.training for part in module.modules()] == modes
    assert not [part for part in module.modules() if part._forward_hooks]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": "nothing"}, "no layer"),
        ({"layer": "classifier", "method": "gradcam"}, "is the head"),
        ({"layer": "classifier", "method": "gradcam", "target": "class"}, "channels and two axes"),
    ],
)
def test_what_does_not_apply_is_a_sentence(change: dict[str, str], says: str) -> None:
    settings = AttributeSettings(
        method=change.get("method", "auto"),
        target=change.get("target"),  # type: ignore[arg-type]
        images=2,
        image_size=64,
        device="cpu",
    )

    with pytest.raises(LimberError, match=says):
        attribute(
            core.resolve_model("tf_efficientnet_lite0"),
            core.resolve_data("bloodmnist"),
            change["layer"],
            settings,
        )


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="method"):
        AttributeSettings(method="magic")
    with pytest.raises(OptionError, match="target"):
        AttributeSettings(target="luck")  # type: ignore[arg-type]


def test_a_plan_of_another_network_is_refused() -> None:
    outline = core.outline_model(core.resolve_model("vit_small_patch14_dinov2"), classes=8)
    plan = core.make_plan(outline, ["blocks.5.mlp.fc1"])

    with pytest.raises(PlanError, match="was made for"):
        attribute(
            core.resolve_model("tf_efficientnet_lite0"),
            core.resolve_data("bloodmnist"),
            "blocks.3.1.conv_pw",
            AttributeSettings(images=2, image_size=64, device="cpu"),
            plan=plan,
        )


def test_stop_ends_an_ablation_of_all_layers() -> None:
    with pytest.raises(Stopped):
        attribute(
            core.resolve_model("tf_efficientnet_lite0"),
            core.resolve_data("bloodmnist"),
            "all",
            AttributeSettings(method="ablation", images=2, image_size=64, device="cpu"),
            progress=Progress(should_stop=lambda: True),
        )


def test_the_command_writes_what_the_library_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"

    code = run(
        [
            *("attribute", "--model", "tf_efficientnet_lite0", "--data", "bloodmnist"),
            *("--layer", "blocks.3.1.conv_pw", "--images", "2", "--image-size", "64"),
            *("--method", "gradcam", "--device", "cpu", "--out", str(out)),
        ]
    )

    said = capsys.readouterr()
    assert code == 0
    assert said.err == ""
    assert json.loads(out.read_text(encoding="utf-8"))["method"] == "gradcam"
    attribution, arrays = core.read_attribution(out)
    _, expected = looked("tf_efficientnet_lite0", "gradcam")
    np.testing.assert_array_equal(arrays["pretrained/maps"], expected["pretrained/maps"])
    assert attribution.grid == arrays["pretrained/maps"].shape[1:]


def test_every_method_has_its_words() -> None:
    for method in METHODS:
        assert all((method.title, method.reads, method.formula, method.applies_to, method.source))
        assert method_named(method.name) is method


class _Sum(nn.Module):
    """A linear network whose residual sum is written into what its layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = self.a(x)
        h += 10 * x
        out: Tensor = self.head(h)
        return out


def summed() -> tuple[_Sum, Tensor, Tensor, Tensor]:
    """The network, inputs, labels, and what its layer adds to each image's own class."""
    torch.manual_seed(0)
    net, x, labels = _Sum().eval(), torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        moved = net.a(x.flatten(1)) - net.a(torch.zeros(4, 12))
        return net, x, labels, moved * net.head.weight[labels]


@pytest.mark.parametrize("method", ["integrated-gradients", "conductance"])
def test_a_sum_written_into_the_output_does_not_reach_the_values(method: str) -> None:
    net, x, labels, expected = summed()

    with explaining(net) as own:
        found = attributed(own, own.a, x, class_target(own, labels), method, steps=16)

    # Conductance takes differences between points that end short of both ends of the path.
    near = 1e-4 if method == "integrated-gradients" else 1e-2
    torch.testing.assert_close(found.values, expected, atol=near, rtol=near)


def test_an_ablation_takes_out_the_layer_alone() -> None:
    net, x, labels, _ = summed()

    with explaining(net) as own:
        lost = ablated(own.a, x, class_target(own, labels), shape=(4, 12), axis=1, group=1)

    expected = (net.a(x.flatten(1)) * net.head.weight[labels]).detach()
    torch.testing.assert_close(lost, expected, atol=1e-4, rtol=1e-4)


def test_the_infidelity_of_a_linear_target_is_0() -> None:
    net, x, labels, _ = summed()

    with explaining(net) as own:
        target = class_target(own, labels)
        found = attributed(own, own.a, x, target, "integrated-gradients", steps=16)

    assert found.infidelity == pytest.approx(0, abs=1e-6)
    assert found.sigma is not None
    assert found.sigma > 0


def test_a_residual_block_gives_its_input_where_it_is_taken_out() -> None:
    net, x, labels, _ = summed()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    whole = nn.Sequential(nn.Flatten(), Block(), net.a, net.head).eval()
    with explaining(whole) as own:
        target = class_target(own, labels)
        lost, stood_in = block_loss(own, own[1], x, target)
        plain, zero = block_loss(own, own[2], x, target)

    with torch.no_grad():
        flat = x.flatten(1)
        full = net.head(net.a(whole[1](flat)))
        expected = (full - net.head(net.a(flat))).gather(1, labels[:, None])[:, 0]
        nothing = (full - net.head(torch.zeros(4, 12))).gather(1, labels[:, None])[:, 0]
    assert (stood_in, zero) == ("input", "zero")
    torch.testing.assert_close(lost, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, nothing, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("damage", ["drop", "flatten", "nan"])
def test_arrays_that_are_not_the_records_are_refused(tmp_path: Path, damage: str) -> None:
    attribution, arrays = looked("tf_efficientnet_lite0", "gradcam")
    if damage == "drop":
        arrays = {key: value for key, value in arrays.items() if key != "pretrained/units"}
    elif damage == "flatten":
        arrays = arrays | {"pretrained/maps": arrays["pretrained/maps"].ravel()}
    else:
        arrays = arrays | {"pretrained/units": arrays["pretrained/units"] * np.nan}
    core.write_attribution(attribution, arrays, tmp_path / "a.json")

    with pytest.raises(OptionError, match="cannot be read as an attribution"):
        core.read_attribution(tmp_path / "a.json")
