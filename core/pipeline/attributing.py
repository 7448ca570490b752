"""Network, images, and a plan or trained weights -> what a layer carries, by Captum."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.attribution import (
    AT_ONCE,
    DRAWS,
    NOISE,
    Replaced,
    ablated,
    attributed,
    block_loss,
    class_target,
    explaining,
    features_target,
    grids,
    layer_output,
)
from core.catalogue.attributions import method_named
from core.edit.apply import entry_flags
from core.errors import DataError, ModelError, OptionError, PlanError, Remedy, Stopped
from core.files.companions import arrays_of, plan_json
from core.load import LoadedModel, choose_items, load_model, read_checkpoint
from core.network.outline import axis_of_units, outline_module
from core.pipeline.applying import edited_model, load_edited, plan_classes, plan_spec
from core.pipeline.batches import (
    check_amounts,
    check_image_size,
    opened_images,
    read_batch,
    thumbnails,
)
from core.pipeline.machine import choose_device, versions
from core.pipeline.progress import Progress
from core.records import DataSpec, LayerInfo, ModelOutline, ModelSpec, ReinitPlan
from core.records.attribution import Attribution, StateAttribution, Target

DEFAULT_IMAGES = 4
DEFAULT_STEPS = 32
# Bars of an ablation at most; with more units, neighbours share one.
DEFAULT_GROUPS = 64
PICTURE_PX = 96
# What an ablation of every layer, or of every block, is asked for by.
ALL = "all"
BLOCKS = "blocks"
# Class and register tokens of a transformer at most.
MOST_PREFIX_TOKENS = 16

TARGETS: Mapping[Target, str] = {
    "features": "half the squared norm of the features that enter the head: it needs no trained "
    "head",
    "class": "the output for each image's own class: of a head that was not trained it says "
    "nothing",
}

# Methods that follow a path of so many steps.
INTEGRATING = ("auto", "integrated-gradients", "conductance")

Arrays = dict[str, np.ndarray]
Explained = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeSettings:
    """How a layer is looked at.

    Attributes:
        method: "auto" takes Grad-CAM for layers with channels and places, else conductance.
        target: Key of `TARGETS`; None takes "class" where trained weights are given.
        images: How many.
        steps: Points on the path from the baseline.
        groups: Bars of an ablation of one layer at most; with more units, neighbours share one.
        image_size: Side in pixels; None takes the model's default for short runs.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the head and of the choice of images.
    """

    method: str = "auto"
    target: Target | None = None
    images: int = DEFAULT_IMAGES
    steps: int = DEFAULT_STEPS
    groups: int = DEFAULT_GROUPS
    image_size: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(samples=self.images, batch_size=self.steps)
        if not 1 <= self.groups <= 65_536:
            raise OptionError(f"The number of groups is {self.groups}; give 1 to 65,536.")
        if self.method != "auto":
            method_named(self.method)
        if self.target is not None and self.target not in TARGETS:
            raise OptionError(f'The target is "{self.target}"; give {" or ".join(TARGETS)}.')


def attribute(
    spec: ModelSpec,
    data: DataSpec,
    layer: str,
    settings: AttributeSettings | None = None,
    *,
    plan: ReinitPlan | None = None,
    trained: Sequence[Path] = (),
    progress: Progress | None = None,
) -> tuple[Attribution, Arrays]:
    """Say what a layer carries, for each state of the network on the same images.

    Args:
        spec: The model.
        data: The images; of the validation part, where there is one.
        layer: A layer of the outline; or, for an ablation, "all" for one bar a layer and "blocks"
            for one a block, which are the outline's stages.
        settings: How; None takes the defaults.
        plan: Adds the state after this plan.
        trained: Files of trained weights of this network, each a state.
        progress: Progress and stop.

    Returns:
        The record, and for each state "STATE/maps" (images, height, width), where the layer has
        places, "STATE/units" (images, units) or, for an ablation, (images, bars), "STATE/output"
        (images,) and, for methods with a path, "STATE/baseline_output" (images,); and
        "images/thumbnails" (images, 96, 96, 3) uint8.

    Raises:
        LimberError: Bad input, or stopped.
    """
    settings, progress = settings or AttributeSettings(), progress or Progress()
    place = choose_device(settings.device)
    images = opened_images(data, progress)
    progress.phase("loading the model")
    classes = len(images.outline.classes)
    loaded = load_model(spec, classes=classes, head_seed=settings.seed)
    outline = outline_module(loaded.module, loaded.card, loaded.head)
    size = outline.default_size if settings.image_size is None else settings.image_size
    check_image_size(outline, size)
    items = choose_items(
        images.splits.get("val") or images.splits["train"], settings.images, seed=settings.seed
    )
    if not items:
        raise DataError("The data set has no images to look at.")
    inputs, labels = read_batch(images, items, outline.preprocessing, size=size, device=place)
    inputs = inputs.contiguous()
    target = settings.target or ("class" if trained else "features")
    look = _Look(
        outline=outline,
        layer=layer,
        method=settings.method if settings.method == "auto" else method_named(settings.method).name,
        target=target,
        inputs=inputs,
        labels=labels,
        steps=settings.steps,
        groups=settings.groups,
        progress=progress,
        place=place,
    )
    states: list[StateAttribution] = []
    pictures = thumbnails(inputs, outline.preprocessing, size=PICTURE_PX)
    arrays: Arrays = {"images/thumbnails": pictures}
    for name, make in _states(loaded, spec, plan, trained, classes, settings.seed):
        progress.phase(f"looking at the network: {name}")
        found, more = look.at(name, make())
        states.append(found)
        arrays |= more
    method = method_named(look.method)
    taken = all(state.infidelity is not None for state in states)
    return Attribution(
        model=spec,
        model_title=loaded.card.title,
        data=data,
        data_title=images.outline.title,
        data_fingerprint=images.outline.fingerprint,
        backbone_sha256=loaded.card.backbone_sha256,
        plan_sha256=None if plan is None else hashlib.sha256(plan_json(plan).encode()).hexdigest(),
        layer=layer,
        method=look.method,
        baseline=method.baseline,
        target=target,
        target_words=TARGETS[target],
        labels=tuple(int(label) for label in labels),
        classes=tuple(images.outline.classes[int(label)] for label in labels),
        images=tuple(item.name for item in items),
        image_size=size,
        seed=settings.seed,
        device=place.type,
        steps=settings.steps,
        units=look.bars,
        group=look.group,
        names=tuple(look.names),
        replaced=tuple(look.replaced),
        left_out=look.left_out,
        reset=None if plan is None or look.bars is None else look.reset_shares(plan, loaded),
        grid=look.grid,
        prefix_tokens=look.prefix_tokens,
        states=tuple(states),
        why_no_gap=method.why_no_sum,
        perturbation=""
        if method.why_no_infidelity
        else f"normal noise on each entry of the layer's output, {NOISE:g} times that output's "
        f"standard deviation, {DRAWS} draws, seed 0",
        why_no_infidelity=""
        if taken
        else method.why_no_infidelity or "it is no finite number on these images",
        versions=versions() | {"captum": version("captum")},
    ), arrays


def _states(
    loaded: LoadedModel,
    spec: ModelSpec,
    plan: ReinitPlan | None,
    trained: Sequence[Path],
    classes: int,
    seed: int,
) -> list[tuple[str, Callable[[], LoadedModel]]]:
    """Return each state's name and how it is made."""
    states: list[tuple[str, Callable[[], LoadedModel]]] = [("pretrained", lambda: loaded)]
    if plan is not None:
        if plan_spec(plan) != spec:
            raise PlanError(
                f'The plan "{plan.name}" was made for {plan.model.name}, and this network is '
                f"{spec.name}. Take the network it was made for."
            )
        states.append(("planned", lambda: _planned(loaded, plan, classes, seed)))
    for path in trained:
        name = _free_name(path.stem, {"images", "planned", *(name for name, _ in states)})
        states.append((name, partial(_trained, spec, path, classes, seed)))
    return states


def _free_name(name: str, taken: set[str]) -> str:
    """Return a state's name, numbered where another has it: arrays are called by it."""
    number = 2
    free = name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def _planned(loaded: LoadedModel, plan: ReinitPlan, classes: int, seed: int) -> LoadedModel:
    edited, _ = edited_model(plan, classes=classes, head_seed=seed)
    if (plan_classes(plan), plan.model.head_seed) == (classes, seed):
        return edited
    # What a plan writes into the head was chosen on its own, and this is another.
    own, other = loaded.module.state_dict(), edited.module.state_dict()
    load_edited(edited.module, other | {name: own[name] for name in loaded.head})
    return edited


def _trained(spec: ModelSpec, path: Path, classes: int, seed: int) -> LoadedModel:
    loaded = load_model(spec, classes=classes, head_seed=seed)
    state = read_checkpoint(path)
    try:
        load_edited(loaded.module, state)
    except RuntimeError as error:
        raise ModelError(
            f'"{path.name}" does not hold all weights of this network with this head.'
        ) from error
    return loaded


@dataclass(slots=True, kw_only=True)
class _Look:
    """One look at a layer, repeated for each state."""

    outline: ModelOutline
    layer: str
    method: str
    target: Target
    inputs: Tensor
    labels: Tensor
    steps: int
    groups: int
    progress: Progress
    place: torch.device
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    bars: int | None = None
    group: int = 1
    units: int = 0
    names: Sequence[str] = ()
    replaced: Sequence[Replaced] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    def at(self, name: str, loaded: LoadedModel) -> tuple[StateAttribution, Arrays]:
        """Return what one state of the network gives, and its arrays."""
        begun = time.perf_counter()
        if self.layer in (ALL, BLOCKS):
            if self.method not in ("auto", "ablation"):
                raise OptionError(
                    f'"{self.layer}" is for an ablation: {method_named(self.method).title} looks '
                    "at one layer.",
                    Remedy.OTHER_METHOD,
                )
            self.method = "ablation"
        else:
            self._check_layer()
        parts: list[_Part] = []
        with explaining(loaded.module) as module, _Cost.of(module) as cost:
            module.to(self.place)
            # Images do not know of each other, so any number of them takes the memory of a few.
            for inputs, labels in zip(
                self.inputs.split(AT_ONCE), self.labels.split(AT_ONCE), strict=True
            ):
                target = self._followed(self._target(module, loaded, labels), len(parts))
                if self.method == "ablation":
                    parts.append(self._ablation(module, inputs, target))
                else:
                    parts.append(self._attribution(module, inputs, target))
        whole = _Part.joined(parts)
        self._check_finite(whole)
        arrays = {
            f"{name}/{what}": _array(values)
            for what, values in (
                ("maps", whole.maps),
                ("units", whole.units),
                ("output", whole.outputs),
                ("baseline_output", whole.baseline_outputs),
            )
            if values is not None
        }
        return self._said(name, whole, time.perf_counter() - begun, cost), arrays

    def _check_layer(self) -> None:
        """Raise unless the layer is one that this target can be explained by."""
        info = self._info()
        if info.type == "Parameter":
            raise OptionError(
                f'"{self.layer}" is a parameter of {self.outline.title} itself: it is no module, '
                "so there is no output to look at.",
                Remedy.OTHER_LAYER,
            )
        if info.head and self.target == "features":
            raise OptionError(
                f'"{self.layer}" is the head of {self.outline.title}, and the target is what '
                "enters it. Give the target class, or another layer."
            )

    def _check_finite(self, whole: _Part) -> None:
        for values in (whole.units, whole.maps, whole.outputs, whole.baseline_outputs):
            if values is not None and not bool(values.isfinite().all()):
                raise ModelError(
                    f'Attributions of "{self.layer}" are not finite numbers: the network '
                    "overflows on these images."
                )

    def _target(self, module: nn.Module, loaded: LoadedModel, labels: Tensor) -> Explained:
        if self.target == "class":
            return class_target(module, labels)
        heads = {name.rpartition(".")[0] for name in loaded.head} or {
            layer.name for layer in self.outline.layers if layer.head
        }
        if len(heads) != 1:
            raise ModelError(
                "This network has no single head, so that nothing says what its features are. "
                "Give the target class."
            )
        return features_target(module, module.get_submodule(heads.pop()))

    def _followed(self, target: Explained, chunks: int) -> Explained:
        """Return the target with progress and stop, asked before each pass of the network."""
        images = len(self.inputs)
        total = images * (self.steps if self.method in INTEGRATING else 1)
        done = chunks * AT_ONCE * total // images

        def followed(inputs: Tensor) -> Tensor:
            nonlocal done
            self._go_on()
            values = target(inputs)
            # The points of a path are what takes the time; an ablation counts its bars itself.
            if self.method != "ablation" and torch.is_grad_enabled():
                done = min(total, done + len(inputs))
                self.progress.advance(done, total, "images on the path")
            return values

        return followed

    def _go_on(self) -> None:
        if self.progress.should_stop():
            raise Stopped("The attribution was stopped; nothing was written.")

    def _info(self) -> LayerInfo:
        info = self.outline.layer(self.layer)
        if info is None:
            raise OptionError(
                f'{self.outline.title} has no layer "{self.layer}".', Remedy.LIST_LAYERS
            )
        return info

    def _attribution(self, module: nn.Module, inputs: Tensor, target: Explained) -> _Part:
        layer, output, axis = self._seen(module, inputs)
        channels_first = output.ndim == 4 and axis == 1
        if self.method == "auto":
            self.method = "gradcam" if channels_first else "conductance"
        if self.method == "gradcam" and output.ndim == 4 and not channels_first:
            raise OptionError(
                "Grad-CAM averages over places behind the channels; the output of this layer has "
                f"its channels last, {tuple(output.shape)}.",
                Remedy.OTHER_METHOD,
            )
        found = attributed(module, layer, inputs, target, self.method, steps=self.steps)
        values = found.values.float()
        if output.ndim == 3 and axis == 2:
            self._lay_out_tokens(module, inputs, values.shape[1])
        elif output.ndim == 4:
            first = 2 if channels_first else 1
            self.grid = (values.shape[first], values.shape[first + 1])
        others = [place for place in range(1, values.ndim) if place != axis]
        return _Part(
            maps=self._maps(values, axis),
            units=values.sum(others) if others else values,
            sums=values.flatten(1).double().sum(1),
            outputs=found.outputs,
            baseline_outputs=found.baseline_outputs,
            infidelity=found.infidelity,
            sigma=found.sigma,
        )

    def _seen(self, module: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor, int]:
        """Return the layer, its output, and the axis of that which counts units."""
        info = self._info()
        layer = module.get_submodule(info.name)
        with torch.no_grad():
            output = layer_output(module, layer, inputs)
        return layer, output, axis_of_units(info.kind, layer, output)

    def _lay_out_tokens(self, module: nn.Module, inputs: Tensor, tokens: int) -> None:
        """Note which grid the tokens of a transformer make, class and register tokens apart."""
        for height, width in reversed(grids(module, inputs)):
            if 1 < height * width <= tokens <= height * width + MOST_PREFIX_TOKENS:
                self.grid, self.prefix_tokens = (height, width), tokens - height * width
                return
        side = math.isqrt(tokens)
        if side > 1 and side * side == tokens:
            self.grid, self.prefix_tokens = (side, side), 0

    def _maps(self, values: Tensor, axis: int) -> Tensor | None:
        """Return the sums over units at each place; None where there are no places."""
        if self.grid is None:
            return None
        # Class and register tokens stand first.
        return values.sum(axis).flatten(1)[:, self.prefix_tokens :].unflatten(1, self.grid)

    def _ablation(self, module: nn.Module, inputs: Tensor, target: Explained) -> _Part:
        with torch.no_grad():
            outputs = target(inputs)
        if self.layer == BLOCKS:
            losses = self._block_bars(module, inputs, target)
        elif self.layer == ALL:
            losses = self._layer_bars(module, inputs, target)
        else:
            layer, output, axis = self._seen(module, inputs)
            self.units = units = output.shape[axis]
            self.group = -(-units // self.groups)
            losses = ablated(
                layer,
                inputs,
                self._counted(target, -(-units // self.group)),
                shape=output.shape,
                axis=axis,
                group=self.group,
            )
        self.bars = losses.shape[1]
        return _Part(units=losses, sums=losses.double().sum(1), outputs=outputs)

    def _counted(self, target: Explained, bars: int) -> Explained:
        """Return the target with progress by bar; the first pass is that of the layer as it is."""
        done = -1

        def counted(inputs: Tensor) -> Tensor:
            nonlocal done
            values = target(inputs)
            done = min(bars, done + 1)
            self.progress.advance(done, bars, "groups of units")
            return values

        return counted

    def _layer_bars(self, module: nn.Module, inputs: Tensor, target: Explained) -> Tensor:
        layers = [layer for layer in self.outline.layers if not layer.head]
        bars: dict[str, Tensor] = {}
        for count, info in enumerate(layers):
            self._go_on()
            self.progress.advance(count, len(layers), "layers")
            with self._or_left_out(info.name):
                layer = self._module(module, info.name)
                with torch.no_grad():
                    shape = layer_output(module, layer, inputs).shape
                axis = len(shape) - 1
                bars[info.name] = ablated(layer, inputs, target, shape=shape, axis=axis, group=0)
        return self._columns(bars, "layer")

    def _block_bars(self, module: nn.Module, inputs: Tensor, target: Explained) -> Tensor:
        stages = dict.fromkeys(layer.stage for layer in self.outline.layers)
        heads = {layer.stage for layer in self.outline.layers if layer.head}
        bars: dict[str, Tensor] = {}
        replaced: list[Replaced] = []
        for count, stage in enumerate(stages):
            self._go_on()
            self.progress.advance(count, len(stages), "blocks")
            with self._or_left_out(stage):
                if stage in heads:
                    raise OptionError("It is the head, which a plan for new classes gets anyway.")
                block = self._module(module, stage)
                loss, stood_in = block_loss(module, block, inputs, target)
                bars[stage] = loss[:, None]
                replaced.append(stood_in)
        if bars:
            self.replaced = replaced
        return self._columns(bars, "block")

    @contextmanager
    def _or_left_out(self, name: str) -> Iterator[None]:
        """Note the reason where something has no bar."""
        try:
            yield
        except OptionError as error:
            self.left_out[name] = error.fact

    def _module(self, module: nn.Module, name: str) -> nn.Module:
        try:
            return module.get_submodule(name)
        except AttributeError as error:
            raise OptionError(
                "It is a parameter of the network itself, with no output to replace."
            ) from error

    def _columns(self, bars: Mapping[str, Tensor], what: str) -> Tensor:
        if not bars:
            raise ModelError(f"No {what} of this network gives a tensor that could be replaced.")
        self.names, self.group = tuple(bars), 0
        return torch.cat(tuple(bars.values()), dim=1)

    def reset_shares(self, plan: ReinitPlan, loaded: LoadedModel) -> tuple[float, ...]:
        """Return which share of the weights behind each bar a plan resets."""
        state = loaded.module.state_dict()
        flags = _reset_flags(plan, state)
        if self.group:
            info = self._info()
            return tuple(self._unit_shares(info, state, flags))
        shares = []
        for name in self.names:
            owned = [
                parameter.name
                for layer in self.outline.layers
                if name == (layer.stage if self.layer == BLOCKS else layer.name)
                for parameter in layer.parameters
            ]
            written = sum(int(flags[tensor].sum()) for tensor in owned if tensor in flags)
            shares.append(written / max(1, sum(state[tensor].numel() for tensor in owned)))
        return tuple(shares)

    def _unit_shares(
        self, info: LayerInfo, state: Mapping[str, Tensor], flags: Mapping[str, Tensor]
    ) -> Iterator[float]:
        """Yield the share of the weights that make each group of units."""
        units = self.units
        axes: dict[str, int] = {}
        for parameter in info.parameters:
            # A transposed convolution counts what it makes on its second axis.
            makes = [place for place, size in enumerate(parameter.shape[:2]) if size == units]
            if makes:
                axes[parameter.name] = makes[0]
        for first in range(0, units, self.group):
            written = total = 0
            for tensor, axis in axes.items():
                count = min(self.group, units - first)
                total += state[tensor].narrow(axis, first, count).numel()
                if tensor in flags:
                    written += int(flags[tensor].narrow(axis, first, count).sum())
            yield written / max(1, total)

    def _said(self, name: str, whole: _Part, seconds: float, cost: _Cost) -> StateAttribution:
        gap, gaps = None, None
        if whole.baseline_outputs is not None and method_named(self.method).complete:
            change = (whole.outputs - whole.baseline_outputs).double()
            off = (whole.sums - change).abs()
            gap = float(off.max() / change.abs().max().clamp(min=1e-12))
            gaps = tuple(
                float(one / abs(by)) if by else None for one, by in zip(off, change, strict=True)
            )
        return StateAttribution(
            name=name,
            outputs=_numbers(whole.outputs),
            baseline_outputs=None
            if whole.baseline_outputs is None
            else _numbers(whole.baseline_outputs),
            sums=_numbers(whole.sums),
            gap=gap,
            gaps=gaps,
            infidelity=whole.infidelity,
            sigma=whole.sigma,
            seconds=seconds,
            forward_passes=cost.passes,
            images_run=cost.images,
        )


def _reset_flags(plan: ReinitPlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensor to which of its entries a plan gives new values."""
    arrays = arrays_of(plan)
    flags: dict[str, Tensor] = {}
    for target in plan.targets:
        listed = {entries.tensor for entries in target.entries}
        for name in target.parameters:
            if name in state and name not in listed:
                flags[name] = torch.ones(state[name].shape, dtype=torch.bool)
        for entries in target.entries:
            # What is added makes up for a unit that is gone; it resets nothing.
            if entries.write == "add" or entries.tensor not in state:
                continue
            old = state[entries.tensor]
            chosen = entry_flags(entries, old, arrays)
            if chosen is None:
                chosen = torch.ones(old.shape, dtype=torch.bool)
            before = flags.get(entries.tensor)
            flags[entries.tensor] = chosen if before is None else before | chosen
    return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What some of the images gave."""

    units: Tensor
    sums: Tensor
    outputs: Tensor
    maps: Tensor | None = None
    baseline_outputs: Tensor | None = None
    infidelity: float | None = None
    sigma: float | None = None

    @staticmethod
    def joined(parts: Sequence[_Part]) -> _Part:
        """Return them all as one, in order."""
        sizes = [len(part.outputs) for part in parts]
        return _Part(
            units=torch.cat([part.units for part in parts]),
            sums=torch.cat([part.sums for part in parts]),
            outputs=torch.cat([part.outputs for part in parts]),
            maps=_cat([part.maps for part in parts]),
            baseline_outputs=_cat([part.baseline_outputs for part in parts]),
            infidelity=_mean([part.infidelity for part in parts], sizes),
            sigma=_mean([part.sigma for part in parts], sizes),
        )


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if len(there) == len(tensors) else None


def _mean(values: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    there = [value * size for value, size in zip(values, sizes, strict=True) if value is not None]
    return sum(there) / sum(sizes) if len(there) == len(values) else None


@dataclass(slots=True)
class _Cost:
    """How often a network ran, and over how many images."""

    passes: int = 0
    images: int = 0

    @classmethod
    @contextmanager
    def of(cls, module: nn.Module) -> Iterator[_Cost]:
        """Count while the block runs."""
        cost = cls()

        def count(_: nn.Module, args: tuple[Any, ...]) -> None:
            cost.passes += 1
            cost.images += len(args[0])

        handle = module.register_forward_pre_hook(count)
        try:
            yield cost
        finally:
            handle.remove()


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _array(values: Tensor) -> np.ndarray:
    made: Any = values.detach().float().cpu().numpy()
    return np.ascontiguousarray(made)
