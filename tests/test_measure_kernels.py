"""The fast sums against the plain ones, and the plain ones wherever the fast ones cannot be."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.measure import kernels, measure_network
from core.measure.batch import wanted_of
from core.measure.kernels import (
    Limits,
    Reader,
    Want,
    backend,
    compiled,
    gradient_sums,
    gradient_totals,
    plain,
    unit_sums,
)
from core.network.activations import FUNCTIONS, activation_of
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent

# At most 512 values are added in float32 before the sum goes on in float64, and each of these
# additions rounds by 6e-8. Terms are not negative, so nothing cancels.
ROUNDING = 512 * 6e-8
MEASURED = (
    Want.ABSOLUTE,
    Want.POSITIVE | Want.INSIDE,
    Want.ABSOLUTE | Want.NEAR,
    Want.ABSOLUTE | Want.NEAR | Want.OFFSET,
    Want.ABSOLUTE | Want.POSITIVE | Want.NEAR,
    Want.ABSOLUTE | Want.POSITIVE | Want.INSIDE | Want.NEAR | Want.OFFSET,
)
LIMITS = (
    Limits(),
    Limits(((-math.inf, 0.0),), near=0.05),
    Limits(((-math.inf, 0.0), (6.0, math.inf)), 3.0, 0.05),
    Limits(((-math.inf, -2.0), (-0.75, -0.5), (0.0, 0.0), (3.0, math.inf)), -1.0, 0.5),
)
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 0.05, -0.5, 6.0, 1e-42, 3e38)

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")),
    reason="this machine has no C compiler, so there is no compiled kernel to test",
)


def filled(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, *, odd: int = 0, seed: int = 0
) -> Tensor:
    """Return numbers of a shape, laid out in memory in one of the ways that networks do."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        x = 3 * torch.randn(size, generator=generator)
        flat = x.view(-1)
        for i in range(min(odd, len(flat))):
            place = int(torch.randint(len(flat), (), generator=generator))
            flat[place] = ODD[i % len(ODD)]
        return x.to(dtype)

    if layout == "channels last":
        return drawn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if layout == "sliced":
        return drawn(2 * shape[0] + 1, *shape[1:])[1::2]
    if layout == "padded":
        return drawn(*shape[:-1], shape[-1] + 3)[..., 1:-2]
    if layout == "expanded":
        return drawn(1, *shape[1:]).expand(shape)
    if layout == "turned":
        return drawn(*reversed(shape)).permute(*reversed(range(len(shape))))
    return drawn(*shape)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor and the axis of its units."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    kind = draw(st.sampled_from(["conv", "tokens", "rows", "vector", "volume"]))
    few, units = st.integers(1, 5), st.integers(1, 150)
    layout = draw(st.sampled_from(["contiguous", "sliced", "padded", "expanded", "turned"]))
    if kind == "conv":
        shape = (draw(few), draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(few))
        axis = 1
        layout = draw(st.sampled_from([layout, "channels last"]))
    elif kind == "volume":
        shape, axis = tuple(draw(few) for _ in range(5)), draw(st.sampled_from([1, 4]))
    elif kind == "tokens":
        shape, axis = (draw(few), draw(st.integers(1, 40)), draw(units)), 2
    elif kind == "rows":
        shape, axis = (draw(st.integers(1, 40)), draw(units)), 1
    else:
        shape, axis, layout = (draw(units),), 0, "contiguous"
    odd, seed = draw(st.sampled_from([0, 4, 30])), draw(st.integers(0, 2**32))
    return filled(shape, layout, dtype, odd=odd, seed=seed), axis


def check_agrees(found: Tensor, x: Tensor, axis: int, want: Want, limits: Limits) -> None:
    """Counts are exact; sums are those of float64 but for the rounding of float32."""
    numbers = (axis, int(want), limits.intervals, limits.middle, limits.near)
    counted = plain.unit_sums(x.float(), *numbers)
    summed = plain.unit_sums(x.double(), *numbers)
    assert found.dtype == torch.float64
    assert found.shape == (5, x.shape[axis])
    for row in (1, 2, 3):
        assert found[row].tolist() == counted[row].tolist(), Want(1 << row)
    for row in (0, 4):
        # Near the largest float32 a partial sum may overflow where float64 does not.
        huge = summed[row] > 3e38
        wanted = torch.where(huge, torch.inf, summed[row])
        sums = torch.where(found[row] > 3e38, torch.inf, found[row])
        torch.testing.assert_close(sums, wanted, rtol=ROUNDING, atol=1e-38, equal_nan=True)


# The compiled kernel.


@needs_compiler
def test_this_machine_sums_by_its_compiled_kernel() -> None:
    assert [backend("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)] == ["compiled"] * 2
    assert [backend("cpu", dtype) for dtype in (torch.float16, torch.float64)] == ["plain"] * 2


def test_every_read_that_measuring_takes_is_built() -> None:
    activations = {
        activation
        for function in FUNCTIONS
        if (activation := activation_of(function, (torch.zeros(1),), {})) is not None
    }
    taken = {int(wanted_of(activation, torch.float32)[0]) for activation in activations}

    assert taken | {Want.ABSOLUTE, Want.POSITIVE | Want.INSIDE} == {int(each) for each in MEASURED}
    assert {int(each) for each in MEASURED} == compiled._BUILT


@pytest.mark.parametrize("want", MEASURED, ids=lambda want: "+".join(f.name for f in want))
@settings(max_examples=40)
@given(given_=tensors(), limits=st.sampled_from(LIMITS))
@example(given_=(filled((601, 1100), "contiguous", torch.float32), 1), limits=LIMITS[2])
@example(given_=(filled((1100, 67), "contiguous", torch.float32), 1), limits=LIMITS[2])
@example(given_=(filled((3, 700, 131), "contiguous", torch.bfloat16), 2), limits=LIMITS[3])
@example(given_=(filled((2, 3, 91, 91), "contiguous", torch.float32), 1), limits=LIMITS[2])
@example(given_=(filled((2, 3, 91, 91), "contiguous", torch.bfloat16), 1), limits=LIMITS[3])
@example(given_=(filled((1, 2, 128, 129), "contiguous", torch.float32), 1), limits=LIMITS[1])
@example(given_=(filled((2, 5, 7, 6), "contiguous", torch.float16), 1), limits=LIMITS[2])
@example(given_=(filled((2, 5, 7, 6), "turned", torch.float64), 1), limits=LIMITS[2])
def test_sums_of_one_read_are_the_plain_sums(
    want: Want, given_: tuple[Tensor, int], limits: Limits
) -> None:
    x, axis = given_

    found = unit_sums(x, axis, want, limits)

    check_agrees(found, x, axis, want, limits)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 3, 0, 5)])
def test_a_tensor_of_nothing_sums_to_nothing(shape: tuple[int, ...]) -> None:
    found = unit_sums(torch.zeros(shape), 1, MEASURED[-1])

    assert found.tolist() == [[0.0] * shape[1]] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_read_neither_changes_its_tensor_nor_joins_its_graph(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    before = x.detach().clone()

    found = unit_sums(x, 1, MEASURED[-1], LIMITS[2])

    assert torch.equal(x, before)
    assert not found.requires_grad


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "axis"), [((3000, 401), 1), ((7, 33, 61, 67), 1)], ids=["rows", "runs"]
)
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], axis: int) -> None:
    # More entries than one piece of work holds, so that there is something to share.
    x = filled(shape, "contiguous", torch.float32)
    assert x.numel() > compiled.PIECE
    threads, found = torch.get_num_threads(), []

    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(unit_sums(x, axis, MEASURED[-1], LIMITS[2]))
    finally:
        torch.set_num_threads(threads)

    check_agrees(found[0], x, axis, MEASURED[-1], LIMITS[2])
    assert [torch.equal(each, found[0]) for each in found] == [True] * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "copied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_reader_gives_the_same_bits_time_after_time(
    layout: str, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        torch.set_num_threads(threads)
        for shape in ((2, 24, 9, 9), (3, 24, 9, 9), (40, 48, 33, 33)):
            reader = Reader(1, MEASURED[-1], LIMITS[2])
            for _ in range(3):
                x = torch.randn(shape).to(dtype)
                if layout == "channels_last":
                    x = x.contiguous(memory_format=torch.channels_last)
                if layout == "copied":
                    x = x.repeat_interleave(2, 3)[..., ::2]
                x.requires_grad_(True)
                assert torch.equal(reader(x), unit_sums(x, 1, MEASURED[-1], LIMITS[2]))
    finally:
        torch.set_num_threads(before)


# Sums over a weight's gradient.


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight, its gradient and a running total, each laid out as it may be."""
    few = st.integers(1, 5)
    shape = draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(1, 70)),
            st.tuples(st.integers(1, 20), st.integers(1, 150)),
            st.tuples(few, few, few),
            st.tuples(few, few, few, few),
        )
    )
    seed, sliced = draw(st.integers(0, 2**32)), draw(st.booleans())

    def one(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + i)
        x = torch.randn(shape, generator=generator)
        x = torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, x)
        if len(shape) == 4 and draw(st.booleans()):
            x = x.contiguous(memory_format=torch.channels_last)
        if len(shape) == 3 and draw(st.booleans()):
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if len(shape) == 2 and sliced:
            x = x.repeat_interleave(2, 1)[:, ::2]
        return x

    return one(0), one(1), one(2) if draw(st.booleans()) else None


def large_gradient(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight, gradient, total = torch.randn(3, *shape).unbind()
    return weight, gradient, total


@given(given_=gradients(), scale=st.sampled_from([1.0, 0.25, 2.0**-16]))
@example(given_=large_gradient((3, 9001)), scale=1.0)
@example(given_=large_gradient((700, 30, 5, 5)), scale=0.25)
def test_sums_over_a_gradient_are_those_of_float64_and_the_total_grows_by_it(
    given_: tuple[Tensor, Tensor, Tensor | None], scale: float
) -> None:
    weight, gradient, total = given_
    g = (gradient.double() * scale).reshape(weight.shape[0] if weight.ndim else 1, -1)
    w = weight.double().reshape(g.shape)
    wanted = torch.stack([(g**2).sum(1), g.abs().sum(1), (w * g).abs().sum(1), (g == 0).sum(1)])
    added = None if total is None else total + gradient * scale
    given_total = None if total is None else total.clone(memory_format=torch.preserve_format)

    found = gradient_sums(weight, gradient, given_total, scale=scale)

    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=1e-30)
    assert found[3].tolist() == wanted[3].tolist()
    if given_total is not None:
        # One rounding of the product and one of the sum, fused or not.
        torch.testing.assert_close(given_total, added, rtol=2e-7, atol=2e-7)


def test_a_single_number_has_a_gradient_by_the_plain_sums_too() -> None:
    weight, gradient = torch.tensor(3.0), torch.tensor(-2.0)

    found = plain.gradient_sums(weight, gradient, None, 0.5)

    assert found.tolist() == [[1.0], [1.0], [3.0], [0.0]]


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_its_row_alone(odd: float) -> None:
    weight, gradient = torch.ones(3, 40), torch.ones(3, 40)
    gradient[1, 37] = odd

    found = gradient_sums(weight, gradient)

    assert found[:3].isfinite().tolist() == [[True, False, True]] * 3


@needs_compiler
def test_threads_do_not_change_a_bit_of_a_gradient() -> None:
    weight, gradient, total = large_gradient((2000, 600))
    threads, found, totals = torch.get_num_threads(), [], []

    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            totals.append(total.clone())
            found.append(gradient_sums(weight, gradient, totals[-1], scale=0.5))
    finally:
        torch.set_num_threads(threads)

    assert [torch.equal(each, found[0]) for each in found] == [True] * 3
    assert [torch.equal(each, totals[0]) for each in totals] == [True] * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_totals_of_many_gradients_are_those_of_each(threads: int) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    shapes = ((), (5,), (7, 3), (40, 6, 3, 3), (2000, 600))
    weights, gradients_, totals = ([torch.randn(shape) for shape in shapes] for _ in range(3))
    weights[1][2] = gradients_[1][2] = 0.0
    kept = [each.clone() for each in totals]
    try:
        torch.set_num_threads(threads)
        found = gradient_totals(weights, gradients_, totals, scale=0.5)
    finally:
        torch.set_num_threads(before)

    for row, weight, gradient, total, old in zip(
        found, weights, gradients_, totals, kept, strict=True
    ):
        truth = plain.gradient_sums(weight, gradient, old, 0.5).sum(1)
        torch.testing.assert_close(row, truth, rtol=ROUNDING, atol=1e-30)
        assert torch.equal(total, old)


@needs_compiler
def test_threads_do_not_change_a_bit_of_totals() -> None:
    weight, gradient, total = large_gradient((2000, 600))
    before, found = torch.get_num_threads(), []

    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(gradient_totals([weight], [gradient], [total.clone()], scale=0.5))
    finally:
        torch.set_num_threads(before)

    assert [torch.equal(each, found[0]) for each in found] == [True] * 3


# Where there is no kernel.


def forget() -> None:
    compiled.library.cache_clear()
    kernels._means.cache_clear()


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, with everything forgotten before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("LIMBER_KERNELS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    forget()
    yield tmp_path
    forget()


def check_falls_back() -> None:
    x = filled((3, 5, 7, 7), "contiguous", torch.float32)
    assert backend("cpu") == "plain"
    check_agrees(unit_sums(x, 1, MEASURED[-1], LIMITS[2]), x, 1, MEASURED[-1], LIMITS[2])
    weight, gradient, total = large_gradient((3, 5))
    assert gradient_sums(weight, gradient, total).shape == (4, 3)


def test_asking_for_the_plain_sums_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBER_KERNELS", "plain")

    check_falls_back()


@needs_compiler
def test_a_kernel_is_built_once_and_kept(anew: Path) -> None:
    def stamps() -> dict[str, int]:
        files = (anew / "limber" / "kernels").iterdir()
        return {each.name: each.stat().st_mtime_ns for each in files}

    assert backend("cpu") == "compiled"
    before = stamps()

    forget()

    assert backend("cpu") == "compiled"
    assert stamps() == before


@needs_compiler
def test_a_compiler_that_fails_is_met_by_the_plain_sums(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(compiled, "_compilers", lambda: [("false",)])

    check_falls_back()
    assert list(anew.rglob("*.so")) == []
    # What is built for a moment is gone with it.
    assert [each.name for each in anew.iterdir()] == ["limber"]


@needs_compiler
def test_a_compiler_that_fails_is_followed_by_the_next(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false --odd 'option'")

    assert backend("cpu") == "compiled"


@needs_compiler
def test_a_compiler_may_be_a_command_of_several_words(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "env cc")

    assert compiled._compilers()[0] == ("env", "cc")
    assert backend("cpu") == "compiled"


def test_a_relative_cache_folder_is_ignored(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")

    assert compiled._folder() == Path.home() / ".cache" / "limber" / "kernels"


@needs_compiler
@pytest.mark.parametrize(("suffix", "share"), [(".so", 0.6), (".sha256", 0.0)])
def test_a_cut_off_file_in_the_cache_is_built_again(anew: Path, suffix: str, share: float) -> None:
    # Loading half a library does not fail, it ends the process.
    built = compiled.built(compiled._folder(), compiled._compilers()[0])
    size = built.stat().st_size
    damaged = built.with_suffix(suffix)
    damaged.write_bytes(damaged.read_bytes()[: int(share * damaged.stat().st_size)])

    assert backend("cpu") == "compiled"
    assert built.stat().st_size == size


@needs_compiler
def test_what_a_compiler_made_that_is_no_library_is_met_by_the_plain_sums(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = anew / "odd-compiler"
    odd.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo nothing > "$2"\n')
    odd.chmod(0o755)
    monkeypatch.setattr(compiled, "_compilers", lambda: [(str(odd),)])

    check_falls_back()


@needs_compiler
def test_a_library_without_the_functions_is_met_by_the_plain_sums(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = anew / "other.c"
    other.write_text("int something_else(void) { return 1; }\n")
    monkeypatch.setattr(compiled, "SOURCE", other)

    check_falls_back()


@needs_compiler
def test_a_library_that_sums_wrongly_is_met_by_the_plain_sums(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = anew / "other.c"
    text = compiled.SOURCE.read_text(encoding="utf-8")
    wrong = text.replace("s->absolute += magnitude(x)", "s->absolute += x")
    assert wrong != text
    other.write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(compiled, "SOURCE", other)

    check_falls_back()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_met_by_a_folder_of_the_moment(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (anew / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "file"))

    assert backend("cpu") == "compiled"


@needs_compiler
def test_a_cache_of_another_person_is_not_loaded_from(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, compiler = compiled._folder(), compiled._compilers()[0]
    assert compiled.built(folder, compiler).is_file()
    monkeypatch.setattr(os, "getuid", lambda: -1)

    with pytest.raises(PermissionError):
        compiled.built(folder, compiler)
    check_falls_back()


def test_without_any_folder_to_write_to_the_plain_sums_are_taken(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (anew / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(anew / "file"))

    check_falls_back()


MEASURE = """
import json
from core.measure import measure_network
from tests.zoo import ZOO

network = ZOO["depthwise"]
found = measure_network(network.module(), network.batches(), network.outline().layers)
print(json.dumps({
    "backend": found.backend,
    "metrics": {
        layer: {name: figure.value for name, figure in figures.items()}
        for layer, figures in found.metrics.items()
    },
}))
"""


def test_a_machine_without_a_compiler_finds_the_same_figures(tmp_path: Path) -> None:
    network = ZOO["depthwise"]
    wanted = measure_network(network.module(), network.batches(), network.outline().layers)
    bare = {"PATH": "", "CC": "", "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    kept = {key: os.environ[key] for key in ("HOME", "LD_LIBRARY_PATH") if key in os.environ}

    answer = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=ROOT,
        env=kept | bare,
        check=True,
        capture_output=True,
        text=True,
    )

    found = json.loads(answer.stdout)
    assert found["backend"] == "plain"
    assert list(tmp_path.iterdir()) == []
    assert found["metrics"] == {
        layer: {
            name: None if figure.value is None else pytest.approx(figure.value, rel=1e-5, abs=1e-9)
            for name, figure in figures.items()
        }
        for layer, figures in wanted.metrics.items()
    }


# The Triton kernel, run by its interpreter on the CPU.

INTERPRETED = """
import torch
from core.measure.kernels import folded, gpu
from tests.test_measure_kernels import LIMITS, MEASURED, check_agrees, filled

assert gpu.available()
# The interpreter is slow; the kernel itself does not know how many rows a program takes.
gpu.ROWS_EACH = 64
shapes = (
    ((70, 67), 1, "contiguous"), ((130, 3), 1, "sliced"), ((2, 9, 70), 2, "expanded"),
    ((2, 3, 5, 7), 1, "contiguous"), ((2, 3, 33, 33), 1, "contiguous"),
    ((3, 5, 4, 4), 1, "channels last"), ((5,), 0, "contiguous"), ((2, 3, 2, 2, 2), 1, "turned"),
)
done = 0
for number, (shape, axis, layout) in enumerate(shapes):
    for i, want in enumerate(MEASURED):
        limits = LIMITS[(number + i) % len(LIMITS)]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[(number + i) % 3]
        x = filled(shape, layout, dtype, odd=(0, 30)[i % 2], seed=number)
        found = gpu.unit_sums(*folded(x, axis), int(want), limits)
        check_agrees(found, x, axis, want, limits)
        done += 1
print(done)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not made for this platform"
)
def test_the_triton_kernel_gives_the_plain_sums() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        capture_output=True,
        text=True,
    )

    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) == 8 * len(MEASURED)


# Built for a GPU that is not here: Triton's compiler needs none.
OFFLINE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from core.measure.kernels import gpu
from tests.test_measure_kernels import MEASURED

target = GPUTarget("cuda", 90, 32)
done = 0
for kernel, sizes in (
    (gpu._last, {"rows": "i32", "units": "i32"}), (gpu._runs, {"units": "i32", "inner": "i32"})
):
    tiles = {"EACH": 1024, "TR": 32, "TU": 64} if kernel is gpu._last else {"TI": 1024}
    for number, want in enumerate(MEASURED):
        pair = ("fp32",) * (1 + number % 2)
        numbers = {"WANT": int(want), "INTERVALS": len(pair), **tiles}
        dtype = ("fp32", "bf16", "fp16")[number % 3]
        signature = {
            "x_ptr": f"*{dtype}", "out_ptr": "*fp32", **sizes, "lows": pair, "highs": pair,
            "middle": "fp32", "near": "fp32", **dict.fromkeys(numbers, "constexpr"),
        }
        places = {(list(signature).index(name),): value for name, value in numbers.items()}
        built = triton.compile(ASTSource(kernel, signature=signature, constexprs=places), target)
        assert built.asm["cubin"]
        assert built.asm["ptx"].count("st.global")
        done += 1
print(done)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not made for this platform"
)
def test_the_triton_kernel_builds_for_a_gpu(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [str(2 * len(MEASURED))]
