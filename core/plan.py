"""A person's choice -> plan; plan <-> JSON.

The resolved list of names is the authority. Patterns are kept beside it as provenance and are
never looked at again, so a plan means the same on the day a library renames its layers: it then
fails by name instead of resetting something else.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from core.errors import PlanError
from core.records import (
    Evidence,
    LayerInfo,
    ModelIdentity,
    ModelOutline,
    Pattern,
    ReinitPlan,
    SchemeChoice,
    Target,
)
from core.records.base import Value

Syntax = Literal["name", "glob", "regex", "type"]
MAX_PLAN_BYTES = 64 * 2**20


class RuleInfo(Value):
    """One way to choose layers."""

    name: str
    title: str
    description: str
    source: str


RULES: tuple[RuleInfo, ...] = (
    RuleInfo(
        name="by-hand",
        title="By hand",
        description="The layers a person clicked, ticked or named by glob, regular expression or "
        "layer type.",
        source="your judgement",
    ),
    RuleInfo(
        name="random",
        title="Random control",
        description="As many parameters, in layers drawn at random, with the same scheme: the "
        "control every comparison needs.",
        source="arXiv:2508.00212 compares with random choice",
    ),
)


def list_rules() -> tuple[RuleInfo, ...]:
    """Return the ways to choose layers."""
    return RULES


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSize:
    """What a choice of layers would touch; shared parameters are counted once."""

    layers: int
    tensors: int
    parameters: int
    total: int

    @property
    def fraction(self) -> float:
        """Share of the network's parameters, in [0, 1]."""
        return self.parameters / self.total if self.total else 0.0


def match_layers(outline: ModelOutline, text: str, *, syntax: Syntax = "glob") -> tuple[str, ...]:
    """Return the names of the layers a pattern matches, in forward order.

    Args:
        outline: The network.
        text: The pattern. A glob's `*` also crosses dots, and a pattern that names a whole
            block ("blocks.5") stands for every layer in it.
        syntax: "name" (exact), "glob", "regex" (searched anywhere in the name) or "type" (glob
            over class names, such as "Conv2d").

    Raises:
        PlanError: Malformed pattern, or nothing matches.
    """
    if not text.strip():
        raise PlanError('The pattern is empty. Write a layer name or a glob such as "blocks.5.*".')
    names = [layer.name for layer in outline.layers]
    if syntax == "regex":
        try:
            expression = re.compile(text)
        except re.error as error:
            raise PlanError(f'"{text}" is not a regular expression: {error}.') from error
        found = [name for name in names if expression.search(name)]
    elif syntax == "type":
        found = [
            layer.name
            for layer in outline.layers
            if fnmatch.fnmatchcase(layer.type.lower(), text.lower())
        ]
    elif syntax == "name":
        found = [name for name in names if name == text]
    else:
        found = [
            name
            for name in names
            if fnmatch.fnmatchcase(name, text) or fnmatch.fnmatchcase(name, text + ".*")
        ]
    if not found:
        what = "layer type" if syntax == "type" else "layer"
        known = sorted({layer.type for layer in outline.layers}) if syntax == "type" else names
        more = f" and {len(known) - 4} more" if len(known) > 4 else ""
        raise PlanError(
            f'No {what} of {outline.title} matches the {syntax} "{text}". It has '
            f"{', '.join(known[:4])}{more}."
        )
    return tuple(found)


def plan_size(outline: ModelOutline, layers: Sequence[str]) -> PlanSize:
    """Return what resetting these layers would touch. A new head is never reset."""
    chosen = [layer for layer in outline.layers if layer.name in set(layers)]
    chosen = [layer for layer in chosen if outline.own_head or not layer.head]
    counted: dict[str, int] = {}
    for layer in chosen:
        group = {name: names[0] for names in layer.tied for name in names}
        for parameter in layer.parameters:
            counted[group.get(parameter.name, parameter.name)] = parameter.count
    return PlanSize(
        layers=len(chosen),
        tensors=len(counted),
        parameters=sum(counted.values()),
        total=outline.parameters,
    )


def make_plan(
    outline: ModelOutline,
    layers: Sequence[str],
    *,
    scheme: str = "architecture",
    scheme_parameters: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "plan",
    patterns: Sequence[Pattern] = (),
    freeze: Sequence[str] = (),
    evidence: Evidence | None = None,
    resets_buffers: bool = True,
) -> ReinitPlan:
    """Return the plan that resets the given layers of the outlined network.

    A head that is new anyway is left out: both arms of a comparison must share it.

    Args:
        outline: The network, with its head for the downstream classes.
        layers: Layer names, in any order.
        scheme: What is written.
        scheme_parameters: The scheme's own numbers.
        seed: Seed of the draw.
        name: Name of the arm.
        patterns: How the layers were picked.
        freeze: Layers that shall not train.
        evidence: What the choice rests on.
        resets_buffers: Whether running statistics are reset with the layer.

    Raises:
        PlanError: Nothing to reset, an unknown layer, a layer that no forward pass reaches, or
            a shared parameter of which only one owner was picked.
    """
    known = {layer.name: layer for layer in outline.layers}
    for layer in (*layers, *freeze):
        if layer not in known:
            raise PlanError(
                f'{outline.title} has no layer "{layer}". See the names with python -m core plan '
                "--layers '*'."
            )
    chosen = [layer for layer in outline.layers if layer.name in set(layers)]
    reset = [layer for layer in chosen if outline.own_head or not layer.head]
    if not reset:
        raise PlanError(
            "There is nothing to reset: pick at least one layer."
            if not chosen
            else f'Only the head ("{chosen[0].name}") was picked, and it is new already. Pick '
            "layers before it."
        )
    _refuse_half_of_a_tie(reset)
    try:
        return ReinitPlan(
            name=name,
            model=ModelIdentity(
                source=outline.spec.source,
                name=outline.spec.name,
                weights=outline.spec.weights,
                checkpoint=outline.spec.checkpoint,
                classes=outline.classes,
                head="own" if outline.own_head else "new",
                kwargs=dict(outline.spec.kwargs),
                head_seed=outline.head_seed,
                backbone_sha256=outline.backbone_sha256,
            ),
            patterns=tuple(patterns),
            targets=tuple(
                Target(
                    layer=layer.name,
                    parameters=tuple(parameter.name for parameter in layer.parameters),
                    buffers=(*layer.buffers, *layer.coupled_buffers) if resets_buffers else (),
                    scheme=SchemeChoice(name=scheme, parameters=dict(scheme_parameters or {})),
                    seed=seed,
                )
                for layer in reset
            ),
            freeze=tuple(layer.name for layer in outline.layers if layer.name in set(freeze)),
            evidence=evidence or Evidence(),
        )
    except ValidationError as error:
        raise PlanError(_first_problem(error, "The plan")) from error


def _refuse_half_of_a_tie(chosen: Sequence[LayerInfo]) -> None:
    names = {parameter.name for layer in chosen for parameter in layer.parameters}
    for layer in chosen:
        for group in layer.tied:
            outside = [name for name in group if name not in names]
            if outside:
                raise PlanError(
                    f'"{layer.name}" shares its parameter with "{outside[0].rpartition(".")[0]}". '
                    "Pick both (the shared tensor is reset once) or neither."
                )


def check_plan(plan: ReinitPlan, outline: ModelOutline) -> None:
    """Raise unless the plan was made for this network and these weights.

    Raises:
        PlanError: Another architecture, other weights, another head, or names it does not have.
    """
    model = plan.model
    if (model.source, model.name) != (outline.spec.source, outline.spec.name):
        missing = next(
            (target.layer for target in plan.targets if outline.layer(target.layer) is None), None
        )
        detail = f' Its layer "{missing}" is not in {outline.spec.name}.' if missing else ""
        raise PlanError(
            f"The plan was made for {model.source}:{model.name}, and the model at hand is "
            f"{outline.spec.source}:{outline.spec.name}.{detail} Load that model, or make a new "
            "plan."
        )
    names = {parameter.name for layer in outline.layers for parameter in layer.parameters}
    buffers = {
        buffer for layer in outline.layers for buffer in (*layer.buffers, *layer.coupled_buffers)
    }
    for target in plan.targets:
        for kind, given, known in (
            ("parameter", target.parameters, names),
            ("buffer", target.buffers, buffers),
        ):
            missing = next((each for each in given if each not in known), None)
            if missing:
                raise PlanError(
                    f'The plan\'s layer "{target.layer}" names the {kind} "{missing}", which '
                    f"{outline.title} does not have. Make the plan again for this model."
                )
    for layer in plan.freeze:
        if outline.layer(layer) is None:
            raise PlanError(f'The plan freezes "{layer}", which {outline.title} does not have.')
    if model.backbone_sha256 != outline.backbone_sha256:
        raise PlanError(
            f"The plan was made for weights {model.backbone_sha256[:12]}..., and the weights at "
            f"hand are {outline.backbone_sha256[:12]}.... Load the weights the plan was made "
            "for, or make the plan again on these."
        )


def random_control(outline: ModelOutline, plan: ReinitPlan, *, seed: int) -> ReinitPlan:
    """Return a plan of about the same size on layers drawn at random.

    For each target, in turn, a layer is drawn among those of the same kind (convolution, linear,
    norm, other) that neither the plan nor an earlier draw has, from the quarter nearest to it in
    number of parameters (three at least). Scheme, its numbers and the seed of the values are
    the plan's.

    Raises:
        PlanError: The plan leaves no layer to draw from.
    """
    import random

    chooser = random.Random(f"random control {seed}")
    taken = {target.layer for target in plan.targets}
    layers: list[str] = []
    for target in plan.targets:
        wanted = outline.layer(target.layer)
        if wanted is None:
            raise PlanError(f'{outline.title} has no layer "{target.layer}".')
        free = [
            layer
            for layer in outline.layers
            if layer.name not in taken
            and layer.executed
            and not layer.tied
            and (outline.own_head or not layer.head)
        ]
        same = [layer for layer in free if layer.kind == wanted.kind] or free
        if not same:
            continue
        near = sorted(same, key=lambda layer: (abs(layer.count - wanted.count), layer.index))
        drawn = chooser.choice(near[: max(3, len(near) // 4)])
        taken.add(drawn.name)
        layers.append(drawn.name)
    if not layers:
        raise PlanError(
            "The plan resets every layer, so no other layer is left for a random control. Run "
            "without it."
        )
    first = plan.targets[0]
    return make_plan(
        outline,
        layers,
        scheme=first.scheme.name,
        scheme_parameters=first.scheme.parameters,
        seed=first.seed,
        name="random control",
        freeze=plan.freeze,
        resets_buffers=any(target.buffers for target in plan.targets),
        evidence=Evidence(note=f"Random control of about the same size, drawn with seed {seed}."),
    )


def plan_json(plan: ReinitPlan) -> str:
    """Return the plan as text: the same plan gives the same bytes."""
    return json.dumps(plan.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of plans, as published in `assets/plan.schema.json`."""
    schema = ReinitPlan.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_plan(source: str | bytes | Path) -> ReinitPlan:
    """Read a plan from a file (given as a Path) or from JSON text.

    Raises:
        PlanError: Unreadable, not JSON, or not a plan; the message names the key.
    """
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
        content = json.loads(text)
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
            raise PlanError(_first_problem(error, where)) from error
        raise PlanError(f"{where} is not a plan ({error}).") from error


def _first_problem(error: ValidationError, where: str) -> str:
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
        "evidence": Evidence,
    }
    owner: type[Value] = ReinitPlan
    for part in place[:-1]:
        if isinstance(part, str) and part in by_key:
            owner = by_key[part]
    return list(owner.model_fields)
