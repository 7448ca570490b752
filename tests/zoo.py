"""Tiny networks, one for each habit of real ones that a measurement can trip over.

What each test expects of a network is written here by hand, beside it: the running order of its
layers and the activation that each of them feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.network.outline import outline_module
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


class HardGates(nn.Module):
    """Bounded activations made of straight lines, and a gate by hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.act1 = nn.Hardtanh(-1.0, 1.0, inplace=True)
        self.gate = nn.Conv2d(6, 6, 1)
        self.act2 = nn.Hardsigmoid(inplace=True)
        self.second = nn.Linear(6, 5)
        self.head = nn.Linear(5, CLASSES)
        with torch.no_grad():
            self.gate.weight *= 20.0
            self.second.weight *= 4.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.first(x))
        x = x * self.act2(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.softsign(self.second(x.mean((2, 3)))))


class MaskedAttention(nn.Module):
    """Fused attention whose mask is added, boolean or causal, keys and values apart."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        with torch.no_grad():
            self.q.weight *= 3.0
            self.kv.weight *= 3.0
        self.register_buffer("added", torch.randn(heads, 4, 4), persistent=False)
        seen = torch.eye(4, dtype=torch.bool)
        self.register_buffer("seen", seen | seen.roll(1, 0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q = self.q(x).reshape(n, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(n, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.kind == "causal":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.kind == "added":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.added, scale=0.5)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, self.seen)
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))


class MaskedVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.added = MaskedAttention(8, 2, "added")
        self.hidden = MaskedAttention(8, 2, "hidden")
        self.causal = MaskedAttention(8, 2, "causal")
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for each in (self.added, self.hidden, self.causal):
            x = x + each(x)
        return self.head(x.mean(1))


class MultiHeadVit(nn.Module):
    """PyTorch's own attention module, whose projections no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)
        with torch.no_grad():
            self.attn.in_proj_weight *= 3.0
            self.attn.in_proj_bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attn(x, x, x, need_weights=False)
        return self.head((x + mixed).mean(1))


class WindowAttention(nn.Module):
    """Attention written out, as older and windowed transformers do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)
        with torch.no_grad():
            self.qkv.weight *= 3.0

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = self.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class WindowedNet(nn.Module):
    """Windows of 2 x 2 tokens on the batch axis: four entries an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.attn = WindowAttention(8, 2)
        self.fc1 = nn.Linear(8, 12)
        self.act = nn.SiLU(inplace=True)
        self.fc2 = nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        n, width, height, breadth = x.shape
        x = x.reshape(n, width, height // 2, 2, breadth // 2, 2)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, width)
        x = x + self.attn(x)
        x = x + self.fc2(self.act(self.fc1(x)))
        return self.head(x.reshape(n, -1, width).mean(1))


class SwiGlu(nn.Module):
    """A gate by SiLU, its matrices wide enough for a power law to be fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 24)
        self.gate = nn.Linear(24, 32)
        self.value = nn.Linear(24, 32)
        self.act = nn.SiLU()
        self.out = nn.Linear(32, 24)
        self.head = nn.Linear(24, CLASSES)
        with torch.no_grad():
            # A heavy tail, as training leaves.
            self.value.weight *= torch.linspace(0.1, 1.5, 32)[:, None] ** 3
            self.gate.weight *= 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        gate = self.gate(x)
        return self.head(x + self.out(self.act(gate) * self.value(x)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One network of the zoo.

    Attributes:
        build: Makes it.
        size: Side of its images.
        order: Its layers in running order, parameters of the root first.
        feeds: Layer to the name of the activation it feeds.
        coupled: Layer to the buffers that describe its output.
        asks: Layer to the site of the attention whose queries it makes.
        seed: Of weights and images; chosen so that no pre-activation lies on an edge.
    """

    build: Callable[[], nn.Module]
    size: int
    order: tuple[str, ...]
    feeds: Mapping[str, str]
    coupled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asks: Mapping[str, str] = field(default_factory=dict)
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


MASKS = ("added", "hidden", "causal")

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
        asks={f"blocks.{block}.attn.qkv": f"blocks.{block}.attn:attention" for block in (0, 1)},
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
    ),
    "frozen": Case(
        build=FrozenNet,
        size=6,
        order=("first", "second", "third", "head"),
        feeds={"first": "act1", "second": "act2", "third": "act3"},
    ),
    "tied": Case(
        build=TiedNet,
        size=2,
        order=("left", "right", "loop", "head"),
        feeds={"left": "act", "right": "silu", "loop": "softplus"},
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
    ),
    "pre_activation": Case(
        build=PreActivationNet,
        size=7,
        order=("conv", "skip", "norm", "head"),
        feeds={"norm": "act"},
    ),
    "hard_gates": Case(
        build=HardGates,
        size=4,
        order=("first", "gate", "second", "head"),
        feeds={"first": "act1", "gate": "act2", "second": "softsign"},
    ),
    "masked_vit": Case(
        build=MaskedVit,
        size=4,
        order=(
            "patch",
            *(f"{kind}.{part}" for kind in MASKS for part in ("q", "kv", "proj")),
            "head",
        ),
        feeds={},
        asks={f"{kind}.q": f"{kind}:attention" for kind in MASKS},
    ),
    "multi_head": Case(
        build=MultiHeadVit,
        size=4,
        order=("patch", "attn", "attn.out_proj", "head"),
        feeds={},
        asks={"attn": "attn:attention"},
    ),
    "windowed": Case(
        build=WindowedNet,
        size=8,
        order=("patch", "attn.qkv", "attn.proj", "fc1", "fc2", "head"),
        feeds={"fc1": "act"},
        asks={"attn.qkv": "attn.softmax:attention"},
    ),
    "swiglu": Case(
        build=SwiGlu,
        size=2,
        order=("embed", "gate", "value", "out", "head"),
        feeds={"gate": "act"},
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
