"""What the command line says can be done about an error: its own options and commands."""

from __future__ import annotations

from collections.abc import Mapping

from core.errors import LimberError, Remedy

WAYS: Mapping[Remedy, str] = {
    Remedy.GIVE_IMAGES: "Give --data or --diagnosis.",
    Remedy.PLAN_WITH_IMAGES: (
        "Make the plan with --data or --diagnosis, which stores its factors."
    ),
    Remedy.CONNECT: (
        "Connect once, give the file with --checkpoint, use --weights none, or take an embedded "
        "model."
    ),
    Remedy.OTHER_WEIGHTS: (
        "Use --weights none, a tag that has weights, or give the file with --checkpoint."
    ),
    Remedy.OTHER_PLACE: "Choose another place with --out.",
    Remedy.START_AGAIN: "Then start again, or choose another place with --out.",
    Remedy.OTHER_DEVICE: "Use --device auto or cpu.",
    Remedy.MORE_MEMORY: "If it is sound, give more with --memory-mb.",
    Remedy.MORE_TIME: "If it is sound, give more with --seconds.",
    Remedy.LIST_MODELS: "See python -m core list models.",
    Remedy.LIST_DATA_SETS: "See python -m core list datasets.",
    Remedy.LIST_METRICS: "See python -m core list metrics.",
    Remedy.LIST_RULES: "See python -m core list rules.",
    Remedy.LIST_SCHEMES: "See python -m core list schemes.",
    Remedy.OTHER_METHOD: "Give another --method.",
    Remedy.OTHER_LAYER: "Give another --layer.",
    Remedy.LOOK_INSIDE: "Measure again with --inside.",
    Remedy.LIST_LAYERS: "See the names with python -m core plan --layers '*'.",
    Remedy.LAYERS_OR_UNITS: ("Give --layers or --units; make two plans and compose them for both."),
    Remedy.GIVE_OPTION: "Give --{option}.",
    Remedy.OTHER_OPTION: "Give another --{option}.",
    Remedy.NO_OPTION: "Leave --{option} out.",
    Remedy.FOLDER_OF_SET: "Write torchvision:{kind}:FOLDER.",
}


def sentence(error: LimberError) -> str:
    """Return what happened and what to type next."""
    if error.remedy is None:
        return error.fact
    return f"{error.fact} {WAYS[error.remedy].format(**error.values)}"
