"""The embedded example comes measured, while the code that measures is the one that made it."""

from __future__ import annotations

import pytest

import core
from dashboard import store
from dashboard.store import example
from dashboard.store.runs import RunQueue
from tests.pages import WAIT_FOR_STOP, assert_well, open_app, space, wait_until

pytestmark = pytest.mark.usefixtures("fresh_queue")


def test_the_example_was_made_by_the_code_that_is_here() -> None:
    assert example.made_by() == example.measuring_code(), (
        "The code that measures has changed. Run `python -m tests.build_example` and commit "
        "assets/example.zip."
    )


def test_the_example_is_of_the_weights_and_images_that_are_here() -> None:
    open_app()
    path = example.example_path(example.CHOICE)
    assert path is not None

    header = core.read_diagnosis(path).header

    outline = store.model_outline(example.CHOICE)
    assert header.backbone_sha256 == outline.backbone_sha256
    assert header.data_fingerprint == store.data_outline(example.CHOICE).fingerprint
    assert header.samples == example.OPTIONS.samples
    assert header.image_size == outline.default_size
    assert core.read_units(path)
    assert core.read_inside(path)


def test_words_and_comments_do_not_count_as_code() -> None:
    text = 'def f(x):\n    """Say."""\n    return x + 1\n'
    told = '# why\ndef f(x):\n    """Say more."""\n\n    return x + 1  # plus\n'

    assert example._bare(text) == example._bare(told)
    assert example._bare(text) != example._bare(text.replace("1", "2"))


def test_other_code_measures_the_example_anew_without_being_asked(
    worker: object, fresh_queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(worker)
    worker(WAIT_FOR_STOP)
    monkeypatch.setattr(example, "measuring_code", lambda: "0" * 64)

    app = open_app()

    assert_well(app)
    wait_until(lambda: bool(fresh_queue.live()))
    assert [run.kind for run in fresh_queue.live()] == ["measure"]
    assert space().choice == example.CHOICE
    app.run()
    assert len(fresh_queue.live()) == 1
    app.button(key="stop_measure").click().run()
    wait_until(lambda: not fresh_queue.live())
