"""A plan's files: its JSON, and the companion with bit masks and numbers that names its plan.

The plan holds the SHA-256 of the companion file. The companion cannot hold that of the plan's
file in turn, so it holds the plan's identity: the SHA-256 of its JSON with `companion` null.
Either way a file from elsewhere is found out, and what the files are called does not matter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from core.errors import PlanError
from core.files.inputs import strict_json
from core.records import Entries, ReinitPlan

PLAN_KEY = "limber_plan_sha256"
# A bit for each of four thousand million weights.
MAX_BYTES = 512 * 2**20
MAX_HEADER_VALUES = 500_000


def plan_json(plan: ReinitPlan) -> str:
    """Return the plan as text: the same plan gives the same bytes."""
    return json.dumps(plan.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def plan_identity(plan: ReinitPlan) -> str:
    """Return the SHA-256 of a plan's JSON as it would be without a companion."""
    bare = plan.model_copy(update={"companion": None})
    return hashlib.sha256(plan_json(bare).encode()).hexdigest()


def sealed(plan: ReinitPlan, arrays: Mapping[str, np.ndarray]) -> ReinitPlan:
    """Return the plan with its companion written, attached and named by digest.

    Args:
        plan: Names a companion file, with any digest.
        arrays: By the names the entries use: bit masks uint8 (ceil(n / 8),), and numbers float32
            in the leading shape of their tensor.
    """
    assert plan.companion is not None
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    data = sorted_metadata(
        safetensors.numpy.save(ordered, metadata={PLAN_KEY: plan_identity(plan)})
    )
    digest = hashlib.sha256(data).hexdigest()
    named = plan.companion.model_copy(update={"sha256": digest})
    return plan.model_copy(update={"companion": named}).with_companion(data)


def attached(plan: ReinitPlan, data: bytes, *, source: str) -> ReinitPlan:
    """Return the plan with a companion that was read from a file.

    Raises:
        PlanError: It is not the file that the plan names, or was made for another plan.
    """
    assert plan.companion is not None
    digest = hashlib.sha256(data).hexdigest()
    if digest != plan.companion.sha256:
        raise PlanError(
            f'"{source}" is not the companion that the plan names: its SHA-256 is {digest[:12]}... '
            f"and not {plan.companion.sha256[:12]}.... Keep both files of a plan together."
        )
    try:
        length = int.from_bytes(data[:8], "little")
        header = strict_json(data[8 : 8 + length], most_values=MAX_HEADER_VALUES)
        identity = header["__metadata__"][PLAN_KEY]
        arrays_in(data)
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise PlanError(
            f'"{source}" cannot be read as the companion of a plan. Make the plan again.'
        ) from error
    if identity != plan_identity(plan):
        raise PlanError(
            f'"{source}" was made for another plan, or the plan was changed by hand since. Make '
            "the plan again."
        )
    return plan.with_companion(data)


def arrays_in(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a companion by name, in the shapes that `sealed` takes."""
    return dict(safetensors.numpy.load(data))


def arrays_of(plan: ReinitPlan) -> dict[str, np.ndarray]:
    """Return a plan's arrays by name; none for a plan without a companion.

    Bit masks are uint8 (ceil(n / 8),), numbers float32 in the leading shape of their tensor.

    Raises:
        PlanError: The plan has a companion and came without it.
    """
    if plan.companion is None:
        return {}
    if plan.companion_bytes is None:
        raise PlanError(
            f'The plan keeps its selection in "{plan.companion.file}", which is not here. Put that '
            "file beside the plan."
        )
    return arrays_in(plan.companion_bytes)


def packed(chosen: np.ndarray) -> np.ndarray:
    """Return flags (n,) as bits (ceil(n / 8),), the lowest first."""
    bits: np.ndarray = np.packbits(chosen.astype(bool), bitorder="little")
    return bits


def unpacked(bits: np.ndarray, count: int) -> np.ndarray:
    """Return bits (ceil(count / 8),) as flags (count,)."""
    flags: np.ndarray = np.unpackbits(bits, count=count, bitorder="little").astype(bool)
    return flags


def chosen_entries(
    entries: Entries, shape: tuple[int, ...], arrays: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """Return which entries of a tensor are meant, in its shape; None for all of them.

    Raises:
        PlanError: Axis, indices or mask do not fit a tensor of that shape.
    """
    axis = entries.axis
    if axis is not None:
        demand(axis < len(shape), entries, f"it has {len(shape)} axes")
    length = math.prod(shape) if axis is None else shape[axis]
    if entries.indices is None and entries.mask is None:
        demand(entries.count == length, entries, f"count is {entries.count} and it has {length}")
        return None
    if entries.indices is not None:
        demand(entries.indices[-1] < length, entries, f"it has {length} along there")
        flags = np.zeros(length, dtype=bool)
        flags[list(entries.indices)] = True
    else:
        bits = arrays.get(str(entries.mask))
        size = -(-length // 8)
        fits = bits is not None and bits.dtype == np.uint8 and bits.shape == (size,)
        demand(fits, entries, f'the companion has no mask "{entries.mask}" of {size} bytes')
        assert bits is not None
        flags = unpacked(bits, length)
        demand(int(flags.sum()) == entries.count, entries, f"its mask has {flags.sum()} bits set")
    if axis is None:
        return flags.reshape(shape)
    along = [1] * len(shape)
    along[axis] = length
    whole: np.ndarray = np.broadcast_to(flags.reshape(along), shape)
    return whole


def demand(holds: bool, entries: Entries, found: str) -> None:
    """Raise unless entries fit their tensor.

    Raises:
        PlanError: They do not.
    """
    if not holds:
        raise PlanError(
            f'The plan\'s entries of "{entries.tensor}" do not fit that tensor: {found}. Make the '
            "plan again."
        )


def resealed(plan: ReinitPlan) -> ReinitPlan:
    """Return a plan whose words were changed, with a companion that names it anew.

    Raises:
        PlanError: The plan came without its companion.
    """
    return plan if plan.companion is None else sealed(plan, arrays_of(plan))


def sorted_metadata(data: bytes) -> bytes:
    """Return safetensors bytes with the header's metadata in the order of its keys.

    The library keeps metadata in a hash map whose order changes from process to process; the
    tensors' part is already in a fixed order.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
