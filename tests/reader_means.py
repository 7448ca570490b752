"""What continual backpropagation's compensation is worth: `python -m tests.reader_means`.

Half of the units that the rule may choose are removed, and each reader is run again, as it stands
in the network, on the inputs it had. What is printed is by how much the mean of its output moves
when its lost mean is made up for, relative to what it moves when it is not: 0 is exact, 1 is no
compensation at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.load import decode_items, load_model, open_images, resolve_data, resolve_model
from core.network.connections import Connections, connections_of, readings_of
from core.network.hooks import batch_statistics, module_kept
from core.records import ModelOutline
from tests.zoo import ZOO, outline_of

Batches = Iterable[tuple[Tensor, Tensor]]
PRODUCTS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d)
PRODUCTS += (torch.matmul, Tensor.matmul, Tensor.__matmul__)
ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__)
# A mean this much smaller than what it is the mean of is rounding, also in float32.
ROUNDING = 1e-6


@dataclass
class Call:
    """One product with a weight as it was computed in a pass.

    Attributes:
        weight: The weight's name.
        again: Weight to the output without a bias.
        made: The output, by which whoever uses it next is found.
        taker: Name of the bias that was added, or of the running mean that was taken off.
    """

    weight: str
    again: Any
    made: Tensor
    taker: str = ""


class _Calls(TorchFunctionMode):
    """Takes down every product with a parameter, whichever way it is called."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.found: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = self._names.get(id(args[1])) if func in PRODUCTS and len(args) > 1 else None
        if name is not None:
            given, bias = args[0].clone(), args[2] if len(args) > 2 else None

            def again(weight: Tensor) -> Tensor:
                more = (None, *args[3:]) if len(args) > 2 else ()
                return func(given, weight, *more, **kwargs)

            self.found.append(Call(name, again, result, self._names.get(id(bias), "")))
        elif func in ADDITIONS and id(args[1]) in self._names:
            self.follows(args[0], self._names[id(args[1])])
        return result

    def follows(self, made: Tensor, taker: str) -> None:
        for call in self.found:
            if call.made is made and not call.taker:
                call.taker = taker


def calls_of(module: nn.Module, inputs: Tensor) -> list[Call]:
    """Return the products with parameters of one pass, with the norm behind each of them."""
    named = (*module.named_parameters(), *module.named_buffers())
    names = {id(each): name for name, each in named}
    handles = []
    with torch.no_grad(), _Calls(names) as calls:
        for name, each in module.named_modules():
            if getattr(each, "running_mean", None) is not None:

                def behind(norm: nn.Module, args: Any, name: str = name) -> None:
                    calls.follows(args[0], f"{name}.running_mean")

                handles.append(each.register_forward_pre_hook(behind))
        module(inputs)
    for handle in handles:
        handle.remove()
    return calls.found


@dataclass
class Difference:
    """How far the mean of what goes into one bias or norm moves.

    Attributes:
        bare: Sum of what the outputs lose, (units,).
        size: Sum of its absolute values, (units,).
        outputs: How many values each unit has given.
    """

    bare: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    size: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    outputs: int = 0


def removable(connections: Connections, outline: ModelOutline) -> set[int]:
    """Return every second bundle that lies behind an activation and can be reset."""
    found: set[int] = set()
    for layer in outline.layers:
        if layer.activation is not None and layer.name in connections.bundles:
            found |= set(connections.bundles[layer.name].tolist())
    return set(sorted(each for each in found if connections.free(each))[::2])


def relative_differences(
    module: nn.Module, outline: ModelOutline, batches: Batches
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return how much of the lost mean is not made up for, and the readers nothing is done for.

    Args:
        module: The network; it is left as it was.
        outline: Its outline.
        batches: Inputs (n, 3, h, w) and labels (n,).

    Returns:
        Bias or running mean to the greatest difference that is left over its units, over the
        greatest there would be without compensation; and names of weights.
    """
    batches = list(batches)
    connections = connections_of(module, batches[0][0][:1])
    chosen = removable(connections, outline)
    readings = readings_of(module, connections, batches)
    state = module.state_dict()
    shifts = connections.shifts(chosen, readings, state)
    cut = {name: value.double().clone() for name, value in state.items()}
    wiring = connections.wiring(sorted(chosen))
    for part in wiring.outgoing:
        cut[part.tensor].view(-1)[torch.from_numpy(part.entries)] = 0
    # A unit that is reset itself has another mean in any case.
    remade = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in state.items()}
    for part in (*wiring.incoming, *(part for _, part in wiring.vectors)):
        remade[part.tensor].view(-1)[torch.from_numpy(part.entries)] = True
    found: dict[str, Difference] = {}
    dtype = next(module.parameters()).dtype
    double = module.double()
    try:
        with module_kept(double):
            batch_statistics(double)
            for inputs, _ in batches:
                for call in calls_of(double, inputs.double()):
                    old = state[call.weight].double()
                    lost = call.again(cut[call.weight]) - call.again(old)
                    axis = 1 if old.ndim > 2 else -1
                    rows = lost.movedim(axis, -1).reshape(-1, lost.shape[axis])
                    one = found.setdefault(call.taker, Difference())
                    if call.taker:
                        one.bare = one.bare + rows.sum(0)
                        one.size = one.size + rows.abs().sum(0)
                        one.outputs += len(rows)
    finally:
        module.to(dtype)
    relative = {}
    for taker, one in found.items():
        if not taker:
            continue
        bare = torch.where(remade[taker].reshape(-1), 0.0, one.bare / one.outputs)
        scale = float(bare.abs().max())
        # Behind a norm the mean is 0 but for rounding, and there is nothing to make up for.
        if scale > ROUNDING * float((one.size / one.outputs).max()):
            sign = -1.0 if taker.endswith("running_mean") else 1.0
            gained = torch.zeros_like(bare)
            if taker in shifts.values:
                gained = sign * torch.from_numpy(shifts.values[taker]).reshape(-1)
            relative[taker] = float((bare + gained).abs().max()) / scale
    return relative, shifts.untaken


def images(size: int, count: int, preprocessing: Any = None) -> list[tuple[Tensor, Tensor]]:
    """Return batches of four blood cells, normalised."""
    card = preprocessing or load_model(resolve_model("tf_efficientnet_lite0")).card.preprocessing
    source = open_images(resolve_data("bloodmnist"))
    rows = []
    for start in range(0, count, 4):
        items = source.splits["train"][start : start + 4]
        pixels, labels = decode_items(source, items, card, size=size)
        mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (card.mean, card.std))
        rows.append(((pixels.float() / 255 - mean) / std, labels))
    return rows


def embedded() -> tuple[nn.Module, ModelOutline, Batches]:
    """Return the embedded CNN, its outline and images."""
    from core.network.outline import outline_module

    loaded = load_model(resolve_model("tf_efficientnet_lite0"), classes=8)
    outline = outline_module(loaded.module, loaded.card, loaded.head)
    return loaded.module, outline, images(64, 8, loaded.card.preprocessing)


def from_torchvision(name: str, size: int) -> tuple[nn.Module, ModelOutline, Batches]:
    """Return a network with random weights, its outline and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, num_classes=8)
    return module, outline_of(module, size=size), images(size, 8)


TORCHVISION = {"alexnet": 96, "vgg11": 64, "vgg11_bn": 64, "squeezenet1_0": 64, "squeezenet1_1": 64}


def main() -> int:
    """Print the table."""
    print("| network | readers | greatest difference left | in | not made up for |")
    print("|---|---|---|---|---|")
    rows: list[tuple[str, Any]] = [
        (f"zoo: {name}", lambda case=case: (case.module(), case.outline(), case.batches()))
        for name, case in ZOO.items()
    ]
    rows += [("tf_efficientnet_lite0", embedded)]
    rows += [
        (name, lambda n=name, s=size: from_torchvision(n, s)) for name, size in TORCHVISION.items()
    ]
    worst = 0.0
    for name, build in rows:
        found, untaken = relative_differences(*build())
        where = max(found, key=lambda key: found[key], default="")
        said = f"{found[where]:.1e} | {where}" if where else "no unit to remove | "
        print(f"| {name} | {len(found)} | {said} | {', '.join(untaken)} |", flush=True)
        worst = max([worst, *found.values()])
    print(f"greatest: {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
