"""Sums over a tensor in a single read of it, by the fastest means the machine has.

Several `sum` and `abs` calls read an activation several times, and reading is all they cost. One
kernel takes every sum on the way: a Triton kernel on CUDA, a small C kernel on the CPU. The C
kernel is built once by the machine's own compiler and kept; where there is none, or where it
fails its check against the plain sums, those are used. `LIMBER_KERNELS=plain` asks for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from core.measure.kernels import plain

if TYPE_CHECKING:
    from core.measure.kernels.compiled import Prepared

Intervals = tuple[tuple[float, float], ...]

MOST_INTERVALS = 4


class Want(IntFlag):
    """Which sums a read takes; the rows of the result stand in this order."""

    ABSOLUTE = 1
    POSITIVE = 2
    INSIDE = 4
    NEAR = 8
    OFFSET = 16


ROWS = {flag: row for row, flag in enumerate(Want)}


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers a read compares with.

    Attributes:
        intervals: Closed intervals counted by INSIDE, at most `MOST_INTERVALS`.
        middle: What OFFSET measures the distance from.
        near: The largest magnitude NEAR counts.
    """

    intervals: Intervals = ()
    middle: float = 0.0
    near: float = 0.0

    def __post_init__(self) -> None:
        if len(self.intervals) > MOST_INTERVALS:
            raise ValueError(f"{len(self.intervals)} intervals; at most {MOST_INTERVALS}")


def folded(x: Tensor, axis: int) -> tuple[Tensor, int, int, int]:
    """Return a tensor as (rows, units, inner) in the order it lies in memory.

    Args:
        x: Any shape, units on `axis`.
        axis: Not negative.

    Returns:
        A tensor whose memory holds rows * units * inner entries in that order (`x` itself, or a
        copy where its layout is neither), and the three sizes. Which rows come first is left
        open: sums do not depend on it.
    """
    units = x.shape[axis]
    others = [i for i in range(x.ndim) if i != axis]
    last = x.permute(*others, axis)
    if last.is_contiguous():
        return last, x.numel() // max(units, 1), units, 1
    if not x.is_contiguous():
        # Channels-last with a padded or sliced batch, or an expanded gradient.
        return last.contiguous(), x.numel() // max(units, 1), units, 1
    inner = math.prod(x.shape[axis + 1 :])
    return x, math.prod(x.shape[:axis]), units, inner


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Return which means sums on that device and dtype use: "compiled", "triton" or "plain"."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return _means(kind, dtype, os.environ.get("LIMBER_KERNELS", ""))


@cache
def _means(kind: str, dtype: torch.dtype, asked: str) -> str:
    if asked == "plain" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "plain"
    if kind == "cuda":
        return "triton" if _triton_works() else "plain"
    if kind == "cpu" and dtype != torch.float16:
        from core.measure.kernels import compiled

        return "compiled" if compiled.library() is not None else "plain"
    return "plain"


@cache
def _triton_works() -> bool:
    try:
        from core.measure.kernels import gpu
    except ImportError:
        return False
    return gpu.available()


def unit_sums(
    x: Float[Tensor, "*shape"], axis: int, want: Want, limits: Limits | None = None
) -> Float[Tensor, "5 unit"]:
    """Return sums over all rows of a tensor, a column a unit.

    Args:
        x: float32, bfloat16, float16 or float64, units on `axis`.
        axis: The axis that counts units.
        want: Which sums; rows of the result that were not asked for are 0.
        limits: What INSIDE, NEAR and OFFSET compare with.

    Returns:
        (5, units) float64 on the tensor's device: sum |x|, count x > 0, count of x inside an
        interval, count |x| <= near, sum |x - middle|. NaN counts nowhere and makes sums NaN.
        Sums of a float16 or bfloat16 tensor are taken in float32. The order of additions
        depends only on shape and layout.
    """
    limits = limits or Limits()
    x = x.detach()
    means = backend(x.device, x.dtype)
    if x.numel() == 0 or means == "plain":
        return plain.unit_sums(x, axis, int(want), limits.intervals, limits.middle, limits.near)
    tensor, rows, units, inner = folded(x, axis)
    if means == "compiled":
        from core.measure.kernels import compiled

        return compiled.unit_sums(tensor, rows, units, inner, int(want), limits)
    from core.measure.kernels import gpu

    return gpu.unit_sums(tensor, rows, units, inner, int(want), limits)


class Reader:
    """`unit_sums` of one tensor after another, most of which lie alike.

    Args:
        axis: The axis that counts units.
        want: Which sums.
        limits: What INSIDE, NEAR and OFFSET compare with.
    """

    def __init__(self, axis: int, want: Want, limits: Limits | None = None) -> None:
        self.axis = axis
        self._want, self._limits = want, limits or Limits()
        self._shape, self._dtype = torch.Size(), torch.float32
        self._stride: tuple[int, ...] = ()
        self._prepared: Prepared | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return (5, units) float64, which the next call may write over."""
        if (
            self._prepared is not None
            and x.shape == self._shape
            and x.stride() == self._stride
            and x.dtype is self._dtype
        ):
            return self._prepared(x.data_ptr())
        return self._set_up(x)

    def _set_up(self, x: Tensor) -> Tensor:
        self._prepared = None
        x = x.detach()
        if x.numel() and backend(x.device, x.dtype) == "compiled":
            from core.measure.kernels import compiled

            tensor, rows, units, inner = folded(x, self.axis)
            prepared = compiled.Prepared(
                rows,
                units,
                inner,
                int(self._want),
                self._limits,
                bfloat=x.dtype == torch.bfloat16,
            )
            # Several threads share the pieces, and a copy is another tensor each time.
            alone = prepared.pieces == 1 or torch.get_num_threads() == 1
            if alone and tensor.data_ptr() == x.data_ptr():
                self._prepared = prepared
                self._shape, self._stride, self._dtype = x.shape, x.stride(), x.dtype
                return prepared(x.data_ptr())
        return unit_sums(x, self.axis, self._want, self._limits)


def gradient_sums(
    weight: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    total: Float[Tensor, "*shape"] | None = None,
    *,
    scale: float = 1.0,
) -> Float[Tensor, "4 row"]:
    """Return sums over a weight's gradient by output unit, and add it to a running total.

    Args:
        weight: Any shape; rows are the first axis, one row where there is none.
        gradient: Same shape.
        total: Same shape; `scale * gradient` is added to it in place. None adds nowhere.
        scale: What the gradient is multiplied with first.

    Returns:
        (4, rows) float64 on the weight's device: sum g^2, sum |g|, sum |w g|, count g == 0, with
        g = scale * gradient.
    """
    weight, gradient = weight.detach(), gradient.detach()
    together = [weight, gradient] + ([] if total is None else [total])
    if (
        backend(weight.device) == "compiled"
        and all(tensor.dtype == torch.float32 for tensor in together)
        and _alike(together)
    ):
        from core.measure.kernels import compiled

        return compiled.gradient_sums(weight, gradient, total, scale)
    return plain.gradient_sums(weight, gradient, total, scale)


def gradient_totals(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    totals: Sequence[Tensor],
    *,
    scale: float = 1.0,
) -> Float[Tensor, "weight 4"]:
    """Return `gradient_sums` of many weights, each summed over its rows.

    Args:
        weights: Any shapes.
        gradients: One for each weight.
        totals: One for each weight; `scale * gradient` is added to it in place.
        scale: What gradients are multiplied with first.

    Returns:
        (weights, 4) float64 on their device.
    """
    if weights and all(
        tensor.dtype == torch.float32 for part in (weights, gradients, totals) for tensor in part
    ):
        together = zip(weights, gradients, totals, strict=True)
        if backend(weights[0].device) == "compiled" and all(map(_alike, together)):
            from core.measure.kernels import compiled

            with torch.no_grad():
                return compiled.gradient_totals(weights, gradients, totals, scale)
    tensor = zip(weights, gradients, totals, strict=True)
    return torch.stack([gradient_sums(w, g, t, scale=scale).sum(1) for w, g, t in tensor])


def moment_sums(
    x: Float[Tensor, "*shape"], *, pivot: float, near: float, scale: float = 1.0
) -> Float[Tensor, 5]:
    """Return power sums of all entries about a pivot, in one read.

    Args:
        x: Any shape.
        pivot: Close to the mean: far from it, digits are lost.
        near: Entries with |x| below it are counted.
        scale: What offsets are multiplied with, so that fourth powers neither over- nor underflow.

    Returns:
        (5,) float64 on the tensor's device: sum d, sum d^2, sum d^3, sum d^4 with
        d = (x - pivot) * scale, and the count of |x| < near. Not finite where an entry is not.
    """
    x = x.detach()
    if x.dtype == torch.float32 and _dense(x) and backend(x.device) == "compiled":
        from core.measure.kernels import compiled

        return compiled.moment_sums(x, pivot, scale, near)
    return plain.moment_sums(x, pivot, scale, near)


def _order(tensor: Tensor) -> tuple[int, ...]:
    # The stride of an axis of one entry says nothing about where entries lie.
    return tuple(
        stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1
    )


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors of one shape lie densely and in the same order."""
    first = tensors[0].stride()
    if all(tensor.stride() == first for tensor in tensors):
        return _dense(tensors[0])
    order = _order(tensors[0])
    return all(_order(tensor) == order and _dense(tensor) for tensor in tensors)


def _dense(tensor: Tensor) -> bool:
    # Channels-last weights are dense too: each output unit is one run of memory in both.
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


__all__ = [
    "ROWS",
    "Intervals",
    "Limits",
    "Reader",
    "Want",
    "backend",
    "folded",
    "gradient_sums",
    "gradient_totals",
    "moment_sums",
    "unit_sums",
]
