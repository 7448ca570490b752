"""How long a fine-tune takes on this machine: two seconds of one, timed."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from core.load import decode
from core.pipeline.arms import plan_arms
from core.pipeline.batches import check_image_size, opened_images, outline_model
from core.pipeline.machine import choose_device
from core.pipeline.progress import Progress
from core.records import DataSpec, ModelSpec, Pace
from core.trial.arms import Images, Settings
from core.trial.engine import EVAL_BATCH, evaluate, finetune
from core.trial.recipe import check_recipe

# Steps are timed for so long; the first one also warms up and does not count.
PROBE_S = 2.0
MOST_STEPS = 200


def measure_pace(
    spec: ModelSpec,
    data: DataSpec,
    *,
    settings: Settings,
    image_size: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Pace:
    """Train the untouched network for two seconds and say how long its parts take.

    Args:
        spec: The model.
        data: The images.
        settings: Of the fine-tune that is asked about.
        image_size: Side in pixels; None takes the model's default for short runs.
        device: "auto", "cpu" or "cuda".
        progress: Progress and stop.

    Raises:
        LimberError: Bad input, or a step that fails.
    """
    progress = progress or Progress()
    check_recipe(settings.optimizer, settings.schedule)
    place = choose_device(device)
    images = opened_images(data, progress)
    outline = outline_model(spec, classes=len(images.outline.classes))
    size = outline.default_size if image_size is None else image_size
    check_image_size(outline, size)
    begun = time.perf_counter()
    parts = [
        decode(images, split, outline.preprocessing, size=size, limit=limit, seed=0)
        for split, limit in (("train", settings.batch_size), ("val", EVAL_BATCH))
    ]
    read_s = (time.perf_counter() - begun) / sum(len(pixels) for pixels, _ in parts)
    (train, train_labels), (val, val_labels) = parts
    held = Images(
        train=train,
        train_labels=train_labels,
        val=val[:EVAL_BATCH].to(place),
        val_labels=val_labels[:EVAL_BATCH].to(place),
        mean=outline.preprocessing.mean,
        std=outline.preprocessing.std,
    )
    arm = plan_arms(spec, outline, {})[0]
    begun = time.perf_counter()
    model = arm.build(0).to(place)
    build_s = time.perf_counter() - begun
    evaluate(model, held.val, held.val_labels, held.mean, held.std)
    begun = time.perf_counter()
    evaluate(model, held.val, held.val_labels, held.mean, held.std)
    image_s = (time.perf_counter() - begun) / len(held.val)
    asked = replace(settings, steps=MOST_STEPS, eval_every=MOST_STEPS)
    ends: list[float] = []
    for step in finetune(
        [arm],
        replace(held, val=held.val[:2], val_labels=held.val_labels[:2]),
        asked,
        seeds=(0,),
        device=place,
        should_stop=lambda: len(ends) > 2 and ends[-1] - ends[1] > PROBE_S,
    ):
        if place.type == "cuda":
            torch.cuda.synchronize()
        if step.step:
            ends.append(time.perf_counter())
    step_s = (ends[-1] - ends[0]) / max(1, len(ends) - 1) if len(ends) > 1 else PROBE_S
    return Pace(
        step_s=step_s,
        image_s=image_s,
        read_s=read_s,
        build_s=build_s,
        batch_size=settings.batch_size,
        image_size=size,
        device=place.type,
    )
