"""Curves and a design -> differences with intervals, judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import numpy as np
from jaxtyping import Float

from core.records import (
    OUTCOMES,
    RANDOM_CONTROL,
    UNTOUCHED,
    ABComparison,
    ArmCurve,
    ArmDifference,
    Measure,
    TrialDesign,
)
from core.trial import telling
from core.trial.figures import (
    MEASURES,
    Finished,
    finished,
    image_noise,
    least_spread,
    losses,
    paired,
)
from core.trial.paired import CLAIM_SEEDS, chance_of_a_claim, jointly
from core.trial.telling import Judged, State, Weakness

# How sure one must be that an arm is above chance: one-sided 95 %.
ABOVE_CHANCE_Z = 1.645


def compare_curves(curves: Sequence[ArmCurve], design: TrialDesign | None = None) -> ABComparison:
    """Compare every arm with the untouched network, and plans with the random control.

    Only seeds in which every arm of the design got to its last step count. With all planned seeds,
    `CLAIM_SEEDS` at least, the primary outcome is judged, jointly over all comparisons; before, the
    figures are a screening and nothing is claimed.

    Args:
        curves: One a pair of arm and seed, steps in order. Arms that the design does not name
            change nothing.
        design: What was fixed before the run; None takes what the curves show and judges the
            final accuracy.

    Returns:
        Differences with simultaneous 95 % intervals, a sentence, and what to do next.
    """
    # Without a design nobody knows what was planned, nor whether the training was too weak.
    known = design is not None
    design = design or _assumed(curves)
    others = [arm for arm in design.arms if arm != UNTOUCHED]
    found = finished(curves, design.arms, design.seeds, design.steps)
    families = [(arm, UNTOUCHED) for arm in others]
    if RANDOM_CONTROL in others:
        families += [(arm, RANDOM_CONTROL) for arm in design.plans if arm != RANDOM_CONTROL]
    weak = _weaknesses(found, design) if found.seeds else ()
    unlearned = _unlearned(found, design, others) if found.seeds else {}
    rows = _differences(found, families, design, weak=bool(weak), unlearned=unlearned, known=known)
    noise = [
        image_noise(found, arm, design.val_images) for arm in others if design.val_images and rows
    ]
    state = _state(found, design, weak=bool(weak), known=known)
    judged = Judged(
        design=design,
        found=found,
        state=state,
        weak=weak,
        unlearned=unlearned,
        told=tuple(pair for pair in rows if pair[0].measure == OUTCOMES[design.outcome]),
        noise=tuple(each for each in noise if each is not None),
        going_on=_going_on(found, families, design) if state == "screening" else None,
    )
    begun = {curve.seed for curve in curves if curve.arm in design.arms} & set(design.seeds)
    return ABComparison(
        untouched=UNTOUCHED,
        differences=tuple(row for row, rival in rows if rival == UNTOUCHED),
        from_random=tuple(row for row, rival in rows if rival == RANDOM_CONTROL),
        sentence=telling.sentence(judged),
        caveats=telling.caveats(judged, begun=len(begun)),
        outcome=design.outcome,
        margin=design.margin,
        state=state,
        planned=judged.planned,
        weak=tuple(each.sentence for each in weak),
        what_next=telling.what_next(judged),
        going_on=judged.going_on,
        image_noise=judged.noise,
    )


def _going_on(
    found: Finished, families: Sequence[tuple[str, str]], design: TrialDesign
) -> float | None:
    """Return the chance of a claim at half the seeds, where a trial may stop as futile."""
    planned = len(set(design.seeds))
    if not planned >= CLAIM_SEEDS or len(found.seeds) != planned // 2 or not families:
        return None
    measure = OUTCOMES[design.outcome]
    figures = np.stack([paired(found, arm, rival, measure)[0] for arm, rival in families])
    floor = _floor(found, families, measure, design)
    return chance_of_a_claim(figures, planned, floor)


def _floor(
    found: Finished, families: Sequence[tuple[str, str]], measure: Measure, design: TrialDesign
) -> Float[np.ndarray, " row"]:
    """Return the least standard deviation of each comparison."""
    return np.array(
        [least_spread(found, arm, rival, measure, design.val_images) for arm, rival in families]
    )


def _assumed(curves: Sequence[ArmCurve]) -> TrialDesign:
    """Return the design that curves without one show."""
    arms = tuple(dict.fromkeys((UNTOUCHED, *(curve.arm for curve in curves))))
    last = [step.step for curve in curves for step in curve.steps if step.val_accuracy is not None]
    return TrialDesign(
        arms=arms,
        plans=tuple(arm for arm in arms if arm not in (UNTOUCHED, RANDOM_CONTROL)),
        seeds=tuple(dict.fromkeys(curve.seed for curve in curves)),
        steps=max([1, *last]),
    )


def _differences(
    found: Finished,
    families: Sequence[tuple[str, str]],
    design: TrialDesign,
    *,
    weak: bool,
    unlearned: Mapping[str, str],
    known: bool,
) -> list[tuple[ArmDifference, str]]:
    """Return each comparison's row of each measure, with its rival."""
    if not found.seeds or not families:
        return []
    rows = []
    for measure in MEASURES:
        pairs = [paired(found, arm, rival, measure) for arm, rival in families]
        figures = np.stack([values for values, _ in pairs])
        floor = _floor(found, families, measure, design)
        joint = jointly(figures, floor)
        back: Callable[[float], float] = math.exp if measure == "steps_to_target" else float
        primary = measure == OUTCOMES[design.outcome]
        for i, (arm, rival) in enumerate(families):
            bounds = None if math.isnan(joint.low[i]) else (joint.low[i], joint.high[i])
            silent = not primary or weak or arm in unlearned or rival in unlearned
            row = ArmDifference(
                arm=arm,
                measure=measure,
                seeds=len(found.seeds),
                mean=back(joint.mean[i]),
                low=None if bounds is None else _bounded(back, bounds[0]),
                high=None if bounds is None else _bounded(back, bounds[1]),
                verdict=None
                if silent
                else _verdict(bounds, found, design, unreached=pairs[i][1], known=known),
                p=None if bounds is None else float(joint.p[i]),
                unreached=pairs[i][1],
            )
            rows.append((row, rival))
    return rows


def _bounded(back: Callable[[float], float], value: float) -> float:
    try:
        return back(value)
    except OverflowError:
        return math.inf


def _verdict(
    bounds: tuple[float, float] | None,
    found: Finished,
    design: TrialDesign,
    *,
    unreached: tuple[int, int],
    known: bool,
) -> str:
    """Return one of the five outcomes; the bounds are on the scale that is added."""
    planned = len(set(design.seeds))
    if not known or bounds is None or len(found.seeds) < planned or planned < CLAIM_SEEDS:
        return "screening"
    low, high = bounds
    margin = math.log1p(design.margin) if design.outcome == "steps" else design.margin
    arm, rival = unreached if design.outcome == "steps" else (0, 0)
    # The last step stands in where a target was not reached. That draws towards no difference, so
    # it must not make arms equivalent, and it may only understate a claim.
    if -margin < low and high < margin and not arm and not rival:
        return "equivalent"
    if low > 0 and not arm:
        return "better"
    return "worse" if high < 0 and not rival else "inconclusive"


def _state(found: Finished, design: TrialDesign, *, weak: bool, known: bool) -> State:
    if len(found.seeds) < 2:
        return "too early"
    if weak:
        return "weak"
    planned = len(set(design.seeds))
    return "claim" if known and len(found.seeds) == planned >= CLAIM_SEEDS else "screening"


# What makes a trial too weak for a verdict


def _weaknesses(found: Finished, design: TrialDesign) -> tuple[Weakness, ...]:
    """Return why no arm may be judged: the untouched network is not trained well enough."""
    rows = []
    reached = mean(found.finals(UNTOUCHED))
    if design.chance is not None and reached <= _chance_limit(design):
        rows.append(Weakness.near_chance(reached, design.chance))
    elif design.probe is not None and reached < design.probe - design.probe_slack:
        rows.append(Weakness.below_probe(reached, design.probe))
    rising = sum(_rises(found.curves[UNTOUCHED, seed]) for seed in found.seeds)
    if 2 * rising > len(found.seeds):
        rows.append(Weakness.rising_loss())
    if design.sweep is not None and design.sweep.at_edge:
        rows.append(Weakness.rate_at_edge(design.sweep))
    return tuple(rows)


def _unlearned(found: Finished, design: TrialDesign, arms: Sequence[str]) -> dict[str, str]:
    """Return the arms that have learned nothing that could be judged, and why."""
    said = {}
    for arm in arms:
        reached = mean(found.finals(arm))
        if design.chance is not None and reached <= _chance_limit(design):
            said[arm] = f"still near chance ({telling.percent(reached)})"
        elif 2 * sum(_rises(found.curves[arm, seed]) for seed in found.seeds) > len(found.seeds):
            said[arm] = "its training loss rises"
    return said


def _chance_limit(design: TrialDesign) -> float:
    chance = design.chance or 0.0
    images = design.val_images or 1
    return chance + ABOVE_CHANCE_Z * math.sqrt(chance * (1 - chance) / images)


def _rises(curve: ArmCurve) -> bool:
    """Whether the loss of the last quarter lies above that of the first."""
    values = losses(curve)
    quarter = len(values) // 4
    return quarter > 0 and mean(values[-quarter:]) > mean(values[:quarter])
