"""A model's outline, and a set's images as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import OptionError
from core.load import (
    ImageSet,
    Item,
    decode_items,
    load_model,
    open_images,
)
from core.network.outline import outline_module
from core.pipeline.progress import Progress, tick
from core.pixels import normalised
from core.records import (
    DataSpec,
    ModelCard,
    ModelOutline,
    ModelSpec,
    Preprocessing,
)

DEFAULT_SAMPLES = 128


DEFAULT_BATCH_SIZE = 32


def check_amounts(*, samples: int | None, batch_size: int) -> None:
    """Raise unless so many images, in batches of that size, can be run.

    Raises:
        OptionError: Below 1, or beyond what anyone means.
    """
    for name, value, most in (
        ("number of samples", samples, 10_000_000),
        ("batch size", batch_size, 65_536),
    ):
        if value is not None and not 1 <= value <= most:
            raise OptionError(f"The {name} is {value}; give 1 to {most:,}.")


def check_image_size(card: ModelCard, size: int) -> None:
    """Raise unless the network takes images of that side.

    Raises:
        OptionError: Too small, too large, or no multiple of what the network needs.
    """
    multiple = card.size_multiple
    if not 16 <= size <= 1024:
        raise OptionError(f"The image size is {size}; give 16 to 1024 pixels.")
    if size % multiple:
        lower, upper = size // multiple * multiple, (size // multiple + 1) * multiple
        near = f"{lower} or {upper}" if lower >= 16 else str(upper)
        if multiple == card.native_size:
            raise OptionError(f"{card.title} only takes images of {multiple} px, not {size}.")
        raise OptionError(
            f"The image size is {size}; {card.title} takes multiples of {multiple}, such as {near}."
        )


def read_batch(
    images: ImageSet,
    items: Sequence[Item],
    preprocessing: Preprocessing,
    *,
    size: int,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor]:
    """Return images as a network takes them and their labels, on the device.

    Args:
        images: The opened set.
        items: Which of them.
        preprocessing: The network's.
        size: Side in pixels.
        device: Where they go.
        layout: How they lie in memory.

    Returns:
        Inputs (n, 3, size, size), normalised; labels (n,).
    """
    pixels, labels = decode_items(images, items, preprocessing, size=size)
    inputs = normalised(pixels.to(device), preprocessing.mean, preprocessing.std)
    return inputs.contiguous(memory_format=layout), labels.to(device)


def thumbnails(inputs: Tensor, preprocessing: Preprocessing, *, size: int) -> np.ndarray:
    """Return small pictures of images as the network sees them.

    Args:
        inputs: (n, 3, height, width), normalised.
        preprocessing: How they were.
        size: Side of the pictures, in pixels.

    Returns:
        (n, size, size, 3) uint8.
    """
    mean, std = (
        torch.tensor(values, device=inputs.device)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    small = F.interpolate(inputs.float(), size=(size, size), mode="area")
    pixels = ((small * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    pictures: np.ndarray = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures


@lru_cache(maxsize=8)
def _outline(spec_json: str, stamp: float, classes: int | None, head_seed: int) -> ModelOutline:
    del stamp  # only part of the key: a changed checkpoint is read again
    spec = ModelSpec.model_validate_json(spec_json)
    loaded = load_model(spec, classes=classes, head_seed=head_seed)
    return outline_module(loaded.module, loaded.card, loaded.head)


def outline_model(
    spec: ModelSpec, *, classes: int | None = None, head_seed: int = 0
) -> ModelOutline:
    """Return a model's layers in forward order; loads the weights once and remembers the outline.

    Raises:
        ModelError: Unknown model or weights that do not fit.
        OfflineError: The weights are not here and cannot be fetched.
    """
    stamp = 0.0
    if spec.checkpoint is not None and Path(spec.checkpoint).is_file():
        stamp = Path(spec.checkpoint).stat().st_mtime
    return _outline(spec.model_dump_json(), stamp, classes, head_seed)


def opened_images(data: DataSpec, progress: Progress) -> ImageSet:
    """Open a data set; where its intensities have to be measured, say how far that is.

    Raises:
        DataError: As `open_images`.
        Stopped: Where that is wanted.
    """
    progress.phase("looking at the images")
    return open_images(
        data, on_progress=lambda done, total: tick(progress, done, total, "images measured")
    )
