"""The server: Streamlit's own application behind the gate (`streamlit run dashboard/app.py`)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

ROOT = Path(__file__).resolve().parents[1]
# `streamlit run` puts this folder first on the path; `core` and `dashboard` lie one above it.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dashboard import gate, plot  # noqa: E402 - needs the path above

try:
    DOOR = gate.open_door()
except gate.TokenError as error:
    print(f"limber: {error}", file=sys.stderr)
    sys.exit(2)


@asynccontextmanager
async def announced(_: st.App) -> AsyncIterator[None]:
    """Print the address with the token once the port is known."""
    words = DOOR.announcement()
    if words:
        print(words, flush=True)
    yield


app = st.App(
    Path(__file__).with_name("main.py"),
    routes=plot.routes(),
    middleware=[Middleware(gate.Gate, door=DOOR)],
    lifespan=announced,
)
