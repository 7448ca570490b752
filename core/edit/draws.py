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

import torch
from torch import Tensor, nn

from core.errors import PlanError, Remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One parameter to redraw.

    Attributes:
        old: The values now.
        fresh: The fresh twin's values of the same parameter.
        generator: CPU generator used only by this parameter.
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
        PlanError: A 1x1 convolution: the cosine of single numbers is only their sign.

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
        "DASH needs gradients, and the plan stores no factors made of them.",
        Remedy.PLAN_WITH_IMAGES,
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


DRAWS: Mapping[str, Draw] = {
    "architecture": lambda asked: asked.fresh.clone(),
    "mean-var": _mean_var,
    "permute": _permute,
    "shrink-perturb": _shrink_perturb,
    "kaiming-normal": _matrix_only(
        lambda new, generator: nn.init.kaiming_normal_(
            new, nonlinearity="relu", generator=generator
        )
    ),
    "xavier-uniform": _matrix_only(
        lambda new, generator: nn.init.xavier_uniform_(new, generator=generator)
    ),
    "trunc-normal": _matrix_only(_trunc_normal),
    "orthogonal": _matrix_only(_orthogonal),
    "zero": lambda asked: torch.zeros_like(asked.old),
    "mean": _seed_paper(_filled(lambda asked: _mean(asked.old))),
    "mean-noise": _seed_paper(_filled(_mean_noise)),
    "normal": _seed_paper(_noise(1.0)),
    "normal-small": _seed_paper(_noise(0.2)),
    "one-normal": _seed_paper(_filled(_one)),
    "normal-tenth": _seed_paper(_noise(0.1)),
    "bias-mean": _bias_mean,
    "dash": _needs_values,
    "fire": _fire,
}


def draw(scheme: str, asked: Request) -> Tensor:
    """Return new values in the shape and dtype of the old ones; the inputs stay as they are."""
    with torch.no_grad():
        new = DRAWS[scheme](asked)
    return new.to(asked.old.dtype)
