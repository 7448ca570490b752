"""Whether weights are what a plan makes, and how two files of weights differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from core.edit.apply import other_bits
from core.errors import PlanError
from core.files.inputs import in_words
from core.load import state_sha256
from core.load.checkpoints import SPARE_BYTES, read_checkpoint, state_bytes
from core.pipeline.applying import edited_weights
from core.records import (
    ReinitPlan,
    Verification,
    WeightDifference,
)

# A file of so many times a plan's weights is not read through to say that they differ.
MOST_FOUND = 4


def verify_weights(plan: ReinitPlan, path: Path) -> Verification:
    """Return whether a file of weights is, bit for bit, what a plan makes.

    Raises:
        LimberError: The plan does not fit, or the file cannot be read.
    """
    expected, receipt = edited_weights(plan)
    tensors = read_checkpoint(path)
    held, made = state_bytes(tensors), state_bytes(expected)
    if held > MOST_FOUND * made + SPARE_BYTES:
        raise PlanError(
            f'"{path.name}" holds {in_words(held)} of weights, and the plan makes '
            f"{in_words(made)}: it is not what the plan makes. Give the file that apply wrote."
        )
    differing: dict[str, int] = {}
    for name in sorted(expected.keys() & tensors.keys()):
        own, other = expected[name], tensors[name]
        if own.shape != other.shape or own.dtype != other.dtype:
            differing[name] = own.numel()
        else:
            odd = int(other_bits(own, other).sum())
            if odd:
                differing[name] = odd
    missing = tuple(sorted(expected.keys() - tensors.keys()))
    unexpected = tuple(sorted(tensors.keys() - expected.keys()))
    digest = state_sha256(tensors)
    return Verification(
        matches=digest == receipt.after_sha256,
        tensors=len(expected),
        differing=differing,
        missing=missing,
        unexpected=unexpected,
        expected_sha256=receipt.after_sha256,
        found_sha256=digest,
    )


def changed_entries(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensor to flags of the entries that differ: a plan turned back into what it changed.

    Args:
        before: A state.
        after: The same state with a plan applied.

    Returns:
        Only tensors in which something differs; bool, in the tensor's shape.
    """
    changed = {name: other_bits(before[name], after[name]) for name in before}
    return {name: flags for name, flags in changed.items() if bool(flags.any())}


def diff_weights(first: Path, second: Path) -> tuple[WeightDifference, ...]:
    """Return in which tensors two files of weights differ, and by how much.

    Raises:
        ModelError: A file cannot be read.
    """
    own, other = read_checkpoint(first), read_checkpoint(second)
    rows = []
    for name in sorted(own.keys() | other.keys()):
        left, right = own.get(name), other.get(name)
        if left is None or right is None or left.shape != right.shape or left.dtype != right.dtype:
            count = max(tensor.numel() for tensor in (left, right) if tensor is not None)
            rows.append(
                WeightDifference(name=name, entries=count, changed=count, relative_change=None)
            )
            continue
        changed = int(other_bits(left, right).sum())
        if changed:
            wide = torch.complex128 if left.is_complex() else torch.float64
            norm = float(left.to(wide).norm())
            moved = float((right.to(wide) - left.to(wide)).norm())
            rows.append(
                WeightDifference(
                    name=name,
                    entries=left.numel(),
                    changed=changed,
                    relative_change=moved / norm if norm > 0 else None,
                )
            )
    return tuple(rows)
