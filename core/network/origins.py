"""Which layer a tensor comes from, followed through a forward pass function by function.

A layer's output seldom reaches the next one as the same object: it is reshaped, split for a
gate, added to a residual, pooled. As long as its units stay apart on an axis of their own, what
becomes of it still speaks of the layer. Which axis that is, sizes alone cannot tell: a batch or
an image may be as wide as the layer. So it is followed too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from weakref import ref

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
        *(torch.moveaxis, torch.swapdims, torch.t, Tensor.moveaxis, Tensor.swapdims, Tensor.t),
        *(Tensor.T.__get__, Tensor.mT.__get__, torch.broadcast_to, Tensor.broadcast_to),  # type: ignore[attr-defined]
        *(Tensor.expand, Tensor.expand_as, torch.roll, Tensor.roll, Tensor.half, Tensor.bfloat16),
        *(Tensor.float, Tensor.type_as, F.dropout, F.dropout1d, F.dropout2d),
        *(Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__, Tensor.double),  # type: ignore[attr-defined]
        *(Tensor.cpu, Tensor.cuda, Tensor.requires_grad_),
    }
)
# What gives some of the units, as a gate takes its half of a layer's output.
PARTS = frozenset(
    {
        *(torch.chunk, torch.split, torch.narrow, torch.tensor_split),
        *(Tensor.chunk, Tensor.split, Tensor.narrow, Tensor.tensor_split, Tensor.__getitem__),
    }
)
# What leaves units apart, but no longer gives what the layer made: a residual addition, a scale.
BLENDS = frozenset(
    {
        *(torch.add, torch.sub, torch.mul, torch.div, torch.addcmul, torch.addcdiv),
        *(torch.subtract, torch.multiply, torch.true_divide, torch.lerp, torch.where),
        *(torch.maximum, torch.minimum, torch.pow, torch.neg, torch.abs, torch.square),
        *(torch.sqrt, torch.rsqrt, torch.exp, torch.log, torch.clamp),
        *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.addcmul, Tensor.lerp),
        *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.where, Tensor.copy_),
        *(Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.__sub__, Tensor.__rsub__),
        *(Tensor.__isub__, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.__neg__),
        *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__itruediv__, Tensor.__pow__),
        *(Tensor.maximum, Tensor.minimum, Tensor.pow, Tensor.neg, Tensor.abs, Tensor.square),
        *(Tensor.sqrt, Tensor.rsqrt, Tensor.exp, Tensor.log, Tensor.clamp, Tensor.clamp_),
        *(Tensor.masked_fill, Tensor.masked_fill_),
    }
)
# As those, but over the last so many axes, which must not be the units'.
POOLS = {
    **dict.fromkeys((F.avg_pool1d, F.max_pool1d, torch.avg_pool1d, torch.max_pool1d), 1),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_max_pool1d), 1),
    **dict.fromkeys((F.avg_pool2d, F.max_pool2d, torch.max_pool2d, F.lp_pool2d), 2),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_max_pool2d), 2),
    **dict.fromkeys((F.avg_pool3d, F.max_pool3d, torch.max_pool3d), 3),
    **dict.fromkeys((F.adaptive_avg_pool3d, F.adaptive_max_pool3d), 3),
}
# What a norm layer does inside.
NORMS = frozenset(
    {
        *(F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.normalize),
        *(torch.batch_norm, torch.layer_norm, torch.group_norm, torch.instance_norm),
    }
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        layer: The layer that made it.
        axis: The axis that the layer's units lie on, not negative.
    """

    layer: str
    axis: int


# Keyed by identity, with the tensor kept alive so that no identity is used twice.
_Known = dict[int, tuple[Tensor, Origin]]


class Origins:
    """The layers that the tensors of one forward pass come from."""

    def __init__(self) -> None:
        self._made: _Known = {}
        self._blended: _Known = {}
        # What was seen being made in any other way: of no layer's units, or of none in order.
        # By identity; not kept alive, so that whoever looks has to see that it still is.
        self._lost: dict[int, ref[Tensor]] = {}
        self._last: tuple[Origin, torch.Size] | None = None
        # Layers by when they, or a norm behind them, ran last.
        self._turn: dict[str, int] = {}
        self._turns = 0

    @property
    def last(self) -> str:
        """The layer that ran last, or the one whose norm did; empty before the first."""
        return self._last[0].layer if self._last is not None else ""

    def maker(self, tensor: Tensor | None) -> Origin | None:
        """Return the layer that made a tensor, of any shape; None where none did alone."""
        return self._made.get(id(tensor), (None, None))[1]

    def feeder(self, tensor: Tensor) -> Origin | None:
        """Return the layer that an activation of this tensor speaks of; None for none.

        Where it came by no known way, as inside a fused norm and activation, it is the layer
        that ran last, if that gave the same shape and nothing was seen to mix its units.
        """
        known = self._made.get(id(tensor)) or self._blended.get(id(tensor))
        if known is not None:
            return known[1]
        if self._is_lost(tensor) or self._last is None or self._last[1] != tensor.shape:
            return None
        return self._last[0]

    def _lost_in(self, args: Sequence[Any]) -> bool:
        return bool(args) and self._is_lost(args[0])

    def _is_lost(self, tensor: Any) -> bool:
        if id(tensor) in self._made or id(tensor) in self._blended:
            return False
        held = self._lost.get(id(tensor))
        return held is not None and held() is tensor

    def _lose(self, made: Sequence[Tensor]) -> None:
        for tensor in made:
            if id(tensor) not in self._made and id(tensor) not in self._blended:
                self._lost[id(tensor)] = ref(tensor)

    def ran(self, origin: Origin, output: Tensor) -> None:
        """Note that a layer made a tensor, of any shape."""
        self._made[id(output)] = output, origin
        self._last = origin, output.shape
        self._turns += 1
        self._turn[origin.layer] = self._turns

    def forget(self, tensor: Tensor) -> None:
        """Note that a tensor, of any shape, was overwritten with something else."""
        self._made.pop(id(tensor), None)
        self._blended.pop(id(tensor), None)

    def called(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Note what a function made of the tensors it was given."""
        if function in RESHAPES or function in PARTS:
            if "input" in kwargs:
                rest = {name: each for name, each in kwargs.items() if name != "input"}
                args, kwargs = (kwargs["input"], *args), rest
            given = id(args[0]) if args else 0
            if given not in self._made and given not in self._blended and not self._lost_in(args):
                # Of a norm inside: as unknown as it was.
                return
            for known in (self._made, self._blended):
                source, origin = known.get(given, (None, None))
                if source is None or origin is None:
                    continue
                moved = _moved(function, source, origin.axis, args[1:], kwargs)
                for made, axis in zip_longest(tensors_in([result]), moved):
                    if axis is not None and _apart(
                        source, origin.axis, made, axis, part=function in PARTS
                    ):
                        known[id(made)] = made, Origin(origin.layer, axis)
        elif function in NORMS and not self._lost_in(args):
            # Fused with its activation: the layer that ran last is meant, as by `feeder`.
            return
        elif isinstance(result, Tensor) and (
            function in BLENDS or (pooled := _pooled(function, args, kwargs)) is not None
        ):
            last = result.ndim if function in BLENDS else result.ndim - (pooled or 0)
            sources = [
                Origin(origin.layer, axis)
                for each in tensors_in([*args, *kwargs.values()])
                for known in (self._made, self._blended)
                for _, origin in (known.get(id(each), (None, None)),)
                if origin is not None
                # Tensors that are blended are lined up at their last axes.
                for axis in (origin.axis + result.ndim - each.ndim,)
                if axis < last and _apart(each, origin.axis, result, axis)
            ]
            if sources:
                latest = max(sources, key=lambda origin: self._turn[origin.layer])
                self._blended[id(result)] = result, latest
        elif _in_place(function):
            self.forget(result)
        if tensors_in([*args, *kwargs.values()]):
            self._lose(tensors_in([result]))


def _pooled(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return over how many of the last axes a function pools, resizes or pads; None for none."""
    if function is F.interpolate:
        # All but the batch and the channels.
        return max(0, args[0].ndim - 2) if args else None
    if function is F.pad:
        widths = args[1] if len(args) > 1 else kwargs.get("pad", ())
        return (max((i for i, width in enumerate(widths) if width), default=-1) + 2) // 2
    return POOLS.get(function)


def _in_place(function: Any) -> bool:
    """Return whether a function writes what it makes over its first argument, by its name."""
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _moved(
    function: Any, source: Tensor, axis: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int | None]:
    """Return on which axis of each result the units are counted; None for none.

    The function is called again with the numbers of the units in the place of the values.
    """
    numbers = torch.arange(source.shape[axis], dtype=torch.float32, device=source.device)
    numbers = numbers.view(-1, *(1,) * (source.ndim - axis - 1)).expand(source.shape)
    try:
        # With the layout of the source: not every layout has every view.
        marked = torch.empty_strided(
            source.shape, source.stride(), dtype=torch.float32, device=source.device
        ).copy_(numbers)
        results = tensors_in([function(marked, *args, **kwargs)])
    except (RuntimeError, TypeError, ValueError):
        return []
    return [_counting(result, source.shape[axis]) for result in results]


def _counting(numbers: Tensor, units: int) -> int | None:
    """Return the one axis along which units are counted; None where they are out of order."""
    axes = [
        axis
        for axis in range(numbers.ndim)
        if numbers.shape[axis] > 1 and bool((numbers != numbers.narrow(axis, 0, 1)).any())
    ]
    if not axes:
        # A single unit; its axis can be told from others only where no other is as short.
        axes = [axis for axis in range(numbers.ndim) if numbers.shape[axis] == 1]
    if len(axes) != 1 or not numbers.numel():
        return None
    line = numbers.movedim(axes[0], -1).reshape(-1, numbers.shape[axes[0]])[0]
    ordered = len(line) != units or torch.equal(line, torch.arange(units).to(line))
    return axes[0] if ordered else None


def _apart(source: Tensor, axis: int, made: Tensor, where: int, *, part: bool = False) -> bool:
    """Return whether a layer's units lie on an axis of their own.

    Args:
        source: What they were in.
        axis: On what axis.
        made: What was made of it.
        where: On what axis of that.
        part: Whether it may be some of the units, and all of each.
    """
    if min(source.ndim, made.ndim) < 2 or not 0 <= where < made.ndim:
        return False
    if not part:
        return source.shape[axis] == made.shape[where]
    rest = [
        [size for place, size in enumerate(tensor.shape) if place != at and size > 1]
        for tensor, at in ((source, axis), (made, where))
    ]
    return rest[0] == rest[1] and source.shape[axis] >= made.shape[where]


def tensors_in(given: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of any shape among arguments, also those in a tuple or list."""
    tensors: list[Tensor] = []
    for value in given:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple | list):
            tensors += [one for one in value if isinstance(one, Tensor)]
    return tensors
