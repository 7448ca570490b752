"""A rule -> the layers, units or single weights it chooses on a subject, as a resolved plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from core.catalogue.rules import rule_named, rule_options
from core.catalogue.schemes import SCHEMES
from core.errors import PlanError, Remedy
from core.measure.utility import (
    entries_below_mean,
    fraction_lowest,
    lowest_entries,
    random_entries,
    share,
)
from core.pipeline.planning.draft import Draft
from core.pipeline.planning.subject import Sight, Subject
from core.pipeline.progress import Progress
from core.plan.making import checked_rates, last_blocks, make_plan, model_identity, refuse_untrained
from core.records import (
    Evidence,
    LayerInfo,
    ModelSpec,
    Pattern,
    ReinitPlan,
    RuleChoice,
    SchemeChoice,
    Target,
    Write,
    ratio_of,
)
from core.records.outline import is_bias
from core.seeding import generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person wants of a plan beside its rule; see `make_plan` for the words.

    Attributes:
        layers: Layers the rule may choose from; None for all.
        units: Layer to units, for the rule "by-hand".
        head: Whether rules over single weights take a new head as well.
    """

    scheme: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    name: str = "plan"
    layers: tuple[str, ...] | None = None
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    patterns: tuple[Pattern, ...] = ()
    freeze: tuple[str, ...] = ()
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    head: bool = True


def plan_by_rule(
    spec: ModelSpec,
    rule: str,
    options: Mapping[str, float | str | None] | None = None,
    *,
    classes: int | None = None,
    sight: Sight | None = None,
    wish: Wish | None = None,
    progress: Progress | None = None,
) -> ReinitPlan:
    """Return the plan that a rule makes on a network.

    Args:
        spec: The model.
        rule: A name of `list_rules`.
        options: Its numbers and words, such as percent or threshold; None keeps the default.
        classes: Size of the new head; None keeps the head that came with the weights, unless
            images say otherwise.
        sight: What the rule may look at.
        wish: Scheme, seed, name, and so on.
        progress: Progress and stop.

    Raises:
        LimberError: Bad input, nothing is selected, or stopped.
    """
    resolver = _Resolver(
        spec, classes, sight or Sight(), wish or Wish(), progress or Progress(), rule, options or {}
    )
    return resolver.plan()


class _Resolver:
    """One rule on one network."""

    def __init__(
        self,
        spec: ModelSpec,
        classes: int | None,
        sight: Sight,
        wish: Wish,
        progress: Progress,
        rule: str,
        options: Mapping[str, float | str | None],
    ) -> None:
        self.rule = rule_named(rule)
        self.options = rule_options(self.rule, options)
        self.sight, self.wish, self.progress = sight, wish, progress
        scheme = wish.scheme or self.rule.scheme
        draws = scheme in SCHEMES and SCHEMES[scheme].needs_data
        self.subject = Subject(
            spec,
            classes=classes,
            sight=sight,
            progress=progress,
            asker=f'The scheme "{scheme}"' if draws else f'The rule "{rule}"',
        )
        self.outline = self.subject.outline
        choice = SchemeChoice(name=scheme, parameters=dict(wish.numbers))
        self.draft = Draft(self.subject, choice, wish.seed)
        self.scheme = SCHEMES[scheme]
        self.notes = self.draft.notes

    def scope(self, *, head: bool) -> list[LayerInfo]:
        """Return the layers a rule may choose from.

        Args:
            head: Whether a new head is among them.

        Raises:
            PlanError: There are none.
        """
        wanted = None if self.wish.layers is None else set(self.wish.layers)
        named = [layer for layer in self.outline.layers if wanted is None or layer.name in wanted]
        layers = [
            layer
            for layer in named
            if layer.executed and (head or not layer.head or self.outline.own_head)
        ]
        still = [layer.name for layer in layers if layer.name in self._untrained]
        if still:
            # What a rule chose there would stay random; by hand that is refused.
            more = f" and {len(still) - 3} more" if len(still) > 3 else ""
            note = f"Left out {', '.join(still[:3])}{more}: frozen, or at a learning rate of 0."
            self.notes += [] if note in self.notes else [note]
            layers = [layer for layer in layers if layer.name not in still]
        if not layers:
            first = named[0]
            why = "no forward pass reaches it" if not first.executed else "it is new already"
            why = "it does not train" if first.name in still else why
            raise PlanError(
                f'There is no layer to choose from: "{first.name}" was named, and {why}. Name '
                "others."
            )
        return layers

    @cached_property
    def _untrained(self) -> frozenset[str]:
        """The layers that shall not train."""
        rates = self.wish.learning_rates.items()
        return frozenset((*self.wish.freeze, *(layer for layer, factor in rates if factor == 0)))

    def _with_training_readers(self, bundles: set[int]) -> set[int]:
        """Return the bundles all of whose parameters train: a frozen reader never hears again."""
        if not self._untrained:
            return bundles
        layers = [layer for layer in self.outline.layers if layer.name in self._untrained]
        frozen = {parameter.name for layer in layers for parameter in layer.parameters}
        kept = bundles - self.subject.connections.touching(frozen)
        if len(kept) < len(bundles):
            self.notes.append(
                f"Left out {len(bundles) - len(kept)}: frozen layers make or read them."
            )
        return kept

    # The rules.

    def plan(self) -> ReinitPlan:
        """Return the plan."""
        plan = CHOOSERS[self.rule.name](self)
        if self.scheme.needs_data:
            plan = self.draft.with_factors(plan, picked=self.rule.name == "by-hand")
        if self._writes_itself(plan):
            self.notes.append(
                "Without weights to load the network is its own fresh twin of seed "
                f"{plan.model.head_seed}: this plan changes nothing. Give another seed."
            )
        rule = RuleChoice(
            name=self.rule.name,
            parameters={k: v for k, v in self.options.items() if v is not None and v != ""},
        )
        return self.draft.sealed(
            plan.model_copy(update={"rule": rule, "evidence": self._evidence(plan.evidence.note)})
        )

    def _writes_itself(self, plan: ReinitPlan) -> bool:
        return plan.model.weights == "none" and all(
            target.granularity == "layer"
            and target.scheme.name == "architecture"
            and target.seed == plan.model.head_seed
            for target in plan.targets
        )

    def _evidence(self, note: str) -> Evidence:
        path = self.sight.diagnosis
        notes = [*([note] if note else []), *self.notes]
        return Evidence(
            diagnosis_sha256=None
            if path is None
            else hashlib.sha256(path.read_bytes()).hexdigest(),
            data_fingerprint=self.subject.fingerprint,
            note=" ".join(notes)[:10_000],
        )

    def _layers_plan(self, layers: Sequence[str]) -> ReinitPlan:
        wish = self.wish
        return make_plan(
            self.outline,
            layers,
            scheme=self.scheme.name,
            scheme_parameters=self.draft.scheme.parameters,
            seed=wish.seed,
            name=wish.name,
            patterns=wish.patterns,
            freeze=wish.freeze,
            learning_rates=wish.learning_rates,
            resets_buffers=self.scheme.resets_buffers,
        )

    def _by_hand(self) -> ReinitPlan:
        if not self.wish.units:
            return self._layers_plan(self.wish.layers or ())
        if self.wish.layers:
            raise PlanError("Whole layers and single units were named.", Remedy.LAYERS_OR_UNITS)
        bundles: set[int] = set()
        for layer, units in self.wish.units.items():
            if self.outline.layer(layer) is None:
                raise PlanError(f'{self.outline.title} has no layer "{layer}".')
            wires = self.subject.connections
            of = wires.units_of(layer)
            for unit in units:
                if not 0 <= unit < len(of):
                    raise PlanError(
                        f'"{layer}" has units 0 to {len(of) - 1}, and {unit} was asked for.'
                    )
                bundle = int(of[unit])
                if not wires.free(bundle):
                    raise PlanError(
                        f'Unit {unit} of "{layer}" cannot be reset: '
                        f"{wires.reasons[bundle]}. Reset the whole layer or single weights."
                    )
                bundles.add(bundle)
        return self._units_plan(bundles)

    def _last_blocks(self) -> ReinitPlan:
        count = float(self.options["blocks"] or 0)
        if count != int(count):
            raise PlanError(
                f'The "blocks" of the rule "{self.rule.name}" must be a whole number; it is '
                f"{count:g}.",
                Remedy.OTHER_OPTION,
                option="blocks",
            )
        names = last_blocks(self.outline, int(count))
        wanted = {layer.name for layer in self.scope(head=True)}
        chosen = [name for name in names if name in wanted]
        if not chosen:
            raise PlanError(
                f"None of the layers named is in the last {count:g} blocks, which begin with "
                f'"{names[0]}". Take more blocks, or name other layers.'
            )
        return self._layers_plan(chosen)

    def _threshold(self) -> ReinitPlan:
        diagnosis = self.subject.measured()
        metric, side, of = (str(self.options[key]) for key in ("metric", "side", "of"))
        limit = float(self.options["threshold"] or 0)

        def beyond(values: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore"):
                flags: np.ndarray = values > limit if side == "above" else values < limit
            return flags

        scope = {layer.name for layer in self.scope(head=False)}
        reports = [report for report in diagnosis.layers if report.name in scope]
        if any(metric in report.metrics for report in reports):
            chosen, noise, zero = [], 0, 0
            for report in reports:
                own, ratio = report.metrics[metric].value, report.ratio(metric)
                if of == "ratio":
                    own = ratio.value
                    # Where both are 0 the layer is as fresh as its twin: nothing to choose.
                    zero += ratio.kind == "twin-zero"
                if own is None or not beyond(np.array(own)):
                    continue
                if of == "ratio" and ratio.kind == "noise":
                    noise += 1
                else:
                    chosen.append(report.name)
            if zero:
                self.notes.append(
                    f"Left out {zero} without a ratio: the fresh twin's {metric} is 0 there."
                )
            if noise:
                self.notes.append(
                    f"Left out {noise} whose ratio's 95 % interval contains 1: so few images "
                    "cannot tell them from a fresh network."
                )
            if not chosen:
                raise PlanError(
                    f"No layer has a {metric} ({of}) {side} {limit:g}."
                    f"{''.join(f' {note}' for note in self.notes)} Choose another limit."
                )
            return self._layers_plan(chosen)
        if not any(metric in arrays for arrays in self.subject.units_by_layer.values()):
            raise PlanError(f'The diagnosis has no figure "{metric}".', Remedy.LIST_METRICS)
        flags: dict[str, np.ndarray] = {}
        zeros = 0
        for layer, arrays in self.subject.units_by_layer.items():
            if layer in scope and metric in arrays and layer in self.subject.connections.bundles:
                own_units, twin_units = (np.asarray(array, dtype=float) for array in arrays[metric])
                if of == "ratio":
                    pairs = zip(own_units.tolist(), twin_units.tolist(), strict=True)
                    ratios = [ratio_of(value, twin) for value, twin in pairs]
                    zeros += sum(each.kind == "twin-zero" for each in ratios)
                    own_units = np.array([each.value for each in ratios], dtype=float)
                flags[layer] = beyond(own_units)
        if zeros:
            self.notes.append(
                f"Left out {zeros} units without a ratio: the fresh twin's {metric} is 0 there."
            )
        bundles = self._with_training_readers(self._bundles_of(flags))
        return self._units_plan(bundles, f"a {metric} ({of}) {side} {limit:g}")

    def _bundles_of(self, flags: Mapping[str, np.ndarray]) -> set[int]:
        """Return the bundles all of whose judged units are flagged; heads count as units."""
        good: set[int] = set()
        bad: set[int] = set()
        for layer, flagged in flags.items():
            of = self.subject.connections.bundles[layer]
            if len(flagged) != len(of):
                # Figures of heads: the bundles of the layer in the order of their first units.
                of = of[np.sort(np.unique(of, return_index=True)[1])]
            if len(flagged) == len(of):
                good |= set(of[flagged].tolist())
                bad |= set(of[~flagged].tolist())
        return good - bad

    def _seed_paper(self) -> ReinitPlan:
        percent = float(self.options["percent"] or 0)
        gradients = self._gradients() if self.rule.name == "weight-gradient" else {}
        targets = []
        for layer in self.scope(head=self.wish.head):
            entries = []
            for name in self._own_names(layer):
                old = self.subject.state[name]
                utility = old.abs() if not gradients else (old * gradients[name]).abs()
                bias = is_bias(name) and old.ndim == 1
                write: Write = "scheme"
                if self.scheme.name == "bias-mean":
                    wanted = bias
                else:
                    wanted, write = old.ndim > 1 or bias, "zero" if bias else "scheme"
                if wanted:
                    entries.append(
                        self.draft.entries(name, lowest_entries(utility, percent), write)
                    )
            targets += self.draft.weights(layer, entries)
        return self._targets_plan(targets, f"{percent:g} % of any tensor is less than one entry")

    def _own_names(self, layer: LayerInfo) -> list[str]:
        """Return the parameters of a layer that a rule chooses from.

        Of shared ones those that no earlier layer has, and none whose gradient, if the rule looks
        at it, is 0 but for rounding.
        """
        seen = {
            names[0]: name
            for earlier in self.outline.layers[: layer.index]
            for names in earlier.tied
            for name in names
        }
        firsts = {name: names[0] for names in layer.tied for name in names}
        return [
            parameter.name
            for parameter in layer.parameters
            if firsts.get(parameter.name, parameter.name) not in seen
            and parameter.name not in self.subject.rounding
        ]

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradients, with a note on those that are 0 but for rounding."""
        gradients = self.subject.gradients()
        names = sorted(self.subject.rounding)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.notes.append(
                f"Left out {', '.join(names[:3])}{more}: their gradient is 0 but for rounding, "
                "because a norm behind them takes out what they add."
            )
        return gradients

    def _swr(self) -> ReinitPlan:
        utility_name, threshold = str(self.options["utility"]), self.options["threshold"]
        gradients = self._gradients() if utility_name == "gradient" else {}
        targets = []
        for layer in self.scope(head=False):
            entries = []
            for name in self._own_names(layer):
                old = self.subject.state[name]
                if utility_name == "random":
                    noise = generator(self.wish.seed, "swr", name)
                    utility = torch.rand(old.shape, generator=noise)
                elif utility_name == "magnitude":
                    utility = old.abs()
                else:
                    utility = (old * gradients[name]).abs()
                if threshold == "":
                    places = lowest_entries(utility, float(self.options["percent"] or 0))
                else:
                    places = entries_below_mean(utility, float(threshold or 0))
                entries.append(self.draft.entries(name, places, "scheme"))
            targets += self.draft.weights(layer, entries)
        return self._targets_plan(targets, "no weight is that useless")

    def _dormant(self) -> ReinitPlan:
        self.subject.measured()
        tau = float(self.options["threshold"] or 0)
        by_unit: dict[str, np.ndarray] = {}
        for layer, arrays in self.subject.units_by_layer.items():
            if self.rule.name == "redo" and "unit_dormant_score" in arrays:
                by_unit[layer] = arrays["unit_dormant_score"][0].astype(float)
            elif self.rule.name == "grama" and "unit_grad_mean_abs" in arrays:
                own = arrays["unit_grad_mean_abs"][0].astype(float)
                # A layer that no gradient reaches at all is dormant throughout.
                by_unit[layer] = np.divide(own, own.mean(), where=own > 0, out=np.zeros_like(own))
        scores = self.subject.connections.scores(by_unit)
        with np.errstate(invalid="ignore"):
            chosen = self._within_scope(np.flatnonzero(scores <= tau).tolist())
        return self._units_plan(chosen, f"a score of at most {tau:g} wherever it is read")

    def _within_scope(self, bundles: Sequence[int]) -> set[int]:
        """Return the bundles that lie in the layers to choose from and can be reset."""
        scope = {layer.name for layer in self.scope(head=False)}
        units: set[int] = set()
        left: dict[str, int] = {}
        inside: set[int] = set()
        for layer, of in self.subject.connections.bundles.items():
            if layer in scope:
                inside |= set(of.tolist())
        for bundle in bundles:
            if bundle not in inside:
                continue
            if self.subject.connections.free(bundle):
                units.add(bundle)
            else:
                why = self.subject.connections.reasons[bundle]
                left[why] = left.get(why, 0) + 1
        for why, count in left.items():
            self.notes.append(f"Left out {count}: {why}.")
        return self._with_training_readers(units)

    def _least_units(self) -> ReinitPlan:
        percent = float(self.options["percent"] or 0)
        wires = self.subject.connections
        if self.rule.name == "gxd":
            figures = self.subject.unit_figures()
            scores = wires.scores(
                {name: figure.replacement_cost for name, figure in figures.items()}
            )
        else:
            scores = self.subject.contributions()
        pools: dict[tuple[str, ...], dict[int, float]] = {}
        for bundle, layers in self.subject.layers_by_bundle.items():
            if np.isfinite(scores[bundle]) and wires.free(bundle):
                pools.setdefault(layers, {})[bundle] = float(scores[bundle])
        lowest = [unit for pool in pools.values() for unit in fraction_lowest(pool, percent)]
        chosen = self._within_scope(sorted(lowest))
        shifts: Mapping[str, np.ndarray] = {}
        # A removed unit's mean goes where it was read; GXD has no such step.
        if self.rule.name == "cbp" and chosen:
            found = self.subject.shifts(chosen)
            shifts = found.values
            if found.untaken:
                self.notes.append(_without_mean(found.untaken))
        return self._units_plan(chosen, f"{percent:g} % of a layer's units is not one", shifts)

    def _random(self) -> ReinitPlan:
        targets = []
        for layer in self.scope(head=False):
            entries = []
            for name in self._own_names(layer):
                old = self.subject.state[name]
                if old.ndim < 2:
                    continue
                count = share(float(self.options["percent"] or 0), old.numel())
                noise = generator(self.wish.seed, "random", name)
                places = random_entries(count, old.numel(), noise)
                entries.append(self.draft.entries(name, places, "scheme"))
            targets += self.draft.weights(layer, entries)
        return self._targets_plan(targets, "the percentage is less than one entry")

    # From selections to plans.

    def _units_plan(
        self,
        bundles: set[int],
        asked: str = "nothing was chosen",
        shifts: Mapping[str, np.ndarray] | None = None,
    ) -> ReinitPlan:
        if not bundles:
            left = f" {' '.join(self.notes)}" if self.notes else ""
            raise PlanError(f"There is no unit to reset ({asked}).{left} Choose another limit.")
        return self._targets_plan(self.draft.units(bundles, shifts), asked)

    def _targets_plan(self, targets: Sequence[Target], otherwise: str) -> ReinitPlan:
        if not targets:
            raise PlanError(f"There is nothing to reset: {otherwise}.")
        granularity, allowed = targets[0].granularity, self.scheme.granularities
        if granularity not in allowed:
            raise PlanError(
                f'The rule "{self.rule.name}" selects single {granularity}s, and the scheme '
                f'"{self.scheme.name}" is for whole {" and ".join(allowed)}s. Choose another '
                "scheme."
            )
        known = {layer.name for layer in self.outline.layers}
        for layer in self.wish.freeze:
            if layer not in known:
                raise PlanError(f'{self.outline.title} has no layer "{layer}".')
        plan = ReinitPlan(
            name=self.wish.name,
            model=model_identity(self.outline),
            patterns=self.wish.patterns,
            targets=tuple(targets),
            freeze=tuple(n for n in (e.name for e in self.outline.layers) if n in self.wish.freeze),
            learning_rates=checked_rates(self.outline, self.wish.learning_rates),
        )
        refuse_untrained(plan)
        return plan


# How each rule of the catalogue chooses.
CHOOSERS: Mapping[str, Callable[[_Resolver], ReinitPlan]] = {
    "by-hand": _Resolver._by_hand,
    "last-blocks": _Resolver._last_blocks,
    "threshold": _Resolver._threshold,
    "weight-magnitude": _Resolver._seed_paper,
    "weight-gradient": _Resolver._seed_paper,
    "swr": _Resolver._swr,
    "redo": _Resolver._dormant,
    "grama": _Resolver._dormant,
    "cbp": _Resolver._least_units,
    "gxd": _Resolver._least_units,
    "random": _Resolver._random,
}


def _without_mean(weights: Sequence[str]) -> str:
    """Say of which readers the mean changes, by the names of their weights."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in weights))
    several = len(layers) > 1
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return (
        f"The mean output of {', '.join(layers[:3])}{more} changes: "
        f"{'these layers have' if several else 'this layer has'} neither a bias nor a batch norm "
        "right behind that could take over the mean of the removed units."
    )
