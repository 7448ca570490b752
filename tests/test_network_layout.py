"""Networks stand on their device channels last, where they have such a layout."""

from __future__ import annotations

import torch
from torch import nn

from core.network.layout import placed


def test_convolutions_are_laid_out_channels_last() -> None:
    network = placed(nn.Conv2d(3, 4, 3), torch.device("cpu"))

    assert network.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_of_five_axes_leaves_the_network_as_it_is() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 16, (1, 7, 7)), nn.Conv3d(16, 4, 1))
    network.register_parameter("scale", nn.Parameter(torch.ones(1, 1, 1, 1, 1)))
    before = {name: value.clone() for name, value in network.state_dict().items()}

    placed(network, torch.device("cpu"))

    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.is_contiguous()
