"""Whether stored tensors can be a network's weights: their number formats and their values.

A cast would make numbers of anything. Quantised integers without their scale, and NaN that a
diverged training left, give figures that look like any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from core.errors import ModelError

# What holds weights as they are; all are cast to float32.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
# Bookkeeping of batch norms: no prediction depends on it, and averaged weights hold fractions.
COUNTER = "num_batches_tracked"
VARIANCE = "running_var"
# Of running statistics 0 is as good as next to nothing: a norm adds its epsilon.
STATISTICS = ("running_mean", VARIANCE)


def fitted_state(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], names: Iterable[str], *, title: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return tensors in the number formats of a network, and the formats that were cast.

    Args:
        state: What a file or library holds, in the shapes of the network's.
        target: The `state_dict` of the network as its architecture draws it.
        names: Which tensors are wanted; they are in both.
        title: The network, for the message.

    Returns:
        The wanted tensors, and the formats beside float32 in which weights were stored.

    Raises:
        ModelError: A tensor is in a format that holds no weights by itself, or holds values
            that are not finite (where the architecture's own are), too large for float32, too
            small for it throughout, or variances below 0.
    """
    fitted: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for name in sorted(names):
        stored, wanted = state[name], target[name]
        why = _refused_format(stored, wanted, counter=name.endswith(COUNTER))
        if why is not None:
            refused[name] = why
            continue
        fitted[name] = _cast(stored, wanted, counter=name.endswith(COUNTER))
    if refused:
        first, why = next(iter(refused.items()))
        raise ModelError(f'The weights of {title} cannot be used: "{first}"{_more(refused)} {why}')
    _refuse_values(fitted, state, target, title=title)
    cast = {
        str(state[name].dtype).removeprefix("torch.")
        for name, value in fitted.items()
        if value.is_floating_point() and state[name].dtype != value.dtype
    }
    return fitted, tuple(sorted(cast))


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return "" if not count else f" (and {count} more tensor{'' if count == 1 else 's'})"


def _refused_format(stored: Tensor, wanted: Tensor, *, counter: bool) -> str | None:
    """Return why a tensor's format does not fit, as the rest of a sentence; None where it does."""
    kind = str(stored.dtype).removeprefix("torch.")
    as_floats = "Give the weights as float16, bfloat16, float32 or float64."
    if stored.dtype in FLOATS:
        lossless = counter or wanted.dtype.is_floating_point or wanted.dtype.is_complex
        if lossless or _survives(stored, wanted.dtype):
            return None
        held = str(wanted.dtype).removeprefix("torch.")
        return (
            f"is stored as {kind}, and the architecture holds {held} there. Save the state again."
        )
    if stored.dtype.is_complex:
        if wanted.dtype.is_complex:
            return None
        return f"holds complex numbers ({kind}), and the architecture has none there. {as_floats}"
    whole = not (wanted.dtype.is_floating_point or wanted.dtype.is_complex)
    if stored.dtype in WHOLE and whole and (counter or _survives(stored, wanted.dtype)):
        return None
    if stored.dtype in WHOLE and whole:
        held = str(wanted.dtype).removeprefix("torch.")
        return f"is stored as {kind}, whose values do not fit {held}. Save the state again."
    if stored.dtype in WHOLE:
        return (
            f"is stored as {kind}: whole numbers are weights only together with the scale that "
            f"quantised them. {as_floats}"
        )
    return (
        f"is stored as {kind}, a format that needs a scale beside it to hold weights. {as_floats}"
    )


def _survives(stored: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast and the way back give the same values."""
    # Through float64 or int64: not every format can be compared.
    wide = torch.float64 if stored.dtype.is_floating_point else torch.int64
    if stored.dtype.is_floating_point and not bool(stored.isfinite().all()):
        return False
    return torch.equal(stored.to(dtype).to(wide), stored.to(wide))


def _cast(stored: Tensor, wanted: Tensor, *, counter: bool) -> Tensor:
    if counter and stored.is_floating_point():
        stored = stored.double().nan_to_num(0.0, 0.0, 0.0)
    return stored.to(wanted.dtype)


def _refuse_values(
    fitted: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    title: str,
) -> None:
    odd: dict[str, int] = {}
    for name, value in fitted.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        # Masks of attention are buffers and may hold -inf by design.
        flags = ~value.isfinite() & target[name].isfinite()
        count = int(flags.sum())
        if count:
            odd[name] = count
    if odd:
        first, count = next(iter(odd.items()))
        entries = f'{count:,} of {fitted[first].numel():,} in "{first}"{_more(odd)}'
        if bool(state[first].isfinite().all()):
            raise ModelError(
                f"The weights of {title} hold values that are too large for float32: {entries}. "
                "Give weights below 3.4e38."
            )
        raise ModelError(
            f"The weights of {title} hold values that are not finite numbers: {entries}. Nothing "
            "can be measured or trained from them; give weights from before they diverged."
        )
    lost = {
        name: count
        for name, value in fitted.items()
        if not name.endswith(STATISTICS) and (count := _lost(state[name], value))
    }
    if lost:
        first, count = next(iter(lost.items()))
        raise ModelError(
            f"The weights of {title} hold values that are too small for float32: {count:,} of "
            f'{fitted[first].numel():,} in "{first}"{_more(lost)} would become 0. Give weights '
            "above 1.2e-38."
        )
    below = {
        name: int((value < 0).sum())
        for name, value in fitted.items()
        if name.endswith(VARIANCE) and bool((value < 0).any())
    }
    if below:
        first, count = next(iter(below.items()))
        raise ModelError(
            f"The weights of {title} hold variances below 0: {count:,} of "
            f'{fitted[first].numel():,} in "{first}"{_more(below)}. Give weights whose running '
            "statistics are sound."
        )


def _lost(stored: Tensor, value: Tensor) -> int:
    """Return how many entries a cast turns into 0 in a tensor that has no larger ones.

    What becomes 0 is below 2^-150. Beside an entry of 2^-126, the smallest that float32 holds in
    full precision, that is less than the rounding of this entry itself, and nothing is lost.
    """
    if stored.dtype not in (torch.float64, torch.complex128) or not value.numel():
        return 0
    if not (value.is_floating_point() or value.is_complex()):
        return 0
    if float(value.abs().max()) >= torch.finfo(value.dtype).tiny:
        return 0
    return int(((stored != 0) & (value == 0)).sum())
