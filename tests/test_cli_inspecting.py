"""Files from elsewhere are opened within limits: the command, its limits, the pages' worker."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import core
from core.errors import LimberError
from core.records import DataOutline, Preprocessing
from dashboard import store
from dashboard.store import inspection, uploads
from dashboard.store import workspace as workspace_room
from dashboard.store.runs import RunView

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]


# --- the command ----------------------------------------------------------------------------


def test_inspect_says_what_the_library_says(run: Run) -> None:
    code, out, _ = run(
        *("inspect", "--data", "pneumonia", "--images", 2, "--image-size", 32, "--json"),
    )

    found = json.loads(out)
    spec = core.resolve_data("pneumonia")
    assert code == 0
    assert DataOutline.model_validate_json(json.dumps(found["data"])) == core.outline_data(spec)
    shown = [inspection.sample_image(image) for image in found["images"]]
    sized = Preprocessing(image_size=32, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3)
    assert shown == list(core.sample_images(spec, sized, count=2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "There is nothing to inspect."),
        (["--data", "pneumonia", "--memory-mb", "1"], "give at least 256"),
        (["--data", "pneumonia", "--seconds", "0"], "give at least 1"),
        (["--data", "pneumonia", "--images", "65"], "--images from 1 to 64"),
        (["--data", "no/such.zip"], "neither an embedded set"),
        (["--plan", "no/such.json"], "cannot be read"),
        (["--plan", "no/such.json", "--companion", "no/such"], "cannot be read"),
    ],
)
def test_inspect_refuses_bad_input_in_one_line(run: Run, arguments: list[str], says: str) -> None:
    code, out, err = run("inspect", *arguments)

    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err


def test_large_pictures_are_made_small_for_a_page(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (1500, 900), (i, 0, 0)).save(tmp_path / name / f"{i}.png")

    code, out, _ = run("inspect", "--data", tmp_path, "--images", 1, "--json")

    shown = inspection.sample_image(json.loads(out)["images"][0])
    assert code == 0
    assert shown.original_size == (1500, 900)
    assert max(Image.open(io.BytesIO(shown.original_png)).size) == 512


# --- the pages' worker ----------------------------------------------------------------------


def _command(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_a_worker_ends_with_the_page_that_waits_for_it(tmp_path: Path) -> None:
    class Gone(BaseException):
        """What Streamlit raises in a script whose page is gone."""

    started = tmp_path / "pids"

    def beat() -> None:
        if started.exists() and started.read_text().count("\n") == 2:
            raise Gone

    token = inspection.pulse.set(beat)
    # The worker and one below it, as a data loader is.
    script = (
        "import os, subprocess, sys, time\n"
        f"say = open({str(started)!r}, 'a')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "say.write(f'{os.getpid()}\\n{child.pid}\\n'); say.close(); time.sleep(60)\n"
    )
    try:
        with tempfile.TemporaryFile() as out, pytest.raises(Gone):
            inspection._run(_command(script), out, out)
    finally:
        inspection.pulse.reset(token)

    deadline = time.monotonic() + 10
    for pid in map(int, started.read_text().split()):
        while _alive(pid):
            assert time.monotonic() < deadline, "a worker outlived its page"
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "import sys; print('warned', file=sys.stderr); sys.exit('limber: It is no zip.')",
            "could not be opened",
        ),
        (
            "import sys; print('limber: It is no zip.', file=sys.stderr); sys.exit(2)",
            "It is no zip.",
        ),
        ("import os; os.abort()", "made to fill the memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "2,100 MB"),
        ("raise ValueError('secret')", "could not be opened"),
        ("import sys; sys.exit(2)", "could not be opened"),
        ("import time; time.sleep(60)", "not open after 0 seconds"),
    ],
)
def test_however_a_worker_ends_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    monkeypatch.setenv(inspection.MEMORY_VARIABLE, "2100")
    if "sleep" in script:
        monkeypatch.setattr(inspection, "SECONDS", 0)
        monkeypatch.setattr(inspection, "GRACE_S", 0.2)
    real = inspection._run
    monkeypatch.setattr(
        inspection, "_run", lambda command, out, err: real(_command(script), out, err)
    )

    with pytest.raises(LimberError) as caught:
        inspection.inspect(["--data=x"], files=[Path("some/x.zip")])

    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_gets_memory_by_the_size_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(inspection.MEMORY_VARIABLE, raising=False)
    monkeypatch.setattr(inspection, "_machine_mb", lambda: 64 * 1024)
    file = tmp_path / "weights.pth"
    with file.open("wb") as sparse:
        sparse.truncate(100 * 2**20)

    alone = inspection.memory_mb([])
    with_file = inspection.memory_mb([file, tmp_path / "gone", tmp_path])
    monkeypatch.setattr(inspection, "_machine_mb", lambda: 2048)
    on_a_small_machine = inspection.memory_mb([file])
    monkeypatch.setenv(inspection.MEMORY_VARIABLE, "9000")

    assert with_file == alone + 100 * inspection.TIMES_FILE
    assert on_a_small_machine == 1536
    assert inspection.memory_mb([file]) == 9000


# --- uploads --------------------------------------------------------------------------------


@pytest.fixture
def space(limber_home: Path) -> workspace_room.Workspace:
    return workspace_room.workspace("0123456789abcdef")


def _kept(space: workspace_room.Workspace) -> set[str]:
    return {path.name for path in (space.folder / "uploads").glob("*/*/*")}


def _upload(
    space: workspace_room.Workspace, name: str, *, taken: bool, content: bytes = b""
) -> Path:
    with store.upload(space, "data", name, memoryview(content or name.encode())) as path:
        assert path.read_bytes() == (content or name.encode())
        if taken:
            space.choose(data=str(path))
    return path


def test_a_refused_upload_leaves_nothing_and_an_accepted_one_replaces_the_last(
    space: workspace_room.Workspace,
) -> None:
    _upload(space, "first.zip", taken=True)
    _upload(space, "refused.zip", taken=False)
    after_refusal = _kept(space)
    _upload(space, "second.zip", taken=True)

    assert after_refusal == {"first.zip"}
    assert _kept(space) == {"second.zip"}


def test_an_upload_whose_trial_fails_altogether_is_removed(
    space: workspace_room.Workspace,
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        store.upload(space, "checkpoint", "x.pth", memoryview(b"x")),
    ):
        raise KeyboardInterrupt

    assert _kept(space) == set()


def test_what_a_run_reads_or_another_page_looks_at_is_not_removed(
    space: workspace_room.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _upload(space, "read.zip", taken=True)
    run = RunView(
        id="measure-20261123-010000-aaaa",
        kind="measure",
        state="running",
        folder=space.folder,
        facts={"choice": space.choice.model_dump(mode="json")},
        created=0.0,
    )
    monkeypatch.setattr(uploads.runs.queue, "live", lambda: (run,))
    with store.upload(space, "data", "open.zip", memoryview(b"open")):
        _upload(space, "new.zip", taken=True)
        during = _kept(space)
    monkeypatch.setattr(uploads.runs.queue, "live", tuple)
    _upload(space, "newer.zip", taken=True)

    assert during == {"read.zip", "open.zip", "new.zip"}
    assert _kept(space) == {"newer.zip"}
    assert not read.exists()


def test_the_same_upload_is_the_same_choice_again(space: workspace_room.Workspace) -> None:
    first = _upload(space, "a.zip", taken=True, content=b"same")
    _upload(space, "b.zip", taken=True, content=b"other")
    again = _upload(space, "a.zip", taken=True, content=b"same")

    assert again == first


@pytest.mark.parametrize(
    "name",
    ["../../x.zip", "/etc/x.zip", ".hidden", "", "a\u202eb\x1b.zip", "n" * 999, "..", "C:\\x"],
)
def test_the_name_of_an_upload_leads_nowhere_else(
    space: workspace_room.Workspace, name: str
) -> None:
    path = _upload(space, name, taken=True, content=b"x")

    assert path.parent.parent == space.folder / "uploads" / "data"
    assert len(path.name) <= uploads.NAME_LETTERS
    assert path.name.isascii()


def test_an_upload_that_the_disk_does_not_take_is_one_sentence(
    space: workspace_room.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)

    with pytest.raises(LimberError, match="No space left on device"):
        _upload(space, "x.zip", taken=False)

    assert _kept(space) == set()
