"""Write the page of metrics and checks from the catalogue: `python -m tests.write_metrics`."""

from __future__ import annotations

from pathlib import Path

from core import list_metrics, list_presets
from core.catalogue.checks import Check
from core.catalogue.metrics import MetricInfo
from core.judge import FAR_BEYOND

METRICS_FILE = Path(__file__).resolve().parent.parent / "assets" / "metrics.md"
FAMILIES = {
    "gradient": "Gradients",
    "activation": "Activations",
    "weight": "Weights",
    "transfer": "Transfer (the slower pass, `--transfer`)",
}
INTRODUCTION = """# Metrics and checks

Made by `python -m tests.write_metrics` from `core/catalogue/metrics.py` and
`core/catalogue/checks.py`.

Every figure stands beside that of a fresh twin: the same architecture with its own random
initialisation and the same new head, on the same batches. A metric that does not apply to a layer
has no value but a reason, never 0. Each figure says over how many rows, batches or entries it was
taken (n); ranks say the largest value that so many rows allow.

Figures that vary with the images have a 95 % interval from the spread between batches (Student's
t), and so has their ratio to the twin, from batches measured in pairs. Gradient norms of single
batches are mostly noise where batches disagree; their intervals are widened by that share.
"""
CHECKS = f"""## Checks

Limits are those of the source named, and can be changed. Two things are Limber's, in every preset:

- A check on a figure by itself (not on its ratio) does not count a layer in which the fresh twin
  trips it as well, unless the network is {FAR_BEYOND:g} times further out (of shares: in odds).
  Nor does it count layers in which only the network trips, where about as many trip in the twin
  alone. These layers are named in a sentence of their own, "As in the fresh twin".
- Where the twin's figure is 0, or too small beside the network's to be told from 0 in single
  precision, there is no ratio. Checks on the ratio pass over such layers and say so, unless they
  ask for a least share as well: over half saturated is more than any multiple of nothing.
"""


def _bound(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _entry(info: MetricInfo) -> str:
    lines = [
        f"### `{info.name}`: {info.title}",
        "",
        f"- Formula: `{info.formula}`",
        f"- Unit: {'a pure number' if info.unit == '1' else info.unit}",
    ]
    if info.low is not None or info.high is not None:
        ends = f"from {_bound(info.low)}" if info.low is not None else "up to"
        lines.append(f"- Range: {ends}" + (f" to {_bound(info.high)}" if info.high else ""))
    lines += [
        f"- Applies to: {info.applies_to}",
        f"- Reads: {info.reads}",
        f"- What to do: {info.advice}",
        f"- Source: {info.source}",
        "",
    ]
    return "\n".join(lines)


def _check(check: Check) -> str:
    says = check.predicate()
    return f"- `{check.name}` (`{check.metric}`): layers that {says}. Source: {check.source}."


def metrics_text() -> str:
    """The page as the file holds it."""
    parts = [INTRODUCTION]
    for family, title in FAMILIES.items():
        for level, name in (("layer", title), ("unit", f"{title}, by unit")):
            entries = [
                _entry(info)
                for info in list_metrics()
                if info.family == family and info.level == level
            ]
            if entries:
                parts += [f"## {name}\n", *entries]
    parts.append(CHECKS)
    for preset in list_presets():
        checks = "\n".join(_check(check) for check in preset.checks)
        parts.append(f"### `{preset.name}`: {preset.title}\n\n{preset.description}\n\n{checks}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    METRICS_FILE.write_text(metrics_text(), encoding="utf-8")
    print(f"{METRICS_FILE.name}: {METRICS_FILE.stat().st_size} bytes")
