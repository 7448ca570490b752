"""The connectivity of every architecture, put to the test: `python -m tests.sweep_units`.

Of each network in `assets/sweep.json` up to a number of parameters some units are cut off, by
zeroing what reads them, and what makes them is then redrawn: the outputs must not change by one
bit. The table of how many units can be reset on their own is `assets/units.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from core.errors import LimberError
from core.load import build_module, resolve_model
from tests.sweep import read_table
from tests.test_network_connections import assert_units_are_cut_off

TABLE = Path(__file__).resolve().parent.parent / "assets" / "units.json"
MOST_PARAMETERS = 8_000_000


def row_of(library: str, model: str, size: int) -> list[object]:
    """Return library, model, units, how many are free, the commonest refusal, and the result."""
    spec = resolve_model(f"{library}:{model}", weights="none")
    module = build_module(spec, classes=5, seed=0)
    try:
        found = assert_units_are_cut_off(module, size, share=0.05)
    except (LimberError, AssertionError) as error:
        said = (str(error).splitlines() or ["the outputs changed"])[0]
        return [library, model, 0, 0, "", f"{type(error).__name__}: {said[:160]}"]
    bundles = [int(each) for of in found.bundles.values() for each in of]
    refused = Counter(found.reasons[each] for each in bundles if not found.free(each))
    refused.pop("its units are the network's outputs", None)
    why = refused.most_common(1)[0][0] if refused else ""
    return [library, model, len(bundles), sum(map(found.free, bundles)), why, "ok"]


def main(arguments: list[str]) -> int:
    """Run the networks that are named, or all, and write the table when all were run."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep_units", description=__doc__)
    parser.add_argument("models", nargs="*", help="names; default all")
    parser.add_argument("--most", type=int, default=MOST_PARAMETERS, help="parameters at most")
    options = parser.parse_args(arguments)
    chosen = options.models
    _, known = read_table()
    rows = []
    for each in known:
        wanted = each.model in chosen if chosen else each.parameters <= options.most
        if wanted and each.result == "ok":
            rows.append(row_of(each.library, each.model, each.size))
            print(*rows[-1], flush=True)
    if not chosen:
        packages = ("timm", "torch", "torchvision")
        content = {
            "versions": {package: version(package) for package in packages},
            "columns": ["library", "model", "units", "free", "refused_mostly", "result"],
            "rows": rows,
        }
        lines = json.dumps(content, ensure_ascii=False).replace('], ["', '],\n["')
        TABLE.write_text(lines + "\n", encoding="utf-8")
    return int(any(row[-1] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
