"""What a trial says: no more than its seeds, its images and its training allow."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from core.files.curves import curves_of
from core.records import (
    RANDOM_CONTROL,
    UNTOUCHED,
    ABComparison,
    ArmCurve,
    ArmDifference,
    Outcome,
    RateSweep,
    StepRecord,
    TrialDesign,
)
from core.trial.figures import bits, from_bits
from core.trial.verdict import compare_curves
from tests.calibration import ROOT, drawn_trial, with_table
from tests.recipes import with_table as with_recipes

EIGHT = (0.010, 0.012, 0.008, 0.011, 0.009, 0.013, 0.007, 0.010)


def curve(
    arm: str,
    seed: int,
    accuracies: Sequence[float],
    *,
    losses: Sequence[float] = (),
    answers: str | None = None,
) -> ArmCurve:
    """One evaluation a step, after one before training."""
    steps = [step(arm, seed, 0, None, 0.9)]
    for i, accuracy in enumerate(accuracies):
        loss = losses[i] if losses else 1.0
        steps.append(step(arm, seed, i + 1, loss, accuracy))
    if answers is not None:
        last = steps[-1]
        steps[-1] = StepRecord(
            arm=last.arm,
            seed=last.seed,
            step=last.step,
            train_loss=last.train_loss,
            val_accuracy=last.val_accuracy,
            wall_s=0.0,
            answers=answers,
        )
    return ArmCurve(arm=arm, seed=seed, steps=tuple(steps))


def step(
    arm: str, seed: int, number: int, loss: float | None, accuracy: float | None
) -> StepRecord:
    return StepRecord(
        arm=arm, seed=seed, step=number, train_loss=loss, val_accuracy=accuracy, wall_s=0.0
    )


def finals(arm: str, values: Sequence[float]) -> list[ArmCurve]:
    return [curve(arm, seed, (0.5, value)) for seed, value in enumerate(values)]


def trial(gains: Sequence[float], **design: object) -> ABComparison:
    """A plan that ends higher than the untouched network by each seed's gain."""
    base = [0.70 + 0.01 * (seed % 3) for seed in range(len(gains))]
    rows = finals(UNTOUCHED, base)
    rows += finals("plan", [b + g for b, g in zip(base, gains, strict=True)])
    return compare_curves(rows, designed(len(gains), **design))


def designed(seeds: int, **given: object) -> TrialDesign:
    values: dict[str, object] = {
        "arms": (UNTOUCHED, "plan"),
        "plans": ("plan",),
        "seeds": tuple(range(seeds)),
        "steps": 2,
        **given,
    }
    return TrialDesign.model_validate(values)


def primary(found: ABComparison, arm: str = "plan") -> ArmDifference:
    (row,) = [
        row for row in found.differences if row.arm == arm and row.measure == "final_val_accuracy"
    ]
    return row


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([2 * g for g in EIGHT], "better"),
        ([-2 * g for g in EIGHT], "worse"),
        ([g - 0.009 for g in EIGHT], "equivalent"),
        ([0.0] * 8, "equivalent"),
        ([0.05, -0.05] * 4, "inconclusive"),
        ([0.3] * 7, "screening"),
        ([0.3, 0.31], "screening"),
    ],
)
def test_each_of_the_five_outcomes(gains: list[float], verdict: str) -> None:
    found = trial(gains)

    row = primary(found)
    assert row.verdict == verdict
    assert row.mean == pytest.approx(sum(gains) / len(gains))
    assert found.state == ("screening" if len(gains) < 8 else "claim")
    assert ("nothing is claimed" in found.sentence) == (len(gains) < 8)
    assert found.what_next


def test_a_margin_decides_what_is_equivalent() -> None:
    gains = [g / 2 for g in EIGHT]

    verdicts = {m: primary(trial(gains, margin=m)).verdict for m in (0.0, 0.004, 0.01)}

    assert verdicts == {0.0: "better", 0.004: "better", 0.01: "equivalent"}


def test_no_number_before_two_seeds() -> None:
    one = compare_curves(finals(UNTOUCHED, [0.5]) + finals("plan", [0.6]), designed(1))
    of_eight = compare_curves(finals(UNTOUCHED, [0.5]) + finals("plan", [0.6]), designed(8))

    for found in (one, of_eight):
        assert found.state == "too early"
        assert "10.0" not in found.sentence
        row = primary(found)
        assert (row.low, row.high, row.p) == (None, None, None)
        assert row.verdict == "screening"
    assert of_eight.sentence == "No number before two seeds are done (1 of 8)."


@pytest.mark.parametrize("done", range(8))
def test_a_look_before_the_planned_seeds_claims_nothing(done: int) -> None:
    rows = finals(UNTOUCHED, [0.5] * done) + finals("plan", [0.6 + g for g in EIGHT[:done]])

    found = compare_curves(rows, designed(8))

    assert {row.verdict for row in found.differences} <= {"screening", None}
    assert "better" not in found.sentence


def test_ten_planned_seeds_are_not_judged_at_eight() -> None:
    rows = finals(UNTOUCHED, [0.5] * 8) + finals("plan", [0.6 + g for g in EIGHT])

    assert primary(compare_curves(rows, designed(10))).verdict == "screening"
    assert primary(compare_curves(rows, designed(8))).verdict == "better"


def test_at_half_the_seeds_a_hopeless_trial_may_stop() -> None:
    def at_four(gains: Sequence[float]) -> ABComparison:
        rows = finals(UNTOUCHED, [0.5] * 4) + finals("plan", [0.5 + g for g in gains])
        return compare_curves(rows, designed(8))

    hopeless, promising = at_four([0.02, -0.02, 0.01, -0.01]), at_four(EIGHT[:4])

    assert hopeless.going_on == 0.0
    assert "Stopping here loses little" in hopeless.what_next
    assert promising.going_on == 1.0
    assert promising.what_next == "The verdict takes 4 more seeds."


def test_only_the_named_outcome_is_judged() -> None:
    for outcome, measure in (("final", "final_val_accuracy"), ("auc", "mean_val_accuracy")):
        found = trial([2 * g for g in EIGHT], outcome=outcome)

        judged = {row.measure for row in found.differences if row.verdict is not None}
        assert judged == {measure}
        assert len({row.measure for row in found.differences}) == 4


def test_hiding_or_adding_arms_changes_no_number() -> None:
    curves, design = drawn_trial(3, 5, effect=0.02)
    whole = compare_curves(curves, design)
    stranger = [
        ArmCurve(arm="shown too", seed=c.seed, steps=c.steps) for c in curves if c.arm == "plan 1"
    ]

    for order in (curves + stranger, curves[::-1], stranger + curves):
        assert compare_curves(order, design) == whole


def test_thinning_what_is_between_evaluations_changes_no_accuracy() -> None:
    curves, design = drawn_trial(3, 2, effect=0.02)
    whole = compare_curves(curves, design)
    steps = [s for c in curves for s in c.steps]
    more = [
        *steps,
        *(step(c.arm, c.seed, s.step - 1, s.train_loss, None) for c in curves for s in c.steps),
    ]

    thick = compare_curves(curves_of(more), design)

    assert thick.sentence == whole.sentence
    for a, b in zip(thick.differences, whole.differences, strict=True):
        if a.measure != "loss_gain":
            assert a == b


def test_a_seed_that_one_arm_has_not_finished_does_not_count() -> None:
    rows = finals(UNTOUCHED, [0.5] * 3) + finals("plan", [0.6, 0.62, 0.9])
    short = [*rows[:-1], ArmCurve(arm="plan", seed=2, steps=rows[-1].steps[:2])]

    found = compare_curves(short, designed(3))

    assert primary(found).seeds == 2
    assert primary(found).mean == pytest.approx(0.11)
    assert "1 seed is not finished in all arms and does not count." in found.caveats


def test_a_plan_is_held_against_the_random_control_in_the_same_family() -> None:
    base = [0.5 + 0.01 * (seed % 2) for seed in range(8)]
    rows = finals(UNTOUCHED, base)
    rows += finals("plan", [b + 0.1 + g for b, g in zip(base, EIGHT, strict=True)])
    rows += finals(RANDOM_CONTROL, [b + 0.2 + g for b, g in zip(base, EIGHT[::-1], strict=True)])
    design = designed(8, arms=(UNTOUCHED, "plan", RANDOM_CONTROL))

    found = compare_curves(rows, design)

    (row,) = [r for r in found.from_random if r.measure == "final_val_accuracy"]
    assert (row.arm, row.verdict) == ("plan", "worse")
    assert {r.arm for r in found.differences} == {"plan", RANDOM_CONTROL}
    assert '"plan" is worse than the random control: -10.0 points' in found.sentence
    assert "hold for all 3 comparisons at once" in " ".join(found.caveats)


# Steps to target


def stepped(arm: str, hits: Sequence[int | None], steps: int = 8) -> list[ArmCurve]:
    """Curves that reach 0.8 at the step named, and are at 0.6 before."""
    return [
        curve(
            arm,
            seed,
            [0.8 if hit is not None and number >= hit else 0.6 for number in range(1, steps + 1)],
        )
        for seed, hit in enumerate(hits)
    ]


def steps_row(found: ABComparison) -> ArmDifference:
    (row,) = [row for row in found.differences if row.measure == "steps_to_target"]
    return row


def test_the_speed_up_is_the_ratio_of_steps_to_the_untouched_networks_end() -> None:
    rows = stepped(UNTOUCHED, [8] * 8) + stepped("plan", [4, 4, 2, 8, 4, 4, 4, 2])

    found = compare_curves(rows, designed(8, steps=8, outcome="steps", margin=0.1))

    row = steps_row(found)
    assert row.mean == pytest.approx(math.exp(np.mean(np.log([2, 2, 4, 1, 2, 2, 2, 4]))))
    assert row.unreached == (0, 0)
    assert row.verdict == "better"
    assert row.low is not None
    assert 1 < row.low < row.mean
    assert "times the speed to the target" in found.sentence


def test_a_target_that_is_never_reached_gives_a_bound() -> None:
    # Untouched ends at 0.8 in six of eight seeds: its mean over the others is below 0.8.
    rows = stepped(UNTOUCHED, [8, 8, None, 8, 8, None, 8, 8]) + stepped("plan", [4] * 8)

    found = compare_curves(rows, designed(8, steps=8, outcome="steps", margin=0.1))

    row = steps_row(found)
    assert row.unreached == (0, 2)
    assert row.mean == pytest.approx(2.0)
    assert "at least 2.00 times" in found.sentence
    assert any("was not reached" in caveat for caveat in found.caveats)


def test_equal_steps_are_not_known_better_than_the_evaluations_lie_apart() -> None:
    def found(every: int) -> ArmDifference:
        rows = [
            ArmCurve(
                arm=arm,
                seed=seed,
                steps=tuple(
                    step(arm, seed, number, 1.0, 0.8 if number >= 64 else 0.5)
                    for number in range(every, 65, every)
                ),
            )
            for arm in (UNTOUCHED, "plan")
            for seed in range(8)
        ]
        return steps_row(compare_curves(rows, designed(8, steps=64, outcome="steps", margin=0.1)))

    assert (found(32).mean, found(32).verdict) == (1.0, "inconclusive")
    assert (found(2).mean, found(2).verdict) == (1.0, "equivalent")


def test_two_equal_arms_reach_the_target_as_often() -> None:
    """Holding an arm to the untouched network's own end of the same seed would not be fair."""
    slower = faster = 0
    for number in range(300):
        curves, design = drawn_trial(number, 1, outcome="steps")
        row = steps_row(compare_curves(curves, design))
        slower += row.mean < 1
        faster += row.mean > 1

    assert abs(slower - faster) < 4 * math.sqrt(slower + faster)


# Trials that are too weak


def test_an_untouched_network_near_chance_gets_no_verdict() -> None:
    found = trial([0.05 + g for g in EIGHT], chance=0.70, val_images=200)

    assert found.state == "weak"
    assert {row.verdict for row in found.differences} == {None}
    assert "near chance" in found.weak[0]
    assert found.sentence.startswith("No verdict, the trial is too weak.")
    assert "more steps" in found.what_next


def test_an_arm_near_chance_gets_no_verdict_and_the_others_do() -> None:
    base = [0.7 + 0.01 * (seed % 2) for seed in range(8)]
    rows = finals(UNTOUCHED, base) + finals("dead", [0.13 + g for g in EIGHT])
    rows += finals("plan", [b + 2 * g for b, g in zip(base, EIGHT, strict=True)])
    design = designed(8, arms=(UNTOUCHED, "dead", "plan"), chance=0.13, val_images=200)

    found = compare_curves(rows, design)

    assert primary(found, "dead").verdict is None
    assert primary(found, "plan").verdict == "better"
    assert "no verdict, it is still near chance" in found.sentence


def test_an_untouched_network_below_its_linear_probe_gets_no_verdict() -> None:
    below = trial([2 * g for g in EIGHT], probe=0.80, probe_slack=0.03)
    within = trial([2 * g for g in EIGHT], probe=0.73, probe_slack=0.03)

    assert below.state == "weak"
    assert "below its own linear probe (80.0 %)" in below.sentence
    assert within.state == "claim"


def test_a_rising_loss_gets_no_verdict() -> None:
    rising, falling = [1.0, 1.0, 1.2, 1.4], [1.4, 1.2, 1.0, 1.0]

    def found(untouched: Sequence[float], plan: Sequence[float]) -> ABComparison:
        rows = [
            curve(arm, seed, [0.5, 0.6, 0.6, 0.6 + gain * (arm == "plan")], losses=losses)
            for arm, losses in ((UNTOUCHED, untouched), ("plan", plan))
            for seed, gain in enumerate(EIGHT)
        ]
        return compare_curves(rows, designed(8, steps=4, margin=0.0))

    assert "training loss rises" in found(rising, falling).sentence
    assert found(rising, falling).what_next == "Lower the learning rate."
    assert primary(found(falling, rising)).verdict is None
    assert primary(found(falling, falling)).verdict == "better"


@pytest.mark.parametrize(("best", "edge"), [(1e-3, "lowest"), (9e-3, "highest"), (3e-3, "")])
def test_a_best_rate_at_the_edge_of_its_sweep_gets_no_verdict(best: float, edge: str) -> None:
    sweep = RateSweep(rates=(1e-3, 3e-3, 9e-3), accuracies=(0.7, 0.7, 0.7), seeds=(100,), best=best)

    found = trial([2 * g for g in EIGHT], sweep=sweep)

    assert (found.state == "weak") == bool(edge)
    if edge:
        assert f"is its {edge}" in found.sentence
    assert not any("One learning rate" in caveat for caveat in found.caveats)


# What to do next


def test_a_rival_without_a_reset_that_gains_as_much_is_named() -> None:
    base = [0.7 + 0.01 * (seed % 2) for seed in range(8)]
    rows = finals(UNTOUCHED, base)
    rows += finals("plan", [b + 0.02 + g for b, g in zip(base, EIGHT, strict=True)])
    rows += finals("LP-FT", [b + 0.04 + g for b, g in zip(base, EIGHT, strict=True)])
    design = designed(8, arms=(UNTOUCHED, "plan", "LP-FT"))

    assert '"LP-FT" gains as much without any reset' in compare_curves(rows, design).what_next


def test_a_control_that_gains_without_the_plan_is_pointed_out() -> None:
    base = [0.7 + 0.01 * (seed % 2) for seed in range(8)]
    rows = finals(UNTOUCHED, base) + finals("plan", [b - 0.01 for b in base])
    rows += finals(RANDOM_CONTROL, [b + 0.04 + g for b, g in zip(base, EIGHT, strict=True)])
    design = designed(8, arms=(UNTOUCHED, "plan", RANDOM_CONTROL))

    assert "where it resets is not what matters" in compare_curves(rows, design).what_next


@pytest.mark.parametrize(
    ("gains", "advice"),
    [
        ([2 * g for g in EIGHT], 'Export "plan"'),
        ([-2 * g for g in EIGHT], "try a smaller plan"),
        ([0.0] * 8, "train the network as it came"),
        ([0.001, -0.001, 0.05, -0.05, 0.03, -0.03, 0.02, -0.021], "No reset helps here as far as"),
        ([0.03, -0.01, 0.03, -0.01, 0.02, 0.02, -0.02, 0.03], "seeds would show"),
    ],
)
def test_every_verdict_says_what_next(gains: list[float], advice: str) -> None:
    assert advice in trial(gains).what_next


# Images


def test_answers_go_to_bits_and_back() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 7, 8, 9, 400):
        right = rng.random(count) < 0.5
        found = from_bits(bits(right), count)
        assert found is not None
        assert found.tolist() == right.tolist()
    assert from_bits("zz", 8) is None
    assert from_bits("ff", 9) is None


def test_noise_of_images_is_told_apart_from_noise_of_seeds() -> None:
    rng = np.random.default_rng(1)
    images = 400
    base = rng.random(images) < 0.8
    rows, rights = [], {}
    for arm, seed in itertools.product((UNTOUCHED, "plan"), range(8)):
        right = base ^ (rng.random(images) < 0.05)
        rights[arm, seed] = right
        rows.append(curve(arm, seed, (0.5, float(right.mean())), answers=bits(right)))

    found = compare_curves(rows, designed(8, val_images=images))

    (noise,) = found.image_noise
    differences = np.stack(
        [rights["plan", s].astype(float) - rights[UNTOUCHED, s] for s in range(8)]
    )
    assert noise.discordant == pytest.approx((differences != 0).mean())
    error = differences.mean(0).std(ddof=1) / math.sqrt(images)
    assert noise.resolvable == pytest.approx(1.96 * error)
    assert any("With 400 validation images a difference below" in c for c in found.caveats)


def test_a_thousand_images_need_no_warning() -> None:
    found = trial([2 * g for g in EIGHT], val_images=1000)

    assert not any("validation images" in caveat for caveat in found.caveats)


def test_the_readmes_tables_are_what_the_commands_wrote() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    calibration = json.loads((ROOT / "assets" / "calibration.json").read_text("utf-8"))
    recipes = json.loads((ROOT / "assets" / "recipes.json").read_text("utf-8"))

    assert with_table(readme, calibration) == readme
    assert with_recipes(readme, recipes["rows"]) == readme
    for row in calibration["no_effect"]:
        assert row["share"] <= 0.05
        assert row["high"] <= 0.065


def test_curves_without_a_design_are_a_screening() -> None:
    """Nobody knows what was planned, nor whether the training was too weak."""
    rows = finals(UNTOUCHED, [0.5, 0.51] * 4) + finals("plan", [0.6 + g for g in EIGHT])

    found = compare_curves(rows)

    assert (found.state, found.planned, primary(found).verdict) == ("screening", 8, "screening")


def test_a_target_that_nobody_reaches_makes_no_arms_equivalent() -> None:
    rows = stepped(UNTOUCHED, [8, None] * 4) + stepped("plan", [None] * 8)

    found = compare_curves(rows, designed(8, steps=8, outcome="steps", margin=0.5))

    assert steps_row(found).verdict == "inconclusive"


def test_a_plan_that_chance_beats_is_not_for_export() -> None:
    base = [0.6 + 0.01 * (seed % 2) for seed in range(8)]
    rows = finals(UNTOUCHED, base)
    rows += finals("plan", [b + 0.03 + g for b, g in zip(base, EIGHT, strict=True)])
    rows += finals(RANDOM_CONTROL, [b + 0.09 + g for b, g in zip(base, EIGHT, strict=True)])
    design = designed(8, arms=(UNTOUCHED, "plan", RANDOM_CONTROL))

    assert "Export" not in compare_curves(rows, design).what_next


def test_the_first_evaluation_is_before_training_and_does_not_count() -> None:
    found = trial(EIGHT)

    (row,) = [row for row in found.differences if row.measure == "mean_val_accuracy"]
    # Step 1 is equal, step 2 differs by the gain.
    assert row.mean == pytest.approx(sum(EIGHT) / 8 / 2)


def test_the_loss_gain_is_positive_where_the_arm_has_the_lower_loss() -> None:
    rows = [curve(UNTOUCHED, s, (0.5, 0.6), losses=(1.0, 1.0)) for s in range(2)]
    rows += [curve("plan", s, (0.5, 0.6), losses=(0.75, 0.25)) for s in range(2)]

    found = compare_curves(rows, designed(2))

    (row,) = [row for row in found.differences if row.measure == "loss_gain"]
    assert row.mean == pytest.approx(0.5)


def test_nothing_to_compare_is_said() -> None:
    alone = compare_curves(finals(UNTOUCHED, [0.5, 0.6]))

    assert alone.sentence == "There is only the untouched network: nothing to compare."
    assert alone.differences == ()


@pytest.mark.parametrize("outcome", ["final", "auc", "steps"])
@pytest.mark.parametrize("arms", [1, 5])
def test_a_slice_of_the_calibration(outcome: Outcome, arms: int) -> None:
    claims = 0
    for number in range(60):
        curves, design = drawn_trial(number, arms, outcome=outcome)
        found = compare_curves(curves, design)
        rows = (*found.differences, *found.from_random)
        claims += any(row.verdict in ("better", "worse") for row in rows)

    # At 5 % a trial, more than nine of 60 come once in 1,000 calibrations.
    assert claims <= 9
