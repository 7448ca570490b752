"""What readers of units read: the mean input that each entry of a weight is multiplied with.

A reader sees its units behind whatever lies between: pooling, padding, norms, sums, a flattened
image. So its input is taken where the product is computed, below modules and functions alike, in
the operations that both come down to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.network.connections.tracer import operation
from core.network.connections.wiring import (
    Connections,
    Place,
    Reading,
    Readings,
    place_of,
    shadowed,
)
from core.network.hooks import batch_statistics, memory_kept, module_kept

Batches = Iterable[tuple[Tensor, Tensor]]
# Operation to the places of its input and of its weight among the arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1)}


def readings_of(module: nn.Module, connections: Connections, batches: Batches) -> Readings:
    """Return what the readers of units read on images. The network is left as it was.

    Norms use each batch's own statistics and nothing is dropped out, as in every measurement.

    Args:
        module: The network that the connections were traced on, on any device.
        connections: Which weights read units.
        batches: Inputs (n, 3, h, w) and labels (n,), on its device.

    Returns:
        By `Mix.place`, one reading for each use in a pass, summed over the batches in float64.
        Weights are missing that were used more often in one batch than in another.
    """
    wanted = connections.read_places()
    sums: dict[Place, list[Reading]] = {}
    odd: set[Place] = set()
    fast = torch.backends.mha.get_fastpath_enabled()
    with module_kept(module), torch.no_grad():
        batch_statistics(module)
        try:
            # The fused encoder of nn.TransformerEncoder hides which weight does what.
            torch.backends.mha.set_fastpath_enabled(False)
            for inputs, _ in batches:
                with memory_kept(module), _Reader(module, wanted) as reader:
                    module(inputs)
                if not sums:
                    sums = {place: [Reading() for _ in uses] for place, uses in reader.uses.items()}
                for place in sums.keys() | reader.uses.keys():
                    before, now = sums.get(place, []), reader.uses.get(place, [])
                    if len(before) != len(now):
                        odd.add(place)
                        continue
                    for total, one in zip(before, now, strict=True):
                        total.total = total.total + one.total.cpu()
                        total.magnitude = total.magnitude + one.magnitude.cpu()
                        total.outputs += one.outputs
                        total.rows += one.rows
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return {place: uses for place, uses in sums.items() if place not in odd}


class _Reader(TorchDispatchMode):
    """Sums up the inputs of wanted weights in one forward pass.

    Views and copies of parameters are followed in shadows; see `shadowed`.
    """

    def __init__(self, module: nn.Module, wanted: frozenset[Place]) -> None:
        super().__init__()
        self._wanted = wanted
        names = {place[0] for place in wanted}
        # The tensors are held, or another could take over the identity of one that is gone.
        self._known: dict[int, tuple[Tensor, str, Tensor]] = {
            id(tensor): (tensor, name, torch.empty(tensor.shape, device="meta"))
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if name in names
        }
        self.uses: dict[Place, list[Reading]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation(func)
        if name in PRODUCTS:
            self._product(name, args)
        result = func(*args, **(kwargs or {}))
        known = self._known.get(id(args[0])) if args else None
        if known is not None:
            _, parameter, shadow = known
            more = kwargs or {}
            moved = shadowed(name, lambda each: func(each, *args[1:], **more), shadow)
            if moved is not None:
                several = isinstance(moved, tuple | list)
                for own, other in zip(result, moved, strict=True) if several else [(result, moved)]:
                    self._known[id(own)] = (own, parameter, other)
        return result

    def _product(self, name: str, args: Any) -> None:
        given, weight = (args[place] for place in PRODUCTS[name])
        known = self._known.get(id(weight))
        if known is None:
            return
        _, parameter, shadow = known
        if name == "convolution":
            ends = {"in_axis": 0, "out_axis": 1} if args[6] else {"in_axis": 1, "out_axis": 0}
            place = place_of(parameter, shadow, **ends, groups=args[8])
        elif shadow.ndim == 2 or shadow.shape[0] == 1 or shadow.stride(0) == 0:
            # A batched product takes an expanded weight where another takes the weight itself.
            place = place_of(parameter, shadow, in_axis=-2, out_axis=-1)
        else:
            return
        if place not in self._wanted:
            return
        made = _convolved(given, weight, args) if name == "convolution" else _multiplied(given)
        self.uses.setdefault(place, []).append(made)


def _multiplied(given: Tensor) -> Reading:
    rows = given.reshape(-1, given.shape[-1])
    return Reading(
        total=rows.sum(0, dtype=torch.float64)[:, None],
        outputs=len(rows),
        magnitude=rows.abs().sum(0, dtype=torch.float64),
        rows=len(rows),
    )


def _convolved(given: Tensor, weight: Tensor, args: Any) -> Reading:
    """Return the reading of a convolution.

    What an entry of the kernel met is the gradient of the sum of an output with respect to it, so
    the library's own backward finds it with stride, padding and dilation as they are.
    """
    transposed, groups = bool(args[6]), int(args[8])  # of transposed ones groups are refused
    others = tuple(axis for axis in range(given.ndim) if axis != 1)
    images = given.sum(0, keepdim=True, dtype=torch.float64)
    shape = list(weight.shape)
    # One output in each group: the others met the same.
    shape[1 if transposed else 0] = groups
    kernel = weight.new_ones(shape, dtype=torch.float64)
    options = [
        list(argument) if isinstance(argument, list | tuple) else argument for argument in args[3:9]
    ]
    output = torch.ops.aten.convolution(images, kernel, None, *options)
    met = torch.ops.aten.convolution_backward(
        torch.ones_like(output), images, kernel, None, *options, [False, True, False]
    )[1]
    inputs = given.shape[1]
    return Reading(
        total=met.reshape(inputs, -1),
        outputs=given.shape[0] * output[0, 0].numel(),
        magnitude=given.abs().sum(others, dtype=torch.float64),
        rows=given.numel() // inputs,
    )
