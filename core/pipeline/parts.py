"""A measurement split into files, and these merged into its diagnosis."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from core.errors import OptionError
from core.files.companions import sorted_metadata
from core.files.inputs import strict_json
from core.files.whole import write_whole
from core.load import (
    state_sha256,
)
from core.load.checkpoints import safetensors_bytes
from core.pipeline.measuring import MeasureSettings, measuring
from core.pipeline.progress import Progress
from core.records import (
    DataSpec,
    Diagnosis,
    ModelSpec,
)
from core.records.base import Value


def measure_part(
    spec: ModelSpec,
    data: DataSpec,
    out: Path,
    settings: MeasureSettings | None = None,
    *,
    part: int,
    parts: int,
    progress: Progress | None = None,
) -> int:
    """Measure every `parts`-th batch and write the sums; `merge_parts` makes the diagnosis.

    Args:
        spec: The model.
        data: The images.
        out: File to write, safetensors.
        settings: As in `diagnose`, alike for all parts.
        part: Which part, from 1.
        parts: How many parts there are.
        progress: Progress and stop.

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
    with measuring(spec, data, settings or MeasureSettings(), progress) as measurement:
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
    paths: Sequence[Path], *, histograms: bool = False, progress: Progress | None = None
) -> tuple[Diagnosis, dict[str, np.ndarray]]:
    """Merge what `measure_part` wrote into the diagnosis that one pass would have given.

    Args:
        paths: The files of all parts, in any order.
        histograms: As in `diagnose`.
        progress: Progress and stop.

    Returns:
        The diagnosis, and the figures by unit (units,), as `diagnose` does.

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
            LookupError,
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
    numbers, parts = sorted(each["part"] for each in recipes), int(shared[0]["parts"])
    if numbers != list(range(1, parts + 1)):
        lost = sorted(set(range(1, parts + 1)) - set(numbers))
        what = f"part {lost[0]} is missing" if lost else "a part is there twice"
        raise OptionError(f"Of {parts} parts {what}. Name each part's file once.")
    recipe = shared[0]
    settings = MeasureSettings(
        samples=recipe["samples"],
        batch_size=recipe["batch_size"],
        image_size=recipe["image_size"],
        device="cpu",
        dtype=recipe["dtype"],
        seed=recipe["seed"],
    )
    model, data = ModelSpec.model_validate(recipe["model"]), DataSpec.model_validate(recipe["data"])
    with measuring(model, data, settings, progress) as measurement:
        if measurement.recipe(1, parts) != recipes[0] | {"part": 1}:
            raise OptionError(
                "The weights or images on this machine are not those the parts were measured on."
            )
        for _, state in sorted(zip(recipes, states, strict=True), key=lambda pair: pair[0]["part"]):
            try:
                measurement.absorb(state)
            except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
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
    safetensors_bytes(Path(path))
    with safetensors.safe_open(path, "pt") as opened:
        meta = opened.metadata() or {}
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    text = meta["limber_part"]
    if meta["sha256"] != _part_sha256(text, state):
        raise ValueError("the file is not as it was written")
    content = strict_json(text, most_values=10_000)
    _PartRecord.model_validate_json(text, strict=True)
    fact = {key: content.pop(key) for key in FACTS}
    return content, fact, state


class _PartRecord(Value):
    """What a part's file says of itself; see `Measurement.recipe` and `Measurement.facts`."""

    model: ModelSpec
    weights: str
    data: DataSpec
    images: str
    samples: int
    batch_size: int
    image_size: int
    dtype: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    parts: Annotated[int, Field(ge=1, le=1_000_000)]
    part: int
    device: str
    device_name: str
    kernels: str
    wall_s: FiniteFloat
    reading_s: FiniteFloat
    whole_s: FiniteFloat


def _as_measured(diagnosis: Diagnosis, facts: Sequence[Mapping[str, Any]]) -> Diagnosis:
    """Return a diagnosis that says how its parts were taken, not how they were merged."""
    passing = sum(fact["whole_s"] - fact["reading_s"] for fact in facts)
    on_cpu = all(fact["device"] == "cpu" for fact in facts)
    said = {
        name: ", ".join(dict.fromkeys(fact[name] for fact in facts))
        for name in ("device", "device_name", "kernels")
    }
    header = diagnosis.header.model_copy(
        update={
            **said,
            "wall_s": sum(fact["wall_s"] for fact in facts),
            "overhead_fraction": sum(fact["reading_s"] for fact in facts) / passing
            if on_cpu and passing > 0
            else None,
        }
    )
    return diagnosis.model_copy(update={"header": header})


# What a part says of how it was taken; parts may differ in it.
FACTS = ("device", "device_name", "kernels", "wall_s", "reading_s", "whole_s")
