"""A plan -> its random control: as much of the same, drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from core.catalogue.schemes import SCHEMES
from core.errors import PlanError
from core.files.companions import arrays_of, chosen_entries, resealed
from core.measure.utility import random_entries
from core.pipeline.applying import plan_classes, plan_outline, plan_spec
from core.pipeline.planning.draft import Draft, takes_factors
from core.pipeline.planning.subject import Sight, Subject
from core.pipeline.progress import Progress
from core.plan.algebra import compose_plans
from core.plan.layers import random_layers
from core.plan.making import check_plan
from core.records import (
    RANDOM_CONTROL,
    Evidence,
    LayerInfo,
    ModelOutline,
    ReinitPlan,
    RuleChoice,
    Target,
)
from core.seeding import generator


def random_control(
    plan: ReinitPlan,
    *,
    seed: int,
    sight: Sight | None = None,
    name: str = RANDOM_CONTROL,
    progress: Progress | None = None,
) -> ReinitPlan:
    """Return a plan of the same size as another, on entries, units or layers drawn at random.

    Single weights: as many of each tensor. Units: as many of the same layers, with all that
    belongs to them. Layers: see `random_layers`. Each target keeps its scheme, numbers
    and seed of the values; frozen layers and learning rates stay. A plan that mixes these is
    matched part by part.

    Args:
        plan: What to match.
        seed: Seed of the draw.
        sight: Images, for plans whose values depend on them (DASH, and continual
            backpropagation's compensation).
        name: Name of the arm.
        progress: Progress and stop.

    Raises:
        LimberError: The plan does not fit, nothing is left to draw from, or stopped.
    """
    if not plan.targets:
        raise PlanError("The plan to be matched resets nothing. Give one that does.")
    draw = _Draw(plan, seed, sight or Sight(), progress or Progress())
    # Frozen layers and rates are the whole control's, and added last.
    parts = [
        part.model_copy(update={"freeze": (), "learning_rates": ()})
        for part in (*draw.layers(), *draw.entries())
    ]
    twin = parts[0]
    try:
        for part in parts[1:]:
            twin = compose_plans(twin, part)
    except PlanError as error:
        raise PlanError(
            "The parts of this plan are too close together for one random control. Make a control "
            "for each of the plans it was composed of."
        ) from error
    notes = dict.fromkeys(part.evidence.note for part in parts)
    words = {
        "name": name,
        "patterns": (),
        "freeze": plan.freeze,
        "learning_rates": plan.learning_rates,
        "rule": RuleChoice(name="random"),
        "evidence": Evidence(note=" ".join(notes)[:10_000]),
    }
    return resealed(twin.model_copy(update=words))


class _Draw:
    """One random control in the making."""

    def __init__(self, plan: ReinitPlan, seed: int, sight: Sight, progress: Progress) -> None:
        self.plan, self.seed, self.sight, self.progress = plan, seed, sight, progress
        self.outline = plan_outline(plan)
        _check_entries(plan, self.outline)

    @cached_property
    def subject(self) -> Subject:
        """The plan's network, loaded where the outline is not enough."""
        subject = Subject(
            plan_spec(self.plan),
            classes=plan_classes(self.plan),
            head_seed=self.plan.model.head_seed,
            sight=self.sight,
            progress=self.progress,
            asker="The random control of this plan",
        )
        check_plan(self.plan, subject.outline)
        return subject

    def layers(self) -> list[ReinitPlan]:
        """Return plans of whole layers for the whole layers of the plan."""
        whole = [target for target in self.plan.targets if target.granularity == "layer"]
        if not whole:
            return []
        drawn = random_layers(
            self.outline,
            self.plan.model_copy(update={"targets": tuple(whole)}),
            seed=self.seed,
            avoid=[target.layer for target in self.plan.targets],
            fits=_fits,
        )
        parts = []
        for targets in _alike(drawn.targets):
            part = drawn.model_copy(update={"targets": targets})
            if SCHEMES[targets[0].scheme.name].needs_data:
                draft = self._draft(targets)
                part = draft.sealed(draft.with_factors(part, picked=False))
            parts.append(part)
        return parts

    def entries(self) -> list[ReinitPlan]:
        """Return plans for the units and single weights of the plan."""
        parts = []
        taken: set[int] = set()
        for targets in _alike(self.plan.targets):
            granularity = targets[0].granularity
            if granularity == "layer":
                continue
            draft = self._draft(targets)
            places = (
                self._units(targets, draft, taken)
                if granularity == "unit"
                else self._weights(targets, draft)
            )
            if not places:
                raise PlanError("The plan to be matched selects nothing that could be drawn.")
            note = f"Random control of the same size, drawn with seed {self.seed}."
            words = {
                "targets": tuple(places),
                "companion": None,
                "evidence": Evidence(note=note),
            }
            parts.append(draft.sealed(self.plan.model_copy(update=words)))
        return parts

    def _draft(self, targets: Sequence[Target]) -> Draft:
        return Draft(self.subject, targets[0].scheme, targets[0].seed)

    def _units(self, targets: Sequence[Target], draft: Draft, taken: set[int]) -> list[Target]:
        """Draw as many units of the same layers; `taken` gains them."""
        wires = self.subject.connections
        picked: set[int] = set()
        for target in targets:
            of = wires.bundles.get(target.layer)
            if of is None:
                continue
            for unit in target.units:
                if unit >= len(of):
                    raise PlanError(
                        f'The plan names unit {unit} of "{target.layer}", which has units 0 to '
                        f"{len(of) - 1}. Make the plan again."
                    )
                picked.add(int(of[unit]))
        pools: dict[tuple[str, ...], list[int]] = {}
        for bundle, layers in sorted(self.subject.layers_by_bundle.items()):
            if wires.free(bundle) and bundle not in taken:
                pools.setdefault(layers, []).append(bundle)
        chosen: set[int] = set()
        for layers, pool in pools.items():
            wanted = len(picked & set(pool))
            noise = generator(self.seed, "random units", *layers)
            chosen |= {pool[place] for place in random_entries(wanted, len(pool), noise).tolist()}
        taken |= chosen
        if not chosen:
            return []
        shifts: Mapping[str, np.ndarray] = {}
        if any(entry.write == "add" for target in targets for entry in target.entries):
            shifts = self.subject.shifts(chosen).values
        return draft.units(chosen, shifts)

    def _weights(self, targets: Sequence[Target], draft: Draft) -> list[Target]:
        """Draw as many entries of each tensor."""
        found: list[Target] = []
        for target in targets:
            entries = []
            for entry in target.entries:
                old = self.subject.state[entry.tensor]
                whole = 1 if entry.axis is None else old.numel() // old.shape[entry.axis]
                noise = generator(self.seed, "random", entry.tensor, entry.write)
                chosen = random_entries(entry.count * whole, old.numel(), noise)
                entries.append(draft.entries(entry.tensor, chosen, entry.write))
            layer = self.outline.layer(target.layer)
            if layer is not None:
                found += draft.weights(layer, entries)
        return found


def _check_entries(plan: ReinitPlan, outline: ModelOutline) -> None:
    """Raise unless entries fit their tensors and are such as rules choose.

    Raises:
        PlanError: They are not: what a control of them would be is anyone's guess.
    """
    shapes = {p.name: p.shape for layer in outline.layers for p in layer.parameters}
    arrays = arrays_of(plan)
    for target in plan.targets:
        seen: set[str] = set()
        for entry in target.entries:
            if entry.tensor in shapes:
                chosen_entries(entry, shapes[entry.tensor], arrays)
            odd = {
                "layer": entry.write != "scale",
                "weight": entry.tensor in seen or entry.write in ("add", "scale"),
                "unit": entry.write == "scale",
            }[target.granularity]
            if odd:
                raise PlanError(
                    f'The plan selects entries of "{entry.tensor}" as no rule does, so '
                    "that there is no random control of it. Make the plan by a rule."
                )
            seen.add(entry.tensor)


def _fits(target: Target, layer: LayerInfo) -> bool:
    return not SCHEMES[target.scheme.name].needs_data or takes_factors(layer)


def _alike(targets: Iterable[Target]) -> list[tuple[Target, ...]]:
    """Return targets grouped by what they select and write."""
    groups: dict[tuple[str, str, int], list[Target]] = {}
    for target in targets:
        key = (target.granularity, target.scheme.model_dump_json(), target.seed)
        groups.setdefault(key, []).append(target)
    return [tuple(group) for group in groups.values()]
