"""Weights + plan -> edited weights and a receipt. The given weights stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from core.catalogue.schemes import scheme_named, scheme_numbers
from core.edit.draws import Request, draw
from core.errors import PlanError
from core.files.companions import arrays_of, chosen_entries, demand
from core.records import Entries, ReinitPlan, ReinitReceipt, Target, TensorChange, Write
from core.records.outline import is_bias
from core.seeding import generator

State = dict[str, Tensor]
MAX_SEEDS = 256


def edited_state(
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
        state: A module's `state_dict()`, of any shapes, on the CPU; entries that share memory are
            tied.
        plan: What to reset.
        fresh: Seed to the `state_dict` of the fresh twin of that seed.
        parameters: Names in `state` that are parameters; the rest are buffers.
        sha256: Digest of a state.
        plan_text: The plan's JSON text, for its digest.

    Returns:
        Every tensor of `state` in its shape and dtype; those that the plan does not name are the
        same objects.

    Raises:
        PlanError: A name is missing, is no parameter (or buffer), is listed twice, or shares
            memory with a name the plan does not list; entries do not fit, or their companion is
            missing; or what it writes is not finite, or a variance below 0.
    """
    _check_names(state, plan, parameters)
    edit = _Edit(state, plan, parameters)
    edit.check_ties()
    edit.write(fresh)
    _check_values(plan, state, edit.edited, edit.layers)
    edit.follow_ties()
    return edit.edited, edit.receipt(sha256, plan_text)


class _Edit:
    """An edit in the making.

    Attributes:
        edited: Name to tensor, written so far.
        layers: Name of a written tensor to the layer that its target names.
        selected: Name of a written tensor to the flags of what is written; None for all of it.
    """

    def __init__(
        self, state: Mapping[str, Tensor], plan: ReinitPlan, parameters: frozenset[str]
    ) -> None:
        self._state, self._plan, self._parameters = state, plan, parameters
        self.edited: State = dict(state)
        self.layers: dict[str, str] = {}
        self.selected: dict[str, Tensor | None] = {}
        # Of parameters that share memory the first by name stands for all.
        self._owner: dict[int, str] = {}
        self._tied: dict[str, list[str]] = {}
        for name in sorted(parameters & state.keys()):
            if state[name].numel():
                first = self._owner.setdefault(state[name].data_ptr(), name)
                self._tied.setdefault(first, []).append(name)

    def check_ties(self) -> None:
        """Raise where whole parameters share memory with others that the plan does not list."""
        listed = {
            name
            for target in self._plan.targets
            for name in {*target.parameters} - {entries.tensor for entries in target.entries}
        }
        for group in self._tied.values():
            inside = [name for name in group if name in listed]
            if inside and len(inside) < len(group):
                outside = next(name for name in group if name not in inside)
                raise PlanError(
                    f'"{inside[0]}" shares its memory with "{outside}", which the plan does not '
                    "list. List both (they are reset once) or neither."
                )

    def write(self, fresh: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Make every write of the plan, in order."""
        arrays = arrays_of(self._plan)
        wanted = _by_seed(self._plan)
        twins: dict[int, Mapping[str, Tensor]] = {}
        for place, write, target, entries in _writes(self._plan):
            if target.seed not in twins:
                # Each seed's twin is a whole network; what its targets name is all that is kept.
                whole = fresh(target.seed)
                names = wanted[target.seed] & whole.keys()
                twins[target.seed] = {name: whole[name] for name in names}
            name = place
            if place in self._parameters:
                name = self._owner.get(self._state[place].data_ptr(), place)
            old, twin = self._state[name].detach(), twins[target.seed][place].detach()
            flags = None if entries is None else entry_flags(entries, old, arrays)
            if write == "scheme" and place in self._parameters:
                new = _drawn(target, place, name, old=old, twin=twin, flags=flags)
            else:
                new = _fixed(write, self.edited[name].detach(), old, twin, entries, arrays)
            self.edited[name] = new if flags is None else torch.where(flags, new, self.edited[name])
            self.layers.setdefault(name, target.layer)
            before = self.selected.get(name, torch.zeros((), dtype=torch.bool))
            self.selected[name] = None if flags is None or before is None else before | flags

    def follow_ties(self) -> None:
        """Give parameters that share memory what was written into the first of them."""
        for first, *others in self._tied.values():
            for name in others:
                if first in self.layers:
                    self.edited[name] = self.edited[first]
                    self.layers[name] = self.layers[first]
                    self.selected[name] = self.selected[first]

    def receipt(
        self, sha256: Callable[[Mapping[str, Tensor]], str], plan_text: str
    ) -> ReinitReceipt:
        """Return what was written, and the digests before and after."""
        counts = {
            name: self._state[name].numel() if flags is None else int(flags.sum())
            for name, flags in self.selected.items()
        }
        order = dict.fromkeys(name for target in self._plan.targets for name in _names(target))
        order |= dict.fromkeys(self.layers)
        changes = [
            _change(
                self.layers[name],
                name,
                self._state[name],
                self.edited[name],
                buffer=name not in self._parameters,
                selected=counts[name],
            )
            for name in order
        ]
        owners = set(self._owner.values())
        return ReinitReceipt(
            plan_sha256=hashlib.sha256(plan_text.encode()).hexdigest(),
            before_sha256=sha256(self._state),
            after_sha256=sha256(self.edited),
            parameters_touched=sum(count for name, count in counts.items() if name in owners),
            parameters_total=sum(self._state[name].numel() for name in owners),
            changes=tuple(changes),
            warnings=(*_warnings(changes), *_alike(changes, self.edited)),
        )


def _drawn(
    target: Target, place: str, name: str, *, old: Tensor, twin: Tensor, flags: Tensor | None
) -> Tensor:
    """Return what a target's scheme draws for a parameter.

    Args:
        target: Names scheme, numbers and seed.
        place: The parameter's name in the plan.
        name: The name that stands for all that share its memory.
        old: Its values before the plan.
        twin: Those of the fresh twin.
        flags: Which entries are written; None for all.
    """
    scheme = target.scheme
    return draw(
        scheme.name,
        Request(
            old=old,
            fresh=twin,
            generator=generator(target.seed, scheme.name, name),
            numbers=scheme_numbers(scheme.name, scheme.parameters),
            bias=is_bias(place),
            selected=flags,
        ),
    )


def _by_seed(plan: ReinitPlan) -> dict[int, set[str]]:
    """Return each seed's tensors.

    Raises:
        PlanError: More than `MAX_SEEDS` seeds.
    """
    by_seed: dict[int, set[str]] = {}
    for target in plan.targets:
        by_seed.setdefault(target.seed, set()).update(_names(target))
    if len(by_seed) > MAX_SEEDS:
        raise PlanError(
            f"The plan draws from {len(by_seed):,} seeds, each of them a network to build; at most "
            f"{MAX_SEEDS} are read. Make the plan again with one seed."
        )
    return by_seed


def _names(target: Target) -> tuple[str, ...]:
    return (*target.parameters, *target.buffers)


def _writes(plan: ReinitPlan) -> Iterator[tuple[str, Write, Target, Entries | None]]:
    """Yield every write of a plan in the order in which they are made.

    What is drawn comes before what is fixed: of two layers that are both reset, one's outgoing
    weights are the other's incoming ones, and zero must win.
    """
    rows: list[tuple[int, str, Write, Target, Entries | None]] = []
    for target in plan.targets:
        partly = {entries.tensor for entries in target.entries}
        for name in _names(target):
            if name not in partly:
                whole: Write = "scheme" if name in target.parameters else "fresh"
                rows.append((PHASES[whole], name, whole, target, None))
        for entry in target.entries:
            rows.append((PHASES[entry.write], entry.tensor, entry.write, target, entry))
    for _, name, write, target, entries in sorted(rows, key=lambda row: row[0]):
        yield name, write, target, entries


PHASES: dict[Write, int] = {"scheme": 0, "scale": 0, "fresh": 1, "one": 1, "zero": 2, "add": 3}


def entry_flags(entries: Entries, old: Tensor, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    """Return which entries of a tensor are meant, in its shape; None for all of them.

    Raises:
        PlanError: Axis, indices or mask do not fit the tensor.
    """
    flags = chosen_entries(entries, tuple(old.shape), arrays)
    return None if flags is None else torch.from_numpy(np.array(flags))


def _fixed(
    write: Write,
    now: Tensor,
    old: Tensor,
    twin: Tensor,
    entries: Entries | None,
    arrays: Mapping[str, np.ndarray],
) -> Tensor:
    if write == "zero":
        return torch.zeros_like(old)
    if write == "one":
        return torch.ones_like(old)
    if entries is None or write not in ("scale", "add"):
        return twin.detach().clone()
    found = arrays.get(str(entries.values))
    fits = (
        found is not None
        and found.dtype == np.float32
        and tuple(found.shape) == tuple(old.shape[: found.ndim])
        and bool(np.isfinite(found).all())
    )
    demand(fits, entries, f'the companion has no fitting numbers "{entries.values}"')
    values = torch.from_numpy(np.array(found)).reshape(found.shape + (1,) * (old.ndim - found.ndim))  # type: ignore[union-attr]
    return (old * values if write == "scale" else now + values).to(old.dtype)


def _check_layers(plan: ReinitPlan, parameters: frozenset[str]) -> None:
    layers = {name.rpartition(".")[0] or name for name in parameters}
    for does, named in (
        ("resets", [target.layer for target in plan.targets]),
        ("freezes", plan.freeze),
        ("sets a learning rate for", [rate.layer for rate in plan.learning_rates]),
    ):
        odd = next((layer for layer in named if layer not in layers), None)
        if odd is not None:
            raise PlanError(
                f'The plan {does} "{odd}", which is no layer of the model. Load the model the plan '
                "was made for, or make the plan again."
            )


def _check_names(state: Mapping[str, Tensor], plan: ReinitPlan, parameters: frozenset[str]) -> None:
    whole: dict[str, str] = {}
    drawn: dict[str, list[Entries]] = {}
    _check_layers(plan, parameters)
    for target in plan.targets:
        scheme = scheme_named(target.scheme.name)
        if target.granularity not in scheme.granularities:
            raise PlanError(
                f'The plan\'s layer "{target.layer}" writes "{target.scheme.name}" into single '
                f"{target.granularity}s, and that scheme is for "
                f"{' and '.join(scheme.granularities)}s. Choose another scheme."
            )
        partly = {entries.tensor for entries in target.entries}
        for name in target.parameters:
            if name not in parameters:
                raise PlanError(
                    f'The plan\'s layer "{target.layer}" names the parameter "{name}", which the '
                    "model does not have. Load the model the plan was made for, or make the plan "
                    "again."
                )
        for name in target.buffers:
            if name not in state or name in parameters:
                raise PlanError(
                    f'The plan\'s layer "{target.layer}" names the buffer "{name}", which the '
                    "model does not have. Make the plan again."
                )
        for name in _names(target):
            if name in whole or (name in drawn and name not in partly):
                raise PlanError(
                    f'The plan resets "{name}" twice, in "{whole.get(name, name)}" and in '
                    f'"{target.layer}". Keep one.'
                )
            if name not in partly and name in target.parameters:
                whole[name] = target.layer
        for entries in target.entries:
            if entries.write in ("scheme", "scale"):
                drawn.setdefault(entries.tensor, []).append(entries)
    arrays = arrays_of(plan)
    for name, several in drawn.items():
        seen = torch.zeros((), dtype=torch.bool)
        for entries in several:
            found = entry_flags(entries, state[name], arrays)
            flags = torch.ones_like(state[name], dtype=torch.bool) if found is None else found
            if bool((seen & flags).any()):
                raise PlanError(f'The plan draws entries of "{name}" twice. Keep one of them.')
            seen = seen | flags


def _check_values(
    plan: ReinitPlan,
    state: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
    names: Iterable[str],
) -> None:
    """Refuse values that no network can run with: a factor or sum in the companion made them."""
    for name in names:
        old, new = state[name], edited[name]
        odd = ~new.isfinite() & old.isfinite()
        what = "values that are not finite numbers"
        if name.endswith("running_var") and not bool(odd.any()):
            odd, what = (new < 0) & (old >= 0), "variances below 0"
        count = int(odd.sum())
        if count:
            raise PlanError(
                f'The plan "{plan.name}" writes {what}: {count:,} of {new.numel():,} in "{name}". '
                "Make the plan again with smaller numbers."
            )


def _change(
    layer: str, name: str, old: Tensor, new: Tensor, *, buffer: bool, selected: int
) -> TensorChange:
    changed = int(other_bits(old, new).sum())
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
        selected=selected,
        changed=changed,
        relative_change=relative,
        norm_before=before,
        norm_after=after,
    )


def _alike(changes: list[TensorChange], edited: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Warn of weights whose units are all the same: they get one gradient and stay the same."""
    names = [
        change.name
        for change in changes
        if not change.buffer
        and change.selected == change.entries > 1
        and edited[change.name].ndim > 1
        and bool((edited[change.name] == edited[change.name].flatten()[0]).all())
    ]
    if not names:
        return ()
    first = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"Every entry of {first} is one number: all units there are alike, get the same gradient "
        "and can hardly become different. Reset a share of the entries, or draw the values.",
    )


def other_bits(old: Tensor, new: Tensor) -> Tensor:
    """Return which entries of two tensors alike in shape and dtype differ, as flags in their shape.

    As bits: 0 and -0 are equal numbers and other weights, and NaN is the same weight as itself.
    """
    if not old.numel():
        return torch.zeros_like(old, dtype=torch.bool)
    left, right = (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).reshape(old.numel(), -1)
        for tensor in (old, new)
    )
    return (left != right).any(1).reshape(old.shape)


def _warnings(changes: list[TensorChange]) -> tuple[str, ...]:
    rows = []
    weights = [change for change in changes if not change.buffer]
    if not any(change.changed for change in weights):
        rows.append("The plan changes no parameter at all: it is a no-op on these weights.")
    for change in weights:
        if (change.norm_before or 0) > 0 and (change.norm_after or 0) > 10 * (
            change.norm_before or 0
        ):
            rows.append(f'"{change.name}" grows more than tenfold in norm.')
    return tuple(rows)
