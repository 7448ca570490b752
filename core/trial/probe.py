"""The untouched network's features -> what a head alone would reach on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from core.network.hooks import hooks
from core.pixels import normalised
from core.trial.arms import Images

FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-4, 3))
BATCH = 64
# More would cost more than a short trial and change little.
MOST_IMAGES = 4096
# One-sided 95 %: how far an equal network may lie below by luck of the images.
Z = 1.645


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a linear probe reaches on the validation images.

    Attributes:
        accuracy: In [0, 1].
        slack: How far below it an equally good network may lie by luck of these images.
    """

    accuracy: float
    slack: float


def linear_probe(
    model: nn.Module,
    images: Images,
    head: Sequence[str],
    should_stop: Callable[[], bool] = lambda: False,
) -> Probe | None:
    """Fit a linear probe to what a network's head reads of the training images.

    Args:
        model: Untouched, on its device.
        images: On the host or the device, without augmentation.
        head: Paths of its head's layers.
        should_stop: Asked before each batch.

    Returns:
        None where the head reads no features of single images, or when stopped.
    """
    train = images.train[:MOST_IMAGES], images.train_labels[:MOST_IMAGES]
    fitted = head_inputs(model, train[0], images, head, should_stop)
    tried = None if fitted is None else head_inputs(model, images.val, images, head, should_stop)
    if fitted is None or tried is None or len(fitted) < 2 * FOLDS:
        return None
    if not bool(fitted.isfinite().all()) or not bool(tried.isfinite().all()):
        return None
    right = probe_answers(fitted, train[1].cpu(), tried, images.val_labels.cpu())
    accuracy = float(right.double().mean())
    slack = Z * math.sqrt(accuracy * (1 - accuracy) / len(right))
    return Probe(accuracy=accuracy, slack=slack)


@torch.no_grad()
def head_inputs(
    model: nn.Module,
    pixels: Tensor,
    images: Images,
    head: Sequence[str],
    should_stop: Callable[[], bool] = lambda: False,
) -> Float[Tensor, "image unit"] | None:
    """Return what the head reads, averaged over places.

    Args:
        model: The network; it is run in evaluation mode.
        pixels: uint8 (n, 3, h, w).
        images: For their mean and spread.
        head: Paths of its head's layers; the first of them that runs counts.
        should_stop: Asked before each batch.

    Returns:
        (n, units) float32 on the host; None where no such layer ran, or when stopped.
    """
    device = next(model.parameters()).device
    model.eval()
    seen: list[Tensor] = []
    rows: list[Tensor] = []
    modules = dict(model.named_modules())
    with hooks() as holder:
        for path in head:
            if path in modules:
                holder.before(modules[path], lambda _, inputs: seen.append(inputs[0]))
        for start in range(0, len(pixels), BATCH):
            if should_stop():
                return None
            batch = pixels[start : start + BATCH].to(device)
            inputs = normalised(batch, images.mean, images.std)
            seen.clear()
            model(inputs.contiguous(memory_format=torch.channels_last))
            if not seen or len(seen[0]) != len(batch) or seen[0].ndim < 2:
                return None
            read = seen[0].float()
            # Maps have their places behind the channels, tokens before them.
            places = tuple(range(2, read.ndim)) if read.ndim > 3 else (1,) * (read.ndim - 2)
            rows.append((read.mean(places) if places else read).cpu())
    return torch.cat(rows)


def probe_answers(
    features: Float[Tensor, "image unit"],
    labels: Int[Tensor, " image"],
    others: Float[Tensor, "other unit"],
    other_labels: Int[Tensor, " other"],
) -> Bool[Tensor, " other"]:
    """Return which of some images a linear probe fitted to other images gets right.

    Ridge regression onto one-hot labels with a free intercept; the penalty is the one with the
    smallest squared error on `FOLDS` folds of the images it is fitted to.

    Args:
        features: (images, units).
        labels: (images,).
        others: (other images, units).
        other_labels: (other images,); a class that was not fitted is never right.
    """
    wide = features.double()
    classes, coded = labels.unique(return_inverse=True)
    targets = torch.nn.functional.one_hot(coded).double()
    # Classes are dealt out in turn, so that every fold has of each.
    dealt = torch.empty(len(coded), dtype=torch.int64)
    dealt[coded.argsort(stable=True)] = torch.arange(len(coded)) % FOLDS
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for fold in range(FOLDS):
        out = dealt == fold
        for i, guess in enumerate(_ridge(wide[~out], targets[~out], wide[out])):
            errors[i] += ((guess - targets[out]) ** 2).sum()
    guess = _ridge(wide, targets, others.double())[int(errors.argmin())]
    return classes[guess.argmax(1)] == other_labels


def _ridge(wide: Tensor, targets: Tensor, others: Tensor) -> list[Tensor]:
    """Return what ridge regression under each penalty says of other features."""
    centre, mean = wide.mean(0), targets.mean(0)
    inside, outside = wide - centre, others - centre
    left, singular, right = torch.linalg.svd(inside, full_matrices=False)
    scale = float((singular**2).sum() / len(inside)) or 1.0
    seen, reach = left.T @ (targets - mean), outside @ right.T
    return [
        reach @ ((singular / (singular**2 + penalty * scale))[:, None] * seen) + mean
        for penalty in PENALTIES
    ]
