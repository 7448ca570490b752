"""Every page in every state, through Streamlit's AppTest, and the store behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from streamlit.testing.v1 import AppTest

import core
from core.errors import OfflineError
from core.records import (
    Diagnosis,
    DiagnosisHeader,
    LayerReport,
    MetricValue,
    ModelOutline,
)
from dashboard import store, words
from dashboard.store import runs as run_room
from dashboard.store import workspace as workspace_room
from dashboard.store.runs import RunQueue

ROOT = Path(__file__).resolve().parent.parent
APP = str(ROOT / "dashboard" / "app.py")
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


def put_measurement() -> Diagnosis:
    """Lay down a measurement of the embedded default with made-up figures."""
    model, names = outline(), [info.name for info in core.list_metrics() if info.level == "layer"]
    data = core.resolve_data("bloodmnist")
    figures = {name: MetricValue(value=0.3, n=64) for name in names}
    figures["dormant_fraction"] = MetricValue(value=0.0, n=64)
    figures["dead_fraction"] = MetricValue(value=None, reason="the layer feeds no ReLU")
    dead = figures | {"dead_fraction": MetricValue(value=0.4, n=64, half_width=0.1)}
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
            twin_metrics=figures,
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
    diagnosis = Diagnosis(header=header, layers=layers)
    folder = put_run("measure", facts={"samples": 64})
    (folder / "diagnosis.json").write_text(diagnosis.model_dump_json(), encoding="utf-8")
    return diagnosis


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


def test_a_checkpoint_on_disk_becomes_the_network() -> None:
    app = open_app()
    weights = ROOT / "assets" / "weights" / "tf_efficientnet_lite0.fp16.safetensors"
    app.segmented_control(key="model_way").set_value("Your checkpoint").run()

    app.text_input(key="checkpoint_model").set_value("timm:tf_efficientnet_lite0").run()
    app.text_input(key="checkpoint_path").set_value(str(weights)).run()
    app.button(key="use_checkpoint").click().run()

    assert_well(app)
    assert space().choice.checkpoint == str(weights)
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
    # An exponent of 0.3 lies below the useful range in every layer.
    (found,) = [button for button in app.button if button.key == "findings_0"]
    assert "exponent below 2" in found.label
    assert core_rules(open_app("measure")).label == "Rules: WeightWatcher"


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


def test_a_plan_with_an_unknown_key_is_refused_by_name() -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))

    app.file_uploader[0].set_value(
        ("plan.json", json.dumps({**plan, "colour": 1}).encode(), "application/json")
    ).run()

    assert_well(app)
    assert "colour" in app.error[0].value


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

    assert escaped.replace("\\", "") == text
    assert "](" not in escaped
    assert "![" not in escaped
