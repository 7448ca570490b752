"""Who works on a file or folder: a claim that the system lets go of when its process ends.

A claim is a small file that its owner keeps locked and that says who the owner is. The lock ends
with the process, however that ends, so a claim left behind by a killed one stops nobody. Where a
file system has no locks (some network drives), the words in the file must do: they name process,
machine and the moment the process began, since numbers of processes are used again.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# An owner that leaves removes its file; who opened it a moment before tries again.
ATTEMPTS = 50
LONGEST = 4096
SETTLED_S = 0.05
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a claim, as far as its file tells.

    Attributes:
        pid: Process; None where the file does not say.
        host: Name of the machine.
        since: When it was claimed, in seconds since 1970.
        what: What the process does.
        address: Where a browser finds it, if anywhere.
        began: Stamp of the process, by which another one of the same number is told from it.
    """

    pid: int | None = None
    host: str = ""
    since: float | None = None
    began: str = ""
    what: str = ""
    address: str = ""

    def words(self) -> str:
        """Return the holder in words, such as `process 12 on ada, "finetune", since ...`."""
        parts = ["another process" if self.pid is None else f"process {self.pid}"]
        if self.host and self.host != socket.gethostname():
            parts[0] += f" on {self.host}"
        if self.what:
            parts.append(f'"{self.what}"')
        if self.address:
            parts.append(self.address)
        if self.since is not None:
            with suppress(OverflowError, ValueError, OSError):
                parts.append(time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(self.since)))
        return ", ".join(parts)


@dataclass(slots=True)
class Claim:
    """A place that is ours until `release`, or until this process ends.

    Attributes:
        path: The claim's file.
        locked: False where the file system has no locks, so that only the words in the file keep
            others away.
    """

    path: Path
    locked: bool
    _handle: int | None = field(repr=False, default=None)

    @property
    def ours(self) -> bool:
        """Whether the file is still the one we locked: folders are deleted by hand."""
        return self._handle is not None and _same(self._handle, self.path)

    def release(self) -> None:
        """Let others have the place; the file goes too."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        # Removed before it is let go: the next one to come makes a file of its own.
        with suppress(OSError):
            if _same(handle, self.path):
                self.path.unlink()
        os.close(handle)


def take(path: Path, *, what: str, address: str = "", must_sign: bool = True) -> Claim | Holder:
    """Claim a place by the file of that path, or return who holds it.

    Args:
        path: The claim's file; its folder is there.
        what: What this process does, for others to read.
        address: Where a browser finds it.
        must_sign: Whether a file that is locked and cannot be written to (a full disk) is no claim.

    Raises:
        OSError: The file cannot be made.
    """
    for _ in range(ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        kept = False
        try:
            locked = lock(handle)
            if locked is False:
                return _read(handle)
            if not _same(handle, path):
                continue
            if locked is None and lives(holder := _read(handle)):
                return holder
            try:
                _write(handle, what, address)
            except OSError:
                if must_sign or locked is None:
                    # An empty file would only puzzle people.
                    with suppress(OSError):
                        path.unlink()
                    raise
            if locked is None:
                # Two that came at the same moment both wrote; the later one has it.
                time.sleep(SETTLED_S)
                if (holder := _read(handle)).pid != os.getpid():
                    return holder
            kept = True
            return Claim(path, locked is not None, handle)
        finally:
            if not kept:
                os.close(handle)
    return Holder()


@contextmanager
def claimed(out: Path, *, folder: bool, what: str) -> Iterator[Claim | Holder]:
    """Claim where a command writes, for as long as the block lasts.

    Folders that are missing are made, and those still empty at the end removed.

    Args:
        out: A file, claimed by another beside it, or a folder, claimed by a file in it.
        folder: Which of the two.
        what: What this process does.

    Yields:
        The claim, or who holds it already.

    Raises:
        OSError: The place cannot be written to.
    """
    place = out / ".claim" if folder else out.with_name(f".{out.name}.claim")
    made: list[Path] = []
    try:
        claim = _take_below(place, made, what)
        try:
            yield claim
        finally:
            if isinstance(claim, Claim):
                claim.release()
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


def _take_below(place: Path, made: list[Path], what: str) -> Claim | Holder:
    for _ in range(ATTEMPTS):
        missing = place.parent
        wanted: list[Path] = []
        while not missing.exists():
            wanted.append(missing)
            missing = missing.parent
        for folder in reversed(wanted):
            # Another command may make it, or clean it or those above away, at this very moment.
            with suppress(FileExistsError, FileNotFoundError):
                folder.mkdir()
                made.append(folder)
        with suppress(FileNotFoundError):
            return take(place, what=what)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))


def lock(handle: int) -> bool | None:
    """Lock a file for this process: True, False where another has it, None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _same(handle: int, path: Path) -> bool:
    try:
        own, there = os.fstat(handle), path.stat()
    except OSError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _write(handle: int, what: str, address: str) -> None:
    words = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.time(),
        "began": began(os.getpid()),
        "what": what,
        "address": address,
    }
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(words).encode())


def _words(handle: int) -> dict[str, Any]:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        words = json.loads(os.read(handle, LONGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}


def _read(handle: int) -> Holder:
    # Whoever locked it a moment ago may not have signed yet.
    for _ in range(ATTEMPTS):
        words = _words(handle)
        if words:
            break
        time.sleep(0.002)
    pid, since = words.get("pid"), words.get("since")
    return Holder(
        pid=pid if isinstance(pid, int) else None,
        host=str(words.get("host", "")),
        since=float(since) if isinstance(since, int | float) else None,
        what=str(words.get("what", "")),
        address=str(words.get("address", "")),
        began=str(words.get("began", "")),
    )


def lives(holder: Holder) -> bool:
    """Whether the process of a claim is still there; of another machine's nobody can say it ended.

    Only asked where there are no locks.
    """
    # Elsewhere asking would end the process, so the last to come has the place, and is told so.
    if holder.pid is None or os.name != "posix":
        return False
    if holder.host != socket.gethostname():
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return began(holder.pid) == holder.began


def began(pid: int) -> str:
    """Return a stamp of when a process began, the same for as long as it lives; "" if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    # The name of the program stands in brackets and may hold anything; 22nd is the start.
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"
