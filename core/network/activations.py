"""Activations: which functions they are and where their derivative is nearly zero.

Whether a pre-activation z is saturated depends only on z, and the set of such z is a few
intervals. They are found once per activation; counting on a tensor then needs comparisons only,
not the derivative of every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SATURATION_EPS = 0.01


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation function with its settings, such as ("leaky_relu", (0.2,)).

    Attributes:
        name: Name of the function.
        settings: Numbers it was called with, in the order `_READERS` gives them.
    """

    name: str
    settings: tuple[float, ...] = ()

    @property
    def rectifies(self) -> bool:
        """Whether it gives exactly 0 over a half-line: only then can a unit be dead."""
        return self.name in ("relu", "relu6") or (
            self.name == "hardtanh" and self.settings[0] == 0.0
        )

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest output, for bounded activations."""
        if self.name == "hardtanh":
            return (self.settings[0], self.settings[1])
        return {
            "relu6": (0.0, 6.0),
            "sigmoid": (0.0, 1.0),
            "hardsigmoid": (0.0, 1.0),
            "tanh": (-1.0, 1.0),
            "softsign": (-1.0, 1.0),
        }.get(self.name)

    def __call__(self, z: Tensor) -> Tensor:
        """Apply it, for tests and plots."""
        return _FORMULAS[self.name](z, *self.settings)


_FORMULAS: Mapping[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softsign": F.softsign,
}


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any
) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _gelu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    tanh = _argument(args, kwargs, 1, "approximate", "none") == "tanh"
    return Activation("gelu_tanh" if tanh else "gelu")


def _with(name: str, *settings: tuple[str, float]) -> Callable[..., Activation]:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
        values = tuple(
            float(_argument(args, kwargs, place, key, default))
            for place, (key, default) in enumerate(settings, start=1)
        )
        return Activation(name, values)

    return read


def _plain(name: str) -> Callable[..., Activation]:
    return lambda args, kwargs: Activation(name)


def _functions() -> dict[Any, Callable[..., Activation]]:
    table: dict[Any, Callable[..., Activation]] = {}
    rows: list[tuple[Callable[..., Activation], list[Any]]] = [
        (_plain("relu"), [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_]),
        (_plain("relu6"), [F.relu6]),
        (_with("hardtanh", ("min_val", -1.0), ("max_val", 1.0)), [F.hardtanh, F.hardtanh_]),
        (_with("leaky_relu", ("negative_slope", 0.01)), [F.leaky_relu, F.leaky_relu_]),
        (_with("elu", ("alpha", 1.0)), [F.elu, F.elu_]),
        (_with("celu", ("alpha", 1.0)), [F.celu, torch.celu, torch.celu_]),
        (_plain("selu"), [F.selu, torch.selu, torch.selu_]),
        (_gelu, [F.gelu]),
        (_plain("silu"), [F.silu]),
        (_plain("mish"), [F.mish]),
        (_with("softplus", ("beta", 1.0), ("threshold", 20.0)), [F.softplus]),
        (_plain("hardswish"), [F.hardswish]),
        (_plain("hardsigmoid"), [F.hardsigmoid]),
        (
            _plain("sigmoid"),
            [
                *(F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
                torch.special.expit,
            ],
        ),
        (_plain("tanh"), [F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_]),
        (_plain("softsign"), [F.softsign]),
    ]
    for read, functions in rows:
        for function in functions:
            table[function] = read
    return table


FUNCTIONS = _functions()


def activation_of(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Activation | None:
    """Return which activation a call is, or None when it is none we know."""
    read = FUNCTIONS.get(function)
    if read is None:
        return None
    activation = read(args, kwargs)
    # torch.nn.ReLU6 computes itself as this hardtanh; people know it by its own name.
    return Activation("relu6") if activation == Activation("hardtanh", (0.0, 6.0)) else activation


def derivative(activation: Activation, z: Tensor) -> Tensor:
    """Return f'(z) elementwise by autograd, in z's dtype; shape as z."""
    leaf = z.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(activation(leaf).sum(), leaf)
    return gradient


# Beyond this every smooth activation here has reached its limit to within float64.
_REACH = 60.0
_STEP = 1e-3


@cache
def saturated_intervals(
    activation: Activation, eps: float = SATURATION_EPS
) -> tuple[tuple[float, float], ...]:
    """Return the closed intervals of z in which |f'(z)| < eps.

    Piecewise-linear activations are exact: a kink counts as autograd counts it. For smooth ones
    every change of sign of |f'| - eps on a fine grid is refined by bisection in float64. GELU,
    SiLU and Mish have, besides their flat tail, a sliver around their minimum where the
    derivative passes through 0; it belongs to the definition and is counted.
    """
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps is {eps}; it must lie strictly between 0 and 1")
    infinity = math.inf
    name, settings = activation.name, activation.settings
    if name == "relu":
        return ((-infinity, 0.0),)
    if name == "relu6":
        return ((-infinity, 0.0), (6.0, infinity))
    if name == "hardtanh":
        return ((-infinity, settings[0]), (settings[1], infinity))
    if name == "hardsigmoid":
        # Its slope, 1/6, is above any eps of interest; the flat parts are z <= -3 and z >= 3.
        return ((-infinity, infinity),) if eps > 1 / 6 else ((-infinity, -3.0), (3.0, infinity))
    if name == "celu":
        return ((-infinity, settings[0] * math.log(eps)),)
    if name == "softplus":
        return ((-infinity, math.log(eps / (1 - eps)) / settings[0]),)
    if name == "leaky_relu":
        return ((-infinity, 0.0),) if abs(settings[0]) < eps else ()
    grid = torch.arange(-_REACH, _REACH + _STEP, _STEP, dtype=torch.float64)
    flat = (derivative(activation, grid).abs() < eps).tolist()
    edges = grid.tolist()
    intervals: list[tuple[float, float]] = []
    start: float | None = -infinity if flat[0] else None
    for i in range(1, len(flat)):
        if flat[i] == flat[i - 1]:
            continue
        crossing = _bisect(activation, eps, edges[i - 1], edges[i])
        if flat[i]:
            start = crossing
        else:
            intervals.append((start if start is not None else -infinity, crossing))
            start = None
    if start is not None:
        intervals.append((start, infinity))
    return tuple(intervals)


def _bisect(activation: Activation, eps: float, low: float, high: float) -> float:
    def flat(at: float) -> bool:
        z = torch.tensor([at], dtype=torch.float64)
        return bool(derivative(activation, z).abs().item() < eps)

    left = flat(low)
    for _ in range(40):
        middle = (low + high) / 2
        if flat(middle) == left:
            low = middle
        else:
            high = middle
    return (low + high) / 2
