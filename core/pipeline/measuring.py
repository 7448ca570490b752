"""Network, twin and images -> diagnosis."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from core.catalogue.metrics import metric_names
from core.errors import DataError, OptionError, Stopped
from core.judge import judgement
from core.load import (
    ImageSet,
    Item,
    LoadedModel,
    build_module,
    choose_items,
    load_model,
)
from core.measure import (
    MOST_IMAGES,
    TRANSFER_NAMES,
    Gauge,
    Measured,
    figures_of,
    gauging,
    missing,
    pooled_features,
    ratio_intervals,
    shard_from,
    shard_state,
    transfer_figures,
)
from core.measure.inside import (
    Inside,
    gradient_arrays,
    inside_arrays,
    settle,
    weight_arrays,
)
from core.network.layout import placed
from core.network.outline import outline_module
from core.pipeline.batches import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_SAMPLES,
    check_amounts,
    check_image_size,
    opened_images,
    read_batch,
    thumbnails,
)
from core.pipeline.machine import choose_device, device_name, versions
from core.pipeline.progress import Progress
from core.records import (
    DataSpec,
    Diagnosis,
    DiagnosisHeader,
    LayerReport,
    MetricValue,
    ModelCard,
    ModelOutline,
    ModelSpec,
)
from core.reductions import Moments
from core.seeding import derived_seed, generator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Batches that are wanted at least: of two the interval of a mean is six times as wide as of four.
FEWEST_BATCHES = 4

# Small pictures of the images measured, to show which of them drive a unit.
THUMBNAIL_PX = 32
MOST_THUMBNAILS = 1024

FiguresByLayer = Mapping[str, Mapping[str, MetricValue]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """How a network is measured.

    Attributes:
        samples: How many images, classes in turn; of all parts together.
        batch_size: Images a batch; None takes `DEFAULT_BATCH_SIZE`, or fewer where that leaves
            less than `FEWEST_BATCHES`, because intervals come from the spread between batches.
        image_size: Side in pixels; None takes the model's default for short runs.
        device: "auto", "cpu" or "cuda".
        dtype: "float32", or "bfloat16" or "float16" to run the pass under autocast.
        seed: Seed of the head, the twin and the choice of images.
    """

    samples: int = DEFAULT_SAMPLES
    batch_size: int | None = None
    image_size: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(
            samples=self.samples,
            batch_size=DEFAULT_BATCH_SIZE if self.batch_size is None else self.batch_size,
        )
        if self.dtype not in DTYPES:
            raise OptionError(f'The dtype is "{self.dtype}"; give {", ".join(DTYPES)}.')


def batch_size_for(images: int) -> int:
    """Return how many images a batch has where nobody says: four batches, no image left alone."""
    size = max(2, min(DEFAULT_BATCH_SIZE, images // FEWEST_BATCHES))
    # A batch norm cannot take a batch of one.
    while size < images and images % size == 1:
        size += 1
    return size


def diagnose(
    spec: ModelSpec,
    data: DataSpec,
    settings: MeasureSettings | None = None,
    *,
    histograms: bool = False,
    transfer: bool = False,
    progress: Progress | None = None,
) -> tuple[Diagnosis, dict[str, np.ndarray]]:
    """Measure a network and its fresh twin on the same batches of the training images.

    The head is new (drawn from the seed) and the twin gets a copy of it, so that the figures
    differ by the backbone only. A head that its architecture draws as all zeros would let no
    gradient through; it is then drawn from N(0, 1 / fan-in) for both, and the notes say so.
    Images are read batch by batch: memory does not grow with their number.

    Args:
        spec: The model.
        data: The images.
        settings: How; None takes the defaults.
        histograms: Add the histogram of each layer's weight to the figures by unit.
        transfer: Also take the slower pass over features: linear probe, LogME, CKA.
        progress: Progress and stop.

    Returns:
        The diagnosis, and the figures by unit: "LAYER/METRIC" and "twin/LAYER/METRIC" to
        float32 arrays (units,).

    Raises:
        LimberError: Bad input, or stopped.
    """
    begun = time.perf_counter()
    with measuring(spec, data, settings or MeasureSettings(), progress) as measurement:
        measurement.run(range(measurement.batches))
        if transfer:
            measurement.read_features()
    return measurement.diagnosis(begun=begun, histograms=histograms)


def diagnose_inside(
    spec: ModelSpec,
    data: DataSpec,
    settings: MeasureSettings | None = None,
    *,
    transfer: bool = False,
    progress: Progress | None = None,
) -> tuple[Diagnosis, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Measure as `diagnose` does, and look inside each layer on the same passes.

    Args:
        spec: The model.
        data: The images.
        settings: How; None takes the defaults.
        transfer: Also take the slower pass over features.
        progress: Progress and stop.

    Returns:
        What `diagnose` returns, with histograms; and "LAYER/WHAT" and "twin/LAYER/WHAT" to arrays
        as `core.measure.inside` makes them, with "images/thumbnails" (images, 32, 32, 3) uint8
        and "images/labels" (images,) for the images that units are driven by.

    Raises:
        LimberError: Bad input, or stopped.
    """
    begun = time.perf_counter()
    with measuring(spec, data, settings or MeasureSettings(), progress) as measurement:
        measurement.look_inside()
        measurement.run(range(measurement.batches))
        if transfer:
            measurement.read_features()
    return *measurement.diagnosis(begun=begun, histograms=True), measurement.inside()


@contextmanager
def measuring(
    spec: ModelSpec, data: DataSpec, settings: MeasureSettings, progress: Progress | None
) -> Iterator[Measurement]:
    """Load network, twin and images and measure both networks inside the block.

    See `diagnose` for the arguments.

    Raises:
        DataError: There are no images to train on.
        OptionError: A dtype or an amount that is not known.
        LimberError: The model or the images cannot be used.
    """
    progress = progress or Progress()
    place = choose_device(settings.device)
    images = opened_images(data, progress)
    classes = len(images.outline.classes)
    progress.phase("loading the model")
    loaded = load_model(spec, classes=classes, head_seed=settings.seed)
    card = loaded.card
    size = card.default_size if settings.image_size is None else settings.image_size
    check_image_size(card, size)
    outline = outline_module(loaded.module, card, loaded.head)
    twin = build_module(spec, classes=classes, seed=derived_seed(settings.seed, "twin"))
    loading = (note.sentence for note in loaded.card.notes)
    notes = [*loading, *images.outline.caveats, *images.outline.notes]
    _share_head(loaded, twin, notes, seed=settings.seed)
    items = choose_items(images.splits["train"], settings.samples, seed=settings.seed)
    if not items:
        raise DataError('The data set has no images in its "train" part.')
    if len(items) < settings.samples:
        notes.append(
            f"{settings.samples} images were asked for; the training part has {len(items)}."
        )
    modules = [placed(module, place) for module in (loaded.module, twin)]
    dtype = DTYPES[settings.dtype]
    with (
        gauging(modules[0], outline.layers, dtype=dtype) as own,
        gauging(modules[1], outline.layers, dtype=dtype) as fresh,
    ):
        yield Measurement(
            spec=spec,
            data=data,
            settings=settings,
            batch_size=settings.batch_size or batch_size_for(len(items)),
            size=size,
            place=place,
            progress=progress,
            images=images,
            items=items,
            card=card,
            outline=outline,
            notes=notes,
            own=own,
            fresh=fresh,
        )


@dataclass(slots=True, kw_only=True)
class Measurement:
    """A network and its twin being measured, batch for batch on the same images."""

    spec: ModelSpec
    data: DataSpec
    settings: MeasureSettings
    batch_size: int
    size: int
    place: torch.device
    progress: Progress
    images: ImageSet
    items: Sequence[Item]
    card: ModelCard
    outline: ModelOutline
    notes: list[str]
    own: Gauge
    fresh: Gauge
    ratios: Moments | None = None
    transfer: tuple[FiguresByLayer, FiguresByLayer] | None = None
    thumbnails: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    by_batch: list[np.ndarray] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.items) // self.batch_size)

    def _read(self, batch: int) -> tuple[Tensor, Tensor]:
        chosen = self.items[batch * self.batch_size : (batch + 1) * self.batch_size]
        return read_batch(
            self.images, chosen, self.card.preprocessing, size=self.size, device=self.place
        )

    def run(self, batches: Sequence[int]) -> None:
        """Measure these batches, the network and then its twin on each.

        Raises:
            Stopped: Where that is wanted.
        """
        self.progress.phase("measuring the network beside its fresh twin")
        whole = sum(
            min(self.batch_size, len(self.items) - batch * self.batch_size) for batch in batches
        )
        done = 0
        for batch in batches:
            if self.progress.should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            inputs, labels = self._read(batch)
            first = batch * self.batch_size
            figures = []
            for gauge in (self.own, self.fresh):
                figures.append(gauge.add(inputs, labels, first=first))
                done += len(inputs)
                self.progress.advance(done, 2 * whole, "images")
                if self.progress.should_stop():
                    raise Stopped("Measuring was stopped; nothing was written.")
            if self.own.inside is not None:
                self._keep_images(inputs, labels)
                self.by_batch.append(torch.stack(figures).cpu().numpy())
            # Where either is 0 there is no ratio, as where it does not apply.
            logs = Moments.of(
                (figures[0] / figures[1]).log().nan_to_num(torch.nan, torch.nan, torch.nan)
            )
            self.ratios = logs if self.ratios is None else self.ratios.merged(logs)

    def read_features(self) -> None:
        """Take the slower pass over features of both networks.

        Raises:
            Stopped: Where that is wanted.
        """
        self.progress.phase("reading features")
        count = min(len(self.items), MOST_IMAGES)
        parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        labels = []
        batches = -(-count // self.batch_size)
        for batch in range(batches):
            if self.progress.should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            inputs, targets = self._read(batch)
            layers = self.outline.layers
            parts.append(
                (
                    pooled_features(
                        self.own.module, inputs, layers, dtype=DTYPES[self.settings.dtype]
                    ),
                    pooled_features(
                        self.fresh.module, inputs, layers, dtype=DTYPES[self.settings.dtype]
                    ),
                )
            )
            labels.append(targets.cpu())
            self.progress.advance(batch + 1, batches, "batches")
        own, twin = (
            {
                name: torch.cat([part[which][name] for part in parts])
                for name in parts[0][which]
                if all(name in part[which] for part in parts)
            }
            for which in (0, 1)
        )
        self.transfer = transfer_figures(own, twin, torch.cat(labels), self.outline.layers)

    def trace(self) -> None:
        """Let both networks see one batch, so that their activations are known; keep the sums."""
        inputs, labels = self._read(0)
        for gauge in (self.own, self.fresh):
            gauge.learn_sites(inputs, labels)

    def look_inside(self) -> None:
        """Have the passes to come look inside each layer; the first batch chooses the bins."""
        names = [layer.name for layer in self.outline.layers]
        for gauge in (self.own, self.fresh):
            gauge.inside = Inside(self.outline.classes, names)
        self.trace()
        assert self.own.inside is not None
        assert self.fresh.inside is not None
        settle(self.own.inside, self.fresh.inside, self.place)

    def _keep_images(self, inputs: Tensor, labels: Tensor) -> None:
        """Keep small pictures of a batch, as the network sees them."""
        self.labels.append(labels.cpu().numpy().astype(np.int32))
        if len(self.thumbnails) * self.batch_size >= MOST_THUMBNAILS:
            return
        self.thumbnails.append(thumbnails(inputs, self.card.preprocessing, size=THUMBNAIL_PX))

    def inside(self) -> dict[str, np.ndarray]:
        """Return what was seen inside the layers, in the shapes of `diagnose_inside`."""
        named: dict[str, np.ndarray] = {}
        for prefix, gauge in (("", self.own), ("twin/", self.fresh)):
            assert gauge.inside is not None
            for name, arrays in inside_arrays(gauge.inside, twin=bool(prefix)).items():
                named |= {f"{prefix}{name}/{what}": values for what, values in arrays.items()}
            for layer in self.outline.layers:
                arrays = self._weight_arrays(gauge, layer.name)
                named |= {f"{prefix}{layer.name}/{what}": values for what, values in arrays.items()}
        named["images/thumbnails"] = np.concatenate(self.thumbnails)
        named["images/labels"] = np.concatenate(self.labels)
        # (batches, 2, layers, figures): the network's and the twin's figures of each batch.
        named["batches/figures"] = np.stack(self.by_batch).astype(np.float32)
        return named

    def _weight_arrays(self, gauge: Gauge, layer: str) -> dict[str, np.ndarray]:
        weight = gauge.weights.by_layer[layer].detach()
        arrays = weight_arrays(weight)
        name = gauge.weights.gradient_of(layer)
        total = None if name is None else gauge.shard.gradients.get(name)
        if total is not None and total.reached:
            arrays |= gradient_arrays(total.total / gauge.shard.samples)
        return arrays

    def recipe(self, part: int, parts: int) -> dict[str, object]:
        """Return what makes parts belong together."""
        return {
            "model": self.spec.model_dump(mode="json"),
            "weights": self.card.backbone_sha256,
            "data": self.data.model_dump(mode="json"),
            "images": self.images.outline.fingerprint,
            "samples": self.settings.samples,
            "batch_size": self.batch_size,
            "image_size": self.size,
            "dtype": self.settings.dtype,
            "seed": self.settings.seed,
            "parts": parts,
            "part": part,
        }

    def facts(self, begun: float) -> dict[str, object]:
        """Return how this part was taken."""
        return {
            "device": self.place.type,
            "device_name": device_name(self.place),
            "kernels": self.own.backend,
            "wall_s": time.perf_counter() - begun,
            "reading_s": self.own.reading_s + self.fresh.reading_s,
            "whole_s": self.own.whole_s + self.fresh.whole_s,
        }

    def state(self) -> dict[str, Tensor]:
        """Return the sums of both networks, for a file, in the shapes of `shard_state`."""
        sums: dict[str, Tensor] = {}
        for prefix, gauge in (("own", self.own), ("twin", self.fresh)):
            sums |= {f"{prefix}:{k}": v for k, v in shard_state(gauge.shard).items()}
        if self.ratios is not None:
            sums |= {
                "ratios:count": self.ratios.count.cpu(),
                "ratios:mean": self.ratios.mean.cpu(),
                "ratios:m2": self.ratios.m2.cpu(),
            }
        return sums

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums that `state` returned elsewhere, in the same shapes."""
        for prefix, gauge in (("own:", self.own), ("twin:", self.fresh)):
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            gauge.shard = gauge.shard.merged(shard_from(part))
        ratios = Moments(*(state[f"ratios:{name}"] for name in ("count", "mean", "m2")))
        self.ratios = ratios if self.ratios is None else self.ratios.merged(ratios)

    def diagnosis(
        self, *, begun: float, histograms: bool
    ) -> tuple[Diagnosis, dict[str, np.ndarray]]:
        """Return what the sums say: the diagnosis, and figures by unit (units,).

        Args:
            begun: When measuring began, by `time.perf_counter`.
            histograms: Add the histogram of each layer's weight to the figures by unit.

        Raises:
            Stopped: Where that is wanted.
        """
        self.progress.phase("adding up")
        count = len(self.outline.layers)

        def begins(place: int) -> None:
            # The spectrum of a wide layer takes seconds.
            if self.progress.should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            self.progress.advance(place, 2 * count, "layers")

        own = figures_of(self.own.summed, histograms=histograms, begins=begins)
        fresh = figures_of(
            self.fresh.summed, histograms=histograms, begins=lambda place: begins(count + place)
        )
        intervals = ratio_intervals(self.own.summed, self.fresh.summed, self.ratios, own, fresh)
        reports = _reports(self.outline, own, fresh, intervals, self.transfer)
        for loss, whose in ((own.loss, "network's"), (fresh.loss, "fresh twin's")):
            if not math.isfinite(loss):
                self.notes.append(
                    f"The {whose} loss on these images is not a finite number: the pass "
                    "overflows. Where a figure would not be finite it has a reason instead."
                )
        if own.batches < 2:
            self.notes.append(
                "One batch: no figure has an interval, nothing can be told from noise, and checks "
                "on ratios take every ratio at its word. Measure in four batches or more."
            )
        reading = self.own.reading_s + self.fresh.reading_s
        passing = self.own.whole_s + self.fresh.whole_s - reading
        header = DiagnosisHeader(
            model=self.spec,
            model_title=self.card.title,
            classes=self.outline.classes,
            backbone_sha256=self.card.backbone_sha256,
            data=self.data,
            data_title=self.images.outline.title,
            data_fingerprint=self.images.outline.fingerprint,
            split="train",
            samples=own.samples,
            batches=own.batches,
            batch_size=min(self.batch_size, own.samples),
            image_size=self.size,
            device=self.place.type,
            device_name=device_name(self.place),
            dtype=self.settings.dtype,
            seed=self.settings.seed,
            batch_norm="batch",
            loss=own.loss,
            twin_loss=fresh.loss,
            wall_s=time.perf_counter() - begun,
            overhead_fraction=reading / passing
            if passing > 0 and self.place.type == "cpu"
            else None,
            kernels=own.backend,
            versions=versions(),
            notes=tuple(self.notes),
            intensities=self.images.outline.intensities,
        )
        units: dict[str, np.ndarray] = {}
        for layer in self.outline.layers:
            for metric, values in own.units[layer.name].items():
                units[f"{layer.name}/{metric}"] = values
            for metric, values in fresh.units[layer.name].items():
                units[f"twin/{layer.name}/{metric}"] = values
        judged = judgement(reports)
        diagnosis = Diagnosis(
            header=header, layers=reports, findings=judged.findings, remarks=judged.remarks
        )
        return diagnosis, units


def _share_head(loaded: LoadedModel, twin: nn.Module, notes: list[str], *, seed: int) -> None:
    own, other = loaded.module.state_dict(), twin.state_dict()
    matrices = [name for name in sorted(loaded.head) if name in own and own[name].ndim > 1]
    with torch.no_grad():
        if matrices and all(not bool(own[name].any()) for name in matrices):
            for name in matrices:
                fan_in = own[name][0].numel()
                noise = torch.randn(own[name].shape, generator=generator(seed, "head", name))
                own[name].copy_(noise / fan_in**0.5)
            notes.append(
                "This architecture draws its head as all zeros, which lets no gradient through "
                "at the first step; for the measurement it was drawn from N(0, 1 / fan-in)."
            )
        for name in sorted(loaded.head):
            if name in own and name in other:
                other[name].copy_(own[name])


def _reports(
    outline: ModelOutline,
    own: Measured,
    fresh: Measured,
    intervals: Mapping[str, dict[str, tuple[float, float]]],
    transfer: tuple[FiguresByLayer, FiguresByLayer] | None,
) -> tuple[LayerReport, ...]:
    order = metric_names()
    unasked = missing(TRANSFER_NAMES, "not measured: it takes the slower pass over features")

    def sorted_figures(measured: Measured, layer: str) -> dict[str, MetricValue]:
        which = 0 if measured is own else 1
        more = unasked if transfer is None else transfer[which][layer]
        figures = {**measured.metrics[layer], **more}
        return {name: figures[name] for name in order}

    return tuple(
        LayerReport(
            name=layer.name,
            type=layer.type,
            stage=layer.stage,
            kind=layer.kind,
            index=layer.index,
            parameters=layer.count,
            units=own.unit_counts.get(layer.name),
            activation=layer.activation,
            activation_type=own.activation_types.get(layer.name),
            head=layer.head,
            metrics=sorted_figures(own, layer.name),
            twin_metrics=sorted_figures(fresh, layer.name),
            ratio_intervals=intervals.get(layer.name, {}),
        )
        for layer in outline.layers
    )
