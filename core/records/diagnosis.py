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
        reason: Why there is no value; None when there is one.
    """

    value: float | None
    n: int = 0
    reason: str | None = None


class LayerReport(Value):
    """One layer's figures beside those of its fresh twin on the same batches.

    `metrics` and `twin_metrics` have the same keys, the names of the metric registry.
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

    def ratio(self, metric: str) -> float | None:
        """Return value over twin's value; None where either is missing or the twin's is 0."""
        value = self.metrics[metric].value if metric in self.metrics else None
        twin = self.twin_metrics[metric].value if metric in self.twin_metrics else None
        if value is None or twin is None or twin == 0:
            return None
        return value / twin


class DiagnosisHeader(Value):
    """Everything needed to repeat the measurement."""

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
    """A whole measurement: header, layers in forward order, findings."""

    header: DiagnosisHeader
    layers: tuple[LayerReport, ...]
    findings: tuple[Finding, ...] = ()

    def layer(self, name: str) -> LayerReport | None:
        """Return the report of that layer, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)
