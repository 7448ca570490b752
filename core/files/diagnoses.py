"""Diagnosis <-> its files."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from core.errors import OptionError, Remedy
from core.files.inputs import JSONError, read_input, strict_json
from core.files.whole import CompanionKind, companion_path, write_whole
from core.records import (
    Diagnosis,
)
from core.records.diagnosis import MAX_DIAGNOSIS_BYTES, MAX_DIAGNOSIS_VALUES

MAX_UNITS_BYTES = 512 * 2**20


def write_diagnosis(
    diagnosis: Diagnosis,
    units: Mapping[str, np.ndarray],
    out: Path,
    *,
    inside: Mapping[str, np.ndarray] | None = None,
) -> Diagnosis:
    """Write the diagnosis as JSON with its figures by unit next to it; return what was written.

    See `companion_path` for the companions' names; the header names them and their SHA-256.

    Args:
        diagnosis: Of a network and its twin.
        units: "LAYER/METRIC" and "twin/LAYER/METRIC" to figures (units,).
        out: The JSON file.
        inside: What `diagnose_inside` saw inside the layers; None where nobody asked for it.
    """
    named: dict[str, str] = {}
    kinds: tuple[tuple[CompanionKind, Mapping[str, np.ndarray] | None], ...] = (
        ("units", units),
        ("inside", inside),
    )
    for kind, arrays in kinds:
        if arrays is None:
            continue
        companion = companion_path(out, kind)
        data = safetensors.numpy.save(
            {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
        )
        write_whole(companion, data)
        named |= {
            f"{kind}_file": companion.name,
            f"{kind}_sha256": hashlib.sha256(data).hexdigest(),
        }
    header = diagnosis.header.model_copy(update=named)
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
    return units_with_twins(_companion(path, header.units_file, header.units_sha256))


def read_inside(path: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray | None]]]:
    """Read what a diagnosis saw inside its layers: layer to what to (network's, twin's).

    Edges and curves are the same for both and have no twin's. "images" and "batches" hold what
    belongs to no layer; see `diagnose_inside`.

    Raises:
        OptionError: Nobody looked inside, or the companion is not the one the diagnosis names.
    """
    header = read_diagnosis(path).header
    if header.inside_file is None:
        raise OptionError(
            f'The diagnosis "{Path(path).name}" did not look inside its layers.', Remedy.LOOK_INSIDE
        )
    arrays = _companion(path, header.inside_file, header.inside_sha256)
    by_layer: dict[str, dict[str, tuple[np.ndarray, np.ndarray | None]]] = {}
    for key, values in sorted(arrays.items()):
        layer, _, what = key.rpartition("/")
        if not key.startswith("twin/"):
            by_layer.setdefault(layer, {})[what] = (values, arrays.get(f"twin/{key}"))
    return by_layer


def _companion(path: Path, name: str | None, digest: str | None) -> dict[str, np.ndarray]:
    companion = Path(path).parent / Path(name or "").name
    try:
        data = read_input(companion, most=MAX_UNITS_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise OptionError(
                f'"{companion.name}" is not the file its diagnosis names. Measure again.'
            )
        return safetensors.numpy.load(data)
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise OptionError(f'"{companion}" cannot be read. Measure again.') from error


def units_with_twins(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the figures by unit that `diagnose` gives, layer to metric to (network's, twin's).

    Raises:
        OptionError: If a twin's figures have another shape than the network's.
    """
    by_layer: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key, values in arrays.items():
        twin = arrays.get(f"twin/{key}")
        if values.dtype.kind != "f" or (twin is not None and twin.shape != values.shape):
            raise OptionError(f'The figures "{key}" and the twin\'s do not match. Measure again.')
    # safetensors hands arrays out in another order in each process.
    for key, values in sorted(arrays.items()):
        layer, _, metric = key.rpartition("/")
        twin = arrays.get(f"twin/{key}")
        if twin is not None:
            by_layer.setdefault(layer, {})[metric] = (values, twin)
    return by_layer
