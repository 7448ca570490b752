"""A person's choice -> plan; plan <-> JSON.

The resolved list of names is the authority. Patterns are kept beside it as provenance and are
never looked at again, so a plan means the same on the day a library renames its layers: it then
fails by name instead of resetting something else.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from core.errors import PlanError
from core.planfile import MAX_BYTES, arrays_of, attached, chosen_entries, sealed
from core.records import (
    Companion,
    Entries,
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
from core.records.base import Value
from core.records.outline import is_bias

if TYPE_CHECKING:
    from random import Random

Syntax = Literal["name", "glob", "regex", "type"]
# Random controls of layers that are drawn, to take the one nearest in size.
DRAWS = 16
# Schemes that leave everything but biases alone.
BIASES_ALONE = ("bias-mean",)
MAX_PLAN_BYTES = 64 * 2**20


class RuleInfo(Value):
    """One way to choose what is reset.

    Attributes:
        name: Key in a plan and on the command line.
        title: Plain words.
        description: What is selected.
        source: Paper, or whose judgement it is.
        granularity: What it selects.
        options: Its numbers and words with their defaults; None means that it must be given.
        choices: Allowed words of options that are words.
        needs: What it looks at beside the weights.
        scheme: What is written unless another scheme is named.
    """

    name: str
    title: str
    description: str
    source: str
    granularity: Literal["layer", "unit", "weight", "any"]
    options: dict[str, float | str | None] = {}
    choices: dict[str, tuple[str, ...]] = {}
    needs: Literal["nothing", "images", "a diagnosis", "a plan"] = "nothing"
    scheme: str = "architecture"


SEED_PAPER = "Coetzer et al. 2026, arXiv:2603.20860"
PERCENT: dict[str, float | str | None] = {"percent": 10.0}

RULES: tuple[RuleInfo, ...] = (
    RuleInfo(
        name="by-hand",
        title="By hand",
        description="The layers a person clicked, ticked or named by glob, regular expression or "
        "layer type, or single units of them.",
        source="your judgement",
        granularity="any",
    ),
    RuleInfo(
        name="last-blocks",
        title="The last blocks",
        description="The last N blocks and what follows them, but not a new head.",
        source="Zhang et al., Revisiting Few-sample BERT Fine-tuning, ICLR 2021, arXiv:2006.05987",
        granularity="layer",
        options={"blocks": 1.0},
    ),
    RuleInfo(
        name="threshold",
        title="A figure beyond a limit",
        description="Layers (or units, for a figure by unit) of which a figure, or its ratio to "
        "the fresh twin's, lies above or below a limit.",
        source="your judgement on a diagnosis",
        granularity="any",
        options={"metric": None, "threshold": None, "side": "above", "of": "value"},
        choices={"side": ("above", "below"), "of": ("value", "ratio")},
        needs="a diagnosis",
    ),
    RuleInfo(
        name="weight-magnitude",
        title="Smallest weights",
        description="In each tensor with two axes or more the given percentage of entries with "
        "the least |w|, the head included; of each bias as many, which become 0.",
        source=f"{SEED_PAPER} (W)",
        granularity="weight",
        options=PERCENT,
        scheme="mean",
    ),
    RuleInfo(
        name="weight-gradient",
        title="Weights that matter least to the loss",
        description="As above by |w g|, g being the gradient summed over one pass of the training "
        "images. Norms use each batch's own statistics and keep their running ones.",
        source=f"{SEED_PAPER} (WG)",
        granularity="weight",
        options=PERCENT,
        needs="images",
        scheme="mean",
    ),
    RuleInfo(
        name="swr",
        title="Selective weight re-initialisation",
        description="In each parameter the given percentage of entries of least utility, or with a "
        "threshold all of at most that many times the mean utility. Utility is |w g|, |w| or drawn "
        "at random.",
        source="Hernandez-Garcia et al. 2025, arXiv:2508.00212",
        granularity="weight",
        options={"percent": 10.0, "threshold": "", "utility": "gradient"},
        choices={"utility": ("gradient", "magnitude", "random")},
        needs="images",
    ),
    RuleInfo(
        name="redo",
        title="Dormant units (ReDo)",
        description="Units whose mean |activation| is at most tau times the mean over their layer, "
        "wherever they are read. What makes them is redrawn, what reads them becomes 0.",
        source="Sokar et al., ICML 2023, arXiv:2302.12902",
        granularity="unit",
        options={"threshold": 0.025},
        needs="a diagnosis",
    ),
    RuleInfo(
        name="grama",
        title="Units without gradient (GraMa)",
        description="As ReDo by the mean |gradient| at the unit's activation.",
        source="Liu et al. 2025, arXiv:2505.24061",
        granularity="unit",
        options={"threshold": 0.025},
        needs="a diagnosis",
    ),
    RuleInfo(
        name="cbp",
        title="Units that contribute least (continual backpropagation)",
        description="Of each layer the given percentage of units with the least mean |outgoing "
        "weight| times mean |activation|. A bias that follows takes over the unit's mean.",
        source="Dohare et al., Nature 2024",
        granularity="unit",
        options={"percent": 5.0},
        needs="images",
        scheme="kaiming-normal",
    ),
    RuleInfo(
        name="gxd",
        title="Units that are cheapest to replace (GXD)",
        description="Of each layer the given percentage of units with the least |gradient x "
        "(activation - its mean)|, the first-order cost of replacing the unit by its mean.",
        source="arXiv:2605.06834",
        granularity="unit",
        options={"percent": 5.0},
        needs="images",
    ),
    RuleInfo(
        name="random",
        title="Random control",
        description="As much as another plan selects, drawn at random: as many weights of each "
        "tensor, units of each layer, or layers of the same kinds and near in size (the plan's "
        "note says how near); or a percentage of each tensor. The control every comparison "
        "needs.",
        source="arXiv:2508.00212 compares with random choice",
        granularity="any",
        options={"percent": 10.0},
        needs="a plan",
    ),
)


def rule_named(name: str) -> RuleInfo:
    """Return a rule by name.

    Raises:
        PlanError: There is none of that name.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise PlanError(
        f'There is no rule "{name}". Known: {", ".join(rule.name for rule in RULES)}. See python '
        "-m core list rules."
    )


def rule_options(
    rule: RuleInfo, given: Mapping[str, float | str | None]
) -> dict[str, float | str | None]:
    """Return a rule's options with the given ones put in.

    Raises:
        PlanError: An option it does not take, a word or number it does not allow, or one missing.
    """
    chosen = dict(rule.options)
    for key, value in given.items():
        if value is None:
            continue
        if key not in chosen:
            takes = ", ".join(f"--{name}" for name in rule.options) or "no options"
            raise PlanError(f'The rule "{rule.name}" takes no --{key}. It takes {takes}.')
        if key in rule.choices and value not in rule.choices[key]:
            raise PlanError(
                f'--{key} is "{value}"; the rule "{rule.name}" knows '
                f"{', '.join(rule.choices[key])}."
            )
        chosen[key] = value
    for key, value in chosen.items():
        if value is None:
            raise PlanError(f'The rule "{rule.name}" needs --{key}.')
        low, high = {"percent": (0.0, 100.0), "blocks": (1.0, 1e6)}.get(key, (None, None))
        if low is not None and not (isinstance(value, int | float) and low <= value <= high):  # type: ignore[operator]
            raise PlanError(f"--{key} is {value}; give a number from {low:g} to {high:g}.")
        if key == "threshold" and value != "":
            _check_threshold(rule, float(value))
    return chosen


def _check_threshold(rule: RuleInfo, value: float) -> None:
    if not math.isfinite(value):
        raise PlanError(f"--threshold is {value}; give a finite number.")
    if value < 0 and rule.name != "threshold":
        raise PlanError(
            f'--threshold is {value:g}; what the rule "{rule.name}" compares with it is never '
            "below 0. Give 0 or more."
        )


def list_rules() -> tuple[RuleInfo, ...]:
    """Return the ways to choose what is reset."""
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
    if scheme in BIASES_ALONE:
        biased = [layer for layer in reset if any(is_bias(p.name) for p in layer.parameters)]
        if not biased:
            raise PlanError(
                f'"{scheme}" writes biases alone, and "{reset[0].name}" has none. Pick layers that '
                "have one."
            )
        reset = biased
    try:
        return ReinitPlan(
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
        raise PlanError(_first_problem(error, "The plan")) from error


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
    if (model.head == "own") != outline.own_head or model.classes != outline.classes:
        raise PlanError(
            f"The plan was made for {_head_said(model.head == 'own', model.classes)}, and the "
            f"network at hand has {_head_said(outline.own_head, outline.classes)}. Make the plan "
            "again for these classes."
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
    for does, layers in (
        ("freezes", plan.freeze),
        ("sets a learning rate for", [rate.layer for rate in plan.learning_rates]),
    ):
        for layer in layers:
            if outline.layer(layer) is None:
                raise PlanError(f'The plan {does} "{layer}", which {outline.title} does not have.')
    if model.backbone_sha256 != outline.backbone_sha256:
        raise PlanError(
            f"The plan was made for weights {model.backbone_sha256[:12]}..., and the weights at "
            f"hand are {outline.backbone_sha256[:12]}.... Load the weights the plan was made "
            "for, or make the plan again on these."
        )


def _head_said(own: bool, classes: int) -> str:
    return f"the weights' own head ({classes})" if own else f"a new head of {classes} classes"


def random_control(
    outline: ModelOutline,
    plan: ReinitPlan,
    *,
    seed: int,
    avoid: Sequence[str] = (),
    fits: Callable[[Target, LayerInfo], bool] = lambda target, layer: True,
) -> ReinitPlan:
    """Return a plan of whole layers drawn at random, near to another's in size.

    For each target, in turn, a layer is drawn among those of the same kind (convolution, linear,
    norm, other) that neither the plan nor an earlier draw has, from the quarter nearest to it in
    number of parameters (three at least). Of `DRAWS` such draws the one nearest to the plan in
    size is taken. Each layer keeps its target's scheme, numbers and seed of the values. Targets
    of which no layer is left are left out; the note says how the sizes compare.

    Args:
        outline: The network.
        plan: Whole layers.
        seed: Seed of the draw.
        avoid: More layers that are not drawn.
        fits: Whether a target's scheme can be written into a layer.

    Raises:
        PlanError: The plan leaves no layer to draw from.
    """
    import random

    for target in plan.targets:
        if outline.layer(target.layer) is None:
            raise PlanError(f'{outline.title} has no layer "{target.layer}".')
    chooser = random.Random(f"random control {seed}")
    taken = {target.layer for target in plan.targets} | set(avoid)
    free = [
        layer
        for layer in outline.layers
        if layer.name not in taken
        and layer.executed
        and not layer.tied
        and (outline.own_head or not layer.head)
    ]
    names = {target.layer for target in plan.targets}
    wanted = sum(layer.count for layer in outline.layers if layer.name in names)
    draws = [_drawn(outline, plan, free, fits, chooser) for _ in range(DRAWS)]
    drawn = min(draws, key=lambda each: abs(sum(own.count for own, _ in each) - wanted))
    if not drawn:
        raise PlanError(
            "The plan resets every layer of its kinds, so no other layer is left for a random "
            "control. Run without it."
        )
    places = {own.name: (own, target) for own, target in drawn}
    control = ReinitPlan(
        name="random control",
        model=plan.model,
        targets=tuple(
            _whole(*places[layer.name], plan) for layer in outline.layers if layer.name in places
        ),
        freeze=plan.freeze,
        learning_rates=plan.learning_rates,
    )
    bare = tuple(target.model_copy(update={"entries": ()}) for target in plan.targets)
    whole = plan.model_copy(update={"targets": bare, "companion": None})
    own, other = (planned_size(outline, each) for each in (whole, control))
    note = (
        f"Random control: {other.layers} other layer{'' if other.layers == 1 else 's'} drawn with "
        f"seed {seed}, {100 * other.fraction:.3g} % of the parameters against the plan's "
        f"{100 * own.fraction:.3g} %."
    )
    return control.model_copy(update={"evidence": Evidence(note=note)})


def _drawn(
    outline: ModelOutline,
    plan: ReinitPlan,
    free: Sequence[LayerInfo],
    fits: Callable[[Target, LayerInfo], bool],
    chooser: Random,
) -> list[tuple[LayerInfo, Target]]:
    """Return a layer for each target for which one is left."""
    rows: list[tuple[LayerInfo, Target]] = []
    left = list(free)
    for target in plan.targets:
        wanted = outline.layer(target.layer)
        assert wanted is not None
        biases = target.scheme.name in BIASES_ALONE
        same = [
            layer
            for layer in left
            if layer.kind == wanted.kind
            and fits(target, layer)
            and (not biases or any(is_bias(each.name) for each in layer.parameters))
        ]
        if not same:
            continue
        near = sorted(same, key=lambda layer: (abs(layer.count - wanted.count), layer.index))
        chosen = chooser.choice(near[: max(3, len(near) // 4)])
        left.remove(chosen)
        rows.append((chosen, target))
    return rows


def _whole(layer: LayerInfo, like: Target, plan: ReinitPlan) -> Target:
    """Return the target that resets a whole layer as a plan's target does another."""
    names = [p.name for p in layer.parameters]
    if like.scheme.name in BIASES_ALONE:
        names = [name for name in names if is_bias(name)]
    buffers = any(each.buffers for each in plan.targets if each.scheme == like.scheme)
    return Target(
        layer=layer.name,
        parameters=tuple(names),
        buffers=(*layer.buffers, *layer.coupled_buffers) if buffers else (),
        scheme=like.scheme,
        seed=like.seed,
    )


def compose_plans(first: ReinitPlan, second: ReinitPlan, *, name: str | None = None) -> ReinitPlan:
    """Return one plan that makes what both make together.

    Values are always drawn from what the network held before any plan, so that the order does
    not matter; two plans that write the same tensor of the same layer therefore do not compose.

    Raises:
        PlanError: Plans for different networks, or both write one tensor, or they train one layer
            at different rates.
    """
    if first.model != second.model:
        raise PlanError(
            f'The plans "{first.name}" and "{second.name}" were made for different networks or '
            "heads. Compose plans of one network."
        )
    written = _by_tensor(first)
    for target in second.targets:
        for tensor in (*target.parameters, *target.buffers):
            if tensor in written and not _same_buffer(tensor, written[tensor], target):
                raise PlanError(
                    f'Both plans write "{tensor}". Leave "{target.layer}" out of one of them.'
                )
    rates = {rate.layer: rate for rate in first.learning_rates}
    for rate in second.learning_rates:
        if rates.setdefault(rate.layer, rate) != rate:
            raise PlanError(
                f'"{rate.layer}" trains at {rates[rate.layer].factor:g} times the learning rate in '
                f'"{first.name}" and at {rate.factor:g} times in "{second.name}". Agree on one.'
            )
    # Masks and numbers are named after their tensors, so those of two plans never meet.
    arrays = {**arrays_of(first), **arrays_of(second)}
    companion = first.companion or second.companion
    plan = first.model_copy(
        update={
            "companion": companion,
            "name": name or f"{first.name} + {second.name}"[:200],
            "patterns": (*first.patterns, *second.patterns),
            "targets": (*first.targets, *second.targets),
            "freeze": tuple(dict.fromkeys((*first.freeze, *second.freeze))),
            "learning_rates": tuple(rates.values()),
            "rule": first.rule if first.rule == second.rule else None,
            "evidence": first.evidence if first.evidence == second.evidence else Evidence(),
        }
    )
    return sealed(plan, arrays) if arrays else plan


def _same_buffer(tensor: str, one: Target, two: Target) -> bool:
    """Whether both put a whole buffer back to the same twin's, as a layer and its norm may."""
    return all(
        tensor in each.buffers and not any(entries.tensor == tensor for entries in each.entries)
        for each in (one, two)
    ) and (one.seed == two.seed)


class PlanDifference(Value):
    """One thing in which two plans differ.

    Attributes:
        what: "model", "layer", "entries", "freeze", "learning rate" or another key of a plan.
        name: The layer, tensor or key.
        first: What the first plan says, "" for nothing.
        second: What the second plan says, "" for nothing.
    """

    what: str
    name: str
    first: str
    second: str


def diff_plans(first: ReinitPlan, second: ReinitPlan) -> tuple[PlanDifference, ...]:
    """Return in what two plans differ; nothing when they make the same weights and training."""
    rows: list[PlanDifference] = []

    def compare(what: str, name: str, one: str, two: str) -> None:
        if one != two:
            rows.append(PlanDifference(what=what, name=name, first=one, second=two))

    for key in ModelIdentity.model_fields:
        one, two = getattr(first.model, key), getattr(second.model, key)
        compare("model", key, str(one), str(two))
    own, other = _by_layer(first), _by_layer(second)
    for layer in dict.fromkeys([*own, *other]):
        compare("layer", layer, _said(own.get(layer, ())), _said(other.get(layer, ())))
    left, right = _by_tensor(first), _by_tensor(second)
    for tensor in dict.fromkeys([*left, *right]):
        one, two = left.get(tensor), right.get(tensor)
        home = (one or two or first.targets[0]).layer
        if home in own and home in other:
            compare("entries", tensor, _written(one, tensor), _written(two, tensor))
    told = {row.name for row in rows}
    for tensor, odd in _other_bits(first, second).items():
        if tensor not in told:
            text = _written(left.get(tensor), tensor)
            compare("entries", tensor, text, f"{text}, {odd}")
    compare("key", "freeze", *(", ".join(sorted(plan.freeze)) for plan in (first, second)))
    rates = [
        ", ".join(sorted(f"{rate.layer} x {rate.factor!r}" for rate in plan.learning_rates))
        for plan in (first, second)
    ]
    compare("key", "learning_rates", *rates)
    return tuple(rows)


def _by_layer(plan: ReinitPlan) -> dict[str, tuple[Target, ...]]:
    """Return a plan's targets by layer: composed ones may name a layer twice."""
    found: dict[str, tuple[Target, ...]] = {}
    for target in plan.targets:
        found[target.layer] = (*found.get(target.layer, ()), target)
    return found


def _by_tensor(plan: ReinitPlan) -> dict[str, Target]:
    return {n: target for target in plan.targets for n in (*target.parameters, *target.buffers)}


def _other_bits(first: ReinitPlan, second: ReinitPlan) -> dict[str, str]:
    """Return tensors of which both plans write as many entries, but others, or by other numbers."""
    arrays = arrays_of(first), arrays_of(second)
    theirs = {
        (entries.tensor, entries.write): entries
        for target in second.targets
        for entries in target.entries
    }
    found = {}
    for target in first.targets:
        for one in target.entries:
            two = theirs.get((one.tensor, one.write))
            if two is None:
                continue
            for key, other, what in (
                (one.mask, two.mask, "others of them"),
                (one.values, two.values, "by other numbers"),
            ):
                left, right = arrays[0].get(str(key)), arrays[1].get(str(other))
                same = left is right is None or (
                    left is not None and right is not None and left.tobytes() == right.tobytes()
                )
                if not same:
                    found[one.tensor] = what
            if one.indices != two.indices:
                found[one.tensor] = "others of them"
    return found


def _said(targets: Sequence[Target]) -> str:
    rows = []
    for target in targets:
        # Every digit: numbers that look alike may write other weights.
        given = sorted(target.scheme.parameters.items())
        numbers = "".join(f" {key}={value!r}" for key, value in given)
        units = f", units {_shortened(target.units)}" if target.units else ""
        rows.append(
            f"{target.granularity}, {target.scheme.name}{numbers}, seed {target.seed}{units}"
        )
    return "; ".join(sorted(rows))


def _written(target: Target | None, tensor: str) -> str:
    if target is None or tensor not in (*target.parameters, *target.buffers):
        return ""
    found = [
        f"{entries.write} {entries.count}"
        + (f" along axis {entries.axis}" if entries.axis is not None else "")
        + (f" at {_shortened(entries.indices)}" if entries.indices else "")
        for entries in target.entries
        if entries.tensor == tensor
    ]
    return "; ".join(sorted(found)) or "whole"


def _shortened(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return ", ".join(map(str, numbers[:6])) + more


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
            raise PlanError(_first_problem(error, where)) from error
        raise PlanError(f"{where} is not a plan ({error}).") from error


class _TwiceError(Exception):
    """A key stands twice in one object: which one counts is anyone's guess."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return found


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
