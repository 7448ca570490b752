"""What a person has decided, kept on disk so that a reload or a second tab finds it again.

A workspace is a folder with one JSON file. Session state dies with the browser tab; the workspace
does not. Files are written under a temporary name and then renamed, so a reader never sees half of
one.

Two servers may have the same folder open, and a disk may be full. So a change applies to what the
file holds now, one process at a time, and what cannot be written stays in memory until it can.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from core.catalogue.trials import DEFAULT_AUGMENT
from core.files.claims import lock
from core.files.disk import trouble
from core.records import Outcome, Pattern
from core.records.plan import RuleChoice

ROOT = Path(__file__).resolve().parents[2]
WORKSPACE_ID = re.compile(r"[0-9a-f]{16}")
UNDO_STEPS = 100
# How long a change waits for another server's change, and how often a full disk is tried again.
PATIENCE_S = 1.0
AGAIN_S = 1.0


class _Value(BaseModel):
    # Unknown keys are ignored here, unlike in plans: an older program may meet a newer file.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Choice(_Value):
    """The network and the images, as the command line takes them."""

    model: str = "tf_efficientnet_lite0"
    weights: Literal["pretrained", "none"] = "pretrained"
    checkpoint: str | None = None
    data: str = "bloodmnist"

    @property
    def model_key(self) -> str:
        """What the layer names depend on; each key has its own picks."""
        return f"{self.model}|{self.weights}|{self.checkpoint or ''}"


class MeasureOptions(_Value):
    """How to measure.

    `batch_size` None leaves it to the core, `image_size` None means the network's own size for
    short runs.
    """

    samples: int = 128
    batch_size: int | None = None
    image_size: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    transfer: bool = False


class Judging(_Value):
    """What makes the findings: a preset of checks, and the limits that differ from its own."""

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
    keep_weights: bool = True
    rivals: tuple[str, ...] = ()
    outcome: Outcome = "final"
    # In points of accuracy, of steps in percent; None takes the outcome's own.
    margin: float | None = None
    sweep: bool = False
    optimizer: str = "adamw"
    schedule: str = "cosine"
    augment: tuple[str, ...] = DEFAULT_AUGMENT


class Picks(_Value):
    """The one selection: which layers to reset, how, and which to freeze."""

    layers: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    scheme: str = "architecture"
    scheme_parameters: dict[str, float] = {}
    seed: int = 0
    name: str = "plan"
    # The rule that picked these layers; None once a person changes them.
    rule: RuleChoice | None = None
    # A plan of units or single weights, in a file of its own; `layers` are then those it writes.
    plan_file: str | None = None


class PickHistory(_Value):
    """The present selection, the earlier ones, and those that were undone; newest last."""

    now: Picks = Picks()
    past: tuple[Picks, ...] = ()
    undone: tuple[Picks, ...] = ()


class WorkspaceState(_Value):
    """Everything the workspace's file holds."""

    version: Literal[1] = 1
    name: str = ""
    choice: Choice = Choice()
    measure: MeasureOptions = MeasureOptions()
    judging: Judging = Judging()
    train: TrainOptions | None = None
    picks: dict[str, PickHistory] = {}


def _reset_or_frozen(now: Picks, changes: dict[str, Any]) -> tuple[str, ...]:
    """Let layers and frozen layers exclude each other in `changes`; return those that gave way."""
    if "layers" in changes:
        both = tuple(name for name in now.freeze if name in set(changes["layers"]))
        if both:
            changes["freeze"] = tuple(name for name in now.freeze if name not in both)
        return both
    # Layers that already were both stay so: a person loaded such a plan.
    wanted = set(changes["freeze"]) - set(now.freeze)
    both = tuple(name for name in now.layers if name in wanted)
    if now.plan_file is not None:
        changes["freeze"] = tuple(name for name in changes["freeze"] if name not in both)
    elif both:
        changes["layers"] = tuple(name for name in now.layers if name not in both)
    return both


def home() -> Path:
    """Return the folder that holds workspaces and logs."""
    return Path(os.environ.get("LIMBER_HOME") or ROOT / ".limber").resolve()


def write_atomically(path: Path, text: str, *, make_folder: bool = True) -> None:
    """Write a file so that a reader sees the old or the new text, never a part.

    Args:
        path: The file.
        text: Its whole new content.
        make_folder: Whether to make its folder if that is missing.

    Raises:
        OSError: It cannot be written; nothing is left of the attempt.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class Workspace:
    """One workspace: its folder and its state.

    Every change is on disk when a method returns, or `trouble` says why it is not.
    """

    def __init__(self, workspace_id: str) -> None:
        """Read the workspace, or start one with the embedded defaults."""
        self.id = workspace_id
        self.folder = home() / "workspaces" / workspace_id
        self._file = self.folder / "workspace.json"
        self._lock = threading.RLock()
        self._depth = 0
        # What the file held when it was last read or written, and how to know that file again.
        self._on_disk = WorkspaceState()
        self._stamp: tuple[int, ...] | None = None
        self._unsaved: OSError | None = None
        self._tried_at = 0.0
        self._state = self._on_disk
        with self._changing():
            if self._stamp is None and self._unsaved is None:
                self._write()

    @property
    def trouble(self) -> str | None:
        """A sentence on why the latest decisions are not on disk; None when they are."""
        error = self._unsaved
        if error is None:
            return None
        return (
            f"{trouble(error, self._file)} Your choices are kept in memory and saved as soon as "
            "that is possible."
        )

    def refresh(self) -> None:
        """Read the file again if another server changed it; save what could not be saved before."""
        with self._lock:
            if self._unsaved is None:
                if self._stamp_now() not in (None, self._stamp):
                    with self._changing():
                        pass
            elif time.monotonic() - self._tried_at >= AGAIN_S:
                with self._changing():
                    self._write()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep other threads and servers out, and begin with what the file holds now."""
        with self._lock:
            if self._depth:
                yield
                return
            self._depth += 1
            try:
                with _alone(self.folder):
                    self._read()
                    yield
            finally:
                self._depth -= 1

    def _stamp_now(self) -> tuple[int, ...] | None:
        try:
            state = self._file.stat()
        except OSError:
            return None
        return (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)

    def _read(self) -> None:
        stamp = self._stamp_now()
        try:
            theirs = WorkspaceState.model_validate(json.loads(self._file.read_bytes()))
        except FileNotFoundError:
            return
        except OSError as error:
            # It may be readable in a moment, and is not overwritten until then.
            self._unsaved = error
            return
        except (ValueError, RecursionError):
            # A damaged file is set aside, not overwritten: somebody may want to repair it.
            with suppress(OSError):
                self._file.replace(self._file.with_suffix(".damaged.json"))
            self._stamp = None
            return
        self._state = _merged(self._on_disk, self._state, theirs)
        self._on_disk, self._stamp = theirs, stamp
        if self._state == theirs:
            self._unsaved = None

    def _write(self) -> None:
        self._tried_at = time.monotonic()
        if self._unsaved is not None and self._stamp_now() not in (None, self._stamp):
            # There is a file that could not be read.
            return
        try:
            write_atomically(self._file, self._state.model_dump_json(indent=1))
        except OSError as error:
            self._unsaved = error
            return
        self._unsaved = None
        self._on_disk, self._stamp = self._state, self._stamp_now()

    def _change(self, **changes: Any) -> None:
        with self._changing():
            changed = self._state.model_copy(update=changes)
            if changed != self._state or self._stamp is None:
                self._state = changed
                self._write()

    @property
    def name(self) -> str:
        """What a person calls this work; empty until they name it."""
        return self._state.name

    def set_name(self, name: str) -> None:
        """Keep what a person calls this work."""
        self._change(name=name)

    @property
    def choice(self) -> Choice:
        """The network and the images chosen."""
        return self._state.choice

    def choose(self, **changes: Any) -> None:
        """Change parts of the choice.

        Image sizes and learning rates suit one network, so a new network starts with its defaults.
        """
        with self._changing():
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
        """The checks and limits that make the findings."""
        return self._state.judging

    def set_judging(self, judging: Judging) -> None:
        """Keep the checks and limits that make the findings."""
        self._change(judging=judging)

    @property
    def train_options(self) -> TrainOptions | None:
        """How to fine-tune; None until a person has set it for this network."""
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

    @property
    def can_redo(self) -> bool:
        """Whether there is anything to redo."""
        return bool(self._history().undone)

    def change_picks(self, **changes: Any) -> tuple[str, ...]:
        """Change parts of the selection; `undo` brings back the state before.

        A layer is reset or frozen, never both: it would stay random however long it trains. The
        latest request wins, except against a plan of units or weights, which cannot lose a layer.
        A change that names both at once, as a loaded plan does, is taken as it is.

        Typing in a number field makes many changes, and nobody wants to undo them one by one. So
        changes to anything but the layers replace each other until the layers change again.

        Returns:
            The layers that gave way: no longer frozen, no longer picked, or not frozen after all.
        """
        with self._changing():
            history = self._history()
            gave_way: tuple[str, ...] = ()
            if ("layers" in changes) != ("freeze" in changes):
                gave_way = _reset_or_frozen(history.now, changes)
            if set(changes) & {"layers", "patterns", "scheme", "scheme_parameters", "seed"}:
                changes.setdefault("plan_file", None)
            if "layers" in changes:
                changes.setdefault("rule", None)
            if history.now.plan_file is not None and changes.get("plan_file", "") is None:
                # A rule's scheme and name do not describe what is picked by hand after it.
                for key in ("scheme", "scheme_parameters", "seed", "name"):
                    changes.setdefault(key, getattr(Picks(), key))
            after = history.now.model_copy(update=changes)
            if after == history.now:
                return gave_way
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
            return gave_way

    def undo(self) -> None:
        """Bring back the selection before the last change."""
        with self._changing():
            history = self._history()
            if history.past:
                self._keep(
                    PickHistory(
                        now=history.past[-1],
                        past=history.past[:-1],
                        undone=(*history.undone, history.now),
                    )
                )

    def redo(self) -> None:
        """Bring back the selection that the last undo took away; any change ends that."""
        with self._changing():
            history = self._history()
            if history.undone:
                self._keep(
                    PickHistory(
                        now=history.undone[-1],
                        past=(*history.past, history.now),
                        undone=history.undone[:-1],
                    )
                )

    def _keep(self, history: PickHistory) -> None:
        self._change(picks={**self._state.picks, self._state.choice.model_key: history})


def _merged(base: WorkspaceState, mine: WorkspaceState, theirs: WorkspaceState) -> WorkspaceState:
    """Return what another server wrote, plus what was changed here meanwhile and not yet saved."""
    changes: dict[str, Any] = {
        name: value
        for name in WorkspaceState.model_fields
        if (value := getattr(mine, name)) != getattr(base, name)
    }
    if "picks" in changes:
        own = {
            key: history for key, history in mine.picks.items() if history != base.picks.get(key)
        }
        changes["picks"] = {**theirs.picks, **own}
    return theirs.model_copy(update=changes)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other servers out of a workspace while a change is made.

    If that is not possible, on a full disk or without locks, the change is made all the same.
    """
    handle = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + PATIENCE_S
        while lock(handle) is False and time.monotonic() < deadline:
            time.sleep(0.005)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


_open: dict[str, Workspace] = {}
_open_lock = threading.Lock()


def new_id() -> str:
    """Return an id nobody can guess."""
    return secrets.token_hex(8)


def exists(workspace_id: str) -> bool:
    """Whether the id is well formed and a workspace of that id is on this machine."""
    if not WORKSPACE_ID.fullmatch(workspace_id):
        return False
    folder = home() / "workspaces" / workspace_id
    with _open_lock:
        # On a full disk a workspace may exist only in memory.
        known = _open.get(workspace_id)
        if known is not None and known.folder == folder and known.trouble is not None:
            return True
    return _is_file(folder / "workspace.json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


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
    known.refresh()
    return known
