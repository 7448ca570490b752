"""The present plan: the layers that are picked, or a plan that a rule made or a person loaded."""

from __future__ import annotations

import hashlib
import secrets
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import core
from core.errors import LimberError, PlanError
from core.plan.making import PlanSize
from core.records import Evidence, ModelOutline, Pattern, ReinitPlan
from dashboard.store.measurements import is_stale, latest_diagnosis
from dashboard.store.memo import Memo
from dashboard.store.own_runs import all_runs
from dashboard.store.runs import RunView
from dashboard.store.session import current
from dashboard.store.values import changed_at, data_outline, scheme_infos, size_of
from dashboard.store.workspace import Choice

# Plans of earlier runs that are offered for another one.
MOST_EARLIER = 12

_plans: Memo[ReinitPlan | None] = Memo(max_entries=24)
_digests: Memo[str] = Memo(max_entries=24)
_sizes: Memo[PlanSize] = Memo(max_entries=32)


def present_plan(outline: ModelOutline) -> ReinitPlan:
    """Return the present plan: one that a rule made or a person loaded, else the pick.

    Raises:
        PlanError: The core refuses it, for tied parameters for instance, or its file is gone.
    """
    picks = current().picks
    if picks.plan_file is None:
        return plan_from_picks(outline)
    path = current().folder / picks.plan_file

    def read() -> ReinitPlan:
        words = {"name": picks.name, "freeze": picks.freeze}
        return core.resealed(core.read_plan(path).model_copy(update=words))

    # Sealing hashes megabytes of companion, so it runs once per change, not once per rerun.
    plan = _plans.get((str(path), changed_at(str(path)), picks.name, picks.freeze), read)
    if plan is None:
        raise PlanError("The plan's file is gone. Make the plan again.")
    return plan


def plan_digest(plan: ReinitPlan) -> str:
    """Return the SHA-256 of a plan's JSON."""
    return hashlib.sha256(core.plan_json(plan).encode()).hexdigest()


def is_present_plan(run: RunView, outline: ModelOutline) -> bool:
    """Whether a fine-tune was started with the present plan."""
    try:
        return run.facts.get("plan_sha256") == plan_digest(present_plan(outline))
    except LimberError:
        return False


def earlier_plans(outline: ModelOutline) -> dict[str, ReinitPlan]:
    """Return plans that earlier runs of this network used or made, newest first, by a label.

    The present plan is left out, and so are those that cannot be read.
    """
    wanted = current().choice.model_key
    seen = {plan_digest(present_plan(outline))}
    found: dict[str, ReinitPlan] = {}
    for run in all_runs():
        path = run.folder / "plan.json"
        if run.kind not in ("finetune", "plan") or len(found) >= MOST_EARLIER:
            continue
        try:
            if Choice.model_validate(run.facts.get("choice", {})).model_key != wanted:
                continue
            key = (str(path), changed_at(str(path)), "", ())
            plan = _plans.get(key, partial(_read, path))
        except (LimberError, ValueError):
            continue
        if plan is None:
            continue
        # A plan of many units is megabytes of JSON: once for each file.
        digest = _digests.get(key, partial(plan_digest, plan))
        if digest in seen:
            continue
        seen.add(digest)
        when = time.strftime("%d %b %H:%M", time.localtime(run.created))
        found[f"{plan.name}, {when}"] = plan
    return found


def _read(path: Path) -> ReinitPlan | None:
    return core.read_plan(path) if path.is_file() else None


def plan_rule(outline: ModelOutline) -> str | None:
    """Return the name of the rule that made the present plan; None for one picked by hand."""
    picks = current().picks
    rule = picks.rule
    if rule is None and picks.plan_file is not None:
        with suppress(LimberError):
            rule = present_plan(outline).rule
    return None if rule is None else rule.name


def made_for_other_images(plan: ReinitPlan) -> bool:
    """Return whether a plan was chosen on other images than those that are chosen now."""
    seen = plan.evidence.data_fingerprint
    return seen is not None and seen != data_outline(current().choice).fingerprint


def plan_from_picks(outline: ModelOutline) -> ReinitPlan:
    """Return the picked layers as a plan.

    Raises:
        PlanError: The core refuses it, for tied parameters for instance.
    """
    picks = current().picks
    stored = latest_diagnosis()
    evidence = None
    if stored is not None and not is_stale(stored.diagnosis, current().choice):
        evidence = Evidence(
            diagnosis_sha256=hashlib.sha256(stored.path.read_bytes()).hexdigest(),
            data_fingerprint=stored.diagnosis.header.data_fingerprint,
        )
    known = {layer.name for layer in outline.layers}
    return core.make_plan(
        outline,
        tuple(name for name in picks.layers if name in known),
        scheme=picks.scheme,
        scheme_parameters=picks.scheme_parameters,
        seed=picks.seed,
        name=picks.name,
        patterns=pick_patterns(outline),
        freeze=picks.freeze,
        evidence=evidence,
        rule=picks.rule,
        resets_buffers=next(
            (info.resets_buffers for info in scheme_infos() if info.name == picks.scheme), True
        ),
    )


def pick_patterns(outline: ModelOutline) -> tuple[Pattern, ...]:
    """Return how the present pick came about: patterns that still match, then single names."""
    picks = current().picks
    chosen = set(picks.layers)
    kept: list[Pattern] = []
    covered: set[str] = set()
    for pattern in picks.patterns:
        try:
            names = set(core.match_layers(outline, pattern.text, syntax=pattern.syntax))
        except LimberError:
            continue
        if names <= chosen:
            kept.append(pattern)
            covered |= names
    singles = [Pattern(text=name, syntax="name") for name in picks.layers if name not in covered]
    return (*kept, *singles)


def pick_size(outline: ModelOutline) -> PlanSize:
    """Return what the present plan would touch."""
    picks = current().picks
    if picks.plan_file is None:
        return size_of(outline, picks.layers)
    path = str(current().folder / picks.plan_file)
    key = (path, changed_at(path), outline.backbone_sha256)
    return _sizes.get(key, lambda: core.planned_size(outline, present_plan(outline)))


def take_plan(plan: ReinitPlan) -> None:
    """Make a plan the present one; undo brings back the old one.

    Whole layers under one scheme and seed become a pick, which a person can change by hand. Any
    other plan stays as it is, and so does one that resets and freezes the same layer.
    """
    space = current()
    whole = all(target.granularity == "layer" and not target.entries for target in plan.targets)
    alike = {(target.scheme.model_dump_json(), target.seed) for target in plan.targets}
    first = plan.targets[0]
    space.change_picks(
        layers=tuple(target.layer for target in plan.targets),
        freeze=plan.freeze,
        patterns=_told_patterns(plan),
        name=plan.name,
        scheme=first.scheme.name,
        scheme_parameters=dict(first.scheme.parameters),
        seed=first.seed,
        rule=plan.rule,
        plan_file=None if whole and len(alike) == 1 and not plan.untrained else keep_plan(plan),
    )


def keep_plan(plan: ReinitPlan) -> str:
    """Write a plan into the workspace and return the file's path in its folder."""
    path = f"plans/{secrets.token_hex(8)}/plan.json"
    core.write_plan(plan, current().folder / path)
    return path


def _told_patterns(plan: ReinitPlan) -> tuple[Pattern, ...]:
    """Return the patterns of a plan that are matched again whenever the pick changes.

    They only record how the plan came about, and may be a stranger's: a thousand slow expressions
    would hold up the page.
    """
    slow = [pattern for pattern in plan.patterns if pattern.syntax == "regex"]
    quick = [pattern for pattern in plan.patterns if pattern.syntax in ("glob", "type")]
    return (*quick[:200], *slow[:4])


def plan_model(plan: ReinitPlan) -> str:
    """Return the name under which the choice finds the plan's network."""
    prefix = "" if plan.model.source == "embedded" else f"{plan.model.source}:"
    return f"{prefix}{plan.model.name}"
