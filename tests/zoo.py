"""Tiny networks, one for each habit of real ones that a measurement can trip over.

What each test expects of a network is written here by hand, beside it: the running order of its
layers and the activation that each of them feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.outline import outline_module
from core.records import LayerInfo, ModelCard, ModelOutline, ModelSpec, Preprocessing

CLASSES = 4
BATCHES = 2
BATCH_SIZE = 4


class ResidualBlock(nn.Module):
    """Two convolutions, an in-place addition, and one in-place ReLU called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.act(out)


class ResidualCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Defined out of running order on purpose.
        self.head = nn.Linear(6, CLASSES)
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.block = ResidualBlock(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.act(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, squeezed, 1)
        self.act = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(squeezed, width, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(squeezed))))


class DepthwiseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 6, 3, groups=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.act1 = nn.ReLU6(inplace=True)
        self.squeeze = SqueezeExcite(6, 3)
        self.pointwise = nn.Conv2d(6, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.act2 = nn.Hardswish(inplace=True)
        self.head = nn.Linear(8, CLASSES)
        # Wide enough for both flat parts of ReLU6 and of Hardswish to be met.
        nn.init.constant_(self.norm1.weight, 4.0)
        nn.init.constant_(self.norm1.bias, 3.0)
        nn.init.constant_(self.norm2.weight, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(self.act1(self.norm1(self.depthwise(x))))
        x = self.act2(self.norm2(self.pointwise(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, 2)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Inner(nn.Module):
    """Calls its activation as a function, so that no module stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.lin(x))


class FunctionalNet(nn.Module):
    """Functional activations, one module used twice, units planted dead, dormant and unasked."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.second = nn.Conv2d(5, 5, 3, stride=2)
        self.third = nn.Linear(5, 7)
        self.act = nn.ReLU()
        self.inner = Inner()
        self.head = nn.Linear(6, CLASSES)
        with torch.no_grad():
            self.first.bias[1] = -50.0
            self.second.weight[2] *= 1e-3
            self.second.bias[2] = 1e-3
            self.second.bias[[0, 1, 3, 4]] = 0.5
            self.third.weight *= 2.0
            self.head.weight[:, 2] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(F.relu(self.first(x))))
        x = self.inner(self.act(self.third(x.mean((2, 3)))))
        return self.head(x)


class FrozenNet(nn.Module):
    """Its first layer is frozen, so no gradient reaches it, and a middle one, which passes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.act1 = nn.Tanh()
        self.second = nn.Linear(4, 6)
        self.act2 = nn.ELU()
        self.third = nn.Linear(6, 5)
        self.act3 = nn.Sigmoid()
        self.head = nn.Linear(5, CLASSES)
        with torch.no_grad():
            self.first.weight *= 8.0
            self.second.weight *= 8.0
            self.third.weight *= 6.0
        self.first.requires_grad_(False)
        self.third.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.first(x)).mean((2, 3))
        return self.head(self.act3(self.third(self.act2(self.second(x)))))


class TiedNet(nn.Module):
    """Two layers with one weight, one layer called twice, an output overwritten after it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(12, 12)
        self.right = nn.Linear(12, 12)
        self.right.weight = self.left.weight
        self.loop = nn.Linear(12, 12)
        self.act = nn.Tanh()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.left(x.flatten(1)))
        x = F.silu(self.right(x))
        x *= 2.0
        for _ in range(2):
            x = F.softplus(self.loop(x))
        return self.head(x)


class FixedNorm(nn.Module):
    """A norm of constants, as detection backbones have: running statistics, no parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.linspace(-0.5, 0.5, width))
        self.register_buffer("running_var", torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        return (x - self.running_mean.view(shape)) / self.running_var.view(shape).sqrt()


class FrozenNormNet(nn.Module):
    """A BatchNorm left in eval mode while the rest trains, and a norm of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act1 = nn.ReLU()
        self.second = nn.Conv2d(4, 6, 3, bias=False)
        self.fixed = FixedNorm(6)
        self.act2 = nn.GELU(approximate="tanh")
        self.head = nn.Linear(6, CLASSES)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1.0, 1.0)
            self.norm.running_var.uniform_(0.5, 2.0)
            self.norm.weight.uniform_(0.5, 1.5)
            self.second.weight *= 3.0
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm(self.first(x)))
        x = self.act2(self.fixed(self.second(x)))
        return self.head(x.mean((2, 3)))


class Pair(nn.Module):
    """Returns its result and its input, as modules with a cache do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 12) * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), x


class TupleNet(nn.Module):
    """A module that returns a tuple, and a layer that no forward pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(5, 5)
        self.pair = Pair()
        self.act = nn.Mish()
        self.head = nn.Linear(17, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        result, same = self.pair(x.flatten(1))
        return self.head(torch.cat([self.act(result), same], dim=1))


class PreActivationNet(nn.Module):
    """A norm behind an addition: it is the norm itself that feeds the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.skip = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, CLASSES)
        with torch.no_grad():
            self.norm.bias.copy_(torch.linspace(-3.0, 3.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x) + self.skip(x)))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One network of the zoo.

    Attributes:
        build: Makes it.
        size: Side of its images.
        order: Its layers in running order, parameters of the root first.
        feeds: Layer to the name of the activation it feeds.
        coupled: Layer to the buffers that describe its output.
        seed: Of weights and images; chosen so that no pre-activation lies on an edge.
    """

    build: Callable[[], nn.Module]
    size: int
    order: tuple[str, ...]
    feeds: Mapping[str, str]
    coupled: Mapping[str, tuple[str, ...]]
    seed: int = 0

    def module(self) -> nn.Module:
        """Return the network, the same at each call, in train mode but for frozen norms."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.build().train()
        for each in module.modules():
            weight = getattr(each, "weight", None)
            if isinstance(each, nn.BatchNorm2d) and weight is not None:
                each.train(weight.requires_grad)
        return module

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the batches it is measured on, the same at each call."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        return [
            (
                torch.randn((BATCH_SIZE, 3, self.size, self.size), generator=generator),
                torch.randint(CLASSES, (BATCH_SIZE,), generator=generator),
            )
            for _ in range(BATCHES)
        ]

    def outline(self) -> ModelOutline:
        """Return its outline."""
        return outline_of(self.module(), size=self.size)


def statistics(norm: str) -> tuple[str, str, str]:
    """Return the names of a BatchNorm's buffers."""
    return (f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.num_batches_tracked")


ZOO: Mapping[str, Case] = {
    "residual_cnn": Case(
        build=ResidualCnn,
        size=6,
        order=(
            *("stem", "norm", "block.conv1", "block.norm1", "block.conv2", "block.norm2"),
            "head",
        ),
        feeds={"stem": "act", "block.conv1": "block.act", "block.conv2": "block.act#2"},
        coupled={
            "stem": statistics("norm"),
            "block.conv1": statistics("block.norm1"),
            "block.conv2": statistics("block.norm2"),
        },
    ),
    "depthwise": Case(
        build=DepthwiseNet,
        size=6,
        order=(
            *("depthwise", "norm1", "squeeze.reduce", "squeeze.expand"),
            *("pointwise", "norm2", "head"),
        ),
        feeds={
            "depthwise": "act1",
            "squeeze.reduce": "squeeze.act",
            "squeeze.expand": "squeeze.gate",
            "pointwise": "act2",
        },
        coupled={"depthwise": statistics("norm1"), "pointwise": statistics("norm2")},
    ),
    "vit": Case(
        build=TinyVit,
        size=8,
        order=(
            *("cls_token", "pos_embed", "patch"),
            *(
                f"blocks.{block}.{layer}"
                for block in (0, 1)
                for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            ),
            *("norm", "head"),
        ),
        feeds={f"blocks.{block}.mlp.fc1": f"blocks.{block}.mlp.act" for block in (0, 1)},
        coupled={},
    ),
    "functional": Case(
        build=FunctionalNet,
        size=8,
        order=("first", "second", "third", "inner.lin", "head"),
        feeds={
            "first": "relu",
            "second": "act",
            "third": "act#2",
            "inner.lin": "inner:silu",
        },
        coupled={},
    ),
    "frozen": Case(
        build=FrozenNet,
        size=6,
        order=("first", "second", "third", "head"),
        feeds={"first": "act1", "second": "act2", "third": "act3"},
        coupled={},
    ),
    "tied": Case(
        build=TiedNet,
        size=2,
        order=("left", "right", "loop", "head"),
        feeds={"left": "act", "right": "silu", "loop": "softplus"},
        coupled={},
    ),
    "frozen_norm": Case(
        build=FrozenNormNet,
        size=7,
        order=("first", "norm", "second", "head"),
        feeds={"first": "act1", "second": "act2"},
        coupled={"first": statistics("norm")},
    ),
    "tuple": Case(
        build=TupleNet,
        size=2,
        order=("pair", "head", "spare"),
        feeds={"pair": "act"},
        coupled={},
    ),
    "pre_activation": Case(
        build=PreActivationNet,
        size=7,
        order=("conv", "skip", "norm", "head"),
        feeds={"norm": "act"},
        coupled={},
    ),
}


def outline_of(
    module: nn.Module, *, size: int, head: frozenset[str] = frozenset({"head.weight", "head.bias"})
) -> ModelOutline:
    """Return the outline of any network that takes square images of that side."""
    card = ModelCard(
        spec=ModelSpec(source="timm", name="tiny", weights="none"),
        title="tiny",
        classes=CLASSES,
        pretrained_classes=None,
        backbone_sha256="0" * 64,
        preprocessing=Preprocessing(
            image_size=size, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        ),
        native_size=size,
        default_size=size,
        default_lr=1e-3,
    )
    return outline_module(module, card, head)


def layer(outline: ModelOutline, name: str) -> LayerInfo:
    """Return the layer of that name; there must be one."""
    found = outline.layer(name)
    assert found is not None, f"no layer {name!r} in {[each.name for each in outline.layers]}"
    return found
