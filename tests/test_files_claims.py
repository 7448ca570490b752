"""Who may write where, and what a command says and keeps when the disk takes no more."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cli.events import Events
from core.errors import OptionError
from core.files import claims
from core.files.claims import Claim, Holder, claimed, take
from core.files.disk import settle_temporary_folder, trouble
from core.files.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--model", "timm:test_resnet", "--weights", "none")

Run = Callable[..., tuple[int, str, str]]

HOLDS = """
import sys, time
from pathlib import Path
from core.files.claims import take
assert hasattr(take(Path(sys.argv[1]), what="other"), "release")
print("held", flush=True)
time.sleep(60)
"""


def holder_of(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the claim of that path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_claim_says_who_holds_it_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".claim"
    with holder_of(path) as other:
        found = take(path, what="mine")
        other.send_signal(signal.SIGKILL)
        other.wait()

    assert isinstance(found, Holder)
    assert (found.pid, found.what) == (other.pid, "other")
    assert f'process {other.pid}, "other", since ' in found.words()
    after = take(path, what="mine")
    assert isinstance(after, Claim)
    assert json.loads(path.read_bytes())["pid"] == os.getpid()
    after.release()
    assert not path.exists()


def test_of_many_at_once_one_has_it_at_a_time(tmp_path: Path) -> None:
    inside, most, had = [0], [0], [0]
    guard = threading.Lock()

    def claims_often() -> None:
        for _ in range(150):
            with claimed(tmp_path / "new" / "out", folder=True, what="x") as found:
                if isinstance(found, Claim):
                    with guard:
                        inside[0] += 1
                        had[0] += 1
                        most[0] = max(most[0], inside[0])
                    with guard:
                        inside[0] -= 1

    threads = [threading.Thread(target=claims_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == [1]
    assert had[0] >= 150
    assert not list(tmp_path.rglob(".claim"))


def test_a_claim_let_go_of_between_open_and_lock_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, others = tmp_path / ".claim", claims.lock, []

    def lock(handle: int) -> bool | None:
        if not others:
            # Its owner leaves, and another one comes, before this process has the lock.
            others.append(None)
            path.unlink()
            others[0] = take(path, what="quicker")
        return real(handle)

    monkeypatch.setattr(claims, "lock", lock)

    found = take(path, what="mine")

    assert isinstance(found, Holder)
    assert found.what == "quicker"


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, True),
        ({"began": "another moment"}, False),
        ({"pid": 2**22 + 1}, False),
        ({"host": "another machine"}, True),
        ({"pid": "no number"}, False),
    ],
)
def test_without_locks_the_words_in_the_file_must_do(
    change: dict[str, object], held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".claim"
    monkeypatch.setattr(claims, "lock", lambda handle: None)
    first = take(path, what="first")
    assert isinstance(first, Claim)
    assert not first.locked
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change), encoding="utf-8")

    assert isinstance(take(path, what="second"), Holder) == held


@pytest.mark.parametrize("content", [b"", b"{half", b"[]", b"\xff\xfe", b"[" * 4000])
def test_a_claim_left_behind_stops_nobody_whatever_it_holds(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".claim"
    path.write_bytes(content)

    found = take(path, what="mine")

    assert isinstance(found, Claim)
    found.release()


COMMANDS = {
    "plan": (*TINY, "--classes", "8", "--layers", "conv1.0"),
    "measure": (*TINY, "--data", "bloodmnist", "--samples", "2"),
    "merge": ("part.safetensors",),
    "apply": ("plan.json",),
    "preview": ("plan.json",),
    "compose": ("plan.json", "plan.json"),
    "export": ("plan.json",),
    "finetune": (*TINY, "--data", "bloodmnist"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_another_command_writes_to_is_refused_by_name(
    command: str, run: Run, tmp_path: Path
) -> None:
    folder = command in ("export", "finetune")
    out = tmp_path / "out"
    with claimed(out, folder=folder, what="elsewhere") as held:
        assert isinstance(held, Claim)
        code, said, wrong = run(command, *COMMANDS[command], "--out", out)

    assert (code, said) == (2, "")
    assert f'--out "{out}" is being written by process {os.getpid()}, "elsewhere", since' in wrong
    assert wrong.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_leaves_no_claim_and_no_empty_folder(
    command: str, run: Run, tmp_path: Path
) -> None:
    # Refused after its claim: what it reads is not there.
    wrong = {"--data": "nowhere", "--model": "timm:nosuch"}
    words = list(COMMANDS[command])
    for option, value in wrong.items():
        if option in words:
            words[words.index(option) + 1] = value

    code, _, _ = run(command, *words, "--out", tmp_path / "new" / "deep" / "out")

    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_two_commands_do_not_tell_their_events_into_one_file(run: Run, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    with Events(events, None, terminal=False) as mine:
        mine.emit("phase", name="mine")
        code, _, wrong = run("preview", "plan.json", "--events", events)

    assert code == 2
    assert "is being written by another command" in wrong
    assert [json.loads(line)["event"] for line in events.read_text("utf-8").splitlines()] == [
        "phase"
    ]


class _FullNowAndThen:
    """A file on a disk that takes some bytes, or none, or all, as it was told."""

    def __init__(self, takes: list[int | None]) -> None:
        self.takes = takes
        self.held = b""

    def write(self, data: bytes) -> int:
        room = self.takes.pop(0) if self.takes else None
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data if room is None else data[:room]
        self.held += part
        return len(part)

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@given(st.lists(st.none() | st.integers(0, 60), max_size=40), st.integers(1, 12))
def test_no_event_is_lost_torn_or_twice_on_a_disk_that_fills_and_empties(
    takes: list[int | None], count: int
) -> None:
    file = _FullNowAndThen(takes)
    events = Events(None, None, terminal=False)
    events._file = file  # type: ignore[assignment]
    for number in range(count):
        events.emit("step", number=number)
        events.emit("progress", done=number)
    while file.takes:
        events.emit("heartbeat")
    events.__exit__()

    told = []
    for line in file.held.split(b"\n"):
        try:
            told.append(json.loads(line))
        except ValueError:
            # The last line, where the disk had no room for all of it in the end.
            continue
    assert [each["number"] for each in told if each.get("event") == "step"] == list(range(count))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "larger than this process may write"),
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left_half_written(
    number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", refuse)

    with pytest.raises(OptionError, match=says) as caught:
        write_whole(tmp_path / "a.json", "x")

    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert says in trouble(OSError(number, os.strerror(number)), tmp_path / "gone" / "a.json")


def test_a_command_that_can_write_nothing_at_all_ends_with_2_and_one_line(tmp_path: Path) -> None:
    told = subprocess.run(
        [
            *(sys.executable, "-m", "core", "measure", *COMMANDS["measure"]),
            *("--out", str(tmp_path / "d.json"), "--events", str(tmp_path / "e.jsonl")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )

    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.count("\n") == 1
    assert "would become larger than this process may write" in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.jsonl"]


def test_a_full_disk_keeps_no_library_from_the_name_of_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", refuse)
    monkeypatch.setenv("TMPDIR", "/somewhere")

    settle_temporary_folder()

    assert tempfile.gettempdir() == "/somewhere"
