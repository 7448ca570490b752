"""A batch of training images -> the same, each changed by its own draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import v2

from core.catalogue.trials import Augmentation

_MADE: dict[Augmentation, Callable[[int], v2.Transform]] = {
    "crop": lambda side: v2.RandomResizedCrop(
        side, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), antialias=True
    ),
    "flip": lambda _: v2.RandomHorizontalFlip(),
    "colour": lambda _: v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
    "trivial": lambda _: v2.TrivialAugmentWide(),
    "erase": lambda _: v2.RandomErasing(p=0.5, scale=(0.02, 0.2)),
}


def augmenter(
    names: Sequence[Augmentation], side: int
) -> Callable[[UInt8[Tensor, "n 3 h w"]], UInt8[Tensor, "n 3 h w"]]:
    """Return what augments a batch of uint8 images of this side, drawing for each image anew.

    torchvision's transforms draw once for a batch (pytorch/vision issue 8484), so each image goes
    through by itself. They draw from torch's global generator: seed it.

    Args:
        names: Which, in the order in which they are applied; none leaves a batch as it is.
        side: Of the images, in pixels.
    """
    if not names:
        return lambda batch: batch
    change = v2.Compose([_MADE[name](side) for name in names])
    return lambda batch: torch.stack([change(image) for image in batch])
