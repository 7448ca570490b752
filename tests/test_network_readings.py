"""Readers keep the mean of their output when units go: statistics are taken where they read."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from core.network.connections import connections_of, readings_of
from core.pipeline.planning.draft import Draft
from core.records import SchemeChoice
from tests.reader_means import embedded, from_torchvision, relative_differences
from tests.zoo import BATCH_SIZE, CLASSES, ZOO, outline_of

# Float64 throughout, so that what is left is rounding.
EXACT = 1e-9


def noise(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + 0.3


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    labels = torch.zeros(BATCH_SIZE, dtype=torch.long)
    # The last batch is a short one, as of a data set.
    return [(noise(n, 3, size, size, seed=n), labels[:n]) for n in (BATCH_SIZE, 3)]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def left_over(module: nn.Module, size: int) -> dict[str, float]:
    """Return what is not made up for, by bias or norm; something must have been lost."""
    outline = outline_of(module, size=size)
    found, untaken = relative_differences(module, outline, batches(size))
    assert found
    assert not untaken
    return found


# Every network at hand


@pytest.mark.parametrize(
    "name", sorted(set(ZOO) - {"pre_activation", "masked_vit", "multi_head"})
)  # the three have no unit behind an activation that can be removed
def test_readers_in_the_zoo_keep_their_mean(name: str) -> None:
    case = ZOO[name]
    module = case.module().double()
    rows = [(inputs.double(), labels) for inputs, labels in case.batches()]

    found, untaken = relative_differences(module, case.outline(), rows)

    assert found
    assert not untaken
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("build", [embedded, lambda: from_torchvision("squeezenet1_1", 64)])
def test_readers_in_real_architectures_keep_their_mean(build: Callable[[], Any]) -> None:
    module, outline, rows = build()
    rows = [(inputs.double(), labels) for inputs, labels in rows]

    found, untaken = relative_differences(module.double(), outline, rows)

    assert len(found) > 15
    assert not untaken
    assert max(found.values()) < EXACT, found


# Whatever lies between, and however it is read

WIDTH, SIDE = 6, 9
BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "max pool": lambda: nn.MaxPool2d(3, 2, padding=1),
    "average pool": lambda: nn.AvgPool2d(2, 1),
    "padded average pool": lambda: nn.AvgPool2d(3, 1, padding=1),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(5),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool2d(4),
    "zeros around": lambda: nn.ZeroPad2d(1),
    "ones around": lambda: nn.ConstantPad2d(1, 1.0),
    "mirrored": lambda: nn.ReflectionPad2d(1),
    "upsampled": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
    "activation": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.5),
}


class Transposed(nn.Module):
    """A linear layer over channels of a map that was only turned, not copied."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Product(nn.Module):
    """A matrix product whose bias is added by an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(2).transpose(1, 2) @ self.matrix + self.bias).transpose(1, 2)


READERS: dict[str, Callable[[], nn.Module]] = {
    "1 x 1": lambda: nn.Conv2d(WIDTH, 4, 1),
    "3 x 3": lambda: nn.Conv2d(WIDTH, 4, 3),
    "padded": lambda: nn.Conv2d(WIDTH, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(WIDTH, 4, (3, 2), stride=2, padding=(2, 0)),
    "dilated": lambda: nn.Conv2d(WIDTH, 4, 2, dilation=2, padding="same"),
    "mirrored": lambda: nn.Conv2d(WIDTH, 4, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(WIDTH, 4, 3, groups=2, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, 4, 3, stride=2, padding=1, output_padding=1),
    "norm behind": lambda: nn.Sequential(
        nn.Conv2d(WIDTH, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    ),
    "bias and norm behind": lambda: nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.BatchNorm2d(4)),
    "linear over a turned map": lambda: Transposed(bias=True),
    "product": Product,
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)),
    "mean over places": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 4)
    ),
}


class Chain(nn.Module):
    """A layer, its activation, what lies between, a reader, and a head."""

    def __init__(self, between: list[str], reader: str) -> None:
        super().__init__()
        self.maker = nn.Conv2d(3, WIDTH, 1)
        self.act = nn.ReLU()
        self.between = nn.Sequential(*(BETWEEN[each]() for each in between))
        self.reader = READERS[reader]()
        self.after = nn.Softplus()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.reader(self.between(self.act(self.maker(x)))))
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


def chain(between: list[str], reader: str) -> nn.Module:
    def build() -> nn.Module:
        module = Chain(between, reader)
        module.double().eval()(noise(1, 3, SIDE, SIDE))  # gives a lazy layer its size
        return module.train()

    return seeded(build)


@pytest.mark.parametrize("reader", sorted(READERS))
def test_every_kind_of_reader_keeps_its_mean_behind_pooling(reader: str) -> None:
    found = left_over(chain(["max pool"], reader), SIDE)

    assert max(found.values()) < EXACT, found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    between=st.lists(st.sampled_from(sorted(BETWEEN)), min_size=1, max_size=3),
    reader=st.sampled_from(sorted(READERS)),
)
def test_readers_keep_their_mean_behind_whatever_lies_between(
    between: list[str], reader: str
) -> None:
    # A single pooled map must stay large enough for every kernel above.
    if sum("pool" in each for each in between) > 1:
        between = [each for each in between if "pool" not in each] + ["max pool"]

    found = left_over(chain(between, reader), SIDE)

    assert max(found.values()) < EXACT, (between, reader, found)


class Joined(nn.Module):
    """Two layers whose units reach one reader together."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.left, self.right = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(3, WIDTH, 1)
        self.pool = nn.MaxPool2d(2)
        self.reader = nn.Conv2d(2 * WIDTH if how == "cat" else WIDTH, 4, 3, padding=1)
        self.other = nn.Linear(WIDTH, 4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.left(x)), torch.sigmoid(self.right(x))
        if self.how == "sum":
            both = self.pool(left + right)
        elif self.how == "product":
            both = self.pool(left * right)
        else:
            both = torch.cat([self.pool(left), self.pool(right)], dim=1)
        # The left units have a second reader, at another place.
        second = self.other(left.amax((2, 3))).tanh()
        return self.head(torch.cat([self.reader(both).relu().mean((2, 3)), second], dim=1))


@pytest.mark.parametrize("how", ["sum", "product", "cat"])
def test_several_units_in_one_input_and_several_readers_of_one_unit(how: str) -> None:
    found = left_over(seeded(lambda: Joined(how)), SIDE)

    assert {"reader.bias", "other.bias"} <= found.keys()
    assert max(found.values()) < EXACT, found


class Repeated(nn.Module):
    """One weight used three times: twice with one bias, once with another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.loop = nn.Linear(12, 12)
        self.again = nn.Linear(12, 12)
        self.again.weight = self.loop.weight
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        x = F.softplus(self.loop(F.softplus(self.loop(x))))
        return self.head(self.again(x).tanh())


def test_a_bias_that_several_uses_share_gets_their_mean_and_no_other() -> None:
    found = left_over(seeded(Repeated), 2)

    assert {"loop.bias", "again.bias"} <= found.keys()
    assert max(found.values()) < EXACT, found


class Encoder(nn.Module):
    """PyTorch's own encoder, whose fused pass in eval mode shows none of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Constant(nn.Module):
    """A reader whose weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Conv2d(3, WIDTH, 1)
        self.register_buffer("kernel", torch.randn(4, WIDTH, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.maker(x).relu(), 2)
        return self.head(F.conv2d(x, self.kernel, self.bias).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "taker"), [(Encoder, "encoder.linear2.bias"), (Constant, "bias")]
)
def test_products_are_seen_wherever_they_are_computed(
    build: Callable[[], nn.Module], taker: str
) -> None:
    found = left_over(seeded(build), SIDE - 1)

    assert taker in found
    assert max(found.values()) < EXACT, found


# Through the whole network


class Narrow(nn.Module):
    """Convolutions, pooling and linear layers, as the networks that the rule was made on."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, bias=not norm)
        self.norm1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 10, 3, bias=not norm)
        self.norm2 = nn.BatchNorm2d(10) if norm else nn.Identity()
        self.fc1 = nn.Linear(10 * 4, 12)
        self.fc2 = nn.Linear(12, CLASSES)
        self.pool = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm1(self.conv1(x)).relu())
        x = self.pool(self.norm2(self.conv2(x)).relu())
        return self.fc2(self.fc1(x.flatten(1)).relu())


def means_of(module: nn.Module, name: str, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean of a module's output by channel, in eval mode."""
    seen: list[Tensor] = []
    place = dict(module.named_modules())[name]
    handle = place.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    module.eval()
    with torch.no_grad():
        for inputs, _ in rows:
            module(inputs)
    handle.remove()
    return torch.cat([y.movedim(1, -1).reshape(-1, y.shape[1]) for y in seen]).mean(0)


@pytest.mark.parametrize(
    ("layer", "reader", "norm"),
    [
        ("conv1", "conv2", False),  # pooling between
        ("conv2", "fc1", False),  # pooling and flattening between
        ("fc1", "fc2", False),
        ("conv1", "norm2", True),  # no bias: the running mean takes it over
        ("conv2", "fc1", True),
    ],
)
def test_an_edited_network_shows_the_same_means_as_before(
    layer: str, reader: str, norm: bool
) -> None:
    module, rows = seeded(lambda: Narrow(norm=norm)), batches(16)
    if norm:
        with torch.no_grad():
            # Running statistics that are those of these images.
            for each in (module.norm1, module.norm2):
                each.momentum = 1.0
            module.train()(torch.cat([inputs for inputs, _ in rows]))
    wires = connections_of(module, rows[0][0][:1])
    chosen = set(wires.bundles[layer][:3].tolist())
    before = means_of(module, reader, rows)
    found = wires.shifts(chosen, readings_of(module, wires, rows), module.state_dict())
    state = module.state_dict()

    for part in wires.wiring(sorted(chosen)).outgoing:
        state[part.tensor].view(-1)[torch.from_numpy(part.entries)] = 0
    cut = means_of(module, reader, rows)
    for name, values in found.values.items():
        state[name] += torch.from_numpy(values)
    mended = means_of(module, reader, rows)

    assert float((cut - before).abs().max()) > 1e-2
    # Batches are weighted by their own statistics in front of a norm, and here by the running ones.
    tolerance = 5e-2 * float((cut - before).abs().max()) if norm else 1e-12
    assert float((mended - before).abs().max()) <= tolerance


# As the published code has it


def test_contributions_are_those_of_the_published_code() -> None:
    """Dohare et al., lop/algos/cbp_conv.py and cbp_linear.py, on the activations of one batch."""
    module, rows = seeded(Narrow), batches(16)[:1]
    x = rows[0][0]
    with torch.no_grad():
        h1 = module.pool(module.conv1(x).relu())
        h2 = module.pool(module.conv2(h1).relu())
        h3 = module.fc1(h2.flatten(1)).relu()
    weights = {name: value.abs() for name, value in module.state_dict().items()}
    places = 2 * 2
    by_place = weights["fc1.weight"].mean(0).view(-1, places)
    expected = {
        "conv1": weights["conv2.weight"].mean((0, 2, 3)) * h1.abs().mean((0, 2, 3)),
        "conv2": (by_place * h2.abs().mean(0).view(-1, places)).mean(1),
        "fc1": weights["fc2.weight"].mean(0) * h3.abs().mean(0),
    }
    wires = connections_of(module, x[:1])

    found = wires.contributions(readings_of(module, wires, rows), module.state_dict())

    for layer, utility in expected.items():
        own = found[wires.bundles[layer]]
        assert own == pytest.approx(utility.numpy(), rel=1e-12)
        assert np.array_equal(np.argsort(own), utility.argsort().numpy())


# What cannot be made up for is said


@pytest.mark.parametrize(
    ("reader", "untaken"),
    [
        (lambda: nn.Conv2d(WIDTH, 4, 1, bias=False), ("2.weight",)),
        (lambda: nn.Conv2d(WIDTH, 4, 1, bias=True), ()),
    ],
)
def test_a_reader_that_nothing_takes_over_for_is_named(
    reader: Callable[[], nn.Module], untaken: tuple[str, ...]
) -> None:
    module = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, WIDTH, 1), nn.ReLU(), reader(), nn.ReLU(), nn.Conv2d(4, 2, 1)
        )
    )
    rows = batches(4)
    wires = connections_of(module, rows[0][0][:1])

    found = wires.shifts(
        {int(wires.bundles["0"][0])}, readings_of(module, wires, rows), module.state_dict()
    )

    assert found.untaken == untaken
    assert set(found.values) == (set() if untaken else {"2.bias"})


def test_an_output_that_is_also_used_before_its_norm_has_no_running_mean_to_shift() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker = nn.Conv2d(3, WIDTH, 1)
            self.reader = nn.Conv2d(WIDTH, 4, 1, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.reader(self.maker(x).relu())
            return self.head(torch.cat([self.norm(y), y.relu()], 1).mean((2, 3)))

    module, rows = seeded(Split), batches(4)
    wires = connections_of(module, rows[0][0][:1])

    found = wires.shifts(
        {int(wires.bundles["maker"][0])}, readings_of(module, wires, rows), module.state_dict()
    )

    assert found.untaken == ("reader.weight",)
    assert not found.values


class Scaled(nn.Module):
    """A reader whose product and whose bias are scaled as they are added, and a norm behind it."""

    def __init__(self, alpha: float, beta: float, *, norm: bool) -> None:
        super().__init__()
        self.factors = {"alpha": alpha, "beta": beta}
        self.maker = nn.Conv2d(3, WIDTH, 1)
        self.matrix = nn.Parameter(torch.randn(WIDTH, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, CLASSES)

    def product(self, given: Tensor) -> Tensor:
        return torch.addmm(self.bias, given, self.matrix, **self.factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.product(self.maker(x).relu().mean((2, 3)))).tanh())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_a_bias_takes_over_only_what_is_added_as_it_is(
    alpha: float, beta: float, norm: bool
) -> None:
    module, rows = seeded(lambda: Scaled(alpha, beta, norm=norm)), batches(4)
    wires = connections_of(module, rows[0][0][:1])
    chosen = {int(each) for each in wires.bundles["maker"][:2]}
    read = torch.cat([module.maker(x).relu().mean((2, 3)) for x, _ in rows]).detach()
    state = module.state_dict()

    found = wires.shifts(chosen, readings_of(module, wires, rows), state)

    with torch.no_grad():
        before = module.product(read).mean(0)
        module.matrix[:2] = 0
        module.bias += torch.from_numpy(found.values.get("bias", np.zeros(4)))
        after = module.product(read).mean(0)
        after -= torch.from_numpy(found.values.get("norm.running_mean", np.zeros(4)))
    if alpha == 1 and (beta == 1 or norm):
        assert set(found.values) == {"bias" if beta == 1 else "norm.running_mean"}
        assert not found.untaken
        assert torch.allclose(before, after, rtol=0, atol=1e-12)
    else:
        assert not found.values
        assert found.untaken == ("matrix",)


# What else a network may do with a bias or a running mean (WIDTH,) beside a map (n, WIDTH, h, w).
ELSEWHERE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda x, b: x,
    "added": lambda x, b: x + b[:, None, None],
    "taken off": lambda x, b: x - b.view(1, -1, 1, 1),
    "added to the other side": lambda x, b: b.view(-1, 1, 1) + x,
    "scales": lambda x, b: x * b[:, None, None],
    "computed with": lambda x, b: x + b.exp().sum(),
    "one entry": lambda x, b: x * b[0],
    "turned": lambda x, b: x + b.flip(0)[:, None, None],
    "a norm's mean": lambda x, b: F.batch_norm(x, b, torch.ones_like(b)),
    "a norm's shift": lambda x, b: F.instance_norm(x, bias=b),
    "a bias": lambda x, b: F.conv2d(x, torch.ones(WIDTH, WIDTH, 1, 1, dtype=x.dtype), b),
    "a bias by channel": lambda x, b: F.conv2d(
        x, torch.ones(WIDTH, 1, 1, 1, dtype=x.dtype), b, groups=WIDTH
    ),
    "a weight": lambda x, b: F.conv2d(x, b.view(1, -1, 1, 1)).expand_as(x),
    "weights by channel": lambda x, b: F.conv2d(x, b.view(-1, 1, 1, 1), groups=WIDTH),
    "joined on": lambda x, b: torch.cat([x[:, :1], b.view(1, -1, 1, 1).expand_as(x)], 1)[:, :WIDTH],
}


class Elsewhere(nn.Module):
    """A reader whose bias, or the running mean behind it, is used once more, before or after."""

    def __init__(self, use: str, *, norm: bool, first: bool) -> None:
        super().__init__()
        self.use, self.first = ELSEWHERE[use], first
        self.maker, self.side = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 1)
        self.reader = nn.Conv2d(WIDTH, WIDTH, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        taker = self.norm.running_mean if hasattr(self.norm, "running_mean") else self.reader.bias
        side = self.side(x).sigmoid()
        if self.first:
            side = self.use(side, taker)
        read = self.norm(self.reader(self.maker(x).relu())).tanh()
        if not self.first:
            side = self.use(side, taker)
        return self.head(torch.cat([read, side.cos()], 1).mean((2, 3)))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("use", sorted(ELSEWHERE))
def test_what_is_also_used_elsewhere_takes_over_nothing(use: str, norm: bool, first: bool) -> None:
    module, rows = seeded(lambda: Elsewhere(use, norm=norm, first=first)).eval(), batches(4)
    wires = connections_of(module, rows[0][0][:1])
    chosen = {int(wires.bundles["maker"][0])}
    state = module.state_dict()

    found = wires.shifts(chosen, readings_of(module, wires, rows), state)

    alone = use == "nothing"
    assert set(found.values) == (
        {"norm.running_mean" if norm else "reader.bias"} if alone else set()
    )
    assert found.untaken == (() if alone else ("reader.weight",))


class TwoReaders(nn.Module):
    """Two readers with weights of their own that share a bias, or a norm, or parts of one bias."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.shared = shared
        self.maker, self.other = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 1)
        self.left = nn.Conv2d(WIDTH, 4, 1, bias=False)
        self.right = nn.Conv2d(WIDTH, 4, 1, bias=False)
        self.bias, self.norm = nn.Parameter(torch.randn(8)), nn.BatchNorm2d(4)
        self.single = nn.Parameter(torch.randn(1))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        given = self.maker(x).relu(), self.other(x).sigmoid()
        weights = self.left.weight, self.right.weight
        if self.shared == "norm":
            made = [self.norm(F.conv2d(x, w)) for x, w in zip(given, weights, strict=True)]
        else:
            biases = {
                "bias": (self.bias[:4], self.bias[:4]),
                "overlap": (self.bias[:4], self.bias[2:6]),
                "parts": (self.bias[:4], self.bias[4:]),
                "pieces": self.bias.chunk(2),
                "one number": (self.single.expand(4), None),
            }[self.shared]
            rows = zip(given, weights, biases, strict=True)
            made = [F.conv2d(x, w, b) for x, w, b in rows]
        return self.head((made[0].tanh() + made[1].tanh()).mean((2, 3)))


@pytest.mark.parametrize("shared", ["norm", "bias", "overlap", "one number", "parts", "pieces"])
def test_readers_of_other_weights_share_nothing_that_takes_over(shared: str) -> None:
    module, rows = seeded(lambda: TwoReaders(shared)), batches(4)
    wires = connections_of(module, rows[0][0][:1])
    chosen = {int(wires.bundles["maker"][0])}

    found = wires.shifts(chosen, readings_of(module, wires, rows), module.state_dict())

    if shared in ("parts", "pieces"):
        assert not found.untaken
        assert np.flatnonzero(found.values["bias"]).tolist() == [0, 1, 2, 3]
    else:
        assert found.untaken == ("left.weight",)
        assert not found.values


def test_weights_whose_uses_change_from_batch_to_batch_are_not_guessed_at() -> None:
    class Wavering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.loop = nn.Linear(3, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            images = len(x)
            x = self.first(x.mean((2, 3))).relu()
            for _ in range(1 if images < BATCH_SIZE else 2):
                x = self.loop(x).relu()
            return self.head(x)

    module, rows = seeded(Wavering), batches(4)
    wires = connections_of(module, rows[0][0][:1])
    readings = readings_of(module, wires, rows)

    found = wires.contributions(readings, module.state_dict())
    shifts = wires.shifts({int(wires.bundles["first"][0])}, readings, module.state_dict())

    assert np.isnan(found[wires.bundles["first"]]).all()
    assert shifts.untaken == ("loop.weight",)
    assert "loop.bias" not in shifts.values


@pytest.mark.parametrize("affine", [True, False])
def test_the_running_mean_of_a_norm_without_parameters_stands_under_a_layer(affine: bool) -> None:
    module = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, WIDTH, 1, bias=False),
            nn.BatchNorm2d(WIDTH, affine=affine),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 4, 1, bias=False),
            nn.BatchNorm2d(4, affine=affine),
            nn.ReLU(),
            nn.Conv2d(4, CLASSES, 3),
            nn.Flatten(),
        )
    )
    rows = batches(3)
    outline = outline_of(module, size=3, head=frozenset())
    wires = connections_of(module, rows[0][0][:1])
    chosen = {int(wires.bundles["0"][1])}
    state = module.state_dict()
    shifts = wires.shifts(chosen, readings_of(module, wires, rows), state)
    subject = SimpleNamespace(state=state, connections=wires, outline=outline)

    targets = Draft(subject, SchemeChoice(name="architecture"), 0).units(chosen, shifts.values)  # type: ignore[arg-type]

    home = {name: target.layer for target in targets for name in target.buffers}
    assert home["1.running_mean"] == ("1" if affine else "0")
    assert home["4.running_mean"] == ("4" if affine else "3")


def test_constants_that_no_plan_can_name_are_left_alone() -> None:
    case = ZOO["frozen_norm"]
    module, outline = case.module(), case.outline()
    wires = connections_of(module, case.batches()[0][0][:1])
    subject = SimpleNamespace(state=module.state_dict(), connections=wires, outline=outline)

    targets = Draft(subject, SchemeChoice(name="architecture"), 0).units(  # type: ignore[arg-type]
        {int(wires.bundles["second"][1])}
    )

    named = {name for target in targets for name in (*target.parameters, *target.buffers)}
    assert named == {"second.weight", "head.weight"}


# The pass itself


def test_memory_formats_and_split_batches_change_nothing_but_rounding() -> None:
    module = seeded(Narrow)
    inputs = noise(6, 3, 16, 16)
    wires = connections_of(module, inputs[:1])
    labels = torch.zeros(6, dtype=torch.long)
    whole = readings_of(module, wires, [(inputs, labels)])

    split = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    layout = torch.channels_last
    module.to(memory_format=layout)
    turned = [(each.contiguous(memory_format=layout), labels) for each, labels in split]
    found = readings_of(module, wires, turned)

    assert found.keys() == whole.keys()
    for place, (one,) in found.items():
        (other,) = whole[place]
        assert np.allclose(one.mean, other.mean, rtol=1e-12)
        assert np.allclose(one.mean_abs, other.mean_abs, rtol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_reading_leaves_the_network_as_it_was(fails: bool) -> None:
    case = ZOO["residual_cnn"]
    module = case.module()
    wires = connections_of(module, case.batches()[0][0][:1])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [each.training for each in module.modules()]
    rows = case.batches()
    if fails:
        rows.append((torch.zeros(1, 4, 6, 6), torch.zeros(1, dtype=torch.long)))

    if fails:
        with pytest.raises(RuntimeError):
            readings_of(module, wires, rows)
    else:
        readings_of(module, wires, rows)

    assert flags == [each.training for each in module.modules()]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert torch.backends.mha.get_fastpath_enabled()
