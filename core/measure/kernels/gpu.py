"""The Triton kernel for CUDA: the same sums, one read, no wait for the device.

Each program reduces a tile of rows and writes its own part; parts are added afterwards in a
fixed order, so that a measurement repeats to the bit. Atomic additions would not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.measure.kernels import plain

if TYPE_CHECKING:
    from core.measure.kernels import Limits

# Rows a program; few enough that a large activation fills the device, enough that the parts
# are small beside it.
ROWS_EACH = 1024
TILE_ROWS = 32
TILE_UNITS = 64
TILE_INNER = 1024


@triton.jit
def _taken(x, live, lows, highs, middle, near, WANT: tl.constexpr, INTERVALS: tl.constexpr):
    absolute = tl.where(live, tl.abs(x), 0.0)
    positive = tl.where(live & (x > 0), 1.0, 0.0)
    inside = live & (x < -x) & (x > -x)
    if WANT & 4:
        for i in tl.static_range(INTERVALS):
            inside = inside | (live & (x >= lows[i]) & (x <= highs[i]))
    close = tl.where(live & (tl.abs(x) <= near), 1.0, 0.0)
    offset = tl.where(live, tl.abs(x - middle), 0.0)
    return absolute, positive, tl.where(inside, 1.0, 0.0), close, offset


@triton.jit
def _last(
    x_ptr, out_ptr, rows, units, lows, highs, middle, near,
    WANT: tl.constexpr, INTERVALS: tl.constexpr,
    EACH: tl.constexpr, TR: tl.constexpr, TU: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    column = tl.program_id(1) * TU + tl.arange(0, TU)
    a = tl.zeros((TU,), tl.float32)
    p = tl.zeros((TU,), tl.float32)
    n = tl.zeros((TU,), tl.float32)
    c = tl.zeros((TU,), tl.float32)
    o = tl.zeros((TU,), tl.float32)
    for begin in range(0, EACH, TR):
        row = piece * EACH + begin + tl.arange(0, TR)
        live = (row[:, None] < rows) & (column[None, :] < units)
        at = row[:, None].to(tl.int64) * units + column[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        va, vp, vn, vc, vo = _taken(x, live, lows, highs, middle, near, WANT, INTERVALS)
        a += tl.sum(va, 0)
        if WANT & 2:
            p += tl.sum(vp, 0)
        if WANT & 4:
            n += tl.sum(vn, 0)
        if WANT & 8:
            c += tl.sum(vc, 0)
        if WANT & 16:
            o += tl.sum(vo, 0)
    here = out_ptr + piece.to(tl.int64) * 5 * units + column
    inside = column < units
    tl.store(here, a, mask=inside)
    tl.store(here + units, p, mask=inside)
    tl.store(here + 2 * units, n, mask=inside)
    tl.store(here + 3 * units, c, mask=inside)
    tl.store(here + 4 * units, o, mask=inside)


@triton.jit
def _runs(
    x_ptr, out_ptr, units, inner, lows, highs, middle, near,
    WANT: tl.constexpr, INTERVALS: tl.constexpr, TI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    unit = tl.program_id(1)
    start = (row.to(tl.int64) * units + unit) * inner
    a = 0.0
    p = 0.0
    n = 0.0
    c = 0.0
    o = 0.0
    for begin in range(0, inner, TI):
        place = begin + tl.arange(0, TI)
        live = place < inner
        x = tl.load(x_ptr + start + place, mask=live, other=0.0).to(tl.float32)
        va, vp, vn, vc, vo = _taken(x, live, lows, highs, middle, near, WANT, INTERVALS)
        a += tl.sum(va, 0)
        p += tl.sum(vp, 0)
        n += tl.sum(vn, 0)
        c += tl.sum(vc, 0)
        o += tl.sum(vo, 0)
    here = out_ptr + row.to(tl.int64) * 5 * units + unit
    tl.store(here, a)
    tl.store(here + units, p)
    tl.store(here + 2 * units, n)
    tl.store(here + 3 * units, c)
    tl.store(here + 4 * units, o)


@cache
def available() -> bool:
    """Return whether Triton builds and runs here and agrees with the plain sums."""
    try:
        from core.measure.kernels import Limits

        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.linspace(-7, 7, 5 * 37 * 3).reshape(5, 37, 3).to(device)
        limits = Limits(((-math.inf, 0.0), (6.0, math.inf)), 3.0, 0.5)
        truth = plain.unit_sums(x, 1, 31, limits.intervals, 3.0, 0.5)
        flat = x.transpose(1, 2).contiguous()
        return all(
            torch.allclose(found, truth, rtol=1e-5)
            for found in (
                unit_sums(x, 5, 37, 3, 31, limits),
                unit_sums(flat, 15, 37, 1, 31, limits),
            )
        )
    except Exception:
        # Triton may be absent, or lack a compiler or a driver it likes: slower, not broken.
        return False


def unit_sums(x: Tensor, rows: int, units: int, inner: int, want: int, limits: Limits) -> Tensor:
    """Return (5, units) float64 sums of a tensor that lies as (rows, units, inner)."""
    # Without any, the first one holds nothing.
    lows = tuple(low for low, _ in limits.intervals) or (math.inf,)
    highs = tuple(high for _, high in limits.intervals) or (-math.inf,)
    numbers = (lows, highs, limits.middle, limits.near)
    if inner == 1:
        pieces = -(-rows // ROWS_EACH)
        out = torch.empty((pieces, 5, units), dtype=torch.float32, device=x.device)
        _last[(pieces, -(-units // TILE_UNITS))](
            x, out, rows, units, *numbers,
            WANT=want, INTERVALS=len(lows), EACH=ROWS_EACH, TR=TILE_ROWS, TU=TILE_UNITS,
        )  # fmt: skip
    else:
        out = torch.empty((rows, 5, units), dtype=torch.float32, device=x.device)
        _runs[(rows, units)](
            x, out, units, inner, *numbers,
            WANT=want, INTERVALS=len(lows), TI=min(TILE_INNER, 1 << (inner - 1).bit_length()),
        )  # fmt: skip
    summed = out.sum(0, dtype=torch.float64)
    for row in range(5):
        if not want >> row & 1:
            summed[row].zero_()
    return summed
