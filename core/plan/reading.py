"""JSON -> plan, with an error that points to the key; the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.errors import PlanError
from core.planfile import MAX_BYTES, attached
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
        path = source.parent / name
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PlanError(f'"{name}" is larger than {MAX_BYTES >> 30} GiB: no companion.')
            companion = path.read_bytes()
        except OSError as error:
            raise PlanError(
                f'The plan keeps its selection in "{name}", which is not beside it '
                f"({error.strerror}). Keep both files together."
            ) from error
    return plan if companion is None else attached(plan, companion, source=name)


def _read_alone(source: str | bytes | Path) -> ReinitPlan:
    where = "The plan"
    if isinstance(source, Path):
        where = f'"{source.name}"'
        try:
            if source.stat().st_size > MAX_PLAN_BYTES:
                raise PlanError(f"{where} is larger than {MAX_PLAN_BYTES >> 20} MiB: not a plan.")
            source = source.read_bytes()
        except OSError as error:
            raise PlanError(
                f'The plan "{Path(str(source))}" cannot be read ({error.strerror}). Check the path.'
            ) from error
    try:
        text = source.decode("utf-8-sig") if isinstance(source, bytes) else source
        content = json.loads(text, object_pairs_hook=_each_key_once)
    except _TwiceError as error:
        raise PlanError(f'{where} has the key "{error}" twice in one place. Keep one.') from error
    except (ValueError, RecursionError) as error:
        # Besides bad JSON: a number of thousands of digits, or thousands of nested brackets.
        detail = str(error).partition(";")[0]
        if isinstance(error, json.JSONDecodeError):
            detail = f"line {error.lineno}, column {error.colno}: {error.msg}"
        elif isinstance(error, UnicodeDecodeError):
            detail = "it is not UTF-8 text"
        raise PlanError(f"{where} is not JSON ({detail}). Export the plan again.") from error
    try:
        # Strict, so that nothing is accepted that the published schema refuses, such as "5" for 5.
        return ReinitPlan.model_validate_json(json.dumps(content), strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            raise PlanError(first_problem(error, where)) from error
        raise PlanError(f"{where} is not a plan ({error}).") from error


class _TwiceError(Exception):
    """A key stands twice in one object: which one counts is anyone's guess."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return found


def first_problem(error: ValidationError, where: str) -> str:
    """Return what a record found wrong first, with the key, and what is allowed there."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"]) or "the top level"
    if first["type"] == "extra_forbidden":
        owner = _owner_fields(first["loc"])
        text = f'{where} has the unknown key "{place}". Allowed there: {", ".join(owner)}.'
    elif first["type"] == "missing":
        text = f'{where} lacks the key "{place}".'
    else:
        found = repr(first.get("input"))
        says = first["msg"][0].upper() + first["msg"][1:].rstrip(".")
        text = f'{where}: "{place}" is {found[:80]}. {says}.'
    if len(problems) > 1:
        text += f" ({len(problems) - 1} more such.)"
    return text


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
