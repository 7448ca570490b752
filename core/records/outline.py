"""What a model and a data set look like, before anything is measured."""

from __future__ import annotations

import math
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


class Note(Value):
    """One thing that loading did.

    Attributes:
        about: The new or kept head; all weights; or how the file with the weights was read.
        sentence: In plain words.
    """

    about: Literal["head", "weights", "file"]
    sentence: str


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
        notes: What loading did: head replaced, prefixes stripped, ...
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
    notes: tuple[Note, ...] = ()


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


IntensitySource = Literal["documented", "bits", "widened", "convention", "measured"]

# NumPy's names of types in words.
STORED_AS = {
    "int8": "signed 8-bit",
    "uint16": "16-bit",
    "int16": "signed 16-bit",
    "uint32": "32-bit",
    "int32": "signed 32-bit",
    "uint64": "64-bit",
    "int64": "signed 64-bit",
    "float16": "16-bit floating-point",
    "float32": "floating-point",
    "float64": "64-bit floating-point",
}


class IntensityRange(Value):
    """Which stored numbers are black and white in images of more than eight bits.

    One range holds for all images of a set that are stored alike, training and validation.

    Attributes:
        kind: NumPy's name of the stored type, such as "uint16".
        images: How many images of the set are stored so.
        low: The number that becomes black (0 of 255).
        high: The number that becomes white (255 of 255).
        source: What the range rests on: the files' own word, the number of bits in use, 8-bit
            values widened to the type, a convention of floating point, or the measured ends.
        lowest: The lowest pixel of the training images that were looked at.
        highest: The highest.
        measured_images: How many these were.
        histogram: How many of their pixels, sampled evenly, lie in each of equal steps from
            the lower of `low` and `lowest` to the higher of `high` and `highest`.
    """

    kind: str
    images: int
    low: float
    high: float
    source: IntensitySource
    lowest: float
    highest: float
    measured_images: int
    histogram: tuple[int, ...] = ()

    @property
    def sentence(self) -> str:
        """What happens to these images, for a person."""
        one = self.images == 1
        seen = f"{self.measured_images:,} training image{'' if self.measured_images == 1 else 's'}"
        reason = {
            "documented": "as the files say",
            "bits": f"{math.ceil(math.log2(self.high + 1))} bits; the brightest pixel of {seen} "
            f"is {stored_number(self.highest)}",
            "widened": f"8-bit values widened, in {seen}",
            "convention": "the convention for floating point; the brightest pixel of "
            f"{seen} is {stored_number(self.highest)}",
            "measured": f"the lowest and highest pixel of {seen}",
        }[self.source]
        return (
            f"{self.images:,} {STORED_AS.get(self.kind, self.kind)} image{'' if one else 's'}: "
            f"intensities {stored_number(self.low)} to {stored_number(self.high)} ({reason}) are "
            "shown and measured as black to white, in 256 steps; what lies outside is cut off."
        )


def stored_number(value: float) -> str:
    """Return a stored intensity as text: whole numbers whole, others in four digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


class DataOutline(Value):
    """A data set's classes, counts and identity.

    `counts` maps split ("train", "val") to images a class, in the order of `classes`.
    `fingerprint` is a SHA-256 over what `fingerprint_covers` says. `caveats` are what a result
    on this set must not hide; `notes` say how it was read. `intensities` has a range for each
    kind of image of more than eight bits, and is empty where there is none.
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
    caveats: tuple[str, ...] = ()
    intensities: tuple[IntensityRange, ...] = ()

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
