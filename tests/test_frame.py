"""What every page shares: undo, findings that pick, and sentences in place of tracebacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import PICKED, assert_well, open_app, put_measurement, shown, space

pytestmark = pytest.mark.usefixtures("fresh_queue")


def test_a_finding_picks_the_layers_it_speaks_of() -> None:
    put_measurement()
    app = open_app("look")

    app.button(key="findings_0").click().run()

    assert_well(app)
    assert space().picks.layers == PICKED


def test_a_layer_is_reset_or_frozen_and_the_page_says_which_gave_way() -> None:
    put_measurement()
    space().change_picks(layers=PICKED)
    app = open_app("look")

    app.text_input(key="pattern_text").set_value(PICKED[0]).run()
    app.button(key="pattern_freeze").click().run()

    assert_well(app)
    assert (space().picks.layers, space().picks.freeze) == (PICKED[1:], PICKED[:1])
    assert "is frozen now and no longer reset" in shown(app)

    app.button(key="findings_0").click().run()

    assert_well(app)
    assert (space().picks.layers, space().picks.freeze) == (PICKED, ())
    assert "is reset now and no longer frozen" in shown(app)


def test_an_unforeseen_error_becomes_a_sentence_and_a_log(
    limber_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret detail")

    app = open_app("watch")
    monkeypatch.setattr("dashboard.store.pick_size", broken)
    space().change_picks(layers=PICKED)

    app.switch_page("views/look.py").run()

    assert not app.exception
    assert "Limber itself" in app.error[0].value
    assert "secret detail" not in shown(app)
