"""The training loop of a trial against a bare one: the same augmentation, the same tensors.

    python -m tests.benchmarks.training         also writes assets/training_speed.json

Each pair is one step of ours and one of a plain PyTorch loop, one after the other in turns; the
ratio is of CPU time on a processor and of wall time on a GPU, the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from core.load import resolve_data, resolve_model
from core.pipeline.arms import plan_arms
from core.pipeline.batches import opened_images, outline_model
from core.pipeline.machine import choose_device, device_name, versions
from core.pipeline.progress import Progress
from core.pipeline.trial import read_pixels
from core.trial.arms import Settings
from core.trial.augment import augmenter
from core.trial.engine import batch_order, finetune

OUT = Path(__file__).parent.parent.parent / "assets" / "training_speed.json"
NETWORKS = ("tf_efficientnet_lite0", "vit_small_patch14_dinov2")
BATCH = 32


def clock(device: torch.device) -> float:
    """Seconds of CPU time, or of wall time where a GPU works."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def compared(network: str, pairs: int) -> dict[str, Any]:
    """Return one network's row."""
    spec = resolve_model(network)
    images = opened_images(resolve_data("bloodmnist"), Progress())
    outline = outline_model(spec, classes=len(images.outline.classes))
    device = choose_device("auto")
    size = outline.default_size
    pixels = read_pixels(images, outline, size=size, train=10 * BATCH, val=2)
    settings = Settings(steps=pairs + 3, batch_size=BATCH, lr=outline.default_lr, eval_every=10_000)
    (arm,) = plan_arms(spec, outline, {})
    ours = finetune([arm], pixels, settings, seeds=(0,), device=device)
    next(ours)
    bare = bare_loop(arm.build(0).to(device), pixels, settings, device)
    ratios, ours_s, bare_s = [], [], []
    for number in range(pairs + 2):
        begun = clock(device)
        if number % 2:
            next(ours)
            between = clock(device)
            bare()
        else:
            bare()
            between = clock(device)
            next(ours)
        ended = clock(device)
        first, second = between - begun, ended - between
        mine, theirs = (first, second) if number % 2 else (second, first)
        # The first steps of both warm up.
        if number > 1:
            ratios.append(mine / theirs)
            ours_s.append(mine)
            bare_s.append(theirs)
    return {
        "network": outline.title,
        "size": size,
        "batch": BATCH,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "bare_s": statistics.median(bare_s),
        "ours_s": statistics.median(ours_s),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def bare_loop(
    model: torch.nn.Module, pixels: Any, settings: Settings, device: torch.device
) -> Callable[[], None]:
    """Return a function that takes one step as a person would write it."""
    model = model.to(memory_format=torch.channels_last).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    augment = augmenter(settings.augment, pixels.train.shape[-1])
    train, labels = pixels.train.to(device), pixels.train_labels.to(device)
    mean = torch.tensor(pixels.mean, device=device).reshape(1, 3, 1, 1)
    std = torch.tensor(pixels.std, device=device).reshape(1, 3, 1, 1)
    order = iter(batch_order(len(train), settings, seed=0))

    def step() -> None:
        chosen = next(order).to(device)
        inputs = (augment(train[chosen]).float() / 255 - mean) / std
        optimizer.zero_grad(set_to_none=True)
        logits = model(inputs.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        float(loss.detach())

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training")
    parser.add_argument("--network", action="append", default=[])
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rows = []
    for network in options.network or NETWORKS:
        rows.append(compared(network, options.pairs))
        print(rows[-1], flush=True)
    result = {"versions": versions(), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
