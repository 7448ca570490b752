"""The plan: what to reset, with what, on which network. The authority is the resolved list."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from core.records.base import Value
from core.records.specs import ModelSource

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _no_truth(value: object) -> object:
    # True == 1, so that a literal alone would take it.
    if isinstance(value, bool):
        raise ValueError("Input should be 1")
    return value


Version = Annotated[Literal[1], BeforeValidator(_no_truth)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class ModelIdentity(Value):
    """The network the plan was made for."""

    source: ModelSource = Field(description="Library whose constructor makes the network.")
    name: Name = Field(description="Name in that library.")
    weights: Literal["pretrained", "none", "checkpoint"] = Field(
        default="pretrained", description="Where the starting weights come from."
    )
    checkpoint: str | None = Field(
        default=None, description="Path of the checkpoint, when weights is 'checkpoint'."
    )
    classes: int = Field(
        ge=0, le=1_000_000, description="Number of outputs of the head; 0 for no head."
    )
    head: Literal["new", "own"] = Field(
        default="new", description="A new head for the downstream classes, or the weights' own."
    )
    kwargs: dict[str, bool | int | FiniteFloat | str] = Field(
        default_factory=dict, description="Extra constructor arguments."
    )
    head_seed: Seed = Field(
        default=0, description="Seed of a replaced head, and of random weights."
    )
    backbone_sha256: Sha256 = Field(
        description="SHA-256 of the starting state without the layers sized by the class count."
    )


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
    parameters: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="The scheme's own numbers, by name."
    )


class Target(Value):
    """One layer to reset."""

    layer: Name = Field(description="The layer's name.")
    granularity: Literal["layer"] = Field(
        default="layer", description="What is reset: the whole layer."
    )
    parameters: tuple[Name, ...] = Field(
        description="Resolved state_dict names of the parameters to rewrite."
    )
    buffers: tuple[Name, ...] = Field(
        default=(), description="Resolved state_dict names of the buffers to rewrite."
    )
    scheme: SchemeChoice = Field(description="How the new values are drawn.")
    seed: Seed = Field(default=0, description="Seed of the draw.")


class Evidence(Value):
    """What the choice was based on; empty where it was a guess."""

    diagnosis_sha256: Sha256 | None = Field(
        default=None, description="SHA-256 of the diagnosis file that was looked at."
    )
    data_fingerprint: Sha256 | None = Field(
        default=None, description="Fingerprint of the data that was measured."
    )
    note: Annotated[str, Field(max_length=10_000)] = Field(default="", description="Free words.")


class ReinitPlan(Value):
    """A re-initialisation plan."""

    schema_version: Version = Field(default=1, description="Version of this format.")
    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        default="plan", description="Name of the arm this plan makes."
    )
    model: ModelIdentity = Field(description="The network the plan was made for.")
    patterns: tuple[Pattern, ...] = Field(
        default=(), description="How the layers were picked: provenance only."
    )
    targets: tuple[Target, ...] = Field(description="What is reset: the authority.")
    freeze: tuple[Name, ...] = Field(
        default=(), description="Layers whose parameters do not train."
    )
    evidence: Evidence = Field(default_factory=Evidence, description="Why it was chosen.")
