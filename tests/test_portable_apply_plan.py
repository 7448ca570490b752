"""The script that goes with an export, by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from core.load import build_module, resolve_model
from core.pipeline.exporting import export_plan
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.portable.apply_plan import apply_plan, bare_name, read_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of one layer of an untrained network."""
    spec = resolve_model("timm:test_resnet", weights="none")
    plan = plan_by_rule(spec, "by-hand", classes=3, wish=Wish(layers=("layer2.0.conv1",), seed=4))
    made = tmp_path_factory.mktemp("export")
    export_plan(plan, made)
    return made


def test_the_script_verifies_weights_by_itself(folder: Path, tmp_path: Path) -> None:
    damaged = bytearray((folder / "reinit.safetensors").read_bytes())
    damaged[-5] ^= 1
    other = tmp_path / "other.safetensors"
    other.write_bytes(bytes(damaged))

    def verdict(path: Path) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(folder / "apply_plan.py"), str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    code, words = verdict(folder / "reinit.safetensors")
    assert (code, words) == (0, "These are the weights that the plan makes.\n")
    code, words = verdict(other)
    assert code == 1
    assert words.startswith("1 tensors differ from what the plan makes")


def built() -> nn.Module:
    return build_module(resolve_model("timm:test_resnet", weights="none"), classes=3, seed=9)


def test_a_wrapped_model_gets_the_weights_of_the_plan(folder: Path) -> None:
    state, digest = read_weights(folder)
    bare, wrapped = built(), nn.DataParallel(built())

    digests = [apply_plan(model, folder) for model in (bare, wrapped)]

    assert digests == [digest, digest]
    for name, value in state.items():
        assert torch.equal(bare.state_dict()[name], value)
        assert torch.equal(wrapped.state_dict()[f"module.{name}"], value)


def test_another_network_is_refused_and_left_as_it_was(folder: Path) -> None:
    larger = build_module(resolve_model("timm:test_resnet", weights="none"), classes=4, seed=9)
    before = {name: value.clone() for name, value in larger.state_dict().items()}

    with pytest.raises(ValueError, match="Build the model with"):
        apply_plan(larger, folder)

    after = larger.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weights_of_another_plan_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("plan.json", "reinit.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    plan = (tmp_path / "plan.json").read_text(encoding="utf-8")
    (tmp_path / "plan.json").write_text(plan.replace('"seed": 4', '"seed": 5'), encoding="utf-8")

    with pytest.raises(ValueError, match=r"made by another plan than plan\.json"):
        read_weights(tmp_path)


def test_weights_that_were_changed_since_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    content = (folder / "reinit.safetensors").read_bytes()
    (tmp_path / "reinit.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert safetensors.torch.load_file(tmp_path / "reinit.safetensors")

    with pytest.raises(ValueError, match="not as it was written"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("module._orig_mod.fc.weight", "fc.weight"),
        ("encoder.fc.weight", "encoder.fc.weight"),
    ],
)
def test_what_wrappers_put_before_a_name_is_taken_off(name: str, bare: str) -> None:
    assert bare_name(name, {"fc.weight": 0}) == bare
