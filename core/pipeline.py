"""The stages composed, no screen: what the command line and the pages both call."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from core.apply import apply_plan
from core.compare import CONTROL, compare_curves
from core.errors import DataError, LimberError, OptionError, PlanError, Stopped
from core.export import (
    companion_path,
    curves_csv,
    curves_of,
    named_after,
    write_plan,
    write_whole,
)
from core.finetune import Arm, Images, Settings, finetune, normalised
from core.judge import judge
from core.load import (
    ImageSet,
    Item,
    LoadedModel,
    build_module,
    choose_items,
    decode,
    decode_items,
    load_model,
    open_images,
    state_sha256,
)
from core.measure import (
    MOST_IMAGES,
    TRANSFER_NAMES,
    Gauge,
    Measured,
    figures_of,
    missing,
    pooled_features,
    ratio_intervals,
    shard_from,
    shard_state,
    transfer_figures,
    watching,
)
from core.metrics import metric_names
from core.outline import outline_module
from core.plan import check_plan, planned_size
from core.planfile import plan_json, resealed, sorted_metadata
from core.records import (
    ABComparison,
    DataSpec,
    Diagnosis,
    DiagnosisHeader,
    LayerReport,
    MetricValue,
    ModelCard,
    ModelOutline,
    ModelSpec,
    Preprocessing,
    ReinitPlan,
    ReinitReceipt,
    RunRecord,
    StepRecord,
)
from core.reductions import Moments
from core.seeding import derived_seed, generator

DEFAULT_SAMPLES = 128
DEFAULT_BATCH_SIZE = 32
DEFAULT_STEPS = 60
DEFAULT_EVAL_EVERY = 10
DEFAULT_TRAIN_IMAGES = 600
DEFAULT_VAL_IMAGES = 160
DEFAULT_SEEDS = (0, 1, 2)
# Bytes; a file system takes 255, and a companion's ending and a number come after it.
LONGEST_NAME = 180
# Plans whose sizes differ by less are of about the same size.
ALIKE = 1.25


@dataclass(frozen=True, slots=True)
class Watcher:
    """How a caller follows a long stage and stops it; the default follows nothing.

    Attributes:
        phase: Called with a few words when another part begins.
        progress: Called with (done, total, unit).
        should_stop: Asked often; true ends the stage soon.
    """

    phase: Callable[[str], None] = lambda words: None
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None
    should_stop: Callable[[], bool] = lambda: False


def versions() -> dict[str, str]:
    """Return the versions a record needs to be repeated."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one.

    Raises:
        OptionError: Unknown name, or CUDA asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f'The device is "{name}"; give auto, cpu or cuda.')
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("There is no CUDA device on this machine. Use --device auto or cpu.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the device's name for a record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def check_amounts(*, samples: int | None, batch_size: int) -> None:
    """Raise unless so many images, in batches of that size, can be run.

    Raises:
        OptionError: Below 1, or beyond what anyone means.
    """
    for name, value, most in (
        ("number of samples", samples, 10_000_000),
        ("batch size", batch_size, 65_536),
    ):
        if value is not None and not 1 <= value <= most:
            raise OptionError(f"The {name} is {value}; give 1 to {most:,}.")


def check_image_size(card: ModelCard, size: int) -> None:
    """Raise unless the network takes images of that side.

    Raises:
        OptionError: Too small, too large, or no multiple of what the network needs.
    """
    multiple = card.size_multiple
    if not 16 <= size <= 1024:
        raise OptionError(f"The image size is {size}; give 16 to 1024 pixels.")
    if size % multiple:
        lower, upper = size // multiple * multiple, (size // multiple + 1) * multiple
        near = f"{lower} or {upper}" if lower >= 16 else str(upper)
        if multiple == card.native_size:
            raise OptionError(f"{card.title} takes images of {multiple} px alone, not {size}.")
        raise OptionError(
            f"The image size is {size}; {card.title} takes multiples of {multiple}, such as {near}."
        )


def read_batch(
    images: ImageSet,
    items: Sequence[Item],
    preprocessing: Preprocessing,
    *,
    size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return images as a network takes them and their labels, on the device.

    Args:
        images: The opened set.
        items: Which of them.
        preprocessing: The network's.
        size: Side in pixels.
        device: Where they go.

    Returns:
        Inputs (n, 3, size, size), normalised, channels last; labels (n,).
    """
    pixels, labels = decode_items(images, items, preprocessing, size=size)
    inputs = normalised(pixels.to(device), preprocessing.mean, preprocessing.std)
    return inputs.contiguous(memory_format=torch.channels_last), labels.to(device)


@lru_cache(maxsize=8)
def _outline(spec_json: str, stamp: float, classes: int | None, head_seed: int) -> ModelOutline:
    del stamp  # part of the key alone: a changed checkpoint is read again
    spec = ModelSpec.model_validate_json(spec_json)
    loaded = load_model(spec, classes=classes, head_seed=head_seed)
    return outline_module(loaded.module, loaded.card, loaded.head)


def outline_model(
    spec: ModelSpec, *, classes: int | None = None, head_seed: int = 0
) -> ModelOutline:
    """Return a model's layers in forward order; loads the weights once and remembers the outline.

    Raises:
        ModelError: Unknown model or weights that do not fit.
        OfflineError: The weights are not here and cannot be fetched.
    """
    stamp = 0.0
    if spec.checkpoint is not None and Path(spec.checkpoint).is_file():
        stamp = Path(spec.checkpoint).stat().st_mtime
    return _outline(spec.model_dump_json(), stamp, classes, head_seed)


def diagnose(
    spec: ModelSpec,
    data: DataSpec,
    *,
    samples: int = DEFAULT_SAMPLES,
    batch_size: int = DEFAULT_BATCH_SIZE,
    image_size: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    histograms: bool = False,
    transfer: bool = False,
    watcher: Watcher | None = None,
) -> tuple[Diagnosis, dict[str, np.ndarray]]:
    """Measure a network and its fresh twin on the same batches of the training images.

    The head is new (drawn from `seed`) and the twin gets a copy of it, so that the figures
    differ by the backbone alone. A head that its architecture draws as all zeros would let no
    gradient through; it is then drawn from N(0, 1 / fan-in) for both, and the notes say so.
    Images are read batch by batch: memory does not grow with their number.

    Args:
        spec: The model.
        data: The images.
        samples: How many, classes in turn.
        batch_size: Images a batch.
        image_size: Side in pixels; None takes the model's default for short runs.
        device: "auto", "cpu" or "cuda".
        dtype: "float32", or "bfloat16" or "float16" to run the pass under autocast.
        seed: Seed of the head, the twin and the choice of images.
        histograms: Add the histogram of each layer's weight to the figures by unit.
        transfer: Also take the slower pass over features: linear probe, LogME, CKA.
        watcher: Progress and stop.

    Returns:
        The diagnosis, and the figures by unit: "LAYER/METRIC" and "twin/LAYER/METRIC" to
        float32 arrays (units,).

    Raises:
        LimberError: Bad input, or stopped.
    """
    begun = time.perf_counter()
    with _measurement(
        spec,
        data,
        samples=samples,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        dtype=dtype,
        seed=seed,
        watcher=watcher,
    ) as measurement:
        measurement.run(range(measurement.batches))
        if transfer:
            measurement.read_features()
    return measurement.diagnosis(begun=begun, histograms=histograms)


def measure_part(
    spec: ModelSpec,
    data: DataSpec,
    out: Path,
    *,
    part: int,
    parts: int,
    samples: int = DEFAULT_SAMPLES,
    batch_size: int = DEFAULT_BATCH_SIZE,
    image_size: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    watcher: Watcher | None = None,
) -> int:
    """Measure every `parts`-th batch and write the sums; `merge_parts` makes the diagnosis.

    Args:
        spec: The model.
        data: The images.
        out: File to write, safetensors.
        part: Which part, from 1.
        parts: How many parts there are.
        samples: As in `diagnose`; of all parts together.
        batch_size: As in `diagnose`.
        image_size: As in `diagnose`.
        device: As in `diagnose`.
        dtype: As in `diagnose`.
        seed: As in `diagnose`.
        watcher: Progress and stop.

    Returns:
        The number of images measured.

    Raises:
        LimberError: Bad input, or stopped.
    """
    begun = time.perf_counter()
    if parts < 1:
        raise OptionError(f"There are {parts} parts; give 1 or more.")
    if not 1 <= part <= parts:
        raise OptionError(f"The part is {part} of {parts}; give 1/{parts} to {parts}/{parts}.")
    with _measurement(
        spec,
        data,
        samples=samples,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        dtype=dtype,
        seed=seed,
        watcher=watcher,
    ) as measurement:
        chosen = range(part - 1, measurement.batches, parts)
        if not chosen:
            raise OptionError(
                f"There are {measurement.batches} batches; {parts} parts are too many. Take fewer "
                "parts or smaller batches."
            )
        measurement.run(chosen)
    state = measurement.state()
    text = json.dumps(
        {**measurement.recipe(part, parts), **measurement.facts(begun)}, sort_keys=True
    )
    meta = {"limber_part": text, "sha256": _part_sha256(text, state)}
    write_whole(out, sorted_metadata(safetensors.torch.save(state, metadata=meta)))
    return measurement.own.shard.samples


def merge_parts(
    paths: Sequence[Path], *, histograms: bool = False, watcher: Watcher | None = None
) -> tuple[Diagnosis, dict[str, np.ndarray]]:
    """Merge what `measure_part` wrote into the diagnosis that one pass would have given.

    Args:
        paths: The files of all parts, in any order.
        histograms: As in `diagnose`.
        watcher: Progress and stop.

    Raises:
        OptionError: A file is unreadable, of another measurement, twice there, or missing.
        LimberError: The model or the images are no longer here.
    """
    begun = time.perf_counter()
    recipes, facts, states = [], [], []
    for path in paths:
        try:
            recipe, fact, state = _read_part(path)
        except (
            OSError,
            KeyError,
            ValueError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            raise OptionError(
                f'"{path}" cannot be read as a part of a measurement. Measure that part again.'
            ) from error
        recipes.append(recipe)
        facts.append(fact)
        states.append(state)
    if not recipes:
        raise OptionError("There is no part to merge. Name the files of all parts.")
    shared = [{k: v for k, v in each.items() if k != "part"} for each in recipes]
    for path, each in zip(paths, shared, strict=True):
        if each != shared[0]:
            odd = next(key for key in each if each[key] != shared[0].get(key))
            raise OptionError(
                f'"{path}" is a part of another measurement: its {odd} differs from that of '
                f'"{paths[0]}". Measure all parts alike.'
            )
    found, parts = sorted(each["part"] for each in recipes), int(shared[0]["parts"])
    if found != list(range(1, parts + 1)):
        lost = sorted(set(range(1, parts + 1)) - set(found))
        what = f"part {lost[0]} is missing" if lost else "a part is there twice"
        raise OptionError(f"Of {parts} parts {what}. Name each part's file once.")
    recipe = shared[0]
    with _measurement(
        ModelSpec.model_validate(recipe["model"]),
        DataSpec.model_validate(recipe["data"]),
        samples=recipe["samples"],
        batch_size=recipe["batch_size"],
        image_size=recipe["image_size"],
        device="cpu",
        dtype=recipe["dtype"],
        seed=recipe["seed"],
        watcher=watcher,
    ) as measurement:
        if measurement.recipe(1, parts) != recipes[0] | {"part": 1}:
            raise OptionError(
                "The weights or images on this machine are not those the parts were measured on."
            )
        for _, state in sorted(zip(recipes, states, strict=True), key=lambda pair: pair[0]["part"]):
            try:
                measurement.absorb(state)
            except (KeyError, ValueError, RuntimeError) as error:
                raise OptionError("A part is damaged. Measure it again.") from error
        measurement.trace()
    diagnosis, units = measurement.diagnosis(begun=begun, histograms=histograms)
    return _as_measured(diagnosis, facts), units


def _part_sha256(text: str, state: Mapping[str, Tensor]) -> str:
    return hashlib.sha256((text + state_sha256(state)).encode()).hexdigest()


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return what `measure_part` wrote: what parts share, how this one was taken, its sums.

    Raises:
        OSError, KeyError, ValueError, SafetensorError: Not a part, or not as it was written.
    """
    with safetensors.safe_open(path, "pt") as opened:
        meta = opened.metadata() or {}
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    text = meta["limber_part"]
    if meta["sha256"] != _part_sha256(text, state):
        raise ValueError("the file is not as it was written")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no record of a part")
    fact = {key: content.pop(key) for key in FACTS}
    return content, fact, state


def _as_measured(diagnosis: Diagnosis, facts: Sequence[Mapping[str, Any]]) -> Diagnosis:
    """Return a diagnosis that says how its parts were taken, not how they were merged."""
    passing = sum(each["whole_s"] - each["reading_s"] for each in facts)
    on_cpu = all(each["device"] == "cpu" for each in facts)
    said = {
        name: ", ".join(dict.fromkeys(each[name] for each in facts))
        for name in ("device", "device_name", "kernels")
    }
    header = diagnosis.header.model_copy(
        update={
            **said,
            "wall_s": sum(each["wall_s"] for each in facts),
            "overhead_fraction": sum(each["reading_s"] for each in facts) / passing
            if on_cpu and passing > 0
            else None,
        }
    )
    return diagnosis.model_copy(update={"header": header})


# What a part says of how it was taken; parts may differ in it.
FACTS = ("device", "device_name", "kernels", "wall_s", "reading_s", "whole_s")

FiguresByLayer = Mapping[str, Mapping[str, MetricValue]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def _measurement(
    spec: ModelSpec,
    data: DataSpec,
    *,
    samples: int,
    batch_size: int,
    image_size: int | None,
    device: str,
    dtype: str,
    seed: int,
    watcher: Watcher | None,
) -> Iterator[_Measurement]:
    """Load network, twin and images and put both networks under watch."""
    watcher = watcher or Watcher()
    check_amounts(samples=samples, batch_size=batch_size)
    if dtype not in DTYPES:
        raise OptionError(f'The dtype is "{dtype}"; give {", ".join(DTYPES)}.')
    place = choose_device(device)
    images = open_images(data)
    classes = len(images.outline.classes)
    watcher.phase("loading the model")
    loaded = load_model(spec, classes=classes, head_seed=seed)
    card = loaded.card
    size = card.default_size if image_size is None else image_size
    check_image_size(card, size)
    outline = outline_module(loaded.module, card, loaded.head)
    twin = build_module(spec, classes=classes, seed=derived_seed(seed, "twin"))
    notes = [*loaded.card.notes, *images.outline.notes]
    _share_head(loaded, twin, notes, seed=seed)
    items = choose_items(images.splits["train"], samples, seed=seed)
    if not items:
        raise DataError('The data set has no images in its "train" part.')
    if len(items) < samples:
        notes.append(f"{samples} images were asked for; the training part has {len(items)}.")
    modules = [
        module.to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in (loaded.module, twin)
    ]
    with (
        watching(modules[0], outline.layers, dtype=DTYPES[dtype]) as own,
        watching(modules[1], outline.layers, dtype=DTYPES[dtype]) as fresh,
    ):
        yield _Measurement(
            spec=spec,
            data=data,
            asked=samples,
            batch_size=batch_size,
            size=size,
            place=place,
            dtype=dtype,
            seed=seed,
            watcher=watcher,
            images=images,
            items=items,
            card=card,
            outline=outline,
            notes=notes,
            own=own,
            fresh=fresh,
        )


@dataclass(slots=True, kw_only=True)
class _Measurement:
    """A network and its twin under watch, batch for batch on the same images."""

    spec: ModelSpec
    data: DataSpec
    asked: int
    batch_size: int
    size: int
    place: torch.device
    dtype: str
    seed: int
    watcher: Watcher
    images: ImageSet
    items: Sequence[Item]
    card: ModelCard
    outline: ModelOutline
    notes: list[str]
    own: Gauge
    fresh: Gauge
    ratios: Moments | None = None
    transfer: tuple[FiguresByLayer, FiguresByLayer] | None = None

    @property
    def batches(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def _read(self, batch: int) -> tuple[Tensor, Tensor]:
        chosen = self.items[batch * self.batch_size : (batch + 1) * self.batch_size]
        return read_batch(
            self.images, chosen, self.card.preprocessing, size=self.size, device=self.place
        )

    def run(self, batches: Sequence[int]) -> None:
        """Measure these batches, the network and then its twin on each."""
        self.watcher.phase("measuring the network beside its fresh twin")
        whole = sum(
            min(self.batch_size, len(self.items) - batch * self.batch_size) for batch in batches
        )
        done = 0
        for batch in batches:
            if self.watcher.should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            inputs, labels = self._read(batch)
            first = batch * self.batch_size
            figures = []
            for gauge in (self.own, self.fresh):
                figures.append(gauge.add(inputs, labels, first=first))
                done += len(inputs)
                self.watcher.progress(done, 2 * whole, "images")
                if self.watcher.should_stop():
                    raise Stopped("Measuring was stopped; nothing was written.")
            # Where either is 0 there is no ratio, as where it does not apply.
            logs = Moments.of(
                (figures[0] / figures[1]).log().nan_to_num(torch.nan, torch.nan, torch.nan)
            )
            self.ratios = logs if self.ratios is None else self.ratios.merged(logs)

    def read_features(self) -> None:
        """Take the slower pass over features of both networks."""
        self.watcher.phase("reading features")
        count = min(len(self.items), MOST_IMAGES)
        parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        labels = []
        batches = -(-count // self.batch_size)
        for batch in range(batches):
            if self.watcher.should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            inputs, targets = self._read(batch)
            layers = self.outline.layers
            parts.append(
                (
                    pooled_features(self.own.module, inputs, layers, dtype=DTYPES[self.dtype]),
                    pooled_features(self.fresh.module, inputs, layers, dtype=DTYPES[self.dtype]),
                )
            )
            labels.append(targets.cpu())
            self.watcher.progress(batch + 1, batches, "batches")
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

    def recipe(self, part: int, parts: int) -> dict[str, object]:
        """Return what makes parts belong together."""
        return {
            "model": self.spec.model_dump(mode="json"),
            "weights": self.card.backbone_sha256,
            "data": self.data.model_dump(mode="json"),
            "images": self.images.outline.fingerprint,
            "samples": self.asked,
            "batch_size": self.batch_size,
            "image_size": self.size,
            "dtype": self.dtype,
            "seed": self.seed,
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
        """Return the sums of both networks, for a file."""
        found: dict[str, Tensor] = {}
        for prefix, gauge in (("own", self.own), ("twin", self.fresh)):
            found |= {f"{prefix}:{k}": v for k, v in shard_state(gauge.shard).items()}
        if self.ratios is not None:
            found |= {
                "ratios:count": self.ratios.count.cpu(),
                "ratios:mean": self.ratios.mean.cpu(),
                "ratios:m2": self.ratios.m2.cpu(),
            }
        return found

    def absorb(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums that `state` returned elsewhere."""
        for prefix, gauge in (("own:", self.own), ("twin:", self.fresh)):
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            gauge.shard = gauge.shard.merged(shard_from(part))
        ratios = Moments(*(state[f"ratios:{each}"] for each in ("count", "mean", "m2")))
        self.ratios = ratios if self.ratios is None else self.ratios.merged(ratios)

    def diagnosis(
        self, *, begun: float, histograms: bool
    ) -> tuple[Diagnosis, dict[str, np.ndarray]]:
        """Return what the sums say."""
        self.watcher.phase("adding up")
        count = len(self.outline.layers)

        def begins(place: int) -> None:
            # The spectrum of a wide layer takes seconds.
            if self.watcher.should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            self.watcher.progress(place, 2 * count, "layers")

        own = figures_of(self.own, histograms=histograms, begins=begins)
        fresh = figures_of(
            self.fresh, histograms=histograms, begins=lambda place: begins(count + place)
        )
        intervals = ratio_intervals(self.own, self.fresh, self.ratios, own, fresh)
        reports = _reports(self.outline, own, fresh, intervals, self.transfer)
        for loss, whose in ((own.loss, "network's"), (fresh.loss, "fresh twin's")):
            if not math.isfinite(loss):
                self.notes.append(
                    f"The {whose} loss on these images is not a finite number: its weights or the "
                    "pass overflow. Where a figure would not be finite it has a reason instead."
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
            dtype=self.dtype,
            seed=self.seed,
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
        )
        units: dict[str, np.ndarray] = {}
        for layer in self.outline.layers:
            for metric, values in own.units[layer.name].items():
                units[f"{layer.name}/{metric}"] = values
            for metric, values in fresh.units[layer.name].items():
                units[f"twin/{layer.name}/{metric}"] = values
        return Diagnosis(header=header, layers=reports, findings=judge(reports)), units


def _tick(watcher: Watcher, done: int, total: int, unit: str) -> None:
    if watcher.should_stop():
        raise Stopped("Stopped while reading the images; nothing was written.")
    watcher.progress(done, total, unit)


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


def write_diagnosis(diagnosis: Diagnosis, units: Mapping[str, np.ndarray], out: Path) -> Diagnosis:
    """Write the diagnosis as JSON with its figures by unit beside it; return what was written.

    See `core.export.companion_path` for the companion's name; the header names it and its SHA-256.
    """
    companion = companion_path(out, "units")
    data = safetensors.numpy.save({key: np.ascontiguousarray(units[key]) for key in sorted(units)})
    write_whole(companion, data)
    header = diagnosis.header.model_copy(
        update={
            "units_file": companion.name,
            "units_sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    written = diagnosis.model_copy(update={"header": header})
    write_whole(out, written.model_dump_json(indent=1) + "\n")
    return written


def read_diagnosis(path: Path) -> Diagnosis:
    """Read a diagnosis file.

    Raises:
        OptionError: Missing, unreadable, or not a diagnosis.
    """
    try:
        return Diagnosis.model_validate_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise OptionError(f'"{path}" cannot be read as a diagnosis. Measure again.') from error


def read_units(path: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Read the companion of a diagnosis: layer to metric to (network's, twin's) (units,).

    Raises:
        OptionError: The companion is missing or not the one the diagnosis names.
    """
    header = read_diagnosis(path).header
    companion = Path(path).parent / Path(header.units_file or "").name
    try:
        data = companion.read_bytes()
        if hashlib.sha256(data).hexdigest() != header.units_sha256:
            raise OptionError(
                f'"{companion.name}" is not the file its diagnosis names. Measure again.'
            )
        arrays = safetensors.numpy.load(data)
    except (OSError, safetensors.SafetensorError) as error:
        raise OptionError(f'"{companion}" cannot be read. Measure again.') from error
    return units_with_twins(arrays)


def units_with_twins(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the figures by unit that `diagnose` gives, layer to metric to (network's, twin's)."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key, values in arrays.items():
        layer, _, metric = key.rpartition("/")
        twin = arrays.get(f"twin/{key}")
        if twin is not None:
            found.setdefault(layer, {})[metric] = (values, twin)
    return found


def plan_outline(plan: ReinitPlan) -> ModelOutline:
    """Return the outline of the network a plan was made for, and check that it still fits.

    Raises:
        PlanError: The weights on this machine are not the plan's.
        LimberError: The model cannot be loaded.
    """
    outline = outline_model(
        plan_spec(plan), classes=plan_classes(plan), head_seed=plan.model.head_seed
    )
    check_plan(plan, outline)
    return outline


def plan_spec(plan: ReinitPlan) -> ModelSpec:
    """Return the specification of the network a plan was made for."""
    model = plan.model
    return ModelSpec(
        source=model.source,
        name=model.name,
        weights=model.weights,
        checkpoint=model.checkpoint,
        kwargs=dict(model.kwargs),
    )


def plan_classes(plan: ReinitPlan) -> int | None:
    """Return the size of a plan's new head; None for the head that came with the weights."""
    return None if plan.model.head == "own" else plan.model.classes


def edited_model(
    plan: ReinitPlan, *, head_seed: int | None = None
) -> tuple[LoadedModel, ReinitReceipt]:
    """Load the plan's network with the plan applied.

    Args:
        plan: Read and validated.
        head_seed: Another seed for a new head than the plan's; the reset values stay the plan's.

    Raises:
        PlanError: The weights at hand are not the plan's, or it names what is not there.
    """
    spec, classes = plan_spec(plan), plan_classes(plan)
    seed = plan.model.head_seed if head_seed is None else head_seed
    loaded = load_model(spec, classes=classes, head_seed=seed)
    # With no weights to load the backbone is random and follows the head's seed.
    comparable = spec.weights != "none" or seed == plan.model.head_seed
    if comparable and loaded.card.backbone_sha256 != plan.model.backbone_sha256:
        raise PlanError(
            f"The plan was made for weights {plan.model.backbone_sha256[:12]}..., and the weights "
            f"at hand are {loaded.card.backbone_sha256[:12]}.... Load the weights the plan was "
            "made for, or make the plan again on these."
        )
    module = loaded.module
    edited, receipt = apply_plan(
        module.state_dict(),
        plan,
        fresh=lambda twin_seed: build_module(
            spec, classes=loaded.card.classes if loaded.head else None, seed=twin_seed
        ).state_dict(),
        parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
        sha256=state_sha256,
        plan_text=plan_json(plan),
    )
    load_edited(module, edited)
    return loaded, receipt


def load_edited(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load edited weights, telling the module's own format versions along.

    Some networks (torchvision's MNASNet) refuse a state that does not say which version it is.
    """
    told = OrderedDict(state)
    told._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(told)


def reset_weights(plan: ReinitPlan, out: Path) -> ReinitReceipt:
    """Apply a plan and write the edited weights, with the plan in the file's metadata.

    The same plan on the same weights gives the same bytes.

    Raises:
        LimberError: The plan does not fit, or the file cannot be written.
    """
    state, receipt = edited_weights(plan)
    metadata = {
        "format": "pt",
        # As an export calls its files, so that what a plan's own file is called does not matter.
        "limber_plan": plan_json(named_after(plan, Path("plan.json"))),
        "limber_sha256": receipt.after_sha256,
    }
    data = safetensors.torch.save(dict(sorted(state.items())), metadata=metadata)
    write_whole(out, sorted_metadata(data))
    return receipt


def edited_weights(plan: ReinitPlan) -> tuple[dict[str, Tensor], ReinitReceipt]:
    """Return the state that a plan makes, no two tensors sharing memory, and the receipt.

    Raises:
        LimberError: The plan does not fit.
    """
    loaded, receipt = edited_model(plan)
    state = {
        name: value.detach().contiguous() for name, value in loaded.module.state_dict().items()
    }
    shared: dict[int, str] = {}
    for name, value in state.items():
        # The format refuses tensors that share memory; trainers load by name and tie again.
        if value.numel() and shared.setdefault(value.data_ptr(), name) != name:
            state[name] = value.clone()
    return state, receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fine-tune ready to run: the record that repeats it, and the steps when iterated."""

    record: RunRecord
    steps: Iterator[StepRecord]


def prepare_trial(
    spec: ModelSpec,
    data: DataSpec,
    plans: Sequence[ReinitPlan],
    *,
    settings: Settings,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    image_size: int | None = None,
    train_images: int | None = DEFAULT_TRAIN_IMAGES,
    val_images: int | None = DEFAULT_VAL_IMAGES,
    device: str = "auto",
    watcher: Watcher | None = None,
) -> Trial:
    """Check everything, read the images, and return a trial whose steps run when iterated.

    Args:
        spec: The model.
        data: The images; their classes must be as many as the plans' heads have.
        plans: One arm each, beside the untouched control; a random control
            (`core.random_twin`) is a plan like the others.
        settings: Shared by all arms.
        seeds: One head and batch order each.
        image_size: Side in pixels; None takes the model's default for short runs.
        train_images: At most so many, classes in turn; None takes all.
        val_images: As above, for validation.
        device: "auto", "cpu" or "cuda".
        watcher: Progress and stop.

    Raises:
        LimberError: Bad input, or stopped.
    """
    watcher = watcher or Watcher()
    place = choose_device(device)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise OptionError("Seeds must be different whole numbers from 0, such as 0,1,2.")
    images = open_images(data)
    classes = len(images.outline.classes)
    watcher.phase("loading the model")
    outline = outline_model(spec, classes=classes)
    size = outline.default_size if image_size is None else image_size
    check_image_size(outline, size)
    arms_plans: dict[str, ReinitPlan] = {}
    caveats: list[str] = []
    for plan in plans:
        if plan.model.head == "new" and plan.model.classes != classes:
            raise PlanError(
                f'Plan "{plan.name}" was made for {plan.model.classes} classes and '
                f"{images.outline.title} has {classes}. Make the plan again with --data or "
                f"--classes {classes}."
            )
        if plan.model.head == "own":
            raise PlanError(
                f'Plan "{plan.name}" keeps the head that came with the weights, and a fine-tune '
                "starts with a new one. Make the plan again with --data."
            )
        check_plan(plan, outline)
        trimmed, left_out = without_new_head(plan, outline)
        name = _free_name(plan.name, arms_plans)
        arms_plans[name] = trimmed
        caveats += [f'"{name}": {each}' for each in left_out]
        if spec.weights == "none" and any(target.entries for target in plan.targets):
            caveats.append(
                f'"{name}" chose entries on the random network of seed {plan.model.head_seed}; '
                "without weights to load each seed has another network, where they are any others."
            )
    watcher.phase("reading the images")
    decoded: dict[str, tuple[Tensor, Tensor]] = {}
    for split, limit in (("train", train_images), ("val", val_images)):
        if limit is not None and limit < 2:
            raise OptionError(f"{limit} images are too few; give 2 or more.")
        decoded[split] = decode(
            images,
            split,
            outline.preprocessing,
            size=size,
            limit=limit,
            seed=0,
            on_progress=lambda done, total: _tick(watcher, done, total, "images read"),
        )
    prepared = Images(
        train=decoded["train"][0],
        train_labels=decoded["train"][1],
        val=decoded["val"][0],
        val_labels=decoded["val"][1],
        mean=outline.preprocessing.mean,
        std=outline.preprocessing.std,
    )
    head = frozenset(
        parameter.name for layer in outline.layers if layer.head for parameter in layer.parameters
    )
    arms = [Arm(name=CONTROL, build=lambda seed: _untouched(spec, classes, seed), head=head)]
    arms += [
        Arm(
            name=name,
            build=_builder(plan),
            frozen=_frozen(outline, plan),
            head=head,
            rates=_rates(outline, plan),
        )
        for name, plan in arms_plans.items()
    ]
    record = RunRecord(
        model=spec,
        model_title=outline.title,
        classes=classes,
        backbone_sha256=outline.backbone_sha256,
        data=data,
        data_title=images.outline.title,
        data_fingerprint=images.outline.fingerprint,
        arms=tuple(arm.name for arm in arms),
        plans=arms_plans,
        seeds=tuple(seeds),
        steps=settings.steps,
        batch_size=min(settings.batch_size, len(prepared.train)),
        eval_every=settings.eval_every,
        image_size=size,
        train_images=len(prepared.train),
        val_images=len(prepared.val),
        optimizer="AdamW",
        lr=settings.lr,
        head_lr=settings.rate_of_head,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        device=place.type,
        device_name=device_name(place),
        dtype="float32",
        versions=versions(),
        caveats=(*caveats, *_size_caveats(arms_plans, outline)),
    )
    watcher.phase("fine-tuning")
    steps = finetune(
        arms, prepared, settings, seeds=seeds, device=place, should_stop=watcher.should_stop
    )
    return Trial(record=record, steps=steps)


def without_new_head(plan: ReinitPlan, outline: ModelOutline) -> tuple[ReinitPlan, tuple[str, ...]]:
    """Return what of a plan can be compared over several new heads, and what was left out.

    Arms of one seed share a head, and each seed has another. What a plan chose or computed on one
    head (its smallest weights, a shift of its biases) means nothing on the next; the columns that
    read a reset unit are 0 on any.

    Raises:
        PlanError: Nothing is left.
    """
    heads = {layer.name for layer in outline.layers if layer.head and not outline.own_head}
    targets, dropped = [], 0
    for target in plan.targets:
        entries = tuple(
            each
            for each in target.entries
            if target.layer not in heads or (target.granularity == "unit" and each.write == "zero")
        )
        dropped += len(target.entries) - len(entries)
        if len(entries) == len(target.entries):
            targets.append(target)
        elif entries:
            names = {each.tensor for each in entries}
            targets.append(
                target.model_copy(
                    update={
                        "entries": entries,
                        "parameters": tuple(n for n in target.parameters if n in names),
                        "buffers": tuple(n for n in target.buffers if n in names),
                    }
                )
            )
    if not dropped:
        return plan, ()
    if not targets:
        raise PlanError(
            f'Plan "{plan.name}" resets the new head alone, which is another with each seed. '
            "Choose layers before it."
        )
    kept = plan.model_copy(update={"targets": tuple(targets)})
    said = (
        "what it writes into the new head is left out, because the arms of a comparison share "
        "their head and each seed has another."
    )
    return resealed(kept), (said,)


def _size_caveats(plans: Mapping[str, ReinitPlan], outline: ModelOutline) -> tuple[str, ...]:
    """Say which random controls reset more or less than the first plan does."""
    sizes = {name: planned_size(outline, plan) for name, plan in plans.items()}
    first = next(iter(sizes), "")
    rows = []
    for name, plan in plans.items():
        if name == first or plan.rule is None or plan.rule.name != "random":
            continue
        own, other = sizes[name].parameters, sizes[first].parameters
        if not 1 / ALIKE <= own / max(other, 1) <= ALIKE:
            rows.append(
                f'"{name}" resets {100 * sizes[name].fraction:.2g} % of the parameters and '
                f'"{first}" {100 * sizes[first].fraction:.2g} %: no layers nearer in size were '
                "left, and size alone may explain a difference between the two."
            )
    return tuple(rows)


def _free_name(name: str, taken: Mapping[str, ReinitPlan]) -> str:
    if name == CONTROL:
        name = "plan"
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name} {number}"
    return free


def _untouched(spec: ModelSpec, classes: int, seed: int) -> nn.Module:
    return load_model(spec, classes=classes, head_seed=seed).module


def _builder(plan: ReinitPlan) -> Callable[[int], nn.Module]:
    return lambda seed: edited_model(plan, head_seed=seed)[0].module


def _frozen(outline: ModelOutline, plan: ReinitPlan) -> frozenset[str]:
    return frozenset(
        parameter.name
        for layer in outline.layers
        if layer.name in set(plan.freeze)
        for parameter in layer.parameters
    )


def _rates(outline: ModelOutline, plan: ReinitPlan) -> dict[str, float]:
    factors = {rate.layer: rate.factor for rate in plan.learning_rates}
    return {
        parameter.name: factors[layer.name]
        for layer in outline.layers
        if layer.name in factors
        for parameter in layer.parameters
    }


def write_run(
    record: RunRecord, steps: Sequence[StepRecord], out: Path, *, finished: bool
) -> ABComparison:
    """Write a run's folder: `curves.csv`, `summary.json` and `plans/ARM.json`.

    Raises:
        LimberError: The folder cannot be written.
    """
    comparison = compare_curves(curves_of(steps))
    comparison = comparison.model_copy(update={"caveats": (*record.caveats, *comparison.caveats)})
    write_whole(out / "curves.csv", curves_csv(steps))
    for file, plan in zip(_file_names(record.plans), record.plans.values(), strict=True):
        write_plan(plan, out / "plans" / f"{file}.json")
    last: dict[str, dict[str, float | None]] = {}
    for step in steps:
        if step.val_accuracy is not None:
            last.setdefault(step.arm, {})[str(step.seed)] = step.val_accuracy
    summary = {
        "finished": finished,
        "steps_done": len([step for step in steps if step.step > 0]),
        "final_val_accuracy": last,
        "wall_s": max((step.wall_s for step in steps), default=0.0),
        "comparison": comparison.model_dump(mode="json"),
        "record": record.model_dump(mode="json"),
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return comparison


def _file_names(names: Iterable[str]) -> list[str]:
    """Return names of files for arms: no odd letters, short enough, each another."""
    found: list[str] = []
    for name in names:
        safe = "".join(c if c.isalnum() or c in "-_ ." else "_" for c in name)
        safe = safe.encode()[:LONGEST_NAME].decode(errors="ignore").strip(". ") or "plan"
        free, number = safe, 1
        # Some file systems take capitals for the same.
        while free.casefold() in {each.casefold() for each in found}:
            number += 1
            free = f"{safe} {number}"
        found.append(free)
    return found


def step_event(step: StepRecord) -> dict[str, object]:
    """Return a step as the fields of an event."""
    return asdict(step)


__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_EVAL_EVERY",
    "DEFAULT_SAMPLES",
    "DEFAULT_SEEDS",
    "DEFAULT_STEPS",
    "DEFAULT_TRAIN_IMAGES",
    "DEFAULT_VAL_IMAGES",
    "LimberError",
    "Preprocessing",
    "Trial",
    "Watcher",
    "diagnose",
    "edited_model",
    "measure_part",
    "merge_parts",
    "outline_model",
    "plan_outline",
    "prepare_trial",
    "read_diagnosis",
    "read_units",
    "reset_weights",
    "write_diagnosis",
    "write_run",
]
