"""The schemes there are: what is written into a parameter that is reset, with sources.

How each one draws its values is in `core.edit.draws`, under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from core.errors import PlanError, Remedy
from core.records.base import Value

Granularity = Literal["layer", "unit", "weight"]
ANY: tuple[Granularity, ...] = ("layer", "unit", "weight")


class SchemeInfo(Value):
    """One scheme.

    Attributes:
        name: Key in a plan.
        title: Plain words.
        description: What is written, and into what.
        parameters: Its numbers with their defaults.
        ranges: Least and greatest value of a number, where there are such.
        whole: Numbers that must be whole.
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
    parameters: dict[str, float] = {}
    ranges: dict[str, tuple[float, float]] = {}
    whole: tuple[str, ...] = ()
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


def _of_seed_paper(name: str, symbol: str, title: str, what: str) -> SchemeInfo:
    return SchemeInfo(
        name=name,
        title=title,
        description=f"{what} in matrices and kernels; biases 0, gains as they are."
        + WITH_GRADIENTS.get(symbol, ""),
        resets_buffers=True,
        source=SEED_PAPER,
        symbol=symbol,
    )


_TABLE: tuple[SchemeInfo, ...] = (
    SchemeInfo(
        name="architecture",
        title="The architecture's own initialisation",
        description="Copies the layer from a fresh twin: the same constructor, no weights, "
        "this seed. Zero-initialised norms and layer scales come out as the authors meant.",
        resets_buffers=True,
        source="the library's constructor",
    ),
    SchemeInfo(
        name="mean-var",
        title="Same mean and spread, no features",
        description="Independent normal values with the old tensor's mean and variance.",
        resets_buffers=True,
        source="Raghu et al., Transfusion, NeurIPS 2019, arXiv:1902.07208",
    ),
    SchemeInfo(
        name="permute",
        title="Shuffle within the tensor",
        description="The old values in random order: their spread stays, structure goes.",
        resets_buffers=True,
        source="standard",
    ),
    SchemeInfo(
        name="shrink-perturb",
        title="Shrink and perturb",
        description="shrink * old + perturb * fresh twin. (1, 0) changes nothing.",
        parameters={"shrink": 0.4, "perturb": 0.1},
        resets_buffers=False,
        source="Ash & Adams, NeurIPS 2020, arXiv:1910.08475",
    ),
    SchemeInfo(
        name="kaiming-normal",
        title="Kaiming normal",
        description="N(0, 2 / fan-in) for matrices and kernels; vectors from the twin.",
        resets_buffers=True,
        source="He et al. 2015, arXiv:1502.01852",
    ),
    SchemeInfo(
        name="xavier-uniform",
        title="Xavier uniform",
        description="Uniform within sqrt(6 / (fan-in + fan-out)); vectors from the twin.",
        resets_buffers=True,
        source="Glorot & Bengio, AISTATS 2010",
    ),
    SchemeInfo(
        name="trunc-normal",
        title="Truncated normal",
        description="N(0, 0.02^2) cut at two standard deviations; vectors from the twin.",
        resets_buffers=True,
        source="standard in Vision Transformers",
    ),
    SchemeInfo(
        name="orthogonal",
        title="Orthogonal",
        description="Orthonormal rows or columns of the flattened matrix; vectors from the "
        "fresh twin.",
        resets_buffers=True,
        granularities=("layer", "unit"),
        source="Saxe et al. 2014, arXiv:1312.6120",
    ),
    SchemeInfo(
        name="zero",
        title="Zeros",
        description="Every entry becomes 0.",
        resets_buffers=True,
        source=SEED_PAPER,
        symbol="Z",
    ),
    _of_seed_paper("mean", "M", "The tensor's mean", "The mean m of the whole tensor"),
    _of_seed_paper("mean-noise", "MN", "The mean, shifted", "m + e m / 10 with one e ~ N(0, 1)"),
    _of_seed_paper("normal", "Norm", "Standard normal", "N(0, 1)"),
    _of_seed_paper("normal-small", "Norm_small", "Small normal", "N(0, 0.2^2)"),
    _of_seed_paper("one-normal", "Dist", "One number for all", "One number from N(0, 1)"),
    _of_seed_paper("normal-tenth", "Dist3", "A tenth of a normal", "N(0, 0.1^2)"),
    SchemeInfo(
        name="bias-mean",
        title="Biases to their mean",
        description="Biases become the mean of their tensor; nothing else changes."
        + WITH_GRADIENTS["BA"],
        resets_buffers=False,
        source=SEED_PAPER,
        symbol="BA",
    ),
    SchemeInfo(
        name="dash",
        title="Shrink by direction (DASH)",
        description="Each kernel or row is multiplied by the cosine between it and a "
        "moving average (rate alpha) of its negative gradients, at least lambda.",
        parameters={"alpha": 0.3, "lambda": 0.3},
        ranges={"alpha": (0.0, 1.0), "lambda": (0.0, 1.0)},
        resets_buffers=False,
        source="Shin et al., NeurIPS 2024, arXiv:2410.23495",
        granularities=("layer",),
        needs_data=True,
    ),
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
        ranges={"steps": (1, 1000), "scale": (0, 1)},
        whole=("steps", "scale"),
        resets_buffers=True,
        source="Han et al., ICLR 2026, arXiv:2602.08040",
        granularities=("layer",),
    ),
)

SCHEMES: dict[str, SchemeInfo] = {info.name: info for info in _TABLE}


def list_schemes() -> tuple[SchemeInfo, ...]:
    """Return every scheme, the default first."""
    return tuple(SCHEMES.values())


def scheme_named(name: str) -> SchemeInfo:
    """Return a scheme by name.

    Raises:
        PlanError: There is none of that name.
    """
    if name not in SCHEMES:
        raise PlanError(
            f'There is no scheme "{name}". Known: {", ".join(SCHEMES)}.', Remedy.LIST_SCHEMES
        )
    return SCHEMES[name]


def scheme_numbers(name: str, given: Mapping[str, float]) -> dict[str, float]:
    """Return a scheme's numbers with the given ones put in.

    Raises:
        PlanError: Unknown scheme, unknown number, or a number that is not finite.
    """
    scheme = scheme_named(name)
    for key, value in given.items():
        if key not in scheme.parameters:
            allowed = ", ".join(scheme.parameters) or "none"
            raise PlanError(f'Scheme "{name}" has no number "{key}". It takes: {allowed}.')
        if not math.isfinite(value):
            raise PlanError(f'Scheme "{name}": {key} is {value}. Give a finite number.')
        low, high = scheme.ranges.get(key, (-math.inf, math.inf))
        if not low <= value <= high:
            raise PlanError(f'Scheme "{name}": {key} is {value:g}. Give {low:g} to {high:g}.')
        if key in scheme.whole and value != int(value):
            raise PlanError(f'Scheme "{name}": {key} is {value:g}. Give a whole number.')
    return {**scheme.parameters, **given}
