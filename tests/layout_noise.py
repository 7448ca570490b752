"""How far a diagnosis depends on the order in which images lie in memory.

    python -m tests.layout_noise                                  the embedded network with norms
    python -m tests.layout_noise timm:resnet18=weights.safetensors   others, with their weights

float32 gradients of networks with batch norm depend on it (see core/README.md). The same images
are measured channels-last and contiguous in float32, and in float64. What is printed is how far
the figures that come of gradients are from float64's, in halves of their own 95 % intervals: at 1
the noise of the layout is as large as that of the images.
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch import Tensor

from core.catalogue.metrics import METRICS
from core.load import decode_items, load_model, open_images, resolve_data, resolve_model
from core.measure import Measured, measure_network
from core.network.outline import outline_module
from core.pixels import normalised

IMAGES, BATCH, SIZE = 64, 16, 96
EMBEDDED = "tf_efficientnet_lite0"


def measured(model: str, data: str) -> dict[str, Measured]:
    """Return what measuring a network finds: in two layouts in float32, and in float64."""
    name, _, weights = model.partition("=")
    source = open_images(resolve_data(data))
    spec = resolve_model(name, checkpoint=weights or None)
    loaded = load_model(spec, classes=len(source.outline.classes))
    outline = outline_module(loaded.module, loaded.card, loaded.head)
    preprocessing = loaded.card.preprocessing
    pixels, labels = decode_items(source, source.splits["train"][:IMAGES], preprocessing, size=SIZE)
    whole = normalised(pixels, preprocessing.mean, preprocessing.std)

    def batches(dtype: torch.dtype, layout: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
        return [
            (part.to(dtype).contiguous(memory_format=layout), of)
            for part, of in zip(whole.split(BATCH), labels.split(BATCH), strict=True)
        ]

    found = {}
    for title, dtype, layout in (
        ("channels-last", torch.float32, torch.channels_last),
        ("contiguous", torch.float32, torch.contiguous_format),
        ("float64", torch.float64, torch.contiguous_format),
    ):
        module = loaded.module.to(dtype).to(memory_format=layout)
        found[title] = measure_network(module, batches(dtype, layout), outline.layers)
    return found


def distances(found: dict[str, Measured], layout: str) -> dict[str, list[float]]:
    """Return, for each figure of gradients, by layer how many half-widths it is off."""
    rows: dict[str, list[float]] = {}
    for info in METRICS:
        if info.family != "gradient" or info.level != "layer":
            continue
        for name, exact in found["float64"].metrics.items():
            one, true = found[layout].metrics[name][info.name], exact[info.name]
            if one.value is None or true.value is None or not true.half_width:
                continue
            rows.setdefault(info.name, []).append(abs(one.value - true.value) / true.half_width)
    return rows


def main(models: list[str]) -> int:
    """Print the tables."""
    for model in models or [EMBEDDED]:
        for data in ("bloodmnist", "pneumonia"):
            found = measured(model, data)
            rows = {way: distances(found, way) for way in ("channels-last", "contiguous")}
            print(f"\n{model.partition('=')[0]}, {data}")
            print("| figure | layers | channels-last: median, greatest | contiguous |")
            print("|---|---|---|---|")
            for name, off in rows["channels-last"].items():
                other = rows["contiguous"][name]
                print(
                    f"| {name} | {len(off)} | {statistics.median(off):.3f}, {max(off):.3f} "
                    f"| {statistics.median(other):.3f}, {max(other):.3f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
