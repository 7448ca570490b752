"""A plan looked at before training, checked afterwards, and packed for another trainer."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.edit.apply import other_bits
from core.edit.effect import Outcome, compare_outputs
from core.errors import PlanError, Stopped
from core.export import TRAINERS, named_after, snippet, write_plan, write_whole
from core.files.inputs import in_words
from core.files.plans import plan_json
from core.load import choose_items, load_model, open_images, state_sha256
from core.load.checkpoints import SPARE_BYTES, read_checkpoint, state_bytes
from core.network.outline import outline_module
from core.pipeline import (
    DEFAULT_BATCH_SIZE,
    Watcher,
    check_amounts,
    check_image_size,
    choose_device,
    edited_model,
    edited_weights,
    plan_classes,
    plan_spec,
    read_batch,
    reset_weights,
)
from core.portable import SCRIPT
from core.records import (
    DataSpec,
    LayerPreview,
    ModelOutline,
    PlanPreview,
    ReinitPlan,
    ReinitReceipt,
    TensorChange,
    Verification,
    WeightDifference,
)
from core.text import printable

PREVIEW_SAMPLES = 64
# Mean KL in nats below which the outputs have hardly moved.
NO_OP_KL = 1e-4
# A file of so many times a plan's weights is not read through to say that they differ.
MOST_FOUND = 4
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
    watcher: Watcher | None = None,
) -> PlanPreview:
    """Return what a plan does to weights, activations and outputs before any training.

    Both networks get the untouched head, so that outputs differ by the body alone.

    Args:
        plan: What to look at.
        data: Images of its validation part (or its training part where there is no other) to run
            both networks on; None looks at the weights alone.
        samples: At most so many images, classes in turn.
        batch_size: Images a batch.
        image_size: Side in pixels; None takes the model's default.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the choice of images.
        watcher: Progress and stop.

    Raises:
        LimberError: Bad input, or stopped.
    """
    begun = time.perf_counter()
    watcher = watcher or Watcher()
    check_amounts(samples=samples, batch_size=batch_size)
    place = choose_device(device)
    watcher.phase("applying the plan")
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
                if watcher.should_stop():
                    raise Stopped("The preview was stopped.")
                watcher.progress(start, len(items), "images")
                chosen = items[start : start + batch_size]
                yield read_batch(images, chosen, outline.preprocessing, size=size, device=place)

        watcher.phase("running both networks")
        for module in (before.module, loaded.module):
            module.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        found = changes.get(layer.name, [])
        rows.append(
            LayerPreview(
                layer=layer.name,
                reset=layer.name in reset,
                parameters=layer.count,
                selected=sum(change.selected for change in found),
                relative_change=_relative(found),
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


def verify_weights(plan: ReinitPlan, path: Path) -> Verification:
    """Return whether a file of weights is, bit for bit, what a plan makes.

    Raises:
        LimberError: The plan does not fit, or the file cannot be read.
    """
    expected, receipt = edited_weights(plan)
    found = read_checkpoint(path)
    held, made = state_bytes(found), state_bytes(expected)
    if held > MOST_FOUND * made + SPARE_BYTES:
        raise PlanError(
            f'"{path.name}" holds {in_words(held)} of weights, and the plan makes '
            f"{in_words(made)}: it is not what the plan makes. Give the file that apply wrote."
        )
    differing: dict[str, int] = {}
    for name in sorted(expected.keys() & found.keys()):
        own, other = expected[name], found[name]
        if own.shape != other.shape or own.dtype != other.dtype:
            differing[name] = own.numel()
        else:
            odd = int(other_bits(own, other).sum())
            if odd:
                differing[name] = odd
    missing = tuple(sorted(expected.keys() - found.keys()))
    unexpected = tuple(sorted(found.keys() - expected.keys()))
    digest = state_sha256(found)
    return Verification(
        matches=digest == receipt.after_sha256,
        tensors=len(expected),
        differing=differing,
        missing=missing,
        unexpected=unexpected,
        expected_sha256=receipt.after_sha256,
        found_sha256=digest,
    )


def export_plan(plan: ReinitPlan, folder: Path, *, watcher: Watcher | None = None) -> ReinitReceipt:
    """Write all that another trainer needs, and return the receipt.

    The folder gets `plan.json` (and its companion), `reinit.safetensors`, `apply_plan.py` and
    `USE.md` with a snippet for each trainer.

    Raises:
        LimberError: The plan does not fit, or the folder cannot be written.
    """
    (watcher or Watcher()).phase("applying the plan")
    # Before the weights are made: the receipt holds this very plan's digest.
    plan = named_after(plan, folder / "plan.json")
    receipt = reset_weights(plan, folder / "reinit.safetensors")
    write_plan(plan, folder / "plan.json")
    write_whole(folder / "apply_plan.py", SCRIPT.read_text(encoding="utf-8"))
    parts = [f"# {printable(plan.name)}\n\n{_files(plan, receipt)}"]
    for trainer in TRAINERS:
        if plan.model.source == "torchvision" and trainer == "timm":
            continue
        parts.append(f"## {trainer}\n\n```\n{snippet(plan, trainer)}```\n")
    write_whole(folder / "USE.md", "\n".join(parts))
    return receipt


def _files(plan: ReinitPlan, receipt: ReinitReceipt) -> str:
    digest = hashlib.sha256(plan_json(plan).encode()).hexdigest()
    return (
        f"- `plan.json`: what is reset, {receipt.parameters_touched:,} of "
        f"{receipt.parameters_total:,} parameters (SHA-256 {digest}).\n"
        "- `reinit.safetensors`: the edited weights (state SHA-256 "
        f"{receipt.after_sha256}).\n"
        "- `apply_plan.py`: loads, freezes and checks; needs torch and safetensors alone.\n"
    )


def changed_entries(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensor to flags of the entries that differ: a plan turned back into what it changed.

    Args:
        before: A state.
        after: The same state with a plan applied.

    Returns:
        Only tensors in which something differs; bool, in the tensor's shape.
    """
    found = {name: other_bits(before[name], after[name]) for name in before}
    return {name: flags for name, flags in found.items() if bool(flags.any())}


def diff_weights(first: Path, second: Path) -> tuple[WeightDifference, ...]:
    """Return in which tensors two files of weights differ, and by how much.

    Raises:
        ModelError: A file cannot be read.
    """
    own, other = read_checkpoint(first), read_checkpoint(second)
    rows = []
    for name in sorted(own.keys() | other.keys()):
        left, right = own.get(name), other.get(name)
        if left is None or right is None or left.shape != right.shape or left.dtype != right.dtype:
            count = max(each.numel() for each in (left, right) if each is not None)
            rows.append(
                WeightDifference(name=name, entries=count, changed=count, relative_change=None)
            )
            continue
        changed = int(other_bits(left, right).sum())
        if changed:
            wide = torch.complex128 if left.is_complex() else torch.float64
            norm = float(left.to(wide).norm())
            moved = float((right.to(wide) - left.to(wide)).norm())
            rows.append(
                WeightDifference(
                    name=name,
                    entries=left.numel(),
                    changed=changed,
                    relative_change=moved / norm if norm > 0 else None,
                )
            )
    return tuple(rows)
