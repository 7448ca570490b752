"""What a model and a data set look like, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.records.base import Value
from core.records.specs import DataSpec, ModelSpec

LayerKind = Literal["conv", "linear", "norm", "other"]


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias by its `state_dict` name, fused ones included."""
    return name.rpartition(".")[2].endswith("bias")


class ParameterInfo(Value):
    """One parameter: its `state_dict` name, shape and number of entries."""

    name: str
    shape: tuple[int, ...]
    count: int


class LayerInfo(Value):
    """One layer: a module that owns parameters, or a parameter owned by the root itself.

    Attributes:
        name: `named_modules()` path; for a parameter of the root its `state_dict` name.
        index: Place in forward order, from 0.
        type: Class name of the module, or "Parameter".
        kind: Coarse family, used by filters.
        stage: Group the layer is shown under, e.g. "blocks.3".
        parameters: Parameters it owns.
        buffers: `state_dict` names of its buffers.
        coupled_buffers: Running statistics of the norm that reads this layer's output
            directly. They describe the old weights, so a reset of the layer resets them too.
        activation: Name of the activation site that this layer feeds, or None.
        unit_axis: The axis of that activation that counts the layer's units.
        attention: Name of the attention site whose queries this layer makes, or None.
        tied: Groups of `state_dict` names that share memory with a parameter here.
        head: The layer's shape depends on the number of classes.
        executed: False when no forward pass reached it.
    """

    name: str
    index: int
    type: str
    kind: LayerKind
    stage: str
    parameters: tuple[ParameterInfo, ...]
    buffers: tuple[str, ...] = ()
    coupled_buffers: tuple[str, ...] = ()
    activation: str | None = None
    unit_axis: int = 1
    attention: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    head: bool = False
    executed: bool = True

    @property
    def count(self) -> int:
        """Number of parameter entries the layer owns."""
        return sum(parameter.count for parameter in self.parameters)


class Preprocessing(Value):
    """How an image becomes network input.

    The shorter side is resized to `image_size`, the centre is cropped to a square, values are
    scaled to [0, 1] and then (x - mean) / std, channel by channel.
    """

    image_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ModelCard(Value):
    """What is known of a loaded model beside its layers.

    Attributes:
        spec: What was asked for.
        title: Name for people.
        classes: Size of the head; 0 when there is none.
        own_head: True when the head came with the weights instead of being replaced.
        head_seed: Seed of a new head, and of random weights.
        pretrained_classes: Size of the head the weights came with; 0 without one, None unknown.
        backbone_sha256: Digest of the loaded state without the head.
        preprocessing: What the weights expect.
        native_size: Side of the images the weights were trained on, in pixels.
        default_size: Side that keeps a short run on a CPU short.
        size_multiple: The side must be a multiple of this.
        default_lr: Learning rate at which the untouched network learns in a short fine-tune.
        licence: Of the weights, where known.
        notes: Plain sentences about what loading did (head replaced, prefixes stripped, ...).
    """

    spec: ModelSpec
    title: str
    classes: int
    own_head: bool = False
    head_seed: int = 0
    pretrained_classes: int | None
    backbone_sha256: str
    preprocessing: Preprocessing
    native_size: int
    default_size: int
    size_multiple: int = 1
    default_lr: float
    licence: str | None = None
    notes: tuple[str, ...] = ()


class ModelOutline(ModelCard):
    """A model's card and its layers.

    Attributes:
        layers: Every layer, in forward order; those never run come last.
        parameters: Entries in all parameters, shared ones counted once.
    """

    layers: tuple[LayerInfo, ...]
    parameters: int

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the layers whose shape depends on the number of classes."""
        return tuple(layer.name for layer in self.layers if layer.head)

    def layer(self, name: str) -> LayerInfo | None:
        """Return the layer of that name, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)


class DataOutline(Value):
    """A data set's classes, counts and identity.

    `counts` maps split ("train", "val") to images a class, in the order of `classes`.
    `fingerprint` is a SHA-256 over what `fingerprint_covers` says.
    """

    spec: DataSpec
    title: str
    description: str
    classes: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    fingerprint: str
    fingerprint_covers: str
    licence: str | None = None
    citation: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Number of images over all splits."""
        return sum(sum(counts) for counts in self.counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleImage:
    """One image for a person to look at, as PNG bytes before and after preprocessing."""

    label: str
    split: str
    name: str
    original_png: bytes
    input_png: bytes
    original_size: tuple[int, int]
