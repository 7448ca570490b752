"""Pages in Streamlit's AppTest: how tests open one, and what they lay down for it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from streamlit.testing.v1 import AppTest

import core
from core.records import (
    Diagnosis,
    DiagnosisHeader,
    LayerReport,
    MetricValue,
    ModelOutline,
)
from dashboard.store import workspace as workspace_room

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(sorted(path.stem for path in (ROOT / "dashboard" / "views").glob("[a-z]*.py")))
APP = str(ROOT / "dashboard" / "main.py")
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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def open_app(page: str = "look") -> AppTest:
    app = AppTest.from_file(APP, default_timeout=PATIENCE_S)
    app.query_params["w"] = WORKSPACE
    workspace_room.workspace(WORKSPACE)
    app.run()
    if page != "look":
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
    letter: str = "a",
) -> Path:
    """Lay down a run that an earlier server finished; another letter for another of its kind."""
    run_id = f"{kind}-20261123-010000-{letter * 4}"
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


# A clear of the screen, a turned direction, a line of its own, a picture from another host, a
# link, an icon, an entity, and what Plotly and a table take for HTML.
HOSTILE = (
    "n\x1b[2Jo\x00\x9b\u202ep\u2066q\nr\r\ts\u2028t ![x](http://evil.example/x.png) "
    "[l](www.evil.example) :material/home: &#x202e; <img src=x> <b>v</b>"
)
# In the name of a file there is neither a zero nor a slash.
HOSTILE_FILE = HOSTILE.replace("\x00", "").replace("/", "_")
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
