"""What is uploaded is tried before it counts, and gone where it is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard.store import workspace as workspace_room
from tests.bombs import checkpoint_bomb
from tests.pages import (
    ROOT,
    assert_well,
    open_app,
    space,
)

pytestmark = pytest.mark.usefixtures("fresh_queue")


def test_an_uploaded_zip_becomes_the_images() -> None:
    app = open_app("choose")
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
    app = open_app("choose")
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
    app = open_app("choose")

    _offer(app, "data", "x.zip", content)

    (error,) = app.error
    assert '"x.zip" was refused and removed' in error.value.replace("\\", "")
    assert app.file_uploader(key="data_file_1").value is None
    assert app.button(key="use_upload").disabled
    reloaded = open_app("choose")
    assert not reloaded.error
    for each in (app, reloaded):
        assert "x.zip" not in "".join(str(text.value) for text in each.text)
    assert space().choice == workspace_room.Choice()
    assert _uploads() == []
