"""Shards: measuring apart and merging gives what one pass gives, in any order and grouping."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import core
from core.errors import OptionError
from core.measure import Shard, figures_of, gauging, shard_from, shard_state
from core.measure.shard import RANK_ROWS, RowSample, positions
from core.pipeline.measuring import MeasureSettings, diagnose
from core.pipeline.parts import _part_sha256, measure_part, merge_parts
from core.records import Diagnosis, LayerInfo, MetricValue, ParameterInfo
from core.reductions import Moments
from tests.reference import looked_at_positions, mixed
from tests.test_network_trace import Turning
from tests.zoo import CLASSES, ZOO

# Sums of a few batches in float64, added in another order.
DOUBLE = 1e-12
# A running total in float32: each addition rounds by 6e-8 of it, and there are a few.
TOTALS = 1e-6

# Moments over batches.

table = st.lists(
    st.lists(
        st.one_of(st.just(math.nan), st.floats(-1e3, 1e3)),
        min_size=4,
        max_size=4,
    ),
    min_size=1,
    max_size=8,
)


def grouped(parts: Sequence[Moments | Shard], order: int) -> Moments | Shard:
    """Merge parts two by two, in an order and grouping that a number picks."""
    left, draw = list(parts), np.random.default_rng(order)
    while len(left) > 1:
        one = left.pop(draw.integers(len(left)))
        other = left.pop(draw.integers(len(left)))
        left.append(one.merged(other))
    return left[0]


@given(values=table, order=st.integers(0, 2**32))
@example(values=[[math.nan] * 4] * 3, order=0)
def test_moments_merged_in_any_order_are_numpys(values: list[list[float]], order: int) -> None:
    rows = np.array(values)
    count = (~np.isnan(rows)).sum(0)
    mean = np.where(count, np.nansum(rows, 0) / np.maximum(count, 1), 0.0)
    m2 = np.nansum((rows - mean) ** 2, 0)

    found = grouped([Moments.of(torch.tensor(row, dtype=torch.float64)) for row in values], order)

    assert found.count.tolist() == count.tolist()
    # A thousand is the largest value; float64 rounds a few sums of it or of its square.
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-12, atol=1e-12 * 1e3)
    np.testing.assert_allclose(found.m2.numpy(), m2, rtol=1e-9, atol=1e-12 * 1e6)


def test_an_entry_that_never_came_counts_nothing() -> None:
    missing = Moments.of(torch.tensor([math.nan, 2.0]))

    found = missing.merged(missing)

    assert (found.count.tolist(), found.mean.tolist(), found.m2.tolist()) == (
        [0.0, 2.0],
        [0.0, 2.0],
        [0.0, 0.0],
    )


# Which positions and rows are looked at.


@given(
    first=st.integers(0, 10**7),
    images=st.integers(1, 4),
    count=st.integers(1, 5000),
    most=st.integers(1, 9),
    salt=st.integers(0, 2**40),
)
def test_positions_depend_on_the_image_alone_and_lie_one_in_each_stretch(
    first: int, images: int, count: int, most: int, salt: int
) -> None:
    samples = np.arange(first, first + images)

    found = positions(samples, count, most=most, salt=salt)

    alone = [positions(samples[i : i + 1], count, most=most, salt=salt)[0] for i in range(images)]
    assert found.tolist() == [each.tolist() for each in alone]
    chosen = min(most, count)
    assert found.shape == (images, chosen)
    stretches = np.arange(chosen + 1) * count // chosen
    assert (found >= stretches[:-1]).all()
    assert (found < stretches[1:]).all()


@given(first=st.integers(0, 10**7), count=st.integers(1, 300), most=st.integers(1, 9))
def test_positions_are_those_of_the_written_hash(first: int, count: int, most: int) -> None:
    found = positions(np.array([first]), count, most=most, salt=count)

    assert found[0].tolist() == looked_at_positions(first, count, most)


def test_every_position_is_chosen_about_as_often() -> None:
    found = positions(np.arange(20_000), 16, most=8, salt=16)

    counts = np.bincount(found.ravel(), minlength=16)
    # Each of two in a stretch: 10 000 times, give or take five standard deviations of 71.
    assert (np.abs(counts - 10_000) < 5 * 71).all()


@given(
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=5),
    order=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_a_sample_holds_the_rows_with_the_smallest_keys_however_they_came(
    sizes: list[int], order: int
) -> None:
    total = sum(sizes)
    keys = np.random.default_rng(order).permutation(total).astype(np.uint64)
    rows = torch.from_numpy(keys.astype(np.float32))[:, None]
    parts, begin = [], 0
    for size in sizes:
        part, end = RowSample(), begin + size
        for at in range(begin, end, 300):
            until = min(at + 300, end)
            part.add(keys[at:until], lambda places, at=at: rows[at + torch.from_numpy(places)])
        parts.append(part)
        begin = end

    found = grouped(parts, order)

    found_keys, kept = found.settled()
    assert found.offered == total
    assert found_keys.tolist() == list(range(min(total, RANK_ROWS)))
    assert ([] if kept is None else kept[:, 0].tolist()) == list(range(min(total, RANK_ROWS)))


# Shards of a network.

SHARDED = ("windowed", "multi_head", "depthwise", "functional", "masked_vit")
SIZES = (3, 4, 2, 3, 3, 3, 3)


@cache
def batches_of(case: str) -> list[tuple[Tensor, Tensor]]:
    size, generator = ZOO[case].size, torch.Generator().manual_seed(7)
    return [
        (
            torch.randn((n, 3, size, size), generator=generator),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in SIZES
    ]


def shard_of(case: str, chosen: Sequence[int]) -> Shard:
    """Measure some of the batches in a gauge of their own."""
    network = ZOO[case]
    with gauging(network.module(), network.outline().layers) as gauge:
        for i in chosen:
            gauge.add(*batches_of(case)[i], first=sum(SIZES[:i]))
    return gauge.shard


@cache
def one_pass(case: str) -> dict[str, Tensor]:
    return shard_state(shard_of(case, range(len(SIZES))))


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        part = name.rpartition("/")[2]
        if part in ("header", "counts", "count", "keys", "sample"):
            assert torch.equal(found[name], value), name
        else:
            close = TOTALS if part == "total" else DOUBLE
            reach = float(value.abs().max()) if value.numel() else 0.0
            # Squared deviations are small beside the squares they come from.
            floor = close * reach if part != "m2" else 1e-12
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=floor, msg=lambda text, name=name: name + text
            )


splits = st.lists(st.integers(0, 3), min_size=len(SIZES), max_size=len(SIZES))


@pytest.mark.parametrize("case", SHARDED)
@settings(max_examples=12)
@given(split=splits, order=st.integers(0, 2**32))
@example(split=[0, 1, 2, 3, 4, 5, 6], order=0)
@example(split=[1, 0, 1, 0, 1, 0, 1], order=1)
def test_shards_merged_in_any_order_are_what_one_pass_leaves(
    case: str, split: list[int], order: int
) -> None:
    groups = [[i for i, to in enumerate(split) if to == each] for each in sorted(set(split))]
    shards = [shard_of(case, group) for group in groups]

    merged = grouped(shards, order)

    check_same(shard_state(merged), one_pass(case))


def test_the_rows_kept_are_those_whose_images_and_positions_hash_lowest() -> None:
    # Four windows of four tokens an image: more rows than are kept.
    entries = 4 * sum(SIZES)
    keys = sorted(
        mixed(entry * 2**24 + place + 1) for entry in range(entries) for place in range(4)
    )
    assert len(keys) > RANK_ROWS

    state = one_pass("windowed")

    assert state["site/act/keys"].numpy().view(np.uint64).tolist() == keys[:RANK_ROWS]
    assert state["site/act/sample"].shape == (RANK_ROWS, 12)
    assert state["site/act/counts"][2] == len(keys)


def test_the_size_of_a_shard_does_not_grow_with_the_images() -> None:
    def size(state: dict[str, Tensor]) -> int:
        return sum(value.numel() for value in state.values())

    shard = shard_of("windowed", range(len(SIZES)))
    twice = shard.merged(shard)

    assert size(shard_state(twice)) == size(one_pass("windowed"))


def test_merging_changes_neither_shard() -> None:
    left, right = shard_of("windowed", [0, 1]), shard_of("windowed", [2])
    before = [shard_state(left), shard_state(right)]

    left.merged(right)

    for state, shard in zip(before, (left, right), strict=True):
        after = shard_state(shard)
        assert [name for name in state if not torch.equal(state[name], after[name])] == []


def test_an_empty_shard_changes_nothing() -> None:
    network = ZOO["windowed"]
    with gauging(network.module(), network.outline().layers) as gauge:
        empty = gauge.shard
    shard = shard_of("windowed", range(len(SIZES)))

    check_same(shard_state(empty.merged(shard)), one_pass("windowed"))
    check_same(shard_state(shard.merged(empty)), one_pass("windowed"))


def test_shards_of_different_networks_do_not_merge() -> None:
    with pytest.raises(ValueError, match="the shards are of different networks"):
        shard_of("windowed", [0]).merged(shard_of("functional", [0]))


@pytest.mark.parametrize("case", SHARDED)
def test_a_shard_comes_back_from_its_file_to_the_bit(case: str, tmp_path: Path) -> None:
    state = one_pass(case)
    safetensors.torch.save_file(state, tmp_path / "shard.safetensors")

    again = shard_state(shard_from(safetensors.torch.load_file(tmp_path / "shard.safetensors")))

    assert again.keys() == state.keys()
    assert [name for name in state if not torch.equal(state[name], again[name])] == []


def test_figures_of_merged_shards_are_those_of_one_pass() -> None:
    network = ZOO["windowed"]
    found = []
    for parts in ([range(len(SIZES))], [[4, 5, 6], [2, 0], [1, 3]]):
        with gauging(network.module(), network.outline().layers) as gauge:
            gauge.learn_sites(*batches_of("windowed")[0])
            for part in parts:
                gauge.shard = gauge.shard.merged(shard_of("windowed", part))
        found.append(figures_of(gauge.summed))

    whole, merged = found
    assert merged.loss == pytest.approx(whole.loss, rel=DOUBLE)
    for layer, figures in whole.metrics.items():
        check_figures(merged.metrics[layer], figures)


def test_learning_which_activations_there_are_leaves_no_sums() -> None:
    network = ZOO["windowed"]
    with gauging(network.module(), network.outline().layers) as gauge:
        before = shard_state(gauge.shard)
        gauge.learn_sites(*batches_of("windowed")[0])

    after = shard_state(gauge.shard)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert list(gauge.sites) == ["act"]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("site/act/counts", torch.zeros(1, dtype=torch.int64)),
        ("site/act/sums", torch.zeros(4, 12)),
        ("site/act/gradient", torch.zeros(11)),
        ("site/act/sample", torch.zeros(3, 12)),
        ("header", torch.zeros(1, dtype=torch.int64)),
        ("heads/attn.softmax:attention/counts", torch.zeros(0, dtype=torch.int64)),
        ("site/act/sums", None),
        ("loss", None),
    ],
)
def test_a_damaged_shard_is_refused(name: str, damaged: Tensor | None) -> None:
    state = dict(one_pass("windowed"))
    assert name in state
    state.pop(name)
    if damaged is not None:
        state[name] = damaged

    with pytest.raises((KeyError, ValueError)):
        shard_from(state)


# The whole way: parts of a measurement in files.

ASKED = MeasureSettings(samples=16, batch_size=4, image_size=64, device="cpu")
BETWEEN = frozenset({"grad_snr", "optimization_readiness"})


def check_figures(
    found: dict[str, MetricValue], wanted: dict[str, MetricValue], *, names: Sequence[str] = ()
) -> None:
    for name in names or wanted:
        one, other = found[name], wanted[name]
        assert (one.n, one.cap, one.reason) == (other.n, other.cap, other.reason), name
        # Gradients are added up in float32; what is left of two batches' difference less so.
        close = 1e-4 if name in BETWEEN else 1e-5 if "grad" in name else 1e-9
        # Added up in another order, an entry in 100,000 may come out as exactly zero.
        apart = 1e-5 if name == "grad_zero_fraction" else 1e-12
        for each, truth in ((one.value, other.value), (one.half_width, other.half_width)):
            assert each == (None if truth is None else pytest.approx(truth, rel=close, abs=apart))


def parts_in(folder: Path, parts: int) -> list[Path]:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")
    paths = [folder / f"{part}-of-{parts}.safetensors" for part in range(1, parts + 1)]
    for part, path in enumerate(paths, start=1):
        measure_part(spec, data, path, ASKED, part=part, parts=parts)
    return paths


@pytest.fixture(scope="module")
def whole() -> tuple[Diagnosis, dict[str, np.ndarray]]:
    """The diagnosis of one pass."""
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")
    return diagnose(spec, data, ASKED)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three parts of the same measurement: two batches, one, one."""
    return parts_in(tmp_path_factory.mktemp("parts"), 3)


def rewritten(
    path: Path, folder: Path, recipe: dict[str, object], **tensors: Tensor | None
) -> Path:
    """Copy a part with some of its recipe or tensors replaced, sealed anew."""
    with safetensors.safe_open(path, "pt") as opened:
        known = json.loads(opened.metadata()["limber_part"])
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    for name, value in tensors.items():
        state.pop(name)
        if value is not None:
            state[name] = value
    copy = folder / f"changed-{path.name}"
    text = json.dumps(known | recipe)
    meta = {"limber_part": text, "sha256": _part_sha256(text, state)}
    safetensors.torch.save_file(state, copy, metadata=meta)
    return copy


def test_merged_parts_are_the_diagnosis_of_one_pass(
    whole: tuple[Diagnosis, dict[str, np.ndarray]], parts: list[Path]
) -> None:
    wanted, wanted_units = whole

    found, units = merge_parts([parts[2], parts[0], parts[1]])

    timed = {"wall_s": 0.0, "overhead_fraction": None}
    losses = {"loss": 0.0, "twin_loss": 0.0}
    assert found.header.model_copy(update=timed | losses) == wanted.header.model_copy(
        update=timed | losses
    )
    assert found.header.loss == pytest.approx(wanted.header.loss, rel=DOUBLE)
    assert found.header.twin_loss == pytest.approx(wanted.header.twin_loss, rel=DOUBLE)
    assert [each.name for each in found.layers] == [each.name for each in wanted.layers]
    for one, other in zip(found.layers, wanted.layers, strict=True):
        check_figures(one.metrics, other.metrics)
        check_figures(one.twin_metrics, other.twin_metrics)
        assert one.ratio_intervals == {
            name: pytest.approx(interval, rel=1e-5)
            for name, interval in other.ratio_intervals.items()
        }
        same = {"metrics": {}, "twin_metrics": {}, "ratio_intervals": {}}
        assert one.model_copy(update=same) == other.model_copy(update=same)
    assert [(finding.check, finding.layers) for finding in found.findings] == [
        (finding.check, finding.layers) for finding in wanted.findings
    ]
    assert units.keys() == wanted_units.keys()
    for name, values in wanted_units.items():
        reach = float(np.abs(values).max())
        np.testing.assert_allclose(units[name], values, rtol=1e-5, atol=1e-6 * reach, err_msg=name)


@pytest.mark.parametrize(("part", "of"), [(0, 2), (3, 2)])
def test_a_part_that_is_none_of_them_is_refused(part: int, of: int, tmp_path: Path) -> None:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")

    with pytest.raises(OptionError, match=rf"The part is {part} of {of}; give 1/{of} to {of}/{of}"):
        measure_part(spec, data, tmp_path / "part", ASKED, part=part, parts=of)


def test_more_parts_than_batches_are_refused(tmp_path: Path) -> None:
    spec, data = core.resolve_model("tf_efficientnet_lite0"), core.resolve_data("bloodmnist")

    with pytest.raises(OptionError, match="There are 4 batches; 5 parts are too many"):
        measure_part(spec, data, tmp_path / "part", ASKED, part=5, parts=5)


def test_no_parts_at_all_are_refused() -> None:
    with pytest.raises(OptionError, match=r"There is no part to merge\. Name the files"):
        merge_parts([])


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    with pytest.raises(OptionError, match="Of 3 parts part 2 is missing"):
        merge_parts([parts[0], parts[2]])


def test_a_part_given_twice_is_refused(parts: list[Path]) -> None:
    with pytest.raises(OptionError, match="Of 3 parts a part is there twice"):
        merge_parts([*parts, parts[1]])


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"samples": 32}, {"batch_size": 8}, {"dtype": "bfloat16"}, {"images": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_a_part_of_another_measurement_is_refused(
    parts: list[Path], change: dict[str, object], tmp_path: Path
) -> None:
    odd = rewritten(parts[1], tmp_path, change)

    with pytest.raises(
        OptionError,
        match=rf"is a part of another measurement: its {next(iter(change))} differs",
    ):
        merge_parts([parts[0], odd, parts[2]])


def test_parts_measured_on_other_weights_are_refused(parts: list[Path], tmp_path: Path) -> None:
    odd = [rewritten(each, tmp_path, {"weights": "0" * 64}) for each in parts]

    with pytest.raises(OptionError, match="weights or images on this machine are not those"):
        merge_parts(odd)


@pytest.mark.parametrize("content", [b"", b"no part at all", None])
def test_a_file_that_is_no_part_is_refused(
    parts: list[Path], content: bytes | None, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.safetensors"
    if content is None:
        # A file of tensors, but of another kind.
        safetensors.torch.save_file({"x": torch.zeros(1)}, odd)
    else:
        odd.write_bytes(content)

    with pytest.raises(OptionError, match=r'odd.safetensors" cannot be read as a part'):
        merge_parts([odd, *parts[1:]])


def test_a_part_cut_off_is_refused(parts: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(parts[0].read_bytes()[:-100])

    with pytest.raises(OptionError, match=r'odd.safetensors" cannot be read as a part'):
        merge_parts([odd, *parts[1:]])


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.95])
def test_a_part_with_one_flipped_bit_is_refused(
    parts: list[Path], place: float, tmp_path: Path
) -> None:
    content = bytearray(parts[0].read_bytes())
    content[int(place * len(content))] ^= 1
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(content)

    with pytest.raises(OptionError, match=r'odd.safetensors" cannot be read as a part'):
        merge_parts([odd, *parts[1:]])


@pytest.mark.parametrize("text", ["[1]", "null", "5", '"x"', "{}", "[" * 100_000, "no JSON"])
def test_a_part_that_says_nothing_of_itself_is_refused(
    parts: list[Path], text: str, tmp_path: Path
) -> None:
    state = {"x": torch.zeros(1)}
    odd = tmp_path / "odd.safetensors"
    meta = {"limber_part": text, "sha256": _part_sha256(text, state)}
    safetensors.torch.save_file(state, odd, metadata=meta)

    with pytest.raises(OptionError, match=r'odd.safetensors" cannot be read as a part'):
        merge_parts([odd, *parts[1:]])


def test_a_merged_diagnosis_says_how_its_parts_were_taken(
    parts: list[Path], tmp_path: Path
) -> None:
    told = [
        rewritten(each, tmp_path, {"kernels": kernels, "wall_s": 10.0, "device": device})
        for each, kernels, device in zip(
            parts, ("plain", "triton", "plain"), ("cpu", "cuda", "cpu"), strict=True
        )
    ]

    header = merge_parts(told)[0].header

    assert (header.kernels, header.device) == ("plain, triton", "cpu, cuda")
    assert header.wall_s == 30.0
    assert header.overhead_fraction is None


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("own:loss", None),
        ("own:header", torch.zeros(1, dtype=torch.int64)),
        ("twin:moments/mean", torch.zeros(3)),
    ],
)
def test_a_damaged_part_is_refused(
    parts: list[Path], name: str, damaged: Tensor | None, tmp_path: Path
) -> None:
    odd = rewritten(parts[1], tmp_path, {}, **{name: damaged})

    with pytest.raises(OptionError, match=r"A part is damaged\. Measure it again"):
        merge_parts([parts[0], odd, parts[2]])


def test_batches_that_go_other_ways_through_a_network_are_each_measured() -> None:
    module = Turning()
    layers = [
        LayerInfo(
            name=name,
            index=i,
            type="Conv2d",
            kind="conv",
            stage=name,
            parameters=(ParameterInfo(name=f"{name}.weight", shape=(4, 3, 3, 3), count=108),),
            activation=activation,
        )
        for i, (name, activation) in enumerate(
            (("stem", "relu"), ("left", "relu#2"), ("right", "gelu"))
        )
    ]
    noise = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1])
    batches = [torch.randn(2, 3, 6, 6, generator=noise) + shift for shift in (1, 1, -1, -1, 1)]

    with gauging(module, layers) as gauge:
        for i, inputs in enumerate(batches):
            gauge.add(inputs, labels, first=2 * i)
        together = gauge.shard
    apart = None
    for i, inputs in enumerate(batches):
        with gauging(module, layers) as gauge:
            gauge.add(inputs, labels, first=2 * i)
        apart = gauge.shard if apart is None else apart.merged(gauge.shard)

    assert apart is not None
    own, other = shard_state(together), shard_state(apart)
    assert own.keys() == other.keys()
    assert {key.split("/")[1] for key in own if key.startswith("site/")} == {
        "relu",
        "relu#2",
        "gelu",
    }
    for key in own:
        assert torch.allclose(own[key].double(), other[key].double(), rtol=TOTALS, atol=1e-7), key
