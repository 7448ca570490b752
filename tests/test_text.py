"""Words from elsewhere steer neither a terminal nor what reads JSON."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.text import json_text, one_line, printable
from tests import hostile


@given(st.text())
def test_printable_text_steers_no_terminal(text: str) -> None:
    shown = printable(text)

    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert not {c for c in shown if unicodedata.category(c) in hidden} - {"\u200c", "\u200d"}
    if text.isprintable():
        assert shown == text
    assert printable(shown) == shown


@pytest.mark.parametrize("name", hostile.NAMES)
def test_a_message_is_one_line_whatever_a_name_holds(name: str) -> None:
    line = one_line(f'There is no "{name}". Check the path.')

    assert len(line.splitlines()) == 1
    assert len(line) < 2_100
    assert line.endswith("Check the path.")
    assert line == printable(line)


@settings(max_examples=50)
@given(st.lists(st.text() | st.dictionaries(st.text(), st.text(), max_size=2), max_size=3))
def test_json_that_is_safe_to_show_says_the_same(content: object) -> None:
    for indent in (None, 1):
        text = json_text(json.dumps(content, indent=indent, ensure_ascii=False))

        assert json.loads(text) == content
        assert printable(text.replace("\n", "")) == text.replace("\n", "")
