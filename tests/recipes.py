"""Do the defaults train well? Accuracy reached, next to a linear probe's, and the seconds taken.

    python -m tests.recipes                                 the embedded networks and sets
    python -m tests.recipes --data fashionmnist.npz         another set besides; repeat for more

Each row is one untouched network on one set, with the defaults of `finetune` and one seed. The
result goes to `assets/recipes.json`, rows of other sets are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.load import resolve_data, resolve_model
from core.pipeline.arms import plan_arms
from core.pipeline.batches import DEFAULT_BATCH_SIZE, opened_images, outline_model
from core.pipeline.machine import choose_device, versions
from core.pipeline.progress import Progress
from core.pipeline.sweeping import fitted_probe
from core.pipeline.trial import (
    DEFAULT_EVAL_EVERY,
    DEFAULT_STEPS,
    DEFAULT_TRAIN_IMAGES,
    read_pixels,
)
from core.trial.arms import Settings
from core.trial.engine import finetune

ROOT = Path(__file__).parent.parent
OUT = ROOT / "assets" / "recipes.json"
NETWORKS = ("tf_efficientnet_lite0", "vit_small_patch14_dinov2")
SETS = ("bloodmnist", "pneumonia")


def one(network: str, data: str, **changed: Any) -> dict[str, Any]:
    """Return one row."""
    spec = resolve_model(network)
    images = opened_images(resolve_data(data), Progress())
    outline = outline_model(spec, classes=len(images.outline.classes))
    device = choose_device("auto")
    size = outline.default_size
    pixels = read_pixels(images, outline, size=size, train=DEFAULT_TRAIN_IMAGES, val=None)
    settings = Settings(
        **{
            "steps": DEFAULT_STEPS,
            "batch_size": DEFAULT_BATCH_SIZE,
            "lr": outline.default_lr,
            "eval_every": DEFAULT_EVAL_EVERY,
            **changed,
        }
    )
    probe = fitted_probe(spec, outline, pixels, device, Progress())
    begun = time.perf_counter()
    steps = list(
        finetune(plan_arms(spec, outline, {}), pixels, settings, seeds=(0,), device=device)
    )
    seconds = time.perf_counter() - begun
    reached = [step.val_accuracy for step in steps if step.val_accuracy is not None]
    return {
        "network": outline.title,
        "data": images.outline.title,
        "size": size,
        "train": len(pixels.train),
        "val": len(pixels.val),
        "lr": settings.lr,
        "accuracy": reached[-1],
        "probe": None if probe is None else probe.accuracy,
        "seconds": round(seconds, 1),
        "device": device.type,
    }


def with_table(readme: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the README with the rows between its marks."""
    lines = [
        "| network | images | px | accuracy | linear probe | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        probe = "-" if row["probe"] is None else f"{100 * row['probe']:.1f} %"
        lines.append(
            f"| {row['network']} | {row['data']} | {row['size']} | {100 * row['accuracy']:.1f} % | "
            f"{probe} | {row['seconds']:.0f} |"
        )
    table = "\n".join(lines)
    return re.sub(
        r"(<!-- recipes -->\n).*?(<!-- /recipes -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        readme,
        flags=re.DOTALL,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with the defaults and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.recipes")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--network", action="append", default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    kept: dict[str, Any] = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {"rows": []}
    rows = {(row["network"], row["data"]): row for row in kept["rows"]}
    for network in options.network or NETWORKS:
        for data in options.data or SETS:
            row = one(network, data)
            rows[row["network"], row["data"]] = row
            print(row, flush=True)
            result = {
                "steps": DEFAULT_STEPS,
                "batch_size": DEFAULT_BATCH_SIZE,
                "versions": versions(),
                "rows": list(rows.values()),
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = with_table(readme.read_text("utf-8"), list(rows.values()))
    readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
