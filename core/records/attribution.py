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
        gaps: The same for each image, over its own change; None where that is 0.
        infidelity: Captum's, scaled; None where it cannot be taken.
        sigma: Standard deviation of the noise that infidelity adds to the layer's output.
        seconds: Wall time.
        forward_passes: How often the network ran.
        images_run: Over how many images in all.
    """

    name: str
    outputs: tuple[float, ...]
    baseline_outputs: tuple[float, ...] | None
    sums: tuple[float, ...]
    gap: float | None
    gaps: tuple[float | None, ...] | None = None
    infidelity: float | None
    sigma: float | None = None
    seconds: float
    forward_passes: int = 0
    images_run: int = 0


class Attribution(Value):
    """A view of one layer, for each state on the same images, target and baseline.

    Attributes:
        layer: Which; "all" for one bar a layer, "blocks" for one a block.
        method: Key of the method's entry.
        target: What is explained, by its key.
        target_words: The same in words.
        labels: Class number of each image.
        classes: Name of each image's class.
        images: Name of each image.
        units: How many bars an ablation has.
        group: How many units share one bar of an ablation; 0 where a bar is a whole layer or block.
        names: Layers or blocks of the bars, where there is one for each.
        replaced: What stood in for each block, where bars are blocks.
        left_out: Layer or block without a bar to the reason.
        reset: Share of the weights behind each bar that the plan resets; None without a plan.
        grid: Sides of the maps; None where the layer has no places.
        prefix_tokens: How many tokens stand before the grid's, and are not in the maps.
        steps: Points on the path, for methods that integrate.
        why_no_gap: The reason, where `gap` is None.
        perturbation: How infidelity changes the layer's output.
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
    classes: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    image_size: int
    seed: int
    device: str
    steps: int
    units: int | None
    group: int
    names: tuple[str, ...]
    replaced: tuple[Literal["zero", "input"], ...] = ()
    left_out: dict[str, str] = {}
    reset: tuple[float, ...] | None = None
    grid: tuple[int, int] | None
    prefix_tokens: int = 0
    states: tuple[StateAttribution, ...]
    why_no_gap: str = ""
    perturbation: str = ""
    why_no_infidelity: str
    versions: dict[str, str]
    arrays_file: str | None = None
    arrays_sha256: str | None = None
