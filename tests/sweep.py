"""Every architecture through every stage: `python -m tests.sweep`.

One network of each timm family and every torchvision classification network is built with random
weights, measured beside its fresh twin, edited by a plan and trained for one step. The table of
what came out is `assets/sweep.json`; what cannot go through stands there with its reason.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "assets" / "sweep.json"

CLASSES = 5
BATCHES = 2
BATCH_SIZE = 2
SEED = 0
# Sides that are tried, from small to large; each is rounded up to what the network takes.
SIDES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 768, 1024)
TIME_LIMIT_S = 300.0
MEMORY_LIMIT_GB = 12.0
# A worker that holds more than this between two networks is replaced: freed memory is not
# always given back.
WORKER_KEEPS_GB = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A network to send through: its library, the module that defines it, its name."""

    library: str
    family: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came out for one network.

    Attributes:
        library: "timm" or "torchvision".
        family: The library's module that defines it.
        model: Name in the library.
        parameters: Entries in all parameters, shared ones counted once.
        size: Side of the smallest images it was found to take, in pixels.
        layers: Layers in its outline.
        silent: Layers that no gradient reaches; each has its reason in the figures.
        sites: Activation functions run in one forward pass.
        attributed: How many of them a layer's figures speak of.
        fed: Layers with figures of an activation.
        seconds: Wall time of everything together.
        result: "ok", or the stage and the reason.
    """

    library: str
    family: str
    model: str
    parameters: int = 0
    size: int = 0
    layers: int = 0
    silent: int = 0
    sites: int = 0
    attributed: int = 0
    fed: int = 0
    seconds: float = 0.0
    result: str


class SweepError(Exception):
    """A stage went through but gave something wrong."""


@cache
def _parameter_counts() -> Mapping[str, int]:
    path = ROOT / "assets" / "timm_parameters.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["parameters"])


def _parameters_of(name: str) -> float:
    """Return a timm network's number of parameters; infinity where it cannot be told."""
    known = _parameter_counts().get(name)
    if known is not None:
        return known
    import torch

    from core.errors import LimberError
    from core.load import build_module, resolve_model

    try:
        with torch.device("meta"):
            module = build_module(resolve_model(f"timm:{name}"), classes=None, seed=0)
    except LimberError:
        return math.inf
    return sum(parameter.numel() for parameter in module.parameters())


def timm_families() -> Mapping[str, frozenset[str]]:
    """Return the names of timm's networks by the module that defines them."""
    import timm
    from timm.models import _registry

    known = frozenset(timm.list_models())
    families = {
        family: frozenset(names) & known for family, names in _registry._module_to_models.items()
    }
    return {family: names for family, names in families.items() if names}


def _smallest(names: Iterable[str]) -> str:
    """Return the network with the fewest parameters, of equals the one with the least images."""
    import timm

    def weighed(name: str) -> tuple[float, int, str]:
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        side = int(config.input_size[-1]) if config is not None else 0
        return _parameters_of(name), side, name

    return min(names, key=weighed)


def candidates() -> tuple[Candidate, ...]:
    """Return the smallest network of each timm family, then every one of torchvision's."""
    import torchvision.models as tv

    rows = [
        Candidate(library="timm", family=family, model=_smallest(names))
        for family, names in sorted(timm_families().items())
    ]
    rows += [
        Candidate(
            library="torchvision",
            family=tv.get_model_builder(name).__module__.rpartition(".")[2],
            model=name,
        )
        for name in tv.list_models(module=tv)
    ]
    return tuple(rows)


def sweep_model(candidate: Candidate) -> Row:
    """Send one network through every stage; whatever goes wrong becomes the row's result."""
    begun = time.perf_counter()
    found: dict[str, Any] = {}
    stages = ["load"]
    result = "ok"
    try:
        for stage in _stages(candidate, found):
            stages.append(stage)
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "" if isinstance(error, SweepError) else f"{type(error).__name__}: "
        result = f"{stages[-1]}: {kind}{text}"[:300]
    return Row(
        **asdict(candidate),
        **found,
        seconds=round(time.perf_counter() - begun, 1),
        result=result,
    )


def _stages(candidate: Candidate, found: dict[str, Any]) -> Iterator[str]:
    """Run the stages, giving each one's name before it begins and what is learnt to `found`."""
    import torch

    from core.edit.apply import edited_state
    from core.files.companions import plan_json
    from core.load import build_module, load_model, resolve_model, state_sha256
    from core.measure import measure_network
    from core.network.outline import outline_module
    from core.pipeline.applying import load_edited
    from core.plan.making import make_plan
    from core.trial.arms import Arm, Images, Settings
    from core.trial.engine import finetune

    yield "load"
    spec = resolve_model(f"{candidate.library}:{candidate.model}", weights="none")
    loaded = load_model(spec, classes=CLASSES, head_seed=SEED)
    module, card = loaded.module, loaded.card
    found["parameters"] = sum(parameter.numel() for parameter in module.parameters())

    yield "outline"
    outline = outline_module(module, card, loaded.head)
    found["layers"] = len(outline.layers)

    yield "size"
    sizes = working_sizes(module, multiple=card.size_multiple, known=card.default_size)

    yield "measure"
    before = state_sha256(module.state_dict())
    twin = build_module(spec, classes=CLASSES, seed=SEED + 1)
    draw = torch.Generator()
    for size in sizes:
        found["size"] = size
        batches = _batches(size, draw.manual_seed(SEED))
        own = measure_network(module, batches, outline.layers)
        fresh = measure_network(twin, batches, outline.layers)
        # Norms over the two values of a tiny feature map can overflow on the way back.
        if math.isfinite(own.loss + fresh.loss) and not _overflows(own) and not _overflows(fresh):
            break
    if state_sha256(module.state_dict()) != before:
        raise SweepError("measuring changed the network")
    found["silent"] = _check_gradients(own, outline)
    _check_gradients(fresh, outline)
    found["fed"] = len(own.activation_types)
    sites = _sites_run(module, size)
    spoken = {layer.activation for layer in outline.layers if layer.activation}
    found["sites"], found["attributed"] = len(sites), len(spoken & sites)
    del twin, own, fresh

    yield "plan"
    plan = make_plan(outline, _middle_layers(outline), scheme="architecture", seed=SEED + 2)

    yield "apply"
    state = module.state_dict()
    edited, receipt = edited_state(
        state,
        plan,
        fresh=lambda seed: build_module(spec, classes=CLASSES, seed=seed).state_dict(),
        parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
        sha256=state_sha256,
        plan_text=plan_json(plan),
    )
    if state_sha256(state) != before:
        raise SweepError("applying the plan changed the given weights")
    named = {name for target in plan.targets for name in (*target.parameters, *target.buffers)}
    fresh = build_module(spec, classes=CLASSES, seed=SEED + 2).state_dict()
    for name in state:
        wanted = fresh[name] if name in named else state[name]
        if not torch.equal(edited[name], wanted):
            raise SweepError(f'"{name}" is not what the plan says')
    if not receipt.parameters_touched:
        raise SweepError("the plan touched nothing")
    del fresh
    load_edited(module, edited)
    del state, edited

    yield "train"
    pixels = torch.randint(256, (4, 3, size, size), generator=draw, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (4,), generator=draw)
    steps = finetune(
        [Arm(name="plan", build=lambda seed: module, head=loaded.head)],
        Images(
            train=pixels,
            train_labels=labels,
            val=pixels[:2],
            val_labels=labels[:2],
            mean=card.preprocessing.mean,
            std=card.preprocessing.std,
        ),
        Settings(steps=1, batch_size=BATCH_SIZE, lr=card.default_lr),
        seeds=(SEED,),
        device=torch.device("cpu"),
    )
    losses = [record.train_loss for record in steps if record.train_loss is not None]
    if len(losses) != 1 or not math.isfinite(losses[0]):
        raise SweepError(f"one step gave the losses {losses}")


def working_sizes(module: Any, *, multiple: int, known: int) -> list[int]:
    """Return sides of images the network can be measured and trained on: the smallest, and more.

    Args:
        module: The network, left as it was.
        multiple: What the side must be a multiple of.
        known: A side that works, returned last; larger ones are not tried.
    """
    import torch

    from core.network.hooks import batch_statistics, module_kept
    from core.network.trace import first_tensor

    sides = sorted({-(-side // multiple) * multiple for side in SIDES})
    for place, side in enumerate(sides):
        if side >= known:
            break
        images = torch.randn(BATCH_SIZE, 3, side, side)
        try:
            with module_kept(module), torch.no_grad():
                module.train()(images)
                batch_statistics(module)
                logits = first_tensor(module(images))
        except Exception:
            continue
        if logits is not None and bool(logits.isfinite().all()):
            return [each for each in sides[place : place + 3] if each < known] + [known]
    return [known]


def _batches(size: int, draw: Any) -> list[tuple[Any, Any]]:
    import torch

    return [
        (
            torch.randn((BATCH_SIZE, 3, size, size), generator=draw),
            torch.randint(CLASSES, (BATCH_SIZE,), generator=draw),
        )
        for _ in range(BATCHES)
    ]


def _overflows(measured: Any) -> bool:
    reasons = (figures["grad_l2"].reason for figures in measured.metrics.values())
    return any(reason and "finite" in reason for reason in reasons)


def _sites_run(module: Any, size: int) -> frozenset[str]:
    """Return the names of all activation functions that one forward pass runs."""
    import torch

    from core.network.hooks import module_kept
    from core.network.trace import traced_forward

    names: set[str] = set()
    with module_kept(module), torch.no_grad():
        module.eval()
        with traced_forward(module, before_activation=lambda site, z: names.add(site.name)):
            module(torch.randn(BATCH_SIZE, 3, size, size))
    return frozenset(names)


def _check_gradients(measured: Any, outline: Any) -> int:
    """Raise unless every layer has finite gradient figures or a reason; count the latter."""
    silent = 0
    for layer in outline.layers:
        figure = measured.metrics[layer.name]["grad_l2"]
        if figure.value is None:
            silent += 1
            if not figure.reason or "finite" in figure.reason:
                raise SweepError(f'"{layer.name}" has no gradient: {figure.reason}')
        elif not math.isfinite(figure.value):
            raise SweepError(f'the gradient of "{layer.name}" is {figure.value}')
        elif not layer.executed:
            raise SweepError(f'"{layer.name}" has a gradient, but was not seen to run')
    return silent


def _middle_layers(outline: Any) -> list[str]:
    """Return the layers in the middle of the network, with whatever shares their weights."""
    body = [layer for layer in outline.layers if layer.executed and not layer.head]
    middle = len(body) // 2
    chosen = body[max(middle - 1, 0) : middle + 2]
    shared = {name for layer in chosen for group in layer.tied for name in group}
    return [
        layer.name
        for layer in outline.layers
        if layer in chosen or shared & {parameter.name for parameter in layer.parameters}
    ]


def read_table(path: Path = TABLE) -> tuple[dict[str, str], tuple[Row, ...]]:
    """Return the versions a table was made with, and its rows."""
    if not path.is_file():
        return {}, ()
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(Row(**dict(zip(content["columns"], row, strict=True))) for row in content["rows"])
    return content["versions"], rows


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a table with one line a network, so that two tables can be told apart line by line."""
    versions = {name: version(name).partition("+")[0] for name in ("timm", "torch", "torchvision")}
    columns = [field.name for field in fields(Row)]
    lines = [json.dumps([getattr(row, column) for column in columns]) for row in rows]
    path.write_text(
        f'{{"versions": {json.dumps(versions)},\n"columns": {json.dumps(columns)},\n"rows": [\n'
        + ",\n".join(lines)
        + "\n]}\n",
        encoding="utf-8",
    )


def _work(connection: Connection) -> None:
    """Answer candidates with rows until the other end hangs up."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            candidate = connection.recv()
        except EOFError:
            return
        connection.send(sweep_model(candidate))


def _held_gb(pid: int | None) -> float:
    """Return the memory a process holds; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * 4096 / 1e9


class Worker:
    """A process that sweeps one network after the other, and a new one after a mishap.

    Importing torch takes as long as a small network, so a process for each would double the time.
    """

    def __init__(self, *, time_limit_s: float, memory_limit_gb: float) -> None:
        self._time_limit_s, self._memory_limit_gb = time_limit_s, memory_limit_gb
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, candidate: Candidate) -> Row:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_work, args=(other,), daemon=True)
            self._process.start()
            other.close()
        self._connection.send(candidate)
        begun = time.perf_counter()
        try:
            while not self._connection.poll(0.5):
                held = _held_gb(self._process.pid)
                if held > self._memory_limit_gb:
                    return self._lost(candidate, begun, f"needs more than {held:.0f} GB of memory")
                if time.perf_counter() - begun > self._time_limit_s:
                    reason = f"takes longer than {self._time_limit_s:.0f} s"
                    return self._lost(candidate, begun, reason)
            row: Row = self._connection.recv()
        except EOFError:
            return self._lost(candidate, begun, "the process died")
        if _held_gb(self._process.pid) > WORKER_KEEPS_GB:
            self.close()
        return row

    def _lost(self, candidate: Candidate, begun: float, reason: str) -> Row:
        self.close()
        seconds = round(time.perf_counter() - begun, 1)
        return Row(**asdict(candidate), seconds=seconds, result=reason)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def main(arguments: Sequence[str]) -> int:
    """Sweep what was asked for; return 0 when all of it went through."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help='globs over "timm/FAMILY/MODEL" and "torchvision/FAMILY/MODEL", or parts of these',
    )
    parser.add_argument("--slice", metavar="K/N", help="every N-th network, from the K-th")
    parser.add_argument(
        "--failed", action="store_true", help="only those that the table lacks or has not as ok"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="table to write the rows into; a whole sweep takes assets/sweep.json, a part none",
    )
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--memory", type=float, default=MEMORY_LIMIT_GB, metavar="GB")
    options = parser.parse_args(arguments)

    everything = candidates()
    chosen = _chosen(everything, only=options.only, part=options.slice)
    out = options.out
    if out is None and len(chosen) == len(everything):
        out = TABLE
    _, known = read_table(out or TABLE)
    rows = {(row.library, row.family, row.model): row for row in known}
    if options.failed:
        good = {key for key, row in rows.items() if row.result == "ok"}
        chosen = [each for each in chosen if tuple(asdict(each).values()) not in good]
    if not chosen:
        print("Nothing to do: no network fits.")
        return 0
    worker = Worker(time_limit_s=options.time_limit, memory_limit_gb=options.memory)
    begun = time.perf_counter()
    failed = 0
    try:
        for done, candidate in enumerate(chosen, start=1):
            row = worker(candidate)
            failed += row.result != "ok"
            rows[row.library, row.family, row.model] = row
            left = (time.perf_counter() - begun) / done * (len(chosen) - done)
            print(
                f"{done}/{len(chosen)}  {row.library}/{row.family}/{row.model}  {row.size} px  "
                f"{row.layers} layers ({row.silent} silent)  {row.attributed}/{row.sites} "
                f"activations  {row.seconds} s  {row.result}  (about {left / 60:.0f} min left)",
                flush=True,
            )
            if out is not None:
                keys = [tuple(asdict(each).values()) for each in everything]
                write_table(out, [rows[key] for key in keys if key in rows])
    finally:
        worker.close()
    print(f"{len(chosen) - failed} went through, {failed} did not.")
    return 1 if failed else 0


def _chosen(
    everything: Sequence[Candidate], *, only: Sequence[str] | None, part: str | None
) -> list[Candidate]:
    chosen = [
        each
        for each in everything
        if not only
        or any(
            fnmatch.fnmatchcase(text, pattern)
            for pattern in only
            for text in (
                each.library,
                each.family,
                each.model,
                f"{each.library}/{each.family}",
                f"{each.library}/{each.family}/{each.model}",
            )
        )
    ]
    if part is not None:
        place, _, parts = part.partition("/")
        chosen = chosen[int(place) - 1 :: int(parts)]
    return chosen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
