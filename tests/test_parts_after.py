"""Whether the stiffness went: what a fine-tune keeps, measured again, next to what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import core
from core.cli import main as run
from core.load import load_model
from dashboard import words
from dashboard.store import runs as runs_room
from dashboard.store.runs import RunQueue
from tests.pages import WAIT_FOR_STOP, assert_well, open_app, put_run, shown, wait_until

pytestmark = pytest.mark.usefixtures("fresh_queue")

LAYER = "blocks.3.1.conv_pw"
TINY = ("--model", "tf_efficientnet_lite0", "--data", "bloodmnist", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two arms and two seeds that kept its weights."""
    folder = tmp_path_factory.mktemp("kept")
    outline = core.outline_model(core.resolve_model("tf_efficientnet_lite0"), classes=8)
    core.write_plan(core.make_plan(outline, [LAYER], name="my plan"), folder / "plan.json")
    code = run(
        [
            *("finetune", *TINY, "--plan", str(folder / "plan.json"), "--steps", "2"),
            *("--seeds", "3,4", "--batch-size", "4", "--image-size", "32", "--eval-every", "2"),
            *("--train-images", "8", "--val-images", "8", "--keep-weights"),
            *("--out", str(folder / "run")),
        ]
    )
    assert code == 0
    return folder / "run"


def test_a_run_keeps_the_trained_weights_of_its_first_seed(trained: Path) -> None:
    files = sorted(path.name for path in (trained / "weights").iterdir())

    assert files == ["my plan.safetensors", "untouched.safetensors"]
    begun = load_model(core.resolve_model("tf_efficientnet_lite0"), classes=8, head_seed=3).module
    for name in files:
        state = safetensors.torch.load_file(trained / "weights" / name)
        assert set(state) == set(begun.state_dict())
        assert not torch.equal(state["conv_stem.weight"], begun.state_dict()["conv_stem.weight"])


def test_weights_are_kept_only_where_that_is_asked_for(tmp_path: Path) -> None:
    code = run(
        [
            *("finetune", *TINY, "--steps", "1", "--seeds", "0", "--batch-size", "4"),
            *("--image-size", "32", "--train-images", "8", "--val-images", "8"),
            *("--out", str(tmp_path / "run")),
        ]
    )

    assert code == 0
    assert not (tmp_path / "run" / "weights").exists()


def put_trained(trained: Path) -> Path:
    folder = put_run("finetune", facts={"plan": "my plan"})
    (folder / "summary.json").write_bytes((trained / "summary.json").read_bytes())
    (folder / "weights").mkdir()
    for path in (trained / "weights").iterdir():
        (folder / "weights" / path.name).symlink_to(path)
    return folder


def test_an_open_layer_says_what_it_waits_for() -> None:
    app = open_app()

    app.selectbox(key="strip_layer").set_value(LAYER).run()

    assert_well(app)
    assert "Nothing is trained yet" in shown(app)


def test_both_arms_are_measured_again_and_stand_next_to_what_was(
    trained: Path, worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    put_trained(trained)
    app = open_app()
    app.selectbox(key="strip_layer").set_value(LAYER).run()

    app.button(key="after_start").click().run()

    assert_well(app)
    wait_until(lambda: len(fresh_queue.live()) == 2)
    arms = [run.facts["arm"] for run in fresh_queue.live()]
    assert sorted(map(str, arms)) == ["my plan", "untouched"]
    for live in fresh_queue.live():
        runs_room.queue.stop(live.id)
    wait_until(lambda: not fresh_queue.live())


def test_the_figures_after_training_are_those_of_the_two_measurements(
    trained: Path, tmp_path: Path
) -> None:
    folder = put_trained(trained)
    for letter, arm in (("a", "untouched"), ("b", "my plan")):
        again = put_run("after", facts={"of": folder.name, "arm": arm}, letter=letter)
        code = run(
            [
                *(
                    "measure",
                    *TINY,
                    "--checkpoint",
                    str(trained / "weights" / f"{arm}.safetensors"),
                ),
                *("--samples", "4", "--batch-size", "2", "--image-size", "32"),
                *("--out", str(tmp_path / f"{arm}.json")),
            ]
        )
        assert code == 0
        (again / "diagnosis.json").write_bytes((tmp_path / f"{arm}.json").read_bytes())
    app = open_app()

    app.selectbox(key="strip_layer").set_value(LAYER).run()

    assert_well(app)
    (table,) = [each.value for each in app.dataframe if "As it came" in each.value.columns]
    report = core.read_diagnosis(tmp_path / "my plan.json").layer(LAYER)
    assert report is not None
    value = report.metrics["saturated_fraction"].value
    row = table.set_index("Metric").loc["Saturated inputs of the activation"]
    assert row["After: my plan"] == words.figure(value)
    assert list(table.columns[1:4]) == ["As it came", "After: untouched", "After: my plan"]
