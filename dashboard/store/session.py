"""This session: its workspace, the message for its next run, and what happens to errors.

Everything that a person decides goes into the workspace. Session state holds only its id and a
message for the next run of the page.
"""

from __future__ import annotations

import functools
import logging
import logging.handlers
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec

import streamlit as st

from core.errors import LimberError
from core.files.disk import no_room, settle_temporary_folder, trouble
from dashboard import words
from dashboard.store import inspection, runs
from dashboard.store.values import model_entries
from dashboard.store.workspace import Workspace, exists, home, new_id, workspace

WORKSPACE_KEY = "workspace_id"
NOTICE_KEY = "notice"
LOG_NAME = "limber.log"

log = logging.getLogger("limber")

P = ParamSpec("P")


def open_session() -> Workspace:
    """Find the workspace that the address names, or start one, and put its id into the address.

    The id is set again at every run, because the address loses it when the page changes.
    """
    _start_once(home())
    runs.queue.recover(
        address=f"http://{st.get_option('server.address') or socket.gethostname()}"
        f":{st.get_option('server.port')}"
    )
    asked = st.query_params.get("w", "")
    known = st.session_state.get(WORKSPACE_KEY)
    if asked and asked != known:
        if exists(asked):
            known = asked
        elif known is None:
            notice(
                "info", "The workspace in the address is not on this machine. A new one was opened."
            )
    if known is None:
        known = new_id()
    st.session_state[WORKSPACE_KEY] = known
    if asked != known:
        st.query_params["w"] = known
    return workspace(known)


def asks_login() -> bool:
    """Whether the secrets name a provider by which people log in."""
    try:
        return "auth" in st.secrets
    except FileNotFoundError:
        return False


def set_pulse(beat: Callable[[], object]) -> None:
    """Set what touches the page while this script waits for a worker.

    When a script touches its page, Streamlit can stop it if the page is gone or has moved on.
    """
    inspection.pulse.set(beat)


def open_workspace(workspace_id: str | None) -> None:
    """Go on with an earlier workspace or a new one, as if the page had just been opened.

    Args:
        workspace_id: The earlier workspace; None starts a new one.
    """
    if workspace_id is not None and not exists(workspace_id):
        notice("info", "That work is no longer on this machine.")
        return
    # What fields and pages remember belongs to the old workspace.
    st.session_state.clear()
    st.session_state[WORKSPACE_KEY] = st.query_params["w"] = workspace_id or new_id()


def current() -> Workspace:
    """Return the workspace of this session; call `open_session` first."""
    return workspace(st.session_state[WORKSPACE_KEY])


class _Log(logging.handlers.RotatingFileHandler):
    """A log that drops a line when the disk has no room for it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Print the line to the terminal instead."""
        with suppress(OSError):
            print(f"{record.levelname} {record.name} {record.getMessage()}", file=sys.stderr)


@functools.cache
def _start_once(folder: Path) -> None:
    settle_temporary_folder()
    # Opened at the first line, so that a full disk does not stop a page from opening.
    handler = _Log(
        folder / LOG_NAME, maxBytes=1_000_000, backupCount=1, encoding="utf-8", delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    log.addHandler(handler)
    # The libraries take seconds to import. Importing them while the first page is drawn keeps that
    # page fast, and the answer to a name that needs the internet. If no thread is left, the page
    # that needs them waits.
    with suppress(RuntimeError):
        threading.Thread(target=_warm, daemon=True, name="warm").start()


def _warm() -> None:
    try:
        model_entries()
    except Exception:
        log.exception("the lists of models could not be read")


def log_path() -> Path:
    """Return the file that unforeseen errors are written to."""
    return home() / LOG_NAME


def notice(kind: str, text: str) -> None:
    """Leave a message for the next run of the page; kind is "error", "info" or "success"."""
    st.session_state[NOTICE_KEY] = (kind, text)


def take_notice() -> tuple[str, str] | None:
    """Return the message that was left, once."""
    left: tuple[str, str] | None = st.session_state.pop(NOTICE_KEY, None)
    return left


def troubles() -> tuple[str, ...]:
    """Return what every page should say: a full disk, another server; usually nothing."""
    own = current().trouble
    return tuple(dict.fromkeys([*([] if own is None else [own]), *runs.queue.troubles()]))


def _unforeseen(error: Exception) -> str:
    if no_room(error):
        named = getattr(error, "filename", None)
        return f"{trouble(error, Path(named) if isinstance(named, str) else home())}"
    log.error("unforeseen error", exc_info=error)
    return (
        f"Something in Limber itself went wrong ({type(error).__name__}). Your choices are kept; "
        f"reload the page to go on. Details are in {log_path()}."
    )


def guarded(draw: Callable[P, None]) -> Callable[P, None]:
    """Draw, and show a sentence instead of a traceback if that fails."""

    @functools.wraps(draw)
    def safely(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except LimberError as error:
            st.error(words.escape(words.sentence(error)))
        except Exception as error:
            st.error(words.escape(_unforeseen(error)))

    return safely


def act(callback: Callable[P, None]) -> Callable[P, None]:
    """Run a widget's callback, and leave a sentence for the next run if that fails."""

    @functools.wraps(callback)
    def safely(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except LimberError as error:
            notice("error", words.sentence(error))
        except Exception as error:
            notice("error", _unforeseen(error))

    return safely
