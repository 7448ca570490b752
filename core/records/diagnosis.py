"""What a measurement found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from core.records.base import Value
from core.records.outline import IntensityRange
from core.records.specs import DataSpec, ModelSpec

# Files of thousands of layers with histograms stay below these.
MAX_DIAGNOSIS_BYTES = 128 * 2**20
MAX_DIAGNOSIS_VALUES = 3_000_000
# Half a step of float32: beside a figure, another that is smaller by this factor adds nothing.
SINGLE_RESOLUTION = 2.0**-24

RatioKind = Literal["ratio", "noise", "both-zero", "twin-zero", "signs", "no-twin", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How a figure stands to its twin's: a number, or why there is none.

    Attributes:
        kind: "ratio": value over twin. "noise": as well, and these images cannot tell it from 1.
            "both-zero": both are 0, so that they are the same. "twin-zero": the twin's figure is
            0, or too small beside the network's to be told from 0 in single precision. "signs":
            one is above 0 and the other below. "no-twin": the network has a figure and its twin
            has none. "missing": the network has none.
        value: Value over twin for "ratio" and "noise", and else None.
    """

    kind: RatioKind
    value: float | None = None


def ratio_of(
    value: float | None, twin: float | None, interval: tuple[float, float] | None = None
) -> Ratio:
    """Return how a figure stands to its twin's: the one definition of the ratio.

    Args:
        value: The network's figure; None or not finite where there is none.
        twin: The fresh twin's.
        interval: 95 % interval of value over twin, where it is known.
    """
    if value is None or not math.isfinite(value):
        return Ratio(kind="missing")
    if twin is None or not math.isfinite(twin):
        return Ratio(kind="no-twin")
    if value == 0 and twin == 0:
        return Ratio(kind="both-zero")
    if abs(twin) <= SINGLE_RESOLUTION * abs(value):
        return Ratio(kind="twin-zero")
    if value != 0 and (value < 0) != (twin < 0):
        return Ratio(kind="signs")
    noise = interval is not None and interval[0] <= 1.0 <= interval[1]
    return Ratio(kind="noise" if noise else "ratio", value=value / twin)


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

    def ratio(self, metric: str) -> Ratio:
        """Return how a figure stands to its twin's; "missing" for a metric that is not here."""
        value, twin = self.metrics.get(metric), self.twin_metrics.get(metric)
        return ratio_of(
            None if value is None else value.value,
            None if twin is None else twin.value,
            self.ratio_intervals.get(metric),
        )


class DiagnosisHeader(Value):
    """Everything needed to repeat the measurement.

    Attributes:
        overhead_fraction: Wall time spent on reading tensors over that of the passes
            themselves, timed within the run; None where work is queued on a device.
        kernels: By what means sums were taken: "compiled", "triton" or "plain".
        intensities: Which stored numbers were black and white, where images have more than
            eight bits.
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
    inside_file: str | None = None
    inside_sha256: str | None = None
    notes: tuple[str, ...] = ()
    intensities: tuple[IntensityRange, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_nobody_asked_for(self, handler: SerializerFunctionWrapHandler) -> Any:
        # A diagnosis that did not look inside is written as it was before that could be asked for.
        written = handler(self)
        if self.inside_file is None:
            written.pop("inside_file", None)
            written.pop("inside_sha256", None)
        return written


class Finding(Value):
    """A sentence about some layers, the check that produced it, and the layers it speaks of."""

    check: str = Field(validation_alias="rule", serialization_alias="rule")
    severity: Literal["info", "notice", "warning"]
    sentence: str
    layers: tuple[str, ...]
    metric: str
    threshold: float


class Remark(Value):
    """A sentence about figures that a check did not count, and why.

    Attributes:
        why: "as-twin": the fresh twin trips the check too. "twin-zero": there is no ratio,
            because the twin's figure is 0. "not-finite": figures that are no finite numbers.
        check: Name of the check; "" where it is about none in particular.
        metric: Which figure; "" for several.
        sentence: For people.
        layers: The layers it speaks of, in forward order.
    """

    why: Literal["as-twin", "twin-zero", "not-finite"]
    check: str = Field(validation_alias="rule", serialization_alias="rule")
    metric: str
    sentence: str
    layers: tuple[str, ...]


class Diagnosis(Value):
    """A whole measurement: header, layers in forward order, findings.

    Attributes:
        header: What it takes to repeat it.
        layers: In forward order.
        preset: Which set of rules made the findings.
        thresholds: The limits that differ from the preset's, by rule.
        findings: What stands out.
        remarks: What the checks passed over, and why.
    """

    header: DiagnosisHeader
    layers: tuple[LayerReport, ...]
    preset: str = "limber"
    thresholds: dict[str, float] = {}
    findings: tuple[Finding, ...] = ()
    remarks: tuple[Remark, ...] = ()

    def layer(self, name: str) -> LayerReport | None:
        """Return the report of that layer, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)
