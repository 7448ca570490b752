"""The values that flow between the stages: frozen, keyword-only, never tensors."""

from core.records.curves import ABComparison, ArmCurve, ArmDifference, RunRecord, StepRecord
from core.records.diagnosis import (
    Diagnosis,
    DiagnosisHeader,
    Finding,
    LayerReport,
    MetricValue,
)
from core.records.outline import (
    DataOutline,
    LayerInfo,
    ModelCard,
    ModelOutline,
    ParameterInfo,
    Preprocessing,
    SampleImage,
)
from core.records.plan import (
    Evidence,
    ModelIdentity,
    Pattern,
    ReinitPlan,
    SchemeChoice,
    Target,
)
from core.records.receipt import ReinitReceipt, TensorChange
from core.records.specs import DatasetEntry, DataSpec, ModelEntry, ModelSpec

__all__ = [
    "ABComparison",
    "ArmCurve",
    "ArmDifference",
    "DataOutline",
    "DataSpec",
    "DatasetEntry",
    "Diagnosis",
    "DiagnosisHeader",
    "Evidence",
    "Finding",
    "LayerInfo",
    "LayerReport",
    "MetricValue",
    "ModelCard",
    "ModelEntry",
    "ModelIdentity",
    "ModelOutline",
    "ModelSpec",
    "ParameterInfo",
    "Pattern",
    "Preprocessing",
    "ReinitPlan",
    "ReinitReceipt",
    "RunRecord",
    "SampleImage",
    "SchemeChoice",
    "StepRecord",
    "Target",
    "TensorChange",
]
