"""The part of Look that brings earlier work back."""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

from dashboard import store, words

SHOWN = 8
MORE = "earlier_more"
# A line that wraps on a phone would be centred, as the text of any button is.
STYLE = """<style>
.st-key-earlier_list button { justify-content: flex-start; text-align: left; }
.st-key-earlier_list button > div { justify-content: flex-start; }
</style>"""


def earlier(space: store.Workspace) -> None:
    """List earlier work on this server; a click opens it and puts its id into the address."""
    works = store.recent_work(without=space.id)
    used = bool(space.name) or space.choice != store.Choice() or bool(store.all_runs())
    title = f"Earlier work ({len(works):,})" if works else "Earlier work"
    with st.popover(words.escape(title), type="tertiary", icon=":material/history:"):
        _present(space, used=used)
        if not works:
            st.caption(
                "There is none on this machine yet. Everything you do is saved automatically."
            )
            return
        shown = works if st.session_state.get(MORE) else works[:SHOWN]
        titles = _titles()
        st.html(STYLE)
        with st.container(gap=None, key="earlier_list"):
            for work in shown:
                st.button(
                    words.escape(_line(work, titles)),
                    key=f"open_{work.id}",
                    type="tertiary",
                    wrap=True,
                    icon=":material/folder_open:",
                    on_click=_open,
                    args=(work.id,),
                )
        if len(shown) < len(works):
            st.button(
                f"Show {words.count(len(works) - len(shown), 'more', 'more')}",
                key="earlier_show_more",
                on_click=_show_more,
            )


def _present(space: store.Workspace, *, used: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Name of this work",
            words.clean(space.name),
            key="work_name",
            width=280,
            max_chars=60,
            placeholder="optional",
            on_change=_rename,
        )
        st.button(
            "Start fresh",
            key="start_fresh",
            icon=":material/add:",
            disabled=not used,
            on_click=_open,
            args=(None,),
            help="A new workspace with the embedded network and images. This one is kept.",
        )


@store.act
def _rename() -> None:
    store.current().set_name(str(st.session_state["work_name"]).strip())


@store.act
def _open(workspace_id: str | None) -> None:
    store.open_workspace(workspace_id)


@store.act
def _show_more() -> None:
    st.session_state[MORE] = True


def _titles() -> dict[str, str]:
    models = {entry.name: entry.title for entry in store.model_entries() if entry.embedded}
    sets = {entry.name: entry.title for entry in store.dataset_entries() if entry.embedded}
    return models | sets


def _line(work: store.Work, titles: dict[str, str]) -> str:
    model = titles.get(work.model, work.model.rpartition(":")[2])
    if work.checkpoint is not None:
        model = f"{model} from {Path(work.checkpoint).name}"
    data = titles.get(work.data, Path(work.data).name)
    runs = words.count(work.runs, "run") if work.runs else "no runs"
    parts = [work.name, f"{model} on {data}", runs, _when(work.used)]
    return ", ".join(part for part in parts if part)


def _when(then: float) -> str:
    passed = time.time() - then
    if passed < 90:
        return "just now"
    if passed < 5400:
        return f"{round(passed / 60)} minutes ago"
    if passed < 129_600:
        return f"{round(passed / 3600)} hours ago"
    return time.strftime("%d %b %Y", time.localtime(then))
