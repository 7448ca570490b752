"""The optional slower pass: what each layer's features already tell of the classes.

One more forward pass keeps each layer's output, averaged over positions, for some images. How
well a linear probe reads the classes off it, how likely the labels are under the best linear
model (LogME), and how far it is from what a fresh network computes (CKA) follow from the images'
Gram matrix, whatever the width of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from core.measure.figures import missing
from core.network.trace import first_tensor, traced_forward
from core.records import LayerInfo, MetricValue
from core.reductions import unit_axis

# More images would cost cubically and change little.
MOST_IMAGES = 512
TRANSFER_NAMES = ("probe_accuracy", "logme", "cka_twin")
_PENALTIES = tuple(10.0**power for power in range(-4, 3))
FOLDS = 5
# Of a sum of squares, what counts as nothing left.
FITTED = 1e-12
# How far below the highest evidence the one that is found may lie, in nats an image.
EVIDENCE_TOLERANCE = 1e-9
# Of log(alpha / beta): the first steps of the search, and into how many one is divided.
FIRST_STEP, SPLIT = 0.25, 8


def pooled_features(
    module: nn.Module,
    inputs: Tensor,
    layers: Sequence[LayerInfo],
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return each layer's output averaged over positions.

    Args:
        module: In the mode it is to be read in.
        inputs: (n, 3, height, width), on its device.
        layers: Which layers.
        dtype: float32, or float16 or bfloat16 to run under autocast.

    Returns:
        Layer name to (n, units) float32 on the host. Layers that did not run, or whose output
        does not belong to images, are left out.
    """
    features: dict[str, Tensor] = {}
    kinds = {layer.name: layer for layer in layers}

    def ran(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        layer, made = kinds.get(name), first_tensor(output)
        if layer is None or name in features or made is None or made.ndim < 2:
            return
        if not made.is_floating_point() or made.shape[0] % len(inputs):
            return
        axis = 1 if layer.kind in ("conv", "norm") and made.ndim == 4 else made.ndim - 1
        if layer.kind == "linear":
            axis = unit_axis(layer.kind, made.shape)
        last = made.movedim(axis, -1)
        features[name] = last.reshape(len(inputs), -1, last.shape[-1]).float().mean(1).cpu()

    mixed = dtype in (torch.float16, torch.bfloat16)
    with (
        torch.no_grad(),
        torch.autocast(inputs.device.type, dtype, enabled=mixed),
        traced_forward(module, on_layer=ran),
    ):
        module(inputs)
    return features


def _centred_gram(features: Tensor) -> Tensor:
    wide = features.double()
    wide = wide - wide.mean(0)
    return wide @ wide.T


def probe_folds(labels: Int[Tensor, " image"], *, folds: int = FOLDS) -> Int[Tensor, " image"]:
    """Return which fold each image is left out in: classes dealt out in turn, so all are alike."""
    dealt = torch.empty_like(labels, dtype=torch.int64)
    start = 0
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        dealt[mine] = (torch.arange(len(mine)) + start) % folds
        # The next class goes on where this one ended, so that folds are of one size.
        start += len(mine)
    return dealt


def probe_accuracy(features: Float[Tensor, "image unit"], labels: Int[Tensor, " image"]) -> float:
    """Return the accuracy of a linear probe on images it was not fitted to.

    The probe is ridge regression onto one-hot labels with a free intercept, fitted to four
    fifths of the images and tried on the last, five times; the penalty is the one with the
    smallest squared error on images left out, not the highest accuracy. Leaving out single
    images instead would bias it: with classes of one size, the class of the image left out is
    the rarest among the others.

    Args:
        features: (images, units).
        labels: (images,).

    Returns:
        In [0, 1]; NaN with fewer than two images for each fold. Chance is the share of the
        largest class at best.
    """
    n = len(features)
    if n < 2 * FOLDS:
        return math.nan
    wide = features.double()
    labels = labels.unique(return_inverse=True)[1]
    targets = torch.nn.functional.one_hot(labels).double()
    dealt = probe_folds(labels)
    errors = torch.zeros(len(_PENALTIES), dtype=torch.float64)
    hits = torch.zeros(len(_PENALTIES), dtype=torch.float64)
    for fold in range(FOLDS):
        out = dealt == fold
        centre = wide[~out].mean(0)
        inside, outside = wide[~out] - centre, wide[out] - centre
        mean = targets[~out].mean(0)
        values, vectors = torch.linalg.eigh(inside @ inside.T)
        values = values.clamp(min=0)
        scale = float(values.sum() / len(inside)) or 1.0
        weights = vectors.T @ (targets[~out] - mean)
        reach = outside @ inside.T @ vectors
        for i, penalty in enumerate(_PENALTIES):
            guess = reach @ (weights / (values + penalty * scale)[:, None]) + mean
            errors[i] += ((guess - targets[out]) ** 2).sum()
            hits[i] += (guess.argmax(1) == labels[out]).sum()
    return float(hits[errors.argmin()] / n)


def logme(features: Float[Tensor, "image unit"], labels: Int[Tensor, " image"]) -> float:
    """Return the log maximum evidence of the labels under a linear model, per image.

    Args:
        features: (images, units), finite.
        labels: (images,).

    Returns:
        In nats an image, averaged over the classes that are there; higher is better. NaN where
        all features are zero. Only differences between features of the same images say anything.

    Source:
        You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
        ICML 2021, arXiv:2102.11005. We centre nothing, as they do not. Their fixed-point
        iteration stops at whichever maximum is nearest, or after 11 rounds; this is the highest.
    """
    wide = features.double()
    left, singular, _ = torch.linalg.svd(wide, full_matrices=False)
    if not float(singular[0]) > 0:
        return math.nan
    # At its largest the evidence does not change with the scale of the features. Directions that
    # rounding alone has filled are none.
    squares = (singular / singular[0]) ** 2
    held = squares.sqrt() > max(wide.shape) * torch.finfo(torch.float64).eps
    # Absent classes are left out: a column of zeros would be fitted without end.
    targets = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    evidence = largest_evidence(
        squares[held],
        (left[:, held].T @ targets) ** 2,
        (targets**2).sum(0),
        images=len(wide),
    )
    return float(evidence.mean())


def largest_evidence(
    squares: Float[Tensor, " direction"],
    seen: Float[Tensor, "direction target"],
    whole: Float[Tensor, " target"],
    *,
    images: int,
) -> Float[Tensor, " target"]:
    """Return the highest log evidence over both precisions, an image and for each target.

    Why this is hard: the evidence has several maxima where a spectrum has gaps, and climbing
    from one start finds any of them. With r = alpha / beta, s_i the squared singular values and
    y_i^2 what the target has in their directions, beta = n / Q(r) is best for a given r, where
    Q(r) = rest + sum y_i^2 u_i and u_i = r / (r + s_i); what remains is one function of
    t = log r,

        L(t) = 1/2 sum log u_i - n/2 log Q + n/2 (log(n / 2 pi) - 1),

    with -L'' <= 1/2 sum u_i (1 - u_i) + n/2 p (1 - p), where p = sum y_i^2 u_i (1 - u_i) / Q.
    Over a step of length h the sum grows by a factor of e^h at most, p too, and 1 - p by e^2h.
    So L between two points lies at most B h^2 / 8 above the higher of them, B being the bound
    over that step, and steps that cannot hold the maximum are dropped. Beyond both ends of the
    search the limits are the highest, to within the tolerance.

    Args:
        squares: (directions,) squared singular values of the features, in (0, 1], descending.
        seen: (directions, targets) squared projections of the targets on the left vectors.
        whole: (targets,) squared lengths of the targets, above 0.
        images: How many there are; no fewer than directions.

    Returns:
        (targets,) float64, within `EVIDENCE_TOLERANCE` nats an image below the supremum. With
        fewer directions than images a target that is fitted exactly would have infinite
        evidence: at least `FITTED` of its squared length counts as left over.
    """
    n, directions = images, len(squares)
    smallest = float(squares[-1])
    # The limit for r to infinity: the features say nothing, all of the target is noise.
    best = -n / 2 * whole.log()
    if directions < n:
        rest = torch.maximum(whole - seen.sum(0), FITTED * whole)
        # Below it L rises with r, whatever the target.
        low = smallest * directions / (2 * n) * float((rest / whole).min())
    else:
        # No noise at all: the limit for r to 0 is finite, and nothing is left over.
        rest = torch.zeros_like(whole)
        exact = -squares.log().sum() / 2 - n / 2 * (seen / squares[:, None]).sum(0).log()
        best = torch.maximum(best, exact)
        low = smallest * 2 * EVIDENCE_TOLERANCE
    begin, end = math.log(low), -math.log(2 * EVIDENCE_TOLERANCE)
    step = (end - begin) / math.ceil((end - begin) / FIRST_STEP)
    starts = begin + step * torch.arange(round((end - begin) / step), dtype=torch.float64)
    while len(starts):
        here, blur, slope, flat = _evidence(starts, squares, seen, rest, n=n)
        higher = torch.maximum(here, _evidence(starts + step, squares, seen, rest, n=n)[0])
        best = torch.maximum(best, higher.amax(0))
        grown = math.exp(step)
        bend = (grown * blur).clamp(max=directions / 4)[:, None] / 2
        bend = bend + n / 2 * torch.minimum(grown * slope, grown**2 * flat).clamp(max=1 / 4)
        bound = higher + bend * step**2 / 8
        alive = (bound > best + n * EVIDENCE_TOLERANCE).any(1)
        step /= SPLIT
        starts = (starts[alive, None] + step * torch.arange(SPLIT)).flatten()
    return best / n + (math.log(n / (2 * math.pi)) - 1) / 2


def _evidence(
    places: Tensor, squares: Tensor, seen: Tensor, rest: Tensor, *, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return L without its constant (places, targets), sum u (1 - u) (places,), p and 1 - p."""
    ratio = places.exp()[:, None]
    share, other = ratio / (ratio + squares), squares / (ratio + squares)
    between = share * other
    changing, staying = between @ seen, share**2 @ seen + rest
    error = changing + staying
    values = -(squares / ratio).log1p().sum(1)[:, None] / 2 - n / 2 * error.log()
    return values, between.sum(1), changing / error, staying / error


def linear_cka(
    features: Float[Tensor, "image unit"], others: Float[Tensor, "image other"]
) -> float:
    """Return linear centred kernel alignment; NaN where either does not vary.

    Args:
        features: (images, units).
        others: (images, other units), of the same images.

    Returns:
        In [0, 1]: 1 for the same features up to rotation and scale.

    Source:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
        arXiv:1905.00414.
    """
    left, right = _centred_gram(features), _centred_gram(others)
    size = left.norm() * right.norm()
    return float((left * right).sum() / size) if size > 0 else math.nan


def transfer_figures(
    own: Mapping[str, Tensor],
    twin: Mapping[str, Tensor],
    labels: Tensor,
    layers: Sequence[LayerInfo],
) -> tuple[dict[str, dict[str, MetricValue]], dict[str, dict[str, MetricValue]]]:
    """Return the transfer metrics of the network and of its twin, by layer and name.

    Args:
        own: Layer name to (images, units), from `pooled_features`.
        twin: The twin's, on the same images.
        labels: (images,).
        layers: All layers of the report.
    """
    figures: tuple[dict[str, dict[str, MetricValue]], ...] = ({}, {})
    for layer in layers:
        features, others = own.get(layer.name), twin.get(layer.name)
        for which, mine in enumerate((features, others)):
            figures[which][layer.name] = _figures(mine, labels)
        if features is None or others is None or not _usable(features) or not _usable(others):
            cka = MetricValue(value=None, reason="no features to compare")
        else:
            value = linear_cka(features, others)
            cka = (
                MetricValue(value=value, n=len(labels))
                if math.isfinite(value)
                else MetricValue(value=None, reason="the features are the same for all images")
            )
        figures[0][layer.name]["cka_twin"] = cka
        figures[1][layer.name]["cka_twin"] = MetricValue(
            value=None, reason="the twin is what the network is compared with"
        )
    return figures[0], figures[1]


def _usable(features: Tensor) -> bool:
    return len(features) > 1 and bool(features.isfinite().all())


def _figures(features: Tensor | None, labels: Tensor) -> dict[str, MetricValue]:
    names = ("probe_accuracy", "logme")
    if features is None:
        return missing(names, "the layer hands on no features of single images")
    if not _usable(features):
        return missing(names, "its features are not finite, or of a single image")
    n = len(labels)
    accuracy, evidence = probe_accuracy(features, labels), logme(features, labels)
    return {
        "probe_accuracy": MetricValue(value=accuracy, n=n)
        if math.isfinite(accuracy)
        else MetricValue(value=None, reason=f"needs {2 * FOLDS} images or more"),
        "logme": MetricValue(value=evidence, n=n)
        if math.isfinite(evidence)
        else MetricValue(value=None, reason="the features are all zero: there is no evidence"),
    }
