"""The network of the conformance vectors; the writer prints this file into their README."""

from collections import OrderedDict

from torch import Tensor, nn


def block(inputs: int, outputs: int, *, bias: bool, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
    return nn.Sequential(
        OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), act=nn.ReLU()),
    )


class Network(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                block(3, 6, bias=False, stride=2),
                block(6, 6, bias=True, stride=1),
                block(6, 8, bias=False, stride=2),
            ]
        )
        self.fc = nn.Linear(8, 10)
        self.act = nn.ReLU()
        self.head = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = x + self.blocks[1](x)
        x = self.blocks[2](x).mean((2, 3))
        return self.head(self.act(self.fc(x)))
