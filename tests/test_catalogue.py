"""The tables: what an entry must have, what is refused by name, and that they need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core.catalogue.checks import PRESETS
from core.catalogue.metrics import METRICS, metric_names
from core.catalogue.rules import list_rules, rule_named, rule_options
from core.catalogue.schemes import SCHEMES, list_schemes, scheme_numbers
from core.edit.draws import DRAWS
from core.errors import PlanError
from tests.write_metrics import METRICS_FILE, metrics_text
from tests.write_rules import RULES_FILE, rules_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("scheme", "numbers", "message"),
    [
        ("fire", {"steps": 0}, "steps is 0. Give 1 to 1000"),
        ("dash", {"lambda": 2}, "lambda is 2. Give 0 to 1"),
        ("fire", {"turns": 1}, 'has no number "turns". It takes: steps, scale'),
    ],
)
def test_numbers_outside_their_range_are_refused(
    scheme: str, numbers: dict[str, float], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        scheme_numbers(scheme, numbers)


def test_every_scheme_is_listed_with_words_and_a_source() -> None:
    listed = list_schemes()

    assert [scheme.name for scheme in listed] == list(SCHEMES)
    assert listed[0].name == "architecture"
    assert all(scheme.title and scheme.description and scheme.source for scheme in listed)


def test_every_rule_is_listed_with_words_and_a_source() -> None:
    assert all(rule.title and rule.description and rule.source for rule in list_rules())
    assert list_rules()[0].name == "by-hand"


def test_the_page_of_rules_is_the_one_in_the_code() -> None:
    assert RULES_FILE.read_text(encoding="utf-8") == rules_text()


def test_the_page_of_metrics_and_rules_is_the_one_of_the_registries() -> None:
    assert METRICS_FILE.read_text(encoding="utf-8") == metrics_text()


def test_the_tables_are_read_without_torch() -> None:
    script = (
        "import json, sys\n"
        "from core.catalogue import checks, metrics, rules, schemes\n"
        "print(json.dumps([name for name in ('torch', 'numpy', 'timm') if name in sys.modules]))"
    )

    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert json.loads(answer.stdout) == []


def test_no_two_entries_of_a_table_share_a_name() -> None:
    tables = {
        "metrics": [metric.name for metric in METRICS],
        "rules": [rule.name for rule in list_rules()],
        "presets": [preset.name for preset in PRESETS],
        **{preset.name: [check.name for check in preset.checks] for preset in PRESETS},
    }

    twice = {
        table: [name for name, count in Counter(names).items() if count > 1]
        for table, names in tables.items()
    }

    assert not any(twice.values()), twice


def test_every_check_looks_at_a_metric_of_layers_there_is() -> None:
    looked_at = {check.metric for preset in PRESETS for check in preset.checks}

    assert looked_at <= set(metric_names("layer"))


def test_every_scheme_has_its_draw_and_every_draw_its_scheme() -> None:
    assert DRAWS.keys() == SCHEMES.keys()


def test_every_rule_writes_a_scheme_that_takes_what_it_selects() -> None:
    for rule in list_rules():
        allowed = SCHEMES[rule.scheme].granularities
        assert set(allowed) == {"layer", "unit", "weight"} or rule.granularity in allowed


@pytest.mark.parametrize("rule", [rule.name for rule in list_rules()])
def test_options_of_a_rule_are_its_defaults_unless_they_are_given(rule: str) -> None:
    info = rule_named(rule)
    needed: dict[str, float | str | None] = {
        key: "weight_l2" if key == "metric" else 0.5
        for key, default in info.options.items()
        if default is None
    }

    chosen = rule_options(info, needed)

    assert chosen == {**info.options, **needed}
    assert rule_options(info, {**needed, **dict.fromkeys(info.options, None), **needed}) == chosen


@pytest.mark.parametrize(
    ("rule", "given", "says"),
    [
        ("cbp", {"tau": 1.0}, 'takes no "tau". It takes "percent"'),
        ("by-hand", {"percent": 1.0}, 'takes no "percent". It takes no options'),
        ("swr", {"utility": "age"}, 'must be gradient or magnitude or random; it is "age"'),
        ("gxd", {"percent": -1.0}, "must be a number from 0 to 100; it is -1"),
        ("redo", {"threshold": -0.1}, "is never below 0"),
        ("redo", {"threshold": float("nan")}, "must be a finite number; it is nan"),
        ("threshold", {"metric": "weight_l2"}, 'needs a "threshold"'),
    ],
)
def test_options_a_rule_does_not_take_are_refused_by_name(
    rule: str, given: dict[str, float | str | None], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        rule_options(rule_named(rule), given)
