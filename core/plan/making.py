"""A person's choice -> plan, checked against the network it is for."""

from __future__ import annotations

import fnmatch
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import ValidationError

from core.errors import PlanError, Remedy
from core.files.companions import arrays_of, chosen_entries
from core.files.plans import first_problem
from core.records import (
    Evidence,
    LayerInfo,
    LayerRate,
    ModelIdentity,
    ModelOutline,
    Pattern,
    ReinitPlan,
    RuleChoice,
    SchemeChoice,
    Target,
)
from core.records.outline import is_bias

Syntax = Literal["name", "glob", "regex", "type"]


SEARCH_S = 2
_SEARCH = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
text, names = json.load(sys.stdin)
found = re.compile(text)
print([place for place, name in enumerate(names) if found.search(name)])
"""

# Schemes that leave everything but biases alone.
BIASES_ALONE = ("bias-mean",)


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
        searched = _searched(text, tuple(names))
        if searched is None:
            raise PlanError(
                f'The regular expression "{text}" takes longer than {SEARCH_S} s on the names of '
                f"{len(names)} layers. Write it with fewer repetitions, or as a glob."
            )
        matched = list(searched)
    elif syntax == "type":
        matched = [
            layer.name
            for layer in outline.layers
            if fnmatch.fnmatchcase(layer.type.lower(), text.lower())
        ]
    elif syntax == "name":
        matched = [name for name in names if name == text]
    else:
        matched = [
            name
            for name in names
            if fnmatch.fnmatchcase(name, text) or fnmatch.fnmatchcase(name, text + ".*")
        ]
    if not matched:
        what = "layer type" if syntax == "type" else "layer"
        known = sorted({layer.type for layer in outline.layers}) if syntax == "type" else names
        more = f" and {len(known) - 4} more" if len(known) > 4 else ""
        raise PlanError(
            f'No {what} of {outline.title} matches the {syntax} "{text}". It has '
            f"{', '.join(known[:4])}{more}."
        )
    return tuple(matched)


@lru_cache(maxsize=256)
def _searched(text: str, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names in which a regular expression is found; None where that takes too long.

    An expression with several repetitions can take longer on one name than anyone lives, and
    Python's engine knows no limit of time: such a one is tried in a process that can be ended.

    Raises:
        PlanError: It is no regular expression.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expression = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise PlanError(f'"{text}" is not a regular expression: {error}.') from error
    if sum(text.count(mark) for mark in "*+?{") <= 1:
        return tuple(name for name in names if expression.search(name))
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([text, names]),
            capture_output=True,
            encoding="ascii",
            timeout=SEARCH_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return None
    return tuple(names[place] for place in json.loads(answer.stdout))


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


def planned_size(outline: ModelOutline, plan: ReinitPlan) -> PlanSize:
    """Return what a plan touches: entries that are written twice count once.

    Raises:
        PlanError: The plan's companion is missing, or it names what the network does not have.
    """
    arrays = arrays_of(plan)
    shapes = {p.name: p.shape for layer in outline.layers for p in layer.parameters}
    firsts = {n: ns[0] for layer in outline.layers for ns in layer.tied for n in ns}
    touched: dict[str, int | np.ndarray] = {}
    for target in plan.targets:
        partly = {entries.tensor for entries in target.entries}
        for name in target.parameters:
            if name not in shapes:
                raise PlanError(f'{outline.title} has no parameter "{name}".')
            if name not in partly:
                touched[firsts.get(name, name)] = math.prod(shapes[name])
        for entries in target.entries:
            if entries.tensor not in shapes:
                continue  # a buffer
            name = firsts.get(entries.tensor, entries.tensor)
            flags = chosen_entries(entries, shapes[entries.tensor], arrays)
            before = touched.get(name)
            if flags is None or isinstance(before, int):
                touched[name] = math.prod(shapes[entries.tensor])
            else:
                touched[name] = flags if before is None else before | flags
    return PlanSize(
        layers=len(plan.targets),
        tensors=len(touched),
        parameters=sum(n if isinstance(n, int) else int(n.sum()) for n in touched.values()),
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
    learning_rates: Mapping[str, float] | None = None,
    rule: RuleChoice | None = None,
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
        learning_rates: Layer to the multiple of the learning rate at which it trains.
        rule: The rule that chose the layers; None when a person did.

    Raises:
        PlanError: Nothing to reset, an unknown layer, a layer that no forward pass reaches, a
            shared parameter of which only one owner was picked, or a layer that would be reset
            and not train.
    """
    known = {layer.name: layer for layer in outline.layers}
    for layer in (*layers, *freeze):
        if layer not in known:
            raise PlanError(f'{outline.title} has no layer "{layer}".', Remedy.LIST_LAYERS)
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
    if scheme in BIASES_ALONE:
        biased = [layer for layer in reset if any(is_bias(p.name) for p in layer.parameters)]
        if not biased:
            raise PlanError(
                f'"{scheme}" writes only biases, and "{reset[0].name}" has none. Pick layers that '
                "have one."
            )
        reset = biased
    try:
        plan = ReinitPlan(
            name=name,
            model=model_identity(outline),
            patterns=tuple(patterns),
            rule=rule,
            learning_rates=checked_rates(outline, learning_rates),
            targets=tuple(
                Target(
                    layer=layer.name,
                    parameters=tuple(
                        parameter.name
                        for parameter in layer.parameters
                        if scheme not in BIASES_ALONE or is_bias(parameter.name)
                    ),
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
        raise PlanError(first_problem(error, "The plan")) from error
    refuse_untrained(plan)
    return plan


def refuse_untrained(plan: ReinitPlan) -> None:
    """Raise if a plan in the making resets layers that it keeps from training.

    Raises:
        PlanError: It does; the message names the layers.
    """
    layers = plan.untrained
    if layers:
        raise PlanError(
            f"{untrained_sentence(layers)} Unfreeze them, or leave them out of what is reset."
        )


def untrained_sentence(layers: Sequence[str]) -> str:
    """Return what becomes of layers that are reset and do not train, as a sentence."""
    named = ", ".join(f'"{layer}"' for layer in layers[:3])
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    it = "it keeps" if len(layers) == 1 else "they keep"
    return (
        f"The plan writes into {named}{more} and keeps the same from training (frozen, or a "
        f"learning rate of 0): {it} what the reset leaves, random or 0, however long you train."
    )


def model_identity(outline: ModelOutline) -> ModelIdentity:
    """Return the identity of an outlined network, as plans carry it."""
    return ModelIdentity(
        source=outline.spec.source,
        name=outline.spec.name,
        weights=outline.spec.weights,
        checkpoint=outline.spec.checkpoint,
        classes=outline.classes,
        head="own" if outline.own_head else "new",
        kwargs=dict(outline.spec.kwargs),
        head_seed=outline.head_seed,
        backbone_sha256=outline.backbone_sha256,
    )


def checked_rates(
    outline: ModelOutline, factors: Mapping[str, float] | None
) -> tuple[LayerRate, ...]:
    """Return learning-rate factors in the network's order.

    Raises:
        PlanError: An unknown layer, or a factor below 0 or not finite.
    """
    given = dict(factors or {})
    for layer, factor in given.items():
        if outline.layer(layer) is None:
            raise PlanError(f'{outline.title} has no layer "{layer}" to set a learning rate for.')
        if not 0 <= factor <= 1e6:
            raise PlanError(
                f'The learning-rate factor of "{layer}" is {factor:g}; give 0 to 1,000,000.'
            )
    return tuple(
        LayerRate(layer=layer.name, factor=given[layer.name])
        for layer in outline.layers
        if layer.name in given
    )


def last_blocks(outline: ModelOutline, count: int) -> tuple[str, ...]:
    """Return the layers of the last blocks and of what follows them, a head excluded.

    A block is a stage whose name ends in a number, such as "blocks.11" or "layer4.1"; where there
    is none, every stage is a block.

    Raises:
        PlanError: The network has fewer blocks.

    Source:
        Zhang et al., Revisiting Few-sample BERT Fine-tuning, ICLR 2021, arXiv:2006.05987.
    """
    stages = list(
        dict.fromkeys(layer.stage for layer in outline.layers if layer.executed and not layer.head)
    )
    numbered = [stage for stage in stages if stage.rpartition(".")[2].isdigit()] or stages
    if not 1 <= count <= len(numbered):
        raise PlanError(
            f"{outline.title} has {len(numbered)} blocks, not {count}. Give 1 to {len(numbered)}."
        )
    wanted = set(stages[stages.index(numbered[-count]) :])
    return tuple(
        layer.name
        for layer in outline.layers
        if layer.stage in wanted and layer.executed and not layer.head
    )


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
    """Raise unless the plan fits this network and these weights.

    A plan that writes nothing into the head fits any head.

    Raises:
        PlanError: Another architecture, other weights, names it does not have, or another head
            than the one it writes into.
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
    heads = {layer.name for layer in outline.layers if layer.head}
    written = next((target.layer for target in plan.targets if target.layer in heads), None)
    other = (model.head == "own") != outline.own_head or model.classes != outline.classes
    if other and (written is not None or model.weights == "none"):
        why = (
            f'writes into the head "{written}"'
            if written is not None
            else "has no weights to load, so its random network depends on the size of its head"
        )
        raise PlanError(
            f"The plan {why}. It was made for {_head_said(model.head == 'own', model.classes)}, "
            f"and the network at hand has {_head_said(outline.own_head, outline.classes)}. Make "
            "the plan again for these classes."
        )
    names = {parameter.name for layer in outline.layers for parameter in layer.parameters}
    buffers = {
        buffer for layer in outline.layers for buffer in (*layer.buffers, *layer.coupled_buffers)
    }
    known_layers = {layer.name for layer in outline.layers}
    for target in plan.targets:
        for kind, given, known in (
            ("parameter", target.parameters, names),
            ("buffer", target.buffers, buffers),
        ):
            missing = next((name for name in given if name not in known), None)
            if missing:
                raise PlanError(
                    f'The plan\'s layer "{target.layer}" names the {kind} "{missing}", which '
                    f"{outline.title} does not have. Make the plan again for this model."
                )
    for does, layers in (
        ("freezes", plan.freeze),
        ("sets a learning rate for", [rate.layer for rate in plan.learning_rates]),
    ):
        for layer in layers:
            if layer not in known_layers:
                raise PlanError(f'The plan {does} "{layer}", which {outline.title} does not have.')
    if model.backbone_sha256 != outline.backbone_sha256:
        raise PlanError(
            f"The plan was made for weights {model.backbone_sha256[:12]}..., and the weights at "
            f"hand are {outline.backbone_sha256[:12]}.... Load the weights the plan was made "
            "for, or make the plan again on these."
        )


def _head_said(own: bool, classes: int) -> str:
    return f"the weights' own head ({classes})" if own else f"a new head of {classes} classes"
