"""Weights + plan -> edited weights and a receipt. The given weights are left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from core.errors import PlanError
from core.initialisers import Request, draw, scheme_numbers
from core.records import ReinitPlan, ReinitReceipt, TensorChange
from core.seeding import generator

State = dict[str, Tensor]


def apply_plan(
    state: Mapping[str, Tensor],
    plan: ReinitPlan,
    *,
    fresh: Callable[[int], Mapping[str, Tensor]],
    parameters: frozenset[str],
    sha256: Callable[[Mapping[str, Tensor]], str],
    plan_text: str,
) -> tuple[State, ReinitReceipt]:
    """Return an edited copy of the weights and the receipt.

    The same weights and plan give the same bits: values come from the fresh twin of each
    target's seed and from generators named after the parameter, never from global state.

    Args:
        state: A module's `state_dict()`, on the CPU; entries that share memory are tied.
        plan: What to reset.
        fresh: Seed to the `state_dict` of the fresh twin of that seed.
        parameters: Names in `state` that are parameters; the rest are buffers.
        sha256: Digest of a state.
        plan_text: The plan's JSON text, for its digest.

    Returns:
        Every tensor of `state`, those the plan does not name being the same objects.

    Raises:
        PlanError: A name is missing, is no parameter (or buffer), is listed twice, or shares
            memory with a name the plan does not list.
    """
    listed = [name for target in plan.targets for name in target.parameters]
    _check_names(state, plan, parameters)
    owner: dict[int, str] = {}
    for name in sorted(parameters & state.keys()):
        if state[name].numel():
            owner.setdefault(state[name].data_ptr(), name)
    tied: dict[str, list[str]] = {}
    for name in sorted(parameters & state.keys()):
        if state[name].numel():
            tied.setdefault(owner[state[name].data_ptr()], []).append(name)
    for group in tied.values():
        inside = [name for name in group if name in set(listed)]
        if inside and len(inside) < len(group):
            outside = next(name for name in group if name not in inside)
            raise PlanError(
                f'"{inside[0]}" shares its memory with "{outside}", which the plan does not list. '
                "List both (they are reset once) or neither."
            )
    edited: State = dict(state)
    twins: dict[int, Mapping[str, Tensor]] = {}
    drawn: dict[str, Tensor] = {}
    changes: list[TensorChange] = []
    touched = 0
    for target in plan.targets:
        numbers = scheme_numbers(target.scheme.name, target.scheme.parameters)
        if target.seed not in twins:
            twins[target.seed] = fresh(target.seed)
        twin = twins[target.seed]
        for name in target.parameters:
            first = owner.get(state[name].data_ptr(), name)
            if first not in drawn:
                drawn[first] = draw(
                    target.scheme.name,
                    Request(
                        old=state[name].detach(),
                        fresh=twin[name].detach(),
                        generator=generator(target.seed, target.scheme.name, first),
                        numbers=numbers,
                    ),
                )
                touched += state[name].numel()
            edited[name] = drawn[first]
            changes.append(_change(target.layer, name, state[name], edited[name], buffer=False))
        for name in target.buffers:
            edited[name] = twin[name].clone()
            changes.append(_change(target.layer, name, state[name], edited[name], buffer=True))
    receipt = ReinitReceipt(
        plan_sha256=hashlib.sha256(plan_text.encode()).hexdigest(),
        before_sha256=sha256(state),
        after_sha256=sha256(edited),
        parameters_touched=touched,
        parameters_total=sum(state[name].numel() for name in set(owner.values())),
        changes=tuple(changes),
        warnings=_warnings(changes),
    )
    return edited, receipt


def _check_names(state: Mapping[str, Tensor], plan: ReinitPlan, parameters: frozenset[str]) -> None:
    seen: dict[str, str] = {}
    for target in plan.targets:
        for name in target.parameters:
            if name not in parameters:
                raise PlanError(
                    f'The plan\'s layer "{target.layer}" names the parameter "{name}", which the '
                    "model does not have. Load the model the plan was made for, or make the plan "
                    "again."
                )
            if name in seen:
                raise PlanError(
                    f'The plan resets "{name}" twice, in "{seen[name]}" and in "{target.layer}". '
                    "Keep one."
                )
            seen[name] = target.layer
        for name in target.buffers:
            if name not in state or name in parameters:
                raise PlanError(
                    f'The plan\'s layer "{target.layer}" names the buffer "{name}", which the '
                    "model does not have. Make the plan again."
                )


def _change(layer: str, name: str, old: Tensor, new: Tensor, *, buffer: bool) -> TensorChange:
    changed = int((old != new).sum())
    relative = before = after = None
    if old.is_floating_point():
        before = float(old.double().norm())
        after = float(new.double().norm())
        if before > 0:
            relative = float((new.double() - old.double()).norm()) / before
    return TensorChange(
        name=name,
        layer=layer,
        buffer=buffer,
        entries=old.numel(),
        changed=changed,
        relative_change=relative,
        norm_before=before,
        norm_after=after,
    )


def _warnings(changes: list[TensorChange]) -> tuple[str, ...]:
    rows = []
    weights = [change for change in changes if not change.buffer]
    if weights and not any(change.changed for change in weights):
        rows.append("The plan changes no parameter at all: it is a no-op on these weights.")
    for change in weights:
        if (change.norm_before or 0) > 0 and (change.norm_after or 0) > 10 * (
            change.norm_before or 0
        ):
            rows.append(f'"{change.name}" grows more than tenfold in norm.')
        if change.norm_after is not None and not torch.isfinite(torch.tensor(change.norm_after)):
            rows.append(f'"{change.name}" is not finite after the reset.')
    return tuple(rows)
