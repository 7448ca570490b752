"""Network + batches -> figures: one forward and one backward pass a batch.

`gauge` traces and sums, `shard` holds the sums and merges them, `figures` turns them into what a
diagnosis says; `features` is the optional slower pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from core.errors import DataError, Stopped
from core.measure.features import (
    MOST_IMAGES,
    TRANSFER_NAMES,
    pooled_features,
    transfer_figures,
)
from core.measure.figures import ArraysByMetric, Measured, figures_of, missing, ratio_intervals
from core.measure.gauge import Gauge, Summed, gauging
from core.measure.shard import Shard, shard_from, shard_state
from core.measure.table import BATCH_FIGURES
from core.measure.weights import main_parameter
from core.records import LayerInfo


def measure_network(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[LayerInfo],
    *,
    dtype: torch.dtype = torch.float32,
    histograms: bool = False,
    on_batch: Callable[[int], None] = lambda images: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Measure a network on labelled batches and leave it exactly as it was.

    Args:
        module: On its device. Norms with running statistics use the batch's own here and do not
            update theirs; everything else is in eval mode.
        batches: Pairs of inputs (n, 3, height, width), normalised, on the module's device, and
            labels (n,).
        layers: The layers to report on, from the outline of the same architecture.
        dtype: float32, or float16 or bfloat16 to run the pass under autocast.
        histograms: Add each weight's histogram to the figures by unit.
        on_batch: Called with the number of images after each batch.
        should_stop: Asked before each batch.

    Returns:
        The figures; a metric that does not apply carries the reason.

    Raises:
        Stopped: `should_stop` said so.
        DataError: There is no batch, or a batch of one image meets a batch norm.
        ModelError: The forward or backward pass failed.
    """
    with gauging(module, layers, dtype=dtype) as gauge:
        for inputs, labels in batches:
            if should_stop():
                raise Stopped("Measuring was stopped; nothing was written.")
            gauge.add(inputs, labels, first=gauge.shard.samples)
            on_batch(len(inputs))
    if gauge.shard.samples == 0:
        raise DataError("There is not a single image to measure on. Ask for at least one.")
    return figures_of(gauge.summed, histograms=histograms)


__all__ = [
    "BATCH_FIGURES",
    "MOST_IMAGES",
    "TRANSFER_NAMES",
    "ArraysByMetric",
    "Gauge",
    "Measured",
    "Shard",
    "Summed",
    "figures_of",
    "gauging",
    "main_parameter",
    "measure_network",
    "missing",
    "pooled_features",
    "ratio_intervals",
    "shard_from",
    "shard_state",
    "transfer_figures",
]
