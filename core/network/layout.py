"""A network -> the device it runs on, laid out as its convolutions run fastest."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def placed(module: Network, device: torch.device) -> Network:
    """Move a network to a device, channels last; return it.

    Channels-last convolutions are several times faster on CPUs and never slower on GPUs. Weights of
    five axes have no such layout, and a network with one of them stays as it is.
    """
    module.to(device)
    if all(parameter.ndim != 5 for parameter in module.parameters()):
        module.to(memory_format=torch.channels_last)
    return module
