"""Plans and rivals -> the arms of a trial."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from core.catalogue.trials import RivalInfo
from core.errors import OptionError, PlanError
from core.files.companions import resealed
from core.load import load_model
from core.pipeline.applying import edited_model
from core.plan.making import check_plan, make_plan, planned_size, untrained_sentence
from core.records import RANDOM_CONTROL, UNTOUCHED, ModelOutline, ModelSpec, ReinitPlan
from core.trial.arms import Arm

# Plans whose sizes differ by less are of about the same size.
ALIKE = 1.25
# From one stage to the one before it.
RATE_DECAY = 0.75
# From one learning rate to the next.
RATE_STEP = 3.0
# Standard deviation of a new head's weights at the start of a trial.
HEAD_STD = 0.01


def arms_plans(
    plans: Sequence[ReinitPlan], outline: ModelOutline
) -> tuple[dict[str, ReinitPlan], list[str]]:
    """Return the plan of each arm by the arm's name, and what the record must say of them.

    Raises:
        PlanError: A plan does not fit the network, or writes into the new head only.
    """
    by_arm: dict[str, ReinitPlan] = {}
    caveats = []
    for plan in plans:
        check_plan(plan, outline)
        trimmed, left_out = without_new_head(plan, outline)
        random = plan.rule is not None and plan.rule.name == "random"
        # What is called the control is held against as the control.
        name = "plan" if plan.name == RANDOM_CONTROL and not random else plan.name
        name = free_name(name, by_arm)
        by_arm[name] = trimmed
        caveats += [f'"{name}": {sentence}' for sentence in left_out]
        if trimmed.untrained:
            caveats.append(f'"{name}": {untrained_sentence(trimmed.untrained)}')
        if outline.spec.weights == "none" and any(target.entries for target in plan.targets):
            caveats.append(
                f'"{name}" chose entries on the random network of seed {plan.model.head_seed}; '
                "without weights to load each seed has another network, where they are any others."
            )
    return by_arm, caveats


def plan_arms(spec: ModelSpec, outline: ModelOutline, plans: Mapping[str, ReinitPlan]) -> list[Arm]:
    """Return the untouched arm, and one for each plan.

    A new head starts small in all of them (`HEAD_STD`, biases 0). Many architectures draw it so
    large that the first losses are several times chance, and the first steps spoil the features
    below it: EfficientNet-Lite0 on blood cells ended at 60 % with its own draw and at 74 % with
    this one (60 steps, 64 px).
    """
    head = frozenset(
        parameter.name for layer in outline.layers if layer.head for parameter in layer.parameters
    )
    classes = outline.classes
    shrink = _head_shrinker(spec, outline, head)
    untouched = Arm(
        name=UNTOUCHED, build=lambda seed: shrink(untouched_network(spec, classes, seed)), head=head
    )
    return [
        untouched,
        *(
            Arm(
                name=name,
                build=_builder(plan, classes, shrink),
                frozen=_frozen(outline, plan),
                head=head,
                rates=_rates(outline, plan),
            )
            for name, plan in plans.items()
        ),
    ]


def rival_arm(
    info: RivalInfo,
    spec: ModelSpec,
    outline: ModelOutline,
    *,
    taken: Sequence[str] = (),
) -> tuple[Arm, ReinitPlan | None]:
    """Return a rival's arm, and its plan where it is one that resets.

    Args:
        info: Which rival.
        spec: The model.
        outline: Its layers, with the head for the images.
        taken: Names that other arms have.

    Raises:
        OptionError: The network has no new head to train alone, or no norms or layers to change.
    """
    name = free_name(info.arm, taken)
    plain = plan_arms(spec, outline, {})[0]
    if info.name in ("lp-ft", "probe"):
        if not plain.head:
            raise OptionError(
                f'The rival "{info.name}" trains a new head alone, and {outline.title} keeps its '
                "own."
            )
        return replace(plain, name=name, head_first=1.0 if info.name == "probe" else 0.5), None
    if info.name == "auto-rgn":
        norms = frozenset(
            parameter.name
            for layer in outline.layers
            if layer.kind == "norm"
            for parameter in layer.parameters
        )
        return replace(plain, name=name, relative_gradients=True, frozen=norms), None
    if info.name == "llrd":
        return replace(plain, name=name, rates=decayed_rates(outline)), None
    if info.name in ("rate-up", "rate-down"):
        factor = RATE_STEP if info.name == "rate-up" else 1 / RATE_STEP
        return replace(plain, name=name, lr_factor=factor), None
    layers = [layer.name for layer in outline.layers if layer.executed and not layer.head]
    plan = make_plan(outline, layers, scheme=info.name, name=name)
    (arm,) = plan_arms(spec, outline, {name: plan})[1:]
    return arm, plan


def decayed_rates(outline: ModelOutline, *, decay: float = RATE_DECAY) -> dict[str, float]:
    """Return parameter to the multiple of the rate at which it trains: less the further in front.

    Args:
        outline: The layers in forward order; those of one stage share a rate.
        decay: From one stage to the one before it.
    """
    stages = list(dict.fromkeys(layer.stage for layer in outline.layers if not layer.head))
    depth = {stage: len(stages) - place for place, stage in enumerate(stages)}
    return {
        parameter.name: decay ** depth[layer.stage]
        for layer in outline.layers
        if not layer.head
        for parameter in layer.parameters
    }


def without_new_head(plan: ReinitPlan, outline: ModelOutline) -> tuple[ReinitPlan, tuple[str, ...]]:
    """Return what of a plan can be compared over several new heads, and what was left out.

    Arms of one seed share a head, and each seed has another. What a plan chose or computed on one
    head (its smallest weights, a shift of its biases) means nothing on the next; the columns that
    read a reset unit are 0 on any.

    Raises:
        PlanError: Nothing is left.
    """
    heads = {layer.name for layer in outline.layers if layer.head and not outline.own_head}
    targets, dropped = [], 0
    for target in plan.targets:
        entries = tuple(
            entry
            for entry in target.entries
            if target.layer not in heads or (target.granularity == "unit" and entry.write == "zero")
        )
        dropped += len(target.entries) - len(entries)
        if len(entries) == len(target.entries):
            targets.append(target)
        elif entries:
            names = {entry.tensor for entry in entries}
            targets.append(
                target.model_copy(
                    update={
                        "entries": entries,
                        "parameters": tuple(n for n in target.parameters if n in names),
                        "buffers": tuple(n for n in target.buffers if n in names),
                    }
                )
            )
    if not dropped:
        return plan, ()
    if not targets:
        raise PlanError(
            f'Plan "{plan.name}" resets only the new head, which is another with each seed. '
            "Choose layers before it."
        )
    kept = plan.model_copy(update={"targets": tuple(targets)})
    said = (
        "what it writes into the new head is left out, because the arms of a comparison share "
        "their head and each seed has another."
    )
    return resealed(kept), (said,)


def size_caveats(plans: Mapping[str, ReinitPlan], outline: ModelOutline) -> tuple[str, ...]:
    """Say which random controls reset more or less than the first plan does."""
    sizes = {name: planned_size(outline, plan) for name, plan in plans.items()}
    first = next(iter(sizes), "")
    rows = []
    for name, plan in plans.items():
        if name == first or plan.rule is None or plan.rule.name != "random":
            continue
        own, other = sizes[name].parameters, sizes[first].parameters
        if not 1 / ALIKE <= own / max(other, 1) <= ALIKE:
            rows.append(
                f'"{name}" resets {100 * sizes[name].fraction:.2g} % of the parameters and '
                f'"{first}" {100 * sizes[first].fraction:.2g} %: no layers nearer in size were '
                "left, and their sizes may explain a difference between the two."
            )
    return tuple(rows)


def free_name(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number where it is taken."""
    if name == UNTOUCHED:
        name = "plan"
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name} {number}"
    return free


def untouched_network(spec: ModelSpec, classes: int, seed: int) -> nn.Module:
    """Return the network as it came, with the new head of a seed, on the CPU."""
    return load_model(spec, classes=classes, head_seed=seed).module


def _builder(
    plan: ReinitPlan, classes: int, shrink: Callable[[nn.Module], nn.Module]
) -> Callable[[int], nn.Module]:
    return lambda seed: shrink(edited_model(plan, classes=classes, head_seed=seed)[0].module)


def _head_shrinker(
    spec: ModelSpec, outline: ModelOutline, head: Collection[str]
) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a new head small; one that came with the weights stays as it is."""

    @functools.cache
    def factors() -> dict[str, float]:
        # Of the untouched head: a plan's zeros must not change what the rest is multiplied by.
        parameters = dict(untouched_network(spec, outline.classes, 0).named_parameters())
        found = {}
        for name in head:
            size = float(parameters[name].detach().std()) if parameters[name].ndim > 1 else 0.0
            found[name] = HEAD_STD / size if size > 0 else 0.0
        return found

    def shrink(model: nn.Module) -> nn.Module:
        if not outline.own_head:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in head:
                        parameter.mul_(factors()[name])
        return model

    return shrink


def _frozen(outline: ModelOutline, plan: ReinitPlan) -> frozenset[str]:
    return frozenset(
        parameter.name
        for layer in outline.layers
        if layer.name in set(plan.freeze)
        for parameter in layer.parameters
    )


def _rates(outline: ModelOutline, plan: ReinitPlan) -> dict[str, float]:
    factors = {rate.layer: rate.factor for rate in plan.learning_rates}
    return {
        parameter.name: factors[layer.name]
        for layer in outline.layers
        if layer.name in factors
        for parameter in layer.parameters
    }
