"""Network, images, and a plan or trained weights -> what a layer carries, by Captum."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.attribution import (
    LayerAttribution,
    ablated,
    attributed,
    class_target,
    explaining,
    features_target,
    output_shape,
)
from core.catalogue.attributions import method_named
from core.errors import DataError, ModelError, OptionError, PlanError, Remedy, Stopped
from core.files.companions import plan_json
from core.load import LoadedModel, choose_items, load_model, read_checkpoint
from core.network.outline import outline_module
from core.pipeline.applying import edited_model, load_edited, plan_spec
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
MOST_BARS = 64
PICTURE_PX = 96
# What an ablation of every layer is asked for by.
ALL = "all"

TARGETS: Mapping[Target, str] = {
    "features": "half the squared norm of the features that enter the head: it needs no trained "
    "head",
    "class": "the output for each image's own class",
}

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeSettings:
    """How a layer is looked at.

    Attributes:
        method: "auto" takes Grad-CAM for layers with channels and places, else conductance.
        target: Key of `TARGETS`; None takes "class" where trained weights are given.
        images: How many.
        steps: Points on the path from the baseline.
        image_size: Side in pixels; None takes the model's default for short runs.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the head and of the choice of images.
    """

    method: str = "auto"
    target: Target | None = None
    images: int = DEFAULT_IMAGES
    steps: int = DEFAULT_STEPS
    image_size: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(samples=self.images, batch_size=self.steps)
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
        layer: A layer of the outline, or "all" for an ablation with one bar a layer.
        settings: How; None takes the defaults.
        plan: Adds the state after this plan.
        trained: Files of trained weights of this network, each a state.
        progress: Progress and stop.

    Returns:
        The record, and for each state "STATE/maps" (images, height, width), where the layer has
        places, and "STATE/units" (images, units) or, for an ablation, (images, bars); and
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
        method=settings.method,
        target=target,
        inputs=inputs,
        labels=labels,
        steps=settings.steps,
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
        image_size=size,
        seed=settings.seed,
        device=place.type,
        steps=settings.steps,
        units=look.bars,
        group=look.group,
        names=tuple(look.names),
        grid=look.grid,
        states=tuple(states),
        why_no_infidelity=""
        if all(state.infidelity is not None for state in states)
        else "it compares values with the layer's output, entry by entry, which this method does "
        "not give",
        versions=versions(),
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
        states.append((path.stem, partial(_trained, spec, path, classes, seed)))
    return states


def _planned(loaded: LoadedModel, plan: ReinitPlan, classes: int, seed: int) -> LoadedModel:
    edited, _ = edited_model(plan, classes=classes, head_seed=seed)
    # The same head, so that the states differ by what the plan writes.
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
    progress: Progress
    place: torch.device
    grid: tuple[int, int] | None = None
    bars: int | None = None
    group: int = 1
    names: Sequence[str] = ()

    def at(self, name: str, loaded: LoadedModel) -> tuple[StateAttribution, Arrays]:
        """Return what one state of the network gives, and its arrays."""
        begun = time.perf_counter()
        with explaining(loaded.module) as module:
            module.to(self.place)
            target = self._target(module, loaded)
            if self.layer == ALL or self.method == "ablation":
                self.method = "ablation"
                values, outputs = self._ablation(module, target)
                found = LayerAttribution(values, outputs, None, None)
                arrays = {f"{name}/units": _array(values)}
            else:
                found = self._attribution(module, target)
                arrays = {f"{name}/{what}": part for what, part in self._parts(found).items()}
        if not bool(found.values.isfinite().all()):
            raise ModelError(
                f'Attributions of "{self.layer}" are not finite numbers: the network overflows on '
                "these images."
            )
        return self._said(name, found, time.perf_counter() - begun), arrays

    def _target(self, module: nn.Module, loaded: LoadedModel) -> Callable[[Tensor], Tensor]:
        if self.target == "class":
            return class_target(module, self.labels)
        heads = {name.rpartition(".")[0] for name in loaded.head} or {
            layer.name for layer in self.outline.layers if layer.head
        }
        if len(heads) != 1:
            raise ModelError(
                "This network has no single head, so that nothing says what its features are. "
                "Give the target class."
            )
        return features_target(module, module.get_submodule(heads.pop()))

    def _info(self) -> LayerInfo:
        info = self.outline.layer(self.layer)
        if info is None:
            raise OptionError(
                f'{self.outline.title} has no layer "{self.layer}".', Remedy.LIST_LAYERS
            )
        return info

    def _attribution(
        self, module: nn.Module, target: Callable[[Tensor], Tensor]
    ) -> LayerAttribution:
        layer = module.get_submodule(self._info().name)
        if self.method == "auto":
            places = len(output_shape(module, layer, self.inputs)) == 4
            self.method = "gradcam" if places else "conductance"
        return attributed(
            module,
            layer,
            self.inputs,
            target,
            self.method,
            steps=self.steps,
            should_stop=self.progress.should_stop,
        )

    def _parts(self, found: LayerAttribution) -> Arrays:
        """Return maps over places and sums by unit."""
        values = found.values.float()
        parts: Arrays = {}
        if values.ndim == 4:
            parts["maps"] = _array(values.sum(1))
            if values.shape[1] > 1:
                parts["units"] = _array(values.sum((2, 3)))
        elif values.ndim == 3:
            tokens = values.sum(2)
            side = int(tokens.shape[1] ** 0.5)
            if side > 1:
                # Class and register tokens stand first.
                patches = tokens[:, tokens.shape[1] - side * side :]
                parts["maps"] = _array(patches.reshape(-1, side, side))
            parts["units"] = _array(values.sum(1))
        else:
            parts["units"] = _array(values.flatten(1))
        if "maps" in parts:
            self.grid = (parts["maps"].shape[1], parts["maps"].shape[2])
        return parts

    def _ablation(
        self, module: nn.Module, target: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = target(self.inputs)
        if self.layer != ALL:
            info = self._info()
            layer = module.get_submodule(info.name)
            shape = output_shape(module, layer, self.inputs)
            axis = 1 if len(shape) == 4 else len(shape) - 1
            self.group = -(-shape[axis] // MOST_BARS)
            values = ablated(layer, self.inputs, target, shape=shape, axis=axis, group=self.group)
            self.bars = values.shape[1]
            return values, outputs
        columns, names = [], []
        layers = [layer for layer in self.outline.layers if not layer.head and layer.executed]
        for count, info in enumerate(layers):
            if self.progress.should_stop():
                raise Stopped("The attribution was stopped; nothing was written.")
            self.progress.advance(count, len(layers), "layers")
            layer = module.get_submodule(info.name)
            try:
                shape = output_shape(module, layer, self.inputs)
                columns.append(
                    ablated(layer, self.inputs, target, shape=shape, axis=len(shape) - 1, group=0)
                )
            except (OptionError, RuntimeError, AssertionError, IndexError):
                # A layer that gives no tensor of its own, such as one that only holds a parameter.
                continue
            names.append(info.name)
        if not columns:
            raise ModelError("No layer of this network gives a tensor that could be set to 0.")
        self.names, self.bars, self.group = names, len(names), 0
        return torch.cat(columns, dim=1), outputs

    def _said(self, name: str, found: LayerAttribution, seconds: float) -> StateAttribution:
        sums = found.values.flatten(1).double().sum(1)
        gap = None
        if found.baseline_outputs is not None and method_named(self.method).complete:
            change = (found.outputs - found.baseline_outputs).double()
            gap = float((sums - change).abs().max() / change.abs().max().clamp(min=1e-12))
        return StateAttribution(
            name=name,
            outputs=_numbers(found.outputs),
            baseline_outputs=None
            if found.baseline_outputs is None
            else _numbers(found.baseline_outputs),
            sums=_numbers(sums),
            gap=gap,
            infidelity=found.infidelity,
            seconds=seconds,
        )


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _array(values: Tensor) -> np.ndarray:
    made: Any = values.detach().float().cpu().numpy()
    return np.ascontiguousarray(made)
