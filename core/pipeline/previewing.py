"""What a plan does to weights, activations and outputs before any training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from core.edit.effect import Outcome, compare_outputs
from core.errors import PlanError, Stopped
from core.load import choose_items, load_model, open_images
from core.network.layout import placed
from core.network.outline import outline_module
from core.pipeline.applying import edited_model, plan_classes, plan_spec
from core.pipeline.batches import DEFAULT_BATCH_SIZE, check_amounts, check_image_size, read_batch
from core.pipeline.machine import choose_device
from core.pipeline.progress import Progress
from core.records import (
    DataSpec,
    LayerPreview,
    ModelOutline,
    PlanPreview,
    ReinitPlan,
    ReinitReceipt,
    TensorChange,
)

PREVIEW_SAMPLES = 64


# Mean KL in nats below which the outputs have hardly moved.
NO_OP_KL = 1e-4


# Growth of the activations from which an edit explodes.
EXPLODED_RATIO = 10.0


def preview_plan(
    plan: ReinitPlan,
    data: DataSpec | None = None,
    *,
    samples: int = PREVIEW_SAMPLES,
    batch_size: int = DEFAULT_BATCH_SIZE,
    image_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> PlanPreview:
    """Return what a plan does to weights, activations and outputs before any training.

    Both networks get the untouched head, so that outputs differ only by the body.

    Args:
        plan: What to look at.
        data: Images of its validation part (or its training part where there is no other) to run
            both networks on; None looks only at the weights.
        samples: At most so many images, classes in turn.
        batch_size: Images a batch.
        image_size: Side in pixels; None takes the model's default.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the choice of images.
        progress: Progress and stop.

    Raises:
        LimberError: Bad input, or stopped.
    """
    begun = time.perf_counter()
    progress = progress or Progress()
    check_amounts(samples=samples, batch_size=batch_size)
    place = choose_device(device)
    progress.phase("applying the plan")
    loaded, receipt = edited_model(plan)
    before = load_model(
        plan_spec(plan),
        classes=plan_classes(plan),
        head_seed=plan.model.head_seed,
    )
    outline = outline_module(before.module, before.card, before.head)
    outcome, title, notes = None, None, []
    if data is not None:
        _share_heads(before.module, loaded.module, before.head)
        images = open_images(data)
        title = images.outline.title
        fits = len(images.outline.classes) == plan.model.classes
        if not fits and plan.model.head == "new":
            raise PlanError(
                f"The plan was made for {plan.model.classes} classes and {title} has "
                f"{len(images.outline.classes)}. Preview it on the data it was made for."
            )
        size = outline.default_size if image_size is None else image_size
        check_image_size(outline, size)
        every = images.splits.get("val") or images.splits["train"]
        items = choose_items(every, samples, seed=seed)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(items), batch_size):
                if progress.should_stop():
                    raise Stopped("The preview was stopped.")
                progress.advance(start, len(items), "images")
                chosen = items[start : start + batch_size]
                yield read_batch(images, chosen, outline.preprocessing, size=size, device=place)

        progress.phase("running both networks")
        for module in (before.module, loaded.module):
            placed(module, place)
        outcome = compare_outputs(before.module, loaded.module, outline.layers, batches())
        if plan.model.head == "new":
            notes.append(
                "The head is new, so its accuracy is near chance before and after; the divergence "
                "of the outputs says how much the body has changed for it."
            )
        elif not fits:
            notes.append("Head and data differ in their classes: accuracy means nothing here.")
    layers = _layer_previews(outline, plan, receipt, outcome)
    return PlanPreview(
        plan_sha256=receipt.plan_sha256,
        parameters_touched=receipt.parameters_touched,
        parameters_total=receipt.parameters_total,
        samples=0 if outcome is None else outcome.samples,
        data_title=title,
        layers=layers,
        warnings=(*receipt.warnings, *_warnings(layers, outcome)),
        notes=tuple(notes),
        device=place.type,
        dtype="float32",
        wall_s=time.perf_counter() - begun,
        **_outputs(outcome),
    )


def _outputs(outcome: Outcome | None) -> dict[str, float | None]:
    if outcome is None:
        names = ("output_kl", "agreement", "accuracy_before", "accuracy_after")
        return dict.fromkeys((*names, "loss_before", "loss_after"))
    count = outcome.samples
    return {
        "output_kl": outcome.kl / count,
        "agreement": outcome.agreed / count,
        "accuracy_before": outcome.right[0] / count,
        "accuracy_after": outcome.right[1] / count,
        "loss_before": outcome.loss[0] / count,
        "loss_after": outcome.loss[1] / count,
    }


def _share_heads(before: nn.Module, after: nn.Module, head: frozenset[str]) -> None:
    own, other = before.state_dict(), after.state_dict()
    with torch.no_grad():
        for name in head:
            if name in own and name in other:
                other[name].copy_(own[name])


def _layer_previews(
    outline: ModelOutline, plan: ReinitPlan, receipt: ReinitReceipt, outcome: Outcome | None
) -> tuple[LayerPreview, ...]:
    changes: dict[str, list[TensorChange]] = {}
    owner = {p.name: layer.name for layer in outline.layers for p in layer.parameters}
    for change in receipt.changes:
        if not change.buffer:
            changes.setdefault(owner.get(change.name, change.layer), []).append(change)
    reset = {target.layer for target in plan.targets}
    rows = []
    for layer in outline.layers:
        changes_here = changes.get(layer.name, [])
        rows.append(
            LayerPreview(
                layer=layer.name,
                reset=layer.name in reset,
                parameters=layer.count,
                selected=sum(change.selected for change in changes_here),
                relative_change=_relative(changes_here),
                **({} if outcome is None else _behind(layer.name, outcome)),
            )
        )
    return tuple(rows)


def _relative(changes: list[TensorChange]) -> float | None:
    """Return ||new - old|| / ||old|| over the tensors of a layer that are written."""
    before = math.hypot(*(change.norm_before or 0.0 for change in changes))
    if not changes or before == 0:
        return 0.0 if not changes else None
    moved = math.hypot(
        *((change.relative_change or 0.0) * (change.norm_before or 0.0) for change in changes)
    )
    return moved / before


def _behind(layer: str, outcome: Outcome) -> dict[str, tuple[float, float]]:
    first, second = outcome.before.get(layer), outcome.after.get(layer)
    if first is None or second is None:
        return {}
    return {
        name: (getattr(first, name), getattr(second, name))
        for name in ("mean_abs", "saturated_fraction", "dormant_fraction")
    }


def _warnings(layers: tuple[LayerPreview, ...], outcome: Outcome | None) -> list[str]:
    rows = []
    for layer in layers:
        if layer.mean_abs is None:
            continue
        first, second = layer.mean_abs
        if not math.isfinite(second):
            rows.append(f'The activations behind "{layer.layer}" are no longer finite.')
        elif first > 0 and second > EXPLODED_RATIO * first:
            rows.append(
                f'The activations behind "{layer.layer}" grow {second / first:.0f}-fold: the edit '
                "explodes there."
            )
        elif first > 0 and second == 0:
            rows.append(f'The activations behind "{layer.layer}" are all 0 now.')
    if outcome is not None:
        kl = outcome.kl / outcome.samples
        if not math.isfinite(kl):
            rows.append("The outputs are no longer finite: training cannot start from here.")
        elif kl < NO_OP_KL:
            rows.append(
                f"The outputs hardly move (KL {kl:.1e} nats): on these images the edit is nearly a "
                "no-op."
            )
    return rows
