"""Gradients that choose entries: how near they come to the exact ones, and which are 0."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from core.load import choose_items, load_model, open_images, resolve_data, resolve_model
from core.measure.utility import rounding_alone, summed_gradients
from core.pipeline.batches import read_batch
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.planning.subject import Sight, Subject
from core.pipeline.progress import Progress

SIDE, CHANNELS = 8, 4


class Shifted(nn.Module):
    """A bias, what comes right behind it, and a norm."""

    def __init__(self, *between: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.between = nn.Sequential(*between)
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.between(self.first(x)).relu().mean((2, 3)))
        return out


CANCELLED = {
    "a batch norm": (nn.BatchNorm2d(CHANNELS),),
    "a batch norm without running statistics": (
        nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    ),
    "a norm of each channel": (nn.GroupNorm(CHANNELS, CHANNELS),),
    "an instance norm": (nn.InstanceNorm2d(CHANNELS),),
    "a convolution of single places, then a norm": (
        nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
        nn.BatchNorm2d(CHANNELS),
    ),
    "a grouped one, then a norm": (
        nn.Conv2d(CHANNELS, CHANNELS, 1, groups=2, bias=False),
        nn.BatchNorm2d(CHANNELS),
    ),
    "pooling, then a norm": (nn.AvgPool2d(2), nn.BatchNorm2d(CHANNELS)),
}
SEEN = {
    "an activation, then a norm": (nn.ReLU(), nn.BatchNorm2d(CHANNELS)),
    "a border, then a norm": (
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS),
    ),
    "a norm over several channels": (nn.GroupNorm(1, CHANNELS),),
    "no norm": (nn.Identity(),),
}


def images() -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return torch.randn((6, 3, SIDE, SIDE), generator=noise), torch.tensor([0, 1, 2, 0, 1, 2])


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """Draw every weight anew: the layers above are made once, whenever this file is read."""
    noise = torch.Generator().manual_seed(seed)
    for each in module.parameters():
        each.data = 0.5 * torch.randn(each.shape, generator=noise)
    return module


@pytest.mark.parametrize("between", CANCELLED.values(), ids=CANCELLED)
def test_a_bias_that_a_norm_takes_out_has_no_gradient(between: tuple[nn.Module, ...]) -> None:
    for seed in range(8):
        module = drawn(Shifted(*copy.deepcopy(between)), seed)

        assert "first.bias" in rounding_alone(module, *images())


@pytest.mark.parametrize("between", SEEN.values(), ids=SEEN)
def test_a_bias_that_reaches_the_loss_has_one(between: tuple[nn.Module, ...]) -> None:
    for seed in range(8):
        module = drawn(Shifted(*copy.deepcopy(between)), seed)

        assert "first.bias" not in rounding_alone(module, *images())


def test_a_gradient_of_exactly_0_is_none_of_rounding() -> None:
    module = Shifted(nn.BatchNorm2d(CHANNELS))
    module.head.weight.data.zero_()

    assert rounding_alone(module, *images()) == frozenset()


def test_asking_leaves_the_network_as_it_was() -> None:
    module = Shifted(nn.BatchNorm2d(CHANNELS)).eval()
    before = {name: each.clone() for name, each in module.state_dict().items()}

    rounding_alone(module, *images())

    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    assert all(each.dtype == before[name].dtype for name, each in module.state_dict().items())
    assert not module.training
    assert all(each.grad is None for each in module.parameters())


def errors(found: dict[str, Tensor], exact: dict[str, Tensor], left_out: frozenset[str]) -> Tensor:
    """Return each gradient's distance from the exact one, relative to its size."""
    names = [name for name, each in exact.items() if name not in left_out and each.any()]
    return torch.stack(
        [(found[name].double() - exact[name]).norm() / exact[name].norm() for name in names]
    )


def test_gradients_that_choose_entries_are_as_exact_as_those_of_contiguous_images() -> None:
    spec, data = resolve_model("tf_efficientnet_lite0"), resolve_data("bloodmnist")
    sight = Sight(data=data, samples=16, image_size=64, batch_size=16, device="cpu")
    subject = Subject(spec, classes=None, sight=sight, progress=Progress(), asker="A test")
    loaded = load_model(spec, classes=len(open_images(data).outline.classes))
    items = choose_items(open_images(data).splits["train"], 16, seed=0)
    inputs, labels = read_batch(
        open_images(data),
        items,
        loaded.card.preprocessing,
        size=64,
        device=torch.device("cpu"),
        layout=torch.contiguous_format,
    )
    plain = summed_gradients(loaded.module, [(inputs, labels)])
    exact = summed_gradients(loaded.module.double(), [(inputs.double(), labels)])

    found = subject.gradients()

    ours, reference = (errors(each, exact, subject.rounding) for each in (found, plain))
    assert float(ours.median()) <= 2 * float(reference.median())
    assert float(ours.max()) <= 2 * float(reference.max())


def test_biases_without_gradient_are_named_and_left_out() -> None:
    sight = Sight(data=resolve_data("bloodmnist"), samples=8, image_size=64, device="cpu")

    plan = plan_by_rule(
        resolve_model("tf_efficientnet_lite0"),
        "weight-gradient",
        {"percent": 10.0},
        sight=sight,
        wish=Wish(scheme="zero"),
    )

    written = {each.tensor for target in plan.targets for each in target.entries}
    assert "blocks.0.0.bn1.bias" in written
    assert "blocks.1.0.bn3.bias" not in written
    assert "their gradient is 0 but for rounding" in plan.evidence.note
