"""What a trial found, in words: the sentence, what it must not hide, what to do next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from core.catalogue.trials import RIVALS
from core.records import (
    OUTCOMES,
    RANDOM_CONTROL,
    UNTOUCHED,
    ArmDifference,
    ImageNoise,
    Outcome,
    RateSweep,
    TrialDesign,
)
from core.trial.figures import Finished, paired
from core.trial.paired import ALPHA, CLAIM_SEEDS, FUTILE

# Before a verdict may rest on a set of images, it says what that set cannot see.
FEW_IMAGES = 1000
# A trial that has a difference should find it four times in five.
POWER = 0.8
MOST_SEEDS = 64
# So many comparisons are told one by one.
FEW_COMPARISONS = 3

OUTCOME_WORDS: Mapping[Outcome, str] = {
    "final": "final accuracy",
    "auc": "accuracy over the run",
    "steps": "speed",
}

State = Literal["too early", "screening", "claim", "weak"]


@dataclass(frozen=True, slots=True)
class Weakness:
    """Why there is no verdict, and what to do about it."""

    sentence: str
    remedy: str

    @classmethod
    def near_chance(cls, reached: float, chance: float) -> Weakness:
        """The untouched network has hardly learned."""
        return cls(
            f"The untouched network is near chance ({percent(reached)}, where always naming the "
            f"largest class gives {percent(chance)}).",
            "Train for more steps, on more images, or at a higher rate; then compare.",
        )

    @classmethod
    def below_probe(cls, reached: float, probe: float) -> Weakness:
        """Training all of the network does worse than training a head."""
        return cls(
            f"The untouched network ends at {percent(reached)}, below its own linear probe "
            f"({percent(probe)}): this training makes less of it than a head alone would.",
            "Train for more steps or at another rate, until the untouched network passes its "
            "probe.",
        )

    @classmethod
    def rising_loss(cls) -> Weakness:
        """The untouched network's training diverges."""
        return cls("The untouched network's training loss rises.", "Lower the learning rate.")

    @classmethod
    def rate_at_edge(cls, sweep: RateSweep) -> Weakness:
        """A better rate may not have been tried."""
        edge = "lowest" if sweep.best == sweep.rates[0] else "highest"
        return cls(
            f"The best learning rate of the sweep, {sweep.best:g}, is its {edge}: a better one may "
            "lie beyond.",
            "Widen the sweep beyond its edge, or give the rate yourself.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What is known of a trial when it is put into words.

    Attributes:
        design: What was fixed before.
        found: What is finished.
        state: How far it may speak.
        weak: Why no arm is judged.
        unlearned: Arms that have learned nothing to judge, and why.
        told: Rows of the primary outcome with their rivals.
        noise: What the images can tell apart.
        going_on: Share of ways to go on that end in a claim; None where nobody asks.
    """

    design: TrialDesign
    found: Finished
    state: State
    weak: tuple[Weakness, ...]
    unlearned: Mapping[str, str]
    told: tuple[tuple[ArmDifference, str], ...]
    noise: tuple[ImageNoise, ...]
    going_on: float | None

    @property
    def planned(self) -> int:
        """Seeds that are planned."""
        return len(set(self.design.seeds))

    @property
    def seeds(self) -> int:
        """Seeds that are finished in all arms."""
        return len(self.found.seeds)


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.1f} %"


def sentence(judged: Judged) -> str:
    """Return what may be said, in one sentence."""
    seeds, planned = judged.seeds, judged.planned
    if len(judged.design.arms) < 2:
        return "There is only the untouched network: nothing to compare."
    if judged.state == "too early":
        if planned > 1:
            return f"No number before two seeds are done ({seeds} of {planned})."
        return (
            "One seed gives no number: its luck is larger than most effects. Take three for a "
            f"first look, {CLAIM_SEEDS} for a verdict."
        )
    if judged.state == "weak":
        reasons = " ".join(each.sentence for each in judged.weak)
        return f"No verdict, the trial is too weak. {reasons}"
    parts = _parts(judged)
    if judged.state == "screening":
        of = "" if seeds == planned else f" of {planned}"
        return f"Screening with {seeds}{of} seeds, nothing is claimed: {parts}."
    return f"With {seeds} paired seeds: {parts}."


def _parts(judged: Judged) -> str:
    """Return the comparisons in words: all where they are few, else the claims and a count."""
    told = judged.told
    if len(told) <= FEW_COMPARISONS:
        return "; ".join(_row(row, rival, judged) for row, rival in told)
    parts = [_row(row, rival, judged) for row, rival in told if row.verdict in ("better", "worse")]
    rest = Counter(
        row.verdict or "no verdict" for row, _ in told if row.verdict not in ("better", "worse")
    )
    if rest["screening"]:
        # The plans are what people ask about; the rest stands in the picture.
        plans = [p for p in told if p[0].arm in judged.design.plans and p[1] == UNTOUCHED]
        shown = [p for p in plans or told if p[0].verdict][:FEW_COMPARISONS]
        parts += [_row(*pair, judged) for pair in shown]
        more = rest.pop("screening") - len(shown)
        if more > 0:
            parts.append(f"{more} more comparison{' is' if more == 1 else 's are'} estimated")
    others = "other comparison" if parts else "comparison"
    words = {"equivalent": f"equivalent within {inside(judged.design)}"}
    for verdict, count in rest.items():
        some = f"{count} {others}{' is' if count == 1 else 's are'}"
        none = f"{count} {others}{' has' if count == 1 else 's have'}"
        what = words.get(verdict, verdict)
        parts.append(f"{none} {what}" if verdict == "no verdict" else f"{some} {what}")
    return "; ".join(parts)


def _row(row: ArmDifference, rival: str, judged: Judged) -> str:
    other = _named(rival)
    for arm in (row.arm, rival):
        if arm in judged.unlearned:
            who = "it" if arm == row.arm else other
            return f'"{row.arm}" against {other}: no verdict, {who} is {judged.unlearned[arm]}'
    outcome = judged.design.outcome
    figure = f"{amount(row, outcome)}{_interval(row, outcome)}"
    if row.verdict == "equivalent":
        return f'"{row.arm}" and {other} are equivalent within {inside(judged.design)}: {figure}'
    if row.verdict in ("better", "worse"):
        return f'"{row.arm}" is {row.verdict} than {other}: {figure}'
    word = "inconclusive, " if row.verdict == "inconclusive" else ""
    return f'"{row.arm}" against {other}: {word}{figure}'


def _named(rival: str) -> str:
    return "the untouched network" if rival == UNTOUCHED else "the random control"


def inside(design: TrialDesign) -> str:
    """Return the margin in words."""
    if design.outcome == "steps":
        return f"{100 * design.margin:g} %"
    return _points(f"{100 * design.margin:g}")


def amount(row: ArmDifference, outcome: Outcome) -> str:
    """Return a difference of the primary outcome in words, in its unit."""
    if outcome != "steps":
        return f"{_points(f'{100 * row.mean:+.1f}')} of {OUTCOME_WORDS[outcome]}"
    return f"{bound_words(row)}{row.mean:.2f} times the speed to the target"


def bound_words(row: ArmDifference) -> str:
    """Return "at least " or "at most " where a target that was not reached makes it a bound."""
    arm, rival = row.unreached
    # Where both are missing somewhere, the ratio is a bound on neither side.
    return "at least " if rival > arm == 0 else "at most " if arm > rival == 0 else ""


def _points(number: str) -> str:
    return f"{number} point{'' if number in ('1', '+1.0', '-1.0') else 's'}"


def _interval(row: ArmDifference, outcome: Outcome) -> str:
    if row.low is None or row.high is None:
        return ""
    if outcome == "steps":
        return f" (95 % interval {row.low:.2f} to {row.high:.2f})"
    return f" (95 % interval {100 * row.low:+.1f} to {100 * row.high:+.1f})"


def caveats(judged: Judged, *, begun: int) -> tuple[str, ...]:
    """Return what the sentence must not hide.

    Args:
        judged: The trial.
        begun: Seeds of the design that have begun.
    """
    rows: list[str] = []
    design, told = judged.design, judged.told
    behind = begun - judged.seeds
    if behind and judged.seeds:
        some = "1 seed is" if behind == 1 else f"{behind} seeds are"
        do = "does" if behind == 1 else "do"
        rows.append(f"{some} not finished in all arms and {do} not count.")
    if len(told) > 1 and told[0][0].low is not None:
        rows.append(
            f"The intervals hold for all {len(told)} comparisons at once: in 95 % of trials none "
            "of them misses."
        )
    if told and design.val_images is not None and design.val_images < FEW_IMAGES:
        rows.append(_few_images(design.val_images, judged.noise))
    if design.outcome == "steps":
        rows += [
            f'The target was not reached by "{row.arm}" in {row.unreached[0]} and by '
            f"{_named(rival)} in {row.unreached[1]} of {row.seeds} seeds; the last step stands in."
            for row, rival in told
            if any(row.unreached)
        ]
    if told and design.sweep is None:
        rows.append(
            "One learning rate was tried. Where it is too low for the untouched network, any "
            "reset can look like a gain: try a sweep of rates."
        )
    return tuple(rows)


def _few_images(images: int, noise: Sequence[ImageNoise]) -> str:
    if not noise:
        return (
            f"With {images} validation images one image is {_points(f'{100 / images:.1g}')}: "
            "small differences cannot be seen."
        )
    widest = max(noise, key=lambda each: each.resolvable)
    return (
        f"With {images} validation images a difference below {100 * widest.resolvable:.1f} points "
        f"may be luck of these images (answers differ on {percent(widest.discordant)} of them)."
    )


def what_next(judged: Judged) -> str:
    """Return what to do about it; empty where there is only to wait."""
    planned = judged.planned
    if len(judged.design.arms) < 2:
        return "Add a plan or a rival."
    if judged.state == "weak":
        return judged.weak[0].remedy
    if judged.state == "too early":
        return "" if planned > 1 else f"Take {CLAIM_SEEDS} seeds."
    if judged.going_on is not None and judged.going_on < FUTILE:
        return (
            f"Stopping here loses little: of the ways in which the other {planned - judged.seeds} "
            f"seeds could follow, {100 * judged.going_on:.0f} % end in a claim. Try a smaller "
            "plan, another rule or another rate."
        )
    if not [row for row, _ in judged.told if row.verdict]:
        return "Train for more steps, or at another rate."
    if judged.state == "screening":
        if judged.seeds < planned:
            missing = planned - judged.seeds
            some = "1 more seed" if missing == 1 else f"{missing} more seeds"
            return f"The verdict takes {some}." if planned >= CLAIM_SEEDS else ""
        return f"For a verdict, run {CLAIM_SEEDS} seeds. Nothing of this screening is a claim."
    return _after_claim(judged)


def _after_claim(judged: Judged) -> str:
    plans = [name for name in judged.design.plans if name != RANDOM_CONTROL]
    rows = [row for row, rival in judged.told if rival == UNTOUCHED]
    better = [row for row in rows if row.verdict == "better"]
    beaten = {
        row.arm for row, rival in judged.told if rival == RANDOM_CONTROL and row.verdict == "worse"
    }
    resets = [row for row in better if row.arm in plans and row.arm not in beaten]
    others = {RANDOM_CONTROL, *(info.arm for info in RIVALS if info.resets)}
    rivals = [row for row in better if row.arm not in (*plans, *others)]
    best_reset = max(resets, key=lambda row: row.mean, default=None)
    best_rival = max(rivals, key=lambda row: row.mean, default=None)
    if best_rival is not None and (best_reset is None or best_rival.mean >= best_reset.mean):
        if best_reset is None:
            return f'No reset helps here; "{best_rival.arm}" does, without any.'
        return (
            f'"{best_rival.arm}" gains as much without any reset: take that, or test the plan on '
            "top of it."
        )
    if best_reset is not None:
        return f'Export "{best_reset.arm}", and try it in your own trainer at your own length.'
    if beaten or any(row.arm == RANDOM_CONTROL for row in better):
        return (
            "A reset of this size helps even where chance puts it, and that of the plan is not "
            "shown to: where it resets is not what matters. Try other layers, or a rule."
        )
    verdicts = {row.verdict for row in rows if row.arm in plans and row.verdict}
    if "inconclusive" in verdicts:
        return _more_seeds(
            judged, [row for row in rows if row.arm in plans and row.verdict == "inconclusive"]
        )
    if "worse" in verdicts:
        return "No reset helps here: try a smaller plan, or train the network as it came."
    if "equivalent" in verdicts:
        return "No reset helps here: train the network as it came."
    return "Train for more steps, or at another rate."


def _more_seeds(judged: Judged, rows: Sequence[ArmDifference]) -> str:
    needed = min(_seeds_needed(judged, row) for row in rows)
    if needed > MOST_SEEDS:
        return (
            "No reset helps here as far as this can tell: a difference as small as the one seen "
            f"takes over {MOST_SEEDS} seeds. Try another plan, more steps or another rate."
        )
    return f"About {needed} seeds would show a difference as large as the one seen, if it is real."


def _seeds_needed(judged: Judged, row: ArmDifference) -> int:
    """Return how many seeds find the difference that was seen with a chance of `POWER`."""
    values, _ = paired(judged.found, row.arm, UNTOUCHED, OUTCOMES[judged.design.outcome])
    centre = abs(float(values.mean()))
    if centre == 0:
        return MOST_SEEDS + 1
    reach = stats.norm.ppf(1 - ALPHA / 2 / len(judged.told)) + stats.norm.ppf(POWER)
    needed = math.ceil((float(reach) * float(values.std(ddof=1)) / centre) ** 2)
    return max(needed, len(values) + CLAIM_SEEDS // 2)
