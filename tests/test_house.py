"""Rules of the house that no linter sees."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

SIZE_LIMIT_BYTES = 63_000_000

MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:root|home|Users|work)/[\w.]")


def house_files() -> list[Path]:
    """Every tracked file, and every new one that git does not ignore."""
    # The setting lets git read a clone that another user made, as some CI machines do.
    listing = subprocess.run(
        [
            *("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"),
            *("--cached", "--others", "--exclude-standard"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    paths = (ROOT / name.decode() for name in sorted(set(listing.split(b"\0"))) if name)
    return [path for path in paths if path.is_file()]


def readme_block(kind: str) -> str:
    """The text of the fenced block that follows the marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- {kind} -->.*?\n```\w*\n(.*?)\n```", text, re.DOTALL)
    assert block is not None, f"README.md has no fenced block after <!-- {kind} -->."
    return block[1]


@pytest.mark.parametrize("heavy", ["streamlit", "torch"])
def test_importing_core_loads_nothing_heavy(heavy: str) -> None:
    script = "import sys, json, core; print(json.dumps(sorted(sys.modules)))"

    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert heavy not in json.loads(answer.stdout)


def test_no_dashboard_file_imports_torch() -> None:
    importing = re.compile(r"^\s*(?:import|from)\s+torch\b", re.MULTILINE)

    guilty = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "dashboard").rglob("*.py"))
        if importing.search(path.read_text(encoding="utf-8"))
    ]

    assert guilty == []


def test_every_module_is_named_after_its_subject() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager"}

    guilty = [
        str(path.relative_to(ROOT))
        for path in house_files()
        if path.suffix == ".py"
        and vague & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]

    assert guilty == []


def test_no_file_holds_a_path_of_one_machine() -> None:
    guilty = {
        str(path.relative_to(ROOT)): found[0].decode()
        for path in house_files()
        if (found := MACHINE_PATH.search(path.read_bytes()))
    }

    assert guilty == {}


def test_the_repository_stays_small() -> None:
    total_bytes = sum(path.stat().st_size for path in house_files())

    assert total_bytes < SIZE_LIMIT_BYTES


@pytest.mark.parametrize("kind", ["run", "test"])
def test_readme_gives_each_command_as_one_line(kind: str) -> None:
    command = readme_block(f"{kind}-command")

    assert command.strip()
    assert "\n" not in command


def test_ci_runs_the_test_command_of_the_readme() -> None:
    shown = subprocess.run(
        ["bash", ".ci/run", "--show"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout

    assert shown.strip() == readme_block("test-command").strip()


def test_the_dashboard_listens_on_this_machine_only() -> None:
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))

    assert config["server"]["address"] == "127.0.0.1"


def test_the_readmes_python_example_runs(tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(readme_block("python-example"), encoding="utf-8")

    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("parameters are new")
    assert (tmp_path / "export" / "apply_plan.py").is_file()


# Rooms: every one has a contract, a line in the map and a test file.

FACES = ("core", "dashboard")


def rooms_of(package: str) -> list[str]:
    """The modules and folders directly in a package, without `__main__` and the like."""
    inside = (ROOT / package).iterdir()
    return sorted(
        path.stem
        for path in inside
        if not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").is_file())
    )


def modules_of(package: str) -> list[str]:
    """Every module below a package by its path there, folders of modules included."""
    folder = ROOT / package
    return sorted(
        f"{path.parent.relative_to(folder)}/"
        if path.name == "__init__.py"
        else str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if path.parent != folder or not path.name.startswith("_")
    )


def contracts() -> list[dict[str, Any]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = settings["tool"]["importlinter"]["contracts"]
    return found


@pytest.mark.parametrize("package", FACES)
def test_every_room_stands_in_the_layers_of_its_contract(package: str) -> None:
    (layers,) = (
        contract
        for contract in contracts()
        if contract["type"] == "layers" and contract["containers"] == [package]
    )

    named = sorted(room for line in layers["layers"] for room in line.replace("|", " ").split())

    assert named == rooms_of(package)
    # Exhaustive contracts fail on a room that is left out, whoever runs them.
    assert layers["exhaustive"] is True
    assert layers.get("exhaustive_ignores", []) == (["__main__"] if package == "core" else [])


def mapped(package: str) -> list[str]:
    """The paths in the first table of a package's README, in the order of `modules_of`."""
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    rows = text.partition("| room |")[2].partition("\n\n")[0].splitlines()[2:]
    paths, room = [], ""
    for row in rows:
        line = re.match(r"\| ((?:&emsp;)*)`([^`]+)` \| \S", row)
        assert line is not None, row
        if not line[1]:
            room = line[2]
        paths.append(f"{room}{line[2]}" if line[1] else room)
    return paths


@pytest.mark.parametrize("package", FACES)
def test_every_room_and_module_has_one_line_in_the_map(package: str) -> None:
    paths, modules = mapped(package), modules_of(package)

    missing = sorted(set(modules) - set(paths))
    assert missing == [], f"Give each a line in the table of rooms in {package}/README.md."
    assert sorted(paths) == sorted(modules), (
        f"{package}/README.md names what is not there, or twice."
    )


@pytest.mark.parametrize("package", FACES)
def test_every_room_has_a_test_file_of_its_name(package: str) -> None:
    files = [path.stem for path in (ROOT / "tests").glob("test_*.py")]

    without = [
        room
        for room in rooms_of(package)
        if not any(file == f"test_{room}" or file.startswith(f"test_{room}_") for file in files)
    ]

    assert without == []


# The catalogue: an entry is the whole of a thing.

VECTORS = ROOT / "assets" / "conformance"


def entries_of_the_catalogue() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Kind, name, the texts that a person reads, and the source of every entry."""
    from core.catalogue.attributions import METHODS
    from core.catalogue.checks import PRESETS
    from core.catalogue.metrics import METRICS
    from core.catalogue.rules import RULES
    from core.catalogue.schemes import SCHEMES

    rows: list[tuple[str, str, tuple[str, ...], str]] = []
    for method in METHODS:
        helps = (method.title, method.reads, method.formula, method.applies_to)
        rows.append(("attribution", method.name, helps, method.source))
    for metric in METRICS:
        helps = (metric.title, metric.formula, metric.applies_to, metric.reads, metric.advice)
        rows.append(("metric", metric.name, helps, metric.source))
    for preset in PRESETS:
        for check in preset.checks:
            helps = (preset.title, preset.description, check.says)
            rows.append(("check", check.name, helps, check.source))
    for rule in RULES:
        rows.append(("rule", rule.name, (rule.title, rule.description), rule.source))
    for scheme in SCHEMES.values():
        rows.append(("scheme", scheme.name, (scheme.title, scheme.description), scheme.source))
    return rows


COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COUNTS += ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen")
COUNTS += ("eighteen", "nineteen", "twenty", "twenty-one", "twenty-two", "twenty-three")


def test_the_readme_counts_the_schemes_as_they_are() -> None:
    from core.catalogue.schemes import SCHEMES

    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert f"{COUNTS[len(SCHEMES)].capitalize()} schemes" in readme, (
        f'README.md, section "Plans": there are {len(SCHEMES)} schemes now.'
    )


def test_every_entry_of_the_catalogue_has_help_and_a_source() -> None:
    entries = entries_of_the_catalogue()

    lacking = [name for _, name, helps, source in entries if not (all(helps) and source)]

    assert {kind for kind, *_ in entries} == {"attribution", "metric", "check", "rule", "scheme"}
    assert lacking == []


def test_every_rule_and_scheme_has_a_conformance_vector() -> None:
    vectors = [json.loads(path.read_text(encoding="utf-8")) for path in VECTORS.glob("*.json")]
    shown = {(vector["kind"], vector["of"]) for vector in vectors}

    lacking = [
        (kind, name)
        for kind, name, *_ in entries_of_the_catalogue()
        if kind in ("rule", "scheme") and (kind, name) not in shown
    ]

    assert lacking == []


# Docstrings of public functions: shapes, errors, sources.

# "(n, 3, h, w)", "(units,)" and the like, or a word that says it.
SHAPES = re.compile(r"\([\w /*.+'|-]*,[\w ,/*.+'|-]*\)|\bshapes?\b|\bscalar\b")
ARRAYS = re.compile(r"\b(?:Tensor|ndarray|State|Batches)\b")
WITH_SHAPES = re.compile(r"\b(?:Float|Int|UInt8|Bool|Shaped)\[\w+, ['\"]")
# Functions that are a paper's method, or the part of it that carries its name.
METHODS = (
    ("core/edit/draws.py", "newton_schulz"),
    ("core/edit/draws.py", "dash_factors"),
    ("core/measure/features.py", "linear_cka"),
    ("core/measure/features.py", "logme"),
    ("core/measure/utility.py", "UnitFigures.replacement_cost"),
    ("core/measure/utility.py", "entries_below_mean"),
    ("core/measure/utility.py", "lowest_entries"),
    ("core/measure/utility.py", "summed_gradients"),
    ("core/network/connections/wiring.py", "Connections.contributions"),
    ("core/network/connections/wiring.py", "Connections.shifts"),
    ("core/plan/making.py", "last_blocks"),
    ("core/reductions.py", "dormant_score"),
    ("core/reductions.py", "effective_rank"),
    ("core/reductions.py", "isometry_distance"),
    ("core/reductions.py", "power_law_alpha"),
    ("core/reductions.py", "rank_for"),
    ("core/reductions.py", "stable_rank"),
)


def public_functions() -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Each public function and method of core: its file, its name, and how it is written."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                yield prefix + child.name, child
            elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from inside(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try):
                yield from inside(child, prefix)

    for path in sorted((ROOT / "core").rglob("*.py")):
        for name, function in inside(ast.parse(path.read_text(encoding="utf-8")), ""):
            yield str(path.relative_to(ROOT)), name, function


def docstring(function: ast.FunctionDef) -> str:
    return ast.get_docstring(function) or ""


def tensors_in_signature(function: ast.FunctionDef) -> list[str]:
    """The annotations that hold tensors or arrays and do not give their shapes themselves."""
    given = function.args
    arguments = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
    written = [each.annotation for each in arguments if each is not None and each.annotation]
    written += [function.returns] if function.returns is not None else []
    texts = [ast.unparse(annotation) for annotation in written]
    return [text for text in texts if ARRAYS.search(text) and not WITH_SHAPES.search(text)]


def errors_raised(function: ast.FunctionDef) -> set[str]:
    """The errors of core that a function raises in its own lines."""
    from core import errors

    known = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LimberError)
    }
    raised = {
        node.exc.func.id
        for node in ast.walk(function)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }
    return raised & known


def test_what_takes_or_returns_tensors_says_their_shapes() -> None:
    lacking = [
        f"{path}: {name}"
        for path, name, function in public_functions()
        if tensors_in_signature(function) and not SHAPES.search(docstring(function))
    ]

    assert lacking == []


def test_what_raises_an_error_of_ours_says_so() -> None:
    lacking = [
        f"{path}: {name}"
        for path, name, function in public_functions()
        if errors_raised(function) and "Raises:" not in docstring(function)
    ]

    assert lacking == []


def test_a_papers_method_names_its_paper() -> None:
    functions = {(path, name): function for path, name, function in public_functions()}

    lacking = [
        place
        for place in METHODS
        if place not in functions
        or not re.search(r"^Source:\n {4}\S", docstring(functions[place]), re.MULTILINE)
    ]

    assert lacking == []


def test_a_paper_is_named_under_source_alone() -> None:
    cited = re.compile(r"\bet al\.|arXiv:")

    beside = [
        f"{path}: {name}"
        for path, name, function in public_functions()
        if cited.search(docstring(function).partition("Source:\n")[0])
    ]

    assert beside == []
