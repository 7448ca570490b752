"""What a measurement found."""

from __future__ import annotations

from typing import Literal

from core.records.base import Value
from core.records.specs import DataSpec, ModelSpec


class MetricValue(Value):
    """One figure, or the reason why there is none.

    Attributes:
        value: The figure; None when the metric does not apply.
        n: What it was computed over: rows for activations, batches for gradients, entries for
            weights. 0 when it does not apply.
        half_width: Half of a 95 % interval from the spread between batches; None for figures
            that do not vary with the images, and below two batches.
        cap: The largest value it could have had on this sample, for ranks.
        reason: Why there is no value; None when there is one.
    """

    value: float | None
    n: int = 0
    half_width: float | None = None
    cap: float | None = None
    reason: str | None = None


class LayerReport(Value):
    """One layer's figures beside those of its fresh twin on the same batches.

    `metrics` and `twin_metrics` have the same keys, the names of the metric registry.
    `ratio_intervals` holds 95 % intervals of value over twin, from batches measured in pairs.
    """

    name: str
    type: str
    stage: str
    kind: str
    index: int
    parameters: int
    units: int | None
    activation: str | None
    activation_type: str | None
    head: bool
    metrics: dict[str, MetricValue]
    twin_metrics: dict[str, MetricValue]
    ratio_intervals: dict[str, tuple[float, float]] = {}

    def ratio(self, metric: str) -> float | None:
        """Return value over twin's value; None where either is missing or the twin's is 0."""
        value = self.metrics[metric].value if metric in self.metrics else None
        twin = self.twin_metrics[metric].value if metric in self.twin_metrics else None
        if value is None or twin is None or twin == 0:
            return None
        return value / twin

    def uncertain(self, metric: str) -> bool:
        """Return whether this many images cannot tell the network from its twin here."""
        interval = self.ratio_intervals.get(metric)
        return interval is not None and interval[0] <= 1.0 <= interval[1]


class DiagnosisHeader(Value):
    """Everything needed to repeat the measurement.

    Attributes:
        overhead_fraction: Wall time spent on reading tensors over that of the passes
            themselves, timed within the run; None where work is queued on a device.
        kernels: By what means sums were taken: "compiled", "triton" or "plain".
    """

    schema_version: Literal[1] = 1
    model: ModelSpec
    model_title: str
    classes: int
    backbone_sha256: str
    data: DataSpec
    data_title: str
    data_fingerprint: str
    split: str
    samples: int
    batches: int
    batch_size: int
    image_size: int
    device: str
    device_name: str
    dtype: str
    seed: int
    batch_norm: Literal["batch", "running"]
    loss: float
    twin_loss: float
    wall_s: float
    overhead_fraction: float | None = None
    kernels: str = "plain"
    versions: dict[str, str]
    units_file: str | None = None
    units_sha256: str | None = None
    notes: tuple[str, ...] = ()


class Finding(Value):
    """A sentence about some layers, the rule that produced it, and the layers it speaks of."""

    rule: str
    severity: Literal["info", "notice", "warning"]
    sentence: str
    layers: tuple[str, ...]
    metric: str
    threshold: float


class Diagnosis(Value):
    """A whole measurement: header, layers in forward order, findings.

    Attributes:
        header: What it takes to repeat it.
        layers: In forward order.
        preset: Which set of rules made the findings.
        thresholds: The limits that differ from the preset's, by rule.
        findings: What stands out.
    """

    header: DiagnosisHeader
    layers: tuple[LayerReport, ...]
    preset: str = "limber"
    thresholds: dict[str, float] = {}
    findings: tuple[Finding, ...] = ()

    def layer(self, name: str) -> LayerReport | None:
        """Return the report of that layer, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)
