"""Commands that mean harm: every option that takes a name or a path, given what no person gives.

`prepare` makes good inputs once; `commands` yields command lines that hand each of them on damaged,
replaced or misnamed. Every one must end with 0 or 2, in time, with one clean line on stderr.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from core.cli import main
from tests import hostile
from tests.hostile import Hostile

MODEL = ("--model", "timm:test_resnet", "--weights", "none")
CLASSES = (*MODEL, "--classes", "8")
QUICK = ("--samples", "8", "--image-size", "32", "--batch-size", "4")
SHORT = (
    *("--steps", "1", "--batch-size", "4", "--seeds", "0", "--image-size", "32"),
    *("--train-images", "8", "--val-images", "8"),
)

Command = tuple[str, list[str]]


@dataclass(frozen=True, slots=True)
class Ground:
    """Good inputs, each made by the command line itself."""

    folder: Path
    plan: Path
    units: Path
    weights: Path
    diagnosis: Path
    part: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    label: str
    code: int | str
    wall_s: float
    cpu_s: float
    out: str
    err: str

    @property
    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if self.code not in (0, 2):
            return f"ended with {self.code}"
        if "Traceback" in self.err:
            return "a traceback"
        lines = self.err.splitlines()
        if self.code == 2 and not (len(lines) == 1 and lines[0].startswith("limber: ")):
            return f"{len(lines)} lines on stderr"
        strange = {
            letter for letter in self.out + self.err if letter != "\n" and not _shows(letter)
        }
        if strange:
            return f"{sorted(map(ascii, strange))} reach the terminal"
        return None


def _shows(letter: str) -> bool:
    return letter in "\u200c\u200d" or letter.isprintable() or unicodedata.category(letter) == "Zs"


def prepare(folder: Path, *, measured: bool = True) -> Ground:
    """Make a plan of layers, one with a companion, weights and, by measuring, the rest."""
    ground = Ground(
        folder,
        folder / "plan.json",
        folder / "units.json",
        folder / "w.safetensors",
        folder / "diagnosis.json",
        folder / "part.safetensors",
    )
    data = (*MODEL, "--data", "pneumonia", *QUICK)
    for command in (
        ("plan", *CLASSES, "--layers", "conv1.0", "--out", ground.plan),
        (
            *("plan", *CLASSES, "--rule", "weight-magnitude", "--percent", "20"),
            *("--out", ground.units),
        ),
        ("apply", ground.plan, "--out", ground.weights),
        ("measure", *data, "--out", ground.diagnosis),
        ("measure", *data, "--part", "1/1", "--out", ground.part),
    )[: None if measured else 3]:
        ended = attempt("ground", [str(each) for each in command])
        if ended.code != 0:
            raise RuntimeError(f"{command[0]}: {ended.err}")
    return ground


def attempt(label: str, arguments: list[str]) -> Outcome:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    begun, used = time.perf_counter(), time.process_time()
    code: int | str
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = str(error.code)
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - used
    return Outcome(label, code, wall_s, cpu_s, out.getvalue(), err.getvalue())


def commands(
    ground: Ground, scratch: Path, *, rounds: int = 1, seed: int = 0, every: int = 1
) -> Iterator[Command]:
    """Yield commands; the folder `scratch` is emptied between two of them.

    No command is told to write outside `scratch`, and none that is yielded could: whatever the
    code under test does with a name, the machine it runs on stays as it was.

    Args:
        ground: From `prepare`.
        scratch: A folder of its own.
        rounds: How many random damages of each kind.
        seed: Seed of the random ones.
        every: Takes each so many-th input, and each so many-th command on a name.
    """
    plan = json.loads(ground.plan.read_text(encoding="utf-8"))
    state = load_file(ground.weights)
    attacks = itertools.chain(
        _with(hostile.plans(plan, (20_001, 200_000)), _of_plan),
        _with(hostile.json_bombs(plan, "plan.json"), _of_plan),
        _with(hostile.places(".json"), _of_plan),
        _with(_shaken(plan, "plan.json", rounds, seed), _of_plan),
        _with(_companions(ground, rounds, seed), _of_plan),
        _with(hostile.checkpoint_bombs(64), _of_weights),
        _with(hostile.odd_checkpoints(), _of_weights),
        _with(hostile.places(".pth"), _of_weights),
        _with(hostile.places(".safetensors"), _of_weights),
        _with(hostile.damaged_checkpoints(state, rounds, seed), _of_weights),
        _with(hostile.npz_bombs(300), _of_data),
        _with(hostile.places(".npz"), _of_data),
        _with(hostile.places(".zip"), _of_data),
        _with(hostile.damaged_arrays(rounds, seed), _of_data),
        _with(hostile.places(".json"), _of_diagnosis),
        _with(hostile.places(".safetensors"), _of_part),
        _with(hostile.safetensors_bombs(), _of_part),
        _with(hostile.places(".jsonl"), _of_events),
        _measured(ground, rounds, seed) if ground.part.is_file() else (),
    )
    for each, use in itertools.islice(attacks, 0, None, every):
        _empty(scratch)
        path = each.make(scratch)
        for arguments in use(ground, path, scratch / "out"):
            texts = [str(argument) for argument in arguments]
            yield f"{arguments[0]}, {each.name}", _confined(texts, scratch)
    for label, texts in itertools.islice(_of_names(ground, scratch), 0, None, every):
        yield label, _confined(texts, scratch)


# Options behind which a command writes.
OUTPUTS = ("--out", "--events")


def _confined(arguments: list[str], scratch: Path) -> list[str]:
    """Return the arguments of a command that writes below `scratch` alone.

    Raises:
        RuntimeError: It would write elsewhere. Links are not followed: what is written takes
            their place.
    """
    root = scratch.absolute()
    for option, value in itertools.pairwise(arguments):
        if option in OUTPUTS:
            place = Path(os.path.normpath(value))
            if not place.is_relative_to(root):
                raise RuntimeError(f"{option} {value!r} lies outside {root}")
    return arguments


def _measured(ground: Ground, rounds: int, seed: int) -> Iterator[tuple[Hostile, Any]]:
    diagnosis = json.loads(ground.diagnosis.read_text(encoding="utf-8"))
    yield from _with(hostile.json_bombs(diagnosis, "d.json"), _of_diagnosis)
    yield from _with(_shaken(diagnosis, "d.json", rounds, seed), _of_diagnosis)
    yield from _with(_parts(ground, rounds, seed), _of_part)


def _with(made: Iterable[Hostile], use: Callable[..., Any]) -> Iterator[tuple[Hostile, Any]]:
    return ((each, use) for each in made)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _shaken(content: Any, name: str, rounds: int, seed: int) -> Iterator[Hostile]:
    text = json.dumps(content).encode()
    for i in range(rounds):
        number = seed * 1_000_003 + i
        changed = json.dumps(hostile.shaken(content, number))
        yield Hostile(f"shaken {name} {i}", hostile.written(name, changed), refused=False)
        damaged = hostile.damaged(text, number)
        yield Hostile(f"damaged {name} {i}", hostile.written(name, damaged), refused=False)


def _companions(ground: Ground, rounds: int, seed: int) -> Iterator[Hostile]:
    """Yield plans whose companion is another file, damaged, or damaged and resealed."""
    import hashlib

    plan = json.loads(ground.units.read_text(encoding="utf-8"))
    name = plan["companion"]["file"]
    content = (ground.folder / name).read_bytes()

    def beside(
        change: Callable[[Path], object], sha256: str | None = None
    ) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            copy = json.loads(json.dumps(plan))
            if sha256 is not None:
                copy["companion"]["sha256"] = sha256
            (folder / "plan.json").write_text(json.dumps(copy), encoding="utf-8")
            change(folder)
            return folder / "plan.json"

        return make

    for each in hostile.places(""):

        def put(folder: Path, each: Hostile = each) -> None:
            inner = folder / "inner"
            inner.mkdir()
            made = each.make(inner)
            if made.name == "place" and (made.exists() or made.is_symlink()):
                made.rename(folder / name)

        yield Hostile(f"companion: {each.name}", beside(put))
    for each in hostile.safetensors_bombs():

        def swap(folder: Path, each: Hostile = each) -> None:
            each.make(folder).rename(folder / name)

        yield Hostile(f"companion: {each.name}", beside(swap))
    for i in range(rounds):
        data = hostile.damaged(content, seed * 1_000_003 + i)
        sha256 = hashlib.sha256(data).hexdigest()
        write = lambda folder, data=data: (folder / name).write_bytes(data)  # noqa: E731
        yield Hostile(f"companion damaged {i}", beside(write), refused=False)
        yield Hostile(f"companion damaged and resealed {i}", beside(write, sha256), refused=False)


def _parts(ground: Ground, rounds: int, seed: int) -> Iterator[Hostile]:
    content = ground.part.read_bytes()
    for i in range(rounds):
        data = hostile.damaged(content, seed * 1_000_003 + i)
        yield Hostile(f"damaged part {i}", hostile.written("p.safetensors", data), refused=False)


Arguments = Iterator[tuple[object, ...]]


def _of_plan(ground: Ground, path: Path, out: Path) -> Arguments:
    yield ("apply", path, "--out", out / "w.safetensors")
    yield ("diff", path, ground.plan)
    yield ("verify", path, ground.weights)
    yield ("compose", ground.plan, path, "--out", out / "both.json")
    yield ("preview", path)
    yield ("export", path, "--out", out / "export")
    yield ("plan", "--rule", "random", "--like", path, "--out", out / "control.json")
    yield (
        *("finetune", *MODEL, "--data", "pneumonia", "--plan", path, *SHORT),
        *("--out", out / "run"),
    )


def _of_diagnosis(ground: Ground, path: Path, out: Path) -> Arguments:
    yield ("judge", path)
    yield (
        *("plan", "--diagnosis", path, "--rule", "threshold", "--metric", "grad_l2"),
        *("--threshold", "1", "--out", out / "plan.json"),
    )


def _of_weights(ground: Ground, path: Path, out: Path) -> Arguments:
    yield (
        *("plan", *MODEL[:2], "--checkpoint", path, "--layers", "conv1.0"),
        *("--out", out / "plan.json"),
    )
    yield ("verify", ground.plan, path)
    yield ("diff", path, ground.weights)


def _of_data(ground: Ground, path: Path, out: Path) -> Arguments:
    yield ("measure", *MODEL, "--data", path, *QUICK, "--out", out / "d.json")
    yield ("preview", ground.plan, "--data", path)


def _of_part(ground: Ground, path: Path, out: Path) -> Arguments:
    yield ("merge", path, "--out", out / "d.json")


def _of_events(ground: Ground, path: Path, out: Path) -> Arguments:
    yield ("apply", ground.plan, "--out", out / "w.safetensors", "--events", path)
    yield ("preview", ground.plan, "--stop-file", path)
    yield ("apply", ground.plan, "--out", path)
    yield ("export", ground.plan, "--out", path)
    yield ("compose", ground.plan, ground.units, "--out", path)


def _of_names(ground: Ground, scratch: Path) -> Iterator[Command]:
    out = ["--out", str(scratch / "out" / "x.json")]
    mine = ["plan", *CLASSES]
    for name in hostile.NAMES:
        _empty(scratch)
        # As a name of what is written it stays below the folder, whatever it is.
        below = name.replace("..", "").lstrip("/")
        forms: tuple[list[str], ...] = (
            [*mine, "--layers", name, *out],
            [*mine, "--layers", name, "--syntax", "regex", *out],
            [*mine, "--layers", name, "--syntax", "type", *out],
            [*mine, "--layers", "conv1.0", "--name", name, *out],
            [*mine, "--layers", "conv1.0", "--scheme", name, *out],
            [*mine, "--layers", "conv1.0", "--set", f"{name}=1", *out],
            [*mine, "--layers", "conv1.0", "--freeze", name, *out],
            [*mine, "--layers", "conv1.0", "--lr-factor", f"{name}=1", *out],
            [*mine, "--units", f"{name}=0", *out],
            [*mine, "--rule", name, *out],
            [*mine, "--layers", "conv1.0", "--out", f"{scratch}/{below}"],
            ["plan", "--model", name, "--layers", "conv1.0", *out],
            ["plan", "--model", f"timm:{name}", "--layers", "conv1.0", *out],
            ["plan", "--model", f"test_resnet.{name}", "--layers", "conv1.0", *out],
            ["plan", *MODEL[:2], "--checkpoint", name, "--layers", "conv1.0", *out],
            ["measure", *MODEL, "--data", name, *out],
            ["measure", *MODEL, "--data", f"torchvision:{name}:{name}", *out],
            ["measure", *MODEL, "--data", f"torchvision:CIFAR10:{name}", *out],
            ["measure", *MODEL, "--data", "pneumonia", "--preset", name, *out],
            ["measure", *MODEL, "--data", "pneumonia", "--device", name, *out],
            ["judge", str(ground.diagnosis), "--threshold", f"{name}=1"],
            ["apply", name, *out],
            ["apply", str(ground.plan), "--out", f"{scratch}/{below}"],
            ["export", str(ground.plan), "--out", f"{scratch}/{below}"],
            ["apply", str(ground.plan), "--out", f"{scratch}/w", "--events", f"{scratch}/{below}"],
            ["diff", name, str(ground.plan)],
            ["diff", f"{name}.pt", f"{name}.pt"],
            ["merge", name, *out],
            ["preview", str(ground.plan), "--data", name],
            ["list", name],
            [name],
        )
        for arguments in forms:
            if any(each in ("--help", "-h") for each in arguments):
                continue
            yield f"{arguments[0][:20]!r}, the name {name[:20]!r}", arguments
    yield from _named_inside(ground, scratch)


def _named_inside(ground: Ground, scratch: Path) -> Iterator[Command]:
    """Yield commands on files that carry strange names within: plans and folders of images."""
    plan = json.loads(ground.plan.read_text(encoding="utf-8"))
    for name in hostile.NAMES:
        _empty(scratch)
        content = plan | {"name": name[:200] or "plan", "evidence": {"note": name[:10_000]}}
        content["freeze"] = [name[:512] or "x"]
        path = hostile.written("plan.json", json.dumps(content))(scratch)
        yield f"diff, named {name[:20]!r} inside", ["diff", str(path), str(ground.plan)]
        yield f"apply, named {name[:20]!r} inside", ["apply", str(path), "--out", f"{scratch}/w"]
        yield f"export, named {name[:20]!r} inside", ["export", str(path), "--out", f"{scratch}/e"]
        folder = scratch / "images"
        with contextlib.suppress(OSError, ValueError):
            below = name.replace("..", "").lstrip("/")[:60]
            for label in (below, "other"):
                (folder / label).mkdir(parents=True)
                for i in range(4):
                    copied = folder / label / f"{below.replace('/', '')}{i}.png"
                    copied.write_bytes(_picture(i))
            measured = ("measure", *MODEL, "--data", str(folder), *QUICK, "--out", f"{scratch}/d")
            yield f"measure, classes named {name[:20]!r}", list(measured)


def _picture(seed: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (32, 32), random.Random(seed).randbytes(1_024)).save(buffer, "PNG")
    return buffer.getvalue()
