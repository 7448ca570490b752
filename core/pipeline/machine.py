"""The device a stage runs on, and the versions a record needs."""

from __future__ import annotations

import platform

import torch

from core.errors import OptionError, Remedy


def versions() -> dict[str, str]:
    """Return the versions a record needs to be repeated."""
    from importlib.metadata import PackageNotFoundError, version

    by_package = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors"):
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = "unknown"
    return by_package


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one.

    Raises:
        OptionError: Unknown name, or CUDA asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f'The device is "{name}"; give auto, cpu or cuda.')
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("There is no CUDA device on this machine.", Remedy.OTHER_DEVICE)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the device's name for a record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
