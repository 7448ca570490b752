"""What a plan is made on: the network, and the images and figures that a rule may look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from core.errors import PlanError, Remedy, Stopped
from core.files.diagnoses import read_diagnosis, read_units, units_with_twins
from core.load import ImageSet, LoadedModel, choose_items, load_model, open_images
from core.measure.utility import UnitFigures, rounding_alone, summed_gradients, unit_figures
from core.network.connections import Connections, Readings, Shifts, connections_of, readings_of
from core.network.outline import example_input, outline_module
from core.pipeline.batches import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_SAMPLES,
    check_amounts,
    check_image_size,
    read_batch,
)
from core.pipeline.machine import choose_device
from core.pipeline.measuring import MeasureSettings, diagnose
from core.pipeline.progress import Progress
from core.records import DataSpec, Diagnosis, ModelOutline, ModelSpec

# Torch takes a batch norm's sums over channels-last images in float32, row by row, and over
# contiguous ones in float64. What only ranks layers may have the faster; entries of least utility
# are told apart by the last digits.
LAYOUT = torch.contiguous_format
# Images that tell a gradient of 0 from a small one.
ASKED = 8

UnitArrays = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a rule may look at.

    Attributes:
        data: Images, or None.
        samples: At most so many of them, classes in turn; None takes all for rules that sum over
            a pass, and `DEFAULT_SAMPLES` for the others.
        diagnosis: A diagnosis file, or None to measure where one is needed.
        batch_size: Images a batch; None takes the default of what is run.
        image_size: Side in pixels; None takes the model's default.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the choice of images.
    """

    data: DataSpec | None = None
    samples: int | None = None
    diagnosis: Path | None = None
    batch_size: int | None = None
    image_size: int | None = None
    device: str = "auto"
    seed: int = 0


class Subject:
    """A network and what may be looked at on it; images are opened when first needed.

    Args:
        spec: The model.
        classes: Size of the new head; None keeps the head that came with the weights, unless
            images or a diagnosis say otherwise.
        sight: What may be looked at.
        progress: Progress and stop.
        asker: Who wants to look, for messages, such as 'The rule "redo"'.
        head_seed: Seed of a new head.

    Raises:
        LimberError: Bad input, or model, images and diagnosis do not belong together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        classes: int | None,
        sight: Sight,
        progress: Progress,
        asker: str,
        head_seed: int = 0,
    ) -> None:
        self._step = DEFAULT_BATCH_SIZE if sight.batch_size is None else sight.batch_size
        check_amounts(samples=sight.samples, batch_size=self._step)
        self.sight, self.progress, self.asker = sight, progress, asker
        self.diagnosis: Diagnosis | None = None
        self.units_by_layer: UnitArrays = {}
        self.rounding: frozenset[str] = frozenset()
        self._images: ImageSet | None = None
        if sight.data is not None:
            self._images = open_images(sight.data)
            classes = len(self._images.outline.classes)
        if sight.diagnosis is not None:
            classes = self._take_diagnosis(sight.diagnosis, spec)
        self.loaded: LoadedModel = load_model(spec, classes=classes, head_seed=head_seed)
        self.outline: ModelOutline = outline_module(
            self.loaded.module, self.loaded.card, self.loaded.head
        )
        if (
            self.diagnosis is not None
            and self.diagnosis.header.backbone_sha256 != self.outline.backbone_sha256
        ):
            raise PlanError(
                "The diagnosis was measured on other weights than those at hand. Measure again."
            )
        self.state: dict[str, Tensor] = {
            name: value.detach() for name, value in self.loaded.module.state_dict().items()
        }

    def _take_diagnosis(self, path: Path, spec: ModelSpec) -> int:
        self.diagnosis = read_diagnosis(path)
        header = self.diagnosis.header
        if header.model != spec:
            raise PlanError(
                f'"{path.name}" measured {header.model.source}:{header.model.name}, '
                f"and the plan is for {spec.source}:{spec.name}. Measure that model."
            )
        if self._images is not None and len(self._images.outline.classes) != header.classes:
            outline = self._images.outline
            raise PlanError(
                f'"{path.name}" measured a head of {header.classes} classes, and {outline.title} '
                f"has {len(outline.classes)}. Give the data it was measured on, or none."
            )
        self.units_by_layer = read_units(path)
        return header.classes

    @property
    def data(self) -> DataSpec | None:
        """The images: those given, else those the diagnosis was measured on."""
        if self.sight.data is None and self.diagnosis is not None:
            return self.diagnosis.header.data
        return self.sight.data

    @property
    def fingerprint(self) -> str | None:
        """The data's fingerprint, where anything of it was looked at."""
        if self._images is not None:
            return self._images.outline.fingerprint
        return None if self.diagnosis is None else self.diagnosis.header.data_fingerprint

    @property
    def samples(self) -> int | None:
        """How many images: as many as asked for, else as the diagnosis had; None for no limit."""
        if self.sight.samples is None and self.diagnosis is not None and self.sight.data is None:
            return self.diagnosis.header.samples
        return self.sight.samples

    @property
    def images(self) -> ImageSet:
        """The images, opened.

        Raises:
            PlanError: There are none.
        """
        if self._images is None:
            if self.data is None:
                raise PlanError(f"{self.asker} looks at images.", Remedy.GIVE_IMAGES)
            self._images = open_images(self.data)
        return self._images

    def batches(self, samples: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training images (n, 3, h, w) and labels (n,) where the network is.

        Args:
            samples: At most so many images; None takes all.

        Raises:
            LimberError: No images, a size the network does not take, or stopped.
        """
        images, card = self.images, self.loaded.card
        size, seed = self.sight.image_size, self.sight.seed
        if self.diagnosis is not None:
            size = self.diagnosis.header.image_size if size is None else size
            seed = self.diagnosis.header.seed if self.sight.data is None else seed
        size = card.default_size if size is None else size
        check_image_size(card, size)
        every = images.splits["train"]
        items = choose_items(every, samples or len(every), seed=seed)
        device = next(self.loaded.module.parameters()).device
        step = self._step
        for start in range(0, len(items), step):
            if self.progress.should_stop():
                raise Stopped("Making the plan was stopped; nothing was written.")
            self.progress.advance(start, len(items), "images")
            chosen = items[start : start + step]
            yield read_batch(
                images, chosen, card.preprocessing, size=size, device=device, layout=LAYOUT
            )

    def on_device(self, work: Callable[[], Result]) -> Result:
        """Run work with the network on the device that was asked for."""
        module = self.loaded.module
        module.to(choose_device(self.sight.device))
        try:
            return work()
        finally:
            module.to("cpu")

    def gradients(self, *, decay: float | None = None) -> dict[str, Tensor]:
        """Return the gradients of one pass over the training images; see `summed_gradients`.

        Each has the shape of its parameter. Afterwards `rounding` names the vectors whose
        gradient is 0 but for rounding.
        """
        self.progress.phase("reading gradients")

        def work() -> dict[str, Tensor]:
            module = self.loaded.module
            gradients = summed_gradients(module, self.batches(self.samples), decay=decay)
            inputs, labels = next(self.batches(min(self.samples or ASKED, ASKED)))
            self.rounding = rounding_alone(module, inputs, labels)
            return gradients

        return self.on_device(work)

    def unit_figures(self) -> dict[str, UnitFigures]:
        """Return figures of units on the training images; see `unit_figures`."""
        self.progress.phase("reading activations")
        return self.on_device(
            lambda: unit_figures(
                self.loaded.module,
                self.outline.layers,
                self.batches(self.samples or DEFAULT_SAMPLES),
            )
        )

    @cached_property
    def readings(self) -> Readings:
        """What the readers of units read on the training images; see `readings_of`."""
        wires = self.connections
        self.progress.phase("reading activations")
        return self.on_device(
            lambda: readings_of(
                self.loaded.module, wires, self.batches(self.samples or DEFAULT_SAMPLES)
            )
        )

    def contributions(self) -> np.ndarray:
        """Return mean |outgoing weight| times mean |what is read| for each bundle, (bundles,).

        NaN for those that are not behind an activation wherever they are read.
        """
        wires = self.connections
        behind = {
            layer.name: np.zeros(len(wires.bundles[layer.name]))
            for layer in self.outline.layers
            if layer.activation is not None and layer.name in wires.bundles
        }
        hidden = np.isfinite(wires.scores(behind))
        return np.where(hidden, wires.contributions(self.readings, self.state), np.nan)

    def shifts(self, bundles: set[int]) -> Shifts:
        """Return what readers gain for the means of units that are gone."""
        layers = self.outline.layers
        known = {parameter.name for layer in layers for parameter in layer.parameters}
        known |= {name for layer in layers for name in (*layer.buffers, *layer.coupled_buffers)}
        state = {name: value for name, value in self.state.items() if name in known}
        return self.connections.shifts(bundles, self.readings, state)

    def measured(self) -> Diagnosis:
        """Return the diagnosis, measured now where none was given.

        Raises:
            PlanError: There is none, and no images to measure on, or the network overflows.
        """
        if self.diagnosis is None:
            if self.data is None:
                raise PlanError(
                    f"{self.asker} looks at figures of the network.", Remedy.GIVE_IMAGES
                )
            self.diagnosis, arrays = diagnose(
                self.outline.spec,
                self.data,
                MeasureSettings(
                    samples=self.sight.samples or DEFAULT_SAMPLES,
                    batch_size=self.sight.batch_size,
                    image_size=self.sight.image_size,
                    device=self.sight.device,
                    seed=self.sight.seed,
                ),
                progress=self.progress,
            )
            self.units_by_layer = units_with_twins(arrays)
        if not math.isfinite(self.diagnosis.header.loss):
            raise PlanError(
                f"{self.asker} looks at figures of the network, whose loss on these images is not "
                "a finite number: the pass overflows. Check the weights, or choose without figures."
            )
        return self.diagnosis

    @cached_property
    def connections(self) -> Connections:
        """The network's connectivity."""
        self.progress.phase("tracing connections")
        module = self.loaded.module
        size = self.loaded.card.default_size
        return connections_of(module, example_input(module, size=size, batch=1))

    @cached_property
    def layers_by_bundle(self) -> dict[int, tuple[str, ...]]:
        """The layers that each bundle has units of, by bundle."""
        by_bundle: dict[int, tuple[str, ...]] = {}
        for layer, of in self.connections.bundles.items():
            for bundle in np.unique(of).tolist():
                by_bundle[bundle] = (*by_bundle.get(bundle, ()), layer)
        return by_bundle
