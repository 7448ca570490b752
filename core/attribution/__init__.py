"""Network, layer and images -> attributions, by Captum's public methods.

A copy of the network runs: its in-place activations work out of place, because Captum reads a
layer's output after the layer has run. What else works in place, as an addition of the residual
branch may, works on a copy of that output.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from captum.attr import (
    LayerConductance,
    LayerFeatureAblation,
    LayerGradCam,
    LayerIntegratedGradients,
)
from captum.metrics import infidelity, infidelity_perturb_func_decorator
from torch import Tensor, nn
from torch.func import functional_call

from core.errors import ModelError, OptionError, Remedy, Stopped
from core.network.trace import first_tensor
from core.seeding import random_state_kept

Target = Callable[[Tensor], Tensor]
Replaced = Literal["zero", "input"]

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
        values: (images, ...) in the shape of the layer's output.
        outputs: (images,) the target.
        baseline_outputs: (images,) that where the path begins; None for a method without one.
        infidelity: Mean over images; None where it cannot be taken.
        sigma: Standard deviation of the noise it was taken with.
    """

    values: Tensor
    outputs: Tensor
    baseline_outputs: Tensor | None
    infidelity: float | None
    sigma: float | None = None


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
    for parameter in own.parameters():
        # Where all before a layer is frozen, its output would have no gradient to give.
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
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
    with _kept_apart(layer):
        with torch.no_grad():
            outputs = stoppable(inputs)
            output = layer_output(module, layer, inputs)
        try:
            if method == "gradcam":
                return _gradcam(layer, inputs, stoppable, outputs, output)
            return _on_a_path(module, layer, inputs, stoppable, outputs, output, method, steps)
        except RuntimeError as error:
            if "not have been used in the graph" in str(error):
                raise OptionError(
                    "The target does not depend on the output of this layer.", Remedy.OTHER_LAYER
                ) from error
            raise


def _gradcam(
    layer: nn.Module, inputs: Tensor, target: Target, outputs: Tensor, output: Tensor
) -> LayerAttribution:
    if output.ndim != 4:
        raise OptionError(
            f"Grad-CAM needs a layer with channels and two axes of places; the output of this "
            f"one has the shape {tuple(output.shape)}.",
            Remedy.OTHER_METHOD,
        )
    # Channel by channel; their sum is the map.
    values = LayerGradCam(target, layer).attribute(
        inputs, attr_dim_summation=False, relu_attributions=False
    )
    return LayerAttribution(values.detach(), outputs, None, None)


def _on_a_path(
    module: nn.Module,
    layer: nn.Module,
    inputs: Tensor,
    target: Target,
    outputs: Tensor,
    output: Tensor,
    method: str,
    steps: int,
) -> LayerAttribution:
    """Attribute by a method that goes from the baseline to the image."""
    baseline = torch.zeros_like(inputs)
    whole = method == "integrated-gradients"
    with torch.no_grad():
        bare = layer_output(module, layer, baseline)
        # The path of integrated gradients begins where only this layer's output is the baseline's:
        # what runs past it, as through a residual sum, stays the image's own.
        from_baseline = _with_output(layer, bare, inputs, target) if whole else target(baseline)
    kind = LayerIntegratedGradients if whole else LayerConductance
    # Whole images at a time, so that a class target knows whose they are.
    batch = max(1, AT_ONCE // len(inputs)) * len(inputs)
    values = kind(target, layer).attribute(
        inputs, baselines=baseline, n_steps=steps, internal_batch_size=batch
    )
    values = values.detach()
    score, sigma = _infidelity(layer, inputs, target, values, output, bare)
    return LayerAttribution(values, outputs, from_baseline, score, sigma)


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
    with torch.no_grad(), _kept_apart(layer):
        values = LayerFeatureAblation(target, layer).attribute(
            inputs, layer_baselines=0, layer_mask=mask, perturbations_per_eval=1
        )
    # All entries of a group hold the same number: one of each is enough.
    first = values.movedim(axis, -1).reshape(len(inputs), -1, units)[:, 0]
    return first[:, :: group or units]


def block_loss(
    module: nn.Module, block: nn.Module, inputs: Tensor, target: Target
) -> tuple[Tensor, Replaced]:
    """Return by how much the target falls without a block, (images,), and what stood in for it.

    A residual block gives its input instead: that is what it would give if its branches added
    nothing. Any other gives 0.

    Raises:
        OptionError: The block does not run once on these images, or gives no tensor.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A block may write into its input.
        first, *rest = args or (None,)
        first = first.clone() if isinstance(first, Tensor) else first
        calls.append(((first, *rest) if args else (), kwargs))

    with torch.no_grad(), _kept_apart(block):
        handle = block.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            output = layer_output(module, block, inputs)
        finally:
            handle.remove()
        args, kwargs = calls[0]
        skipped = args[0].clone() if _is_residual(block, args, kwargs, output) else None
        values = LayerFeatureAblation(target, block).attribute(
            inputs,
            layer_baselines=0 if skipped is None else skipped,
            layer_mask=torch.zeros_like(output[:1], dtype=torch.long),
            perturbations_per_eval=1,
        )
    return values.flatten(1)[:, 0], "zero" if skipped is None else "input"


def _is_residual(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> bool:
    """Whether a block with all its parameters at 0 gives its input back."""
    if not args or not isinstance(args[0], Tensor) or args[0].shape != output.shape:
        return False
    given = args[0].clone()
    nothing = {name: torch.zeros_like(value) for name, value in block.named_parameters()}
    left = functional_call(block, nothing, (given, *args[1:]), kwargs)
    return isinstance(left, Tensor) and torch.allclose(left, args[0], rtol=1e-4, atol=1e-5)


def layer_output(module: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a layer gives for some inputs (images, 3, height, width).

    Raises:
        OptionError: It is nothing that Captum can look at: the layer does not run on them once,
            or gives no tensor with one entry an image.
    """
    kept: list[Any] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        # What comes after may write into it.
        kept.append(output.clone() if isinstance(output, Tensor) else output)

    handle = layer.register_forward_hook(keep)
    try:
        module(inputs)
    finally:
        handle.remove()
    if len(kept) != 1:
        raise OptionError(
            "This layer does not run on these images."
            if not kept
            else f"This layer runs {len(kept)} times on each image, and one output is looked at.",
            Remedy.OTHER_LAYER,
        )
    (output,) = kept
    if not isinstance(output, Tensor):
        raise OptionError("This layer gives several values, not one tensor.", Remedy.OTHER_LAYER)
    if output.ndim < 2 or len(output) != len(inputs):
        raise OptionError(
            f"The output of this layer has the shape {tuple(output.shape)} for {len(inputs)} "
            "images: it does not count images first.",
            Remedy.OTHER_LAYER,
        )
    return output


def grids(module: nn.Module, inputs: Tensor) -> list[tuple[int, int]]:
    """Return the sides of the maps that convolutions make of some inputs, in running order.

    Args:
        module: The network.
        inputs: Images, shape (n, channels, height, width).

    Returns:
        Pairs (height, width) in positions, each once.
    """
    sides: dict[tuple[int, int], None] = {}

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.ndim == 4:
            sides[(output.shape[2], output.shape[3])] = None

    handles = [
        part.register_forward_hook(keep) for part in module.modules() if isinstance(part, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(sides)


@contextmanager
def _kept_apart(layer: nn.Module) -> Iterator[None]:
    """Hand on a copy of what a layer gives, so that what is written into it does not reach Captum.

    The copy has to be the last thing that happens to the output, and Captum hooks the layer later
    than this: the hook is set anew whenever the layer begins to run.
    """
    handles: list[Any] = []

    def apart(_: nn.Module, __: Any, output: Any) -> Any:
        return output.clone() if isinstance(output, Tensor) else None

    def begin(part: nn.Module, _: Any) -> None:
        while handles:
            handles.pop().remove()
        handles.append(part.register_forward_hook(apart))

    first = layer.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        first.remove()
        for handle in handles:
            handle.remove()


def _with_output(layer: nn.Module, output: Tensor, inputs: Tensor, target: Target) -> Tensor:
    """Return the target of inputs where a layer gives an output of another run."""
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        return target(inputs)
    finally:
        handle.remove()


def _infidelity(
    layer: nn.Module,
    inputs: Tensor,
    target: Target,
    values: Tensor,
    output: Tensor,
    baseline: Tensor,
) -> tuple[float | None, float | None]:
    """Return Captum's infidelity of values at a layer, mean over the images, and its noise.

    The values are multiplied by how far the output is from the baseline's. Captum's decorator
    takes that out again; without it the noise would be multiplied twice.
    """
    generator = torch.Generator(device=output.device).manual_seed(0)
    sigma = NOISE * float(output.std())

    def from_layer(given: Tensor) -> Tensor:
        repeats = len(given) // len(inputs)
        # Captum repeats each image for itself; a class target wants the images in turn.
        turned = given.view(len(inputs), repeats, *given.shape[1:]).transpose(0, 1).flatten(0, 1)
        made = _with_output(layer, turned, inputs.repeat(repeats, 1, 1, 1), target)
        return made.view(repeats, len(inputs)).T.flatten()

    @infidelity_perturb_func_decorator(multiply_by_inputs=True)
    def noisy(given: Tensor, _: Tensor) -> Tensor:
        noise = torch.randn(given.shape, generator=generator, device=given.device)
        return given - sigma * noise

    with torch.no_grad():
        scores = infidelity(
            from_layer,
            noisy,
            output,
            values,
            baselines=baseline,
            n_perturb_samples=DRAWS,
            normalize=True,
        )
    score = float(scores.mean())
    return (score, sigma) if math.isfinite(score) else (None, None)
