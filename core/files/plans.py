"""Plan <-> JSON, with an error that points to the key; the schema."""

from __future__ import annotations

import codecs
import errno
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.errors import PlanError
from core.files.companions import MAX_BYTES, arrays_of, attached, plan_json, sealed
from core.files.inputs import JSONError, KeyTwiceError, read_input, strict_json
from core.files.whole import companion_path, write_whole
from core.records import (
    Companion,
    Entries,
    Evidence,
    LayerRate,
    ModelIdentity,
    Pattern,
    ReinitPlan,
    RuleChoice,
    SchemeChoice,
    Target,
)
from core.records.base import Value

MAX_PLAN_BYTES = 64 * 2**20
# Numbers, names and objects in it. A wide network whose units are all listed has some 200,000.
MAX_PLAN_VALUES = 600_000


def plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of plans, as published in `assets/plan.schema.json`."""
    schema = ReinitPlan.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_plan(source: str | bytes | Path, *, companion: bytes | None = None) -> ReinitPlan:
    """Read a plan from a file (given as a Path) or from JSON text.

    Args:
        source: A path, whose folder also has the companion if the plan names one; or text.
        companion: The companion's content, for a plan that is given as text.

    Raises:
        PlanError: Unreadable, not JSON, or not a plan (the message names the key), or its
            companion is missing or another.
    """
    plan = _read_alone(source)
    if plan.companion is None:
        return plan
    name = plan.companion.file
    if companion is None and isinstance(source, Path):
        try:
            companion = read_input(source.parent / name, most=MAX_BYTES)
        except OSError as error:
            raise PlanError(
                f'The plan keeps its selection in "{name}", which is not beside it or cannot be '
                f"read ({error.strerror}). Keep both files together."
            ) from error
    return plan if companion is None else attached(plan, companion, source=name)


def _read_alone(source: str | bytes | Path) -> ReinitPlan:
    where = "The plan"
    too_large = f"is larger than {MAX_PLAN_BYTES >> 20} MiB: not a plan."
    if isinstance(source, Path):
        path, where = source, f'"{source.name}"'
        try:
            source = read_input(path, most=MAX_PLAN_BYTES)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise PlanError(f"{where} {too_large}") from error
            raise PlanError(
                f'The plan "{path}" cannot be read ({error.strerror}). Check the path.'
            ) from error
    if len(source) > MAX_PLAN_BYTES:
        raise PlanError(f"{where} {too_large}")
    try:
        # Read once to refuse what is no JSON that can be meant, and once into the plan.
        strict_json(source, most_values=MAX_PLAN_VALUES)
    except KeyTwiceError as error:
        raise PlanError(
            f'{where} has the key "{error.key[:80]}" twice in one place. Keep one.'
        ) from error
    except JSONError as error:
        raise PlanError(f"{where} is not JSON ({error}). Export the plan again.") from error
    text = source.removeprefix(codecs.BOM_UTF8) if isinstance(source, bytes) else source
    try:
        # Strict, so that nothing is accepted that the published schema refuses, such as "5" for 5.
        return ReinitPlan.model_validate_json(text, strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            raise PlanError(first_problem(error, where)) from error
        raise PlanError(f"{where} is not a plan ({error}).") from error


def named_after(plan: ReinitPlan, path: Path) -> ReinitPlan:
    """Return a plan whose companion, if it has one, is named after the plan's file.

    Raises:
        PlanError: The plan came without its companion.
    """
    name = companion_path(path, "masks").name
    if plan.companion is None or plan.companion.file == name:
        return plan
    renamed = plan.companion.model_copy(update={"file": name})
    return sealed(plan.model_copy(update={"companion": renamed}), arrays_of(plan))


def write_plan(plan: ReinitPlan, path: Path) -> ReinitPlan:
    """Write a plan and, where it has one, its companion beside it; return what was written.

    Args:
        plan: With its companion attached, if it names one; the companion is named after the file.
        path: The plan's file.

    Raises:
        OptionError: The place cannot be written to.
        PlanError: The plan came without its companion.
    """
    plan = named_after(plan, path)
    if plan.companion is not None:
        arrays_of(plan)
        assert plan.companion_bytes is not None
        write_whole(path.parent / plan.companion.file, plan.companion_bytes)
    write_whole(path, plan_json(plan))
    return plan


def first_problem(error: ValidationError, where: str) -> str:
    """Return what a record found wrong first, with the key, and what is allowed there."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = ".".join(str(part)[:80] for part in first["loc"]) or "the top level"
    if first["type"] == "extra_forbidden":
        owner = _owner_fields(first["loc"])
        text = f'{where} has the unknown key "{place}". Allowed there: {", ".join(owner)}.'
    elif first["type"] == "missing":
        text = f'{where} lacks the key "{place}".'
    else:
        value, says = first.get("input"), first["msg"].rstrip(".")
        shown = f'"{place}" is {_shown(value)}'
        if first["type"] == "value_error":
            # In words of ours, which name what they speak of.
            shown = f'"{place}"' if isinstance(value, dict) else shown
            text = f"{where}: {shown}: {says.removeprefix('Value error, ')}."
        else:
            text = f"{where}: {shown}. {says[0].upper()}{says[1:]}."
    if len(problems) > 1:
        text += f" ({len(problems) - 1} more such.)"
    return text


def _shown(value: object) -> str:
    """Return a value as far as a line has room for it; a long list is not written out for that."""
    if isinstance(value, list | tuple | dict) and len(value) > 20:
        return f"{len(value):,} items"
    return repr(value[:100] if isinstance(value, str) else value)[:80]


def _owner_fields(place: tuple[int | str, ...]) -> list[str]:
    """Return the keys allowed in the object that a validation error points into."""
    by_key: dict[str, type[Value]] = {
        "model": ModelIdentity,
        "patterns": Pattern,
        "targets": Target,
        "scheme": SchemeChoice,
        "entries": Entries,
        "rule": RuleChoice,
        "companion": Companion,
        "learning_rates": LayerRate,
        "evidence": Evidence,
    }
    owner: type[Value] = ReinitPlan
    for part in place[:-1]:
        if isinstance(part, str) and part in by_key:
            owner = by_key[part]
    return list(owner.model_fields)
