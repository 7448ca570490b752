"""How little a weight or a unit matters: utilities, and which entries have the least.

Pure arithmetic, and the two passes over images that some utilities need. The network is left as
it was; running statistics do not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from core.errors import ModelError
from core.network.hooks import batch_statistics, memory_kept, module_kept
from core.network.trace import Site, first_tensor, traced_forward
from core.records import LayerInfo

Batches = Iterable[tuple[Tensor, Tensor]]


def share(percent: float, count: int) -> int:
    """Return how many of `count` entries a percentage is: int(percent / 100 * count)."""
    return int(percent / 100 * count)


def lowest_entries(utility: Tensor, percent: float) -> np.ndarray:
    """Return the flat indices of the entries of lowest utility, ascending.

    Args:
        utility: Any shape; taken as float32, on the CPU.
        percent: Share of the entries, in [0, 100].

    Returns:
        int64 (k,) with k = int(percent / 100 * numel). Of equal utilities those are taken that
        `torch.topk(..., largest=False)` takes.

    Source:
        Coetzer et al. 2026, arXiv:2603.20860: selection tensor by tensor.
    """
    k = share(percent, utility.numel())
    chosen = torch.topk(utility.detach().flatten().cpu(), k, largest=False).indices
    places: np.ndarray = np.sort(chosen.numpy())
    return places


def entries_below_mean(utility: Tensor, factor: float) -> np.ndarray:
    """Return the flat indices of entries whose utility is at most `factor` times the mean.

    Args:
        utility: Any shape, on the CPU.
        factor: The limit, as a multiple of the tensor's mean utility (taken in float64).

    Source:
        Hernandez-Garcia et al. 2025, arXiv:2508.00212, threshold pruning.
    """
    flat = utility.detach().flatten().double()
    places: np.ndarray = (flat <= factor * flat.mean()).nonzero().flatten().numpy()
    return places


def random_entries(count: int, size: int, generator: torch.Generator) -> np.ndarray:
    """Return different flat indices below `size`, int64 (count,), ascending; each is as likely."""
    places: np.ndarray = np.sort(torch.randperm(size, generator=generator)[:count].numpy())
    return places


def summed_gradients(
    module: nn.Module,
    batches: Batches,
    *,
    decay: float | None = None,
) -> dict[str, Tensor]:
    """Return the gradients of the mean cross-entropy, added up over the batches.

    Norms use each batch's own statistics, as in training, and keep their running ones; nothing
    is dropped out. The seed paper's pass runs in train mode, where running statistics drift and
    dropout draws; ours does neither.

    Args:
        module: The network.
        batches: Inputs (n, 3, h, w) and labels (n,), on its device.
        decay: Not None gives the moving average a <- (1 - decay) a - decay g instead of the sum.

    Returns:
        Parameter name to float32 tensor in its shape, on the CPU; parameters that no gradient
        reaches have zeros.

    Raises:
        ModelError: A gradient is not finite.

    Source:
        The sum: Coetzer et al. 2026, arXiv:2603.20860 (WG). The moving average: Shin et al., DASH,
        NeurIPS 2024, arXiv:2410.23495.
    """
    named = dict(module.named_parameters())
    with module_kept(module):
        batch_statistics(module)
        for parameter in named.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        total = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        for inputs, labels in batches:
            with memory_kept(module):
                logits = first_tensor(module(inputs))
                assert logits is not None
                F.cross_entropy(logits, labels).backward()
            for name, parameter in named.items():
                gradient = parameter.grad
                if decay is not None:
                    total[name].mul_(1 - decay)
                if gradient is not None:
                    total[name].add_(gradient, alpha=1.0 if decay is None else -decay)
                parameter.grad = None
    first = {id(parameter): name for name, parameter in named.items()}
    for name, tensor in total.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f'The gradient of "{name}" is not finite on these images. Check the weights, or '
                "take another image size."
            )
    on_host = {name: tensor.cpu() for name, tensor in total.items()}
    # A shared parameter has its gradient under each of its names.
    return {
        name: on_host[first[id(parameter)]]
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


# Between a gradient and one that is 0 but for rounding lie nine digits in float64 on float32.
NOTHING_LEFT = 1e-6
# So many of a vector's entries: rounding, too, comes near 0 now and then.
NEARLY_ALL = 0.9


def rounding_alone(module: nn.Module, inputs: Tensor, labels: Tensor) -> frozenset[str]:
    """Return the names of vectors whose gradient is 0 but for rounding.

    A bias in front of a norm is one: the norm takes out what it adds. So is the shift of a norm
    whose output reaches the next norm only through convolutions. Which of their entries have the
    least |w g| is a matter of the order of additions. They are told by taking one batch's
    gradient in float32 and in float64: the second is smaller by nine digits.

    Args:
        module: The network.
        inputs: (n, 3, h, w), on its device; few images do.
        labels: (n,).

    Returns:
        Names among its parameters with one axis; none for a network that does not run in float64.
    """
    taken: list[dict[str, Tensor | None]] = []
    with module_kept(module):
        batch_statistics(module)
        for dtype in (torch.float32, torch.float64):
            state = {
                name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in (*module.named_parameters(), *module.named_buffers())
            }
            leaves = {name: state[name].requires_grad_() for name, _ in module.named_parameters()}
            try:
                with memory_kept(module):
                    logits = first_tensor(functional_call(module, state, (inputs.to(dtype),)))
                    assert logits is not None
                    loss = F.cross_entropy(logits, labels)
                    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            except (RuntimeError, TypeError):
                # A network that keeps tensors of its own in float32 cannot be asked.
                return frozenset()
            taken.append(dict(zip(leaves, gradients, strict=True)))
    names = set()
    for name, single in taken[0].items():
        double = taken[1][name]
        if single is None or double is None or single.ndim != 1 or not single.any():
            continue
        # Entries of exactly 0, rounded to it or never reached, tell nothing.
        told = single != 0
        nothing = (double.abs() <= NOTHING_LEFT * single.abs())[told]
        if float(nothing.double().mean()) >= NEARLY_ALL:
            names.add(name)
    return frozenset(names)


@dataclass(slots=True)
class UnitFigures:
    """Means of a layer's units behind its activation over images and places, float64 (units,).

    Attributes:
        rows: How many values each unit has given.
        activation: E h.
        gradient: E g, g being the gradient of the loss at h.
        product: E g h.
    """

    rows: int = 0
    activation: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradient: Tensor = field(default_factory=lambda: torch.zeros(()))
    product: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def replacement_cost(self) -> np.ndarray:
        """|E g (h - E h)|, (units,): what replacing a unit by its mean changes to first order.

        Source:
            GXD, arXiv:2605.06834.
        """
        cost = (self.product - self.activation * self.gradient).abs()
        costs: np.ndarray = cost.numpy()
        return costs


def unit_figures(
    module: nn.Module,
    layers: Iterable[LayerInfo],
    batches: Batches,
) -> dict[str, UnitFigures]:
    """Return figures of the units of every layer that feeds an activation.

    Args:
        module: The network.
        layers: Of its outline.
        batches: Inputs (n, 3, h, w) and labels (n,), on its device.
    """
    feeders = {layer.activation: layer for layer in layers if layer.activation is not None}
    sums: dict[str, UnitFigures] = {}
    with module_kept(module):
        batch_statistics(module)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        for inputs, labels in batches:

            def active(site: Site, h: Tensor, images: int = len(inputs)) -> None:
                layer = feeders.get(site.name)
                if layer is None:
                    return
                axis = layer.unit_axis
                rows = _rows(h.detach(), axis).clone()
                sums.setdefault(layer.name, UnitFigures())
                _add(sums[layer.name], "activation", rows.sum(0))
                sums[layer.name].rows += len(rows)

                def back(gradient: Tensor, name: str = layer.name) -> None:
                    # The loss is a mean over the batch; a unit's cost must not shrink with it.
                    flat = _rows(gradient.detach(), axis) * images
                    _add(sums[name], "gradient", flat.sum(0))
                    _add(sums[name], "product", (flat * rows).sum(0))

                holder.gradient(h, back)

            with traced_forward(module, after_activation=active) as holder:
                logits = first_tensor(module(inputs))
                assert logits is not None
                torch.autograd.grad(
                    F.cross_entropy(logits, labels),
                    [each for each in module.parameters() if each.requires_grad],
                    allow_unused=True,
                )
    for figures in sums.values():
        for name in ("activation", "gradient", "product"):
            setattr(figures, name, getattr(figures, name) / figures.rows)
    return sums


def _add(figures: UnitFigures, name: str, more: Tensor) -> None:
    setattr(figures, name, getattr(figures, name) + more.cpu())


def _rows(values: Tensor, axis: int) -> Tensor:
    """Return activations as (rows, units), in float64."""
    return values.movedim(axis, -1).reshape(-1, values.shape[axis]).double()


def fraction_lowest(scores: Mapping[int, float], percent: float) -> list[int]:
    """Return the keys of the lowest scores, int(percent / 100 * n) of them; ties by key."""
    ranked = sorted(scores, key=lambda key: (scores[key], key))
    return ranked[: share(percent, len(ranked))]
