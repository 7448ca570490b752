"""What happens when something fails, against real processes: `python -m tests.faults`.

Servers and workers are ended by kill -9 at random points, the disk fills, two servers meet on one
folder, two runs on one `--out`, eight sessions on one queue. The server is a process that holds the
dashboard's queue without its pages, so that a hundred of them can be ended in minutes; the workers
are the real command line. Each scenario returns what it counted and raises `Lost` where a run is
lost, torn, begun twice or stuck.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 300.0
TINY = ("--model", "timm:test_resnet", "--weights", "none")
PARTIAL = re.compile(r"\..+\.([0-9a-z_]{8}|claim)")
# Kinds of runs: the command, and the file that it leaves when it is through.
RESULTS = {
    "plan": "plan.json",
    "apply": "reinit.safetensors",
    "preview": "preview.json",
    "measure": "diagnosis.json",
    "finetune": "summary.json",
}
LIGHT, DEVICE = ("plan", "apply", "preview"), ("measure", "finetune")
SMALL_DISK = 6_000_000

Counts = dict[str, Any]


class Lost(AssertionError):  # noqa: N818 - what must not happen
    """A run was lost, torn, begun twice or stuck."""


def check(good: bool, said: object) -> None:
    """Raise where something is not as it must be."""
    if not good:
        raise Lost(str(said))


def arguments(kind: str, folder: Path, plan: str) -> list[str]:
    """Return a real command of that kind, as small as there is one."""
    own = folder / "plan.json"
    if kind in ("apply", "preview", "finetune"):
        own.write_text(plan, encoding="utf-8")
    out = ["--out", str(folder if kind == "finetune" else folder / RESULTS[kind])]
    words = {
        "plan": [*TINY, "--classes", "8", "--layers", "conv1.0", "--seed", "1"],
        "apply": [str(own)],
        "preview": [str(own)],
        "measure": [*TINY, "--data", "bloodmnist", "--samples", "4", "--batch-size", "2"],
        "finetune": [
            *(*TINY, "--data", "bloodmnist", "--plan", str(own), "--steps", "3", "--seeds", "0"),
            *("--batch-size", "4", "--train-images", "8", "--val-images", "4"),
        ],
    }[kind]
    size = ["--image-size", "64"] if kind in DEVICE else []
    told = ["--events", str(folder / "events.jsonl"), "--stop-file", str(folder / "stop")]
    return [kind, *words, *size, *out, *told]


# The server under test


def serve(home: Path) -> None:
    """Hold the queue of a folder and do what connections ask, until somebody ends this process."""
    os.environ["LIMBER_HOME"] = str(home)
    from dashboard.store import workspace as spaces
    from dashboard.store.runs import RunQueue

    queue = RunQueue()
    queue.recover()

    def start(space: str, kind: Any, plan: str) -> str:
        folder = spaces.workspace(space).folder
        return queue.start(kind, folder, lambda each: arguments(kind, each, plan), {})

    def look(space: str) -> list[tuple[str, str, str, str | None]]:
        found = queue.runs(spaces.workspace(space).folder)
        return [(run.id, run.kind, run.state, run.message) for run in found]

    def live() -> list[tuple[str, str, str, int]]:
        return [(run.id, run.kind, run.state, run.queue_place) for run in queue.live()]

    def pick(space: str, layers: tuple[str, ...]) -> str | None:
        spaces.workspace(space).change_picks(layers=layers)
        return spaces.workspace(space).trouble

    def picked(space: str) -> tuple[str, ...]:
        return spaces.workspace(space).picks.layers

    deeds: dict[str, Callable[..., Any]] = {
        "start": start,
        "look": look,
        "live": live,
        "pick": pick,
        "picked": picked,
        "stop": queue.stop,
        "troubles": queue.troubles,
        "worker": lambda run_id: queue._runs[run_id].pid,
    }

    def answer(connection: Connection[Any, Any]) -> None:
        with suppress(EOFError, OSError):
            while True:
                name, words = connection.recv()
                try:
                    connection.send((True, deeds[name](*words)))
                except Exception as error:
                    connection.send((False, f"{type(error).__name__}: {error}"))

    with Listener(_socket(home, os.getpid()), backlog=64) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()


def _socket(home: Path, pid: int) -> str:
    # Beside the home, which may be full; the system takes about a hundred letters at most.
    return str(home.with_name(f"s{pid}"))


class Server:
    """A server process, and a connection to it."""

    def __init__(self, home: Path) -> None:
        """Start it; `ready` waits until it answers."""
        self.home = home
        self.log = home.with_name("server.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults", "--serve", str(home)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._connection: Connection[Any, Any] | None = None

    def ready(self) -> Server:
        """Wait until it answers."""
        assert self.process.stdout is not None
        check(self.process.stdout.readline() == b"ready\n", f"no server: {self.log.read_text()}")
        self._connection = self.connect()
        return self

    def connect(self) -> Connection[Any, Any]:
        """Return a connection of its own, such as a session has."""
        return Client(_socket(self.home, self.process.pid))

    def ask(self, name: str, *words: Any, by: Connection[Any, Any] | None = None) -> Any:
        """Return what a call gives.

        Raises:
            RuntimeError: The call raised; the message holds the exception's name and text.
            EOFError, OSError: The server is gone.
        """
        connection = by or self._connection
        assert connection is not None
        connection.send((name, words))
        good, answer = connection.recv()
        if not good:
            raise RuntimeError(answer)
        return answer

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self._connection is not None:
            self._connection.close()
        Path(_socket(self.home, self.process.pid)).unlink(missing_ok=True)


@contextmanager
def place() -> Iterator[Path]:
    """Yield the home of a scenario; at its end all its processes are ended and all is removed."""
    folder = Path(tempfile.mkdtemp(prefix="lf"))
    try:
        yield folder / "home"
    finally:
        for pid in processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """Return every process that was told of a folder, but this one."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{folder}/".encode() in (each / "cmdline").read_bytes():
                found.append(int(each.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_until(true: Callable[[], object], what: str) -> None:
    """Wait for something; nothing of it may take minutes."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        check(time.monotonic() < deadline, f"waited in vain: {what}")
        time.sleep(0.05)


def drain(server: Server) -> None:
    """Wait until all runs have ended; none of them may take minutes, however many wait."""
    live = server.ask("live")
    while live:
        left = {run[0] for run in live}
        wait_until(lambda left=left: left - {run[0] for run in server.ask("live")}, f"{live[0]}")
        live = server.ask("live")


def workers_at_work(home: Path) -> list[int]:
    """Return the workers of a home, as the system tells it."""
    found = []
    for pid in processes_of(home):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--events" in words:
                found.append(pid)
    return found


# What is true of every run that has ended


def check_folder(folder: Path, state: str) -> None:
    """Check a run's folder: its result whole or absent, nothing torn, begun once."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    check(record["state"] == state, f"{folder.name}: {record['state']} on disk, {state} in memory")
    left = [each.name for each in folder.iterdir() if PARTIAL.fullmatch(each.name)]
    check(not left, f"{folder.name}: left behind {left}")
    kind = folder.name.split("-", 1)[0]
    result = folder / RESULTS[kind]
    if result.exists():
        check_whole(result)
    if state == "done":
        check(result.exists(), f"{folder.name} is done and has no result")
        events = (folder / "events.jsonl").read_bytes()
        check(events.count(b'"event": "done"') == 1, f"{folder.name} was done more than once")


def check_whole(path: Path) -> None:
    """Check that a result can be read from its first byte to its last."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            from safetensors.numpy import load_file

            load_file(path)
    except Exception as error:
        raise Lost(f"{path.name} is torn: {error}") from error


def check_home(home: Path, states: dict[str, str]) -> int:
    """Check every run folder of a home; return how many starts were cut off before their record."""
    cut_off = 0
    for folder in home.glob("workspaces/*/runs/*"):
        if (folder / "run.json").exists():
            check(folder.name in states, f"{folder.name} is on disk and not shown")
            check_folder(folder, states[folder.name])
        else:
            check(folder.name not in states, f"{folder.name} was acknowledged and has no record")
            cut_off += 1
    return cut_off


def states_of(server: Server, spaces: Sequence[str]) -> dict[str, str]:
    """Return the state of every run of these workspaces."""
    return {run[0]: run[2] for space in spaces for run in server.ask("look", space)}


# The scenarios

SPACE = "0123456789abcdef"


def server_kills(
    points: int, chance: random.Random, plan: str, lanes: Sequence[Sequence[str]] = (LIGHT, DEVICE)
) -> Counts:
    """End the server at random points while runs are started, wait, run and end."""
    every = [kind for kinds in lanes for kind in kinds]
    acknowledged: list[str] = []
    with place() as home:
        server = Server(home).ready()
        asked = at_work = waiting = 0
        for point in range(points):
            live = server.ask("live")
            check(not server.ask("troubles"), server.ask("troubles"))
            gone = set(acknowledged) - {run[0] for run in server.ask("look", SPACE)}
            check(not gone, f"lost at point {point}: {gone}")
            at_work += any(run[2] == "running" for run in live)
            waiting += any(run[2] == "queued" for run in live)
            for kinds in lanes:
                if sum(run[1] in kinds for run in live) < 2:
                    acknowledged.append(server.ask("start", SPACE, chance.choice(kinds), plan))
            if point % 2 and len(live) < 3 * len(lanes):
                # While a start is being written down.
                kind = chance.choice(every)
                assert server._connection is not None
                server._connection.send(("start", (SPACE, kind, plan)))
                asked += 1
                time.sleep(chance.uniform(0, 0.03))
                with suppress(EOFError, OSError):
                    if server._connection.poll():
                        acknowledged.append(server._connection.recv()[1])
            else:
                time.sleep(chance.uniform(0, 1.5))
            server.kill()
            server = Server(home).ready()
        drain(server)
        states = states_of(server, [SPACE])
        odd = {name: state for name, state in states.items() if state != "done"}
        check(not odd, f"not done: {odd} {server.ask('look', SPACE)}")
        check(set(acknowledged) <= set(states), "an acknowledged run is lost")
        cut_off = check_home(home, states)
        check(not workers_at_work(home), "a worker is left over")
        server.kill()
    return {
        "points": points,
        "runs": len(states),
        "acknowledged": len(acknowledged),
        "killed while a worker ran": at_work,
        "killed while a run waited": waiting,
        "killed within 30 ms of a start": asked,
        "starts cut off before their record": cut_off,
        "lost": 0,
        "run twice": 0,
    }


def worker_kills(
    points: int, chance: random.Random, plan: str, lanes: Sequence[Sequence[str]] = (LIGHT, DEVICE)
) -> Counts:
    """End the worker at random points of its life, in all lanes at once."""
    ended: dict[str, int] = {}
    with place() as home:
        server = Server(home).ready()

        def lane(kinds: Sequence[str], count: int, chance: random.Random) -> None:
            took: dict[str, float] = {}
            own = server.connect()
            for _ in range(count):
                kind = chance.choice(kinds)
                run_id = server.ask("start", SPACE, kind, plan, by=own)
                begun = time.monotonic()
                after = chance.uniform(0, took.get(kind, 6.0))
                time.sleep(after)
                pid = server.ask("worker", run_id, by=own)
                # One that has ended leaves its number to others.
                if pid in workers_at_work(home / "workspaces" / SPACE / "runs" / run_id):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

                def over(run_id: str = run_id) -> bool:
                    runs = server.ask("live", by=own)
                    return run_id not in {run[0] for run in runs}

                wait_until(over, f"{run_id} to end")
                found = next(run for run in server.ask("look", SPACE, by=own) if run[0] == run_id)
                check(found[2] in ("done", "failed"), found)
                check(found[2] == "done" or found[3], f"{run_id} failed without a word")
                if found[2] == "done":
                    took[kind] = time.monotonic() - begun
                ended[found[2]] = ended.get(found[2], 0) + 1
                check_folder(home / "workspaces" / SPACE / "runs" / run_id, found[2])
            last = server.ask("start", SPACE, kinds[0], plan, by=own)

            def done() -> bool:
                return any(run[0] == last and run[2] == "done" for run in mine())

            def mine() -> Any:
                return server.ask("look", SPACE, by=own)

            wait_until(done, f"{last}, which nobody ended, to be done")

        shares = [len(range(place, points, len(lanes))) for place in range(len(lanes))]
        _at_once(
            *(
                partial(lane, kinds, share, random.Random(chance.random()))
                for kinds, share in zip(lanes, shares, strict=True)
            )
        )
        check(not server.ask("live"), "a run is stuck")
        check(not workers_at_work(home), "a worker is left over")
        check_home(home, states_of(server, [SPACE]))
        server.kill()
    return {
        "points": points,
        "failed with a sentence": ended.get("failed", 0),
        "done before the kill": ended.get("done", 0),
        "torn results": 0,
        "lanes alive at the end": len(lanes),
    }


def _at_once(*deeds: Callable[[], None]) -> None:
    """Do several things at once; raise what the first of them raised."""
    wrong: list[BaseException] = []

    def do(deed: Callable[[], None]) -> None:
        try:
            deed()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=do, args=(deed,)) for deed in deeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[Sequence[int], bool], None] | None]:
    """Make a folder a small disk of its own.

    Yields:
        What fills and empties it, given the processes that write there; None where no file system
        may be mounted here.
    """
    folder.mkdir(parents=True)
    mounted = shutil.which("mount") is not None and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
        ).returncode
        == 0
    )

    def fill(pids: Sequence[int], full: bool) -> None:
        del pids
        filler = folder / "filler"
        if not full:
            filler.unlink(missing_ok=True)
            return
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            for size in (65_536, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    try:
        yield fill if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def limit(pids: Sequence[int], full: bool) -> None:
    """Let processes write no further byte into any file, or let them again.

    What a full disk is where none can be mounted: the same calls fail, by another number.
    """
    for pid in pids:
        with suppress(ProcessLookupError):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))


def full_disk(points: int, chance: random.Random, plan: str) -> Counts:
    """Fill the disk at random points of runs, and make room again."""
    counts = {"done": 0, "failed": 0}
    waited = 0
    with place() as home, small_disk(home) as mounted:
        fill = mounted or limit
        server = Server(home).ready()
        for _ in range(points):
            kinds = chance.choice(LIGHT), chance.choice(DEVICE)
            begun = [server.ask("start", SPACE, kind, plan) for kind in kinds]
            behind = [server.ask("start", SPACE, kind, plan) for kind in kinds]
            time.sleep(chance.uniform(0, 5))
            fill([server.process.pid, *workers_at_work(home)], True)
            # Nobody waits for the disk: the first runs end, whatever became of them.
            wait_until(
                lambda begun=begun: not set(begun) & {run[0] for run in server.ask("live")},
                "runs to end on a full disk",
            )
            check("full" in str(server.ask("troubles")) or not mounted, "no page says so")
            refused = ""
            for _ in range(20):
                # A run that ends takes its half-written files away, which makes room again. A
                # start that finds some is a run like the others, and must end as well.
                fill([server.process.pid, *workers_at_work(home)], True)
                try:
                    behind.append(server.ask("start", SPACE, "plan", plan))
                except RuntimeError as error:
                    refused = str(error)
                    break
            check("Nothing was started." in refused, f"a start was not refused: {refused!r}")
            fresh = f"{chance.getrandbits(64):016x}"
            check(server.ask("pick", fresh, ("conv1.0",)) is not None, "unsaved without a word")
            check(server.ask("picked", fresh) == ("conv1.0",), "a new session does not work")
            fill([server.process.pid, *workers_at_work(home)], False)
            drain(server)
            saved = partial(server.ask, "pick", fresh, ("fc",))
            wait_until(
                lambda saved=saved: saved() is None and not server.ask("troubles"),
                "all to be saved once there is room",
            )
            states = states_of(server, [SPACE])
            check(all(states[name] == "done" for name in behind), {n: states[n] for n in behind})
            waited += len(behind)
            for run in server.ask("look", SPACE):
                if run[0] in begun:
                    counts[run[2]] += 1
                    said = run[3] or ""
                    full = "full" in said or "larger than this process may write" in said
                    check(run[2] == "done" or full, run)
            check_home(home, states)
            for folder in home.glob("workspaces/*/runs/*"):
                shutil.rmtree(folder)
        server.kill()
    return {
        "points": points,
        "disk": "a small tmpfs" if mounted else "RLIMIT_FSIZE 0",
        "runs that got through": counts["done"],
        "runs that said the disk is full": counts["failed"],
        "runs behind them, all done": waited,
        "unsaved at the end": 0,
    }


def two_servers(points: int, chance: random.Random, plan: str) -> Counts:
    """Start servers at once on one folder, look and stop from the second, end the first."""
    with place() as home:
        runs = 0
        servers = [Server(home) for _ in range(3)]
        for each in servers:
            each.ready()
        for _ in range(points):
            owners = [each for each in servers if not each.ask("troubles")]
            check(len(owners) == 1, f"{len(owners)} servers own the folder")
            owner = owners[0]
            others = [each for each in servers if each is not owner]
            names = [owner.ask("start", SPACE, "measure", plan) for _ in range(3)]
            names.append(owner.ask("start", SPACE, "plan", plan))
            runs += len(names)
            other = others[0]
            check(f"process {owner.process.pid}" in str(other.ask("troubles")), "who owns it?")
            refused = ""
            try:
                other.ask("start", SPACE, "plan", plan)
            except RuntimeError as error:
                refused = str(error)
            check("Another Limber" in refused, f"not refused: {refused!r}")
            seen = {run[0]: run[2:] for run in other.ask("live")}
            check(set(names) <= set(seen), f"the second does not see {set(names) - set(seen)}")
            check(states_of(owner, [SPACE])[names[1]] == "queued", "the second spoilt a run")
            # The second stops what waits last.
            other.ask("stop", names[2])
            states = partial(states_of, owner, [SPACE])
            wait_until(lambda now=states, last=names[2]: now()[last] == "stopped", "Stop to arrive")
            # Both change one workspace at once.
            _at_once(*(partial(_pick_five, each) for each in (owner, other)))
            check(owner.ask("picked", SPACE) == other.ask("picked", SPACE), "two workspaces")
            time.sleep(chance.uniform(0, 2))
            owner.kill()
            servers.remove(owner)
            wait_until(lambda left=servers: any(not each.ask("troubles") for each in left), "heir")
            heir = next(each for each in servers if not each.ask("troubles"))
            drain(heir)
            ended = states_of(heir, [SPACE])
            wanted = dict.fromkeys(names, "done") | {names[2]: "stopped"}
            check({name: ended[name] for name in names} == wanted, ended)
            check_home(home, ended)
            servers.append(Server(home).ready())
        for each in servers:
            each.kill()
    return {"points": points, "runs": runs, "servers at once": 3, "lost or rewritten": 0}


def _pick_five(server: Server) -> None:
    for turn in range(5):
        server.ask("pick", SPACE, (f"{server.process.pid}-{turn}",))


def one_out(points: int, chance: random.Random, plan: str) -> Counts:
    """Give two commands one `--out`; end the one that has it, and give it to a third."""
    refused = 0
    with place() as home:
        home.mkdir()
        own = home / "given.json"
        own.write_text(plan, encoding="utf-8")
        kinds = [*RESULTS, "export"]
        for point in range(points):
            kind = kinds[point % len(kinds)]
            folder = home / f"{point}"
            folder.mkdir()
            words = _bare(kind, folder, own)
            first = _begin(words)
            claim = folder / (
                f"{'out/' if kind in ('finetune', 'export') else ''}"
                f".{'' if kind in ('finetune', 'export') else f'{RESULTS[kind]}.'}claim"
            )
            wait_until(lambda at=claim, of=first: at.exists() or of.poll() is not None, "a claim")
            second = _begin(words)
            said = second.communicate(timeout=PATIENCE_S)[1]
            if first.poll() is None:
                check(second.returncode == 2, (kind, second.returncode, said))
                check(f"is being written by process {first.pid}" in said, said)
                check(said.count("\n") == 1, said)
                refused += 1
            if point % 2:
                time.sleep(chance.uniform(0, 1))
                first.kill()
                first.communicate()
                third = _begin(words)
                wrong = third.communicate(timeout=PATIENCE_S)[1]
                known = "holds a run already" in wrong or "is no export's" in wrong
                check(third.returncode == 0 or known, (kind, third.returncode, wrong))
            else:
                wrong = first.communicate(timeout=PATIENCE_S)[1]
                check(first.returncode == 0, (kind, first.returncode, wrong))
            left = [each for each in folder.rglob(".*") if each.name.endswith("claim")]
            check(not left, f"{kind} left {left}")
            for each in folder.rglob("*"):
                if each.suffix in (".json", ".safetensors"):
                    check_whole(each)
    return {"points": points, "refused by name": refused, "torn results": 0}


def _bare(kind: str, folder: Path, plan: Path) -> list[str]:
    """Return a command as a person types it: no events."""
    if kind == "export":
        return ["export", str(plan), "--out", str(folder / "out")]
    words = arguments(kind, folder, plan.read_text(encoding="utf-8"))
    words = words[: words.index("--events")]
    if kind in ("apply", "preview", "finetune"):
        words = [str(plan) if each == str(folder / "plan.json") else each for each in words]
        (folder / "plan.json").unlink()
    if kind == "finetune":
        words[words.index("--out") + 1] = str(folder / "out")
    return words


def _begin(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "core", *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def eight_sessions(points: int, chance: random.Random, plan: str) -> Counts:
    """Let eight sessions start, stop, look and pick at once; each start ends as it was told."""
    spaces = [f"{number:016x}" for number in range(8)]
    begun: dict[str, list[str]] = {space: [] for space in spaces}
    stopped: set[str] = set()
    with place() as home:
        server = Server(home).ready()

        def session(space: str, chance: random.Random) -> None:
            own = server.connect()
            for turn in range(points):
                kind = chance.choice((*LIGHT, *DEVICE))
                begun[space].append(server.ask("start", space, kind, plan, by=own))
                server.ask("pick", space, (f"layer{turn}",), by=own)
                for _ in range(20):
                    server.ask("look", space, by=own)
                    server.ask("live", by=own)
                if chance.random() < 0.5:
                    each = chance.choice(begun[space])
                    server.ask("stop", each, by=own)
                    stopped.add(each)
                check(server.ask("picked", space, by=own) == (f"layer{turn}",), "a pick is lost")

        _at_once(*(partial(session, each, random.Random(chance.random())) for each in spaces))
        drain(server)
        states = states_of(server, spaces)
        names = [name for each in begun.values() for name in each]
        check(set(names) == set(states), "a run is lost")
        odd = {
            name: state
            for name, state in states.items()
            if state != "done" and not (state == "stopped" and name in stopped)
        }
        check(not odd, odd)
        check_home(home, states)
        server.kill()
    return {
        "sessions": 8,
        "runs": len(names),
        "done": sum(state == "done" for state in states.values()),
        "stopped by a person": sum(state == "stopped" for state in states.values()),
        "lost": 0,
    }


def pages(points: int, chance: random.Random, plan: str) -> Counts:
    """Measure from eight pages of the real dashboard, and end its server while they do."""
    from playwright.sync_api import expect

    from tests import journey
    from tests.browser import free_port, open_page, serve_app

    del plan
    port = free_port()
    with place() as home, ExitStack() as stack:
        app = stack.enter_context(serve_app(home, port=port))
        # What the browser says while nobody answers is no fault.
        first = stack.enter_context(open_page(app.url, errors=[]))
        browser = first.context.browser
        assert browser is not None
        tabs = [first, *(browser.new_context().new_page() for _ in range(7))]
        for tab in tabs[1:]:
            tab.goto(app.url)
        for tab in tabs:
            journey.settled(tab)
            journey.start_measuring(tab, images=2)
        for _ in range(points):
            time.sleep(chance.uniform(0, 8))
            os.kill(app.pid, signal.SIGKILL)
            # The dead one is reaped before another takes its address.
            wait_until(lambda pid=app.pid: _is_over(pid), "the server to end")
            app = stack.enter_context(serve_app(home, port=port))
            for tab in tabs:
                tab.reload()
                journey.settled(tab)
        other = stack.enter_context(serve_app(home, port=free_port()))
        tab = browser.new_context().new_page()
        tab.goto(other.url)
        expect(tab.locator("[data-testid=stMain]")).to_contain_text(
            f"Another Limber (process {app.pid}", timeout=journey.PATIENCE_MS
        )
        for tab in tabs:
            expect(tab.get_by_role("heading", name="Findings")).to_be_visible(
                timeout=2 * journey.PATIENCE_MS
            )
        folders = list(home.glob("workspaces/*/runs/*"))
        for folder in folders:
            check_folder(folder, "done")
        check(len(folders) == len(tabs), f"{len(folders)} runs for {len(tabs)} pages")
        said = app.log() + other.log()
        check("Traceback" not in said, said)
    return {"points": points, "pages": len(tabs), "measured": len(folders), "lost": 0}


def _is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2][1] == "Z"
    except OSError:
        return True


SCENARIOS: dict[str, Callable[[int, random.Random, str], Counts]] = {
    "kill -9 of the server": server_kills,
    "kill -9 of the worker": worker_kills,
    "full disk": full_disk,
    "two servers": two_servers,
    "one --out": one_out,
    "eight sessions": eight_sessions,
    "eight pages": pages,
}
# Of so many points for the kills, this share for the others.
SHARES = {
    "full disk": 0.08,
    "two servers": 0.05,
    "one --out": 0.12,
    "eight sessions": 0.02,
    "eight pages": 0.03,
}


def given_plan() -> str:
    """Return the plan that runs apply, look ahead with and fine-tune."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        made = [*TINY, "--classes", "8", "--layers", "layer1.0.conv1", "--seed", "1"]
        subprocess.run(
            [sys.executable, "-m", "core", "plan", *made, "--out", str(path)],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return path.read_text(encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Run the scenarios, print a table, write the summary; 0 only when nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--points", type=int, default=100, help="of each kind of kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(SCENARIOS), action="append", default=[])
    parser.add_argument("--out", type=Path, help="write the summary to this file, as JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.serve is not None:
        serve(options.serve)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan = given_plan()
    rows: dict[str, Counts] = {}
    lost = 0
    for name in options.only or SCENARIOS:
        points = max(1, round(options.points * SHARES.get(name, 1.0)))
        begun = time.monotonic()
        try:
            rows[name] = SCENARIOS[name](points, random.Random(f"{options.seed} {name}"), plan)
        except Exception as error:
            rows[name] = {"points": points, "LOST": f"{type(error).__name__}: {error}"}
            lost += 1
        rows[name]["wall_s"] = round(time.monotonic() - begun, 1)
        print(f"{name}: {'; '.join(f'{key} {value}' for key, value in rows[name].items())}")
        sys.stdout.flush()
    summary = {
        "command": f"python -m tests.faults --points {options.points} --seed {options.seed}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "streamlit")},
        },
        "scenarios": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
