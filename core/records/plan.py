"""The plan: what to reset, with what, on which network. The authority is the resolved list."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    PrivateAttr,
    StrictInt,
    field_validator,
    model_validator,
)

from core.records.base import Value
from core.records.specs import ModelSource, odd_kwarg, odd_name

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _no_truth(value: object) -> object:
    # True == 1, so that a literal alone would take it.
    if isinstance(value, bool):
        raise ValueError("Input should be 1")
    return value


Version = Annotated[Literal[1], BeforeValidator(_no_truth)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=512)]

# The largest networks of the libraries have a few thousand layers.
MAX_LAYERS = 20_000
MAX_TENSORS = 1_000
MAX_NUMBERS = 64
# Of a long list the first fault is enough: a million of them would fill the memory.
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_TENSORS, fail_fast=True)]
Places = Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(fail_fast=True)]


class ModelIdentity(Value):
    """The network the plan was made for."""

    source: ModelSource = Field(description="Library whose constructor makes the network.")
    name: Name = Field(description="Name in that library; no address and no path.")
    weights: Literal["pretrained", "none", "checkpoint"] = Field(
        default="pretrained", description="Where the starting weights come from."
    )
    checkpoint: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")] | None = Field(
        default=None, description="Path of the checkpoint, when weights is 'checkpoint'."
    )
    classes: int = Field(
        ge=0, le=1_000_000, description="Number of outputs of the head; 0 for no head."
    )
    head: Literal["new", "own"] = Field(
        default="new", description="A new head for the downstream classes, or the weights' own."
    )
    kwargs: Annotated[dict[str, bool | int | FiniteFloat | str], Field(max_length=MAX_NUMBERS)] = (
        Field(default_factory=dict, description="Extra constructor arguments.")
    )
    head_seed: Seed = Field(
        default=0, description="Seed of a replaced head, and of random weights."
    )
    backbone_sha256: Sha256 = Field(
        description="SHA-256 of the starting state without the layers sized by the class count."
    )

    @field_validator("name")
    @classmethod
    def _listed(cls, name: str) -> str:
        problem = odd_name(name)
        if problem is not None:
            raise ValueError(problem)
        return name

    @field_validator("kwargs")
    @classmethod
    def _harmless(
        cls, kwargs: dict[str, bool | int | float | str]
    ) -> dict[str, bool | int | float | str]:
        problem = odd_kwarg(kwargs)
        if problem is not None:
            raise ValueError(problem)
        return kwargs


class Pattern(Value):
    """What a person typed or clicked: provenance, never the authority."""

    text: Annotated[str, Field(max_length=1024)] = Field(description="The pattern as entered.")
    syntax: Literal["name", "glob", "regex", "type"] = Field(
        description="How the text is read: a layer's exact name, a glob or regular expression "
        "over layer names, or a glob over layer types."
    )


class SchemeChoice(Value):
    """How new values are drawn."""

    name: Name = Field(description="A name that `python -m core list schemes` prints.")
    parameters: Annotated[dict[Name, FiniteFloat], Field(max_length=MAX_NUMBERS)] = Field(
        default_factory=dict, description="The scheme's own numbers, by name."
    )


Write = Literal["scheme", "fresh", "zero", "one", "scale", "add"]


class Entries(Value):
    """Some entries of one tensor and what is written into them.

    Exactly one of `indices` and `mask` says which; neither means all of them. The writes of a
    plan come in this order, each on what the tensor held before the plan: scheme and scale,
    then fresh and one, then zero, then add.
    """

    tensor: Name = Field(description="state_dict name of the tensor.")
    write: Write = Field(
        default="scheme",
        description="'scheme': what the target's scheme draws; 'fresh': the fresh twin's values; "
        "'zero' or 'one'; 'scale': multiplied by the values; 'add': the values are added.",
    )
    axis: Annotated[int, Field(ge=0, le=7)] | None = Field(
        default=None,
        description="Axis that is counted along, each index standing for a whole slice; null "
        "counts single entries in row-major order.",
    )
    indices: Places | None = Field(
        default=None, description="Which slices or entries, ascending, where they are few."
    )
    mask: Name | None = Field(
        default=None,
        description="Name in the companion of the bit mask over slices or entries, eight to a "
        "byte, the lowest bit first.",
    )
    values: Name | None = Field(
        default=None,
        description="Name in the companion of the numbers for 'scale' and 'add'. Their shape is "
        "the leading part of the tensor's.",
    )
    count: Annotated[int, Field(ge=1)] = Field(
        description="Number of slices or entries that are written."
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.indices is not None:
            if self.mask is not None:
                raise ValueError("give indices or a mask, not both")
            if any(left >= right for left, right in pairwise(self.indices)):
                raise ValueError("indices must ascend, each once")
            if len(self.indices) != self.count:
                raise ValueError(
                    f"count is {self.count}, and there are {len(self.indices)} indices"
                )
        if (self.values is not None) != (self.write in ("scale", "add")):
            raise ValueError("values only belong to the writes 'scale' and 'add'")
        return self


class Target(Value):
    """One layer to reset."""

    layer: Name = Field(description="The layer's name.")
    granularity: Literal["layer", "unit", "weight"] = Field(
        default="layer",
        description="What is reset: the whole layer, some of its units with all that belongs to "
        "them, or single weights.",
    )
    parameters: Names = Field(description="Resolved state_dict names of the parameters to rewrite.")
    buffers: Names = Field(
        default=(), description="Resolved state_dict names of the buffers to rewrite."
    )
    units: Places = Field(
        default=(), description="Units that are reset, for people; the entries are the authority."
    )
    entries: Annotated[tuple[Entries, ...], Field(max_length=MAX_TENSORS)] = Field(
        default=(),
        description="Which entries are written. A tensor that is named above and not here is "
        "rewritten whole.",
    )
    scheme: SchemeChoice = Field(description="How the new values are drawn.")
    seed: Seed = Field(default=0, description="Seed of the draw.")

    @model_validator(mode="after")
    def _named(self) -> Self:
        known = {*self.parameters, *self.buffers}
        for entry in self.entries:
            if entry.tensor not in known:
                raise ValueError(
                    f'entries name "{entry.tensor}", which is not among the parameters and buffers'
                )
        if self.granularity != "layer" and known - {entry.tensor for entry in self.entries}:
            raise ValueError("of units and weights, each tensor needs its entries")
        return self


class RuleChoice(Value):
    """The rule that made the selection: provenance, never the authority."""

    name: Name = Field(description="A name that `python -m core list rules` prints.")
    parameters: Annotated[
        dict[Name, FiniteFloat | Annotated[str, Field(max_length=512)]],
        Field(max_length=MAX_NUMBERS),
    ] = Field(default_factory=dict, description="The rule's own numbers and words, by name.")


class Companion(Value):
    """The safetensors file beside the plan that holds its bit masks and numbers."""

    file: Annotated[str, Field(pattern=r"^[^/\\\x00]{1,255}$")] = Field(
        description="Its name, in the plan's own folder."
    )
    sha256: Sha256 = Field(description="SHA-256 of the whole file.")


class LayerRate(Value):
    """A layer that trains at another learning rate."""

    layer: Name = Field(description="The layer's name.")
    factor: Annotated[FiniteFloat, Field(ge=0, le=1e6)] = Field(
        description="Its learning rate, as a multiple of the others'."
    )


class Evidence(Value):
    """What the choice was based on; empty where it was a guess."""

    diagnosis_sha256: Sha256 | None = Field(
        default=None, description="SHA-256 of the diagnosis file that was looked at."
    )
    data_fingerprint: Sha256 | None = Field(
        default=None, description="Fingerprint of the data that was measured."
    )
    note: Annotated[str, Field(max_length=10_000)] = Field(default="", description="Free words.")


def _layer_of(parameter: str) -> str:
    # A parameter of the root is a layer of its own.
    return parameter.rpartition(".")[0] or parameter


class ReinitPlan(Value):
    """A re-initialisation plan."""

    schema_version: Version = Field(default=1, description="Version of this format.")
    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        default="plan", description="Name of the arm this plan makes."
    )
    model: ModelIdentity = Field(description="The network the plan was made for.")
    patterns: Annotated[tuple[Pattern, ...], Field(max_length=MAX_LAYERS)] = Field(
        default=(), description="How the layers were picked: provenance only."
    )
    targets: Annotated[tuple[Target, ...], Field(max_length=MAX_LAYERS)] = Field(
        description="What is reset: the authority."
    )
    freeze: Annotated[tuple[Name, ...], Field(max_length=MAX_LAYERS, fail_fast=True)] = Field(
        default=(), description="Layers whose parameters do not train."
    )
    learning_rates: Annotated[tuple[LayerRate, ...], Field(max_length=MAX_LAYERS)] = Field(
        default=(), description="Layers that train at another rate than the rest."
    )
    rule: RuleChoice | None = Field(
        default=None, description="The rule that chose; null when a person did."
    )
    companion: Companion | None = Field(
        default=None, description="Where masks and numbers lie; null when there are none."
    )
    evidence: Evidence = Field(default_factory=Evidence, description="Why it was chosen.")

    @model_validator(mode="after")
    def _once(self) -> Self:
        for key, layers in (
            ("freeze", self.freeze),
            ("learning_rates", [rate.layer for rate in self.learning_rates]),
        ):
            twice = next((layer for layer, count in Counter(layers).items() if count > 1), None)
            if twice is not None:
                raise ValueError(f'{key} names "{twice}" twice')
        return self

    @property
    def untrained(self) -> tuple[str, ...]:
        """Layers of which the plan writes parameters and that do not train.

        They are frozen, or train at 0 times the learning rate, so that they keep what is written
        into them, random or 0, for as long as one trains. A plan is not made so; one that is read
        may be, because random features can be what somebody wants.
        """
        still = {*self.freeze, *(rate.layer for rate in self.learning_rates if rate.factor == 0)}
        if not still:
            return ()
        written: dict[str, None] = {}
        for target in self.targets:
            if target.parameters:
                written |= dict.fromkeys((target.layer, *map(_layer_of, target.parameters)))
        return tuple(layer for layer in written if layer in still)

    # Bytes of the companion, once read. They are not part of the JSON.
    _companion: bytes | None = PrivateAttr(default=None)

    @property
    def companion_bytes(self) -> bytes | None:
        """The companion file's content, or None when the plan came without it."""
        return self._companion

    def with_companion(self, data: bytes) -> ReinitPlan:
        """Return the plan with its companion's content attached."""
        plan = self.model_copy()
        plan._companion = data
        return plan
