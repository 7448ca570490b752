"""Files of weights: read without running code in them, and named as the model names them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from core.errors import ModelError

# Wrappers that training scripts leave around names, and keys they keep the weights under.
PREFIXES = ("module.", "_orig_mod.", "timm_model.", "model.")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file or a pickled state dict (weights only, no code is run).

    Returns:
        Names to CPU tensors. Known wrappers around the dict are opened; names are as stored.

    Raises:
        ModelError: There is no such file, or it holds no state dict.
    """
    if not path.is_file():
        raise ModelError(f'There is no checkpoint file "{path}". Check the path.')
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle raises nearly anything, AssertionError and IndexError among it.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "empty file"
        if first_line.startswith("Weights only load failed"):
            first_line = "it holds more than tensors, or is no such file at all"
        raise ModelError(
            f'"{path.name}" cannot be read as weights ({first_line[:160]}). Give a safetensors '
            "file, or a state dict saved with torch.save(model.state_dict(), path)."
        ) from error
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f'"{path.name}" holds {type(content).__name__}, not a state dict. Save '
            "model.state_dict() and give that file."
        )
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(
            f'"{path.name}" holds no tensors (its keys begin with '
            f"{', '.join(map(str, list(content)[:3]))}). Save model.state_dict() and give that."
        )
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_meta:
            raise ModelError(
                f'"{path.name}" holds "{name}" as {"no values" if value.is_meta else "sparse"}. '
                "Save the state of a dense network that is loaded."
            )
    return tensors


def without_wrappers(
    state: Mapping[str, Tensor], expected: frozenset[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip wrapper prefixes while that makes more names fit.

    Returns:
        The renamed state and the prefixes that were stripped, outermost first.
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
