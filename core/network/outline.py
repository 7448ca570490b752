"""Loaded model -> outline: its layers in forward order and how they hang together.

Order, coupling and which layer feeds which activation are read off one forward pass with a tiny
batch, not off names: a definition order is not a running order, and `bn1` may follow anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.network.hooks import module_kept
from core.network.origins import PRODUCTS, Origin, Origins, tensors_in
from core.network.trace import Site, first_tensor, watched_forward
from core.records import LayerInfo, ModelCard, ModelOutline, ParameterInfo
from core.records.outline import LayerKind
from core.reductions import unit_axis
from core.seeding import random_state_kept

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(slots=True)
class _Traced:
    order: list[str] = field(default_factory=list)
    coupled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sites: dict[str, tuple[Site, int]] = field(default_factory=dict)
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
    owners = {name for name, each in modules.items() if each._parameters}
    kinds = {name: _kind(modules[name]) for name in owners}
    origins = Origins()
    owned: dict[int, list[str]] = {}
    for name in owners:
        for parameter in modules[name]._parameters.values():
            owned.setdefault(id(parameter), []).append(name)
    seen: set[str] = set()

    def came_by(name: str) -> None:
        if name and name not in seen:
            seen.add(name)
            traced.order.append(name)

    def called(
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        running: frozenset[str],
    ) -> None:
        if not tensors_in([result]):
            return
        given = (*args, *kwargs.values())
        for place, tensor in enumerate(tensors_in(given)):
            names = owned.get(id(tensor), ())
            # Of the layers that share a parameter the one that runs is meant.
            inside = [name for name in names if name in running]
            for name in inside or names:
                came_by(name)
                if not inside and place == 1 and function in PRODUCTS:
                    ran(name, modules[name], given, result)
        origins.called(function, args, kwargs, result)

    def ran(name: str, each: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        came_by(name)
        made = first_tensor(output)
        given = first_tensor(args)
        maker = origins.maker(given) if kinds[name] == "norm" else None
        buffers = tuple(f"{name}.{key}" for key in RUNNING if each._buffers.get(key) is not None)
        if maker is not None and buffers:
            traced.coupled.setdefault(maker.layer, buffers)
        if made is None:
            return
        if maker is None or given is None or given.shape != made.shape:
            axis = _axis(kinds[name], each, made)
            maker = Origin(name if maker is None else maker.layer, axis)
        origins.ran(maker, made)

    def activated(site: Site, z: Tensor) -> None:
        around = site.name.rpartition(".")[0]
        # Behind a concatenation it is the norm around it that feeds it, if there is one.
        feeder = origins.feeder(z)
        if feeder is None and around in owners and z.ndim > 1:
            feeder = Origin(around, _axis(kinds[around], modules[around], z))
        if feeder is not None:
            traced.sites.setdefault(feeder.layer, (site, feeder.axis))

    def attended(site: str, inside: str, _: object) -> None:
        feeder = _asks(inside, traced.order, kinds) or origins.last
        if feeder:
            traced.attention.setdefault(feeder, site)

    with module_kept(module), random_state_kept(0), torch.no_grad():
        module.eval()
        with watched_forward(
            module,
            on_layer=ran,
            before_activation=activated,
            # An in-place activation hands on the same tensor, which is no layer's output now.
            after_activation=lambda site, h: origins.forget(h),
            on_attention=attended,
            on_call=called,
        ):
            module(example_input(module, size=size))
    return traced


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


def _axis(kind: LayerKind, module: nn.Module, made: Tensor) -> int:
    """Return the axis of what a layer made that its units lie on."""
    weight = getattr(module, "weight", None)
    if kind == "norm" and made.ndim > 1:
        fits = weight is not None and tuple(weight.shape) == made.shape[-1:]
        return made.ndim - 1 if fits and not _norms_channels(module) else 1
    if kind == "other":
        sizes = [each.shape for each in module._parameters.values() if each is not None]
        widest = max(sizes, key=math.prod, default=torch.Size())
        wide = [place - len(widest) for place, size in enumerate(widest) if size > 1]
        # A scale of (channels, 1, 1) is lined up at the last axes of what it scales.
        if len(wide) == 1 and made.ndim >= len(widest) and made.shape[wide[0]] == max(widest):
            return made.ndim + wide[0]
    fan = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    return unit_axis(kind, made.shape, fan if isinstance(fan, int) else None)


def _norms_channels(module: nn.Module) -> bool:
    """Return whether a norm's units are on axis 1 whatever its weight fits."""
    return (
        getattr(module, "running_mean", None) is not None
        or isinstance(module, nn.GroupNorm)
        or "2d" in type(module).__name__.lower()
        or getattr(module, "data_format", "") == "channels_first"
    )


def _kind(module: nn.Module) -> LayerKind:
    name = type(module).__name__.lower()
    if "norm" in name or getattr(module, "running_mean", None) is not None:
        return "norm"
    weight = getattr(module, "weight", None)
    # A bilinear layer has a matrix for each output, and is no convolution for that.
    if isinstance(module, nn.Linear | nn.Bilinear | nn.MultiheadAttention):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd) or (
        isinstance(weight, Tensor) and weight.ndim >= 3
    ):
        return "conv"
    if isinstance(weight, Tensor) and weight.ndim == 2:
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
            site, axis = traced.sites.get(name, (None, 1))
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
                        "unit_axis": axis,
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
