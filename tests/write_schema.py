"""Write the published JSON Schema of plans: `python -m tests.write_schema`."""

from __future__ import annotations

import json
from pathlib import Path

from core import plan_schema

SCHEMA_FILE = Path(__file__).resolve().parent.parent / "assets" / "plan.schema.json"


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(plan_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    print(f"{SCHEMA_FILE.name}: {SCHEMA_FILE.stat().st_size} bytes")
