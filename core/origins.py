"""Which layer a tensor comes from, followed through a forward pass function by function.

A layer's output seldom reaches the next one as the same object: it is reshaped, split for a
gate, added to a residual, pooled. As long as its units stay apart on the same axis, what becomes
of it still speaks of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What a layer does with its weight; some networks do it with the weight of a layer that itself
# never runs.
PRODUCTS = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv2d})
# What hands a tensor on with its values unchanged.
RESHAPES = frozenset(
    {
        *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten),
        *(torch.transpose, torch.permute, torch.movedim, torch.swapaxes, torch.clone),
        *(Tensor.reshape, Tensor.reshape_as, Tensor.view, Tensor.view_as, Tensor.flatten),
        *(Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.transpose, Tensor.permute),
        *(Tensor.movedim, Tensor.swapaxes, Tensor.contiguous, Tensor.clone, Tensor.to),
        *(Tensor.float, Tensor.type_as, F.dropout, F.dropout1d, F.dropout2d),
    }
)
# What gives some of the units, as a gate takes its half of a layer's output.
PARTS = frozenset(
    {
        *(torch.chunk, torch.split, torch.narrow, torch.tensor_split),
        *(Tensor.chunk, Tensor.split, Tensor.narrow, Tensor.tensor_split, Tensor.__getitem__),
    }
)
# What leaves units apart, but no longer gives what the layer made: a residual addition, a scale,
# a pooling.
BLENDS = frozenset(
    {
        *(torch.add, torch.sub, torch.mul, torch.div, torch.addcmul),
        *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.add_, Tensor.mul_),
        *(Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.__sub__),
        *(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.__truediv__),
        *(F.interpolate, F.pad, F.avg_pool2d, F.max_pool2d, torch.max_pool2d),
        *(F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    }
)

# Keyed by identity, with the tensor kept alive so that no identity is used twice.
_Known = dict[int, tuple[Tensor, str]]


class Origins:
    """The layers that the tensors of one forward pass come from.

    Args:
        axis: Says of a layer and what it made on what axis its units lie.
    """

    def __init__(self, axis: Callable[[str, Tensor], int]) -> None:
        self._axis = axis
        self._made: _Known = {}
        self._blended: _Known = {}
        self._last: tuple[str, torch.Size] | None = None
        # Layers by when they, or a norm behind them, ran last.
        self._turn: dict[str, int] = {}
        self._turns = 0

    @property
    def last(self) -> str:
        """The layer that ran last, or the one whose norm did; empty before the first."""
        return self._last[0] if self._last is not None else ""

    def maker(self, tensor: Tensor | None) -> str:
        """Return the layer that made the tensor's values; empty where none did alone."""
        return self._made.get(id(tensor), (None, ""))[1]

    def feeder(self, tensor: Tensor) -> str:
        """Return the layer that an activation of this tensor speaks of; empty for none.

        Where it came by no known way, as inside a fused norm and activation, it is the layer
        that ran last, if that gave the same shape.
        """
        known = self._made.get(id(tensor)) or self._blended.get(id(tensor))
        if known is not None:
            return known[1]
        if self._last is not None and self._last[1] == tensor.shape:
            return self._last[0]
        return ""

    def ran(self, layer: str, output: Tensor) -> None:
        """Note that a layer made a tensor."""
        self._made[id(output)] = output, layer
        self._last = layer, output.shape
        self._turns += 1
        self._turn[layer] = self._turns

    def forget(self, tensor: Tensor) -> None:
        """Note that a tensor was overwritten with something else."""
        self._made.pop(id(tensor), None)
        self._blended.pop(id(tensor), None)

    def called(self, function: Any, given: Sequence[Any], result: Any) -> None:
        """Note what a function made of the tensors it was given."""
        if function in RESHAPES or function in PARTS:
            for made in tensors_in([result]):
                for known in (self._made, self._blended):
                    _, layer = known.get(id(given[0]), (None, ""))
                    if layer and self._apart(layer, given[0], made, part=function in PARTS):
                        known[id(made)] = made, layer
        elif function in BLENDS and isinstance(result, Tensor):
            layers = [
                layer
                for each in tensors_in(given)
                for known in (self._made, self._blended)
                for _, layer in (known.get(id(each), (None, "")),)
                if layer and self._apart(layer, each, result)
            ]
            if layers:
                self._blended[id(result)] = result, max(layers, key=lambda each: self._turn[each])

    def _apart(self, layer: str, source: Tensor, made: Tensor, *, part: bool = False) -> bool:
        """Return whether a layer's units still lie on the axis that they are looked for on.

        Args:
            layer: Whose units.
            source: What they were in.
            made: What was made of it.
            part: Whether it may be some of the units, and all of each.
        """
        if min(source.ndim, made.ndim) < 2:
            return False
        shapes = [list(each.shape) for each in (source, made)]
        units = [
            shape.pop(self._axis(layer, each))
            for shape, each in zip(shapes, (source, made), strict=True)
        ]
        if part:
            return shapes[0] == shapes[1] and units[0] >= units[1]
        return units[0] == units[1]


def tensors_in(given: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among arguments, those in a tuple or list included."""
    found: list[Tensor] = []
    for each in given:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, tuple | list):
            found += [one for one in each if isinstance(one, Tensor)]
    return found
