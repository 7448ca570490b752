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
from core.records import LayerInfo, MetricValue
from core.reductions import unit_axis
from core.trace import first_tensor, watched_forward

# More images would cost cubically and change little.
MOST_IMAGES = 512
TRANSFER_NAMES = ("probe_accuracy", "logme", "cka_twin")
_PENALTIES = tuple(10.0**power for power in range(-4, 3))
_ROUNDS = 30
FOLDS = 5
# Of a sum of squares, what counts as nothing left.
FITTED = 1e-12


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
    found: dict[str, Tensor] = {}
    kinds = {layer.name: layer for layer in layers}

    def ran(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        layer, made = kinds.get(name), first_tensor(output)
        if layer is None or name in found or made is None or made.ndim < 2:
            return
        if not made.is_floating_point() or made.shape[0] % len(inputs):
            return
        axis = 1 if layer.kind in ("conv", "norm") and made.ndim == 4 else made.ndim - 1
        if layer.kind == "linear":
            axis = unit_axis(layer.kind, made.shape)
        last = made.movedim(axis, -1)
        found[name] = last.reshape(len(inputs), -1, last.shape[-1]).float().mean(1).cpu()

    mixed = dtype in (torch.float16, torch.bfloat16)
    with (
        torch.no_grad(),
        torch.autocast(inputs.device.type, dtype, enabled=mixed),
        watched_forward(module, on_layer=ran),
    ):
        module(inputs)
    return found


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
        features: (images, units).
        labels: (images,).

    Returns:
        In nats an image, averaged over the classes that are there; higher is better. NaN where
        all features are zero. Only differences between
        features of the same images say anything.

    Source:
        You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
        ICML 2021, arXiv:2102.11005. We centre nothing, as they do not; the fixed-point iteration
        stops at a relative change of 1e-3 or after 30 rounds.
    """
    wide = features.double()
    n, width = wide.shape
    left, singular, _ = torch.linalg.svd(wide, full_matrices=False)
    if not float(singular[0]) > 0:
        return math.nan
    # At its largest the evidence does not change with the scale of the features.
    squares = (singular / singular[0]) ** 2
    # Absent classes are left out: a column of zeros would be fitted without end.
    targets = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    total = 0.0
    for target in targets.T:
        seen = (left.T @ target) ** 2
        whole = float((target**2).sum())
        rest = max(whole - float(seen.sum()), 0.0)
        # Labels that are fitted exactly would have infinite evidence.
        least = FITTED * whole
        alpha = beta = 1.0
        for _ in range(_ROUNDS):
            ratio = alpha / beta
            gamma = float((squares / (squares + ratio)).sum())
            size = float((squares * seen / (squares + ratio) ** 2).sum())
            error = float((seen / (1 + squares / ratio) ** 2).sum()) + rest
            alpha = max(gamma, FITTED) / max(size, least)
            beta = max(n - gamma, FITTED) / max(error, least)
            if abs(alpha / beta - ratio) <= 1e-3 * ratio:
                break
        ratio = alpha / beta
        size = float((squares * seen / (squares + ratio) ** 2).sum())
        error = float((seen / (1 + squares / ratio) ** 2).sum()) + rest
        evidence = (
            width / 2 * math.log(alpha)
            + n / 2 * math.log(beta)
            - float((alpha + beta * squares).log().sum()) / 2
            - (width - len(squares)) / 2 * math.log(alpha)
            - beta / 2 * error
            - alpha / 2 * size
            - n / 2 * math.log(2 * math.pi)
        )
        total += evidence / n
    return total / targets.shape[1]


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
    found: tuple[dict[str, dict[str, MetricValue]], ...] = ({}, {})
    for layer in layers:
        features, others = own.get(layer.name), twin.get(layer.name)
        for which, mine in enumerate((features, others)):
            found[which][layer.name] = _figures(mine, labels)
        if features is None or others is None or not _usable(features) or not _usable(others):
            cka = MetricValue(value=None, reason="no features to compare")
        else:
            value = linear_cka(features, others)
            cka = (
                MetricValue(value=value, n=len(labels))
                if math.isfinite(value)
                else MetricValue(value=None, reason="the features are the same for all images")
            )
        found[0][layer.name]["cka_twin"] = cka
        found[1][layer.name]["cka_twin"] = MetricValue(
            value=None, reason="the twin is what the network is compared with"
        )
    return found[0], found[1]


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
