"""Thousands of odd commands, uploads and damaged images: `python -m tests.fuzz`.

Commands run inside worker processes through the command line's own entry. A worker says each case
that it begins and each that it ends, so that a hang, a crash or too much memory is laid at the
right case, and the case can be run again: `python -m tests.fuzz --only plans:17`.

What counts as a failure: a traceback, an exit code other than 0 and 2, no answer after 10 s, more
than 1.5 GB at a refusal, more than one line or a control character on the terminal, something that
must be refused and was not, or a result that cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import queue
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = ROOT / "assets" / "fuzz.json"

COMMANDS = 5_000
IMAGES = 100_000
SEED = 0
HANG_S = 10.0
# Beyond this on the wall a worker waits for something that never comes; a bomb takes its time to
# be made.
STUCK_S = 120.0
# A worker imports torch and its first command the rest; that is no hang.
START_S = 120.0
MOST_BYTES = 1_500_000_000
# A worker is replaced after so many cases: memory that one case took is not laid at the next.
CASES_A_WORKER = 400
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(slots=True)
class Tally:
    """What came of the cases of one kind."""

    done: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Mapping[str, Any]) -> None:
        """Count one case."""
        self.done += found["code"] == 0
        self.refused += found["code"] == 2
        self.slowest_s = max(self.slowest_s, found["seconds"])
        if found["code"] == 2:
            self.peak_bytes = max(self.peak_bytes, found["peak_bytes"])
        if found["wrong"]:
            self.failures.append(dict(found))


# In a worker.


def _forget_peak() -> None:
    """Let the peak begin anew: making a case may take more memory than refusing it."""
    # Only Linux can; elsewhere a peak is that of the worker so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def run_case(kind: str, index: int, seed: int, corpus: Any, scratch: Path) -> dict[str, Any]:
    """Run one command and return what came of it, with what is wrong with that."""
    from core.cli import main
    from tests.fuzz.cases import make

    case = make(kind, index, seed, corpus, scratch)
    out = scratch / "out.json"
    said, told = io.StringIO(), io.StringIO()
    wrong: list[str] = []
    code: int | None = None
    _forget_peak()
    # The case's own work: on a busy machine the clock on the wall says little.
    began = time.process_time()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            code = main(list(case.argv))
        except SystemExit as error:
            # --help and --version end so.
            code = int(error.code or 0)
        except BaseException:
            wrong.append(traceback.format_exc()[-1500:])
    seconds = time.process_time() - began
    peak = _peak_bytes()
    lines = told.getvalue().splitlines()
    if code not in (0, 2, None):
        wrong.append(f"exit code {code}")
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("limber: ")):
        wrong.append(f"a refusal of {len(lines)} lines: {told.getvalue()[:300]!r}")
    if code == 0 and case.expected == "refused":
        wrong.append("this must be refused, and was not")
    shown = CONTROL.search(said.getvalue() + told.getvalue())
    if shown:
        wrong.append(f"the terminal got {shown[0]!r}")
    if code == 2 and peak > MOST_BYTES:
        wrong.append(f"{peak / 1e9:.2f} GB at a refusal")
    if seconds > HANG_S:
        wrong.append(f"{seconds:.1f} s")
    if code == 0 and out.is_file() and case.argv[0] != "apply":
        try:
            json.loads(out.read_bytes(), parse_constant=_no_constant)
        except ValueError as error:
            wrong.append(f"the result is no JSON: {error}")
    return {
        "kind": kind,
        "index": index,
        "code": code,
        "seconds": seconds,
        "peak_bytes": peak,
        "wrong": wrong,
        "about": case.about,
        "argv": [repr(each)[:200] for each in case.argv],
        "said": (told.getvalue() or said.getvalue())[-300:],
    }


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _run_worker(kind: str, start: int, stop: int, seed: int, folder: Path) -> None:
    from tests.fuzz.corpus import Corpus

    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What a command writes past Python's own streams would mix with what the worker tells.
    os.dup2(2, 1)
    corpus = Corpus(folder=folder)
    for index in range(start, stop):
        voice.write(json.dumps({"begin": index}) + "\n")
        voice.flush()
        scratch = Path(tempfile.mkdtemp(prefix="limber-fuzz-"))
        os.chdir(scratch)
        try:
            found = run_case(kind, index, seed, corpus, scratch)
        finally:
            os.chdir(ROOT)
            shutil.rmtree(scratch, ignore_errors=True)
        voice.write(json.dumps({"end": index, "found": found}) + "\n")
        voice.flush()


def _run_images(start: int, stop: int, seed: int) -> None:
    from core.errors import DataError
    from core.load.sources import read_image
    from tests.damaged import damaged_images

    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # One generator for each worker: its own seed, and every number in it.
    for index, (name, data) in enumerate(damaged_images(seed + start, stop - start), start):
        if index % 100 == 0 or index == start:
            voice.write(json.dumps({"begin": index}) + "\n")
            voice.flush()
        wrong: list[str] = []
        code = 0
        _forget_peak()
        began = time.perf_counter()
        # With the filters that hold while a command runs.
        with warnings.catch_warnings(record=True) as warned:
            try:
                read_image(data, name)
            except DataError:
                code = 2
            except BaseException:
                wrong.append(traceback.format_exc()[-1500:])
        seconds = time.perf_counter() - began
        if warned:
            wrong.append(f"a warning: {warned[0].message}")
        if seconds > HANG_S:
            wrong.append(f"{seconds:.1f} s")
        peak = _peak_bytes()
        if code == 2 and peak > MOST_BYTES:
            wrong.append(f"{peak / 1e9:.2f} GB at a refusal")
        found = {
            **{"kind": "images", "index": index, "code": code, "seconds": seconds},
            **{"peak_bytes": peak, "wrong": wrong, "about": name, "argv": [], "said": ""},
        }
        voice.write(json.dumps({"end": index, "found": found}) + "\n")
    voice.flush()


# In the parent.


def _lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run_range(
    kind: str, start: int, stop: int, seed: int, corpus: Path
) -> Iterator[dict[str, Any]]:
    """Run cases start to stop of a kind in workers, and yield what came of each."""
    while start < stop:
        end = min(stop, start + (20_000 if kind == "images" else CASES_A_WORKER))
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.fuzz", "--worker", kind, "--start", str(start)),
                *("--stop", str(end), "--seed", str(seed), "--corpus", str(corpus)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        lines = _lines_of(process)
        current, patience = start, START_S
        try:
            while True:
                try:
                    line = lines.get(timeout=patience)
                except queue.Empty:
                    yield _lost(kind, current, f"no answer after {patience:.0f} s")
                    start = current + 1
                    break
                if line is None:
                    process.wait()
                    if current < end:
                        yield _lost(kind, current, f"the process ended with {process.returncode}")
                    start = current + 1 if current < end else end
                    break
                told = json.loads(line)
                if "begin" in told:
                    current, patience = (
                        told["begin"],
                        START_S if told["begin"] == start else STUCK_S,
                    )
                else:
                    yield told["found"]
                    current = told["end"] + 1
        finally:
            process.kill()
            process.wait()


def _lost(kind: str, index: int, why: str) -> dict[str, Any]:
    return {
        **{"kind": kind, "index": index, "code": None, "seconds": 0.0, "peak_bytes": 0},
        **{"wrong": [why], "about": "", "argv": [], "said": ""},
    }


def fuzz(
    counts: Mapping[str, int], *, seed: int, corpus: Path, tell: bool = True
) -> dict[str, Tally]:
    """Run so many cases of each kind, two workers at a time, and return what came of them."""
    tallies = {kind: Tally() for kind in counts}
    jobs: queue.Queue[tuple[str, int, int]] = queue.Queue()
    for kind, count in counts.items():
        step = 20_000 if kind == "images" else CASES_A_WORKER
        for start in range(0, count, step):
            jobs.put((kind, start, min(count, start + step)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            try:
                kind, start, stop = jobs.get_nowait()
            except queue.Empty:
                return
            for found in run_range(kind, start, stop, seed, corpus):
                with lock:
                    tallies[kind].add(found)
                    if found["wrong"] and tell:
                        print(f"{kind}:{found['index']} {found['about']}", flush=True)
                        print("  " + " ".join(found["argv"])[:400], flush=True)
                        print("  " + found["wrong"][0].strip()[-600:], flush=True)
            if tell:
                print(f"{kind} {start} to {stop}: through", flush=True)

    threads = [threading.Thread(target=work) for _ in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tallies


def summary(tallies: Mapping[str, Tally], seed: int) -> dict[str, Any]:
    """Return the table that is kept, without a path of the machine."""
    names = ("torch", "torchvision", "timm", "pillow", "numpy", "safetensors")
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    return {
        "seed": seed,
        "versions": {name: version(name) for name in names},
        "kinds": {
            kind: {
                "cases": tally.done
                + tally.refused
                + sum(f["code"] is None for f in tally.failures),
                "done": tally.done,
                "refused": tally.refused,
                "failures": len(tally.failures),
                "slowest_s": round(tally.slowest_s, 1),
                "peak_at_refusal_gb": round(tally.peak_bytes / 1e9, 2),
            }
            for kind, tally in tallies.items()
        },
        "failures": Counter(
            failure["wrong"][0].strip().splitlines()[-1][:160] for failure in failures
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, print the table and keep it; 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--commands", type=int, default=COMMANDS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--kinds", help="only these, with commas between them")
    parser.add_argument("--only", help="one case, such as plans:17, shown whole")
    parser.add_argument("--out", type=Path, help=f"keep the table here, such as {SUMMARY.name}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker == "images":
        _run_images(options.start, options.stop, options.seed)
        return 0
    if options.worker:
        _run_worker(options.worker, options.start, options.stop, options.seed, options.corpus)
        return 0

    from tests.fuzz.cases import kinds_of, spread
    from tests.fuzz.corpus import build

    with tempfile.TemporaryDirectory(prefix="limber-corpus-") as folder:
        corpus = build(Path(folder) / "corpus")
        if options.only:
            kind, _, index = options.only.partition(":")
            scratch = Path(folder) / "scratch"
            scratch.mkdir()
            found = run_case(kind, int(index), options.seed, corpus, scratch)
            print(json.dumps(found, indent=1, ensure_ascii=False))
            return bool(found["wrong"])
        counts = dict(spread(options.commands))
        if options.images:
            counts["images"] = options.images
        if options.kinds:
            wanted = kinds_of(options.kinds)
            counts = {kind: count for kind, count in counts.items() if kind in wanted}
        table = summary(fuzz(counts, seed=options.seed, corpus=corpus.folder), options.seed)
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return bool(table["failures"])


if __name__ == "__main__":
    sys.exit(main())
