"""How often does a trial claim something that is not so, and how often does it see what is?

    python -m tests.calibration                  synthetic trials, about ten minutes on two cores
    python -m tests.calibration --real 40        trials of the embedded CNN against itself as well

Synthetic trials are curves drawn from a model of a short fine-tune: what a seed does to all arms,
what it does to one arm (heavy tails), which images are answered otherwise, and rounding to whole
images. Without an effect, every claim is false. Real ones train the untouched network against arms
that differ from it in nothing but the random numbers of their augmentation.

The result goes to `assets/calibration.json`; the README's table is written from it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from core.files.curves import curves_of
from core.records import (
    MARGINS,
    RANDOM_CONTROL,
    UNTOUCHED,
    ABComparison,
    ArmCurve,
    Outcome,
    StepRecord,
    TrialDesign,
)
from core.trial.paired import CLAIM_SEEDS, FUTILE
from core.trial.telling import OUTCOME_WORDS
from core.trial.verdict import compare_curves

ROOT = Path(__file__).parent.parent
OUT = ROOT / "assets" / "calibration.json"
SEEDS = tuple(range(CLAIM_SEEDS))
ARMS = (1, 5, 10)
EFFECTS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05)
CLAIMS = ("better", "worse")
# The model: accuracy at the end, what a seed does to all arms and to one, images, and the share of
# them that two runs answer otherwise. One reset of EfficientNet-Lite0 on 600 brain MRI slices had
# eight differences from -0.8 to +3.2 points, a standard deviation of about 1.3.
LEVEL, SEED_SD, ARM_SD, IMAGES, DISCORDANT = 0.85, 0.012, 0.005, 500, 0.06
STEPS, EVALUATIONS = 60, 6


def drawn_trial(
    number: int, arms: int, *, effect: float = 0.0, outcome: Outcome = "final"
) -> tuple[list[ArmCurve], TrialDesign]:
    """Return a trial's curves; the first arm has the effect, the last of several is the control."""
    rng = np.random.default_rng([number, arms, round(1e4 * effect)])
    names = [f"plan {i}" for i in range(1, arms + 1)]
    if arms > 1:
        names[-1] = RANDOM_CONTROL
    points = np.arange(1, EVALUATIONS + 1) * STEPS // EVALUATIONS
    rise = 1 - np.exp(-np.arange(1, EVALUATIONS + 1) / 1.5)
    luck_sd = math.sqrt(DISCORDANT / 2 / IMAGES)
    curves = []
    for seed in SEEDS:
        shared = rng.normal(0, SEED_SD)
        for name in (UNTOUCHED, *names):
            own = ARM_SD * rng.standard_t(5) + (effect if name == names[0] else 0.0)
            wobble = rng.normal(0, luck_sd, EVALUATIONS)
            level = 0.5 + (LEVEL + shared + own - 0.5) * rise / rise[-1] + wobble
            values = np.clip(np.round(level * IMAGES) / IMAGES, 0, 1)
            steps = [
                StepRecord(
                    arm=name,
                    seed=seed,
                    step=int(step),
                    train_loss=float(1.5 - value),
                    val_accuracy=float(value),
                    wall_s=0.0,
                )
                for step, value in zip(points, values, strict=True)
            ]
            curves.append(ArmCurve(arm=name, seed=seed, steps=tuple(steps)))
    design = TrialDesign(
        outcome=outcome,
        margin=MARGINS[outcome],
        arms=(UNTOUCHED, *names),
        plans=tuple(name for name in names if name != RANDOM_CONTROL),
        seeds=SEEDS,
        steps=STEPS,
        val_images=IMAGES,
    )
    return curves, design


def any_claim(found: ABComparison) -> bool:
    """Whether a trial claims a difference of any pair."""
    return any(row.verdict in CLAIMS for row in (*found.differences, *found.from_random))


def one_null(number: int, arms: int, outcome: Outcome) -> tuple[bool, bool, bool]:
    """Return whether a trial without effect claims one: at the end, with looks, and too early."""
    curves, design = drawn_trial(number, arms, outcome=outcome)
    end = any_claim(compare_curves(curves, design))
    early, stopped = False, False
    for done in range(2, CLAIM_SEEDS):
        found = compare_curves([curve for curve in curves if curve.seed < done], design)
        early |= any_claim(found)
        stopped |= found.going_on is not None and found.going_on < FUTILE
    return end, early or (end and not stopped), early


def one_effect(number: int, arms: int, effect: float) -> tuple[bool, bool]:
    """Return whether a trial finds its first arm better than the untouched one, and looks too."""
    curves, design = drawn_trial(number, arms, effect=effect)
    found = compare_curves(curves, design)
    seen = any(row.arm == "plan 1" and row.verdict == "better" for row in found.differences)
    half = [curve for curve in curves if curve.seed < CLAIM_SEEDS // 2]
    going_on = compare_curves(half, design).going_on
    return seen, seen and not (going_on is not None and going_on < FUTILE)


def share(hits: int, trials: int) -> dict[str, float | int]:
    """Return a share with its Clopper-Pearson 95 % interval."""
    interval = stats.binomtest(hits, trials).proportion_ci(0.95, "exact")
    return {
        "trials": trials,
        "hits": hits,
        "share": hits / trials,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def synthetic(trials: int, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return shares of false claims, and power."""
    null: list[dict[str, Any]] = []
    power: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers) as pool:
        wanted: list[tuple[int, Outcome]] = [(arms, "final") for arms in ARMS]
        wanted += [(ARMS[-1], "auc"), (ARMS[-1], "steps")]
        for arms, outcome in wanted:
            told = list(
                pool.map(partial(one_null, arms=arms, outcome=outcome), range(trials), chunksize=25)
            )
            for i, looks in enumerate((False, True)):
                row = {
                    "arms": arms,
                    "outcome": outcome,
                    "looks": looks,
                    **share(sum(each[i] for each in told), trials),
                }
                null.append(row)
                say(f"no effect, {arms} arms, {outcome}, looks {looks}: {_line(row)}")
            if any(each[2] for each in told):
                raise AssertionError("A trial claimed something before its last seed.")
        for arms in ARMS:
            for effect in EFFECTS:
                seen = list(
                    pool.map(
                        partial(one_effect, arms=arms, effect=effect),
                        range(trials // 4),
                        chunksize=25,
                    )
                )
                for i, looks in enumerate((False, True)):
                    row = {
                        "arms": arms,
                        "effect": effect,
                        "looks": looks,
                        **share(sum(each[i] for each in seen), len(seen)),
                    }
                    power.append(row)
                    if not looks:
                        say(f"{100 * effect:g} points, {arms} arms: {_line(row)}")
    model = {
        "level": LEVEL,
        "seed_sd": SEED_SD,
        "arm_sd": ARM_SD,
        "images": IMAGES,
        "discordant": DISCORDANT,
        "seeds": CLAIM_SEEDS,
    }
    return {"model": model, "no_effect": null, "power": power}


# Of a real trial: the untouched network against itself on blood cells, short, since nothing but its
# noise matters.
REAL = {"image_size": 32, "train": 160, "val": 144, "steps": 12, "batch_size": 16, "arms": 3}


def real(trials: int, kept: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the share of real trials without a difference that claim one.

    Args:
        trials: How many, one after the other.
        kept: File of the answers so far, a JSON line a trial; an interrupted calibration goes on.
        say: Told of each.
    """
    from core.load import decode, open_images, resolve_data, resolve_model
    from core.pipeline.arms import plan_arms
    from core.pipeline.batches import outline_model
    from core.pipeline.machine import choose_device, versions
    from core.trial.arms import Images, Settings
    from core.trial.engine import finetune

    spec, data = resolve_model("tf_efficientnet_lite0"), resolve_data("bloodmnist")
    images = open_images(data)
    outline = outline_model(spec, classes=len(images.outline.classes))
    prepared = outline.preprocessing
    parts = [
        decode(images, split, prepared, size=REAL["image_size"], limit=REAL[split], seed=0)
        for split in ("train", "val")
    ]
    held = Images(
        train=parts[0][0],
        train_labels=parts[0][1],
        val=parts[1][0],
        val_labels=parts[1][1],
        mean=prepared.mean,
        std=prepared.std,
    )
    settings = Settings(
        steps=REAL["steps"],
        batch_size=REAL["batch_size"],
        lr=outline.default_lr,
        eval_every=REAL["steps"],
    )
    (untouched,) = plan_arms(spec, outline, {})
    arms = [
        replace(untouched, name=name, stream=stream)
        for stream, name in enumerate([UNTOUCHED, *(f"again {i + 1}" for i in range(REAL["arms"]))])
    ]
    told = (
        [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
        if (kept.exists())
        else []
    )
    for number in range(len(told), trials):
        seeds = tuple(range(CLAIM_SEEDS * number, CLAIM_SEEDS * (number + 1)))
        steps = list(finetune(arms, held, settings, seeds=seeds, device=choose_device("cpu")))
        design = TrialDesign(
            arms=tuple(arm.name for arm in arms),
            seeds=seeds,
            steps=settings.steps,
            val_images=len(held.val),
        )
        found = compare_curves(curves_of(steps), design)
        told.append(
            {"claim": any_claim(found), "p": min(row.p or 1.0 for row in found.differences)}
        )
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told[-1]) + "\n")
        say(f"real trial {number + 1}: {told[-1]}")
    hits = sum(each["claim"] for each in told[:trials])
    return {"network": outline.title, **REAL, "versions": versions(), **share(hits, trials)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['hits']} of {row['trials']}, {100 * row['share']:.1f} % "
        f"({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    )


@dataclass(frozen=True, slots=True)
class Table:
    """The README's table of the result."""

    result: dict[str, Any]

    def lines(self) -> list[str]:
        """Return it as Markdown."""
        rows = ["| no effect: any false claim | arms | share | 95 % interval | trials |"]
        rows.append("|---|---|---|---|---|")
        for row in self.result["no_effect"]:
            looks = ", with looks" if row["looks"] else ""
            rows.append(_table_row(f"{OUTCOME_WORDS[row['outcome']]}{looks}", row))
        real = self.result.get("real")
        if real:
            rows.append(_table_row(f"{real['network']} against itself", real))
        effects = sorted({row["effect"] for row in self.result["power"]})
        names = " | ".join(
            f"{100 * effect:g} point{'' if effect == 0.01 else 's'}" for effect in effects
        )
        rows += ["", f"| an effect is found | {names} |", "|---" * (len(effects) + 1) + "|"]
        for arms in sorted({row["arms"] for row in self.result["power"]}):
            shares = {
                row["effect"]: f"{100 * row['share']:.0f} %"
                for row in self.result["power"]
                if row["arms"] == arms and not row["looks"]
            }
            cells = " | ".join(shares[effect] for effect in effects)
            rows.append(f"| {arms} arm{'' if arms == 1 else 's'} | {cells} |")
        return rows


def _table_row(what: str, row: dict[str, Any]) -> str:
    return (
        f"| {what} | {row['arms']} | {100 * row['share']:.1f} % | "
        f"{100 * row['low']:.1f} to {100 * row['high']:.1f} % | {row['trials']} |"
    )


def with_table(readme: str, result: dict[str, Any]) -> str:
    """Return the README with the table between its marks."""
    table = "\n".join(Table(result).lines())
    return re.sub(
        r"(<!-- calibration -->\n).*?(<!-- /calibration -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        readme,
        flags=re.DOTALL,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calibration and write its result."""
    parser = argparse.ArgumentParser(prog="python -m tests.calibration")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--real", type=int, default=0, help="real trials besides")
    parser.add_argument(
        "--kept", type=Path, default=ROOT / ".limber" / "calibration.jsonl", help="of real trials"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    kept: dict[str, Any] = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}

    def say(line: str) -> None:
        print(line, flush=True)

    if options.trials:
        kept.update(synthetic(options.trials, options.workers, say))
    if options.real:
        options.kept.parent.mkdir(parents=True, exist_ok=True)
        kept["real"] = real(options.real, options.kept, say)
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text("utf-8"), kept), encoding="utf-8")
    options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
