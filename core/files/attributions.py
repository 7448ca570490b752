"""Attribution <-> its files."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from core.errors import OptionError
from core.files.inputs import JSONError, read_input, strict_json
from core.files.whole import companion_path, write_whole
from core.records.attribution import Attribution

MAX_BYTES = 64 * 2**20


def write_attribution(
    attribution: Attribution, arrays: Mapping[str, np.ndarray], out: Path
) -> Attribution:
    """Write an attribution as JSON with its arrays next to it; return what was written.

    Args:
        attribution: What was found.
        arrays: "STATE/WHAT" to arrays, in the shapes of `attribute`.
        out: The JSON file.

    Raises:
        OptionError: As `write_whole`.
    """
    companion = companion_path(out, "arrays")
    data = safetensors.numpy.save({key: arrays[key] for key in sorted(arrays)})
    write_whole(companion, data)
    named = {"arrays_file": companion.name, "arrays_sha256": hashlib.sha256(data).hexdigest()}
    written = attribution.model_copy(update=named)
    write_whole(out, written.model_dump_json(indent=1) + "\n")
    return written


def read_attribution(path: Path) -> tuple[Attribution, dict[str, np.ndarray]]:
    """Read an attribution and its arrays, in the shapes of `attribute`.

    Raises:
        OptionError: Missing, unreadable, of another kind, or not what its record names.
    """
    try:
        data = read_input(Path(path), most=MAX_BYTES)
        strict_json(data, most_values=1_000_000)
        attribution = Attribution.model_validate_json(data.removeprefix(codecs.BOM_UTF8))
        companion = Path(path).parent / Path(attribution.arrays_file or "").name
        held = read_input(companion, most=MAX_BYTES)
        if hashlib.sha256(held).hexdigest() != attribution.arrays_sha256:
            raise OptionError(f'"{companion.name}" is not the file that "{path}" names.')
        arrays = safetensors.numpy.load(held)
        _check_arrays(attribution, arrays)
        return attribution, arrays
    except (OSError, KeyError, ValueError, JSONError, safetensors.SafetensorError) as error:
        raise OptionError(f'"{path}" cannot be read as an attribution. Make it again.') from error


def _check_arrays(attribution: Attribution, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless the arrays are those of the record, in its shapes, and finite."""
    images = len(attribution.labels)
    for state in attribution.states:
        units = arrays[f"{state.name}/units"]
        bars = attribution.units or units.shape[-1]
        if units.shape != (images, bars):
            raise ValueError(f"units of shape {units.shape}")
        if attribution.grid is not None:
            maps = arrays[f"{state.name}/maps"]
            if maps.shape != (images, *attribution.grid):
                raise ValueError(f"maps of shape {maps.shape}")
    if arrays["images/thumbnails"].shape[:1] != (images,):
        raise ValueError("other images")
    for values in arrays.values():
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite")
