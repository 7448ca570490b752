"""The C kernel: built once by the machine's compiler, kept, checked, and run over threads.

Nothing here may fail loudly: a machine without a compiler, a read-only home or an odd C library
gets the plain sums and a slower measurement, not an error.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.measure.kernels import plain

if TYPE_CHECKING:
    from core.measure.kernels import Limits

SOURCE = Path(__file__).with_name("sums.c")
BUILD_S = 60.0
# Entries a piece of work; pieces depend only on the shape, so that sums do not depend on how
# many threads there are.
PIECE = 1 << 19
BLOCK = 512
SUMS = 5
_FLAGS = ("-O2", "-march=native", "-shared", "-fPIC")


class _Limits(ctypes.Structure):
    _fields_ = [
        ("intervals", ctypes.c_int32),
        ("low", ctypes.c_float * 4),
        ("high", ctypes.c_float * 4),
        ("middle", ctypes.c_float),
        ("near", ctypes.c_float),
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("pieces", ctypes.c_int64),
        ("bfloat", ctypes.c_int32),
        ("what", ctypes.c_int32),
        ("by", _Limits),
        ("parts", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


class _Weight(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inner", ctypes.c_int64),
    ]


def _compilers() -> list[tuple[str, ...]]:
    """Return the commands to try, the one asked for by CC first."""
    try:
        asked = tuple(shlex.split(os.environ.get("CC", "")))
    except ValueError:
        asked = ()
    return [
        command
        for command in (asked, ("cc",), ("gcc",), ("clang",))
        if command and shutil.which(command[0])
    ]


def _processor() -> str:
    # A library built for one processor may hold instructions another lacks, and homes are
    # shared between machines.
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def _folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # A relative one is to be ignored, says the standard that names it.
    return (base if base.is_absolute() else Path.home() / ".cache") / "limber" / "kernels"


_FAILURES = (OSError, RuntimeError, AttributeError, subprocess.SubprocessError)


def _loaded() -> ctypes.CDLL | None:
    """Return the library, built where it is not there yet; None where nothing builds it."""
    for compiler in _compilers():
        with suppress(*_FAILURES):
            return ctypes.CDLL(str(built(_folder(), compiler)))
        # No home to keep it in: build it only for this process.
        with suppress(*_FAILURES), tempfile.TemporaryDirectory(prefix="limber-") as moment:
            return ctypes.CDLL(str(built(Path(moment), compiler)))
    return None


def built(folder: Path, compiler: tuple[str, ...]) -> Path:
    """Return the library in that folder, whole, as that command builds it.

    Raises:
        OSError, SubprocessError: There is no such folder, or nothing was built.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError("whoever owns the folder could put code into this process")
    words = [*compiler, _processor(), *_FLAGS]
    key = b"\0".join([SOURCE.read_bytes(), *(word.encode() for word in words)])
    target = folder / f"sums-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not _whole(target):
        _build(compiler, target)
    return target


def _digest_of(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _whole(target: Path) -> bool:
    """Return whether a library is there as it was built: loading half of one ends the process."""
    try:
        wanted = _digest_of(target).read_text(encoding="ascii", errors="replace")
        return hashlib.sha256(target.read_bytes()).hexdigest() == wanted
    except OSError:
        return False


def _build(compiler: tuple[str, ...], target: Path) -> None:
    handle, half = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        subprocess.run(
            [*compiler, *_FLAGS, "-o", half, str(SOURCE)],
            check=True,
            timeout=BUILD_S,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        digest = hashlib.sha256(Path(half).read_bytes()).hexdigest()
        Path(half).replace(target)
        Path(half).write_text(digest, encoding="ascii")
        Path(half).replace(_digest_of(target))
    finally:
        Path(half).unlink(missing_ok=True)


@cache
def library() -> Any | None:
    """Return the loaded and checked kernel, or None where there is none."""
    loaded = _loaded()
    if loaded is None:
        return None
    try:
        long, pointer = ctypes.c_long, ctypes.c_void_p
        loaded.unit_sums.argtypes = [
            pointer,
            long,
            long,
            long,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(_Limits),
            pointer,
        ]
        loaded.unit_sums.restype = ctypes.c_int
        loaded.gradient_sums.argtypes = [
            pointer,
            pointer,
            ctypes.c_float,
            pointer,
            long,
            long,
            pointer,
        ]
        loaded.gradient_sums.restype = None
        loaded.moment_sums.argtypes = [pointer, long, *[ctypes.c_float] * 3, pointer]
        loaded.moment_sums.restype = None
        loaded.across.argtypes = [pointer, long, pointer]
        loaded.across.restype = None
        loaded.all_gradients.argtypes = [pointer, long, ctypes.c_float, pointer, pointer]
        loaded.all_gradients.restype = None
        loaded.add_up.argtypes = [pointer, long, long, pointer]
        loaded.add_up.restype = None
        loaded.all_sums.argtypes = [pointer, pointer]
        loaded.all_sums.restype = None
    except (OSError, AttributeError):
        return None
    return loaded if _agrees(loaded) else None


def _agrees(loaded: Any) -> bool:
    """Return whether a small read gives what the plain sums give."""
    x = torch.linspace(-7, 7, 5 * 37 * 3).reshape(5, 37, 3)
    intervals = ((-math.inf, 0.0), (6.0, math.inf))
    for shaped, axis, inner in ((x, 1, 3), (x.reshape(15, 37), 1, 1)):
        out = torch.zeros((SUMS, 37), dtype=torch.float64)
        rows = shaped.numel() // 37 // inner
        limits = _limits(intervals, 3.0, 0.5)
        done = loaded.unit_sums(
            shaped.data_ptr(), rows, 37, inner, 0, 31, ctypes.byref(limits), out.data_ptr()
        )
        truth = plain.unit_sums(shaped, axis, 31, intervals, 3.0, 0.5)
        if not done or not torch.allclose(out, truth, rtol=1e-5):
            return False
    return True


def _limits(intervals: Sequence[tuple[float, float]], middle: float, near: float) -> _Limits:
    held = _Limits(intervals=len(intervals), middle=middle, near=near)
    # Without any, the first one holds nothing.
    for i, (low, high) in enumerate(intervals or ((math.inf, -math.inf),)):
        held.low[i], held.high[i] = low, high
    return held


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="limber-sums")


def _each(pieces: int, work: Callable[[int], None]) -> None:
    """Run every piece; ctypes lets go of the interpreter's lock, so threads really run.

    The last piece comes first: its memory was written last, so part of it is still in the cache,
    and whoever reads the tensor next begins where this ended.
    """
    order = range(pieces - 1, -1, -1)
    threads = min(torch.get_num_threads(), pieces)
    if threads < 2:
        for piece in order:
            work(piece)
        return
    for done in _workers(torch.get_num_threads()).map(work, order):
        del done


def _cut(rows: int, units: int, inner: int) -> tuple[int, int]:
    """Return how many rows a piece has, and how many pieces there are."""
    step = max(1, PIECE // (units * inner))
    if inner == 1:
        step = max(BLOCK, step // BLOCK * BLOCK)
    return step, -(-rows // step)


def _check_built(want: int) -> None:
    # Asked only here: the kernel's own answer would come too late.
    if want not in _BUILT:
        raise ValueError(f"no kernel takes the sums {want}; add the case to {SOURCE.name}")


def unit_sums(x: Tensor, rows: int, units: int, inner: int, want: int, limits: Limits) -> Tensor:
    """Return (5, units) float64 sums of a tensor that lies as (rows, units, inner)."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the compiled kernel is not there; ask `backend` first")
    held = _limits(limits.intervals, limits.middle, limits.near)
    a_row = units * inner
    step, pieces = _cut(rows, units, inner)
    parts = torch.zeros((pieces, SUMS, units), dtype=torch.float64)
    start, width, bfloat = x.data_ptr(), x.element_size(), int(x.dtype == torch.bfloat16)
    goal, stride = parts.data_ptr(), SUMS * units * 8

    def work(piece: int) -> None:
        first = piece * step
        loaded.unit_sums(
            start + first * a_row * width,
            min(step, rows - first),
            units,
            inner,
            bfloat,
            want,
            ctypes.byref(held),
            goal + piece * stride,
        )

    _check_built(want)
    _each(pieces, work)
    if pieces == 1:
        return parts[0]
    out = torch.empty((SUMS, units), dtype=torch.float64)
    loaded.add_up(goal, pieces, SUMS * units, out.data_ptr())
    return out


class Prepared:
    """The sums of tensors that all lie alike, by one thread, set up once.

    Between two passes over large tensors little of Python is in any cache; what runs there should
    be one call.

    Attributes:
        out: (5, units) float64, written over by each call.
    """

    def __init__(
        self, rows: int, units: int, inner: int, want: int, limits: Limits, *, bfloat: bool
    ) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError("the compiled kernel is not there; ask `backend` first")
        _check_built(want)
        step, pieces = _cut(rows, units, inner)
        self.pieces = pieces
        self.out = torch.zeros((SUMS, units), dtype=torch.float64)
        self._parts = torch.zeros((pieces, SUMS, units), dtype=torch.float64)
        self._job = _Job(
            rows=rows,
            units=units,
            inner=inner,
            step=step,
            pieces=pieces,
            bfloat=int(bfloat),
            what=want,
            by=_limits(limits.intervals, limits.middle, limits.near),
            parts=self._parts.data_ptr(),
            out=self.out.data_ptr(),
        )
        self._at = ctypes.addressof(self._job)
        self._run = loaded.all_sums

    def __call__(self, address: int) -> Tensor:
        """Sum the tensor at that address."""
        self._run(address, self._at)
        return self.out


_BUILT = frozenset({1, 6, 9, 11, 25, 31})


def gradient_sums(weight: Tensor, gradient: Tensor, total: Tensor | None, scale: float) -> Tensor:
    """Return (4, rows) float64 sums; all tensors float32, dense, laid out alike."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the compiled kernel is not there; ask `backend` first")
    rows = weight.shape[0] if weight.ndim else 1
    inner = weight.numel() // max(rows, 1)
    out = torch.zeros((4, rows), dtype=torch.float64)
    step = max(1, PIECE // max(inner, 1))
    pieces = -(-rows // step) if weight.numel() else 0
    addresses = weight.data_ptr(), gradient.data_ptr(), total.data_ptr() if total is not None else 0

    def work(piece: int) -> None:
        first = piece * step
        count = min(step, rows - first)
        at = 4 * first * inner
        w, g, t = addresses
        part = out if pieces == 1 else torch.zeros((4, count), dtype=torch.float64)
        loaded.gradient_sums(
            w + at, g + at, scale, t + at if t else None, count, inner, part.data_ptr()
        )
        if pieces > 1:
            out[:, first : first + count] = part

    _each(pieces, work)
    return out


def gradient_totals(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], totals: Sequence[Tensor], scale: float
) -> Tensor:
    """Return (weights, 4) float64: `gradient_sums` of each, over its rows. See there.

    By one thread it is one call: a network has hundreds of weights, most of them small.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("the compiled kernel is not there; ask `backend` first")
    out = torch.zeros((len(weights), 4), dtype=torch.float64)
    if torch.get_num_threads() > 1:
        for i, triple in enumerate(zip(weights, gradients, totals, strict=True)):
            by_row = gradient_sums(*triple, scale)
            loaded.across(by_row.data_ptr(), by_row.shape[1], out[i].data_ptr())
        return out
    rows = [weight.shape[0] if weight.ndim else 1 for weight in weights]
    jobs = (_Weight * len(weights))(
        *(
            _Weight(w.data_ptr(), g.data_ptr(), t.data_ptr(), count, w.numel() // max(count, 1))
            for w, g, t, count in zip(weights, gradients, totals, rows, strict=True)
        )
    )
    room = torch.empty((4, max(rows, default=1)), dtype=torch.float64)
    loaded.all_gradients(
        ctypes.addressof(jobs), len(weights), scale, room.data_ptr(), out.data_ptr()
    )
    return out


def moment_sums(x: Tensor, pivot: float, scale: float, near: float) -> Tensor:
    """Return (5,) float64 sums of a dense float32 tensor."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the compiled kernel is not there; ask `backend` first")
    # The kernel takes the pivot as float32; sums are about exactly that number.
    pieces = -(-x.numel() // PIECE)
    out = torch.zeros((max(pieces, 1), 5), dtype=torch.float64)
    start, goal = x.data_ptr(), out.data_ptr()

    def work(piece: int) -> None:
        first = piece * PIECE
        count = min(PIECE, x.numel() - first)
        loaded.moment_sums(start + 4 * first, count, pivot, scale, near, goal + 40 * piece)

    _each(pieces, work)
    return out.sum(0)
