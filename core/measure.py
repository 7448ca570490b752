"""Network + batches -> figures: one forward and one backward pass a batch.

Hard parts, and how they are met. In-place activations overwrite what we want to read, so
pre-activations are read before the call. Module backward hooks break on in-place networks, so
gradients of outputs come from tensor hooks and those of weights from `torch.autograd.grad`,
which never touches `.grad`. The loss is the batch mean; gradients at units are scaled back to
the loss of one sample, so that the batch size does not shrink them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.activations import saturated_intervals
from core.errors import DataError, ModelError, Stopped
from core.hooks import Hooks, batch_statistics, module_kept
from core.metrics import DORMANT_TAU, NEAR_ZERO
from core.records import LayerInfo, MetricValue
from core.reductions import (
    UnitSums,
    as_matrix,
    binary_entropy,
    dormant_fraction,
    dormant_score,
    effective_rank,
    kurtosis,
    stable_rank,
    unit_axis,
)
from core.seeding import random_state_kept
from core.trace import Site, watched_forward

RESOLUTION = 1e-6

UnitFigures = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One network's figures.

    Attributes:
        loss: Mean cross-entropy over all samples, in nats.
        samples: Number of samples.
        batches: Number of batches.
        metrics: Layer name to metric name to figure.
        units: Layer name to metric name to float32 array (units,).
        unit_counts: Layer name to number of units behind its activation, or of its outputs.
        activation_types: Layer name to the name of the activation it feeds.
    """

    loss: float
    samples: int
    batches: int
    metrics: Mapping[str, Mapping[str, MetricValue]]
    units: Mapping[str, UnitFigures]
    unit_counts: Mapping[str, int]
    activation_types: Mapping[str, str]


def main_parameter(layer: LayerInfo) -> str:
    """Return the `state_dict` name of the parameter a layer's figures speak of: its largest."""
    return max(layer.parameters, key=lambda parameter: parameter.count).name


def measure_network(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[LayerInfo],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Measure a network on labelled batches and leave it exactly as it was.

    Args:
        module: On its device. Norms with running statistics use the batch's own here and do not
            update theirs; everything else is in eval mode.
        batches: Pairs of inputs (n, 3, height, width), normalised, on the module's device, and
            labels (n,).
        layers: The layers to report on, from the outline of the same architecture.
        on_batch: Called with the number of images after each batch.
        should_stop: Asked before each batch.

    Returns:
        The figures; a metric that does not apply carries the reason.

    Raises:
        Stopped: `should_stop` said so.
        DataError: There is no batch, or a batch of one image meets a batch norm.
        ModelError: The forward or backward pass failed.
    """
    weights = _Weights(module, layers)
    sites = _Sites(layers)
    loss_sum, samples, count = 0.0, 0, 0
    with module_kept(module), random_state_kept(0):
        batch_statistics(module)
        for inputs, labels in batches:
            if should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            sites.batch_rows = len(inputs)
            try:
                with (
                    torch.enable_grad(),
                    watched_forward(
                        module, before_activation=sites.before, after_activation=sites.after
                    ) as sites.hooks,
                ):
                    loss = F.cross_entropy(module(inputs), labels)
                    gradients = (
                        torch.autograd.grad(loss, weights.wanted, allow_unused=True)
                        if weights.wanted
                        else ()
                    )
            except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
                raise _explained(error, inputs, labels) from error
            weights.add(gradients, rows=len(inputs))
            loss_sum += float(loss.detach()) * len(inputs)
            samples += len(inputs)
            count += 1
            on_batch(len(inputs))
    if samples == 0:
        raise DataError("There is not a single image to measure on. Ask for at least one.")
    metrics: dict[str, dict[str, MetricValue]] = {}
    units: dict[str, dict[str, np.ndarray]] = {}
    unit_counts: dict[str, int] = {}
    types: dict[str, str] = {}
    for layer in layers:
        figures, per_unit = weights.figures(layer.name, samples, count)
        if "unit_weight_l2" in per_unit:
            unit_counts[layer.name] = len(per_unit["unit_weight_l2"])
        seen = sites.sums.get(layer.activation or "")
        if seen is None or seen.rows == 0:
            figures |= _missing(
                _UNIT_NAMES,
                "its activation was not reached in this pass"
                if layer.activation
                else "the layer feeds no activation function",
            )
        else:
            activation = sites.kinds[layer.activation or ""].activation
            types[layer.name] = activation.name
            more, arrays = _activation_figures(seen, rectifies=activation.rectifies)
            figures |= more
            per_unit |= arrays
            unit_counts[layer.name] = seen.positive.numel()
        metrics[layer.name] = figures
        units[layer.name] = per_unit
    return Measured(
        loss=loss_sum / samples,
        samples=samples,
        batches=count,
        metrics=metrics,
        units=units,
        unit_counts=unit_counts,
        activation_types=types,
    )


class _Weights:
    """Sums of the gradients of every layer's main parameter; shared ones are summed once."""

    def __init__(self, module: nn.Module, layers: Sequence[LayerInfo]) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self._main = {layer.name: parameters[main_parameter(layer)] for layer in layers}
        unique = {id(each): each for each in self._main.values() if each.requires_grad}
        self.wanted = list(unique.values())
        self._place = {key: i for i, key in enumerate(unique)}
        self._sums = [torch.zeros_like(each) for each in self.wanted]
        self._reached = [False] * len(self.wanted)
        self._squares = [
            torch.zeros((), dtype=torch.float64, device=each.device) for each in self.wanted
        ]

    def add(self, gradients: Sequence[Tensor | None], *, rows: int) -> None:
        """Add one batch's gradients of the mean loss; None stands for no gradient."""
        with torch.no_grad():
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    self._reached[i] = True
                    self._sums[i].add_(gradient, alpha=rows)
                    self._squares[i] += rows * gradient.double().pow(2).sum()

    def figures(
        self, layer: str, samples: int, batches: int
    ) -> tuple[dict[str, MetricValue], dict[str, np.ndarray]]:
        """Return a layer's figures of weight and gradient, and those by output unit."""
        weight = self._main[layer].detach()
        figures = _weight_figures(weight)
        per_unit: dict[str, np.ndarray] = {}
        if weight.ndim > 1:
            per_unit["unit_weight_l2"] = _array(as_matrix(weight).norm(dim=1))
        i = self._place.get(id(self._main[layer]))
        if i is None:
            reason = "the layer is frozen: it gets no gradient"
            return figures | _missing(_GRADIENT_NAMES, reason), per_unit
        if not self._reached[i]:
            reason = "no gradient reaches the layer: the loss does not depend on it"
            return figures | _missing(_GRADIENT_NAMES, reason), per_unit
        mean = self._sums[i] / samples
        figures |= _gradient_figures(weight, mean, float(self._squares[i]), samples, batches)
        if weight.ndim > 1:
            per_unit["unit_grad_l2"] = _array(as_matrix(mean).norm(dim=1))
        return figures, per_unit


class _Sites:
    """Sums over every activation that some layer feeds."""

    hooks: Hooks

    def __init__(self, layers: Sequence[LayerInfo]) -> None:
        self._feeders = {layer.activation: layer for layer in layers if layer.activation}
        self.sums: dict[str, UnitSums] = {}
        self.kinds: dict[str, Site] = {}
        self.batch_rows = 0

    def _axis(self, site: Site, tensor: Tensor) -> int | None:
        layer = self._feeders.get(site.name)
        if layer is None or tensor.ndim < 2:
            return None
        # Norms with running statistics count channels on axis 1; others do where the last axis
        # is not as wide as their weight.
        if any(name.endswith(".running_mean") for name in layer.buffers):
            return 1
        if layer.kind == "norm" and tensor.shape[-1] != layer.parameters[0].shape[0]:
            return 1
        return unit_axis(layer.kind, tensor.ndim)

    def before(self, site: Site, z: Tensor) -> None:
        axis = self._axis(site, z)
        if axis is None:
            return
        if site.name not in self.sums:
            self.sums[site.name] = UnitSums.empty(z.shape[axis], z.device)
            self.kinds[site.name] = site
        intervals = saturated_intervals(site.activation)
        self.sums[site.name].add_input(z.detach(), axis, intervals)

    def after(self, site: Site, h: Tensor) -> None:
        axis = self._axis(site, h)
        if axis is None:
            return
        known = self.sums[site.name]
        known.add_output(h.detach(), axis)
        rows = float(self.batch_rows)
        self.hooks.gradient(h, lambda gradient: known.add_gradient(gradient, axis, rows))


def _explained(error: Exception, inputs: Tensor, labels: Tensor) -> Exception:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "more than 1 value per channel" in first:
        return DataError(
            "A batch of one image cannot be normalised over the batch. Use a batch size of 2 or "
            "more, and a number of samples that does not leave a single image over."
        )
    return ModelError(
        f"The network cannot run on inputs of {tuple(inputs.shape)} with labels up to "
        f"{int(labels.max())}: {first[:200]}. Check the image size."
    )


_GRADIENT_NAMES = (
    "grad_l2",
    "grad_mean_abs",
    "relative_grad_norm",
    "weight_grad_mean_abs",
    "grad_snr",
)
_UNIT_NAMES = (
    "unit_grad_mean_abs_mean",
    "grad_dormant_fraction",
    "saturated_fraction",
    "dead_fraction",
    "dormant_fraction",
    "activation_mean_abs",
    "sign_entropy",
)


def _missing(names: Iterable[str], reason: str) -> dict[str, MetricValue]:
    return {name: MetricValue(value=None, reason=reason) for name in names}


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().float().cpu().numpy()
    return array


def _gradient_figures(
    weight: Tensor, mean: Tensor, squares: float, samples: int, batches: int
) -> dict[str, MetricValue]:
    norm = float(mean.double().norm())
    size = float(weight.double().norm())
    figures = {
        "grad_l2": norm,
        "grad_mean_abs": float(mean.double().abs().mean()),
        "weight_grad_mean_abs": float((weight.double() * mean.double()).abs().mean()),
    }
    values = {name: MetricValue(value=value, n=samples) for name, value in figures.items()}
    values["relative_grad_norm"] = (
        MetricValue(value=norm / size, n=samples)
        if size > 0
        else MetricValue(value=None, reason="the weight is all zero")
    )
    if batches < 2:
        values["grad_snr"] = MetricValue(value=None, reason="needs two batches or more")
    else:
        # Sum over entries of the sample variance across batches.
        # Below float32's resolution a spread is rounding.
        spread = squares / samples - norm**2
        noise = spread * batches / (batches - 1) if spread > RESOLUTION * norm**2 else 0.0
        values["grad_snr"] = (
            MetricValue(value=norm / math.sqrt(noise), n=batches)
            if noise > 0
            else MetricValue(value=None, reason="the gradient is the same in every batch")
        )
    return values


def _activation_figures(
    seen: UnitSums, *, rectifies: bool
) -> tuple[dict[str, MetricValue], dict[str, np.ndarray]]:
    rows = seen.rows
    mean_abs = (seen.abs_h / rows).cpu()
    saturated = (seen.saturated / rows).cpu()
    values = {
        "saturated_fraction": float(saturated.mean()),
        "dormant_fraction": dormant_fraction(mean_abs, tau=DORMANT_TAU),
        "activation_mean_abs": float(mean_abs.mean()),
        "sign_entropy": float(binary_entropy((seen.positive / rows).cpu()).mean()),
    }
    figures = {name: MetricValue(value=value, n=rows) for name, value in values.items()}
    figures["dead_fraction"] = (
        MetricValue(value=float((seen.nonzero == 0).double().mean()), n=rows)
        if rectifies
        else MetricValue(value=None, reason="only a rectifier can hold a unit at exactly 0")
    )
    arrays = {
        "unit_saturated_fraction": _array(saturated),
        "unit_mean_abs": _array(mean_abs),
        "unit_dormant_score": _array(dormant_score(mean_abs)),
    }
    if seen.gradient_rows:
        at_units = (seen.abs_gradient / seen.gradient_rows).cpu()
        figures["unit_grad_mean_abs_mean"] = MetricValue(
            value=float(at_units.mean()), n=seen.gradient_rows
        )
        figures["grad_dormant_fraction"] = MetricValue(
            value=dormant_fraction(at_units, tau=DORMANT_TAU), n=seen.gradient_rows
        )
        arrays["unit_grad_mean_abs"] = _array(at_units)
    else:
        figures |= _missing(
            ("unit_grad_mean_abs_mean", "grad_dormant_fraction"),
            "no gradient flows through this activation",
        )
    return figures, arrays


def _weight_figures(weight: Tensor) -> dict[str, MetricValue]:
    entries = weight.double()
    n = weight.numel()
    values = {
        "weight_l2": float(entries.norm()),
        "weight_mean": float(entries.mean()),
        "weight_std": float(entries.std(unbiased=False)),
        "near_zero_fraction": float((entries.abs() < NEAR_ZERO).double().mean()),
    }
    figures = {name: MetricValue(value=value, n=n) for name, value in values.items()}
    tail = kurtosis(weight)
    figures["weight_kurtosis"] = (
        MetricValue(value=None, reason="all entries are equal")
        if math.isnan(tail) and bool(torch.isfinite(weight).all())
        else MetricValue(value=tail, n=n)
    )
    if weight.ndim < 2 or min(as_matrix(weight).shape) < 2:
        return figures | _missing(
            ("stable_rank", "effective_rank"), "the weight is a vector: it has no rank"
        )
    if not bool(torch.isfinite(weight).all()):
        return figures | _missing(
            ("stable_rank", "effective_rank"), "the weight holds values that are not finite"
        )
    singular = torch.linalg.svdvals(as_matrix(weight).float())
    figures["stable_rank"] = MetricValue(value=stable_rank(singular), n=n)
    figures["effective_rank"] = MetricValue(value=effective_rank(singular), n=n)
    return figures
