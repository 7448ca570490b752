"""Arms and images -> step records: short fine-tunes side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn

from core.errors import ModelError
from core.network.layout import placed
from core.pixels import normalised
from core.records import StepRecord
from core.seeding import derived_seed, generator, random_state_kept
from core.trial.arms import Arm, Images, Settings
from core.trial.augment import augmenter
from core.trial.figures import bits
from core.trial.recipe import groups_of, make_optimizer, make_schedule

NORM_MOMENTUM = 0.1

EVAL_BATCH = 64
# Batches whose relative gradients are averaged, as in the authors' code.
GRADIENT_BATCHES = 5


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
        seeds: Each gives one head, one batch order, one stream of augmentations and one of
            dropout masks.
        device: Where to train.
        should_stop: Asked before every step; iteration then simply ends.
        on_trained: Called with an arm, a seed and the network after its last step.

    Raises:
        LimberError: The loss is no longer finite, a step failed, or the optimiser cannot be used.
    """
    begun = time.perf_counter()
    held = Images(
        train=images.train.to(device),
        train_labels=images.train_labels.to(device),
        val=images.val.to(device),
        val_labels=images.val_labels.to(device),
        mean=images.mean,
        std=images.std,
    )
    for seed in seeds:
        order = batch_order(len(held.train), settings, seed=seed)
        batches = _Batches(held, settings, order, seed)
        learners = [_Learner(arm, settings, batches, seed, device) for arm in arms]
        if should_stop():
            return
        for step in range(settings.steps + 1):
            due = step % settings.eval_every == 0 or step == settings.steps
            for learner in learners:
                if should_stop():
                    return
                loss = learner.take(step) if step else None
                right = learner.answers(held, should_stop, step) if due else None
                if due and right is None and not step:
                    return
                yield StepRecord(
                    arm=learner.arm.name,
                    seed=seed,
                    step=step,
                    train_loss=loss,
                    val_accuracy=None if right is None else float(right.sum()) / len(right),
                    wall_s=time.perf_counter() - begun,
                    answers=bits(right.numpy())
                    if right is not None and step == settings.steps
                    else None,
                )
        for learner in learners:
            on_trained(learner.arm.name, seed, learner.evaluated)


class _Batches:
    """The batches of one seed, which its arms share: each is augmented once for a stream."""

    def __init__(
        self, images: Images, settings: Settings, order: Sequence[Tensor], seed: int
    ) -> None:
        self._images, self._order, self._seed = images, order, seed
        self._augment = augmenter(settings.augment, images.train.shape[-1])
        self._kept: dict[int, tuple[int, Tensor, Tensor]] = {}
        self.passes = max(1, len(images.train) // len(order[0]))

    def at(self, step: int, stream: int) -> tuple[Tensor, Tensor]:
        """Return inputs (n, 3, h, w), channels last, and labels (n,) of a step from 1."""
        kept = self._kept.get(stream)
        if kept is None or kept[0] != step:
            chosen = self._order[step - 1].to(self._images.train.device)
            with random_state_kept(derived_seed(self._seed, "augment", stream, step)):
                pixels = self._augment(self._images.train[chosen])
            inputs = self._ready(pixels)
            kept = (step, inputs, self._images.train_labels[chosen])
            self._kept[stream] = kept
        return kept[1], kept[2]

    def plain(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Return a batch of a pass without augmentation, or None behind the last."""
        if number >= len(self._order):
            return None
        chosen = self._order[number].to(self._images.train.device)
        return self._ready(self._images.train[chosen]), self._images.train_labels[chosen]

    def _ready(self, pixels: Tensor) -> Tensor:
        inputs = normalised(pixels, self._images.mean, self._images.std)
        return inputs.contiguous(memory_format=torch.channels_last)


class _Learner:
    """One arm under one seed: its network, optimiser and schedule."""

    def __init__(
        self, arm: Arm, settings: Settings, batches: _Batches, seed: int, device: torch.device
    ) -> None:
        self.arm, self._settings, self._batches, self._seed = arm, settings, batches, seed
        self.model = placed(arm.build(seed), device)
        self._device = device
        _quicken_norms(self.model)
        self._head_steps = round(arm.head_first * settings.steps)
        self._average = (
            ModelEmaV3(self.model, decay=settings.ema, use_warmup=True) if settings.ema else None
        )
        self._begin(alone=self._head_steps > 0)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the moving average where there is one."""
        return self.model if self._average is None else self._average.module

    def _begin(self, *, alone: bool) -> None:
        """Start a phase with a fresh optimiser and schedule; alone, only the head trains."""
        arm, settings = self.arm, self._settings
        self._alone = alone
        self._first = self._head_steps if not alone and self._head_steps else 0
        length = self._head_steps if alone else settings.steps - self._first
        for name, parameter in self.model.named_parameters():
            trains = name not in arm.frozen and (name in arm.head or not alone)
            parameter.requires_grad_(trains)
        own = replace(settings, lr=settings.lr * arm.lr_factor)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not trained:
            raise ModelError(
                "Every parameter is frozen: there is nothing to train. Unfreeze a layer."
            )
        self._scales = {
            name: arm.rates.get(name, 1.0)
            * (own.rate_of_head / own.lr if name in arm.head else 1.0)
            for name in trained
        }
        groups = groups_of(
            trained,
            self._scales,
            weight_decay=settings.weight_decay,
            apart=arm.relative_gradients,
        )
        self._optimizer = make_optimizer(settings.optimizer, groups, lr=own.lr)
        self._schedule = make_schedule(
            settings.schedule, self._optimizer, steps=length, warmup=settings.warmup_steps
        )

    def take(self, step: int) -> float:
        """Take one step, from 1; return its loss in nats."""
        if self._alone and step > self._head_steps:
            self._begin(alone=False)
        if self.arm.relative_gradients and (step - 1) % self._batches.passes == 0:
            self._follow_gradients(step)
        self._schedule.step_update(step - self._first)
        inputs, labels = self._batches.at(step, self.arm.stream)
        with random_state_kept(derived_seed(self._seed, "step", step)):
            loss = self._train(inputs, labels, step)
        if self._average is not None:
            self._average.update(self.model, step=step)
        return loss

    def _mode(self) -> None:
        self.model.train()
        if not self._alone:
            return
        # What stands still must give the same features each time: no dropout, no new statistics.
        for name, module in self.model.named_modules():
            own = [f"{name}.{each}".lstrip(".") for each, _ in module.named_parameters()]
            if not any(each in self.arm.head for each in own):
                module.eval()

    def _train(self, inputs: Tensor, labels: Tensor, step: int) -> float:
        self._mode()
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with self._mixed():
                output = self.model(inputs)
            loss = F.cross_entropy(
                _logits(output).float(), labels, label_smoothing=self._settings.label_smoothing
            )
            loss.backward()
        except (RuntimeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f'Arm "{self.arm.name}" cannot take step {step}: {first[:200]}. Try a smaller '
                "batch or another image size."
            ) from error
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f'The loss of arm "{self.arm.name}" is no longer finite at step {step}. Lower the '
                "learning rate."
            )
        self._optimizer.step()
        return value

    def _mixed(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.bf16)

    def _follow_gradients(self, step: int) -> None:
        """Set each tensor's rate by its relative gradient, over the first batches of a pass."""
        self.model.train()
        batches = []
        for number in range(step - 1, step - 1 + GRADIENT_BATCHES):
            batch = self._batches.plain(number)
            if batch is not None:
                batches.append(batch)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with random_state_kept(derived_seed(self._seed, "gradients", step)):
            weights = relative_gradients(self.model, batches, trained, self.arm.head)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        for group in self._optimizer.param_groups:
            (name,) = group["names"]
            group["lr_scale"] = self._scales[name] * weights.get(name, 1.0)

    @torch.no_grad()
    def answers(
        self, images: Images, should_stop: Callable[[], bool], step: int
    ) -> Bool[Tensor, " image"] | None:
        """Return which validation images are right, on the host; None when stopped in between."""
        at = f" at step {step}" if step else ""
        with self._mixed():
            return evaluate(
                self.evaluated,
                images.val,
                images.val_labels,
                images.mean,
                images.std,
                should_stop,
                who=f'arm "{self.arm.name}"{at}',
            )


def relative_gradients(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    parameters: Mapping[str, Tensor],
    head: frozenset[str],
) -> dict[str, float]:
    """Return each tensor's gradient norm over its own norm, over the largest of the backbone.

    Args:
        model: In the mode it trains in; its parameters must want gradients.
        batches: Pairs of inputs (n, 3, h, w) and labels (n,).
        parameters: Those that train, of any shape, by name.
        head: Names that are left out: a new head's tensors are near 0, and would set every other
            rate to nearly nothing.

    Returns:
        Name to a number in [0, 1], the mean over batches; 1 for a tensor that is 0 throughout,
        which has no relative gradient.

    Source:
        Auto-RGN of Lee et al. 2022, arXiv:2210.11466.
    """
    names = [name for name in parameters if name not in head]
    sums = dict.fromkeys(names, 0.0)
    for inputs, labels in batches:
        loss = F.cross_entropy(_logits(model(inputs)).float(), labels)
        gradients = torch.autograd.grad(
            loss, [parameters[name] for name in names], allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            size = float(parameters[name].detach().norm())
            if gradient is not None and size > 0:
                sums[name] += float(gradient.norm()) / size / len(batches)
    largest = max(sums.values(), default=0.0) or 1.0
    return {
        name: 1.0 if float(parameters[name].detach().norm()) == 0 else value / largest
        for name, value in sums.items()
    }


def _logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    # Networks with auxiliary heads return a named tuple in training; the main one is first.
    return output if isinstance(output, Tensor) else output[0]


def _quicken_norms(model: nn.Module) -> None:
    # Some networks follow their running statistics so slowly (0.01 a step) that a short run is
    # evaluated with those of the old data, or of a layer before its reset.
    for module in model.modules():
        momentum = getattr(module, "momentum", None)
        if getattr(module, "running_mean", None) is not None and isinstance(momentum, float):
            setattr(module, "momentum", max(momentum, NORM_MOMENTUM))  # noqa: B010 - untyped here


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
) -> Bool[Tensor, " image"] | None:
    """Return which images are classified right, on the host; None when stopped in between.

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
    right, broken = [], torch.zeros((), dtype=torch.int64, device=pixels.device)
    for start in range(0, len(pixels), EVAL_BATCH):
        if should_stop():
            return None
        inputs = normalised(pixels[start : start + EVAL_BATCH], mean, std)
        logits = _logits(model(inputs.contiguous(memory_format=torch.channels_last)))
        right.append(logits.argmax(1) == labels[start : start + EVAL_BATCH])
        broken += (~logits.isfinite()).any(1).sum()
    if int(broken):
        raise ModelError(
            f"The outputs of {who} are not finite on {int(broken)} of {len(pixels)} validation "
            "images: the network overflows. Check its weights, or lower the learning rate."
        )
    return torch.cat(right).cpu()
