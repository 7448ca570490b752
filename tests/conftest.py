"""What every test gets."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from dashboard.store.runs import RunQueue

# Read by torch and numpy when they load, here and in the workers that a test starts. Setting the
# threads through torch would import it for tests that do without. Tests that run side by side
# share the cores, and each inherits what the process that started it set here for itself: two
# threads each on two cores wait for one another, and a test took up to twenty times as long.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ[_variable] = "1"
    else:
        os.environ.setdefault(_variable, "2")

# A time limit for a single example fails on a busy machine and shows nothing. CI takes the same
# examples every time: it judges a change, and whoever works here looks for new ones.
settings.register_profile("limber", settings.default, deadline=None, derandomize="CI" in os.environ)
settings.load_profile("limber")


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    """Start every test from the same random state, so that its outcome knows no order."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def limber_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that takes the place of the user's own."""
    home = tmp_path / "limber"
    home.mkdir()
    monkeypatch.setenv("LIMBER_HOME", str(home))
    return home


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: arguments to exit code, stdout and stderr."""
    from core.cli import main

    def typed(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return typed


@pytest.fixture
def fresh_queue(limber_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    """A queue of this test alone, empty at its end."""
    from dashboard.store import runs
    from tests.pages import wait_until

    queue = runs.RunQueue()
    monkeypatch.setattr(runs, "queue", queue)
    yield queue
    for run in queue.live():
        queue.stop(run.id)
    wait_until(lambda: not queue.live())


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the worker by one that does what it is told."""
    from dashboard.store.runs import RunQueue
    from tests.pages import WORKER

    def set_act(act: str) -> None:
        def launch(argv: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-c", WORKER.format(act=act), *argv],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

        monkeypatch.setattr(RunQueue, "_launch", staticmethod(launch))

    return set_act
