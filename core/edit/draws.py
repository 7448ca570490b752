"""Named schemes: what is written into a parameter that is reset.

A scheme sees the old values, the fresh twin's values for the same parameter, and a generator of
its own, and returns new values for the whole parameter; the caller keeps those of the selected
entries. Vectors (biases, norm weights) have no fan-in to speak of, so schemes that draw from one
copy the twin there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

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
        bias: Whether the parameter is a bias (of a layer or of a norm).
        selected: Flags in the parameter's shape, or None when all of it is rewritten.
    """

    old: Tensor
    fresh: Tensor
    generator: torch.Generator
    numbers: Mapping[str, float]
    bias: bool = False
    selected: Tensor | None = None


Draw = Callable[[Request], Tensor]
Granularity = Literal["layer", "unit", "weight"]
ANY: tuple[Granularity, ...] = ("layer", "unit", "weight")


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
        granularities: What it can be written into: whole layers, units, single weights.
        symbol: Its name in the paper it comes from, or "".
        needs_data: Whether its values depend on gradients, which a plan then carries.
    """

    name: str
    title: str
    description: str
    parameters: dict[str, float]
    resets_buffers: bool
    source: str
    granularities: tuple[Granularity, ...] = ANY
    symbol: str = ""
    needs_data: bool = False


SEED_PAPER = "Coetzer et al. 2026, arXiv:2603.20860"
# Where their published code writes something else after |w g| than after |w|.
WITH_GRADIENTS = {
    "Dist3": " After |w g| the authors' published code leaves matrices alone and only writes the "
    "zeros; here the utility does not change what is written.",
    "BA": " After |w g| the authors' published code writes 0 in place of the mean; here the "
    "utility does not change what is written.",
}


def _permute(asked: Request) -> Tensor:
    new = asked.old.flatten().clone()
    if asked.selected is None:
        return new[torch.randperm(len(new), generator=asked.generator)].reshape(asked.old.shape)
    places = asked.selected.flatten().nonzero().flatten()
    new[places] = new[places[torch.randperm(len(places), generator=asked.generator)]]
    return new.reshape(asked.old.shape)


def _mean(old: Tensor) -> Tensor:
    # In float64, because a float32 sum depends on the number of threads that take it.
    return old.double().mean()


def _mean_var(asked: Request) -> Tensor:
    old = asked.old
    noise = torch.randn(old.shape, generator=asked.generator, dtype=old.dtype)
    return noise * old.double().std(unbiased=False).to(old.dtype) + _mean(old).to(old.dtype)


def _seed_paper(values: Callable[[Request], Tensor]) -> Draw:
    """Return a scheme as the seed paper writes it: matrices get values, biases 0, gains stay."""

    def scheme(asked: Request) -> Tensor:
        if asked.old.ndim > 1:
            return values(asked)
        return torch.zeros_like(asked.old) if asked.bias else asked.old.clone()

    return scheme


def _one(asked: Request) -> Tensor:
    return torch.randn((), generator=asked.generator, dtype=torch.float64)


def _noise(spread: float) -> Callable[[Request], Tensor]:
    def values(asked: Request) -> Tensor:
        return spread * torch.randn(asked.old.shape, generator=asked.generator)

    return values


def _filled(value: Callable[[Request], Tensor]) -> Callable[[Request], Tensor]:
    return lambda asked: torch.full_like(asked.old, float(value(asked)))


def _mean_noise(asked: Request) -> Tensor:
    mean = _mean(asked.old)
    return mean + _one(asked) * mean / 10


def _bias_mean(asked: Request) -> Tensor:
    return torch.full_like(asked.old, float(_mean(asked.old))) if asked.bias else asked.old.clone()


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Return nearly the nearest isometry of a matrix (rows, columns): X <- 1.5 X - 0.5 X X'X.

    The matrix is first divided by its Frobenius norm. A singular value s of what is left grows
    by half in each step while it is small, so `steps` bounds how small a one reaches 1: about
    1.5 ** -steps. A zero matrix stays zero.

    Args:
        matrix: Float, two axes.
        steps: Number of iterations.

    Returns:
        Float64, in the shape of the matrix. Tall matrices get orthonormal columns, wide ones
        orthonormal rows.

    Source:
        Han et al., FIRE, arXiv:2602.08040.
    """
    current = matrix.double()
    tall = current.shape[0] >= current.shape[1]
    current = current if tall else current.T
    current = current / current.norm().clamp(min=torch.finfo(torch.float64).tiny)
    for _ in range(steps):
        current = 1.5 * current - 0.5 * current @ (current.T @ current)
    return current if tall else current.T


def _fire(asked: Request) -> Tensor:
    old = asked.old
    if old.ndim < 2:
        return old.clone()
    # A convolution has one matrix for each place of its kernel, (d_out, d_in) each.
    places = old.reshape(*old.shape[:2], -1)
    scale = 1.0
    if asked.numbers["scale"]:
        scale = math.sqrt(old.shape[0] / old.shape[1]) / places.shape[2]
    steps = int(asked.numbers["steps"])
    with one_thread():
        slices = [newton_schulz(places[:, :, place], steps) for place in range(places.shape[2])]
    return (scale * torch.stack(slices, dim=2)).reshape(old.shape)


NO_DIRECTION = (
    "DASH compares directions kernel by kernel, and this convolution's kernels are single "
    "numbers. Leave 1x1 convolutions out."
)


def dash_factors(old: Tensor, direction: Tensor, floor: float) -> Tensor:
    """Return what DASH multiplies a weight with, in the leading shape of the weight.

    The factor is clip(cos(direction, w), floor, 1) for each kernel (out, in) of a convolution,
    each row (out,) of a matrix, and the whole of a vector.

    Args:
        old: The weight.
        direction: Moving average of its negative gradients, in its shape.
        floor: Least factor, in [0, 1].

    Raises:
        PlanError: A 1x1 convolution: the cosine of single numbers is their sign alone.

    Source:
        Shin et al., DASH, NeurIPS 2024, arXiv:2410.23495.
    """
    if old.ndim > 2 and old[0, 0].numel() == 1:
        raise PlanError(NO_DIRECTION)
    axes = 2 if old.ndim > 2 else old.ndim - 1
    shape = old.shape[:axes]
    left = direction.double().reshape(math.prod(shape), -1)
    right = old.double().reshape(math.prod(shape), -1)
    cosine = torch.cosine_similarity(left, right, dim=1)
    return cosine.clamp(floor, 1.0).float().reshape(shape)


def _needs_values(_: Request) -> Tensor:
    raise PlanError(
        "DASH needs gradients: make the plan with --data or --diagnosis, which stores its factors."
    )


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread: what a matrix product rounds to depends on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _orthogonal(new: Tensor, generator: torch.Generator) -> None:
    # As `nn.init.orthogonal_` does, with the factorisation in float64 and on one thread: the same
    # plan must give the same bits.
    flat = torch.empty(new.shape[0], new[0].numel(), dtype=new.dtype)
    flat.normal_(0, 1, generator=generator)
    tall = flat if flat.shape[0] >= flat.shape[1] else flat.T
    with one_thread():
        q, r = torch.linalg.qr(tall.double())
    q = q * r.diagonal().sign()
    new.copy_((q if tall is flat else q.T).reshape(new.shape))


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
                granularities=("layer", "unit"),
                source="Saxe et al. 2014, arXiv:1312.6120",
            ),
            _matrix_only(_orthogonal),
        ),
        (
            SchemeInfo(
                name="zero",
                title="Zeros",
                description="Every entry becomes 0.",
                parameters={},
                resets_buffers=True,
                source=SEED_PAPER,
                symbol="Z",
            ),
            lambda asked: torch.zeros_like(asked.old),
        ),
        *(
            (
                SchemeInfo(
                    name=name,
                    title=title,
                    description=f"{what} in matrices and kernels; biases 0, gains as they are."
                    + WITH_GRADIENTS.get(symbol, ""),
                    parameters={},
                    resets_buffers=True,
                    source=SEED_PAPER,
                    symbol=symbol,
                ),
                _seed_paper(values),
            )
            for name, symbol, title, what, values in (
                (
                    *("mean", "M", "The tensor's mean", "The mean m of the whole tensor"),
                    _filled(lambda asked: _mean(asked.old)),
                ),
                (
                    *("mean-noise", "MN", "The mean, shifted", "m + e m / 10 with one e ~ N(0, 1)"),
                    _filled(_mean_noise),
                ),
                ("normal", "Norm", "Standard normal", "N(0, 1)", _noise(1.0)),
                ("normal-small", "Norm_small", "Small normal", "N(0, 0.2^2)", _noise(0.2)),
                (
                    *("one-normal", "Dist", "One number for all", "One number from N(0, 1)"),
                    _filled(_one),
                ),
                ("normal-tenth", "Dist3", "A tenth of a normal", "N(0, 0.1^2)", _noise(0.1)),
            )
        ),
        (
            SchemeInfo(
                name="bias-mean",
                title="Biases to their mean",
                description="Biases become the mean of their tensor; nothing else changes."
                + WITH_GRADIENTS["BA"],
                parameters={},
                resets_buffers=False,
                source=SEED_PAPER,
                symbol="BA",
            ),
            _bias_mean,
        ),
        (
            SchemeInfo(
                name="dash",
                title="Shrink by direction (DASH)",
                description="Each kernel or row is multiplied by the cosine between it and a "
                "moving average (rate alpha) of its negative gradients, at least lambda.",
                parameters={"alpha": 0.3, "lambda": 0.3},
                resets_buffers=False,
                source="Shin et al., NeurIPS 2024, arXiv:2410.23495",
                granularities=("layer",),
                needs_data=True,
            ),
            _needs_values,
        ),
        (
            SchemeInfo(
                name="fire",
                title="Nearest isometry (FIRE)",
                description="Each matrix (of a convolution one for each kernel place) goes towards "
                "the nearest one that keeps lengths, by Newton-Schulz steps; singular values below "
                "about 1.5 ** -steps of the matrix's norm stay short of it. With scale 1 times "
                "sqrt(d_out / d_in) / (kernel height x width). Vectors stay. Running statistics of "
                "a norm that reads the layer's output directly are reset to the fresh twin's, "
                "because they describe weights that are gone; the published code leaves them. In "
                "a transformer take queries and keys.",
                parameters={"steps": 10, "scale": 1},
                resets_buffers=True,
                source="Han et al., ICLR 2026, arXiv:2602.08040",
                granularities=("layer",),
            ),
            _fire,
        ),
    )
}


RANGES: dict[tuple[str, str], tuple[float, float]] = {
    ("dash", "alpha"): (0.0, 1.0),
    ("dash", "lambda"): (0.0, 1.0),
    ("fire", "steps"): (1, 1000),
    ("fire", "scale"): (0, 1),
}
WHOLE = {("fire", "steps"), ("fire", "scale")}


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
        low, high = RANGES.get((name, key), (-math.inf, math.inf))
        if not low <= value <= high:
            raise PlanError(f'Scheme "{name}": {key} is {value:g}. Give {low:g} to {high:g}.')
        if (name, key) in WHOLE and value != int(value):
            raise PlanError(f'Scheme "{name}": {key} is {value:g}. Give a whole number.')
    return {**known, **given}


def draw(scheme: str, asked: Request) -> Tensor:
    """Return new values in the shape and dtype of the old ones; the inputs are left alone."""
    with torch.no_grad():
        new = SCHEMES[scheme][1](asked)
    return new.to(asked.old.dtype)
