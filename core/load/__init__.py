"""Specification -> fresh model and sample images."""

from core.load.checkpoints import read_checkpoint, state_sha256
from core.load.images import (
    ImageSet,
    choose_items,
    class_counts,
    decode,
    decode_items,
    list_datasets,
    open_images,
    outline_data,
    resolve_data,
    sample_images,
)
from core.load.models import (
    LoadedModel,
    build_module,
    head_names,
    list_models,
    load_model,
    resolve_model,
)
from core.load.sources import Item

__all__ = [
    "ImageSet",
    "Item",
    "LoadedModel",
    "build_module",
    "choose_items",
    "class_counts",
    "decode",
    "decode_items",
    "head_names",
    "list_datasets",
    "list_models",
    "load_model",
    "open_images",
    "outline_data",
    "read_checkpoint",
    "resolve_data",
    "resolve_model",
    "sample_images",
    "state_sha256",
]
