"""Values of the core, made once and shared by all sessions: lists, outlines, images.

What ships with Limber, and networks of timm and torchvision, are opened here. What a person
uploaded or named by a path is opened by a worker within limits, whose answer is kept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import core
from core.records import (
    DataOutline,
    DatasetEntry,
    DataSpec,
    ModelEntry,
    ModelOutline,
    ModelSpec,
    Preprocessing,
    ReinitPlan,
    SampleImage,
)
from dashboard.store import inspection, roots
from dashboard.store.memo import Memo
from dashboard.store.workspace import Choice

if TYPE_CHECKING:
    from core.catalogue.checks import Preset
    from core.catalogue.metrics import MetricInfo
    from core.catalogue.rules import RuleInfo
    from core.catalogue.schemes import SchemeInfo
    from core.plan.making import PlanSize

_lists: Memo[Any] = Memo(max_entries=8)
_outlines: Memo[ModelOutline] = Memo(max_entries=8)
_data: Memo[DataOutline] = Memo(max_entries=8)
_images: Memo[tuple[SampleImage, ...]] = Memo(max_entries=8)


def model_entries() -> tuple[ModelEntry, ...]:
    """Return all models: embedded, then timm, then torchvision."""
    return tuple(_lists.get("models", core.list_models))


def dataset_entries() -> tuple[DatasetEntry, ...]:
    """Return the data sets that have a name."""
    return tuple(_lists.get("datasets", core.list_datasets))


def metric_infos() -> tuple[MetricInfo, ...]:
    """Return every metric with its meaning, formula and source."""
    return tuple(_lists.get("metrics", core.list_metrics))


def presets() -> tuple[Preset, ...]:
    """Return every set of checks that can make the findings."""
    return tuple(_lists.get("presets", core.list_presets))


def rule_infos() -> tuple[RuleInfo, ...]:
    """Return every rule that chooses what is reset, except picking by hand."""
    rules = _lists.get("rules", core.list_rules)
    return tuple(rule for rule in rules if rule.name != "by-hand")


def scheme_infos() -> tuple[SchemeInfo, ...]:
    """Return every scheme that can draw new values."""
    return tuple(_lists.get("schemes", core.list_schemes))


def changed_at(path: str | None) -> float | None:
    """Return when the file or folder was last written to; None if there is none."""
    try:
        return Path(path).stat().st_mtime if path else None
    except OSError:
        return None


def model_spec(choice: Choice) -> ModelSpec:
    """Return which network the choice means.

    Raises:
        LimberError: There is no such network, or a page may not name its file.
    """
    if choice.checkpoint is not None:
        roots.permitted_path(choice.checkpoint)
    return core.resolve_model(choice.model, weights=choice.weights, checkpoint=choice.checkpoint)


def data_spec(choice: Choice) -> DataSpec:
    """Return which images the choice means.

    Raises:
        LimberError: There are no such images, or a page may not name their path.
    """
    permitted_data(choice.data)
    return core.resolve_data(choice.data)


def permitted_data(name: str) -> str:
    """Return the name of a data set as the choice should keep it.

    Raises:
        LimberError: It is a path that a page may not name.
    """
    return roots.permitted_data(name, _embedded_sets())


def _embedded_sets() -> frozenset[str]:
    return frozenset(entry.name for entry in dataset_entries() if entry.embedded)


def _mark(path: str | None) -> Hashable:
    """Return a mark that changes with the file; for a folder, with its own entries."""
    try:
        state = Path(path).stat() if path else None
    except (OSError, ValueError):
        return None
    # Unlike the time of its content, the time of the entry itself (ctime) cannot be set back.
    return state and (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _data_key(choice: Choice) -> tuple[Hashable, ...]:
    return (choice.data, _mark(choice.data))


def data_outline(choice: Choice) -> DataOutline:
    """Return classes, counts and fingerprint of the chosen data."""
    spec = data_spec(choice)
    if spec.source == "embedded":
        return _data.get(_data_key(choice), lambda: core.outline_data(spec))
    return _data.get(_data_key(choice), lambda: _outline_from(_inspect_data(choice.data)))


def look_at_data(choice: Choice, preprocessing: Preprocessing, count: int) -> None:
    """Try the images, and decode some of them, before they become the choice.

    Outline and pictures are then in the cache, so the page does not wait for them again.

    Args:
        choice: Names the images.
        preprocessing: Size and resizing of the pictures.
        count: How many pictures to decode.

    Raises:
        LimberError: They cannot be used; the message names the file or image.
    """
    data_key, image_key = _data_key(choice), _image_key(choice, preprocessing, count)
    if data_spec(choice).source == "embedded":
        data_outline(choice)
        return
    if _data.peek(data_key) is not None and _images.peek(image_key) is not None:
        return
    answer = _inspect_data(choice.data, preprocessing, count)
    # A person asked again, so an earlier refusal no longer counts.
    _data.forget_refusal(data_key)
    _images.forget_refusal(image_key)
    _data.get(data_key, lambda: _outline_from(answer))
    _images.get(image_key, lambda: _pictures_from(answer))


def _inspect_data(
    name: str, preprocessing: Preprocessing | None = None, count: int = 0
) -> Mapping[str, Any]:
    arguments = [f"--data={name}"]
    if preprocessing is not None:
        arguments += [f"--images={count}", f"--image-size={preprocessing.image_size}"]
        arguments += [f"--interpolation={preprocessing.interpolation}"]
    return inspection.inspect(arguments, files=[Path(name)])


def _outline_from(answer: Mapping[str, Any]) -> DataOutline:
    return DataOutline.model_validate_json(json.dumps(answer["data"]))


def _pictures_from(answer: Mapping[str, Any]) -> tuple[SampleImage, ...]:
    return tuple(map(inspection.sample_image, answer["images"]))


def _model_key(choice: Choice, classes: int) -> Hashable:
    return (choice.model_key, _mark(choice.checkpoint), classes)


def model_outline(choice: Choice, *, again: bool = False) -> ModelOutline:
    """Return the layers of the chosen network with a head for the chosen data.

    Args:
        choice: Network and data.
        again: Try even if the same choice was refused a moment ago.
    """
    classes = len(data_outline(choice).classes)
    spec = model_spec(choice)
    key = _model_key(choice, classes)
    if again:
        _outlines.forget_refusal(key)
    if choice.checkpoint is None:
        return _outlines.get(key, lambda: core.outline_model(spec, classes=classes))
    return _outlines.get(key, partial(_inspect_model, choice.model, choice.checkpoint, classes))


def _inspect_model(model: str, checkpoint: str, classes: int) -> ModelOutline:
    arguments = [f"--model={model}", f"--checkpoint={checkpoint}", f"--classes={classes}"]
    answer = inspection.inspect(arguments, files=[Path(checkpoint)])
    return ModelOutline.model_validate_json(json.dumps(answer["model"]))


def outline_if_ready(choice: Choice) -> tuple[ModelOutline | None, DataOutline | None]:
    """Return what is already known, without loading anything."""
    data = _data.peek(_data_key(choice))
    if data is None:
        return None, None
    return _outlines.peek(_model_key(choice, len(data.classes))), data


def model_title(choice: Choice) -> str:
    """Return the network's name for people, without loading it."""
    outline, _ = outline_if_ready(choice)
    return outline.title if outline else choice.model


def _image_key(choice: Choice, preprocessing: Preprocessing, count: int) -> Hashable:
    return (*_data_key(choice), preprocessing.image_size, preprocessing.interpolation, count)


def images(choice: Choice, preprocessing: Preprocessing, count: int) -> tuple[SampleImage, ...]:
    """Return sample images before and after preprocessing."""
    key = _image_key(choice, preprocessing, count)
    spec = data_spec(choice)
    if spec.source == "embedded":
        return _images.get(key, lambda: core.sample_images(spec, preprocessing, count=count))
    return _images.get(
        key, lambda: _pictures_from(_inspect_data(choice.data, preprocessing, count))
    )


def read_plan(text: bytes, companion: bytes | None) -> ReinitPlan:
    """Return an uploaded plan, after a worker has read the same bytes within its limits.

    Raises:
        LimberError: It is not a plan; the message names the key or the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "plan.json"]
        files[0].write_bytes(text)
        arguments = [f"--plan={files[0]}"]
        if companion is not None:
            files.append(Path(folder) / "companion.safetensors")
            files[1].write_bytes(companion)
            arguments.append(f"--companion={files[1]}")
        inspection.inspect(arguments, files=files)
    return core.read_plan(text, companion=companion)


def size_of(outline: ModelOutline, layers: Sequence[str]) -> PlanSize:
    """Return what resetting these layers would touch."""
    return core.plan_size(outline, tuple(layers))
