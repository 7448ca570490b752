"""The embedded example comes measured, while the code that measures is the one that made it."""

from __future__ import annotations

import lzma
import zipfile
from pathlib import Path

import pytest

import core
from dashboard import store
from dashboard.store import example
from dashboard.store.runs import RunQueue
from tests.pages import WAIT_FOR_STOP, assert_well, open_app, put_run, shown, space, wait_until

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


def test_a_damaged_archive_is_left_alone_and_the_page_measures(
    worker: object, fresh_queue: RunQueue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert callable(worker)
    worker(WAIT_FOR_STOP)
    data = bytearray(example.ARCHIVE.read_bytes())
    data[5000] ^= 0xFF
    broken = tmp_path / "example.zip"
    broken.write_bytes(data)
    monkeypatch.setattr(example, "ARCHIVE", broken)
    with pytest.raises((zipfile.BadZipFile, lzma.LZMAError)), zipfile.ZipFile(broken) as archive:
        archive.extractall(tmp_path / "x")

    app = open_app()

    assert_well(app)
    wait_until(lambda: bool(fresh_queue.live()))
    assert [run.kind for run in fresh_queue.live()] == ["measure"]


def test_a_damaged_example_is_unpacked_again() -> None:
    open_app()
    path = example.example_path(example.CHOICE)
    assert path is not None
    whole = path.read_bytes()
    path.write_text('{"a":', encoding="utf-8")

    app = open_app()

    assert_well(app)
    assert path.read_bytes() == whole


def test_one_damaged_measurement_hides_no_other() -> None:
    folder = put_run("measure", facts={"choice": example.CHOICE.model_dump(mode="json")})
    (folder / "diagnosis.json").write_text('{"a":', encoding="utf-8")

    app = open_app()

    assert_well(app)
    assert "cannot be read" not in shown(app)
    assert app.selectbox(key="strip_layer")
