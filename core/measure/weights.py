"""The weights that layers' figures speak of, and which of them get a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from core.records import LayerInfo

EMPTY = "the weight has no entries"


def main_parameter(layer: LayerInfo) -> str:
    """Return the `state_dict` name of the parameter a layer's figures speak of: its largest."""
    return max(layer.parameters, key=lambda parameter: parameter.count).name


@dataclass(frozen=True, slots=True)
class Weights:
    """Each layer's main parameter, as the network holds it.

    Attributes:
        layers: The layers that are reported on.
        by_layer: Layer name to its main parameter; layers that share one hold the same.
        trained: `state_dict` name to parameter, of those that take part in training, each once.
        names: id of such a parameter to its name in `trained`.
        frozen: Layers whose main parameter is frozen while others of the layer are not.
    """

    layers: Sequence[LayerInfo]
    by_layer: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    names: Mapping[int, str]
    frozen: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module, layers: Sequence[LayerInfo]) -> Weights:
        """Return the weights of a network's layers."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        by_layer = {layer.name: parameters[main_parameter(layer)] for layer in layers}
        names: dict[int, str] = {}
        for layer in layers:
            weight = by_layer[layer.name]
            if weight.requires_grad and weight.numel():
                names.setdefault(id(weight), main_parameter(layer))
        partly = frozenset(
            layer.name
            for layer in layers
            if not by_layer[layer.name].requires_grad
            and any(parameters[parameter.name].requires_grad for parameter in layer.parameters)
        )
        trained = {name: parameters[name] for name in names.values()}
        return cls(layers, by_layer, trained, names, partly)

    def gradient_of(self, layer: str) -> str | None:
        """Return under which name a layer's gradient is summed; None for a frozen one."""
        return self.names.get(id(self.by_layer[layer]))

    def why_no_gradient(self, layer: LayerInfo) -> str:
        """Return why a layer's gradient is not summed, where `gradient_of` gives none."""
        if not self.by_layer[layer.name].numel():
            return EMPTY
        if layer.name in self.frozen:
            name = main_parameter(layer)
            return f"{name} is frozen: it gets no gradient, though others of its layer do"
        return "the layer is frozen: it gets no gradient"
