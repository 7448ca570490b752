"""The seed paper's method, on its own networks, from its definitions and not from our code.

Coetzer et al. 2026, arXiv:2603.20860: in every parameter with two axes or more, the new head, the
class token and the position embedding included, int(p / 100 * numel) entries of least utility get
new values; as many of every bias become 0. The architectures are torchvision's; their weights are
drawn here, because what is selected and written is a function of the weights, whichever they are.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.catalogue.rules import rule_named
from core.catalogue.schemes import WITH_GRADIENTS, list_schemes
from core.load import load_model, resolve_model
from core.pipeline.applying import edited_weights
from core.pipeline.planning.control import random_control
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.planning.subject import Subject

CLASSES = 5
NETWORKS = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "vit_b_16")
# What the paper's code writes, as functions of the tensor and of the selected places.
DETERMINISTIC = {
    "mean": lambda tensor, chosen: tensor.mean(),
    "zero": lambda tensor, chosen: torch.zeros(()),
}


def by_the_paper(
    parameters: dict[str, Tensor], percent: int, scheme: str, gradients: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the new values of every parameter, from the paper's definitions alone."""
    made = {}
    for name, tensor in parameters.items():
        new = tensor.detach().clone().flatten()
        utility = tensor.detach().flatten()
        if gradients is not None:
            utility = utility * gradients[name].flatten()
        k = int(percent / 100 * new.numel())
        places = torch.topk(utility.abs(), k, largest=False).indices
        if tensor.dim() > 1 and scheme != "bias-mean":
            new[places] = DETERMINISTIC[scheme](tensor.detach(), places)
        elif "bias" in name.rsplit(".", 1)[-1] and tensor.dim() == 1:
            new[places] = tensor.detach().mean() if scheme == "bias-mean" else 0.0
        made[name] = new.reshape(tensor.shape)
    return made


@pytest.mark.parametrize(
    ("network", "percent", "scheme"),
    [
        (network, percent, scheme)
        for network in NETWORKS
        for percent, scheme in ((10, "mean"), (29, "zero"), (50, "bias-mean"))
        # Of the large one once is enough.
        if network != "vit_b_16" or scheme == "mean"
    ],
)
def test_magnitude_selects_and_writes_what_the_paper_does(
    network: str, percent: int, scheme: str
) -> None:
    spec = resolve_model(f"torchvision:{network}", weights="none")
    before = dict(load_model(spec, classes=CLASSES).module.named_parameters())
    expected = by_the_paper(before, percent, scheme, None)

    plan = plan_by_rule(
        spec,
        "weight-magnitude",
        {"percent": percent},
        classes=CLASSES,
        wish=Wish(scheme=scheme),
    )
    after, _ = edited_weights(plan)

    for name, truth in expected.items():
        assert torch.equal(after[name] != before[name], truth != before[name]), name
        # The mean is taken in float64 here and in float32 there.
        assert torch.allclose(after[name], truth, rtol=1e-4, atol=1e-9), name
    assert any("class_token" in name for name in expected) == (network == "vit_b_16")


@pytest.mark.parametrize("network", NETWORKS)
def test_magnitude_times_gradient_selects_what_the_paper_does(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = resolve_model(f"torchvision:{network}", weights="none")
    before = dict(load_model(spec, classes=CLASSES).module.named_parameters())
    noise = torch.Generator().manual_seed(4)
    gradients = {name: torch.randn(each.shape, generator=noise) for name, each in before.items()}
    monkeypatch.setattr(Subject, "gradients", lambda self, decay=None: gradients)
    expected = by_the_paper(before, 10, "zero", gradients)

    plan = plan_by_rule(
        spec, "weight-gradient", {"percent": 10}, classes=CLASSES, wish=Wish(scheme="zero")
    )
    after, _ = edited_weights(plan)

    for name, truth in expected.items():
        assert torch.equal(after[name], truth), name


@pytest.mark.parametrize("scheme", ["bias-mean", "normal-tenth"])
def test_the_two_schemes_that_their_code_writes_otherwise_after_gradients_are_named(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their code writes 0 into biases and nothing into matrices; ours what it writes after |w|."""
    spec = resolve_model("torchvision:mobilenet_v2", weights="none")
    before = dict(load_model(spec, classes=CLASSES).module.named_parameters())
    noise = torch.Generator().manual_seed(4)
    gradients = {name: torch.randn(each.shape, generator=noise) for name, each in before.items()}
    monkeypatch.setattr(Subject, "gradients", lambda self, decay=None: gradients)
    rule = rule_named("weight-gradient")
    plan = plan_by_rule(spec, rule.name, {"percent": 50}, classes=CLASSES, wish=Wish(scheme=scheme))
    after, _ = edited_weights(plan)

    (info,) = (each for each in list_schemes() if each.name == scheme)
    assert info.symbol in WITH_GRADIENTS
    assert info.description.endswith(WITH_GRADIENTS[info.symbol])
    assert f"{scheme} ({info.symbol})" in rule.description
    matrices = [name for name, each in before.items() if each.ndim > 1]
    changed = [name for name in matrices if not torch.equal(after[name], before[name])]
    assert changed == (matrices if scheme == "normal-tenth" else [])


@pytest.mark.parametrize(
    ("scheme", "spread"),
    [("normal", 1.0), ("normal-small", 0.2), ("normal-tenth", 0.1)],
)
def test_random_values_have_the_papers_spread(scheme: str, spread: float) -> None:
    spec = resolve_model("torchvision:resnet18", weights="none")
    before = load_model(spec, classes=CLASSES).module.state_dict()
    rule, options = "weight-magnitude", {"percent": 50.0}

    plan = plan_by_rule(spec, rule, options, classes=CLASSES, wish=Wish(scheme=scheme))
    after, _ = edited_weights(plan)

    old, new = before["layer4.0.conv2.weight"], after["layer4.0.conv2.weight"]
    drawn = new[new != old].double()
    # A million draws and more: the error of the spread is below 0.1 %.
    assert float(drawn.std()) == pytest.approx(spread, rel=5e-3)
    assert abs(float(drawn.mean())) < 5e-3 * spread


def test_one_number_is_shared_by_all_selected_entries() -> None:
    spec = resolve_model("torchvision:mobilenet_v2", weights="none")
    before = load_model(spec, classes=CLASSES).module.state_dict()
    rule, options = "weight-magnitude", {"percent": 20.0}
    name = "features.5.conv.0.0.weight"

    made = {}
    for scheme in ("mean-noise", "one-normal"):
        plan = plan_by_rule(spec, rule, options, classes=CLASSES, wish=Wish(scheme=scheme))
        after, _ = edited_weights(plan)
        made[scheme] = after[name][after[name] != before[name]].unique()

    assert {scheme: len(values) for scheme, values in made.items()} == {
        "mean-noise": 1,
        "one-normal": 1,
    }
    mean = float(before[name].double().mean())
    assert abs(float(made["mean-noise"]) - mean) < 0.5 * abs(mean)


def test_the_random_control_selects_the_same_count_in_each_tensor() -> None:

    spec = resolve_model("torchvision:mobilenet_v2", weights="none")
    plan = plan_by_rule(spec, "weight-magnitude", {"percent": 10.0}, classes=CLASSES)

    control = random_control(plan, seed=1)

    counts = [
        {e.tensor: e.count for target in each.targets for e in target.entries}
        for each in (plan, control)
    ]
    assert counts[0] == counts[1]
    assert control.companion is not None
    assert plan.companion is not None
    assert control.companion.sha256 != plan.companion.sha256


def test_a_head_can_be_kept_out() -> None:
    spec = resolve_model("torchvision:resnet18", weights="none")
    plan = plan_by_rule(
        spec, "weight-magnitude", {"percent": 10.0}, classes=CLASSES, wish=Wish(head=False)
    )

    assert "fc" not in {target.layer for target in plan.targets}
