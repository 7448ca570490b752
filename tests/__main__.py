"""Every check in one command: `python -m tests [--fast] [pytest arguments]`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.browser import BrowserMissingError, ensure_chromium

ROOT = Path(__file__).resolve().parent.parent

CHECKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ruff check", ("-m", "ruff", "check", ".")),
    ("ruff format", ("-m", "ruff", "format", "--check", ".")),
    # The command lint-imports, started so that it is found without the environment on PATH.
    (
        "import-linter",
        ("-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-logo"),
    ),
    ("mypy", ("-m", "mypy")),
)

# A process a core, four at most: each holds torch and a network or two. The tests of a file stay
# together, because they share what their fixtures made. Files come in the order of their names:
# by their number of tests, the browser's few and long ones would come last, with a core idle.
IN_PARALLEL = (
    *("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"),
)


def main(arguments: list[str]) -> int:
    """Run the checks and then pytest; return 0 only when all of them passed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests",
        description="Run the linters, the import map, the types and then all tests.",
        epilog="Any other argument is passed on to pytest.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fast", action="store_true", help="leave out the tests that need a browser"
    )
    options, for_pytest = parser.parse_known_args(arguments)
    if options.fast and os.environ.get("CI"):
        parser.error("--fast is for local work; CI runs every test.")

    passed = {title: _run(title, command) for title, command in CHECKS}
    if options.fast:
        for_pytest = ["-m", "not browser", *for_pytest]
    else:
        passed["chromium"] = _chromium()

    # Pytest comes last, so that its closing line is the last of the run.
    print("\n== Before the tests ==")
    for title, good in passed.items():
        print(f"{'passed' if good else 'FAILED'}  {title}")
    passed["pytest"] = _run("pytest", ("-m", "pytest", *IN_PARALLEL, *for_pytest), timed=False)
    return 0 if all(passed.values()) else 1


def _run(title: str, command: tuple[str, ...], *, timed: bool = True) -> bool:
    print(f"\n== {title} ==", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if timed:
        print(f"{title}: {time.perf_counter() - began:.1f} s", flush=True)
    return code == 0


def _chromium() -> bool:
    print("\n== chromium ==", flush=True)
    began = time.perf_counter()
    try:
        print(ensure_chromium())
    except BrowserMissingError as error:
        print(error)
        return False
    print(f"chromium: {time.perf_counter() - began:.1f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
