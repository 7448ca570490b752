"""Every page in every state, through Streamlit's AppTest, and the store behind them."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as hypothesis_text
from PIL import Image
from streamlit.testing.v1 import AppTest

import core
from core.errors import OfflineError
from core.records import (
    Diagnosis,
    DiagnosisHeader,
    LayerReport,
    MetricValue,
    ModelOutline,
    Preprocessing,
)
from dashboard import plot, store, words
from dashboard.store import runs as run_room
from dashboard.store import workspace as workspace_room
from dashboard.store.runs import RunQueue
from tests.bombs import checkpoint_bomb

ROOT = Path(__file__).resolve().parent.parent
APP = str(ROOT / "dashboard" / "main.py")
# As many as Choose shows.
SHOWN_IMAGES = 8
WORKSPACE = "0123456789abcdef"
PATIENCE_S = 60.0
PICKED = ("blocks.5.0.conv_pw", "blocks.5.0.conv_dw")

# Stands in for `python -m core`: finds its files among the arguments, says some steps, then does
# what {act} says.
WORKER = """
import json, signal, sys, time, pathlib
arguments = sys.argv[1:]
value = lambda flag: pathlib.Path(arguments[arguments.index(flag) + 1])
events = value("--events").open("a")
def say(**event):
    events.write(json.dumps({{**event, "t": time.time()}}) + chr(10)); events.flush()
say(event="phase", name="fine-tuning")
for step in range(0, 11):
    for arm in ("untouched", "plan"):
        say(event="step", arm=arm, seed=0, step=step, train_loss=None if step == 0 else 1.0,
            val_accuracy=0.5 if step % 5 == 0 else None, wall_s=float(step))
say(event="progress", done=11, total=60, unit="steps", eta_s=12.0)
{act}
"""
WAIT_FOR_STOP = """
while not value("--stop-file").exists(): time.sleep(0.02)
say(event="stopped")
"""
IGNORE_STOP = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(120)
"""
FINISH = 'say(event="done", out="x")'
REFUSE = """
say(event="error", message="The folder holds no images.")
sys.exit(2)
"""
CRASH = "import os; os._exit(7)"


@pytest.fixture(autouse=True)
def fresh_queue(limber_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    """A queue of this test alone, empty at its end."""
    queue = RunQueue()
    monkeypatch.setattr(run_room, "queue", queue)
    monkeypatch.setattr("dashboard.store.session.queue", queue)
    monkeypatch.setattr("dashboard.store.trials.queue", queue)
    yield queue
    for run in queue.live():
        queue.stop(run.id)
    wait_until(lambda: not queue.live())


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the worker by one that does what it is told."""

    def set_act(act: str) -> None:
        def launch(argv: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-c", WORKER.format(act=act), *argv],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

        monkeypatch.setattr(RunQueue, "_launch", staticmethod(launch))

    return set_act


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def open_app(page: str = "choose") -> AppTest:
    app = AppTest.from_file(APP, default_timeout=PATIENCE_S)
    app.query_params["w"] = WORKSPACE
    workspace_room.workspace(WORKSPACE)
    app.run()
    if page != "choose":
        app.switch_page(f"views/{page}.py").run()
    assert_well(app)
    return app


def assert_well(app: AppTest) -> None:
    assert not app.exception, app.exception
    assert not [error.value for error in app.error if "Limber itself" in error.value]


def space() -> workspace_room.Workspace:
    return workspace_room.workspace(WORKSPACE)


def shown(app: AppTest) -> str:
    kinds = (
        app.text,
        app.markdown,
        app.caption,
        app.error,
        app.info,
        app.warning,
        app.success,
        app.subheader,
    )
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def outline() -> ModelOutline:
    return core.outline_model(core.resolve_model("tf_efficientnet_lite0"), classes=8)


def put_run(
    kind: str,
    *,
    state: str = "done",
    message: str | None = None,
    facts: dict[str, object] | None = None,
) -> Path:
    """Lay down a run that an earlier server finished."""
    run_id = f"{kind}-20261123-010000-aaaa"
    folder = space().folder / "runs" / run_id
    folder.mkdir(parents=True)
    document = {
        "id": run_id,
        "kind": kind,
        "state": state,
        "created": 1.0,
        "started": 1.0,
        "ended": 31.0,
        "message": message,
        "argv": [],
        "pid": None,
        "facts": {
            "choice": space().choice.model_dump(mode="json"),
            "title": "EfficientNet-Lite0",
            "plan": "plan",
            "layers": list(PICKED),
            "steps": 10,
            "seeds": [0],
            **(facts or {}),
        },
    }
    (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def put_measurement(*, twin: Mapping[str, float] | None = None) -> Diagnosis:
    """Lay down a measurement of the embedded default with made-up figures.

    Args:
        twin: Figures of the fresh twin that differ from the network's.
    """
    model, names = outline(), [info.name for info in core.list_metrics() if info.level == "layer"]
    data = core.resolve_data("bloodmnist")
    figures = {name: MetricValue(value=0.3, n=64) for name in names}
    figures["dormant_fraction"] = MetricValue(value=0.0, n=64)
    figures["dead_fraction"] = MetricValue(value=None, reason="the layer feeds no ReLU")
    dead = figures | {"dead_fraction": MetricValue(value=0.4, n=64, half_width=0.1)}
    theirs = {name: MetricValue(value=value, n=64) for name, value in (twin or {}).items()}
    layers = tuple(
        LayerReport(
            name=layer.name,
            type=layer.type,
            stage=layer.stage,
            kind=layer.kind,
            index=layer.index,
            parameters=layer.count,
            units=8,
            activation=layer.activation,
            activation_type=None,
            head=layer.head,
            metrics=dead if layer.name in PICKED else figures,
            twin_metrics=figures | theirs,
            ratio_intervals={"grad_l2": (0.5, 2.0)},
        )
        for layer in model.layers
    )
    header = DiagnosisHeader(
        model=model.spec,
        model_title=model.title,
        classes=8,
        backbone_sha256=model.backbone_sha256,
        data=data,
        data_title="BloodMNIST",
        data_fingerprint=core.outline_data(data).fingerprint,
        split="train",
        samples=64,
        batches=2,
        batch_size=32,
        image_size=96,
        device="cpu",
        device_name="cpu",
        dtype="float32",
        seed=0,
        batch_norm="batch",
        loss=2.0,
        twin_loss=2.1,
        wall_s=30.0,
        versions={},
    )
    folder = put_run("measure", facts={"samples": 64})
    return core.write_diagnosis(
        Diagnosis(header=header, layers=layers), {}, folder / "diagnosis.json"
    )


# --- choose ---------------------------------------------------------------------------------


def test_the_app_opens_on_the_embedded_default_with_measuring_one_click_away() -> None:
    app = open_app()

    text = shown(app)
    assert "EfficientNet-Lite0" in text
    assert "BloodMNIST (blood cells)" in text
    assert words.head_sentence(outline()) in text
    app.switch_page("views/measure.py").run()
    assert app.button(key="measure_start").label == "Measure"


def test_another_embedded_data_set_changes_choice_and_head() -> None:
    app = open_app()

    app.button(key="use_data_pneumonia").click().run()

    assert_well(app)
    assert space().choice.data == "pneumonia"
    assert "2 classes" in shown(app)


def test_a_folder_that_is_not_there_gives_a_sentence_and_keeps_the_choice() -> None:
    app = open_app()
    app.segmented_control(key="data_way").set_value("Folder, zip").run()

    app.text_input(key="data_path").set_value("no/such/folder").run()
    app.button(key="use_folder").click().run()

    assert_well(app)
    assert len(app.error) == 1
    assert space().choice.data == "bloodmnist"


def test_deep_images_show_what_is_black_and_white_and_unequal_parts_warn(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("val", "ab")):
        for place, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            values = np.arange(900, dtype=np.uint16).reshape(30, 30) * 4 + place
            Image.fromarray(values).save(tmp_path / split / name / "0.png")
    app = open_app()
    app.segmented_control(key="data_way").set_value("Folder, zip").run()

    app.text_input(key="data_path").set_value(str(tmp_path)).run()
    app.button(key="use_folder").click().run()

    assert_well(app)
    assert (
        "5 16-bit images: intensities 0 to 4,095 (12 bits; the brightest pixel of 3 training "
        "images is 3,598) are shown and measured as black to white"
    ) in shown(app)
    (warned,) = app.warning
    assert "1 class has training images and no validation image" in warned.value.replace("\\", "")


def test_a_checkpoint_on_disk_becomes_the_network() -> None:
    app = open_app()
    weights = ROOT / "assets" / "weights" / "tf_efficientnet_lite0.fp16.safetensors"
    app.segmented_control(key="model_way").set_value("Your checkpoint").run()

    app.text_input(key="checkpoint_model").set_value("timm:tf_efficientnet_lite0").run()
    app.text_input(key="checkpoint_path").set_value(str(weights)).run()
    app.button(key="use_checkpoint").click().run()

    assert_well(app)
    assert space().choice.checkpoint == str(weights)
    # The worker's answer went through JSON; the layers are those of the network that ships.
    assert store.model_outline(space().choice).layers == outline().layers
    assert "replaced by a new, random one for the 8 classes" in shown(app)


def test_an_uploaded_zip_becomes_the_images() -> None:
    app = open_app()
    archive = (ROOT / "assets" / "data" / "pneumonia.zip").read_bytes()
    app.segmented_control(key="data_way").set_value("Upload").run()

    app.file_uploader[0].set_value(("../x-rays.zip", archive, "application/zip")).run()
    app.button(key="use_upload").click().run()

    assert_well(app)
    stored = Path(space().choice.data)
    assert stored.is_relative_to(space().folder / "uploads")
    assert stored.name == "x-rays.zip"


def _resident_mb(*, most: bool = False) -> float:
    kind = "VmHWM" if most else "VmRSS"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def _uploads() -> list[Path]:
    return [path for path in (space().folder / "uploads").rglob("*") if path.is_file()]


def _offer(app: AppTest, kind: str, name: str, content: bytes) -> None:
    """Choose the way of an upload, give the file and press the button."""
    way, choice, button = {
        "data": ("data_way", "Upload", "use_upload"),
        "checkpoint": ("model_way", "Your checkpoint", "use_checkpoint"),
    }[kind]
    app.segmented_control(key=way).set_value(choice).run()
    if kind == "checkpoint":
        app.text_input(key="checkpoint_model").set_value("torchvision:resnet18").run()
    turn = app.session_state[f"{kind}_turn"]
    app.file_uploader(key=f"{kind}_file_{turn}").set_value((name, content, "x/y")).run()
    app.button(key=button).click().run()
    assert_well(app)


def test_a_bomb_is_one_sentence_and_no_memory_of_the_server() -> None:
    bomb = checkpoint_bomb(2_900_000_000)
    assert len(bomb) < 3_000_000
    app = open_app()
    before = _resident_mb()
    # From here on the highest mark is counted anew.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    _offer(app, "checkpoint", "bomb.pth", bomb)

    assert _resident_mb(most=True) - before < 100
    (error,) = app.error
    assert '"bomb.pth" was refused and removed' in error.value.replace("\\", "")
    assert len(error.value.splitlines()) == 1
    assert space().choice == workspace_room.Choice()
    assert _uploads() == []


@pytest.mark.parametrize("broken", ["no zip at all", "pictures that are none"])
def test_a_refused_zip_is_never_the_choice(broken: str) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png")[
            : 2 if broken == "one class" else 4
        ]:
            archive.writestr(name, b"no picture")
    content = b"PK no zip" if broken == "no zip at all" else packed.getvalue()
    app = open_app()

    _offer(app, "data", "x.zip", content)

    (error,) = app.error
    assert '"x.zip" was refused and removed' in error.value.replace("\\", "")
    assert app.file_uploader(key="data_file_1").value is None
    assert app.button(key="use_upload").disabled
    reloaded = open_app()
    assert not reloaded.error
    for each in (app, reloaded):
        assert "x.zip" not in "".join(str(text.value) for text in each.text)
    assert space().choice == workspace_room.Choice()
    assert _uploads() == []


def test_weights_that_are_not_here_give_one_sentence_and_keep_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OfflineError("The host cannot be reached. use --weights none, or another model.")

    app = open_app()
    app.segmented_control(key="model_way").set_value("timm, torchvision").run()
    monkeypatch.setattr(core, "outline_model", unreachable)

    app.selectbox(key="model_name").set_value("timm:resnet18").run()
    app.button(key="use_named").click().run()

    assert_well(app)
    assert "switch on Random weights" in app.error[0].value.replace("\\", "")
    assert space().choice.model == "tf_efficientnet_lite0"


def test_a_malformed_workspace_in_the_address_never_becomes_a_path(limber_home: Path) -> None:
    app = AppTest.from_file(APP, default_timeout=PATIENCE_S)
    app.query_params["w"] = "../../outside"

    app.run()

    assert_well(app)
    assert workspace_room.WORKSPACE_ID.fullmatch("".join(app.query_params["w"]))
    assert not (limber_home.parent / "outside").exists()


# --- measure --------------------------------------------------------------------------------


def test_measure_shows_what_the_running_worker_says_and_stops_it(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    app = open_app("measure")

    app.button(key="measure_start").click().run()
    wait_until(lambda: fresh_queue.live()[0].total == 60)
    app.run()

    assert app.button(key="stop_measure")
    run_id = fresh_queue.live()[0].id
    app.button(key="stop_measure").click().run()
    wait_until(lambda: not fresh_queue.live())
    app.run()
    assert_well(app)
    assert fresh_queue.view(space().folder, run_id).state == "stopped"
    assert "Stopped" in shown(app)


def test_measure_shows_the_workers_own_sentence_when_it_failed(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(REFUSE)
    app = open_app("measure")

    app.button(key="measure_start").click().run()
    wait_until(lambda: not fresh_queue.live())
    app.run()

    assert_well(app)
    assert "The folder holds no images" in app.error[0].value.replace("\\", "")


def test_a_finding_picks_the_layers_it_speaks_of() -> None:
    put_measurement()
    app = open_app("measure")

    app.button(key="findings_0").click().run()

    assert_well(app)
    assert space().picks.layers == PICKED


def test_findings_follow_the_preset_and_its_limits_and_both_are_kept() -> None:
    put_measurement()
    app = open_app("measure")
    assert [button.label for button in app.button if button.key == "findings_0"] == [
        words.escape(f"2 layers have more than 5 % of units that never fire. ({', '.join(PICKED)})")
    ]

    app.number_input(key="limit_limber_dead-units").set_value(0.45).run()

    assert_well(app)
    assert not [button for button in app.button if button.key == "findings_0"]
    assert space().judging.thresholds == {"dead-units": 0.45}
    assert core_rules(app).label == "Rules: Limber, 1 limit changed"

    app.button(key="judge_reset").click().run()

    assert_well(app)
    assert app.number_input(key="limit_limber_dead-units").value == 0.05
    assert [button for button in app.button if button.key == "findings_0"]

    app.selectbox(key="judge_preset").set_value("weightwatcher").run()

    assert_well(app)
    assert space().judging.preset == "weightwatcher"
    # An exponent of 0.3 lies below the useful range in every layer, and in the twin's as well.
    assert not [button for button in app.button if button.key == "findings_0"]
    (said,) = [each.value for each in app.caption if "exponent below 2" in each.value]
    assert said.startswith("As in the fresh twin")
    assert core_rules(open_app("measure")).label == "Rules: WeightWatcher"


def test_a_twin_of_0_has_a_word_in_the_table_of_each_page() -> None:
    put_measurement(twin={"grad_l2": 0.0, "weight_l2": 0.0})

    measure, pick = open_app("measure"), open_app("pick")

    assert_well(measure)
    assert_well(pick)
    numbers = table(measure, "Against the twin").set_index("Metric")
    assert (
        numbers["Against the twin"].to_dict()
        | {
            "Gradient size (L2 norm)": "the fresh twin's value is 0: no ratio",
            "Weight norm": "the fresh twin's value is 0: no ratio",
        }
        == numbers["Against the twin"].to_dict()
    )
    assert numbers["Interval of the ratio"]["Gradient size (L2 norm)"] == ""
    layers = table(pick, "No ratio: twin is 0")
    assert set(layers["No ratio: twin is 0"]) == {"Gradient size, Weight norm"}
    assert layers["Gradient size, ratio"].isna().all()
    assert (layers["Relative gradient norm, ratio"] == 1).all()
    for app in (measure, pick):
        assert words.escape("Dot: measured, but no ratio") in shown(app)


def table(app: AppTest, column: str) -> Any:
    (found,) = [each.value for each in app.dataframe if column in each.value.columns]
    return found


def core_rules(app: AppTest) -> Any:
    (found,) = [each for each in app.expander if each.label.startswith("Rules: ")]
    return found


def test_limits_of_a_rule_that_is_gone_are_let_go() -> None:
    put_measurement()
    space().set_judging(store.Judging(preset="nosuch", thresholds={"gone": 1.0}))

    app = open_app("measure")

    assert_well(app)
    assert [button for button in app.button if button.key == "findings_0"]


def test_a_measurement_of_other_images_is_called_stale() -> None:
    put_measurement()
    space().choose(data="pneumonia")

    app = open_app("measure")

    assert "Measure again" in app.warning[0].value


# --- pick -----------------------------------------------------------------------------------


def test_patterns_buttons_and_undo_share_one_selection() -> None:
    app = open_app("pick")

    app.text_input(key="pattern_text").set_value("blocks.5.0.*").run()
    app.button(key="pattern_add").click().run()
    after_add = space().picks.layers
    app.text_input(key="pattern_text").set_value("*.bn?").run()
    app.button(key="pattern_remove").click().run()
    after_remove = space().picks.layers
    app.button(key="undo").click().run()

    assert_well(app)
    assert set(after_remove) < set(after_add)
    assert not [name for name in after_remove if ".bn" in name]
    assert space().picks.layers == after_add


def test_a_layer_is_reset_or_frozen_and_the_page_says_which_gave_way() -> None:
    put_measurement()
    space().change_picks(layers=PICKED)
    app = open_app("pick")

    app.text_input(key="pattern_text").set_value(PICKED[0]).run()
    app.button(key="pattern_freeze").click().run()

    assert_well(app)
    assert (space().picks.layers, space().picks.freeze) == (PICKED[1:], PICKED[:1])
    assert "is frozen now and no longer reset" in shown(app)

    app.button(key="findings_0").click().run()

    assert_well(app)
    assert (space().picks.layers, space().picks.freeze) == (PICKED, ())
    assert "is reset now and no longer frozen" in shown(app)


def test_a_pattern_without_a_match_gives_a_sentence() -> None:
    app = open_app("pick")

    app.text_input(key="pattern_text").set_value("nothing*").run()
    app.button(key="pattern_add").click().run()

    assert_well(app)
    assert "nothing" in app.error[0].value
    assert space().picks.layers == ()


def test_undo_also_reaches_the_scheme() -> None:
    app = open_app("pick")
    first = space().picks.scheme
    other = next(info.name for info in core.list_schemes() if info.name != first)

    app.selectbox(key="scheme").set_value(other).run()
    chosen = space().picks.scheme
    app.button(key="undo").click().run()

    assert_well(app)
    assert (chosen, space().picks.scheme) == (other, first)
    assert app.selectbox(key="scheme").value == first


def test_the_plan_of_a_rule_stays_whole_until_it_is_cleared() -> None:
    plan = core.plan_by_rule(
        core.resolve_model("tf_efficientnet_lite0"),
        "weight-magnitude",
        {"percent": 10.0},
        classes=8,
        wish=core.Wish(name="weight-magnitude", layers=PICKED),
    )
    app = open_app("export")
    files = [("plan.json", core.plan_json(plan).encode(), "application/json")]
    assert plan.companion is not None
    assert plan.companion_bytes is not None
    files.append((plan.companion.file, plan.companion_bytes, "application/octet-stream"))
    app.file_uploader(key="plan_upload_0").set_value(files).run()
    assert_well(app)
    assert space().picks.plan_file is not None
    before = space().picks

    app = open_app("pick")
    app.text_input(key="pattern_text").set_value("blocks.4*").run()
    app.button(key="pattern_add").click().run()

    assert_well(app)
    assert space().picks == before
    assert "The plan stays as it is" in app.info[0].value

    app.button(key="clear").click().run()
    app.button(key="pattern_add").click().run()

    assert_well(app)
    picks = space().picks
    assert picks.layers
    assert (picks.plan_file, picks.scheme, picks.name) == (None, "architecture", "plan")
    app.button(key="undo").click().run()
    app.button(key="undo").click().run()
    assert space().picks == before


def test_picks_belong_to_their_network() -> None:
    app = open_app()
    space().change_picks(layers=PICKED)

    space().choose(model="vit_small_patch14_dinov2")
    elsewhere = space().picks.layers
    space().choose(model="tf_efficientnet_lite0")

    assert_well(app)
    assert (elsewhere, space().picks.layers) == ((), PICKED)


# --- watch ----------------------------------------------------------------------------------


def test_watch_says_what_it_waits_for() -> None:
    app = open_app("watch")

    assert "Pick at least one layer" in shown(app)


def test_watch_starts_a_run_and_shows_it_after_a_reload(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    space().change_picks(layers=PICKED)
    app = open_app("watch")

    app.button(key="train_start").click().run()
    assert_well(app)
    wait_until(lambda: fresh_queue.live()[0].total == 60)
    reloaded = open_app("watch")

    assert "Verdict so far" in shown(reloaded)
    assert reloaded.button(key="stop_finetune")


def test_watch_refuses_seeds_it_cannot_read() -> None:
    space().change_picks(layers=PICKED)
    app = open_app("watch")

    app.text_input(key="train_seeds").set_value("one, two").run()

    assert_well(app)
    assert "whole numbers" in app.error[0].value
    assert app.button(key="train_start").disabled


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        ("failed", "The loss is not a number.", "The loss is not a number"),
        ("stopped", None, "Stopped"),
        ("done", None, "nothing to compare"),
    ],
)
def test_watch_says_how_an_earlier_run_ended(
    state: str, message: str | None, expected: str
) -> None:
    put_run("finetune", state=state, message=message)

    app = open_app("watch")

    assert expected in shown(app).replace("\\", "")


# --- export ---------------------------------------------------------------------------------


def test_export_says_what_it_waits_for() -> None:
    app = open_app("export")

    assert "There is no plan yet" in shown(app)


def test_an_exported_plan_loaded_again_gives_the_same_selection() -> None:
    space().change_picks(layers=PICKED, freeze=("conv_stem",), seed=7)
    app = open_app("export")
    text = next(code.value for code in app.code if code.language == "json")
    space().change_picks(layers=(), freeze=(), seed=0)
    app.run()

    app.file_uploader[0].set_value(("plan.json", text.encode(), "application/json")).run()

    assert_well(app)
    picks = space().picks
    assert (set(picks.layers), picks.freeze, picks.seed) == (set(PICKED), ("conv_stem",), 7)
    again = next(code.value for code in app.code if code.language == "json")
    assert again == text


def test_a_plan_that_resets_and_freezes_is_kept_as_it_was_loaded_and_says_so() -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))

    odd = json.dumps({**plan, "freeze": PICKED[:1]}).encode()
    app.file_uploader[0].set_value(("plan.json", odd, "application/json")).run()

    assert_well(app)
    assert "is reset and yet not trained" in shown(app)
    again = json.loads(next(code.value for code in app.code if code.language == "json"))
    assert (again["targets"], again["freeze"]) == (plan["targets"], list(PICKED[:1]))


def test_a_pick_that_an_older_version_froze_as_well_gets_a_sentence() -> None:
    space().change_picks(layers=PICKED, freeze=PICKED[:1])

    app = open_app("export")

    assert_well(app)
    assert "and keeps the same from training" in shown(app)


def test_a_plan_with_an_unknown_key_is_refused_by_name() -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))

    app.file_uploader[0].set_value(
        ("plan.json", json.dumps({**plan, "colour": 1}).encode(), "application/json")
    ).run()

    assert_well(app)
    assert "colour" in app.error[0].value


@pytest.mark.parametrize("named", ["/etc/passwd", "gone.pt", "core/../README.md"])
def test_a_plan_opens_no_file_on_this_machine(named: str) -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))
    plan["model"] |= {"weights": "checkpoint", "checkpoint": named}

    app.file_uploader[0].set_value(
        ("plan.json", json.dumps(plan).encode(), "application/json")
    ).run()

    assert_well(app)
    assert "A plan does not open files here" in app.error[0].value
    assert space().choice.checkpoint is None


# --- errors ---------------------------------------------------------------------------------


def test_an_unforeseen_error_becomes_a_sentence_and_a_log(
    limber_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret detail")

    app = open_app()
    monkeypatch.setattr("dashboard.store.pick_size", broken)
    space().change_picks(layers=PICKED)

    app.switch_page("views/pick.py").run()

    assert not app.exception
    assert "Limber itself" in app.error[0].value
    assert "secret detail" not in shown(app)


# --- the store ------------------------------------------------------------------------------


def start(queue: RunQueue) -> str:
    def argv(folder: Path) -> list[str]:
        return ["--events", str(folder / "events.jsonl"), "--stop-file", str(folder / "stop")]

    return queue.start("finetune", space().folder, argv, {})


def test_a_worker_that_ignores_stop_is_ended_with_its_group(
    worker: Callable[[str], None], fresh_queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_room, "TERM_AFTER_S", 0.2)
    monkeypatch.setattr(run_room, "KILL_AFTER_S", 0.5)
    worker(IGNORE_STOP)
    run_id = start(fresh_queue)
    wait_until(lambda: bool(fresh_queue.view(space().folder, run_id).steps))

    fresh_queue.stop(run_id)
    wait_until(lambda: not fresh_queue.live())

    assert fresh_queue.view(space().folder, run_id).state == "stopped"


def test_runs_wait_their_turn(worker: Callable[[str], None], fresh_queue: RunQueue) -> None:
    worker(WAIT_FOR_STOP)
    first, second = start(fresh_queue), start(fresh_queue)
    assert fresh_queue.view(space().folder, second).state == "queued"

    fresh_queue.stop(first)
    wait_until(lambda: fresh_queue.view(space().folder, second).state == "running")

    assert fresh_queue.view(space().folder, first).state == "stopped"


def test_a_crash_is_told_with_the_place_of_the_log(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(CRASH)
    run_id = start(fresh_queue)

    wait_until(lambda: not fresh_queue.live())

    view = fresh_queue.view(space().folder, run_id)
    assert view.state == "failed"
    assert "exit code 7" in str(view.message)
    assert "stderr.log" in str(view.message)


def test_a_worker_that_outlived_its_server_is_adopted(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    run_id = start(fresh_queue)
    wait_until(lambda: fresh_queue.view(space().folder, run_id).total == 60)

    later = RunQueue()
    later.recover()
    adopted = later.live()
    later.stop(run_id)
    wait_until(lambda: not later.live())

    assert [run.id for run in adopted] == [run_id]
    assert len(adopted[0].steps) == 22
    assert later.view(space().folder, run_id).state == "stopped"


def test_a_run_whose_worker_died_with_its_server_is_marked_failed() -> None:
    folder = put_run("finetune", state="running")

    later = RunQueue()
    later.recover()

    view = later.view(space().folder, folder.name)
    assert view.state == "failed"


def test_a_finished_run_is_done(worker: Callable[[str], None], fresh_queue: RunQueue) -> None:
    worker(FINISH)
    run_id = start(fresh_queue)

    wait_until(lambda: not fresh_queue.live())

    view = fresh_queue.view(space().folder, run_id)
    assert view.state == "done"
    assert {curve.arm for curve in view.curves()} == {"untouched", "plan"}


def test_a_damaged_workspace_file_is_set_aside(limber_home: Path) -> None:
    folder = limber_home / "workspaces" / "fedcba9876543210"
    folder.mkdir(parents=True)
    (folder / "workspace.json").write_text("{half", encoding="utf-8")

    opened = workspace_room.workspace("fedcba9876543210")

    assert opened.choice == workspace_room.Choice()
    assert (folder / "workspace.damaged.json").read_text(encoding="utf-8") == "{half"


def test_the_environment_names_the_home(limber_home: Path) -> None:
    assert workspace_room.home() == Path(os.environ["LIMBER_HOME"]).resolve()


@pytest.mark.parametrize("text", ["![x](http://host/x.png)", "**bold** `code` <b>", "a_b_c [l](u)"])
def test_escaped_text_has_no_live_markdown(text: str) -> None:
    escaped = words.escape(text)

    assert escaped.replace("\\", "").replace(words.APART, "") == text
    assert "](" not in escaped
    assert "![" not in escaped


# --- earlier work ---------------------------------------------------------------------------


def put_work(number: int, *, runs: int = 0, **changes: str) -> str:
    """Lay down a workspace in which something was done, the later the higher its number."""
    other = workspace_room.workspace(f"{number:016x}")
    other.choose(**{"data": "pneumonia", **changes})
    for run in range(runs):
        (other.folder / "runs" / f"measure-20261123-01000{run}-aaaa").mkdir(parents=True)
    os.utime(other.folder / "workspace.json", (1e9 + number, 1e9 + number))
    if runs:
        os.utime(other.folder / "runs", (1e9 + number, 1e9 + number))
    return other.id


def earlier(app: AppTest) -> list[str]:
    return [
        button.label.replace("\\", "")
        for button in app.button
        if str(button.key).startswith("open_")
    ]


def test_earlier_work_is_listed_the_last_used_first_and_opens_at_a_click() -> None:
    workspace_room.workspace(put_work(1, runs=2)).set_name("second look")
    os.utime(space().folder.parent / f"{1:016x}" / "workspace.json", (1e9, 1e9))
    put_work(2, checkpoint="somewhere/mine.pth")
    workspace_room.workspace(f"{3:016x}")  # opened and left as it was
    app = open_app()

    assert earlier(app) == [
        "EfficientNet-Lite0 from mine.pth on Chest X-rays (pneumonia), no runs, 09 Sep 2001",
        "second look, EfficientNet-Lite0 on Chest X-rays (pneumonia), 2 runs, 09 Sep 2001",
    ]
    app.session_state["left_over"] = 1
    app.button(key=f"open_{1:016x}").click().run()

    assert_well(app)
    assert app.query_params["w"] in (f"{1:016x}", [f"{1:016x}"])
    assert "left_over" not in app.session_state
    assert app.text_input(key="work_name").value == "second look"
    assert "Chest X-rays" in shown(app)
    app.button(key="start_fresh").click().run()
    assert_well(app)
    assert "BloodMNIST" in shown(app)
    assert len(earlier(app)) == 2


def test_without_earlier_work_the_list_says_so() -> None:
    app = open_app()

    assert earlier(app) == []
    assert "There is none on this machine yet" in shown(app)
    assert app.button(key="start_fresh").disabled


def test_a_name_is_kept_with_the_work() -> None:
    app = open_app()

    app.text_input(key="work_name").set_value(" X-rays, first try ").run()

    assert_well(app)
    assert space().name == "X-rays, first try"


def test_a_few_are_shown_and_the_rest_on_demand() -> None:
    for number in range(1, 12):
        put_work(number)
    app = open_app()

    before = len(earlier(app))
    app.button(key="earlier_show_more").click().run()

    assert (before, len(earlier(app))) == (8, 11)


@pytest.mark.parametrize(
    "content", ["", "{half", "[]", "null", '{"choice": 3}', '{"version": 9}', "[" * 100_000, "\0"]
)
def test_work_that_cannot_be_read_does_not_break_the_list(limber_home: Path, content: str) -> None:
    put_work(1)
    broken = limber_home / "workspaces" / f"{2:016x}"
    broken.mkdir()
    (broken / "workspace.json").write_text(content, encoding="utf-8")
    (limber_home / "workspaces" / f"{3:016x}").write_text("a file")
    (limber_home / "workspaces" / "no workspace").mkdir()
    (limber_home / "workspaces" / f"{4:016x}").symlink_to("nowhere")
    (limber_home / "workspaces" / f"{5:016x}" / "workspace.json").mkdir(parents=True)

    assert [work.id for work in store.recent_work(without=WORKSPACE)] == [f"{1:016x}"]


def test_work_that_is_gone_when_it_is_clicked_gives_a_sentence(limber_home: Path) -> None:
    put_work(1)
    app = open_app()
    shutil.rmtree(limber_home / "workspaces" / f"{1:016x}")

    app.button(key=f"open_{1:016x}").click().run()

    assert_well(app)
    assert "no longer on this machine" in app.info[0].value
    assert app.query_params["w"] in (WORKSPACE, [WORKSPACE])
    assert earlier(app) == []


def test_nothing_is_shown_or_kept_before_a_login_that_is_asked_for(limber_home: Path) -> None:
    put_work(1)
    app = AppTest.from_file(APP, default_timeout=PATIENCE_S)
    app.secrets["auth"] = {"client_id": "limber"}
    app.query_params["w"] = f"{1:016x}"

    app.run()

    assert_well(app)
    assert app.button(key="log_in")
    assert len(app.button) == 1
    assert "Chest" not in shown(app)
    assert [path.name for path in (limber_home / "workspaces").iterdir()] == [f"{1:016x}"]


# --- names from elsewhere -------------------------------------------------------------------

# A clear of the screen, a turned direction, a line of its own, a picture from another host, a
# link, an icon, an entity, and what Plotly and a table take for HTML.
HOSTILE = (
    "n\x1b[2Jo\x00\x9b\u202ep\u2066q\nr\r\ts\u2028t ![x](http://evil.example/x.png) "
    "[l](www.evil.example) :material/home: &#x202e; <img src=x> <b>v</b>"
)
# In the name of a file there is neither a zero nor a slash.
HOSTILE_FILE = HOSTILE.replace("\x00", "").replace("/", "_")
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
LIVE = re.compile(
    r"(?<!\\)!?\[[^\]]*(?<!\\)\]\(|https?\\?:(?:\\?/){2}|www\\?\.|:\\?material/|&#|(?<!\\)<(?:img|b>)"
)
# Elements that show their text as it is; the rest is markdown or HTML.
PLAIN = {"text", "code", "arrow_data_frame", "bidi_component", "default", "value", "alt"}
# What a page writes itself: its styles and scripts, its icons, the addresses it links to.
OURS = {"html", "icon", "url", "id", "page", "element_id"}


def _strings(message: Any, place: str = "") -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        for each in value if isinstance(value, (list, tuple)) or hasattr(value, "add") else [value]:
            if hasattr(each, "ListFields"):
                yield from _strings(each, f"{place}/{field.name}")
            elif isinstance(each, str) and field.name not in OURS:
                yield f"{place}/{field.name}", each


def _shown_strings(app: AppTest) -> Iterator[tuple[str, str]]:
    def walk(node: Any) -> Iterator[tuple[str, str]]:
        proto = getattr(node, "proto", None)
        if proto is not None and node.type != "html":
            yield from ((f"{node.type}{place}", text) for place, text in _strings(proto))
        for child in getattr(node, "children", {}).values():
            yield from walk(child)

    yield from walk(app._tree)


def _seen() -> Preprocessing:
    model = outline()
    return model.preprocessing.model_copy(update={"image_size": model.default_size})


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of images that a worker looks at once for all tests here."""
    folder = tmp_path_factory.mktemp("hostile") / f"set {HOSTILE_FILE}"
    for name in ("a", HOSTILE_FILE):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}{HOSTILE_FILE}.png")
    return folder


@pytest.fixture
def hostile_work(limber_home: Path, hostile_folder: Path) -> None:
    """Everything that a person can name, named to do harm."""
    other = workspace_room.workspace("fedcba9876543210")
    other.set_name(HOSTILE)
    other.choose(model=HOSTILE, data=HOSTILE_FILE, checkpoint=HOSTILE_FILE)
    space().set_name(HOSTILE)
    # With pictures at once, so that one worker does for all of this.
    choice = space().choice.model_copy(update={"data": str(hostile_folder)})
    store.look_at_data(choice, _seen(), SHOWN_IMAGES)
    space().choose(data=str(hostile_folder))
    space().change_picks(layers=PICKED, name=HOSTILE)
    for kind in ("measure", "finetune", "preview", "apply"):
        put_run(kind, state="failed", message=HOSTILE, facts={"plan": HOSTILE, "title": HOSTILE})


@pytest.mark.parametrize("page", ["choose", "measure", "pick", "watch", "export"])
def test_no_page_shows_a_name_that_steers_it(hostile_work: None, page: str) -> None:
    app = open_app(page)
    if page == "choose":
        app.segmented_control(key="model_way").set_value("Your checkpoint").run()
        app.text_input(key="checkpoint_model").set_value(HOSTILE).run()
        app.text_input(key="checkpoint_path").set_value(HOSTILE_FILE).run()
        app.button(key="use_checkpoint").click().run()
    elif page == "pick":
        app.text_input(key="pattern_text").set_value(HOSTILE).run()
        app.button(key="pattern_add").click().run()
    elif page == "export":
        plan = json.dumps({"format": HOSTILE, HOSTILE: 1})
        app.file_uploader(key="plan_upload_0").set_value(
            (f"{HOSTILE_FILE}.json", plan.encode(), "x/y")
        ).run()
    assert_well(app)

    strings = list(_shown_strings(app))

    typed = {"checkpoint_model", "checkpoint_path", "pattern_text"}
    typed_values = {app.session_state[key] for key in typed if key in app.session_state}
    shown_here = [(place, text) for place, text in strings if text not in typed_values]
    assert any("evil" in text for _, text in shown_here), "nothing hostile was shown at all"
    assert [each for each in shown_here if STEERING.search(each[1])] == []
    live = [
        (place, text)
        for place, text in shown_here
        if not PLAIN & {place.partition("/")[0], place.rpartition("/")[2]} and LIVE.search(text)
    ]
    assert live == []


MARKDOWN_CALLS = {
    *("markdown", "caption", "write", "error", "info", "warning", "success", "toast", "header"),
    *("subheader", "title", "text", "code", "button", "expander", "download_button", "checkbox"),
    *("toggle", "badge", "popover", "spinner"),
}
# `metric_help` escapes each part of the markdown that it makes.
DOORS = {"escape", "clean", "code", "metric_help"}


def _is_ours(node: ast.expr) -> bool:
    """Whether an expression is a text of ours, or went through a door."""
    match node:
        case ast.Constant() | ast.Attribute(value=ast.Name(id="words")):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="words"), attr=door)):
            return door in DOORS or all(map(_is_ours, node.args)) or door in NUMBERS
        case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[inside]):
            return isinstance(inside, ast.GeneratorExp) and _is_ours(inside.elt)
        case ast.JoinedStr():
            return all(
                isinstance(part, ast.Constant)
                or (isinstance(part, ast.FormattedValue) and _is_shown(part))
                for part in node.values
            )
        case ast.IfExp(body=first, orelse=second) | ast.BinOp(left=first, right=second):
            return _is_ours(first) and _is_ours(second)
    return False


# Sentences that words makes of numbers alone.
NUMBERS = {"count", "short", "estimate", "percent", "duration", "figure"}


def _is_shown(part: ast.FormattedValue) -> bool:
    numeric = part.format_spec is not None
    return numeric or _is_ours(part.value)


def _texts_of(call: ast.Call, name: str) -> Iterator[ast.expr]:
    if name in MARKDOWN_CALLS:
        yield from call.args[:1]
    yield from (each.value for each in call.keywords if each.arg in ("label", "text", "body"))


def test_every_text_that_a_page_shows_goes_through_a_door() -> None:
    past = []
    for path in sorted((ROOT / "dashboard").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="st"), attr=name)):
                    past += [
                        f"{path.relative_to(ROOT)}:{text.lineno} {ast.unparse(text)}"
                        for text in _texts_of(node, name)
                        if not _is_ours(text)
                    ]

    assert past == []


def test_a_figure_shows_no_name_that_steers_it_and_knows_its_layers_by_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(plot, "_component", lambda: lambda **given_: sent.update(given_) or {})
    figure = go.Figure(
        go.Heatmap(
            z=[[1.0]],
            y=[HOSTILE],
            customdata=[[HOSTILE]],
            hovertext=[[HOSTILE]],
            hovertemplate=HOSTILE,
            name=HOSTILE,
        ),
        layout={"title": {"text": HOSTILE}, "xaxis": {"ticktext": [HOSTILE], "tickvals": [0]}},
    )

    plot.plot(figure, key="k", height=100, alt=HOSTILE)

    (trace,) = json.loads(sent["data"]["traces"])
    assert trace.pop("customdata") == [[HOSTILE]]
    for shown_part in (trace, json.loads(sent["data"]["layout"]), sent["data"]["alt"]):
        texts = json.dumps(shown_part, ensure_ascii=False)
        assert "evil" in texts
        assert not STEERING.search(texts)
        assert not re.search(r"\\u00[01]", texts.replace("\\\\", "")), texts


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
