"""Limber's core: measure, pick, reset, compare and export, without a screen.

The public verbs are handed out here. They are imported when first used, so that `import core`
costs nothing and a listing does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "core.trial.verdict": ("compare_curves",),
    "core.export": ("read_curves", "snippet", "write_plan"),
    "core.edit.draws": ("list_schemes",),
    "core.judge": ("list_presets", "rejudge"),
    "core.load": (
        "list_datasets",
        "list_models",
        "outline_data",
        "resolve_data",
        "resolve_model",
        "sample_images",
    ),
    "core.catalogue.metrics": ("list_metrics",),
    "core.pipeline": (
        "diagnose",
        "outline_model",
        "plan_outline",
        "prepare_trial",
        "read_diagnosis",
        "read_units",
        "reset_weights",
        "write_diagnosis",
        "write_run",
    ),
    "core.plan": (
        "check_plan",
        "compose_plans",
        "diff_plans",
        "list_rules",
        "make_plan",
        "match_layers",
        "plan_schema",
        "plan_size",
        "planned_size",
        "random_control",
        "read_plan",
    ),
    "core.files.plans": ("plan_json", "resealed"),
    "core.pipeline.planning": ("Sight", "Wish", "plan_by_rule", "random_twin"),
    "core.review": (
        "changed_entries",
        "diff_weights",
        "export_plan",
        "preview_plan",
        "verify_weights",
    ),
}
_HOME_OF = {verb: home for home, verbs in _HOMES.items() for verb in verbs}

if TYPE_CHECKING:
    from core.catalogue.metrics import list_metrics
    from core.edit.draws import list_schemes
    from core.export import read_curves, snippet, write_plan
    from core.files.plans import plan_json, resealed
    from core.judge import list_presets, rejudge
    from core.load import (
        list_datasets,
        list_models,
        outline_data,
        resolve_data,
        resolve_model,
        sample_images,
    )
    from core.pipeline import (
        diagnose,
        outline_model,
        plan_outline,
        prepare_trial,
        read_diagnosis,
        read_units,
        reset_weights,
        write_diagnosis,
        write_run,
    )
    from core.pipeline.planning import Sight, Wish, plan_by_rule, random_twin
    from core.plan import (
        check_plan,
        compose_plans,
        diff_plans,
        list_rules,
        make_plan,
        match_layers,
        plan_schema,
        plan_size,
        planned_size,
        random_control,
        read_plan,
    )
    from core.review import (
        changed_entries,
        diff_weights,
        export_plan,
        preview_plan,
        verify_weights,
    )
    from core.trial.verdict import compare_curves

__all__ = [
    "Sight",
    "Wish",
    "changed_entries",
    "check_plan",
    "compare_curves",
    "compose_plans",
    "diagnose",
    "diff_plans",
    "diff_weights",
    "export_plan",
    "list_datasets",
    "list_metrics",
    "list_models",
    "list_presets",
    "list_rules",
    "list_schemes",
    "make_plan",
    "match_layers",
    "outline_data",
    "outline_model",
    "plan_by_rule",
    "plan_json",
    "plan_outline",
    "plan_schema",
    "plan_size",
    "planned_size",
    "prepare_trial",
    "preview_plan",
    "random_control",
    "random_twin",
    "read_curves",
    "read_diagnosis",
    "read_plan",
    "read_units",
    "rejudge",
    "resealed",
    "reset_weights",
    "resolve_data",
    "resolve_model",
    "sample_images",
    "snippet",
    "verify_weights",
    "write_diagnosis",
    "write_plan",
    "write_run",
]


def __getattr__(name: str) -> Any:
    """Import a verb from its home on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    verb = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = verb
    return verb
