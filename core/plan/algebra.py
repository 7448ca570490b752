"""Two plans -> one plan, or what they differ in."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import PlanError
from core.files.companions import arrays_of, sealed
from core.plan.making import refuse_untrained
from core.records import (
    Evidence,
    ModelIdentity,
    ReinitPlan,
    Target,
)
from core.records.base import Value


def compose_plans(first: ReinitPlan, second: ReinitPlan, *, name: str | None = None) -> ReinitPlan:
    """Return one plan that makes what both make together.

    Values are always drawn from what the network held before any plan, so that the order does
    not matter; two plans that write the same tensor of the same layer therefore do not compose.

    Raises:
        PlanError: Plans for different networks, or both write one tensor, or they train one layer
            at different rates, or one keeps from training what the other resets.
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
    refuse_untrained(plan)
    return sealed(plan, arrays) if arrays else plan


def _same_buffer(tensor: str, one: Target, two: Target) -> bool:
    """Whether both put a whole buffer back to the same twin's, as a layer and its norm may."""
    return all(
        tensor in target.buffers and not any(entries.tensor == tensor for entries in target.entries)
        for target in (one, two)
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
    by_layer: dict[str, tuple[Target, ...]] = {}
    for target in plan.targets:
        by_layer[target.layer] = (*by_layer.get(target.layer, ()), target)
    return by_layer


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
    differing = {}
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
                    differing[one.tensor] = what
            if one.indices != two.indices:
                differing[one.tensor] = "others of them"
    return differing


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
    written = [
        f"{entries.write} {entries.count}"
        + (f" along axis {entries.axis}" if entries.axis is not None else "")
        + (f" at {_shortened(entries.indices)}" if entries.indices else "")
        for entries in target.entries
        if entries.tensor == tensor
    ]
    return "; ".join(sorted(written)) or "whole"


def _shortened(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return ", ".join(map(str, numbers[:6])) + more
