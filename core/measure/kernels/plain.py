"""The sums in plain torch, on any device: the fallback, and the truth the kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

ABSOLUTE, POSITIVE, INSIDE, NEAR, OFFSET = 1, 2, 4, 8, 16


def unit_sums(
    x: Tensor,
    axis: int,
    want: int,
    intervals: tuple[tuple[float, float], ...],
    middle: float,
    near: float,
) -> Tensor:
    """Return (5, units) float64 sums; see `core.measure.kernels.unit_sums`."""
    over = tuple(i for i in range(x.ndim) if i != axis)
    wide = x if x.dtype == torch.float64 else x.float()
    out = torch.zeros((5, x.shape[axis]), dtype=torch.float64, device=x.device)

    def total(values: Tensor) -> Tensor:
        return values.sum(over) if over else values

    if want & ABSOLUTE:
        out[0] = total(wide.abs())
    if want & POSITIVE:
        out[1] = total(wide > 0)
    if want & INSIDE and intervals:
        inside = torch.zeros_like(wide, dtype=torch.bool)
        for low, high in intervals:
            inside |= (wide >= low) & (wide <= high)
        out[2] = total(inside)
    if want & NEAR:
        out[3] = total(wide.abs() <= near)
    if want & OFFSET:
        out[4] = total((wide - middle).abs())
    return out


def gradient_sums(weight: Tensor, gradient: Tensor, total: Tensor | None, scale: float) -> Tensor:
    """Return (4, rows) float64 sums; see `core.measure.kernels.gradient_sums`."""
    scaled = gradient if scale == 1.0 else gradient * scale
    if total is not None:
        total += scaled
    rows = scaled.reshape(scaled.shape[0] if scaled.ndim else 1, -1)
    # Gradients may be so small that their squares are 0 in float32.
    wide = rows.double()
    products = weight.reshape(rows.shape) * wide
    return torch.stack(
        [
            wide.pow(2).sum(1),
            rows.abs().sum(1).double(),
            products.abs().sum(1),
            (rows == 0).sum(1).double(),
        ]
    )


def moment_sums(x: Tensor, pivot: float, scale: float, near: float) -> Tensor:
    """Return (5,) float64 sums; see `core.measure.kernels.moment_sums`."""
    offset = (x.double() - pivot) * scale
    square = offset**2
    return torch.stack(
        [
            offset.sum(),
            square.sum(),
            (square * offset).sum(),
            (square**2).sum(),
            (x.abs() < near).sum().double(),
        ]
    )
