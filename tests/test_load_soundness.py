"""Number formats and values that no network has as weights: refused by name, never cast."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.errors import ModelError
from core.load import build_module, load_model, resolve_model
from core.load.soundness import FLOATS, WHOLE, fitted_state

DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
# As an architecture draws them: what a file may hold at each kind of place is another matter.
TARGET = {
    "conv.weight": torch.zeros(2, 2),
    "norm.running_mean": torch.zeros(2),
    "norm.running_var": torch.ones(2),
    "norm.num_batches_tracked": torch.tensor(0),
    "attention.index": torch.tensor([[0, 1], [1, 0]]),
    "attention.kept": torch.tensor([True, False]),
    "attention.mask": torch.tensor([0.0, -math.inf]),
    "gate.complex_weight": torch.zeros(2, dtype=torch.complex64),
}
FLOATING = ("conv.weight", "norm.running_mean", "norm.running_var", "attention.mask")


def stored_as(name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of that format in the place of that name; values that fit where there are any."""
    try:
        return TARGET[name].to(dtype)
    except (RuntimeError, NotImplementedError):
        pass
    try:
        return torch.empty(TARGET[name].shape, dtype=dtype)
    except (RuntimeError, NotImplementedError):
        return torch.quantize_per_tensor(torch.zeros(TARGET[name].shape), 1.0, 0, dtype)


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.filterwarnings("ignore:.*support is experimental", "ignore:Casting complex values")
@pytest.mark.parametrize("name", TARGET)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format_of_torch_is_taken_or_refused_by_name(dtype: torch.dtype, name: str) -> None:
    wanted = TARGET[name]
    stored = stored_as(name, dtype)
    takes = {
        "float": dtype in FLOATS,
        "complex": dtype in FLOATS or dtype.is_complex,
        # What an index is stored as matters no more than that it comes back the same.
        "whole": dtype in FLOATS or dtype in WHOLE,
    }["float" if wanted.is_floating_point() else "complex" if wanted.is_complex() else "whole"]

    if takes:
        fitted, cast = fitted_state({name: stored}, TARGET, [name], title="net")
        assert fitted[name].dtype == wanted.dtype
        assert torch.equal(fitted[name], wanted)
        told = dtype != wanted.dtype and wanted.is_floating_point()
        assert cast == ((str(dtype).removeprefix("torch."),) if told else ())
        return
    with pytest.raises(ModelError) as refused:
        fitted_state({name: stored}, TARGET, [name], title="net")
    said = str(refused.value)
    assert said.startswith(f'The weights of net cannot be used: "{name}" ')
    assert str(dtype).removeprefix("torch.") in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["attention.index", "attention.kept"])
@pytest.mark.parametrize(
    "odd", [0.5, 2.0**80, math.nan, math.inf], ids=["half", "large", "NaN", "infinite"]
)
def test_an_index_that_a_cast_would_change_is_refused(name: str, odd: float) -> None:
    stored = torch.full(TARGET[name].shape, odd)

    with pytest.raises(ModelError, match=rf'"{name}" is stored as float32'):
        fitted_state({name: stored}, TARGET, [name], title="net")


def test_a_count_of_batches_is_bookkeeping_and_any_number_will_do() -> None:
    name = "norm.num_batches_tracked"
    for odd, kept in ((12.5, 12), (math.nan, 0), (math.inf, 0)):
        stored = {name: torch.tensor(odd, dtype=torch.float16)}
        fitted, _ = fitted_state(stored, TARGET, [name], title="net")
        assert fitted[name].item() == kept


@given(
    name=st.sampled_from(FLOATING),
    dtype=st.sampled_from(FLOATS),
    odd=st.sampled_from([math.nan, math.inf, -math.inf]),
    flags=st.lists(st.booleans(), min_size=2, max_size=2),
)
def test_values_that_are_not_finite_are_counted_by_name(
    name: str, dtype: torch.dtype, odd: float, flags: list[bool]
) -> None:
    wanted = TARGET[name]
    where = torch.tensor(flags)
    stored = torch.where(where, odd, wanted.double()).to(dtype)
    # A mask may hold -inf where the architecture's own does.
    count = int((where & wanted.isfinite()).sum())

    if not count:
        fitted_state({name: stored}, TARGET, [name], title="net")
        return
    with pytest.raises(ModelError) as refused:
        fitted_state({name: stored}, TARGET, [name], title="net")

    assert str(refused.value).startswith(
        "The weights of net hold values that are not finite numbers: "
        f'{count} of {wanted.numel()} in "{name}". '
    )


def test_what_float32_cannot_hold_is_no_infinity_of_its_own() -> None:
    stored = torch.full((2, 2), 1e39, dtype=torch.float64)

    with pytest.raises(ModelError, match=r"too large for float32: 4 of 4 in \"conv\.weight\"\."):
        fitted_state({"conv.weight": stored}, TARGET, ["conv.weight"], title="net")


@given(
    powers=st.lists(st.integers(-1_000, -20), min_size=4, max_size=4),
    zeros=st.lists(st.booleans(), min_size=4, max_size=4),
    name=st.sampled_from(["conv.weight", "norm.running_mean", "norm.running_var"]),
)
def test_what_float32_makes_0_is_refused_where_nothing_larger_is_beside_it(
    powers: list[int], zeros: list[bool], name: str
) -> None:
    entries = [0.0 if zero else 2.0**power for power, zero in zip(powers, zeros, strict=True)]
    stored = torch.tensor(entries, dtype=torch.float64)
    vanishing = sum(0 < entry <= 2.0**-150 for entry in entries)
    harmless = max(entries) >= 2.0**-126 or name.startswith("norm.running")

    if not vanishing or harmless:
        fitted, cast = fitted_state({name: stored}, {name: torch.ones(4)}, [name], title="net")
        assert cast == ("float64",)
        # As close to what is stored as float32 rounds the largest entry.
        if not name.startswith("norm.running") and vanishing:
            away = (fitted[name].double() - stored).abs().max()
            assert away <= max(entries) * 2.0**-24
        return
    with pytest.raises(ModelError) as refused:
        fitted_state({name: stored}, {name: torch.ones(4)}, [name], title="net")
    assert str(refused.value) == (
        f"The weights of net hold values that are too small for float32: {vanishing} of 4 in "
        f'"{name}" would become 0. Give weights above 1.2e-38.'
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_smallest_number_of_a_narrower_format_is_kept(dtype: torch.dtype) -> None:
    smallest = torch.full((2, 2), torch.finfo(dtype).smallest_normal, dtype=dtype)

    fitted, _ = fitted_state({"conv.weight": smallest}, TARGET, ["conv.weight"], title="net")

    assert bool((fitted["conv.weight"] > 0).all())


@pytest.mark.parametrize("low", [-1e-30, -1.0, -math.inf])
def test_a_variance_below_0_is_refused_and_one_of_0_is_not(low: float) -> None:
    name = "norm.running_var"
    fitted_state({name: torch.zeros(2)}, TARGET, [name], title="net")

    with pytest.raises(ModelError, match=r'1 of 2 in "norm\.running_var"'):
        fitted_state({name: torch.tensor([1.0, low])}, TARGET, [name], title="net")


def test_further_tensors_are_counted() -> None:
    names = ["conv.weight", "norm.running_mean", "norm.running_var"]
    whole = {name: TARGET[name].to(torch.int8) for name in names}
    broken = {name: TARGET[name] * math.nan for name in names}

    with pytest.raises(
        ModelError, match=r'"conv\.weight" \(and 2 more tensors\) is stored as int8'
    ):
        fitted_state(whole, TARGET, names, title="net")
    with pytest.raises(ModelError, match=r'4 of 4 in "conv\.weight" \(and 2 more tensors\)'):
        fitted_state(broken, TARGET, names, title="net")


# Through a file, as people give them.

LAYER = "blocks.2.0.conv_pwl.weight"


def checkpoint(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    spec = resolve_model("timm:test_efficientnet", weights="none")
    state = build_module(spec, classes=8, seed=0).state_dict()
    change(state)
    torch.save(state, folder / "mine.pt")
    return folder / "mine.pt"


def not_finite(state: dict[str, Tensor]) -> None:
    state[LAYER].view(-1)[:12] = math.nan


def whole(state: dict[str, Tensor]) -> None:
    state[LAYER] = (state[LAYER] * 100).to(torch.int8)


def below(state: dict[str, Tensor]) -> None:
    state["bn1.running_var"][0] = -1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (not_finite, f'not finite numbers: 12 of 3,072 in "{LAYER}". Nothing'),
        (whole, f'cannot be used: "{LAYER}" is stored as int8: whole numbers'),
        (below, 'hold variances below 0: 1 of 24 in "bn1.running_var". Give'),
    ],
)
@pytest.mark.parametrize("command", ["measure", "plan", "finetune"])
def test_every_command_refuses_such_a_checkpoint_in_one_line(
    command: str, change: Any, says: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    path = checkpoint(tmp_path, change)
    more = {"plan": ("--classes", 8, "--layers", "conv_stem")}.get(
        command, ("--data", "bloodmnist")
    )

    code, _, wrong = run(
        *(command, "--model", "timm:test_efficientnet", "--checkpoint", path),
        *(*more, "--out", tmp_path / "out"),
    )

    assert code == 2
    assert wrong.count("\n") == 1
    assert says in wrong
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_replaced_may_hold_anything(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state["classifier.weight"].fill_(math.nan))
    spec = resolve_model("timm:test_efficientnet", checkpoint=str(path))

    assert load_model(spec, classes=3).card.classes == 3
    with pytest.raises(ModelError, match=r'in "classifier\.weight"'):
        load_model(spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_floats_is_said(dtype: torch.dtype, tmp_path: Path) -> None:
    def cast(state: dict[str, Tensor]) -> None:
        state |= {n: v.to(dtype) for n, v in state.items() if v.is_floating_point()}

    path = checkpoint(tmp_path, cast)
    loaded = load_model(resolve_model("timm:test_efficientnet", checkpoint=str(path)), classes=3)

    kind = str(dtype).removeprefix("torch.")
    note = f"The checkpoint's weights are stored as {kind}, used as float32."
    assert note in [told.sentence for told in loaded.card.notes]
