"""Network, layer and images -> attributions, by Captum's public methods.

A copy of the network runs: its in-place activations work out of place, because Captum reads a
layer's output after the layer has run.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import (
    LayerConductance,
    LayerFeatureAblation,
    LayerGradCam,
    LayerIntegratedGradients,
)
from captum.metrics import infidelity
from torch import Tensor, nn

from core.errors import ModelError, OptionError, Remedy, Stopped
from core.network.trace import first_tensor
from core.seeding import random_state_kept

Target = Callable[[Tensor], Tensor]

# Spread of the noise that infidelity adds to a layer's output, in its standard deviations, and
# how many draws of it.
NOISE = 0.1
DRAWS = 8
# Images that run at once on the path from the baseline.
AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class LayerAttribution:
    """What one method says of one layer on some images.

    Attributes:
        values: (images, ...) in the shape of the layer's output, or with one channel.
        outputs: (images,) the target.
        baseline_outputs: (images,) that where the path begins; None for a method without one.
        infidelity: Mean over images; None where it cannot be taken.
    """

    values: Tensor
    outputs: Tensor
    baseline_outputs: Tensor | None
    infidelity: float | None


@contextmanager
def explaining(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of the network that Captum can look into; the network itself is not touched.

    Raises:
        ModelError: It cannot be copied.
    """
    try:
        own = copy.deepcopy(module).eval()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError("The network cannot be copied, so no attribution can be taken.") from error
    for part in own.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    with random_state_kept(0), warnings.catch_warnings():
        # Captum warns of hooks that it sets itself, and of what its defaults will be.
        warnings.simplefilter("ignore")
        yield own


def features_target(module: nn.Module, head: nn.Module) -> Target:
    """Return half the squared norm of what enters the head: inputs to (images,).

    Raises:
        ModelError: From the target: nothing enters the head.
    """

    def target(inputs: Tensor) -> Tensor:
        entering: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            tensor = first_tensor(args)
            if tensor is not None:
                entering.append(tensor)

        handle = head.register_forward_pre_hook(keep)
        try:
            module(inputs)
        finally:
            handle.remove()
        if not entering:
            raise ModelError("Nothing enters the head of this network as a tensor.")
        return entering[0].flatten(1).float().square().sum(1) / 2

    return target


def class_target(module: nn.Module, labels: Tensor) -> Target:
    """Return the output of each image's own class, (images,), for inputs that repeat the images.

    Args:
        module: Gives (images, classes).
        labels: (images,) of the images that are explained.
    """

    def target(inputs: Tensor) -> Tensor:
        logits = first_tensor(module(inputs))
        assert logits is not None
        # Captum repeats the images as a whole for each point of a path.
        wanted = labels.repeat(-(-len(logits) // len(labels)))[: len(logits)]
        return logits.gather(1, wanted[:, None])[:, 0]

    return target


def attributed(
    module: nn.Module,
    layer: nn.Module,
    inputs: Tensor,
    target: Target,
    method: str,
    *,
    steps: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> LayerAttribution:
    """Attribute the target to a layer's output.

    Args:
        module: As `explaining` yields it.
        layer: One of its modules.
        inputs: (images, 3, height, width), normalised.
        target: Inputs to (images,).
        method: "gradcam", "integrated-gradients" or "conductance".
        steps: Points on the path from the baseline, which is 0 after normalisation.
        should_stop: Asked before each forward pass.

    Raises:
        OptionError: The method does not apply to the layer.
        ModelError: The network cannot run on the images.
        Stopped: Where that is wanted.

    Source:
        Selvaraju et al. 2017, arXiv:1610.02391; Sundararajan et al. 2017, arXiv:1703.01365;
        Dhamdhere et al. 2018, arXiv:1805.12233; Yeh et al. 2019, arXiv:1901.09392 (infidelity).
    """

    def stoppable(given: Tensor) -> Tensor:
        if should_stop():
            raise Stopped("The attribution was stopped; nothing was written.")
        return target(given)

    inputs = inputs.detach()
    with torch.no_grad():
        outputs = stoppable(inputs)
        shape = _output_of(module, layer, inputs).shape
    if method == "gradcam":
        if len(shape) != 4:
            raise OptionError(
                f"Grad-CAM needs a layer with channels and two axes of places; the output of this "
                f"one has the shape {tuple(shape)}.",
                Remedy.OTHER_METHOD,
            )
        values = LayerGradCam(stoppable, layer).attribute(inputs, relu_attributions=False)
        return LayerAttribution(values.detach(), outputs, None, None)
    baseline = torch.zeros_like(inputs)
    whole = method == "integrated-gradients"
    with torch.no_grad():
        # The path of integrated gradients begins where only this layer's output is the baseline's:
        # what runs past it, as through a residual sum, stays the image's own.
        from_baseline = (
            _with_output(layer, _output_of(module, layer, baseline), inputs, stoppable)
            if whole
            else stoppable(baseline)
        )
    kind = LayerIntegratedGradients if whole else LayerConductance
    # Whole images at a time, so that a class target knows whose they are.
    batch = max(1, AT_ONCE // len(inputs)) * len(inputs)
    values = kind(stoppable, layer).attribute(
        inputs, baselines=baseline, n_steps=steps, internal_batch_size=batch
    )
    values = values.detach()
    return LayerAttribution(
        values, outputs, from_baseline, _infidelity(module, layer, inputs, stoppable, values)
    )


def ablated(
    layer: nn.Module,
    inputs: Tensor,
    target: Target,
    *,
    shape: Sequence[int],
    axis: int,
    group: int,
) -> Tensor:
    """Return by how much the target falls without each group of units, (images, groups).

    Args:
        layer: Of the network that the target runs.
        inputs: (images, 3, height, width).
        target: Inputs to (images,).
        shape: Of the layer's output.
        axis: Which of its axes counts the units.
        group: How many neighbouring units are set to 0 at once; 0 for all of them.

    Source:
        Captum's LayerFeatureAblation; Kokhlikyan et al. 2020, arXiv:2009.07896.
    """
    units = shape[axis]
    places = torch.arange(units, device=inputs.device) // (group or units)
    broad = [1] * len(shape)
    broad[axis] = units
    mask = places.view(broad)
    with torch.no_grad():
        values = LayerFeatureAblation(target, layer).attribute(
            inputs, layer_baselines=0, layer_mask=mask, perturbations_per_eval=1
        )
    # All entries of a group hold the same number: one of each is enough.
    first = values.movedim(axis, -1).reshape(len(inputs), -1, units)[:, 0]
    return first[:, :: group or units]


def output_shape(module: nn.Module, layer: nn.Module, inputs: Tensor) -> tuple[int, ...]:
    """Return the shape of what a layer gives for some inputs (images, 3, height, width).

    Raises:
        OptionError: The layer does not run on them.
    """
    with torch.no_grad():
        return tuple(_output_of(module, layer, inputs).shape)


def _output_of(module: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            kept.append(tensor)

    handle = layer.register_forward_hook(keep)
    try:
        module(inputs)
    finally:
        handle.remove()
    if not kept:
        raise OptionError("This layer does not run on these images, or gives no tensor.")
    return kept[0]


def _with_output(layer: nn.Module, output: Tensor, inputs: Tensor, target: Target) -> Tensor:
    """Return the target of inputs where a layer gives an output of another run."""
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        return target(inputs)
    finally:
        handle.remove()


def _infidelity(
    module: nn.Module, layer: nn.Module, inputs: Tensor, target: Target, values: Tensor
) -> float | None:
    """Return Captum's infidelity of attributions at a layer, scaled, mean over the images."""
    with torch.no_grad():
        output = _output_of(module, layer, inputs)
    if output.shape != values.shape:
        return None
    generator = torch.Generator(device=output.device).manual_seed(0)
    spread = NOISE * float(output.std())

    def from_layer(given: Tensor) -> Tensor:
        repeats = len(given) // len(inputs)
        # Captum repeats each image for itself; a class target wants the images in turn.
        turned = given.view(len(inputs), repeats, *given.shape[1:]).transpose(0, 1).flatten(0, 1)
        made = _with_output(layer, turned, inputs.repeat(repeats, 1, 1, 1), target)
        return made.view(repeats, len(inputs)).T.flatten()

    def noisy(given: Tensor) -> tuple[Tensor, Tensor]:
        noise = spread * torch.randn(given.shape, generator=generator, device=given.device)
        return noise, given - noise

    with torch.no_grad():
        scores = infidelity(
            from_layer, noisy, output, values, n_perturb_samples=DRAWS, normalize=True
        )
    score = float(scores.mean())
    return score if math.isfinite(score) else None
