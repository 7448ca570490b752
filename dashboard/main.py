"""The script itself: page setup, navigation, and the frame that every page shares."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

ROOT = Path(__file__).resolve().parents[1]
# `streamlit run` puts this folder first on the path; `core` and `dashboard` lie one above it.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dashboard import frame, gate, store  # noqa: E402 - needs the path above

st.set_page_config(
    page_title="Limber",
    page_icon=str(ROOT / "assets" / "icon.png"),
    layout="wide",
    # The sidebar says what is chosen and what runs; on a phone a tap opens it.
    initial_sidebar_state="auto",
)
if gate.is_closed():
    st.error(
        "Other machines can reach this server, and nothing asks them for a token. Start it with "
        "`streamlit run dashboard/app.py`."
    )
    st.stop()
st.logo(str(ROOT / "assets" / "icon.png"), size="large")
frame.login()
store.open_session()
page = st.navigation(
    [
        st.Page(f"views/{step}.py", title=title, url_path=step, default=step == "look")
        for step, title in frame.TITLES.items()
    ],
    position="top",
)
store.set_pulse(st.sidebar.empty().empty)
refresh = frame.sidebar()
frame.show_troubles()
frame.show_notice()
store.guarded(page.run)()
# By now the page may have loaded what the sidebar could only name.
refresh()
