"""Write assets/rules.md, the page of rules and schemes, from their registries."""

from __future__ import annotations

from pathlib import Path

from core.catalogue.rules import list_rules
from core.catalogue.schemes import list_schemes

RULES_FILE = Path(__file__).resolve().parent.parent / "assets" / "rules.md"


def rules_text() -> str:
    """Return the page."""
    lines = [
        "# Rules and schemes",
        "",
        "What is selected, and what is written into it. This page is made from the registries "
        "(`python -m tests.write_rules`); `python -m core list rules` and `list schemes` print the "
        "same.",
        "",
        "## Rules",
    ]
    for rule in list_rules():
        lines += ["", f"### {rule.name}: {rule.title}", "", rule.description, ""]
        selects = {"any": "whole layers, units or single weights"}.get(
            rule.granularity, f"{rule.granularity}s"
        )
        lines.append(f"- Selects {selects}; looks at {rule.needs} beside the weights.")
        for name, default in rule.options.items():
            words = f" ({', '.join(rule.choices[name])})" if name in rule.choices else ""
            told = (
                "must be given"
                if default is None
                else f"default {default:g}"
                if isinstance(default, float)
                else f"default {default}"
                if default
                else "in place of a share"
            )
            lines.append(f"- `--{name}`{words}: {told}.")
        lines += [f"- Writes `{rule.scheme}` unless told otherwise.", f"- Source: {rule.source}."]
    lines += ["", "## Schemes"]
    for scheme in list_schemes():
        symbol = f" (`{scheme.symbol}` in its paper)" if scheme.symbol else ""
        lines += ["", f"### {scheme.name}: {scheme.title}{symbol}", "", scheme.description, ""]
        lines.append(f"- For {', '.join(f'{each}s' for each in scheme.granularities)}.")
        for name, value in scheme.parameters.items():
            low, high = scheme.ranges.get(name, (None, None))
            span = "" if low is None else f", {low:g} to {high:g}"
            lines.append(f"- `--set {name}=...`: default {value:g}{span}.")
        if scheme.needs_data:
            lines.append("- Needs gradients, whose factors the plan then carries.")
        statistics = "go back to the fresh twin's" if scheme.resets_buffers else "stay"
        lines.append(f"- Running statistics of a whole layer {statistics}.")
        lines.append(f"- Source: {scheme.source}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    RULES_FILE.write_text(rules_text(), encoding="utf-8")
    print(f"{RULES_FILE.name}: {RULES_FILE.stat().st_size} bytes")
