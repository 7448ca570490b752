"""Values that flow: frozen, refused where they contradict themselves, the same after JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from pydantic import ValidationError

from core import records
from core.records import Entries, MetricValue, SchemeChoice, Target
from core.records.base import Value
from core.records.outline import is_bias, stored_number

CLASSES = [found for name in records.__all__ if isinstance(found := getattr(records, name), type)]


@pytest.mark.parametrize("record", CLASSES, ids=lambda record: record.__name__)
def test_every_record_is_frozen_and_takes_keywords_alone(record: Any) -> None:
    if issubclass(record, Value):
        assert record.model_config["frozen"] is True
        assert record.model_config["extra"] == "forbid"
    else:
        assert dataclasses.is_dataclass(record)
        settings = record.__dataclass_params__  # type: ignore[attr-defined]
        assert settings.frozen
        assert all(field.kw_only for field in dataclasses.fields(record))


@pytest.mark.parametrize("value", [0.1, -0.0, math.inf, -math.inf, math.nan, None])
def test_a_number_comes_back_from_json_as_it_was(value: float | None) -> None:
    figure = MetricValue(value=value, reason=None if value is not None else "none")

    read = MetricValue.model_validate_json(figure.model_dump_json()).value

    if value is not None and math.isnan(value):
        assert read is not None
        assert math.isnan(read)
    else:
        assert read == value
        assert str(read) == str(value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"indices": (1, 1), "count": 2}, "indices must ascend"),
        ({"indices": (2, 1), "count": 2}, "indices must ascend"),
        ({"indices": (1,), "count": 2}, "count is 2, and there are 1 indices"),
        ({"indices": (1,), "mask": "m", "count": 1}, "indices or a mask, not both"),
        ({"write": "add", "count": 1}, "belong to the writes"),
        ({"values": "v", "count": 1}, "belong to the writes"),
        ({"indices": (-1,), "count": 1}, "greater than or equal to 0"),
        ({"count": 0}, "greater than or equal to 1"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Entries(tensor="w", **keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"entries": (Entries(tensor="other", count=1),)}, 'entries name "other"'),
        ({"granularity": "unit"}, "each tensor needs its entries"),
    ],
)
def test_a_target_names_what_its_entries_speak_of(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Target(layer="fc", parameters=("fc.weight",), scheme=SchemeChoice(name="zero"), **keys)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("fc.bias", True),
        ("attn.in_proj_bias", True),
        ("bias", True),
        ("fc.weight", False),
        ("bias.weight", False),
        ("blocks.0.attn.relative_position_bias_table", False),
    ],
)
def test_a_bias_is_told_by_the_end_of_its_own_name(name: str, bias: bool) -> None:
    assert is_bias(name) is bias


@pytest.mark.parametrize(
    ("value", "shown"), [(4095.0, "4,095"), (0.5, "0.5"), (1 / 3, "0.3333"), (-1000.0, "-1,000")]
)
def test_a_stored_intensity_is_whole_where_it_is_whole(value: float, shown: str) -> None:
    assert stored_number(value) == shown
