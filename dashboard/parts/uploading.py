"""A field for uploads: a file is tried before it is accepted, and removed if it is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import streamlit as st

from core.errors import LimberError
from dashboard import store, words

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

Kind = Literal["data", "checkpoint"]


def field(
    kind: Kind, label: str, *, endings: Sequence[str], help_text: str | None = None
) -> UploadedFile | None:
    """Draw the field, and below it why the last file was refused, until another is given."""
    turn = st.session_state.setdefault(f"{kind}_turn", 0)
    file = st.file_uploader(
        label,
        type=list(endings),
        key=f"{kind}_file_{turn}",
        help=help_text,
    )
    if file is not None:
        st.session_state.pop(f"{kind}_refused", None)
    refused = st.session_state.get(f"{kind}_refused")
    if refused:
        st.error(words.escape(refused))
    return file


def take(
    space: store.Workspace, kind: Kind, file: UploadedFile, attempt: Callable[[str], str | None]
) -> None:
    """Store the file and try it; then empty the field, whose copy would stay in memory.

    Args:
        space: The workspace that gets it.
        kind: What it is for.
        file: What the field holds.
        attempt: Makes the path the choice and returns None, or returns why not.
    """
    try:
        with store.upload(space, kind, file.name, file.getbuffer()) as path:
            refused = attempt(str(path))
    except LimberError as error:
        refused = words.sentence(error)
    st.session_state[f"{kind}_turn"] += 1
    if refused:
        st.session_state[f"{kind}_refused"] = f'"{file.name}" was refused and removed. {refused}'
    st.rerun()
