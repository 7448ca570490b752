"""What a person asked for, before anything is loaded."""

from __future__ import annotations

from typing import Literal

from core.records.base import Value

ModelSource = Literal["embedded", "timm", "torchvision"]
DataSource = Literal["embedded", "folder", "zip", "npz", "torchvision"]
Weights = Literal["pretrained", "none", "checkpoint"]


class ModelSpec(Value):
    """Which network, with which weights.

    Attributes:
        source: Library whose constructor makes it; "embedded" is timm with weights of ours.
        name: The name in that library (for embedded ones, ours).
        weights: "pretrained", "none" (random), or "checkpoint" with `checkpoint` set.
        checkpoint: Path of a safetensors file or a state dict.
        kwargs: Extra constructor arguments, e.g. {"dynamic_img_size": True}.
    """

    source: ModelSource
    name: str
    weights: Weights = "pretrained"
    checkpoint: str | None = None
    kwargs: dict[str, bool | int | float | str] = {}


class DataSpec(Value):
    """Which images.

    Attributes:
        source: Where they are read from.
        name: Embedded name, torchvision class name, or the path of a folder, zip or npz.
        root: Folder that holds a torchvision data set; None otherwise.
    """

    source: DataSource
    name: str
    root: str | None = None


class ModelEntry(Value):
    """A row of the list of models; `parameters` is None where nobody has counted them."""

    name: str
    source: ModelSource
    embedded: bool
    parameters: int | None
    title: str
    kind: str | None = None
    licence: str | None = None


class DatasetEntry(Value):
    """A row of the list of data sets; counts are None until the set is on disk."""

    name: str
    embedded: bool
    images: int | None
    classes: int | None
    title: str
    description: str
    licence: str | None = None
