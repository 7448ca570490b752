"""Settings -> timm's optimiser, schedule and moving average of one arm."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from core.catalogue.trials import SCHEDULES
from core.errors import OptionError

# They need a second gradient.
_SECOND_ORDER = ("adahessian",)


def check_recipe(optimizer: str, schedule: str) -> None:
    """Refuse names that train nothing, by making one of each.

    Raises:
        OptionError: Unknown, or not to be had here.
    """
    if schedule not in SCHEDULES:
        raise OptionError(f'There is no schedule "{schedule}". There are: {", ".join(SCHEDULES)}.')
    known = [str(name) for name in list_optimizers() if name not in _SECOND_ORDER]
    if optimizer not in known:
        near = difflib.get_close_matches(optimizer, known, 3) or ["adamw", "sgd", "lion"]
        raise OptionError(
            f'There is no optimiser "{optimizer}" (timm\'s names). Near to it: {", ".join(near)}.'
        )
    weight = nn.Parameter(torch.zeros(2, 2))
    make_optimizer(optimizer, [{"params": [weight]}], lr=1e-3)


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], *, lr: float
) -> torch.optim.Optimizer:
    """Return timm's optimiser of that name.

    Args:
        name: timm's.
        groups: Each with "params", and "lr_scale" and "weight_decay" where they differ.
        lr: Learning rate.

    Raises:
        OptionError: It cannot be had here, or asks for more than these groups.
    """
    try:
        return create_optimizer_v2([dict(group) for group in groups], opt=name, lr=lr)
    except Exception as error:
        # Any: each optimiser asks for packages and accelerators in its own way.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f'The optimiser "{name}" cannot be used here: {first[:160]}. Take another, such as '
            "adamw."
        ) from error


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, steps: int, warmup: int
) -> Scheduler:
    """Return timm's schedule of that name, to be told of each step from 1.

    The rate rises linearly over the warm-up; the last step still trains.

    Args:
        name: One of `SCHEDULES`.
        optimizer: Whose rates it sets; "lr_scale" of a group multiplies them.
        steps: How many there will be.
        warmup: Steps of it.

    Raises:
        OptionError: It needs more steps, or a warm-up.
    """
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=steps + 1,
            warmup_epochs=min(warmup, steps - 1),
            warmup_lr=0.0,
            decay_rate=1.0,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
    except ValueError as error:
        raise OptionError(
            f'The schedule "{name}" cannot run over {steps} steps with a warm-up of {warmup}. Take '
            "cosine, or more steps and a warm-up."
        ) from error
    return schedule


def groups_of(
    parameters: Mapping[str, Tensor],
    scales: Mapping[str, float],
    *,
    weight_decay: float,
    apart: bool = False,
) -> list[dict[str, Any]]:
    """Return parameter groups of one rate and one weight decay each.

    Args:
        parameters: Those that train, by name, of any shape.
        scales: Name to the multiple of the learning rate; 1 where it is missing.
        weight_decay: Of parameters with two axes or more; the others have none.
        apart: Whether each tensor has a group of its own, so that its rate can change.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        scale, is_matrix = scales.get(name, 1.0), parameter.ndim > 1
        key = name if apart else (scale, is_matrix)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "lr_scale": scale,
                "weight_decay": weight_decay if is_matrix else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
