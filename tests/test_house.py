"""Rules of the house that no linter sees."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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


def readme_command(kind: str) -> str:
    """The text of the fenced block that follows the marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- {kind}-command -->.*?\n```\w*\n(.*?)\n```", text, re.DOTALL)
    assert block is not None, f"README.md has no fenced block after <!-- {kind}-command -->."
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
    command = readme_command(kind)

    assert command.strip()
    assert "\n" not in command


def test_ci_runs_the_test_command_of_the_readme() -> None:
    shown = subprocess.run(
        ["bash", ".ci/run", "--show"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout

    assert shown.strip() == readme_command("test").strip()


def test_the_dashboard_listens_on_this_machine_only() -> None:
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))

    assert config["server"]["address"] == "127.0.0.1"
