"""The slow truth: every figure of a measurement again, in float64, with plain autograd.

Nothing here watches a network. Each forward pass of the zoo is written out by hand and hands out
what it computes on the way; each activation is its formula; each figure is its definition, row by
row where that is the plainest. Nothing comes from the rooms that are checked against it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

SATURATION_EPS = 0.01
DORMANT_TAU = 0.025
NEAR_ZERO = 1e-3
NEAR_ZERO_OUTPUT = 0.05
RARELY_ACTIVE = 0.01
# Positions of one image at which outputs and attention are looked at.
POSITIONS = 8
# More rows than the zoo has are thinned out before their rank is taken.
MOST_ROWS = 256

Formula = Callable[[Tensor], Tensor]


def relu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, torch.zeros_like(z))


def relu6(z: Tensor) -> Tensor:
    return torch.where(z >= 6, torch.full_like(z, 6.0), relu(z))


def hardswish(z: Tensor) -> Tensor:
    return z * relu6(z + 3) / 6


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def tanh(z: Tensor) -> Tensor:
    return 2 * sigmoid(2 * z) - 1


def silu(z: Tensor) -> Tensor:
    return z * sigmoid(z)


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def gelu_tanh(z: Tensor) -> Tensor:
    return z * (1 + tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def softplus(z: Tensor) -> Tensor:
    return torch.log1p(torch.exp(z))


def mish(z: Tensor) -> Tensor:
    return z * tanh(softplus(z))


def elu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, torch.exp(z) - 1)


def hardtanh(z: Tensor) -> Tensor:
    # At the ends autograd passes nothing on.
    inner = torch.where(z <= -1, torch.full_like(z, -1.0), z)
    return torch.where(z >= 1, torch.full_like(z, 1.0), inner)


def hardsigmoid(z: Tensor) -> Tensor:
    inner = torch.where(z <= -3, torch.zeros_like(z), z / 6 + 0.5)
    return torch.where(z >= 3, torch.ones_like(z), inner)


def softsign(z: Tensor) -> Tensor:
    return z / (1 + z.abs())


# Those that are exactly 0 over a half-line.
RECTIFIERS = frozenset({relu, relu6})
# Lowest and highest output.
BOUNDS: Mapping[Formula, tuple[float, float]] = {
    relu6: (0.0, 6.0),
    sigmoid: (0.0, 1.0),
    hardsigmoid: (0.0, 1.0),
    tanh: (-1.0, 1.0),
    hardtanh: (-1.0, 1.0),
    softsign: (-1.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Fed:
    """What one layer feeds: its formula, pre-activation z, output h and the axis of the units."""

    formula: Formula
    z: Tensor
    h: Tensor
    axis: int


@dataclass(frozen=True, slots=True)
class Attended:
    """What the queries of one layer did.

    Attributes:
        weights: (entries, heads, queries, keys) after the softmax.
        seen: (queries, keys) which keys a query may see.
        every: Every so many-th entry is looked at.
    """

    weights: Tensor
    seen: Tensor
    every: int


@dataclass(slots=True)
class Pass:
    """One forward pass as it is written down: logits at the end, what was fed on the way."""

    fed: dict[str, Fed] = field(default_factory=dict)
    attended: dict[str, Attended] = field(default_factory=dict)

    def attend(
        self, layer: str, heads: list[Tensor], *, seen: Tensor | None = None, every: int = 1
    ) -> None:
        weights = torch.stack(heads, 1).detach()
        if seen is None:
            seen = torch.ones(weights.shape[2:], dtype=torch.bool)
        self.attended[layer] = Attended(weights, seen, every)

    def feed(self, layer: str, formula: Formula, z: Tensor, *, axis: int) -> Tensor:
        h = formula(z)
        self.fed[layer] = Fed(formula, z, h, axis)
        return h


def convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches times weights, one group after another."""
    (kernel, _), (stride, _), (padding, _) = conv.kernel_size, conv.stride, conv.padding
    padded = nn.functional.pad(x, (padding, padding, padding, padding))
    patches = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)
    inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    parts = []
    for group in range(conv.groups):
        taken = patches[:, group * inputs : (group + 1) * inputs]
        weight = conv.weight[group * outputs : (group + 1) * outputs]
        parts.append(torch.einsum("nihwkl,oikl->nohw", taken, weight))
    out = torch.cat(parts, dim=1)
    return out if conv.bias is None else out + conv.bias.view(1, -1, 1, 1)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, layer.weight) + layer.bias


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """By the batch's own statistics, whatever mode the module is in."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    scaled = (x - mean) / torch.sqrt(variance + norm.eps)
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def attention_weights(
    q: Tensor, k: Tensor, *, scale: float, added: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """One head: softmax(scale q k' + added) over the keys that are seen."""
    scores = scale * (q @ k.transpose(1, 2))
    powers = torch.exp(scores if added is None else scores + added)
    powers = powers if seen is None else powers * seen
    return powers / powers.sum(-1, keepdim=True)


def attention(attn: nn.Module, x: Tensor, run: Pass, layer: str) -> Tensor:
    """Head by head: softmax(q k' / sqrt(d)) v."""
    width = x.shape[-1]
    size = width // attn.heads
    q, k, v = linear(attn.qkv, x).split(width, dim=-1)
    mixed, weights = [], []
    for head in range(attn.heads):
        own = slice(head * size, (head + 1) * size)
        weights.append(attention_weights(q[..., own], k[..., own], scale=size**-0.5))
        mixed.append(weights[-1] @ v[..., own])
    run.attend(layer, weights)
    return linear(attn.proj, torch.cat(mixed, dim=-1))


def residual_cnn(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("stem", relu, batch_norm(m.norm, convolution(m.stem, x)), axis=1)
    block = m.block
    z = batch_norm(block.norm1, convolution(block.conv1, x))
    out = run.feed("block.conv1", relu, z, axis=1)
    out = batch_norm(block.norm2, convolution(block.conv2, out)) + x
    return linear(m.head, run.feed("block.conv2", relu, out, axis=1).mean((2, 3)))


def depthwise(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("depthwise", relu6, batch_norm(m.norm1, convolution(m.depthwise, x)), axis=1)
    squeezed = convolution(m.squeeze.reduce, x.mean((2, 3), keepdim=True))
    squeezed = run.feed("squeeze.reduce", relu, squeezed, axis=1)
    gate = convolution(m.squeeze.expand, squeezed)
    x = x * run.feed("squeeze.expand", sigmoid, gate, axis=1)
    z = batch_norm(m.norm2, convolution(m.pointwise, x))
    return linear(m.head, run.feed("pointwise", hardswish, z, axis=1).mean((2, 3)))


def vit(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    patches = convolution(m.patch, x)
    n, width, height, breadth = patches.shape
    tokens = [m.cls_token.expand(n, 1, width)]
    tokens += [
        patches[:, :, row, column].unsqueeze(1)
        for row in range(height)
        for column in range(breadth)
    ]
    x = torch.cat(tokens, dim=1) + m.pos_embed
    for i, block in enumerate(m.blocks):
        x = x + attention(block.attn, layer_norm(block.norm1, x), run, f"blocks.{i}.attn.qkv")
        z = linear(block.mlp.fc1, layer_norm(block.norm2, x))
        x = x + linear(block.mlp.fc2, run.feed(f"blocks.{i}.mlp.fc1", gelu, z, axis=2))
    return linear(m.head, layer_norm(m.norm, x)[:, 0])


def functional(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("first", relu, convolution(m.first, x), axis=1)
    x = run.feed("second", relu, convolution(m.second, x), axis=1)
    x = run.feed("third", relu, linear(m.third, x.mean((2, 3))), axis=1)
    return linear(m.head, run.feed("inner.lin", silu, linear(m.inner.lin, x), axis=1))


def frozen(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("first", tanh, convolution(m.first, x), axis=1).mean((2, 3))
    x = run.feed("second", elu, linear(m.second, x), axis=1)
    return linear(m.head, run.feed("third", sigmoid, linear(m.third, x), axis=1))


def tied(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("left", tanh, linear(m.left, x.flatten(1)), axis=1)
    x = 2 * run.feed("right", silu, linear(m.right, x), axis=1)
    # A layer that runs twice is reported on by the activation behind its first run.
    x = run.feed("loop", softplus, linear(m.loop, x), axis=1)
    return linear(m.head, softplus(linear(m.loop, x)))


def frozen_norm(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("first", relu, batch_norm(m.norm, convolution(m.first, x)), axis=1)
    z = convolution(m.second, x)
    shape = (1, -1, 1, 1)
    z = (z - m.fixed.running_mean.view(shape)) / torch.sqrt(m.fixed.running_var.view(shape))
    return linear(m.head, run.feed("second", gelu_tanh, z, axis=1).mean((2, 3)))


def tuple_net(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = x.flatten(1)
    z = torch.einsum("ni,oi->no", x, m.pair.weight)
    return linear(m.head, torch.cat([run.feed("pair", mish, z, axis=1), x], dim=1))


def pre_activation(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    z = batch_norm(m.norm, convolution(m.conv, x) + convolution(m.skip, x))
    return linear(m.head, run.feed("norm", relu, z, axis=1).mean((2, 3)))


def hard_gates(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = run.feed("first", hardtanh, convolution(m.first, x), axis=1)
    gate = convolution(m.gate, x.mean((2, 3), keepdim=True))
    x = x * run.feed("gate", hardsigmoid, gate, axis=1)
    return linear(m.head, run.feed("second", softsign, linear(m.second, x.mean((2, 3))), axis=1))


def masked_vit(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = convolution(m.patch, x)
    x = torch.stack([x[:, :, row, column] for row in (0, 1) for column in (0, 1)], dim=1)
    positions = torch.arange(4)
    # A token and the one before it, counted in a circle.
    pairs = (positions[:, None] - positions) % 4 < 2
    earlier = positions[:, None] >= positions
    for name, seen in (("added", None), ("hidden", pairs), ("causal", earlier)):
        attn = getattr(m, name)
        q, k, v = linear(attn.q, x), *linear(attn.kv, x).split(8, dim=-1)
        mixed, weights = [], []
        for head in range(2):
            own = slice(4 * head, 4 * head + 4)
            added = attn.added[head] if name == "added" else None
            weights.append(
                attention_weights(q[..., own], k[..., own], scale=0.5, added=added, seen=seen)
            )
            mixed.append(weights[-1] @ v[..., own])
        run.attend(f"{name}.q", weights, seen=seen)
        x = x + linear(attn.proj, torch.cat(mixed, dim=-1))
    return linear(m.head, x.mean(1))


def multi_head(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = convolution(m.patch, x)
    x = torch.stack([x[:, :, row, column] for row in (0, 1) for column in (0, 1)], dim=1)
    packed = torch.einsum("nti,oi->nto", x, m.attn.in_proj_weight) + m.attn.in_proj_bias
    q, k, v = packed.split(8, dim=-1)
    mixed, weights = [], []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        weights.append(attention_weights(q[..., own], k[..., own], scale=0.5))
        mixed.append(weights[-1] @ v[..., own])
    # Its keys are hidden in a fused call; they are made again for one image in four.
    run.attend("attn", weights, every=4)
    return linear(m.head, (x + linear(m.attn.out_proj, torch.cat(mixed, dim=-1))).mean(1))


def windowed(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = convolution(m.patch, x)
    windows = [
        torch.stack([x[:, :, top + row, left + column] for row in (0, 1) for column in (0, 1)], 1)
        for top in (0, 2)
        for left in (0, 2)
    ]
    # One image's windows lie beside each other on the batch axis.
    x = torch.stack(windows, dim=1).flatten(0, 1)
    x = x + attention(m.attn, x, run, "attn.qkv")
    x = x + linear(m.fc2, run.feed("fc1", silu, linear(m.fc1, x), axis=2))
    return linear(m.head, x.reshape(-1, 16, 8).mean(1))


def swiglu(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    x = linear(m.embed, x.flatten(1))
    gate = run.feed("gate", silu, linear(m.gate, x), axis=1)
    return linear(m.head, x + linear(m.out, gate * linear(m.value, x)))


FORWARDS: Mapping[str, Callable[[nn.Module, Tensor, Pass], Tensor]] = {
    "residual_cnn": residual_cnn,
    "depthwise": depthwise,
    "vit": vit,
    "functional": functional,
    "frozen": frozen,
    "tied": tied,
    "frozen_norm": frozen_norm,
    "tuple": tuple_net,
    "pre_activation": pre_activation,
    "hard_gates": hard_gates,
    "masked_vit": masked_vit,
    "multi_head": multi_head,
    "windowed": windowed,
    "swiglu": swiglu,
}


@dataclass(slots=True)
class Truth:
    """What a measurement should say; None where a metric does not apply.

    Attributes:
        loss: Mean cross-entropy over all samples.
        metrics: Layer to metric to (figure or None, what it was counted over).
        units: Layer to metric to (units,) float64.
        edge_distance: How far the nearest pre-activation is from where a count would jump.
    """

    loss: float
    metrics: dict[str, dict[str, tuple[float | None, int]]]
    units: dict[str, dict[str, np.ndarray]]
    edge_distance: float


def truth(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    forward: Callable[[nn.Module, Tensor, Pass], Tensor],
    layers: Iterable[str],
) -> Truth:
    """Return every figure of these layers, from a float64 copy of the network."""
    module = copy.deepcopy(module).double()
    main = {name: _main_parameter(module, name) for name in layers}
    losses: list[np.ndarray] = []
    batch_gradients: dict[str, list[np.ndarray]] = {name: [] for name in main}
    z_rows: dict[str, list[Tensor]] = {}
    h_rows: dict[str, list[Tensor]] = {}
    g_rows: dict[str, list[Tensor]] = {}
    looked_at: dict[str, list[Tensor]] = {}
    entropies: dict[str, list[list[list[float]]]] = {}
    formulas: dict[str, Formula] = {}
    sizes: list[int] = []
    for inputs, labels in batches:
        run, first = Pass(), sum(sizes)
        logits = forward(module, inputs.double(), run)
        each_loss = _cross_entropy(logits, labels)
        losses.append(each_loss.detach().numpy())
        sizes.append(len(inputs))
        for name, parameter in main.items():
            if parameter.requires_grad:
                of_weight = _gradient(each_loss.mean(), parameter)
                # A layer the loss does not depend on has no gradient, which is not a gradient of 0.
                if of_weight is not None:
                    batch_gradients[name].append(of_weight.numpy())
        for name, fed in run.fed.items():
            formulas[name] = fed.formula
            z_rows.setdefault(name, []).append(_rows(fed.z, fed.axis))
            h_rows.setdefault(name, []).append(_rows(fed.h, fed.axis))
            kept = looked_at.setdefault(name, [])
            kept += _kept_rows(fed.h, fed.axis, first=first, images=len(inputs))
            if fed.h.requires_grad:
                # The sum over samples: where none meets another, the gradient at a row of one
                # sample is that of its own loss alone.
                at_units = _gradient(each_loss.sum(), fed.h)
                gradient = torch.zeros_like(fed.h) if at_units is None else at_units
                g_rows.setdefault(name, []).append(_rows(gradient, fed.axis))
        for name, attended in run.attended.items():
            found = entropies.setdefault(name, [[] for _ in range(attended.weights.shape[1])])
            for head, values in zip(
                found, _entropies(attended, first=first, images=len(inputs)), strict=True
            ):
                head.append(values)
    metrics: dict[str, dict[str, tuple[float | None, int]]] = {}
    units: dict[str, dict[str, np.ndarray]] = {}
    edge_distance = math.inf
    for name, parameter in main.items():
        weight = parameter.detach().numpy()
        figures, per_unit = _weight_truth(weight)
        more, arrays = _gradient_truth(weight, batch_gradients[name], sizes)
        figures |= more
        per_unit |= arrays
        if name in formulas:
            z, h = torch.cat(z_rows[name]), torch.cat(h_rows[name])
            gradient = torch.cat(g_rows[name]) if name in g_rows else None
            more, arrays = _activation_truth(formulas[name], z, h, gradient)
            more |= _rank_truth(torch.stack(looked_at[name]).numpy())
            edge_distance = min(edge_distance, _edge_distance(formulas[name], z))
        else:
            more, arrays = dict.fromkeys(ACTIVATION_NAMES, (None, 0)), {}
        figures |= more
        per_unit |= arrays
        more, arrays = _attention_truth(entropies.get(name))
        metrics[name] = figures | more
        units[name] = per_unit | arrays
    return Truth(float(np.concatenate(losses).mean()), metrics, units, edge_distance)


ACTIVATION_NAMES = (
    "unit_grad_mean_abs_mean",
    "grad_dormant_fraction",
    "saturated_fraction",
    "rho_b",
    "dead_fraction",
    "rarely_active_fraction",
    "dormant_fraction",
    "near_zero_output_fraction",
    "activation_mean_abs",
    "sign_entropy",
    "activation_effective_rank",
    "activation_srank",
)


def slope(formula: Formula, z: Tensor) -> Tensor:
    """Return f'(z) elementwise, by autograd of the formula."""
    leaf = z.detach().clone().requires_grad_(True)
    return torch.autograd.grad(formula(leaf).sum(), leaf)[0]


def _main_parameter(module: nn.Module, layer: str) -> nn.Parameter:
    own = dict(module.named_parameters(remove_duplicate=False))
    if layer in own:
        return own[layer]
    keys = ("weight", "bias", "in_proj_weight")
    inside = [own[f"{layer}.{key}"] for key in keys if f"{layer}.{key}" in own]
    return max(inside, key=lambda parameter: parameter.numel())


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.log(torch.exp(logits).sum(1)) - chosen


def _gradient(loss: Tensor, of: Tensor) -> Tensor | None:
    (gradient,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return gradient


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """Fold to (rows, units)."""
    return tensor.detach().movedim(axis, -1).reshape(-1, tensor.shape[axis])


def _matrix(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(len(weight), -1)


def _weight_truth(
    weight: np.ndarray,
) -> tuple[dict[str, tuple[float | None, int]], dict[str, np.ndarray]]:
    n = weight.size
    centred = weight - weight.mean()
    variance = (centred**2).mean()
    figures: dict[str, tuple[float | None, int]] = {
        "weight_l2": (math.sqrt((weight**2).sum()), n),
        "weight_mean": (weight.mean(), n),
        "weight_std": (math.sqrt(variance), n),
        "near_zero_fraction": ((np.abs(weight) < NEAR_ZERO).mean(), n),
        "weight_kurtosis": (
            ((centred**4).mean() / variance**2 - 3, n) if np.ptp(weight) > 0 else (None, 0)
        ),
        "stable_rank": (None, 0),
        "effective_rank": (None, 0),
        "isometry_distance": (None, 0),
        "power_law_alpha": (None, 0),
    }
    if weight.ndim == 1:
        return figures, {}
    matrix = _matrix(weight)
    if min(matrix.shape) > 1:
        s = np.linalg.svd(matrix, compute_uv=False)
        figures["stable_rank"] = ((s**2).sum() / (s**2).max() if s.max() > 0 else 0.0, n)
        figures["effective_rank"] = (_effective_rank(s), n)
        # The larger of the two squares could never be the identity.
        square = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        off = ((square - np.eye(len(square))) ** 2).sum()
        figures["isometry_distance"] = (off / len(square), n)
        alpha = _power_law(sorted(s**2))
        figures["power_law_alpha"] = (None, 0) if alpha is None else (alpha, len(s))
    return figures, {"unit_weight_l2": np.sqrt((matrix**2).sum(1))}


def _effective_rank(s: np.ndarray) -> float:
    share = s[s > 0] / s.sum() if s.sum() > 0 else np.ones(0)
    return math.exp(-(share * np.log(share)).sum()) if len(share) else 0.0


def _power_law(eigenvalues: list[float]) -> float | None:
    """The law of that tail which lies closest to it; tails of ten values or a tenth at least."""
    n = len(eigenvalues)
    if n < 20:
        return None
    best = (math.inf, math.nan)
    for start in range(n - max(10, n // 10) + 1):
        tail = eigenvalues[start:]
        alpha = 1 + len(tail) / sum(math.log(x / tail[0]) for x in tail)
        distance = 0.0
        for i, x in enumerate(tail):
            law = 1 - (x / tail[0]) ** (1 - alpha)
            distance = max(distance, abs(law - i / len(tail)), abs(law - (i + 1) / len(tail)))
        best = min(best, (distance, alpha))
    return best[1]


def _gradient_truth(
    weight: np.ndarray, batch_gradients: list[np.ndarray], sizes: list[int]
) -> tuple[dict[str, tuple[float | None, int]], dict[str, np.ndarray]]:
    names = (
        *("grad_l2", "grad_mean_abs", "relative_grad_norm", "weight_grad_mean_abs"),
        *("grad_zero_fraction", "grad_snr", "optimization_readiness"),
    )
    if not batch_gradients:
        return dict.fromkeys(names, (None, 0)), {}
    samples = sum(sizes)
    mean = sum(size * each for size, each in zip(sizes, batch_gradients, strict=True)) / float(
        samples
    )
    norm = math.sqrt((mean**2).sum())
    weight_norm = math.sqrt((weight**2).sum())
    figures: dict[str, tuple[float | None, int]] = {
        "grad_l2": (norm, samples),
        "grad_mean_abs": (np.abs(mean).mean(), samples),
        "weight_grad_mean_abs": (np.abs(weight * mean).mean(), samples),
        "relative_grad_norm": (norm / weight_norm, samples) if weight_norm > 0 else (None, 0),
        "grad_zero_fraction": ((mean == 0).mean(), samples),
        "grad_snr": (None, 0),
        "optimization_readiness": (None, 0),
    }
    if len(sizes) > 1:
        energy = sum(
            size / samples * (each**2).sum()
            for size, each in zip(sizes, batch_gradients, strict=True)
        )
        figures["optimization_readiness"] = (norm**4 / energy if energy > 0 else 0.0, len(sizes))
        # Batches weigh as many samples as they hold; for equal ones this is the sample variance.
        noise = sum(
            size / samples * ((each - mean) ** 2).sum()
            for size, each in zip(sizes, batch_gradients, strict=True)
        ) * (len(sizes) / (len(sizes) - 1))
        if noise > 0:
            figures["grad_snr"] = (norm / math.sqrt(noise), len(sizes))
    per_unit = {"unit_grad_l2": np.sqrt((_matrix(mean) ** 2).sum(1))} if mean.ndim > 1 else {}
    return figures, per_unit


def _activation_truth(
    formula: Formula, z: Tensor, h: Tensor, gradient: Tensor | None
) -> tuple[dict[str, tuple[float | None, int]], dict[str, np.ndarray]]:
    rows = len(z)
    flat = (slope(formula, z).abs() < SATURATION_EPS).numpy()
    size = h.abs().numpy().mean(0)
    positive = (z > 0).numpy().mean(0)
    figures: dict[str, tuple[float | None, int]] = {
        "saturated_fraction": (flat.mean(), rows),
        "dormant_fraction": (_dormant(size), rows),
        "activation_mean_abs": (size.mean(), rows),
        "sign_entropy": (np.mean([_entropy(p) for p in positive]), rows),
        "dead_fraction": (
            ((h.numpy() == 0).all(0).mean(), rows) if formula in RECTIFIERS else (None, 0)
        ),
        "rarely_active_fraction": (
            ((positive < RARELY_ACTIVE).mean(), rows) if formula in RECTIFIERS else (None, 0)
        ),
        "near_zero_output_fraction": ((h.abs() <= NEAR_ZERO_OUTPUT).numpy().mean(), rows),
        "rho_b": (_rho_b(h.numpy(), *BOUNDS[formula]), rows) if formula in BOUNDS else (None, 0),
        "unit_grad_mean_abs_mean": (None, 0),
        "grad_dormant_fraction": (None, 0),
    }
    per_unit = {
        "unit_saturated_fraction": flat.mean(0),
        "unit_mean_abs": size,
        "unit_dormant_score": size / size.mean() if size.any() else np.zeros_like(size),
    }
    if gradient is not None:
        asked = gradient.abs().numpy().mean(0)
        figures["unit_grad_mean_abs_mean"] = (asked.mean(), rows)
        figures["grad_dormant_fraction"] = (_dormant(asked), rows)
        per_unit["unit_grad_mean_abs"] = asked
    return figures, per_unit


def _rho_b(h: np.ndarray, low: float, high: float, bins: int = 10) -> float:
    """Rakitianskaia & Engelbrecht: the bins' mean outputs, weighed by how many they hold."""
    place = np.minimum(((h - low) / (high - low) * bins).astype(int), bins - 1)
    total = 0.0
    for each in range(bins):
        held = h[place == each]
        if len(held):
            total += abs(2 * (held.mean() - low) / (high - low) - 1) * len(held)
    return total / h.size


def mixed(number: int) -> int:
    """SplitMix64's finaliser, on Python's own whole numbers."""
    whole = 2**64
    x = (number + 0x9E3779B97F4A7C15) % whole
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % whole
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % whole
    return x ^ (x >> 31)


def looked_at_positions(number: int, count: int, most: int) -> list[int]:
    """Which positions of an entry are looked at: one in each of `most` equal stretches."""
    if count <= most:
        return list(range(count))
    edges = [i * count // most for i in range(most + 1)]
    return [
        edges[i] + mixed(number * most + i + count) % (edges[i + 1] - edges[i]) for i in range(most)
    ]


def _kept_rows(h: Tensor, axis: int, *, first: int, images: int) -> list[Tensor]:
    """The rows of h that its rank is taken from."""
    entries = h.detach().movedim(axis, -1)
    entries = entries.reshape(len(entries), -1, h.shape[axis])
    windows = len(entries) // images
    return [
        rows[place]
        for number, rows in enumerate(entries, start=first * windows)
        for place in looked_at_positions(number, len(rows), POSITIONS)
    ]


def _rank_truth(rows: np.ndarray) -> dict[str, tuple[float | None, int]]:
    n, units = rows.shape
    assert n <= MOST_ROWS
    if min(n, units) < 2:
        return {"activation_effective_rank": (None, 0), "activation_srank": (None, 0)}
    s = np.linalg.svd(rows, compute_uv=False)
    count = next((k for k in range(len(s) + 1) if s[:k].sum() >= 0.99 * s.sum()), len(s))
    return {
        "activation_effective_rank": (_effective_rank(s), n),
        "activation_srank": (float(count), n),
    }


def _entropies(attended: Attended, *, first: int, images: int) -> list[list[float]]:
    """Each head's entropies over their largest possible value, of the queries looked at."""
    entries, heads, queries, _ = attended.weights.shape
    windows = entries // images
    chosen = [
        (entry, query)
        for entry in range(0, entries, attended.every)
        for query in looked_at_positions(
            first * windows + entry, queries, max(1, POSITIONS // windows)
        )
        # Who sees a single key has nothing to choose.
        if attended.seen[query].sum() > 1
    ]
    return [
        [
            -sum(float(a) * math.log(a) for a in attended.weights[entry, head, query] if a > 0)
            / math.log(attended.seen[query].sum())
            for entry, query in chosen
        ]
        for head in range(heads)
    ]


def _attention_truth(
    found: list[list[list[float]]] | None,
) -> tuple[dict[str, tuple[float | None, int]], dict[str, np.ndarray]]:
    if found is None:
        return {"attention_entropy": (None, 0)}, {}
    by_head = np.array([[each for batch in head for each in batch] for head in found])
    figures = {"attention_entropy": (float(by_head.mean()), by_head.shape[1])}
    return figures, {"head_attention_entropy": by_head.mean(1)}


def _dormant(size: np.ndarray) -> float:
    if not size.any():
        return 1.0
    return float(np.mean([each / size.mean() <= DORMANT_TAU for each in size]))


def _entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def _edge_distance(formula: Formula, z: Tensor) -> float:
    """The largest power of ten by which every z may move with no count changing."""

    def counts(moved: Tensor) -> Tensor:
        near = formula(moved).abs() <= NEAR_ZERO_OUTPUT
        return torch.stack([moved > 0, slope(formula, moved).abs() < SATURATION_EPS, near])

    here = counts(z)
    for exponent in range(-1, -9, -1):
        step = 10.0**exponent
        if all(torch.equal(counts(moved), here) for moved in (z + step, z - step)):
            return step
    return 0.0


# Schemes, from the papers' formulas, with the same stream of random numbers


def scheme_values(
    scheme: str,
    old: Tensor,
    fresh: Tensor,
    noise: torch.Generator,
    *,
    numbers: Mapping[str, float],
    bias: bool,
    selected: Tensor | None,
) -> Tensor:
    """Return what a scheme writes into a whole tensor; the caller takes what is selected.

    Random numbers are drawn in float32, as the streams of the package are; all else is float64.
    """
    wide, matrix = old.double(), old.ndim > 1
    mean = wide.mean()
    rows = old.flatten(1) if matrix else old.reshape(1, -1)
    fan_in, fan_out = rows.shape[1], (rows.shape[0] * rows.shape[1] / old.shape[1]) if matrix else 1

    def normal(spread: float = 1.0) -> Tensor:
        return spread * torch.randn(old.shape, generator=noise).double()

    def one() -> Tensor:
        return torch.randn((), generator=noise, dtype=torch.float64)

    def paper(values: Callable[[], Tensor]) -> Tensor:
        if matrix:
            return values()
        return torch.zeros_like(wide) if bias else wide

    def drawn(values: Callable[[], Tensor]) -> Tensor:
        return values() if matrix else fresh.double()

    def permuted() -> Tensor:
        places = (
            torch.arange(old.numel())
            if selected is None
            else selected.flatten().nonzero().flatten()
        )
        new = wide.flatten().clone()
        new[places] = wide.flatten()[places[torch.randperm(len(places), generator=noise)]]
        return new.reshape(old.shape)

    def uniform() -> Tensor:
        bound = math.sqrt(6 / (fan_in + fan_out))
        return torch.empty(old.shape).uniform_(-bound, bound, generator=noise).double()

    def truncated() -> Tensor:
        new = torch.empty(old.shape)
        nn.init.trunc_normal_(new, std=0.02, a=-0.04, b=0.04, generator=noise)
        return new.double()

    def orthogonal() -> Tensor:
        tall = rows.shape[0] >= rows.shape[1]
        shape = rows.shape if tall else rows.shape[::-1]
        start = torch.randn(rows.shape, generator=noise).double()
        q, r = torch.linalg.qr(start if tall else start.T)
        assert q.shape == shape
        q = q * r.diagonal().sign()
        return (q if tall else q.T).reshape(old.shape)

    def isometry() -> Tensor:
        places = old.flatten(2).unbind(2) if old.ndim > 2 else [old]
        scale = math.sqrt(old.shape[0] / old.shape[1]) / len(places)
        made = []
        for place in places:
            u, s, v = torch.linalg.svd(place.double(), full_matrices=False)
            s = s / s.norm() if s.norm() > 0 else s
            for _ in range(int(numbers["steps"])):
                s = 1.5 * s - 0.5 * s**3
            made.append(u @ s.diag() @ v)
        return scale * torch.stack(made, dim=2).reshape(old.shape)

    formulas: dict[str, Callable[[], Tensor]] = {
        "architecture": fresh.double,
        "mean-var": lambda: mean + normal() * wide.std(unbiased=False),
        "permute": permuted,
        "shrink-perturb": lambda: numbers["shrink"] * wide + numbers["perturb"] * fresh.double(),
        "kaiming-normal": lambda: drawn(lambda: normal(math.sqrt(2 / fan_in))),
        "xavier-uniform": lambda: drawn(uniform),
        "trunc-normal": lambda: drawn(truncated),
        "orthogonal": lambda: drawn(orthogonal),
        "zero": lambda: torch.zeros_like(wide),
        "mean": lambda: paper(lambda: mean.expand(old.shape)),
        "mean-noise": lambda: paper(lambda: (mean + one() * mean / 10).expand(old.shape)),
        "normal": lambda: paper(normal),
        "normal-small": lambda: paper(lambda: normal(0.2)),
        "one-normal": lambda: paper(lambda: one().expand(old.shape)),
        "normal-tenth": lambda: paper(lambda: normal(0.1)),
        "bias-mean": lambda: mean.expand(old.shape) if bias else wide,
        "fire": lambda: isometry() if matrix else wide,
    }
    return formulas[scheme]()
