"""The companion of a plan: its bits come back, and entries mean one thing or are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import PlanError
from core.files.companions import chosen_entries, packed, sorted_metadata, unpacked
from core.records import Entries


@settings(max_examples=100, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_come_back(flags: list[bool]) -> None:
    bits = packed(np.array(flags))

    assert bits.nbytes == -(-len(flags) // 8)
    assert unpacked(bits, len(flags)).tolist() == flags


@pytest.mark.parametrize(
    ("entries", "flat"),
    [
        (Entries(tensor="w", axis=1, indices=(0, 2), count=2), [0, 2, 3, 5]),
        (Entries(tensor="w", axis=0, mask="rows", count=1), [3, 4, 5]),
        (Entries(tensor="w", indices=(1, 5), count=2), [1, 5]),
        (Entries(tensor="w", mask="single", count=2), [0, 4]),
    ],
)
def test_entries_are_counted_along_an_axis_or_one_by_one(entries: Entries, flat: list[int]) -> None:
    arrays = {
        "rows": packed(np.array([False, True])),
        "single": packed(np.isin(np.arange(6), [0, 4])),
    }

    flags = chosen_entries(entries, (2, 3), arrays)

    assert flags is not None
    assert flags.shape == (2, 3)
    assert np.flatnonzero(flags).tolist() == flat


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (Entries(tensor="w", axis=2, indices=(0,), count=1), "it has 2 axes"),
        (Entries(tensor="w", axis=1, indices=(3,), count=1), "it has 3 along there"),
        (Entries(tensor="w", axis=0, count=3), "count is 3 and it has 2"),
        (Entries(tensor="w", mask="gone", count=1), 'no mask "gone" of 1 bytes'),
        (Entries(tensor="w", mask="single", count=3), "its mask has 2 bits set"),
    ],
)
def test_entries_that_do_not_fit_their_tensor_are_refused(entries: Entries, says: str) -> None:
    arrays = {"single": packed(np.isin(np.arange(6), [0, 4]))}

    with pytest.raises(PlanError, match=says):
        chosen_entries(entries, (2, 3), arrays)


def test_entries_without_indices_or_mask_are_all_of_them() -> None:
    assert chosen_entries(Entries(tensor="w", count=6), (2, 3), {}) is None


def test_metadata_is_put_in_order_and_the_tensors_keep_their_bytes() -> None:
    tensors = {"b": np.arange(3, dtype=np.float32), "a": np.ones((2, 2), dtype=np.float32)}
    metadata = {f"key {place}": str(place) for place in range(20, 0, -1)}

    data = sorted_metadata(safetensors.numpy.save(tensors, metadata=metadata))

    length = int.from_bytes(data[:8], "little")
    assert list(json.loads(data[8 : 8 + length])["__metadata__"]) == sorted(metadata)
    read = safetensors.numpy.load(data)
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)
