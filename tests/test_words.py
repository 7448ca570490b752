"""Words on the pages: names steer nothing, numbers say no more than they know."""

from __future__ import annotations

import json
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as hypothesis_text

from dashboard import words
from tests.pages import HOSTILE, STEERING


@pytest.mark.parametrize("text", ["![x](http://host/x.png)", "**bold** `code` <b>", "a_b_c [l](u)"])
def test_escaped_text_has_no_live_markdown(text: str) -> None:
    escaped = words.escape(text)

    assert escaped.replace("\\", "").replace(words.APART, "") == text
    assert "](" not in escaped
    assert "![" not in escaped


@given(hypothesis_text.text(max_size=40))
def test_clean_text_steers_nothing_and_plain_text_stays(text: str) -> None:
    cleaned = words.clean(text)

    assert not [each for each in cleaned if unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp")]
    assert not STEERING.search(cleaned)
    assert words.clean(cleaned) == cleaned
    if text.isascii() and text.isprintable():
        assert cleaned == text


@pytest.mark.parametrize("text", ["naïve Größe", "細胞", "می‌خواهم", "👩‍🔬 test", "blocks.5.0*"])
def test_words_of_any_language_stay_as_they_are(text: str) -> None:
    assert words.clean(text) == text


def test_code_keeps_its_lines_and_means_the_same() -> None:
    text = json.dumps({"name": f"a{HOSTILE}\U000e0041"}, ensure_ascii=False, indent=1)

    shown = words.code(text)

    assert json.loads(shown) == json.loads(text)
    assert shown.count("\n") == text.count("\n")
    assert not STEERING.search(shown)


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [
        (0.0, "0.0 %"),
        (0.0004, "under 0.1 %"),
        (0.0123, "1.2 %"),
        (0.5, "50 %"),
        (math.nan, words.NO_VALUE),
    ],
)
def test_a_share_shows_no_more_digits_than_help(fraction: float, shown: str) -> None:
    assert words.percent(fraction) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (59.4, "59 s"), (80, "1 min 20 s"), (7500, "2 h 5 min")],
)
def test_a_duration_has_two_units_at_most(seconds: float, shown: str) -> None:
    assert words.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, words.NO_VALUE),
        (0.0, "0"),
        (0.12345, "0.123"),
        (123456.0, "1.23e+05"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
    ],
)
def test_a_figure_has_three_digits_or_says_what_it_is(value: float | None, shown: str) -> None:
    assert words.figure(value) == shown


def test_counts_take_the_plural_and_large_ones_a_letter() -> None:
    assert words.count(1, "layer") == "1 layer"
    assert words.count(1200, "image") == "1,200 images"
    assert words.short(4_652_008) == "4.65 M"
    assert words.short(512) == "512"


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (None, ""),
        ((0.5, 2.0), "0.5 to 2"),
        ((0.00018, 0.247), "under 0.247"),
        ((4.0, 9000.0), "over 4"),
        ((0.001, 50.0), "unknown"),
    ],
)
def test_a_wide_interval_of_a_ratio_says_the_end_that_tells_something(
    interval: tuple[float, float] | None, said: str
) -> None:
    assert words.ratio_range(interval) == said
