"""Two networks, one untouched and one edited, on the same images: what the edit does at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.network.activations import saturated_intervals
from core.network.hooks import batch_statistics, module_kept
from core.network.trace import Site, first_tensor, traced_forward
from core.records import LayerInfo
from core.reductions import dormant_fraction

DORMANT_TAU = 0.025


@dataclass(slots=True)
class Behind:
    """What lies behind a layer's activation, added up over images and places."""

    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    rows: int = 0
    saturated: float = 0.0
    entries: int = 0

    @property
    def mean_abs(self) -> float:
        """Mean |activation| over units, images and places."""
        return float(self.total.mean()) / self.rows

    @property
    def saturated_fraction(self) -> float:
        """Share of pre-activations whose derivative is near zero."""
        return self.saturated / self.entries

    @property
    def dormant_fraction(self) -> float:
        """Share of units with a ReDo score of at most `DORMANT_TAU`."""
        return dormant_fraction((self.total / self.rows).float(), tau=DORMANT_TAU)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What both networks made of the images."""

    samples: int = 0
    kl: float = 0.0
    agreed: int = 0
    right: tuple[int, int] = (0, 0)
    loss: tuple[float, float] = (0.0, 0.0)
    before: dict[str, Behind] = field(default_factory=dict)
    after: dict[str, Behind] = field(default_factory=dict)


def compare_outputs(
    before: nn.Module,
    after: nn.Module,
    layers: Iterable[LayerInfo],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Outcome:
    """Run both networks on the same images, norms with each batch's own statistics.

    Args:
        before: The untouched network.
        after: The edited one, on the same device.
        layers: Of the outline.
        batches: Inputs (n, 3, h, w) and labels (n,).

    Returns:
        Sums, not means, but for what `Behind` gives.
    """
    feeders = {layer.activation: layer for layer in layers}
    outcome = Outcome()
    with module_kept(before), module_kept(after), torch.no_grad():
        for module in (before, after):
            batch_statistics(module)
        for inputs, labels in batches:
            first = _logits(before, inputs, feeders, outcome.before)
            second = _logits(after, inputs, feeders, outcome.after)
            outcome.samples += len(inputs)
            own, other = first.double().log_softmax(1), second.double().log_softmax(1)
            outcome.kl += float((own.exp() * (own - other)).sum())
            outcome.agreed += int((first.argmax(1) == second.argmax(1)).sum())
            outcome.right = (
                outcome.right[0] + int((first.argmax(1) == labels).sum()),
                outcome.right[1] + int((second.argmax(1) == labels).sum()),
            )
            outcome.loss = (
                outcome.loss[0] + float(F.nll_loss(own, labels, reduction="sum")),
                outcome.loss[1] + float(F.nll_loss(other, labels, reduction="sum")),
            )
    return outcome


def _logits(
    module: nn.Module,
    inputs: Tensor,
    feeders: dict[str | None, LayerInfo],
    sums: dict[str, Behind],
) -> Tensor:
    def arriving(site: Site, z: Tensor) -> None:
        layer = feeders.get(site.name)
        if layer is not None:
            behind = sums.setdefault(layer.name, Behind())
            for low, high in saturated_intervals(site.activation):
                behind.saturated += int(((z >= low) & (z <= high)).sum())
            behind.entries += z.numel()

    def leaving(site: Site, h: Tensor) -> None:
        layer = feeders.get(site.name)
        if layer is not None:
            others = [axis for axis in range(h.ndim) if axis != layer.unit_axis]
            behind = sums[layer.name]
            behind.total = behind.total + h.abs().sum(others, dtype=torch.float64).cpu()
            behind.rows += h.numel() // h.shape[layer.unit_axis]

    with traced_forward(module, before_activation=arriving, after_activation=leaving):
        logits = first_tensor(module(inputs))
    assert logits is not None
    return logits
