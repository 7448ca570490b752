"""What takes part in a trial: its settings, its images and its arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from core.errors import OptionError

HEAD_LR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an arm is trained: AdamW with a linear warm-up to a constant learning rate.

    Attributes:
        steps: Optimiser steps.
        batch_size: Images a step.
        lr: Learning rate after the warm-up.
        head_lr: Learning rate of the new head; None takes `lr`, but `HEAD_LR` at least: the
            head is new, the rest is not.
        weight_decay: Decoupled, on parameters with two axes or more.
        warmup_steps: Steps over which the rate rises linearly.
        eval_every: Steps between evaluations; the last step is always evaluated.
    """

    steps: int
    batch_size: int
    lr: float
    head_lr: float | None = None
    weight_decay: float = 0.01
    warmup_steps: int = 5
    eval_every: int = 10

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for name, value, least, most in (
            ("steps", self.steps, 1, 1_000_000),
            ("batch size", self.batch_size, 2, 65_536),
            ("evaluation interval", self.eval_every, 1, 1_000_000),
        ):
            if not least <= value <= most:
                raise OptionError(f"The {name} is {value}; give {least:,} to {most:,}.")
        for rate in (self.lr, self.rate_of_head):
            if not 0 < rate <= 100:
                raise OptionError(
                    f"The learning rate is {rate:g}; give a number above 0, such as 3e-4."
                )

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
    """One way to start: its name, a function from seed to a network on the CPU, frozen names.

    `frozen` holds parameter names that do not train, `head` those of the new head, and `rates`
    those that train at a multiple of their learning rate.
    """

    name: str
    build: Callable[[int], nn.Module]
    frozen: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict)
