"""Arms and images -> step records: one short fine-tune."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ModelError
from core.network.layout import placed
from core.pixels import normalised
from core.records import StepRecord
from core.seeding import derived_seed, generator, random_state_kept
from core.trial.arms import Arm, Images, Settings

NORM_MOMENTUM = 0.1


EVAL_BATCH = 64


def batch_order(count: int, settings: Settings, *, seed: int) -> list[Tensor]:
    """Return the indices of each step's batch: whole shuffled passes, one after the other.

    A last batch of a pass that is not full is filled from the next pass, so that every step
    sees `batch_size` images (or all, where there are fewer).
    """
    size = min(settings.batch_size, count)
    needed = settings.steps * size
    stream: list[Tensor] = []
    drawn = 0
    passes = 0
    while drawn < needed:
        stream.append(torch.randperm(count, generator=generator(seed, "order", passes)))
        drawn += count
        passes += 1
    order = torch.cat(stream)[:needed]
    return list(order.split(size))


def finetune(
    arms: Sequence[Arm],
    images: Images,
    settings: Settings,
    *,
    seeds: Sequence[int],
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    on_trained: Callable[[str, int, nn.Module], None] = lambda arm, seed, model: None,
) -> Iterator[StepRecord]:
    """Train every arm under every seed and yield each step as it is done.

    Args:
        arms: The untouched one first. Each is built anew for every seed.
        images: Decoded images.
        settings: Shared by all arms.
        seeds: Each gives one head, one batch order and one stream of dropout masks.
        device: Where to train.
        should_stop: Asked before every step; iteration then simply ends.
        on_trained: Called with an arm, a seed and the network after its last step.

    Raises:
        ModelError: The loss is no longer finite, or a step failed.
    """
    begun = time.perf_counter()
    layout = torch.channels_last
    mean, std = images.mean, images.std
    train = images.train.to(device)
    val = images.val.to(device)
    train_labels, val_labels = images.train_labels.to(device), images.val_labels.to(device)
    for seed in seeds:
        models: list[nn.Module] = []
        optimisers: list[torch.optim.Optimizer] = []
        for arm in arms:
            model = placed(arm.build(seed), device)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in arm.frozen)
            _quicken_norms(model)
            models.append(model)
            optimisers.append(_optimiser(model, settings, arm))
        if should_stop():
            return
        for arm, model in zip(arms, models, strict=True):
            accuracy = evaluate(
                model, val, val_labels, mean, std, should_stop, who=f'arm "{arm.name}"'
            )
            if accuracy is None:
                return
            yield StepRecord(
                arm=arm.name,
                seed=seed,
                step=0,
                train_loss=None,
                val_accuracy=accuracy,
                wall_s=time.perf_counter() - begun,
            )
        for step, indices in enumerate(batch_order(len(train), settings, seed=seed), start=1):
            chosen = indices.to(device)
            inputs = normalised(train[chosen], mean, std).contiguous(memory_format=layout)
            labels = train_labels[chosen]
            rate = settings.lr * min(1.0, step / max(1, settings.warmup_steps))
            due = step % settings.eval_every == 0 or step == settings.steps
            for arm, model, optimiser in zip(arms, models, optimisers, strict=True):
                if should_stop():
                    return
                for group in optimiser.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                with random_state_kept(derived_seed(seed, "step", step)):
                    loss = _train_step(model, optimiser, inputs, labels, arm.name, step)
                accuracy = None
                if due:
                    accuracy = evaluate(
                        model,
                        val,
                        val_labels,
                        mean,
                        std,
                        should_stop,
                        who=f'arm "{arm.name}" at step {step}',
                    )
                yield StepRecord(
                    arm=arm.name,
                    seed=seed,
                    step=step,
                    train_loss=loss,
                    val_accuracy=accuracy,
                    wall_s=time.perf_counter() - begun,
                )
        for arm, model in zip(arms, models, strict=True):
            on_trained(arm.name, seed, model)


def _quicken_norms(model: nn.Module) -> None:
    # Some networks follow their running statistics so slowly (0.01 a step) that a short run is
    # evaluated with those of the old data, or of a layer before its reset.
    for module in model.modules():
        momentum = getattr(module, "momentum", None)
        if getattr(module, "running_mean", None) is not None and isinstance(momentum, float):
            setattr(module, "momentum", max(momentum, NORM_MOMENTUM))  # noqa: B010 - untyped here


def _optimiser(model: nn.Module, settings: Settings, arm: Arm) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (name in arm.head, parameter.ndim > 1, arm.rates.get(name, 1.0))
            groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise ModelError("Every parameter is frozen: there is nothing to train. Unfreeze a layer.")
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr_scale": factor * (settings.rate_of_head / settings.lr if is_head else 1.0),
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
            }
            for (is_head, is_matrix, factor), parameters in groups.items()
        ],
        lr=settings.lr,
    )


def _train_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    arm: str,
    step: int,
) -> float:
    model.train()
    optimiser.zero_grad(set_to_none=True)
    try:
        output = model(inputs)
        # Networks with auxiliary heads return a named tuple in training; the main one is first.
        logits = output if isinstance(output, Tensor) else output[0]
        loss = F.cross_entropy(logits, labels)
        loss.backward()
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f'Arm "{arm}" cannot take step {step}: {first[:200]}. Try a smaller batch or another '
            "image size."
        ) from error
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(
            f'The loss of arm "{arm}" is no longer finite at step {step}. Lower the learning rate.'
        )
    optimiser.step()
    return value


@torch.no_grad()
def evaluate(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    should_stop: Callable[[], bool] = lambda: False,
    *,
    who: str = "the network",
) -> float | None:
    """Return the share of images classified right, in [0, 1]; None when stopped in between.

    Args:
        model: The network.
        pixels: uint8 (n, 3, h, w), where the network is.
        labels: (n,).
        mean: Of the three colours, in [0, 1].
        std: Likewise.
        should_stop: Asked before each batch.
        who: The network, for the message.

    Raises:
        ModelError: Outputs for some images are not finite: the answer would be a guess.
    """
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=pixels.device)
    broken = torch.zeros((), dtype=torch.int64, device=pixels.device)
    for start in range(0, len(pixels), EVAL_BATCH):
        if should_stop():
            return None
        inputs = normalised(pixels[start : start + EVAL_BATCH], mean, std)
        logits = model(inputs.contiguous(memory_format=torch.channels_last))
        right += (logits.argmax(1) == labels[start : start + EVAL_BATCH]).sum()
        broken += (~logits.isfinite()).any(1).sum()
    if int(broken):
        raise ModelError(
            f"The outputs of {who} are not finite on {int(broken)} of {len(pixels)} validation "
            "images: the network overflows. Check its weights, or lower the learning rate."
        )
    return int(right) / len(pixels)
