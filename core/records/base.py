"""The shape every value that is written to JSON shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value whose unknown keys are refused by name.

    Non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity" and read
    back as numbers: JSON has no others, and losing them would turn a broken layer into a gap.

    A field whose name in files is older than its name here has that as its alias.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        protected_namespaces=(),
        serialize_by_alias=True,
        validate_by_name=True,
        validate_by_alias=True,
    )
