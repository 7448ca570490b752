"""Loaded model -> outline: its layers in forward order and how they hang together.

Order, coupling and which layer feeds which activation are read off one forward pass with a tiny
batch, not off names: a definition order is not a running order, and `bn1` may follow anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.network.hooks import module_kept
from core.network.origins import PRODUCTS, Origin, Origins, tensors_in
from core.network.trace import Site, first_tensor, traced_forward
from core.records import LayerInfo, ModelCard, ModelOutline, ParameterInfo
from core.records.outline import LayerKind
from core.reductions import unit_axis
from core.seeding import random_state_kept

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


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
        trace = _Trace(module)
        trace.run(module, example_input(module, size=card.default_size))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{card.title} does not run on a {card.default_size} px image: {first[:200]}. "
            "Choose another model."
        ) from error
    return ModelOutline(
        **dict(card),
        layers=_layers(module, trace, head),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )


class _Trace:
    """What one forward pass tells of a network's layers, noted call by call.

    Attributes:
        order: Names of layers in the order in which they first ran.
        executed: The same names.
        coupled: Layer to the running statistics of the norm that reads it directly.
        sites: Layer to the activation it feeds, and the axis its units lie on there.
        attention: Layer that makes the queries to the attention.
    """

    def __init__(self, module: nn.Module) -> None:
        self.order: list[str] = []
        self.coupled: dict[str, tuple[str, ...]] = {}
        self.sites: dict[str, tuple[Site, int]] = {}
        self.attention: dict[str, str] = {}
        self._modules = dict(module.named_modules())
        owners = [name for name, part in self._modules.items() if part._parameters]
        self._kinds = {name: _kind(self._modules[name]) for name in owners}
        # The layers that own a parameter, by its id.
        self._owners: dict[int, list[str]] = {}
        for name in owners:
            for parameter in self._modules[name]._parameters.values():
                self._owners.setdefault(id(parameter), []).append(name)
        self._origins = Origins()
        self.executed: set[str] = set()

    def run(self, module: nn.Module, inputs: Tensor) -> None:
        """Take the pass, and leave the network as it was."""
        with module_kept(module), random_state_kept(0), torch.no_grad():
            module.eval()
            with traced_forward(
                module,
                on_layer=self._ran,
                before_activation=self._activated,
                # An in-place activation hands on the same tensor, which is no layer's output now.
                after_activation=lambda site, h: self._origins.forget(h),
                on_attention=self._attended,
                on_call=self._called,
            ):
                module(inputs)

    def _came_by(self, name: str) -> None:
        if name and name not in self.executed:
            self.executed.add(name)
            self.order.append(name)

    def _called(
        self,
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
            names = self._owners.get(id(tensor), ())
            # Of the layers that share a parameter the one that runs is meant.
            inside = [name for name in names if name in running]
            for name in inside or names:
                self._came_by(name)
                if not inside and place == 1 and function in PRODUCTS:
                    self._ran(name, self._modules[name], given, result)
        self._origins.called(function, args, kwargs, result)

    def _ran(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._came_by(name)
        made = first_tensor(output)
        given = first_tensor(args)
        kind = self._kinds[name]
        maker = self._origins.maker(given) if kind == "norm" else None
        buffers = tuple(f"{name}.{key}" for key in RUNNING if layer._buffers.get(key) is not None)
        if maker is not None and buffers:
            self.coupled.setdefault(maker.layer, buffers)
        if made is None:
            return
        if maker is None or given is None or given.shape != made.shape:
            axis = axis_of_units(kind, layer, made)
            maker = Origin(name if maker is None else maker.layer, axis)
        self._origins.ran(maker, made)

    def _activated(self, site: Site, z: Tensor) -> None:
        around = site.name.rpartition(".")[0]
        # Behind a concatenation it is the norm around it that feeds it, if there is one.
        feeder = self._origins.feeder(z)
        if feeder is None and around in self._kinds and z.ndim > 1:
            feeder = Origin(around, axis_of_units(self._kinds[around], self._modules[around], z))
        if feeder is not None:
            self.sites.setdefault(feeder.layer, (site, feeder.axis))

    def _attended(self, site: str, inside: str, _: object) -> None:
        feeder = _asks(inside, self.order, self._kinds) or self._origins.last
        if feeder:
            self.attention.setdefault(feeder, site)


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


def axis_of_units(kind: LayerKind, module: nn.Module, made: Tensor) -> int:
    """Return the axis of what a layer made that its units lie on.

    Args:
        kind: The layer's kind.
        module: The layer.
        made: What it made, shape (n, ...).
    """
    weight = getattr(module, "weight", None)
    if kind == "norm" and made.ndim > 1:
        fits = weight is not None and tuple(weight.shape) == made.shape[-1:]
        return made.ndim - 1 if fits and not _norms_channels(module) else 1
    if kind == "other":
        sizes = [
            parameter.shape for parameter in module._parameters.values() if parameter is not None
        ]
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


def _layers(module: nn.Module, trace: _Trace, head: frozenset[str]) -> tuple[LayerInfo, ...]:
    shared = _shared_names(module)
    place = {name: float(i) for i, name in enumerate(trace.order)}
    rows: list[tuple[float, str, dict[str, Any]]] = []
    for name, part in module.named_modules():
        if name and any(parameter is not None for parameter in part._parameters.values()):
            rows.append((place.get(name, float("inf")), name, _facts(name, part, trace)))
    # The root's own parameters are used before or between its children; which, no hook sees.
    # They are shown first.
    for name, parameter in module._parameters.items():
        if parameter is not None:
            facts = {
                "type": "Parameter",
                "kind": "other",
                "parameters": (_parameter_info(name, parameter),),
            }
            rows.append((-1.0, name, facts))
    rows.sort(key=lambda row: row[0])
    return tuple(
        LayerInfo(
            name=name,
            index=i,
            stage=stage_of(name),
            tied=tuple(shared[p.name] for p in facts["parameters"] if p.name in shared),
            head=any(p.name in head for p in facts["parameters"]),
            **facts,
        )
        for i, (_, name, facts) in enumerate(rows)
    )


def _parameter_info(name: str, parameter: Tensor) -> ParameterInfo:
    return ParameterInfo(name=name, shape=tuple(parameter.shape), count=parameter.numel())


def _facts(name: str, part: nn.Module, trace: _Trace) -> dict[str, Any]:
    """Return what a module that owns parameters is, and what the pass told of it."""
    site, axis = trace.sites.get(name, (None, 1))
    return {
        "type": type(part).__name__,
        "kind": _kind(part),
        "parameters": tuple(
            _parameter_info(f"{name}.{key}", parameter)
            for key, parameter in part._parameters.items()
            if parameter is not None
        ),
        "buffers": tuple(
            f"{name}.{key}"
            for key, buffer in part._buffers.items()
            if buffer is not None and key not in part._non_persistent_buffers_set
        ),
        "coupled_buffers": trace.coupled.get(name, ()),
        "activation": site.name if site else None,
        "unit_axis": axis,
        "attention": trace.attention.get(name),
        "executed": name in trace.executed,
    }


def _shared_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}
