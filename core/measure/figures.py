"""Sums -> figures: what a shard says of each layer, once, after the last batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.catalogue.metrics import DORMANT_TAU, NEAR_ZERO, RARELY_ACTIVE
from core.measure.gauge import Summed
from core.measure.kernels import ROWS, Want, gradient_sums, moment_sums
from core.measure.shard import HeadSums, SiteSums
from core.measure.table import BATCH_FIGURES
from core.measure.weights import EMPTY
from core.records import LayerInfo, MetricValue
from core.reductions import (
    FEWEST_EIGENVALUES,
    Moments,
    as_matrix,
    binary_entropy,
    dormant_fraction,
    dormant_score,
    effective_rank,
    isometry_distance,
    power_law_alpha,
    rank_for,
    singular_values,
    stable_rank,
)

RESOLUTION = 1e-6
HISTOGRAM_BINS = 64

ArraysByMetric = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One network's figures.

    Attributes:
        loss: Mean cross-entropy over all samples, in nats.
        samples: Number of samples.
        batches: Number of batches.
        metrics: Layer name to metric name to figure.
        units: Layer name to metric name to float32 array (units,) or (heads,).
        unit_counts: Layer name to number of units behind its activation, or of its outputs.
        activation_types: Layer name to the name of the activation it feeds.
        backend: By what means sums were taken.
    """

    loss: float
    samples: int
    batches: int
    metrics: Mapping[str, Mapping[str, MetricValue]]
    units: Mapping[str, ArraysByMetric]
    unit_counts: Mapping[str, int]
    activation_types: Mapping[str, str]
    backend: str


GRADIENT_NAMES = (
    "grad_l2",
    "grad_mean_abs",
    "relative_grad_norm",
    "weight_grad_mean_abs",
    "grad_zero_fraction",
    "grad_snr",
    "optimization_readiness",
)
SITE_NAMES = (
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
AT_UNITS = ("unit_grad_mean_abs_mean", "grad_dormant_fraction")
# Time grows with the third power: at 4,096 a layer takes most of a minute.
WIDEST_SPECTRUM = 2048
MOMENTS = ("weight_l2", "weight_mean", "weight_std", "weight_kurtosis")
RANKS = ("stable_rank", "effective_rank", "isometry_distance", "power_law_alpha")
# Figures made of powers of ||mean g||: relative noise grows with the power, to first order.
_POWERS = {"grad_snr": 1.0, "optimization_readiness": 4.0}


def missing(names: Iterable[str], reason: str) -> dict[str, MetricValue]:
    """Return one and the same reason for each name."""
    return {name: MetricValue(value=None, reason=reason) for name in names}


def figures_of(
    summed: Summed, *, histograms: bool = False, begins: Callable[[int], None] = lambda place: None
) -> Measured:
    """Return the figures of all that was seen of a network; at least one batch.

    Args:
        summed: After the last batch.
        histograms: Add each weight's histogram to the figures by unit.
        begins: Called with a layer's place before its figures are taken; may raise to stop.
    """
    shard = summed.shard
    metrics: dict[str, dict[str, MetricValue]] = {}
    units: dict[str, dict[str, np.ndarray]] = {}
    unit_counts: dict[str, int] = {}
    types: dict[str, str] = {}
    widths, relative = _half_widths(summed)
    spectra: dict[int, dict[str, MetricValue]] = {}
    for i, layer in enumerate(summed.weights.layers):
        begins(i)
        weight = summed.weights.by_layer[layer.name].detach()
        if id(summed.weights.by_layer[layer.name]) not in spectra:
            spectra[id(summed.weights.by_layer[layer.name])] = _weight_figures(weight)
        figures = dict(spectra[id(summed.weights.by_layer[layer.name])])
        per_unit: dict[str, np.ndarray] = {}
        if weight.ndim > 1:
            per_unit["unit_weight_l2"] = _array(as_matrix(weight).norm(dim=1))
            unit_counts[layer.name] = len(per_unit["unit_weight_l2"])
        if histograms:
            per_unit |= _histogram(weight)
        more, arrays = _gradient_figures(summed, layer)
        figures |= more
        per_unit |= arrays
        more, arrays = _site_part(summed, layer)
        figures |= more
        per_unit |= arrays
        seen = shard.sites.get(layer.activation or "")
        site = summed.sites.get(layer.activation or "")
        if seen is not None and seen.rows and site is not None:
            types[layer.name] = site.activation.name
            unit_counts[layer.name] = seen.sums.shape[1]
        more, arrays = _head_part(shard.heads.get(layer.attention or ""), layer)
        figures |= more
        per_unit |= arrays
        for name, power in _POWERS.items():
            value = figures[name].value
            if value is not None and i in relative:
                widths[i, name] = value * power * relative[i]
        metrics[layer.name] = {
            name: _sound(figure, widths.get((i, name))) for name, figure in figures.items()
        }
        units[layer.name] = per_unit
    return Measured(
        loss=float(shard.loss) / shard.samples,
        samples=shard.samples,
        batches=shard.batches,
        metrics=metrics,
        units=units,
        unit_counts=unit_counts,
        activation_types=types,
        backend=summed.backend,
    )


def _sound(figure: MetricValue, half_width: float | None) -> MetricValue:
    """Return a figure with its interval; one that is no finite number gives way to a reason."""
    if figure.value is None:
        return figure
    if not math.isfinite(figure.value):
        return MetricValue(
            value=None, reason="not a finite number: the pass or the weights overflow"
        )
    if half_width is None or not math.isfinite(half_width):
        return figure
    # Not `model_copy`, which takes five times as long, thousands of times.
    return MetricValue(value=figure.value, n=figure.n, cap=figure.cap, half_width=half_width)


def _student(batches: np.ndarray) -> np.ndarray:
    """Return the two-sided 95 % point of Student's t for that many values."""
    # Not from scipy.stats, whose import takes longer than measuring a small network.
    from scipy.special import stdtrit

    return np.asarray(stdtrit(np.maximum(batches - 1, 1), 0.975))


def noise_share(summed: Summed) -> np.ndarray:
    """Return E_B ||g_B||^2 / ||mean g||^2 by layer, (layers,); 1 where there is no gradient.

    The norm of one batch's gradient is mostly noise where batches disagree, and varies less,
    for its size, than the norm of the mean does: to first order by this factor.
    """
    shares = np.ones(len(summed.weights.layers))
    for i, layer in enumerate(summed.weights.layers):
        key = summed.weights.gradient_of(layer.name)
        held = summed.shard.gradients.get(key or "")
        if held is not None and held.reached:
            mean = float(held.total.double().norm()) / summed.shard.samples
            if mean > 0:
                shares[i] = max(1.0, float(held.squares) / summed.shard.samples / mean**2)
    return shares


def half_widths(moments: Moments) -> np.ndarray:
    """Return half of the 95 % interval of the mean over batches, in the shape of the moments.

    NaN below two batches.
    """
    count = moments.count.cpu().numpy()
    m2 = moments.m2.cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(m2 / (count - 1) / count)
        return np.where(count > 1, _student(count) * spread, np.nan)


GRADIENT_NORMS = ("grad_l2", "grad_mean_abs", "relative_grad_norm", "weight_grad_mean_abs")


def _half_widths(summed: Summed) -> tuple[dict[tuple[int, str], float], dict[int, float]]:
    """Return half-widths by layer's place and metric, and the norm's relative one by place."""
    moments = summed.shard.moments
    if moments is None:
        return {}, {}
    relative: dict[int, float] = {}
    wide, mean = half_widths(moments), moments.mean.cpu().numpy()
    shares = noise_share(summed)
    widths: dict[tuple[int, str], float] = {}
    for i, _ in enumerate(summed.weights.layers):
        for j, name in enumerate(BATCH_FIGURES):
            if np.isfinite(wide[i, j]):
                widths[i, name] = float(wide[i, j]) * (
                    float(shares[i]) if name in GRADIENT_NORMS else 1.0
                )
        place = BATCH_FIGURES.index("grad_l2")
        if np.isfinite(wide[i, place]) and mean[i, place] > 0:
            relative[i] = float(wide[i, place] / mean[i, place]) * float(shares[i])
    return widths, relative


def ratio_intervals(
    own: Summed, twin: Summed, ratios: Moments | None, found: Measured, fresh: Measured
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return 95 % intervals of value over twin, by layer and metric, from paired batches.

    Each batch gives log(value / twin); the interval is Student's over batches, laid around the
    ratio of the whole. Gradient norms are widened for the noise that a single batch's norm hides.

    Args:
        own: What was seen of the network.
        twin: The twin's, on the same batches.
        ratios: Moments over batches of the logarithms, in the layout of `BATCH_FIGURES`.
        found: The network's figures.
        fresh: The twin's.
    """
    if ratios is None:
        return {}
    wide = half_widths(ratios)
    shares = np.maximum(noise_share(own), noise_share(twin))
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for i, layer in enumerate(own.weights.layers):
        for j, name in enumerate(BATCH_FIGURES):
            value = found.metrics[layer.name][name].value
            other = fresh.metrics[layer.name][name].value
            if not value or not other or not np.isfinite(wide[i, j]):
                continue
            half = float(wide[i, j]) * (float(shares[i]) if name in GRADIENT_NORMS else 1.0)
            # Beyond e^50 an interval says "unknown" and no more.
            factor = math.exp(min(half, 50.0))
            ratio = value / other
            intervals.setdefault(layer.name, {})[name] = (ratio / factor, ratio * factor)
    return intervals


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().float().cpu().numpy()
    return array


def _gradient_figures(
    summed: Summed, layer: LayerInfo
) -> tuple[dict[str, MetricValue], dict[str, np.ndarray]]:
    key = summed.weights.gradient_of(layer.name)
    if key is None:
        return missing(GRADIENT_NAMES, summed.weights.why_no_gradient(layer)), {}
    held, shard = summed.shard.gradients[key], summed.shard
    if not held.reached:
        reason = (
            "no gradient reaches the layer: the loss does not depend on it, or what lies between "
            "runs without gradients (detached)"
        )
        return missing(GRADIENT_NAMES, reason), {}
    weight, n = summed.weights.by_layer[layer.name].detach(), shard.samples
    by_row = gradient_sums(weight, held.total, scale=1 / n)
    square, absolute, product, zeros = (float(total) for total in by_row.sum(1))
    entries = weight.numel()
    norm = math.sqrt(square)
    if not math.isfinite(norm):
        return missing(GRADIENT_NAMES, "the gradient is not finite: the pass overflowed"), {}
    values = {
        "grad_l2": norm,
        "grad_mean_abs": absolute / entries,
        "weight_grad_mean_abs": product / entries,
        "grad_zero_fraction": zeros / entries,
    }
    figures = {name: MetricValue(value=value, n=n) for name, value in values.items()}
    size = float(weight.double().norm())
    odd = "the weight is all zero" if size == 0 else "the weight holds values that are not finite"
    figures["relative_grad_norm"] = (
        MetricValue(value=norm / size, n=n)
        if 0 < size < math.inf
        else MetricValue(value=None, reason=odd)
    )
    squares = float(held.squares) / n
    figures |= _over_batches(norm, squares, shard.batches)
    arrays = {"unit_grad_l2": _array(by_row[0].sqrt())} if weight.ndim > 1 else {}
    return figures, arrays


def _over_batches(norm: float, squares: float, batches: int) -> dict[str, MetricValue]:
    names = ("grad_snr", "optimization_readiness")
    if batches < 2:
        return missing(names, "needs two batches or more")
    readiness = (
        MetricValue(value=norm**4 / squares, n=batches)
        if squares > 0
        else MetricValue(value=0.0, n=batches)
    )
    # Below float32's resolution a spread is rounding.
    spread = squares - norm**2
    noise = spread * batches / (batches - 1) if spread > RESOLUTION * norm**2 else 0.0
    snr = (
        MetricValue(value=norm / math.sqrt(noise), n=batches)
        if noise > 0
        else MetricValue(value=None, reason="the gradient is the same in every batch")
    )
    return {"grad_snr": snr, "optimization_readiness": readiness}


def _site_part(
    summed: Summed, layer: LayerInfo
) -> tuple[dict[str, MetricValue], dict[str, np.ndarray]]:
    seen = summed.shard.sites.get(layer.activation or "")
    site = summed.sites.get(layer.activation or "")
    if seen is not None and seen.rows and site is None:
        return missing(
            (*SITE_NAMES, *AT_UNITS),
            "its activation runs with some images only, and not with the first batch, by which "
            "parts of a measurement are put together: measure in one go",
        ), {}
    if seen is None or seen.rows == 0 or site is None:
        reason = (
            "its activation was not reached in this pass"
            if layer.activation
            else "the layer feeds no activation function to which its units can be followed"
        )
        return missing((*SITE_NAMES, *AT_UNITS), reason), {}
    activation = site.activation
    sums = seen.sums.cpu()
    if not bool(sums.isfinite().all()):
        return missing(
            (*SITE_NAMES, *AT_UNITS), "the activation holds values that are not finite"
        ), {}
    mean_abs = sums[ROWS[Want.ABSOLUTE]] / seen.rows
    positive = sums[ROWS[Want.POSITIVE]] / seen.rows
    values: dict[str, Tensor | float] = {
        "saturated_fraction": (sums[ROWS[Want.INSIDE]] / seen.rows).mean(),
        "dormant_fraction": dormant_fraction(mean_abs, tau=DORMANT_TAU),
        "near_zero_output_fraction": (sums[ROWS[Want.NEAR]] / seen.rows).mean(),
        "activation_mean_abs": mean_abs.mean(),
        "sign_entropy": binary_entropy(positive).mean(),
    }
    if activation.rectifies:
        values["dead_fraction"] = (positive == 0).double().mean()
        values["rarely_active_fraction"] = (positive < RARELY_ACTIVE).double().mean()
    if activation.bounds is not None:
        low, high = activation.bounds
        values["rho_b"] = (sums[ROWS[Want.OFFSET]] / seen.rows).mean() * 2 / (high - low)
    figures = {name: MetricValue(value=float(value), n=seen.rows) for name, value in values.items()}
    rectifier = "only a rectifier can hold a unit at exactly 0"
    for name, reason in (
        ("dead_fraction", rectifier),
        ("rarely_active_fraction", rectifier),
        ("rho_b", "the activation has no bounds"),
    ):
        figures.setdefault(name, MetricValue(value=None, reason=reason))
    arrays = {
        "unit_saturated_fraction": _array(sums[ROWS[Want.INSIDE]] / seen.rows),
        "unit_mean_abs": _array(mean_abs),
        "unit_dormant_score": _array(dormant_score(mean_abs)),
    }
    figures |= _ranks(seen)
    if seen.gradient_rows and not bool(seen.gradient.isfinite().all()):
        figures |= missing(AT_UNITS, "the gradient is not finite: the pass overflowed")
    elif seen.gradient_rows:
        at_units = (seen.gradient / seen.gradient_rows).cpu()
        values = {
            "unit_grad_mean_abs_mean": at_units.mean(),
            "grad_dormant_fraction": dormant_fraction(at_units, tau=DORMANT_TAU),
        }
        figures |= {
            name: MetricValue(value=float(value), n=seen.gradient_rows)
            for name, value in values.items()
        }
        arrays["unit_grad_mean_abs"] = _array(at_units)
    else:
        figures |= missing(AT_UNITS, "no gradient flows through this activation")
    return figures, arrays


def _ranks(seen: SiteSums) -> dict[str, MetricValue]:
    names = ("activation_effective_rank", "activation_srank")
    _, rows = seen.sample.settled()
    n, units = (0, 0) if rows is None else rows.shape
    if rows is None or min(n, units) < 2:
        return missing(names, "one row or one unit has no rank")
    if not bool(rows.isfinite().all()):
        return missing(names, "the activation holds values that are not finite")
    values = singular_values(rows)
    cap = min(n, units)
    return {
        "activation_effective_rank": MetricValue(value=effective_rank(values), n=n, cap=cap),
        "activation_srank": MetricValue(value=float(rank_for(values)), n=n, cap=cap),
    }


def _head_part(
    heads: HeadSums | None, layer: LayerInfo
) -> tuple[dict[str, MetricValue], dict[str, np.ndarray]]:
    rows = None if heads is None else heads.rows.cpu()
    if heads is None or rows is None:
        reason = (
            "its attention was not reached in this pass"
            if layer.attention
            else "the layer makes no queries for attention"
        )
        return missing(("attention_entropy",), reason), {}
    if not bool((rows > 0).all()):
        return missing(("attention_entropy",), "no query sees two keys or more"), {}
    entropy = heads.entropy.cpu() / rows
    if not bool(entropy.isfinite().all()):
        reason = "the attention holds values that are not finite"
        return missing(("attention_entropy",), reason), {}
    figure = MetricValue(value=float(entropy.mean()), n=int(rows.max()))
    # One head is the layer; so is what stands for heads that cannot be told apart.
    by_head = {"head_attention_entropy": _array(entropy)} if len(entropy) > 1 else {}
    return {"attention_entropy": figure}, by_head


def _histogram(weight: Tensor) -> dict[str, np.ndarray]:
    entries = weight.float().reshape(-1)
    if not len(entries) or not bool(entries.isfinite().all()):
        return {}
    reach = float(entries.abs().max()) or 1.0
    counts = torch.histc(entries, bins=HISTOGRAM_BINS, min=-reach, max=reach)
    edges = torch.linspace(-reach, reach, HISTOGRAM_BINS + 1)
    return {"histogram_counts": _array(counts), "histogram_edges": _array(edges)}


def _weight_figures(weight: Tensor) -> dict[str, MetricValue]:
    n = weight.numel()
    if not n:
        return missing((*MOMENTS, "near_zero_fraction", *RANKS), EMPTY)
    reach = float(weight.abs().max())
    if not math.isfinite(reach):
        return missing(
            (*MOMENTS, "near_zero_fraction", *RANKS), "the weight holds values that are not finite"
        )
    # A power of two, which changes no digit, and brings the largest entry to 1/2 to 1.
    scale = 2.0 ** -max(-120, min(120, math.frexp(reach)[1]))
    # A float32 number, because that is what the kernel subtracts.
    pivot = float(weight.float().mean())
    pivot = pivot if math.isfinite(pivot) else 0.0
    sums = moment_sums(weight, pivot=pivot, near=NEAR_ZERO, scale=scale)
    one, two, three, four, near = sums.tolist()
    shift = one / n
    variance = max(two / n - shift**2, 0.0)
    fourth = four / n - 4 * shift * three / n + 6 * shift**2 * two / n - 3 * shift**4
    mean = pivot * scale + shift
    values = {
        "weight_l2": math.sqrt(n * (variance + mean**2)) / scale,
        "weight_mean": mean / scale,
        "weight_std": math.sqrt(variance) / scale,
        "near_zero_fraction": near / n,
    }
    figures = {name: MetricValue(value=value, n=n) for name, value in values.items()}
    # Equal entries leave rounding residue of the mean, not a variance.
    spread = variance > (RESOLUTION * max(abs(mean), math.sqrt(variance))) ** 2
    figures["weight_kurtosis"] = (
        MetricValue(value=fourth / variance**2 - 3, n=n)
        if spread
        else MetricValue(value=None, reason="all entries are equal")
    )
    if weight.ndim < 2 or min(as_matrix(weight).shape) < 2:
        return figures | missing(RANKS, "the weight is a vector: it has no rank")
    narrow = min(as_matrix(weight).shape)
    if narrow > WIDEST_SPECTRUM:
        return figures | missing(
            RANKS,
            f"its smaller side is {narrow:,}: a spectrum is taken up to {WIDEST_SPECTRUM:,}, "
            "beyond that it takes longer than all else",
        )
    matrix = as_matrix(weight)
    singular = singular_values(matrix)
    rows, columns = matrix.shape
    cap = min(rows, columns)
    figures["stable_rank"] = MetricValue(value=stable_rank(singular), n=n, cap=cap)
    figures["effective_rank"] = MetricValue(value=effective_rank(singular), n=n, cap=cap)
    figures["isometry_distance"] = MetricValue(
        value=isometry_distance(singular, rows=rows, columns=columns), n=n
    )
    alpha = power_law_alpha(singular**2)
    figures["power_law_alpha"] = (
        MetricValue(value=alpha, n=cap)
        if math.isfinite(alpha)
        else MetricValue(
            value=None,
            reason=f"fewer than {FEWEST_EIGENVALUES} eigenvalues, or all equal: no law to fit",
        )
    )
    return figures
