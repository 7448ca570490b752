"""Named schemes: what is written into a parameter that is reset.

A scheme sees the old values, the fresh twin's values for the same parameter, and a generator of
its own, and returns new values. Vectors (biases, norm weights) have no fan-in to speak of, so
schemes that draw from one copy the twin there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import PlanError
from core.records.base import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One parameter to redraw.

    Attributes:
        old: The values now.
        fresh: The fresh twin's values of the same parameter.
        generator: CPU generator used by this parameter alone.
        numbers: The scheme's numbers, as `scheme_numbers` returns them.
    """

    old: Tensor
    fresh: Tensor
    generator: torch.Generator
    numbers: Mapping[str, float]


Draw = Callable[[Request], Tensor]


class SchemeInfo(Value):
    """One scheme.

    Attributes:
        name: Key in a plan.
        title: Plain words.
        description: What is written, and into what.
        parameters: Its numbers with their defaults.
        resets_buffers: Whether running statistics go back to the twin's as well. They describe
            weights that are gone, unless the scheme keeps part of them.
        source: Paper or "standard".
    """

    name: str
    title: str
    description: str
    parameters: dict[str, float]
    resets_buffers: bool
    source: str


def _permute(asked: Request) -> Tensor:
    order = torch.randperm(asked.old.numel(), generator=asked.generator)
    return asked.old.flatten()[order].reshape(asked.old.shape)


def _mean_var(asked: Request) -> Tensor:
    old = asked.old
    noise = torch.randn(old.shape, generator=asked.generator, dtype=old.dtype)
    return noise * old.std(unbiased=False) + old.mean()


def _shrink_perturb(asked: Request) -> Tensor:
    return asked.numbers["shrink"] * asked.old + asked.numbers["perturb"] * asked.fresh


def _matrix_only(fill: Callable[[Tensor, torch.Generator], object]) -> Draw:
    def scheme(asked: Request) -> Tensor:
        if asked.old.ndim < 2:
            return asked.fresh.clone()
        new = torch.empty_like(asked.old, memory_format=torch.contiguous_format)
        fill(new, asked.generator)
        return new

    return scheme


def _trunc_normal(new: Tensor, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(new, std=0.02, a=-0.04, b=0.04, generator=generator)


SCHEMES: dict[str, tuple[SchemeInfo, Draw]] = {
    info.name: (info, draw)
    for info, draw in (
        (
            SchemeInfo(
                name="architecture",
                title="The architecture's own initialisation",
                description="Copies the layer from a fresh twin: the same constructor, no weights, "
                "this seed. Zero-initialised norms and layer scales come out as the authors meant.",
                parameters={},
                resets_buffers=True,
                source="the library's constructor",
            ),
            lambda asked: asked.fresh.clone(),
        ),
        (
            SchemeInfo(
                name="mean-var",
                title="Same mean and spread, no features",
                description="Independent normal values with the old tensor's mean and variance.",
                parameters={},
                resets_buffers=True,
                source="Raghu et al., Transfusion, NeurIPS 2019, arXiv:1902.07208",
            ),
            _mean_var,
        ),
        (
            SchemeInfo(
                name="permute",
                title="Shuffle within the tensor",
                description="The old values in random order: their spread stays, structure goes.",
                parameters={},
                resets_buffers=True,
                source="standard",
            ),
            _permute,
        ),
        (
            SchemeInfo(
                name="shrink-perturb",
                title="Shrink and perturb",
                description="shrink * old + perturb * fresh twin. (1, 0) changes nothing.",
                parameters={"shrink": 0.4, "perturb": 0.1},
                resets_buffers=False,
                source="Ash & Adams, NeurIPS 2020, arXiv:1910.08475",
            ),
            _shrink_perturb,
        ),
        (
            SchemeInfo(
                name="kaiming-normal",
                title="Kaiming normal",
                description="N(0, 2 / fan-in) for matrices and kernels; vectors from the twin.",
                parameters={},
                resets_buffers=True,
                source="He et al. 2015, arXiv:1502.01852",
            ),
            _matrix_only(
                lambda new, generator: nn.init.kaiming_normal_(
                    new, nonlinearity="relu", generator=generator
                )
            ),
        ),
        (
            SchemeInfo(
                name="xavier-uniform",
                title="Xavier uniform",
                description="Uniform within sqrt(6 / (fan-in + fan-out)); vectors from the twin.",
                parameters={},
                resets_buffers=True,
                source="Glorot & Bengio, AISTATS 2010",
            ),
            _matrix_only(lambda new, generator: nn.init.xavier_uniform_(new, generator=generator)),
        ),
        (
            SchemeInfo(
                name="trunc-normal",
                title="Truncated normal",
                description="N(0, 0.02^2) cut at two standard deviations; vectors from the twin.",
                parameters={},
                resets_buffers=True,
                source="standard in Vision Transformers",
            ),
            _matrix_only(_trunc_normal),
        ),
        (
            SchemeInfo(
                name="orthogonal",
                title="Orthogonal",
                description="Orthonormal rows or columns of the flattened matrix; vectors from the "
                "fresh twin.",
                parameters={},
                resets_buffers=True,
                source="Saxe et al. 2014, arXiv:1312.6120",
            ),
            _matrix_only(lambda new, generator: nn.init.orthogonal_(new, generator=generator)),
        ),
        (
            SchemeInfo(
                name="zero",
                title="Zeros",
                description="Every entry becomes 0.",
                parameters={},
                resets_buffers=True,
                source="Coetzer et al. 2026, arXiv:2603.20860 (Z)",
            ),
            lambda asked: torch.zeros_like(asked.old),
        ),
    )
}


def list_schemes() -> tuple[SchemeInfo, ...]:
    """Return every scheme, the default first."""
    return tuple(info for info, _ in SCHEMES.values())


def scheme_numbers(name: str, given: Mapping[str, float]) -> dict[str, float]:
    """Return a scheme's numbers with the given ones put in.

    Raises:
        PlanError: Unknown scheme, unknown number, or a number that is not finite.
    """
    if name not in SCHEMES:
        raise PlanError(
            f'There is no scheme "{name}". Known: {", ".join(SCHEMES)}. See python -m core list '
            "schemes."
        )
    known = SCHEMES[name][0].parameters
    for key, value in given.items():
        if key not in known:
            allowed = ", ".join(known) if known else "none"
            raise PlanError(f'Scheme "{name}" has no number "{key}". It takes: {allowed}.')
        if not math.isfinite(value):
            raise PlanError(f'Scheme "{name}": {key} is {value}. Give a finite number.')
    return {**known, **given}


def draw(scheme: str, asked: Request) -> Tensor:
    """Return new values in the shape and dtype of the old ones; the inputs are left alone."""
    with torch.no_grad():
        new = SCHEMES[scheme][1](asked)
    return new.to(asked.old.dtype)
