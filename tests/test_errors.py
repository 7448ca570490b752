"""Errors state a fact; each face says in its own words what can be done about it."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import pickle
import re
import shlex
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import core
from core import errors as errors_room
from core.catalogue.rules import RULES, rule_option_names
from core.cli import _parser, remedies
from core.cli.events import Events
from core.errors import (
    LimberError,
    OptionError,
    PlanError,
    Remedy,
    Stopped,
    error_told,
    told,
)
from dashboard import words
from dashboard.store import inspection
from dashboard.store.run_folder import Run, RunView, read_events

ROOT = Path(__file__).resolve().parent.parent
OPTION = re.compile(r"--[a-z][a-z-]*")
COMMAND = re.compile(r"python -m core (.+?)\.?$")
LABEL = re.compile(r'"([^"]+)"')
# What a raise may not hold: an option, also one that is put together, or a command.
OF_THE_COMMAND_LINE = re.compile(r"(?<![\w-])--(?:[a-z]|$)|python -m core|\blist [a-z]+s\.")
# timm's own training script has options, which the snippet for it shows.
OF_ANOTHER_PROGRAM = ROOT / "core" / "files" / "snippets.py"
NEEDS_OPTION = (Remedy.GIVE_OPTION, Remedy.OTHER_OPTION, Remedy.NO_OPTION)


def errors() -> list[LimberError]:
    """Every remedy as an error names it, those about an option once for every option."""
    options = sorted({name for rule in RULES for name in rule.options})
    plain = [
        PlanError("A fact.", remedy, **({"kind": "CIFAR10"} if "set" in remedy else {}))
        for remedy in Remedy
        if remedy not in NEEDS_OPTION
    ]
    return plain + [
        PlanError("A fact.", remedy, option=option) for remedy in NEEDS_OPTION for option in options
    ]


def name_of(error: LimberError) -> str:
    return " ".join((str(error.remedy), *error.values.values()))


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The command line's commands by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def options_of_commands() -> set[str]:
    return {
        option
        for parser in parsers().values()
        for action in parser._actions
        for option in action.option_strings
    }


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """The strings of a file, without docstrings and without descriptions of fields."""
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            silent.add(id(node.value))
        elif isinstance(node, ast.keyword) and node.arg == "description":
            silent.update(id(part) for part in ast.walk(node.value))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in silent:
            continue
        if isinstance(node.value, str):
            yield node


def labels_of_the_dashboard() -> set[str]:
    """Every string of the dashboard's code, but for the table of the pages' words itself."""
    found: set[str] = set()
    for path in sorted((ROOT / "dashboard").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tables = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "WAYS"
            for part in ast.walk(node)
        }
        found |= {text.value for text in texts(tree) if id(text) not in tables}
    return found


# The fields of rules are named in the catalogue.
LABELS = labels_of_the_dashboard() | {option.label for option in rule_option_names().values()}
LABELS_NAMED = sorted({label for way in words.WAYS.values() for label in LABEL.findall(way)})


# Two faces


@pytest.mark.parametrize("error", errors(), ids=name_of)
def test_the_command_line_names_options_and_commands_that_it_has(error: LimberError) -> None:
    said = remedies.sentence(error)

    way = said.removeprefix("A fact. ")
    assert way.endswith(".")
    assert way not in ("", said)
    assert "{" not in way
    assert set(OPTION.findall(way)) <= options_of_commands()
    for command in COMMAND.findall(way):
        name, *rest = shlex.split(command)
        choices = [action.choices for action in parsers()[name]._actions if action.choices]
        typed = [word for word in rest if not word.startswith("-")]
        assert name != "list" or typed[0] in choices[0]


@pytest.mark.parametrize("error", errors(), ids=name_of)
def test_the_pages_name_controls_that_they_have(error: LimberError) -> None:
    said = words.sentence(error)

    way = said.removeprefix("A fact. ")
    assert way.endswith(".")
    assert way not in ("", said)
    assert "{" not in way
    assert set(LABEL.findall(way)) <= LABELS
    assert OF_THE_COMMAND_LINE.search(way) is None


@pytest.mark.parametrize("sentence", [remedies.sentence, words.sentence])
def test_an_error_without_a_remedy_is_the_same_on_both_faces(sentence: object) -> None:
    assert callable(sentence)

    said = sentence(PlanError("The plan is empty. Pick a layer."))

    assert said == "The plan is empty. Pick a layer."


def test_both_tables_have_every_remedy() -> None:
    assert set(remedies.WAYS) == set(words.WAYS) == set(Remedy)


# What the core says


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((ROOT / "core").rglob("*.py"))
        if path.parent.name != "cli" and path != OF_ANOTHER_PROGRAM
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_text_of_the_core_names_an_option_a_command_or_a_control(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    guilty = [
        f"line {text.lineno}: {text.value}"
        for text in texts(tree)
        if OF_THE_COMMAND_LINE.search(text.value)
        or any(f'"{label}"' in text.value for label in LABELS_NAMED if label != "{field}")
    ]

    assert guilty == []


@pytest.mark.parametrize(
    "source",
    [
        'raise PlanError("No images. Give --data.")',
        'raise PlanError(f"--{key} is odd.")',
        'raise PlanError("Unknown. See python -m core list rules.")',
        "raise PlanError('Switch on \"Random weights\".')",
    ],
)
def test_a_text_that_only_one_face_can_follow_would_be_noticed(source: str) -> None:
    found = [text.value for text in texts(ast.parse(source))]

    assert any(
        OF_THE_COMMAND_LINE.search(text) or any(f'"{label}"' in text for label in LABELS_NAMED)
        for text in found
    )


def test_a_library_user_reads_the_fact_and_below_it_the_remedy() -> None:
    error = PlanError(
        'The rule "redo" needs a "threshold".', Remedy.GIVE_OPTION, option="threshold"
    )

    shown = "".join(traceback.format_exception(error))

    assert str(error) == 'The rule "redo" needs a "threshold".'
    assert shown.endswith("\nRemedy: give-the-option (option: threshold)\n")


def test_an_error_survives_the_way_between_processes() -> None:
    error = PlanError("A fact.", Remedy.GIVE_OPTION, option="percent")

    copy = pickle.loads(pickle.dumps(error))

    assert (copy.fact, copy.remedy, copy.values) == (error.fact, error.remedy, error.values)
    assert copy.__notes__ == error.__notes__


# From one process to another


@pytest.mark.parametrize("error", errors(), ids=name_of)
def test_an_error_that_is_told_comes_back_with_its_remedy(error: LimberError) -> None:
    line = json.dumps(told(error, remedies.sentence(error)))

    back = error_told(json.loads(line))

    assert words.sentence(back) == words.sentence(error)
    assert json.loads(line)["message"] == remedies.sentence(error)


@pytest.mark.parametrize(
    "event",
    [
        {"message": "The whole sentence."},
        {
            "message": "The whole sentence.",
            "fact": "A fact.",
            "remedy": "of-tomorrow",
            "values": {},
        },
        {"message": "The whole sentence.", "fact": 3, "remedy": "list-rules", "values": {}},
        {"message": "The whole sentence.", "fact": "A fact.", "remedy": "list-rules"},
    ],
    ids=["older", "newer", "no fact", "no values"],
)
def test_what_another_version_told_is_shown_as_it_was_told(event: dict[str, object]) -> None:
    said = words.sentence(error_told(event))

    assert said == "The whole sentence."


def test_an_option_that_was_not_told_leaves_the_fact() -> None:
    event = {
        "message": "The whole sentence.",
        "fact": "A fact.",
        "remedy": "give-the-option",
        "values": {"fact": "odd", "self": "odd"},
    }

    said = words.sentence(error_told(event))

    assert said == "A fact."


def run_in(folder: Path) -> Run:
    view = RunView(id="r", kind="plan", state="running", folder=folder, facts={}, created=0.0)
    return Run(view=view, argv=())


def test_a_failed_command_hands_its_remedy_to_the_page(
    run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    events = tmp_path / "events.jsonl"

    code, _, err = run(
        *("measure", "--model", "tf_efficientnet_lite0", "--data", "pneumonia", "--samples", 2),
        *("--device", "cuda", "--out", tmp_path / "out.json", "--events", events),
    )

    watched = run_in(tmp_path)
    read_events(watched)
    assert code == 2
    assert err == "limber: There is no CUDA device on this machine. Use --device auto or cpu.\n"
    assert watched.error == (
        'There is no CUDA device on this machine. Take auto or cpu as the "Device".'
    )


def test_a_failed_command_of_an_older_version_is_shown_as_it_was_told(tmp_path: Path) -> None:
    event = {"event": "error", "t": 1.0, "message": "No CUDA. Use --device auto or cpu."}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")

    watched = run_in(tmp_path)
    read_events(watched)

    assert watched.error == "No CUDA. Use --device auto or cpu."


def test_the_events_of_a_refusal_still_hold_the_whole_sentence(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    error = OptionError("It cannot be written.", Remedy.OTHER_PLACE)

    with Events(path, None, terminal=False) as events:
        events.emit("error", **told(error, remedies.sentence(error)))

    (row,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert row["message"] == "It cannot be written. Choose another place with --out."
    assert row["remedy"] == "choose-other-place"


def test_the_worker_that_opens_files_hands_its_remedy_to_the_page(tmp_path: Path) -> None:
    with pytest.raises(LimberError) as caught:
        inspection.inspect(["--model", "no_such_network"], files=[])

    assert caught.value.remedy is Remedy.LIST_MODELS
    assert words.sentence(caught.value).endswith(words.WAYS[Remedy.LIST_MODELS])


# One family


FAMILY = [
    value
    for value in vars(errors_room).values()
    if inspect.isclass(value) and issubclass(value, Exception)
]


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_every_error_is_of_the_family_and_says_when_it_is_raised(error: type[Exception]) -> None:
    assert issubclass(error, LimberError)
    assert error.__doc__


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_the_command_line_says_an_error_in_one_line_and_ends_with_its_code(
    error: type[LimberError],
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error('There is no "x\ny". Check the path.')

    monkeypatch.setattr(core, "read_plan", broken)
    plan = tmp_path / "plan.json"
    plan.write_text("{}")

    code, out, err = run("diff", plan, plan)

    assert code == (0 if error is Stopped else 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.endswith("Check the path.\n")
