"""Diagnosis <-> its files."""

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
from core.records import (
    Diagnosis,
)
from core.records.diagnosis import MAX_DIAGNOSIS_BYTES, MAX_DIAGNOSIS_VALUES

MAX_UNITS_BYTES = 512 * 2**20


def write_diagnosis(diagnosis: Diagnosis, units: Mapping[str, np.ndarray], out: Path) -> Diagnosis:
    """Write the diagnosis as JSON with its figures by unit beside it; return what was written.

    See `companion_path` for the companion's name; the header names it and its SHA-256.

    Args:
        diagnosis: Of a network and its twin.
        units: "LAYER/METRIC" and "twin/LAYER/METRIC" to figures (units,).
        out: The JSON file.
    """
    companion = companion_path(out, "units")
    data = safetensors.numpy.save({key: np.ascontiguousarray(units[key]) for key in sorted(units)})
    write_whole(companion, data)
    header = diagnosis.header.model_copy(
        update={
            "units_file": companion.name,
            "units_sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    written = diagnosis.model_copy(update={"header": header})
    write_whole(out, written.model_dump_json(indent=1) + "\n")
    return written


def read_diagnosis(path: Path) -> Diagnosis:
    """Read a diagnosis file.

    Raises:
        OptionError: Missing, unreadable, or not a diagnosis.
    """
    try:
        data = read_input(Path(path), most=MAX_DIAGNOSIS_BYTES)
        strict_json(data, most_values=MAX_DIAGNOSIS_VALUES)
        return Diagnosis.model_validate_json(data.removeprefix(codecs.BOM_UTF8))
    except (OSError, ValueError) as error:
        why = "it is JSON of another kind"
        if isinstance(error, OSError | JSONError):
            why = str(error.strerror if isinstance(error, OSError) else error)
        raise OptionError(
            f'"{path}" cannot be read as a diagnosis ({why}). Measure again.'
        ) from error


def read_units(path: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Read the companion of a diagnosis: layer to metric to (network's, twin's) (units,).

    Raises:
        OptionError: The companion is missing or not the one the diagnosis names.
    """
    header = read_diagnosis(path).header
    companion = Path(path).parent / Path(header.units_file or "").name
    try:
        data = read_input(companion, most=MAX_UNITS_BYTES)
        if hashlib.sha256(data).hexdigest() != header.units_sha256:
            raise OptionError(
                f'"{companion.name}" is not the file its diagnosis names. Measure again.'
            )
        arrays = safetensors.numpy.load(data)
    except (OSError, safetensors.SafetensorError) as error:
        raise OptionError(f'"{companion}" cannot be read. Measure again.') from error
    return units_with_twins(arrays)


def units_with_twins(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the figures by unit that `diagnose` gives, layer to metric to (network's, twin's)."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    # safetensors hands arrays out in another order in each process.
    for key, values in sorted(arrays.items()):
        layer, _, metric = key.rpartition("/")
        twin = arrays.get(f"twin/{key}")
        if twin is not None:
            found.setdefault(layer, {})[metric] = (values, twin)
    return found
