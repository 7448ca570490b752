"""Loaded model -> outline: its layers in forward order and how they hang together.

Order, coupling and which layer feeds which activation are read off one forward pass with a tiny
batch, not off names: a definition order is not a running order, and `bn1` may follow anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ModelError
from core.hooks import module_kept
from core.records import LayerInfo, ModelCard, ModelOutline, ParameterInfo
from core.records.outline import LayerKind
from core.seeding import random_state_kept
from core.trace import Site, first_tensor, watched_forward

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
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


@dataclass(slots=True)
class _Traced:
    order: list[str] = field(default_factory=list)
    coupled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)


def example_input(module: nn.Module, *, size: int, batch: int = 2) -> Tensor:
    """Return noise a network can be run on: (batch, 3, size, size), on its device and dtype."""
    parameter = next(module.parameters())
    noise = torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


def outline_module(module: nn.Module, card: ModelCard, head: frozenset[str]) -> ModelOutline:
    """Return the outline of a network. The network is left as it was.

    Args:
        module: The network, on any device.
        card: What is known of it.
        head: `state_dict` names sized by the class count.

    Raises:
        ModelError: It cannot run on an image of its default size.
    """
    try:
        traced = _trace(module, size=card.default_size)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{card.title} does not run on a {card.default_size} px image: {first[:200]}. "
            "Choose another model."
        ) from error
    return ModelOutline(
        **dict(card),
        layers=_layers(module, traced, head),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )


def _trace(module: nn.Module, *, size: int) -> _Traced:
    traced = _Traced()
    modules = dict(module.named_modules())
    # Keyed by identity, with the tensor kept alive so that no identity is used twice.
    origin: dict[int, tuple[Tensor, str]] = {}
    last: list[tuple[str, torch.Size]] = []
    seen: set[str] = set()
    owners = {name for name, each in modules.items() if each._parameters}
    kinds = {name: _kind(modules[name]) for name in owners}
    owned: dict[int, list[str]] = {}
    for name in owners:
        for parameter in modules[name]._parameters.values():
            owned.setdefault(id(parameter), []).append(name)

    def came_by(name: str) -> None:
        if name and name not in seen:
            seen.add(name)
            traced.order.append(name)

    def called(function: Any, given: Sequence[Any], result: Any, running: frozenset[str]) -> None:
        made = first_tensor(result)
        if made is None:
            return
        for place, tensor in enumerate(_tensors(given)):
            names = owned.get(id(tensor), ())
            # Of the layers that share a parameter the one that runs is meant.
            inside = [name for name in names if name in running]
            for name in inside or names:
                came_by(name)
                if not inside and place == 1 and function in PRODUCTS:
                    ran(name, modules[name], tuple(given), made)
        if function in RESHAPES and isinstance(given[0], Tensor):
            known = origin.get(id(given[0]))
            if known is not None and _same_units(kinds[known[1]], given[0], made):
                origin[id(made)] = (made, known[1])

    def ran(name: str, each: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        came_by(name)
        source = first_tensor(args)
        made = first_tensor(output)
        came_from = origin.get(id(source)) if source is not None else None
        feeder = name
        if came_from is not None and _kind(each) == "norm":
            feeder = came_from[1]
            buffers = tuple(
                f"{name}.{key}" for key in RUNNING if each._buffers.get(key) is not None
            )
            if buffers and feeder != name:
                traced.coupled.setdefault(feeder, buffers)
        if made is not None:
            origin[id(made)] = (made, feeder)
            last[:] = [(feeder, made.shape)]

    def activated(site: Site, z: Tensor) -> None:
        known = origin.get(id(z))
        feeder = known[1] if known is not None else _feeder_between(site, z, last, owners)
        if feeder:
            traced.sites.setdefault(feeder, site)

    def forget(_: Site, h: Tensor) -> None:
        origin.pop(id(h), None)

    def attended(site: str, inside: str, _: object) -> None:
        feeder = _asks(inside, traced.order, kinds) or (last[0][0] if last else "")
        if feeder:
            traced.attention.setdefault(feeder, site)

    with module_kept(module), random_state_kept(0), torch.no_grad():
        module.eval()
        with watched_forward(
            module,
            on_layer=ran,
            before_activation=activated,
            # An in-place activation hands on the same tensor, which is no layer's output now.
            after_activation=forget,
            on_attention=attended,
            on_call=called,
        ):
            module(example_input(module, size=size))
    return traced


def _tensors(given: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among arguments, those in a tuple or list included."""
    found: list[Tensor] = []
    for each in given:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, tuple | list):
            found += [one for one in each if isinstance(one, Tensor)]
    return found


def _same_units(kind: LayerKind, source: Tensor, made: Tensor) -> bool:
    """Return whether a layer's units still lie on the axis its kind of layer has them on."""
    if min(source.ndim, made.ndim) < 2:
        return False
    axis = 1 if kind == "conv" else -1
    return source.shape[axis] == made.shape[axis]


def _feeder_between(
    site: Site, z: Tensor, last: list[tuple[str, torch.Size]], owners: set[str]
) -> str:
    """Return the feeder of an activation whose input no layer returned itself.

    It was made inside a fused norm and activation, or by a residual addition: then the last
    layer that ran fed it and gave the same shape. Where the shape is another (a concatenation
    came between), the norm around it fed it, if there is one.
    """
    for name, shape in last:
        if shape == z.shape:
            return name
    around = site.name.rpartition(".")[0]
    return around if around in owners else ""


def _asks(inside: str, order: list[str], kinds: dict[str, LayerKind]) -> str:
    """Return the layer that makes the queries: the first one inside the module that attends.

    `nn.MultiheadAttention` projects by itself and has not come to its end yet.
    """
    if kinds.get(inside) == "linear":
        return inside
    for name in order:
        if name.startswith(f"{inside}.") and kinds.get(name) in ("linear", "conv"):
            return name
    return ""


def _kind(module: nn.Module) -> LayerKind:
    name = type(module).__name__.lower()
    if "norm" in name or getattr(module, "running_mean", None) is not None:
        return "norm"
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) or (
        isinstance(weight, Tensor) and weight.ndim >= 3
    ):
        return "conv"
    if isinstance(module, nn.Linear | nn.MultiheadAttention) or (
        isinstance(weight, Tensor) and weight.ndim == 2
    ):
        return "linear"
    return "other"


def stage_of(name: str) -> str:
    """Return the group a layer is shown under: "blocks.3", "layer1", "classifier".

    A numbered child of a top-level container is a stage of its own; a root parameter or a lone
    module is its own stage.
    """
    parts = name.split(".")
    if len(parts) > 1 and parts[1].isdigit():
        return ".".join(parts[:2])
    if len(parts) > 3 and parts[2].isdigit():
        return ".".join(parts[:3])
    return parts[0]


def _layers(module: nn.Module, traced: _Traced, head: frozenset[str]) -> tuple[LayerInfo, ...]:
    owners = [
        (name, each)
        for name, each in module.named_modules()
        if each._parameters
        and any(parameter is not None for parameter in each._parameters.values())
    ]
    shared = _shared_names(module)
    rows: list[tuple[float, str, dict[str, Any]]] = []
    place = {name: float(i) for i, name in enumerate(traced.order)}
    for name, each in owners:
        if name:
            own = tuple(
                ParameterInfo(name=f"{name}.{key}", shape=tuple(value.shape), count=value.numel())
                for key, value in each._parameters.items()
                if value is not None
            )
            buffers = tuple(
                f"{name}.{key}"
                for key, value in each._buffers.items()
                if value is not None and key not in each._non_persistent_buffers_set
            )
            site = traced.sites.get(name)
            executed = name in place
            rows.append(
                (
                    place.get(name, float("inf")),
                    name,
                    {
                        "type": type(each).__name__,
                        "kind": _kind(each),
                        "parameters": own,
                        "buffers": buffers,
                        "coupled_buffers": traced.coupled.get(name, ()),
                        "activation": site.name if site else None,
                        "attention": traced.attention.get(name),
                        "executed": executed,
                    },
                )
            )
        else:
            for key, value in each._parameters.items():
                if value is not None:
                    # The root's own parameters are used before or between its children; which,
                    # no hook sees. They are shown first.
                    own = (ParameterInfo(name=key, shape=tuple(value.shape), count=value.numel()),)
                    rows.append(
                        (
                            -1.0,
                            key,
                            {
                                "type": "Parameter",
                                "kind": "other",
                                "parameters": own,
                            },
                        )
                    )
    rows.sort(key=lambda row: row[0])
    return tuple(
        LayerInfo(
            name=name,
            index=i,
            stage=stage_of(name),
            tied=tuple(shared[p.name] for p in given["parameters"] if p.name in shared),
            head=any(p.name in head for p in given["parameters"]),
            **given,
        )
        for i, (_, name, given) in enumerate(rows)
    )


def _shared_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}
