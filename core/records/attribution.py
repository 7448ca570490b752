"""What an attribution of one layer found, for a network and what became of it."""

from __future__ import annotations

from typing import Literal

from core.records.base import Value
from core.records.specs import DataSpec, ModelSpec

Target = Literal["features", "class"]


class StateAttribution(Value):
    """One state of the network: as it came, after the plan, after a trial.

    Attributes:
        name: "pretrained", "planned", or the name of a file of trained weights.
        outputs: The target of each image.
        baseline_outputs: The target where the path begins; None for a method without one.
        sums: Sum of the attributions of each image.
        gap: Largest |sum - change of the target| over the largest change; None for a method that
            promises nothing of the sum.
        infidelity: Captum's, scaled; None where it cannot be taken.
        seconds: Wall time.
    """

    name: str
    outputs: tuple[float, ...]
    baseline_outputs: tuple[float, ...] | None
    sums: tuple[float, ...]
    gap: float | None
    infidelity: float | None
    seconds: float


class Attribution(Value):
    """A view of one layer, for each state on the same images, target and baseline.

    Attributes:
        layer: Which; "all" for one bar a layer.
        method: Key of the method's entry.
        target: What is explained, by its key.
        target_words: The same in words.
        labels: Class number of each image.
        units: How many bars an ablation has.
        group: How many units share one bar of an ablation.
        names: Layers of the bars, where there is one a layer.
        grid: Sides of the maps; None where the layer has no places.
        steps: Points on the path, for methods that integrate.
        why_no_infidelity: The reason, where `infidelity` is None.
    """

    schema_version: Literal[1] = 1
    model: ModelSpec
    model_title: str
    data: DataSpec
    data_title: str
    data_fingerprint: str
    backbone_sha256: str
    plan_sha256: str | None
    layer: str
    method: str
    baseline: str
    target: Target
    target_words: str
    labels: tuple[int, ...]
    image_size: int
    seed: int
    device: str
    steps: int
    units: int | None
    group: int
    names: tuple[str, ...]
    grid: tuple[int, int] | None
    states: tuple[StateAttribution, ...]
    why_no_infidelity: str
    versions: dict[str, str]
    arrays_file: str | None = None
    arrays_sha256: str | None = None
