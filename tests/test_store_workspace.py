"""A workspace on disk: where it lies, and what happens to one that is damaged."""

from __future__ import annotations

import os
from pathlib import Path

from dashboard.store import workspace as workspace_room


def test_a_damaged_workspace_file_is_set_aside(limber_home: Path) -> None:
    folder = limber_home / "workspaces" / "fedcba9876543210"
    folder.mkdir(parents=True)
    (folder / "workspace.json").write_text("{half", encoding="utf-8")

    opened = workspace_room.workspace("fedcba9876543210")

    assert opened.choice == workspace_room.Choice()
    assert (folder / "workspace.damaged.json").read_text(encoding="utf-8") == "{half"


def test_the_environment_names_the_home(limber_home: Path) -> None:
    assert workspace_room.home() == Path(os.environ["LIMBER_HOME"]).resolve()
