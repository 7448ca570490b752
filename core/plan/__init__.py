"""A person's choice -> plan; plan <-> JSON.

The resolved list of names is the authority. Patterns are kept beside it as provenance and are
never looked at again, so a plan means the same on the day a library renames its layers: it then
fails by name instead of resetting something else.
"""

from __future__ import annotations

from core.catalogue.rules import RULES, RuleInfo, list_rules, rule_named, rule_options
from core.plan.algebra import compose_plans, diff_plans
from core.plan.control import random_control
from core.plan.making import (
    PlanSize,
    check_plan,
    checked_rates,
    last_blocks,
    make_plan,
    match_layers,
    model_identity,
    plan_size,
    planned_size,
    refuse_untrained,
    untrained_sentence,
)
from core.plan.reading import plan_schema, read_plan

__all__ = [
    "RULES",
    "PlanSize",
    "RuleInfo",
    "check_plan",
    "checked_rates",
    "compose_plans",
    "diff_plans",
    "last_blocks",
    "list_rules",
    "make_plan",
    "match_layers",
    "model_identity",
    "plan_schema",
    "plan_size",
    "planned_size",
    "random_control",
    "read_plan",
    "refuse_untrained",
    "rule_named",
    "rule_options",
    "untrained_sentence",
]
