"""Plan -> a random plan of the same kind and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from core.errors import PlanError
from core.records import (
    Evidence,
    LayerInfo,
    ModelOutline,
    ReinitPlan,
    Target,
)
from core.records.outline import is_bias

if TYPE_CHECKING:
    from random import Random
from core.plan.making import BIASES_ALONE, planned_size

# Random controls of layers that are drawn, to take the one nearest in size.
DRAWS = 16


def random_layers(
    outline: ModelOutline,
    plan: ReinitPlan,
    *,
    seed: int,
    avoid: Sequence[str] = (),
    fits: Callable[[Target, LayerInfo], bool] = lambda target, layer: True,
) -> ReinitPlan:
    """Return a plan of whole layers drawn at random, near to another's in size.

    For each target, in turn, a layer is drawn among those of the same kind (convolution, linear,
    norm, other) that trains and that neither the plan nor an earlier draw has, from the quarter
    nearest to it in number of parameters (three at least). Of `DRAWS` such draws the one nearest to
    the plan in size is taken. Each layer keeps its target's scheme, numbers and seed of the values.
    Targets of which no layer is left are left out; the note says how the sizes compare.

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
    if not plan.untrained:
        # A control that stays random for ever would lose to any plan.
        taken |= {*plan.freeze, *(rate.layer for rate in plan.learning_rates if not rate.factor)}
    # The head is drawn for a plan that takes it along, and for no other: that one fits any head.
    head = outline.own_head and any(
        layer.head and any(target.layer == layer.name for target in plan.targets)
        for layer in outline.layers
    )
    free = [
        layer
        for layer in outline.layers
        if layer.name not in taken
        and layer.executed
        and not layer.tied
        and (head or not layer.head)
    ]
    names = {target.layer for target in plan.targets}
    wanted = sum(layer.count for layer in outline.layers if layer.name in names)
    draws = [_drawn(outline, plan, free, fits, chooser) for _ in range(DRAWS)]
    drawn = min(draws, key=lambda pairs: abs(sum(own.count for own, _ in pairs) - wanted))
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
    own, other = (planned_size(outline, layers) for layers in (whole, control))
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
            and (not biases or any(is_bias(parameter.name) for parameter in layer.parameters))
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
    buffers = any(target.buffers for target in plan.targets if target.scheme == like.scheme)
    return Target(
        layer=layer.name,
        parameters=tuple(names),
        buffers=(*layer.buffers, *layer.coupled_buffers) if buffers else (),
        scheme=like.scheme,
        seed=like.seed,
    )
