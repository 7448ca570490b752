"""An exported plan in four trainers: each starts from the bits that the plan makes."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from core.files.companions import plan_json
from core.load import resolve_data, resolve_model
from core.pipeline.exporting import export_plan
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.planning.subject import Sight
from core.records import ReinitPlan, ReinitReceipt

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED, VISION = "tf_efficientnet_lite0", "torchvision:resnet18"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real images, four of each class."""
    folder = tmp_path_factory.mktemp("images")
    with zipfile.ZipFile(ROOT / "assets" / "data" / "bloodmnist.zip") as archive:
        seen: dict[str, int] = {}
        for name in archive.namelist():
            split, label, _ = name.split("/")
            seen[label] = seen.get(label, 0) + (split == "train")
            if split == "train" and seen[label] <= 4:
                (folder / label).mkdir(exist_ok=True)
                # timm's folders take no WebP.
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    image.save(folder / label / f"{Path(name).stem}.png")
    return folder


@pytest.fixture(scope="module", params=[EMBEDDED, VISION])
def export(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ReinitPlan, ReinitReceipt]:
    embedded = request.param == EMBEDDED
    spec = resolve_model(request.param, weights="pretrained" if embedded else "none")
    rule, options = ("redo", {"threshold": 0.2}) if embedded else ("cbp", {"percent": 10.0})
    stem, last = ("conv_stem", "conv_head") if embedded else ("conv1", "layer4.1.conv2")
    wish = Wish(freeze=(stem,), learning_rates={last: 0.1}, seed=2)
    sight = Sight(data=resolve_data("bloodmnist"), samples=16, image_size=64)
    plan = plan_by_rule(spec, rule, options, sight=sight, wish=wish)
    folder = tmp_path_factory.mktemp("export")
    return folder, plan, export_plan(plan, folder)


def trained(script: str, folder: Path, work: Path, *arguments: str) -> dict[str, Any]:
    """Run a trainer in a process of its own, with the exported script alone on its path."""
    told = work / f"{script}.json"
    done = subprocess.run(
        [sys.executable, "-m", f"tests.trainers.{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "LIMBER_REPORT": str(told)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found


def assert_learned(found: dict[str, Any], digest: str) -> None:
    assert found["start"] == digest
    assert found["end"] != digest
    assert len(found["losses"]) == 3
    assert all(0 < loss < 20 for loss in found["losses"])


@pytest.mark.parametrize("export", [EMBEDDED], indirect=True)
def test_timms_way_starts_from_the_plan(export: Any, data: Path, tmp_path: Path) -> None:
    folder, plan, receipt = export

    found = trained(
        "timm_train",
        folder,
        tmp_path,
        *("--data-dir", str(data), "--model", plan.model.name),
        *("--initial-checkpoint", str(folder / "reinit.safetensors"), "--num-classes", "8"),
    )

    assert_learned(found, receipt.after_sha256)


@pytest.mark.parametrize("export", [VISION], indirect=True)
def test_torchvisions_way_starts_from_the_plan(export: Any, data: Path, tmp_path: Path) -> None:
    folder, _, receipt = export

    found = trained("torchvision_train", folder, tmp_path, str(folder), str(data))

    assert_learned(found, receipt.after_sha256)
    assert found["frozen"] == ["conv1.weight"]
    assert found["groups"]["layer_1_decay"] == [
        pytest.approx(1e-4),
        1e-4,
        ["layer4.1.conv2.weight"],
    ]
    assert found["groups"]["layer_0_no_decay"][1] == 0.0


def test_a_lightning_callback_starts_from_the_plan_and_not_again_on_resuming(
    export: Any, data: Path, tmp_path: Path
) -> None:
    folder, _, receipt = export

    found = trained("lightning_train", folder, tmp_path, str(folder), str(data), str(tmp_path))

    assert_learned(found, receipt.after_sha256)
    assert found["resumed"] == found["end"]


def test_the_hf_trainer_starts_from_the_plan(export: Any, data: Path, tmp_path: Path) -> None:
    folder, _, receipt = export

    found = trained("hf_train", folder, tmp_path, str(folder), str(data), str(tmp_path))

    assert_learned(found, receipt.after_sha256)
    assert found["twice"] == [receipt.after_sha256] * 2


def test_the_folder_holds_what_a_trainer_needs(export: Any) -> None:
    folder, plan, receipt = export

    files = {path.name for path in folder.iterdir()}
    assert {"plan.json", "reinit.safetensors", "apply_plan.py", "USE.md"} <= files
    assert (folder / "plan.json").read_text(encoding="utf-8") == plan_json(plan)
    assert receipt.after_sha256 in (folder / "USE.md").read_text(encoding="utf-8")
    source = (folder / "apply_plan.py").read_text(encoding="utf-8")
    assert "import core" not in source
    assert "from core" not in source


@pytest.mark.parametrize("export", [EMBEDDED], indirect=True)
def test_groups_drive_timms_own_optimizers_and_schedulers(export: Any) -> None:
    folder, plan, _ = export
    spec = importlib.util.spec_from_file_location("exported", folder / "apply_plan.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = timm.create_model(plan.model.name, num_classes=8)
    script.apply_plan(torch.nn.DataParallel(model), folder)  # wrapped names are understood

    groups = script.parameter_groups(model, folder, lr=1e-3, weight_decay=0.05, style="timm")
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=1e-3)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10)
    scheduler.step(0)

    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {
        "layer_0_decay": pytest.approx(1e-3),
        "layer_0_no_decay": pytest.approx(1e-3),
        "layer_1_decay": pytest.approx(1e-4),
    }
    named = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert named == {name for name, each in model.named_parameters() if each.requires_grad}
    assert "conv_stem.weight" not in named
