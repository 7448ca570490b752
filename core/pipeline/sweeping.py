"""The untouched network before a trial: its best learning rate, and its linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from core.errors import ModelError, Stopped
from core.network.layout import placed
from core.pipeline.arms import RATE_STEP, untouched_network
from core.pipeline.progress import Progress, tick
from core.records import ModelOutline, ModelSpec, RateSweep
from core.trial.arms import Arm, Images, Settings
from core.trial.engine import finetune
from core.trial.probe import Probe, linear_probe

# Seeds of each rate.
SWEEP_SEEDS = 2
SWEEP_RATES = 5
# Runs of the untouched network, where no edge is passed.
SWEEP_ARMS = SWEEP_SEEDS * SWEEP_RATES


def sweep_rates(
    untouched: Arm,
    images: Images,
    settings: Settings,
    *,
    trial_seeds: Sequence[int],
    device: torch.device,
    progress: Progress | None = None,
) -> RateSweep:
    """Train the untouched network at several learning rates; a best one at the edge is passed.

    Args:
        untouched: The untouched network's arm.
        images: Decoded.
        settings: Their rate is the middle of the sweep.
        trial_seeds: Of the trial; the sweep takes others.
        device: Where to train.
        progress: Progress and stop.

    Raises:
        LimberError: Every rate diverged, or stopped.
    """
    progress = progress or Progress()
    progress.phase("trying learning rates")
    # Whole numbers that a person hardly types, so that no seed of the trial chose its own rate.
    seeds = tuple(s for s in range(7_000, 7_100) if s not in trial_seeds)[:SWEEP_SEEDS]
    accuracies: dict[float, float] = {}
    wanted = [
        settings.lr * RATE_STEP**power for power in range(-(SWEEP_RATES // 2), SWEEP_RATES // 2 + 1)
    ]
    done, total = 0, len(wanted) * len(seeds) * settings.steps
    for _ in range(3):
        for rate in wanted:
            finals = []
            try:
                run = finetune(
                    [untouched],
                    images,
                    replace(settings, lr=rate, eval_every=settings.steps),
                    seeds=seeds,
                    device=device,
                    should_stop=progress.should_stop,
                )
                for step in run:
                    done += step.step > 0
                    tick(progress, min(done, total), total, "steps of the sweep")
                    if step.step == settings.steps and step.val_accuracy is not None:
                        finals.append(step.val_accuracy)
            except ModelError:
                # A rate that diverges is a rate that is too high.
                finals = [0.0]
            if progress.should_stop():
                raise Stopped("Stopped before the trial began; nothing was written.")
            accuracies[rate] = sum(finals) / len(finals)
        rates = sorted(accuracies)
        best = max(rates, key=lambda rate: accuracies[rate])
        if best not in (rates[0], rates[-1]):
            break
        beyond = best / RATE_STEP if best == rates[0] else best * RATE_STEP
        wanted, total = [beyond], total + len(seeds) * settings.steps
    if not any(accuracies.values()):
        raise ModelError(
            "The loss diverges at every learning rate that was tried. Give a lower one."
        )
    return RateSweep(
        rates=tuple(rates),
        accuracies=tuple(accuracies[rate] for rate in rates),
        seeds=seeds,
        best=best,
    )


def fitted_probe(
    spec: ModelSpec,
    outline: ModelOutline,
    images: Images,
    device: torch.device,
    progress: Progress,
) -> Probe | None:
    """Return what a head alone would reach; None where the network has no head.

    Raises:
        LimberError: The weights cannot be loaded, or stopped.
    """
    head = [layer.name for layer in outline.layers if layer.head]
    if not head:
        return None
    progress.phase("fitting a linear probe")
    model = placed(untouched_network(spec, outline.classes, 0), device)
    found = linear_probe(model, images, head, progress.should_stop)
    if progress.should_stop():
        raise Stopped("Stopped before the trial began; nothing was written.")
    return found
