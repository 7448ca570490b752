"""What measuring costs: the complete default set against the bare forward and backward passes.

    python -m tests.benchmarks                       all models, a table, about ten minutes
    python -m tests.benchmarks --models resnet18     some
    python -m tests.benchmarks --out assets/benchmarks.json

Bare and measured passes take turns on the same batch, in CPU time of the process (wall time and
device synchronisation on CUDA), and the median of the pairs' ratios is shown: a busy machine slows
both halves of a pair alike. Beside it stand what people use today: hooks that reduce once a metric
and call `.item()`, delve, and TorchLens.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.load import load_model, resolve_model
from core.measure import figures_of, gauging
from core.network.hooks import batch_statistics, module_kept
from core.network.outline import outline_module
from core.records import ModelOutline

MODELS = {
    "resnet18": "timm:resnet18",
    "efficientnet_lite0": "timm:tf_efficientnet_lite0",
    "mobilenetv2": "timm:mobilenetv2_100",
    "vit_tiny": "timm:vit_tiny_patch16_224",
    "vit_small": "timm:vit_small_patch16_224",
}
ON_CUDA = {"resnet50": "timm:resnet50", "vit_base": "timm:vit_base_patch16_224"}
# Batches of a measurement with the default 128 images: what is done once is spread over them.
BATCHES = 8
CLASSES = 10


class Bench:
    """One model, one batch, and the ways to run it."""

    def __init__(self, name: str, *, batch: int, size: int, device: str, dtype: str) -> None:
        spec = resolve_model(name, weights="none")
        loaded = load_model(spec, classes=CLASSES)
        self.outline: ModelOutline = outline_module(loaded.module, loaded.card, loaded.head)
        self.module: nn.Module = loaded.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn((batch, 3, size, size), generator=generator).to(
            device, memory_format=torch.channels_last
        )
        self.labels = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
        self.device, self.dtype = device, getattr(torch, dtype)

    def loss(self) -> Tensor:
        """Return the summed loss of the batch."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype, enabled=mixed):
            logits = self.module(self.inputs)
        return F.cross_entropy(logits.float(), self.labels, reduction="sum")

    def bare(self) -> None:
        """Run forward and backward as a training loop does, from no gradients."""
        self.clear()
        self.loss().backward()

    def naive(self) -> None:
        """Run with hooks that take one reduction a metric and wait for each number."""
        found: list[float] = []

        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return
            h = output.detach()
            found.extend(
                each.item()
                for each in (
                    h.abs().mean(),
                    h.std(),
                    (h == 0).float().mean(),
                    (h > 0).float().mean(),
                    (h.abs() <= 0.05).float().mean(),
                )
            )
            output.register_hook(
                lambda g: found.extend(each.item() for each in (g.norm(), g.abs().mean()))
            )

        leaves = [each for each in self.module.modules() if not list(each.children())]
        handles = [each.register_forward_hook(look) for each in leaves]
        try:
            self.loss().backward()
        finally:
            for handle in handles:
                handle.remove()
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                g, w = parameter.grad, parameter.detach()
                found.extend(
                    each.item()
                    for each in (g.norm(), g.abs().mean(), (w * g).abs().mean(), w.norm())
                )

    def torchlens(self) -> None:
        """Run one forward pass under TorchLens, keeping every activation; no backward pass."""
        import torchlens

        torchlens.trace(self.module, self.inputs)

    def clear(self) -> None:
        """Forget gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None


def clock(device: str) -> float:
    """Return CPU seconds of the process, or wall seconds after the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(call: Callable[[], object], device: str) -> float:
    """Return the seconds a call takes."""
    begun = clock(device)
    call()
    return clock(device) - begun


def pairs(bench: Bench, other: Callable[[], object], *, count: int) -> tuple[float, list[float]]:
    """Return the median seconds of a bare pass and the ratios of `count` pairs, turn about."""
    bare, ratios = [], []
    for i in range(count + 1):
        first = timed(bench.bare, bench.device) if i % 2 else None
        second = timed(other, bench.device)
        begun = first if first is not None else timed(bench.bare, bench.device)
        if i:
            bare.append(begun)
            ratios.append(second / begun)
    return statistics.median(bare), ratios


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return one model's row."""
    made = (MODELS | ON_CUDA).get(name, name)
    bench = Bench(
        made, batch=options.batch, size=options.size, device=options.device, dtype=options.dtype
    )
    row: dict[str, Any] = {"model": name, "layers": len(bench.outline.layers)}
    with module_kept(bench.module):
        batch_statistics(bench.module)
        with gauging(bench.module, bench.outline.layers, dtype=bench.dtype) as gauge:
            done = 0

            def measured() -> None:
                nonlocal done
                gauge.add(bench.inputs, bench.labels, first=done)
                done += len(bench.inputs)

            bare_s, ratios = pairs(bench, measured, count=options.pairs)
            ending = statistics.median(
                timed(lambda: figures_of(gauge.summed), bench.device) for _ in range(3)
            )
        row |= {
            "bare_s": bare_s,
            "limber": statistics.median(ratios),
            "limber_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "ending_s": ending,
            "limber_with_ending": statistics.median(ratios) + ending / (BATCHES * bare_s),
            "sums": gauge.backend,
        }
        others: dict[str, Callable[[], object]] = {"naive_hooks": bench.naive}
        if not options.alone:
            others["torchlens_forward"] = bench.torchlens
        for key, call in others.items():
            bench.clear()
            try:
                row[key] = statistics.median(
                    pairs(bench, call, count=max(3, options.pairs // 4))[1]
                )
            except Exception as error:
                row[key] = f"failed: {str(error).splitlines()[0][:100]}"
        if not options.alone:
            bench.clear()
            row["delve"] = delve(bench, count=max(3, options.pairs // 4))
    return row


def delve(bench: Bench, *, count: int) -> float | str:
    """Return delve's median ratio; it stays on the module, so that it comes last."""
    try:
        import contextlib
        import io

        from delve import SaturationTracker

        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare = [timed(bench.bare, bench.device) for _ in range(count)]
            tracker = SaturationTracker(
                "/tmp/limber-delve",
                [],
                bench.module,
                stats=["lsat"],
                device=bench.device,
            )
            bench.module.train()

            def run() -> None:
                bench.bare()
                tracker.add_saturations()

            ratios = []
            for i in range(count):
                ratios.append(timed(run, bench.device) / bare[i])
            tracker.close()
        return statistics.median(ratios)
    except Exception as error:
        return f"failed: {str(error).splitlines()[0][:100]}"


def peak(name: str, options: argparse.Namespace, *, measured: bool) -> int:
    """Return the bytes a process grows by over some passes, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks",
        "--peak",
        "limber" if measured else "bare",
        "--models",
        name,
        "--batch",
        str(options.batch),
        "--size",
        str(options.size),
        "--device",
        options.device,
        "--dtype",
        options.dtype,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak_here(options: argparse.Namespace) -> int:
    """Return by how many bytes memory grows over the loaded network and batch."""
    name = options.models[0]
    bench = Bench(
        (MODELS | ON_CUDA).get(name, name),
        batch=options.batch,
        size=options.size,
        device=options.device,
        dtype=options.dtype,
    )
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = 0 if cuda else resident()
    with module_kept(bench.module):
        batch_statistics(bench.module)
        if options.peak == "limber":
            with gauging(bench.module, bench.outline.layers, dtype=bench.dtype) as gauge:
                for i in range(3):
                    gauge.add(bench.inputs, bench.labels, first=i * options.batch)
                figures_of(gauge.summed)
        else:
            for _ in range(3):
                bench.bare()
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def keep_memory() -> None:
    """Let the C library keep freed memory on both sides of a pair.

    Left to itself glibc gives large blocks back and takes them anew, page by page, now on this
    side of a pair and now on the other: up to a fifth of a pass, by chance.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def resident() -> int:
    """Return the resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--models", nargs="+", help=f"some of {', '.join(MODELS | ON_CUDA)}")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without delve and TorchLens")
    parser.add_argument(
        "--default-memory", action="store_true", help="leave the C library's ways as they are"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=("bare", "limber"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.models = options.models or list(ON_CUDA if options.device == "cuda" else MODELS)
    if options.peak:
        print(peak_here(options))
        return
    if not options.default_memory:
        keep_memory()
    rows = []
    for name in options.models:
        row = compare(name, options)
        bytes_bare = peak(name, options, measured=False)
        row["memory"] = peak(name, options, measured=True) / bytes_bare
        row["memory_bare_bytes"] = bytes_bare
        rows.append(row)
        print(
            f"{name:20} bare {row['bare_s']:.3f} s  limber {row['limber']:.3f}"
            f" (with ending {row['limber_with_ending']:.3f})  memory {row['memory']:.3f}"
            f"  naive {shown(row['naive_hooks'])}  delve {shown(row.get('delve'))}"
            f"  TorchLens (forward alone) {shown(row.get('torchlens_forward'))}",
            flush=True,
        )
    if options.out:
        found = {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
            "threads": options.threads,
            "batch": options.batch,
            "size": options.size,
            "dtype": options.dtype,
            "torch": torch.__version__,
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def shown(value: object) -> str:
    """Return a ratio for the table."""
    return f"{value:.2f}" if isinstance(value, float) else str(value or "-")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
