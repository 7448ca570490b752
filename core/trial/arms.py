"""What takes part in a trial: its settings, its images and its arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from core.catalogue.trials import DEFAULT_AUGMENT, Augmentation
from core.errors import OptionError

HEAD_LR = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an arm is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Images a step.
        lr: Learning rate after the warm-up.
        head_lr: Learning rate of the new head; None takes `lr`, but `HEAD_LR` at least: the
            head is new, the rest is not.
        weight_decay: On parameters with two axes or more, as the optimiser has it.
        warmup_steps: Steps over which the rate rises linearly.
        eval_every: Steps between evaluations; the last step is always evaluated.
        optimizer: timm's name.
        schedule: timm's name.
        augment: What is done to training images.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        ema: Decay of a moving average of the weights, which is what is evaluated; 0 for none.
        bf16: Whether passes run in bfloat16 where the device's autocast does so.
    """

    steps: int
    batch_size: int
    lr: float
    head_lr: float | None = None
    weight_decay: float = 0.01
    warmup_steps: int = 5
    eval_every: int = 10
    optimizer: str = "adamw"
    schedule: str = "cosine"
    augment: tuple[Augmentation, ...] = DEFAULT_AUGMENT
    label_smoothing: float = 0.0
    ema: float = 0.0
    bf16: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for name, value, least, most in (
            ("steps", self.steps, 1, 1_000_000),
            ("batch size", self.batch_size, 2, 65_536),
            ("evaluation interval", self.eval_every, 1, 1_000_000),
            ("warm-up", self.warmup_steps, 0, 1_000_000),
        ):
            if not least <= value <= most:
                raise OptionError(f"The {name} is {value}; give {least:,} to {most:,}.")
        for rate in (self.lr, self.rate_of_head):
            if not 0 < rate <= 100:
                raise OptionError(
                    f"The learning rate is {rate:g}; give a number above 0, such as 3e-4."
                )
        for name, number in (
            ("label smoothing", self.label_smoothing),
            ("decay of the moving average", self.ema),
        ):
            if not 0 <= number < 1:
                raise OptionError(f"The {name} is {number:g}; give 0 or more, below 1.")
        if not 0 <= self.weight_decay <= 100:
            raise OptionError(f"The weight decay is {self.weight_decay:g}; give 0 to 100.")

    @property
    def rate_of_head(self) -> float:
        """Learning rate of the new head."""
        return max(self.lr, HEAD_LR) if self.head_lr is None else self.head_lr


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Decoded images: uint8 (n, 3, size, size) and labels (n,), with the normalisation."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to start and to train.

    Attributes:
        name: What it is called.
        build: From a seed to a network on the CPU.
        frozen: Names of parameters that do not train.
        head: Those of the new head.
        rates: Those that train at a multiple of their learning rate.
        head_first: Share of the steps in which only the head trains and all else stands still,
            running statistics included; 1 for a linear probe.
        relative_gradients: Whether rates follow relative gradient norms (Auto-RGN).
        lr_factor: Multiple of the settings' learning rate.
        stream: Which stream of augmentations it sees; arms of one stream see the same images.
    """

    name: str
    build: Callable[[int], nn.Module]
    frozen: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict)
    head_first: float = 0.0
    relative_gradients: bool = False
    lr_factor: float = 1.0
    stream: int = 0
