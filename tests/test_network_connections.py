"""Units hang together as the network's own arithmetic says, and resets touch nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from core.errors import PlanError
from core.network.connections import Connections, connections_of
from tests.zoo import ZOO


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in float64 and eval mode, with nothing in it exactly 0 or 1."""
    noise = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, each in [*module.named_parameters(), *module.named_buffers()]:
            if each.is_floating_point():
                drawn = torch.rand(each.shape, generator=noise, dtype=torch.float64)
                each.copy_(drawn + 0.5 if name.endswith("running_var") else 0.6 * drawn - 0.2)
    return module


def run(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = module(inputs)
    return output if isinstance(output, Tensor) else output[0]


def write(module: nn.Module, parts: object, value: float | None) -> None:
    """Write a value, or noise, into the entries of some tensors."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in parts:  # type: ignore[attr-defined]
            entries = torch.from_numpy(part.entries)
            drawn = torch.rand(len(entries), generator=noise, dtype=torch.float64) + 0.5
            flat = state[part.tensor].reshape(-1).clone()
            flat[entries] = drawn if value is None else value
            state[part.tensor].copy_(flat.reshape(state[part.tensor].shape))


def assert_units_are_cut_off(module: nn.Module, size: int, share: float = 0.2) -> Connections:
    """Zero what reads some units; whatever makes them must then not matter at all."""
    module = alive(module)
    found = connections_of(module, torch.rand(1, 3, size, size, dtype=torch.float64))
    bundles = sorted({int(b) for of in found.bundles.values() for b in of if found.free(int(b))})
    assert bundles
    picked = random.Random(0).sample(bundles, max(1, int(share * len(bundles))))
    wiring = found.wiring(picked)
    inputs = torch.rand(
        (2, 3, size, size), generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    whole = run(module, inputs)

    write(module, wiring.incoming, None)
    write(module, [part for _, part in wiring.vectors], None)
    write(module, wiring.outgoing, 0.0)
    once = run(module, inputs)
    write(module, wiring.incoming, 5.0)
    write(module, [part for _, part in wiring.vectors], 3.0)
    write(module, wiring.outgoing, 0.0)
    twice = run(module, inputs)

    assert not torch.allclose(whole, once)  # the units did something
    assert torch.equal(once, twice)
    return found


# One linear map after another through which no unit passes: there is nothing to reset in them.
WITHOUT_FREE_UNITS = {"tuple", "multi_head"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - WITHOUT_FREE_UNITS))
def test_what_is_cut_off_no_longer_matters_in_the_zoo(name: str) -> None:
    assert_units_are_cut_off(ZOO[name].build(), ZOO[name].size)


@pytest.mark.parametrize(
    ("library", "name", "size"),
    [
        ("timm", "resnet18", 64),
        ("timm", "mobilenetv2_100", 64),  # depthwise convolutions and inverted residuals
        ("timm", "efficientnet_b0", 64),  # squeeze-excitation
        ("timm", "vit_tiny_patch16_224", 224),  # fused queries, keys and values
        ("timm", "swin_tiny_patch4_window7_224", 224),  # shifted windows
        ("timm", "convnext_atto", 64),
        ("torchvision", "densenet121", 64),  # concatenations
        ("torchvision", "shufflenet_v2_x0_5", 64),  # channel shuffles
        ("torchvision", "googlenet", 64),
        ("torchvision", "regnet_x_400mf", 64),  # grouped convolutions
    ],
)
def test_what_is_cut_off_no_longer_matters_in_real_architectures(
    library: str, name: str, size: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = (
            timm.create_model(name)
            if library == "timm"
            else torchvision.models.get_model(
                name, weights=None, **({"init_weights": False} if name == "googlenet" else {})
            )
        )

    found = assert_units_are_cut_off(module, size, share=0.05)

    units = sum(len(of) for of in found.bundles.values())
    free = sum(found.free(int(b)) for of in found.bundles.values() for b in of)
    assert free > 0.5 * units


def connections(name: str) -> Connections:
    case = ZOO[name]
    module = case.module()
    return connections_of(module, torch.rand(1, 3, case.size, case.size))


def test_a_residual_sum_ties_the_layers_it_adds() -> None:
    found = connections("residual_cnn")

    assert np.array_equal(found.bundles["stem"], found.bundles["block.conv2"])
    assert not set(found.bundles["stem"]) & set(found.bundles["block.conv1"])
    assert found.members([int(found.bundles["stem"][2])]) == {"stem": (2,), "block.conv2": (2,)}


def test_a_unit_has_its_norm_and_its_readers() -> None:
    found = connections("residual_cnn")

    wiring = found.wiring([int(found.bundles["block.conv1"][4])])

    rows = np.arange(6 * 6 * 9).reshape(6, 6, 9)
    assert [part.tensor for part in wiring.incoming] == ["block.conv1.weight"]
    assert np.array_equal(wiring.incoming[0].entries, rows[4].ravel())
    assert {(role, part.tensor): part.entries.tolist() for role, part in wiring.vectors} == {
        ("norm_scale", "block.norm1.weight"): [4],
        ("norm_shift", "block.norm1.bias"): [4],
        ("norm_mean", "block.norm1.running_mean"): [4],
        ("norm_var", "block.norm1.running_var"): [4],
    }
    assert [part.tensor for part in wiring.outgoing] == ["block.conv2.weight"]
    assert np.array_equal(wiring.outgoing[0].entries, np.sort(rows[:, 4].ravel()))


def test_a_depthwise_channel_goes_on_and_is_not_cut_within() -> None:
    found = connections("depthwise")
    unit = int(found.bundles["depthwise"][1])

    wiring = found.wiring([unit])

    outgoing = {part.tensor for part in wiring.outgoing}
    # What squeezes and what comes next read the channel; the gate's own row belongs to it.
    assert outgoing == {"squeeze.reduce.weight", "pointwise.weight"}
    assert "squeeze.expand.weight" in {part.tensor for part in wiring.incoming}


def test_an_attention_head_is_one_unit() -> None:
    found = connections("vit")
    of = found.bundles["blocks.0.attn.qkv"]
    width = len(of) // 3
    heads = len(np.unique(of))

    assert heads == 2
    assert np.array_equal(of[:width], of[width : 2 * width])
    assert np.array_equal(of[:width], of[2 * width :])
    wiring = found.wiring([int(of[0])])
    assert [part.tensor for part in wiring.outgoing] == ["blocks.0.attn.proj.weight"]


def test_channels_that_a_layer_norm_takes_together_are_refused_with_its_name() -> None:
    found = connections("vit")

    reason = found.reasons[int(found.bundles["blocks.0.mlp.fc2"][0])]

    assert reason == 'its units cannot be told apart, being tied by the norm "blocks.0.norm1"'
    assert not found.free(int(found.bundles["patch"][0]))
    assert found.free(int(found.bundles["blocks.0.mlp.fc1"][0]))


def test_the_outputs_are_no_units_to_reset() -> None:
    found = connections("residual_cnn")

    assert found.reasons[int(found.bundles["head"][0])] == "its units are the network's outputs"


def test_a_gate_and_what_it_gates_are_one_unit() -> None:
    found = connections("swiglu")

    assert np.array_equal(found.bundles["gate"], found.bundles["value"])


def test_groups_of_a_group_norm_hang_together() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten()
    )

    found = connections_of(module, torch.rand(1, 3, 4, 4))

    of = found.bundles["0"]
    assert of[0] == of[1] != of[2] == of[3] != of[4] == of[5]


def test_a_flattened_image_is_read_place_by_place() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)
    )

    found = connections_of(module, torch.rand(1, 3, 2, 2))

    wiring = found.wiring([int(found.bundles["0"][1])])
    columns = np.arange(24).reshape(3, 8)[:, 4:]
    assert [part.tensor for part in wiring.outgoing] == ["3.weight"]
    assert np.array_equal(wiring.outgoing[0].entries, np.sort(columns.ravel()))


def test_grouped_convolutions_read_their_own_part() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )

    found = connections_of(module, torch.rand(1, 3, 2, 2))

    wiring = found.wiring([int(found.bundles["0"][3])])  # the second input of the second group
    weight = np.arange(12).reshape(6, 2)
    assert np.array_equal(wiring.outgoing[0].entries, np.sort(weight[3:, 1]))


class Standardised(nn.Conv2d):
    """A convolution whose weight is computed at each pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight)


def test_units_beside_a_computed_weight_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Standardised(4, 4, 1), nn.ReLU())

    found = connections_of(module, torch.rand(1, 3, 4, 4))

    reason = found.reasons[int(found.bundles["0"][0])]
    assert reason == "a weight that is computed from 2.weight stands beside them"
    with pytest.raises(PlanError, match='"2" makes no units'):
        found.units_of("2")


class AddedAtOnce(nn.Module):
    """A product that is added to something in one operation, plain or batched."""

    def __init__(self, *, batched: bool, alpha: float, beta: float) -> None:
        super().__init__()
        self.batched, self.factors = batched, {"alpha": alpha, "beta": beta}
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 5)
        self.matrix, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (layer(x.mean((2, 3))).relu() for layer in (self.left, self.right))
        if not self.batched:
            return self.head(torch.addmm(left, right, self.matrix, **self.factors).relu())
        both = left[:, :, None], left[:, None]
        return self.head(torch.baddbmm(right.mean(1)[:, None, None], *both, **self.factors).sum(1))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.0, 0.5), (1.0, -2.0)])
def test_units_to_which_a_product_is_added_go_on_with_it(alpha: float, beta: float) -> None:
    module = AddedAtOnce(batched=False, alpha=alpha, beta=beta)

    found = assert_units_are_cut_off(module, 3)

    # The right units are what the matrix reads; the left ones are made as its own are.
    assert np.array_equal(found.bundles["left"], found.bundles["matrix"])
    assert not set(found.bundles["left"]) & set(found.bundles["right"])


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.0, 0.5)])
def test_units_to_which_a_batched_product_is_added_go_on_with_it(alpha: float, beta: float) -> None:
    found = connections_of(
        AddedAtOnce(batched=True, alpha=alpha, beta=beta), torch.rand(2, 3, 3, 3)
    )

    # One number is added to all: nothing on either side can be reset alone.
    assert set(found.bundles["left"]) == set(found.bundles["right"])
    assert not any(found.free(int(each)) for each in found.bundles["right"])


@pytest.mark.parametrize("scaled", [False, True])
def test_units_that_a_batched_product_takes_to_weights_are_refused(scaled: bool) -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.matrix, self.bias = nn.Parameter(torch.randn(1, 4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            given = self.maker(x.mean((2, 3))).relu()[None]
            factors = {"alpha": 2.0, "beta": 0.5} if scaled else {}
            return self.head(torch.baddbmm(self.bias, given, self.matrix, **factors)[0].relu())

    found = connections_of(Batched(), torch.rand(1, 3, 3, 3))

    reasons = {found.reasons.get(int(each)) for each in found.bundles["maker"]}
    operation = "a product with a batch of weights"
    assert reasons == {f"they go through {operation}, of which it is not known what reads what"}


def test_an_operation_that_is_not_known_is_named() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(dim=1).values

    module = nn.Sequential(nn.Conv2d(3, 4, 1), Sorted(), nn.Conv2d(4, 2, 1))

    found = connections_of(module, torch.rand(1, 3, 4, 4))

    reason = found.reasons[int(found.bundles["0"][0])]
    assert reason == "they go through sort, of which it is not known what reads what"


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda z: z > 0.1,
    "not": lambda z: ~(z > 0.1),
    "uint8": lambda z: (9 * z).to(torch.uint8),
    "int32": lambda z: (9 * z).int(),
    "int64": lambda z: (9 * z).long(),
    "bfloat16": lambda z: z.bfloat16(),
    "float32": lambda z: z.float(),
    "float64": lambda z: z,
}
# From (n, 6, 4, 4) to any shape with all units somewhere, for a mask and what it masks alike.
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "flatten": lambda x: x.flatten(2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "cat": lambda x: torch.cat([x, x[:, :2]], dim=1),
    "stack": lambda x: torch.stack([x, x], dim=1),
    "split": lambda x: torch.cat(x.split([1, 5], dim=1)[::-1], dim=1),
    "chunk": lambda x: x.chunk(2, dim=1)[0] * x.chunk(2, dim=1)[1],
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "expand": lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1),
    "pad": lambda x: nn.functional.pad(x, (1, 0, 0, 1), value=0),
    "index": lambda x: x[:, [4, 0, 2, 5, 1, 3, 0]],
    "index by mask": lambda x: x[:, :, torch.tensor([True, False, True, True])],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1, 3, 5, 0, 2, 4])),
    "select": lambda x: x.select(3, 0),
    "unbind": lambda x: x.unbind(2)[1],
}


class Masked(nn.Module):
    """Units that another layer's units let through."""

    def __init__(self, mask: str, moved: str) -> None:
        super().__init__()
        self.mask, self.moved = MASKS[mask], MOVED[moved]
        self.first, self.gate = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.moved(self.mask(self.gate(x).relu()))
        return self.head((self.moved(self.first(x).relu()) * gate).flatten(1).to(x.dtype))


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("moved", sorted(MOVED))
def test_units_are_followed_through_every_dtype_and_move(mask: str, moved: str) -> None:
    module = Masked(mask, moved)
    module.double()(torch.rand(1, 3, 4, 4, dtype=torch.float64))  # gives the head its size

    found = assert_units_are_cut_off(module, 4, share=1.0)

    assert np.array_equal(found.bundles["first"], found.bundles["gate"])


CHOSEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, z: x[:, (9 * z[0]).long() % 6],
    "index by mask": lambda x, z: x[:, z[0] > z[0].min()],
    "index of a constant": lambda x, z: x * torch.arange(60.0)[(9 * z).long() % 60],
    "index_select": lambda x, z: x.index_select(1, (9 * z[0]).long() % 6),
}


@pytest.mark.parametrize("how", sorted(CHOSEN))
def test_units_that_say_what_is_taken_are_refused(how: str) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.chooser = nn.Linear(3, 6), nn.Linear(3, 6)
            self.head = nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            first, chooser = (layer(x.mean((2, 3))) for layer in (self.first, self.chooser))
            return self.head(CHOSEN[how](first.relu(), chooser.sigmoid()))

    module, inputs = Chosen(), torch.rand(1, 3, 2, 2)
    module(inputs)

    found = connections_of(module, inputs)

    reasons = {found.reasons.get(int(each)) for each in found.bundles["chooser"]}
    operation = "index_select" if how == "index_select" else "index"
    assert reasons == {f"they go through {operation}, of which it is not known what reads what"}


def test_a_layer_used_twice_is_reset_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.loop = nn.Linear(3, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1)[:, :3]).relu()
            return self.last(self.loop(self.loop(x).relu()).relu())

    found = connections_of(Twice(), torch.rand(1, 3, 1, 1))

    assert np.array_equal(found.bundles["first"], found.bundles["loop"])


def test_scores_count_where_a_unit_is_read() -> None:
    found = connections("residual_cnn")
    stem, inner = found.bundles["stem"], found.bundles["block.conv1"]
    low, high = np.zeros(6), np.ones(6)

    scores = found.scores({"stem": low, "block.conv1": low, "block.conv2": high})

    # The block reads the stem alone (0); the head reads the sum, of which one part is alive.
    assert (scores[inner] == 0).all()
    assert (scores[stem] == 1).all()
    unknown = found.scores({"block.conv1": low})
    assert np.isnan(unknown[stem]).all()


def test_the_network_is_left_as_it_was() -> None:
    module = ZOO["residual_cnn"].module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [each.training for each in module.modules()]

    connections_of(module, torch.rand(1, 3, 6, 6))

    assert flags == [each.training for each in module.modules()]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_network_that_cannot_be_traced_says_so() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                return x
            return self.lin(x.mean((2, 3)))

    with pytest.raises(PlanError, match="connections cannot be traced"):
        connections_of(Choosy(), torch.rand(1, 3, 2, 2))
