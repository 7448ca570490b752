"""Files of weights: read without running code in them, and named as the model names them."""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from core.errors import ModelError
from core.files.inputs import (
    JSONError,
    bytes_allowed,
    in_words,
    input_status,
    open_input,
    strict_json,
)
from core.load.archives import ArchiveError, opened_zip, stored_members
from core.load.pickles import Claims, PickleError
from core.text import as_text

# Wrappers that training scripts leave around names, and keys they keep the weights under.
PREFIXES = ("module.", "_orig_mod.", "timm_model.", "model.")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")
# States passed over that a sentence names before it counts the rest.
SHOWN_STATES = 3

# Files in PyTorch's format of before 2020 are read whole, optimiser and all.
MAX_WHOLE_BYTES = 4 * 2**30
DEFAULT_MAX_GB = 64.0
LIMIT_VARIABLE = "LIMBER_MAX_CHECKPOINT_GB"
MAX_HEADER_BYTES = 64 * 2**20
MAX_HEADER_VALUES = 1_500_000
MAX_PICKLE_BYTES = 64 * 2**20
# Tensors may share bytes (tied weights), or repeat theirs along an axis: both are small in files
# that are meant.
MAX_REPEATS = 4
SPARE_BYTES = 64 * 2**20
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_OTHERS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool")
_NARROW = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = frozenset(
    getattr(torch, name) for name in (*_FLOATS, *_NARROW, *_OTHERS, "complex64", "complex128")
)
ADVICE = "Give a safetensors file, or a state dict saved with torch.save(model.state_dict(), path)."


class _UnreadableError(ValueError):
    """A file holds no weights that can be meant; the message is a phrase for people."""


def check_checkpoint(path: Path) -> int:
    """Hold what a file of weights claims against what it is; no tensor is loaded.

    Takes little memory whatever the file says, so that it can come before anything else is done
    with a file from elsewhere.

    Returns:
        Bytes of the tensors in it, optimiser states and all.

    Raises:
        ModelError: No file of weights, compressed, cut off, larger than it may be, or it claims
            what it does not hold.
    """
    try:
        size = input_status(path).st_size
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise ModelError(f'There is no checkpoint file "{path}". Check the path.') from error
        raise ModelError(
            f'The checkpoint "{path}" cannot be read ({error.strerror}). Check the path.'
        ) from error
    most = bytes_allowed(LIMIT_VARIABLE, DEFAULT_MAX_GB)
    if size > most:
        raise ModelError(
            f'"{path.name}" has {in_words(size)}, and at most {in_words(most)} are read. Set '
            f"{LIMIT_VARIABLE} to a larger number of gigabytes to read it."
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors_bytes(path)
        with open_input(path) as file:
            first = file.read(2)
        if first == b"PK":
            return _zip_bytes(path)
        if first[:1] == b"\x80":
            return _legacy_bytes(path, size)
    except (ArchiveError, PickleError, _UnreadableError, JSONError) as error:
        raise _unreadable(path, str(error)) from error
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    raise _unreadable(path, "it is no file of PyTorch's" if size else "empty file")


def _unreadable(path: Path, reason: str) -> ModelError:
    return ModelError(f'"{path.name}" cannot be read as weights ({reason[:200]}). {ADVICE}')


def safetensors_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file; none is loaded.

    Raises:
        ValueError: It is cut off, or its header is too large to be meant or is no JSON.
        OSError: It cannot be opened.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _UnreadableError("it is cut off, or no safetensors file")
        if length > MAX_HEADER_BYTES:
            raise _UnreadableError(f"its header is larger than {in_words(MAX_HEADER_BYTES)}")
        strict_json(file.read(length), most_values=MAX_HEADER_VALUES)
    # The library holds each tensor's place against its shape and the file's size.
    return size - 8 - length


def _zip_bytes(path: Path) -> int:
    """Return the bytes of the storages in a file that torch.save wrote, sizes checked.

    Nothing in it is compressed: the storages are mapped into memory later on, not read.
    """
    members = stored_members(path)
    folders = {name.partition("/")[0] for name in members}
    pickle = members.get(f"{next(iter(folders), '')}/data.pkl")
    if len(folders) != 1 or pickle is None:
        raise _UnreadableError("it is a zip file, but none of PyTorch's")
    if pickle.file_size > MAX_PICKLE_BYTES:
        raise _UnreadableError(f"its table of tensors is larger than {in_words(MAX_PICKLE_BYTES)}")
    claims = Claims()
    with opened_zip(path) as archive:
        try:
            claims.walk(io.BytesIO(archive.read(pickle)))
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise _UnreadableError("it is damaged") from error
    for key, claimed in claims.storages.items():
        held = members.get(pickle.filename.removesuffix("data.pkl") + f"data/{key}")
        if held is None or claimed > held.file_size:
            held_size = "nothing" if held is None else in_words(held.file_size)
            raise _UnreadableError(
                f'it claims {in_words(claimed)} for "{key[:80]}" and holds {held_size} there'
            )
    return sum(claims.storages.values())


def _legacy_bytes(path: Path, size: int) -> int:
    """Return the bytes of the storages in a file of PyTorch before 1.6, sizes checked."""
    claims = Claims()
    with (
        open_input(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream,
    ):
        # Three short ones say what wrote it; then the object, and the order of the storages.
        for _ in range(5):
            claims.walk(stream)  # type: ignore[arg-type]
        left = size - stream.tell()
    total = sum(claims.storages.values())
    if total > left or not claims.storages.keys() <= claims.texts:
        raise _UnreadableError(f"it claims {in_words(total)} of numbers and holds {in_words(left)}")
    if total > MAX_WHOLE_BYTES:
        raise _UnreadableError(
            f"it is in the format of before PyTorch 1.6, of which at most "
            f"{in_words(MAX_WHOLE_BYTES)} are read"
        )
    return total


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a file of weights as `read_state` does, where the choice among states is no matter.

    Returns:
        Names to CPU tensors, of any shapes.

    Raises:
        ModelError: As `read_state`.
    """
    return read_state(path)[0]


def read_state(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read a safetensors file or a pickled state dict (weights only, no code is run).

    The file is mapped into memory: only what is used of the tensors is read from disk, and an
    optimiser's state beside them costs nothing.

    Returns:
        Names to CPU tensors of any shapes: known wrappers around the dict are opened, names are as
        stored. And what must be said of the choice where the file holds several states.

    Raises:
        ModelError: There is no such file, it holds no state dict, or not what it claims to hold.
    """
    check_checkpoint(path)
    try:
        content = _content(path)
    except Exception as error:
        # A damaged pickle raises nearly anything, AssertionError and IndexError among it.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "empty file"
        if first_line.startswith("Weights only load failed"):
            first_line = "it holds more than tensors, or is no such file at all"
        raise _unreadable(path, first_line[:160]) from error
    content, said = _chosen(content)
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f'"{path.name}" holds {type(content).__name__}, not a state dict. Save '
            "model.state_dict() and give that file."
        )
    tensors = {name: value.detach() for name, value in _tensors(content).items()}
    if not tensors:
        keys = ", ".join(str(key)[:80] for key in list(content)[:3] if isinstance(key, str | int))
        raise ModelError(
            f'"{path.name}" holds no tensors (its keys begin with {keys}). Save '
            "model.state_dict() and give that."
        )
    for name, value in tensors.items():
        odd = _oddity(name, value)
        if odd is not None:
            raise ModelError(
                f'"{path.name}" holds "{name[:200]}" {odd}. Save the state of a dense network that '
                "is loaded."
            )
    claimed, size = state_bytes(tensors), path.stat().st_size
    if claimed > MAX_REPEATS * size + SPARE_BYTES:
        raise _unreadable(
            path, f"its tensors claim {in_words(claimed)}, and the file has {in_words(size)}"
        )
    # A flag of conjugation or sign instead of values: bytes would be those of other numbers.
    return {name: value.resolve_conj().resolve_neg() for name, value in tensors.items()}, said


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _chosen(content: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the state that is used of a file's content, and what must be said of the others.

    Training scripts save averaged weights beside the last ones. They are two networks, and
    nothing else in a result would tell which of them was measured.
    """
    if not isinstance(content, Mapping):
        return content, ()
    sizes = {name: len(_tensors(state)) for name, state in content.items() if isinstance(name, str)}
    used = next((name for name in CONTAINERS if sizes.get(name)), None)
    if used is None:
        return content, ()
    # Under other names only what is large enough to be a state of the same network.
    others = [
        name
        for name, count in sizes.items()
        if name != used and count and (name in CONTAINERS or 2 * count >= sizes[used])
    ]
    if not others:
        return content[used], ()
    shown = ", ".join(f'"{as_text(name[:80])}"' for name in others[:SHOWN_STATES])
    more = len(others) - SHOWN_STATES
    passed = shown + (f" and {more:,} more" if more > 0 else "")
    averaged = " (averaged weights)" if used.endswith("ema") else ""
    return content[used], (
        f'The checkpoint holds several states: "{used}"{averaged} is used, and {passed} '
        f"{'is' if len(others) == 1 else 'are'} passed over. To use another, save it alone.",
    )


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _oddity(name: str, value: Tensor) -> str | None:
    """Return in what a tensor is none of plain numbers in memory, as the end of "holds it ..."."""
    with suppress(UnicodeEncodeError):
        name.encode()
        if type(value) is not Tensor:
            return f"as a {type(value).__name__}"
        for holds, what in (
            (value.is_nested, "as nested"),
            (value.is_quantized, "as quantised"),
            (value.is_meta, "as no values"),
            (value.layout != torch.strided, "as sparse"),
            (value.dtype not in DTYPES, f"as {str(value.dtype).removeprefix('torch.')}"),
            (value.device.type != "cpu", f"on {value.device.type}"),
        ):
            if holds:
                return what
        return None
    return "under a name that is no text"


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Return how many bytes the tensors of a state, of any shapes, take once written out."""
    return sum(value.numel() * value.element_size() for value in state.values())


def without_wrappers(
    state: Mapping[str, Tensor], expected: frozenset[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip wrapper prefixes while that makes more names fit.

    Returns:
        The renamed state, its tensors untouched in shape and value, and the prefixes that were
        stripped, outermost first.
    """
    current, stripped = dict(state), []
    for _ in range(len(PREFIXES)):
        fitting = len(expected & current.keys())
        best = None
        for prefix in PREFIXES:
            candidate = {name.removeprefix(prefix): value for name, value in current.items()}
            if len(candidate) == len(current) and len(expected & candidate.keys()) > fitting:
                best, fitting = (prefix, candidate), len(expected & candidate.keys())
            elif best is None and all(name.startswith(prefix) for name in current):
                best = (prefix, candidate)
        if best is None:
            break
        stripped.append(best[0])
        current = best[1]
    return current, tuple(stripped)


def state_sha256(state: Mapping[str, Tensor], *, without: frozenset[str] = frozenset()) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if name in without:
            continue
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(
            value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    return digest.hexdigest()
