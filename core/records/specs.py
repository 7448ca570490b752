"""What a person asked for, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from core.records.base import Value

ModelSource = Literal["embedded", "timm", "torchvision"]
DataSource = Literal["embedded", "folder", "zip", "npz", "torchvision"]
Weights = Literal["pretrained", "none", "checkpoint"]


# What timm and torchvision call their models, and tags of weights behind a dot. A colon or a slash
# would make timm look on the hub, or in a folder, and run what it finds there.
_MODEL_NAME = re.compile(r"[A-Za-z0-9_]{1,120}(\.[A-Za-z0-9_.-]{1,120})?")
# Constructor arguments a specification may carry. The libraries take far more, and some of them
# name files, addresses and code.
KWARGS: Mapping[str, type] = {"dynamic_img_size": bool, "drop_rate": float, "drop_path_rate": float}


def odd_name(name: str) -> str | None:
    """Return why a name is none of a library's models, or None when it may be one."""
    if _MODEL_NAME.fullmatch(name):
        return None
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        kind = name.partition(":")[0]
        return f'"{kind}:" names are not opened; take a name the library itself lists'
    return "a model is named as its library lists it: letters, digits, dots, dashes and _"


def odd_kwarg(kwargs: Mapping[str, object]) -> str | None:
    """Return why constructor arguments are refused, or None when all are known and harmless."""
    for key, value in kwargs.items():
        if type(value) is not KWARGS.get(key):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in KWARGS.items())
            return f'the argument "{key[:80]}" is not taken; known are: {known}'
        if isinstance(value, float) and not 0 <= value < 1:
            return f'the argument "{key}" is {value:g}; give a share from 0 to below 1'
    return None


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
