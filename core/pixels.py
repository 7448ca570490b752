"""Stored image -> normalised input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 (n, 3, h, w) as float32, scaled to [0, 1], less mean, over std."""
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, device=pixels.device).reshape(shape)
    spread = torch.tensor(std, device=pixels.device).reshape(shape)
    return (pixels.float() / 255 - centre) / spread
