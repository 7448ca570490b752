"""What a person has decided, on disk, so that a reload or a second tab finds it again.

A workspace is a folder with one JSON file. Session state dies with the browser tab; this does
not. Files are written beside their final name and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from core.records import Pattern

ROOT = Path(__file__).resolve().parents[2]
WORKSPACE_ID = re.compile(r"[0-9a-f]{16}")
UNDO_STEPS = 100
UPLOAD_NAME = 80


class _Value(BaseModel):
    # Unknown keys are ignored here, unlike in plans: an older program may meet a newer file.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Choice(_Value):
    """The network and the images, in the words the command line takes."""

    model: str = "tf_efficientnet_lite0"
    weights: Literal["pretrained", "none"] = "pretrained"
    checkpoint: str | None = None
    data: str = "bloodmnist"

    @property
    def model_key(self) -> str:
        """What the layer names depend on: picks are kept for each."""
        return f"{self.model}|{self.weights}|{self.checkpoint or ''}"


class MeasureOptions(_Value):
    """How to measure; `image_size` None is the model's own short-run size."""

    samples: int = 128
    batch_size: int = 32
    image_size: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    transfer: bool = False


class Judging(_Value):
    """By what the findings are made: a set of rules, and the limits that differ from its own."""

    preset: str = "limber"
    thresholds: dict[str, float] = {}


class TrainOptions(_Value):
    """How to fine-tune."""

    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    lr: float
    eval_every: int
    image_size: int
    train_images: int
    val_images: int
    device: str = "auto"
    random_control: bool = True


class Picks(_Value):
    """The one selection: which layers to reset, how, and which to freeze."""

    layers: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    scheme: str = "architecture"
    scheme_parameters: dict[str, float] = {}
    seed: int = 0
    name: str = "plan"
    # A plan of units or single weights, in a file of its own; `layers` are then those it writes.
    plan_file: str | None = None


class PickHistory(_Value):
    """The selection and what it was before, newest last."""

    now: Picks = Picks()
    past: tuple[Picks, ...] = ()


class WorkspaceState(_Value):
    """Everything the workspace's file holds."""

    version: Literal[1] = 1
    choice: Choice = Choice()
    measure: MeasureOptions = MeasureOptions()
    judging: Judging = Judging()
    train: TrainOptions | None = None
    picks: dict[str, PickHistory] = {}


def home() -> Path:
    """Return the folder that holds workspaces and logs."""
    return Path(os.environ.get("LIMBER_HOME") or ROOT / ".limber").resolve()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class Workspace:
    """One workspace: its folder and its state. Every change is on disk when a method returns."""

    def __init__(self, workspace_id: str) -> None:
        """Read the workspace, or start one with the embedded defaults."""
        self.id = workspace_id
        self.folder = home() / "workspaces" / workspace_id
        self._file = self.folder / "workspace.json"
        self._lock = threading.RLock()
        self._state = self._read()

    def _read(self) -> WorkspaceState:
        try:
            return WorkspaceState.model_validate(json.loads(self._file.read_text("utf-8")))
        except FileNotFoundError:
            state = WorkspaceState()
        except (OSError, ValueError, ValidationError):
            # A damaged file is set aside, not overwritten: somebody may want to mend it.
            self._file.replace(self._file.with_suffix(".damaged.json"))
            state = WorkspaceState()
        write_atomically(self._file, state.model_dump_json(indent=1))
        return state

    def _change(self, **changes: Any) -> None:
        with self._lock:
            changed = self._state.model_copy(update=changes)
            if changed != self._state:
                write_atomically(self._file, changed.model_dump_json(indent=1))
                self._state = changed

    @property
    def choice(self) -> Choice:
        """The network and the images chosen."""
        return self._state.choice

    def choose(self, **changes: Any) -> None:
        """Change parts of the choice.

        Image sizes and learning rates suit one network, so another goes back to its defaults.
        """
        with self._lock:
            state = self._state
            choice = state.choice.model_copy(update=changes)
            other = choice.model_key != state.choice.model_key
            self._change(
                choice=choice,
                train=None if other else state.train,
                measure=state.measure.model_copy(update={"image_size": None} if other else {}),
            )

    @property
    def measure_options(self) -> MeasureOptions:
        """How to measure."""
        return self._state.measure

    def set_measure(self, options: MeasureOptions) -> None:
        """Keep how to measure."""
        self._change(measure=options)

    @property
    def judging(self) -> Judging:
        """By what the findings are made."""
        return self._state.judging

    def set_judging(self, judging: Judging) -> None:
        """Keep by what the findings are made."""
        self._change(judging=judging)

    @property
    def train_options(self) -> TrainOptions | None:
        """How to fine-tune; None until a person said so for this network."""
        return self._state.train

    def set_train(self, options: TrainOptions) -> None:
        """Keep how to fine-tune."""
        self._change(train=options)

    def _history(self) -> PickHistory:
        return self._state.picks.get(self._state.choice.model_key, PickHistory())

    @property
    def picks(self) -> Picks:
        """The selection for the model chosen now."""
        return self._history().now

    @property
    def can_undo(self) -> bool:
        """Whether there is anything to undo."""
        return bool(self._history().past)

    def change_picks(self, **changes: Any) -> None:
        """Change parts of the selection; the state before it can be brought back by `undo`.

        Typing in a number field makes a change a step, which nobody wants to undo one by one,
        so changes to anything but the layers replace each other until layers change again.
        """
        with self._lock:
            history = self._history()
            if set(changes) & {"layers", "patterns", "scheme", "scheme_parameters", "seed"}:
                changes.setdefault("plan_file", None)
            if history.now.plan_file is not None and changes.get("plan_file", "") is None:
                # A rule's scheme and name say nothing of what is picked by hand after it.
                for key in ("scheme", "scheme_parameters", "seed", "name"):
                    changes.setdefault(key, getattr(Picks(), key))
            after = history.now.model_copy(update=changes)
            if after == history.now:
                return
            past = history.past
            before = past[-1] if past else None
            quiet = (
                before is not None
                and set(changes) <= {"seed", "name", "scheme_parameters"}
                and (before.layers, before.freeze) == (history.now.layers, history.now.freeze)
            )
            if not quiet:
                past = (*past, history.now)[-UNDO_STEPS:]
            self._keep(PickHistory(now=after, past=past))

    def undo(self) -> None:
        """Bring back the selection before the last change."""
        with self._lock:
            history = self._history()
            if history.past:
                self._keep(PickHistory(now=history.past[-1], past=history.past[:-1]))

    def _keep(self, history: PickHistory) -> None:
        self._change(picks={**self._state.picks, self._state.choice.model_key: history})

    def keep_upload(self, name: str, data: bytes) -> Path:
        """Store an uploaded file in a folder of its own, its name reduced to harmless letters."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).name).lstrip(".")[-UPLOAD_NAME:]
        path = self.folder / "uploads" / secrets.token_hex(8) / (plain or "upload")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


_open: dict[str, Workspace] = {}
_open_lock = threading.Lock()


def new_id() -> str:
    """Return an id nobody can guess."""
    return secrets.token_hex(8)


def exists(workspace_id: str) -> bool:
    """Whether the id is well formed and a workspace of that id is on this machine."""
    return (
        bool(WORKSPACE_ID.fullmatch(workspace_id))
        and (home() / "workspaces" / workspace_id / "workspace.json").is_file()
    )


def workspace(workspace_id: str) -> Workspace:
    """Return the workspace of that id, the same object for every session of this server.

    Raises:
        ValueError: The id is malformed.
    """
    if not WORKSPACE_ID.fullmatch(workspace_id):
        raise ValueError("malformed workspace id")
    with _open_lock:
        known = _open.get(workspace_id)
        if known is None or known.folder != home() / "workspaces" / workspace_id:
            known = _open[workspace_id] = Workspace(workspace_id)
        return known
