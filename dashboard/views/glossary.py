"""Glossary: every metric, check, rule, scheme and word of a trial, with formula and source."""

from __future__ import annotations

import streamlit as st

import core
from core.catalogue.attributions import METHODS
from core.catalogue.trials import OUTCOMES
from dashboard import store, words


def page() -> None:
    """Draw the page."""
    st.subheader("What do the words mean?")
    parts = {
        "Metrics": _metrics,
        "Checks": _checks,
        "Rules": _rules,
        "New values": _schemes,
        "Attributions": _attributions,
        "Trials": _trials,
    }
    for tab, draw in zip(st.tabs(list(parts)), parts.values(), strict=True):
        with tab:
            draw()


def _metrics() -> None:
    infos = store.metric_infos()
    for family, title in words.FAMILIES.items():
        st.markdown(f"#### {words.escape(title)}")
        for info in infos:
            if info.family == family:
                with st.expander(words.escape(info.title)):
                    st.markdown(words.metric_help(info))


def _checks() -> None:
    for preset in store.presets():
        st.markdown(f"#### {words.escape(preset.title)}")
        st.caption(words.escape(preset.description))
        for check in preset.checks:
            with st.expander(words.escape(words.check_title(check))):
                st.markdown(words.check_help(check))


def _rules() -> None:
    for info in store.rule_infos():
        _entry(info.title, info.name, info.description, info.source)


def _schemes() -> None:
    for info in store.scheme_infos():
        _entry(info.title, info.name, info.description, info.source)


def _attributions() -> None:
    for method in METHODS:
        with st.expander(words.escape(method.title)):
            st.markdown(words.method_help(method))


def _trials() -> None:
    for title, text in words.TRIAL_WORDS.items():
        with st.expander(words.escape(title)):
            st.markdown(words.escape(text))
    st.markdown("#### What is judged")
    for outcome in OUTCOMES:
        with st.expander(words.escape(outcome.title)):
            st.markdown(words.escape(outcome.reads))
    st.markdown("#### Rivals")
    for rival in core.list_rivals():
        _entry(rival.title, rival.name, rival.does, rival.source)
    st.markdown("#### What is done to training images")
    for info in core.list_augmentations():
        careful = f" Leave it out {info.careful}." if info.careful else ""
        with st.expander(words.escape(f"{info.title} ({info.name})")):
            st.markdown(words.escape(f"{info.does}{careful}"))


def _entry(title: str, name: str, description: str, source: str) -> None:
    with st.expander(words.escape(f"{title} ({name})")):
        st.markdown(f"{words.escape(description)}\n\n**Source** {words.escape(source)}")


page()
