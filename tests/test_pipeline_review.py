"""A plan looked at before training, checked afterwards, compared and put together."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.cli import main
from core.edit.apply import edited_state
from core.errors import LimberError, OptionError, PlanError
from core.files.companions import PLAN_KEY, arrays_of, plan_identity, plan_json
from core.files.plans import read_plan, write_plan
from core.load import (
    choose_items,
    decode_items,
    load_model,
    open_images,
    resolve_data,
    resolve_model,
    state_sha256,
)
from core.network.hooks import batch_statistics
from core.pipeline.applying import edited_model, edited_weights, plan_spec, reset_weights
from core.pipeline.batches import outline_model
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.previewing import preview_plan
from core.pipeline.verifying import changed_entries, verify_weights
from core.plan.algebra import compose_plans, diff_plans
from core.plan.making import check_plan, make_plan
from core.records import ReinitPlan

CLASSES = 8
LITE = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def whole() -> ReinitPlan:
    outline = outline_model(resolve_model(LITE), classes=CLASSES)
    return make_plan(outline, ["blocks.5.0.conv_pw"], name="whole")


@pytest.fixture(scope="module")
def weights() -> ReinitPlan:
    """Single weights, their masks in a companion."""
    spec = resolve_model(LITE)
    wish = Wish(name="weights", scheme="normal-small", layers=("blocks.3.0.conv_pw",))
    return plan_by_rule(spec, "weight-magnitude", {"percent": 25.0}, classes=CLASSES, wish=wish)


@pytest.fixture(scope="module")
def units() -> ReinitPlan:
    wish = Wish(name="units", units={"blocks.2.1.conv_pw": (3, 9)})
    return plan_by_rule(resolve_model(LITE), "by-hand", classes=CLASSES, wish=wish)


# Before training


def test_a_preview_says_what_plain_torch_says(whole: ReinitPlan) -> None:
    data = resolve_data("bloodmnist")

    found = preview_plan(whole, data, samples=24, batch_size=12, image_size=64)

    before = load_model(plan_spec(whole), classes=CLASSES).module
    after = edited_model(whole)[0].module
    card = load_model(plan_spec(whole), classes=CLASSES).card
    images = open_images(data)
    items = choose_items(images.splits["val"], 24, seed=0)
    own, other, labels = [], [], []
    for module in (before, after):
        batch_statistics(module)
    for start in (0, 12):
        pixels, these = decode_items(images, items[start : start + 12], card.preprocessing, size=64)
        mean, std = (
            torch.tensor(each).reshape(1, 3, 1, 1)
            for each in (card.preprocessing.mean, card.preprocessing.std)
        )
        inputs = (pixels.float() / 255 - mean) / std
        with torch.no_grad():
            own.append(before(inputs))
            other.append(after(inputs))
        labels.append(these)
    first, second, target = torch.cat(own), torch.cat(other), torch.cat(labels)
    kl = F.kl_div(second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="sum")
    assert found.output_kl == pytest.approx(float(kl) / 24, rel=1e-3)
    assert found.accuracy_before == int((first.argmax(1) == target).sum()) / 24
    assert found.accuracy_after == int((second.argmax(1) == target).sum()) / 24
    assert found.agreement == int((first.argmax(1) == second.argmax(1)).sum()) / 24
    assert found.loss_after == pytest.approx(float(F.cross_entropy(second, target)), rel=1e-4)
    assert found.samples == 24


def test_a_preview_measures_each_layers_change(whole: ReinitPlan, units: ReinitPlan) -> None:
    for plan in (whole, units):
        before = load_model(plan_spec(plan), classes=CLASSES).module.state_dict()
        after, _ = edited_weights(plan)

        found = preview_plan(plan)

        rows = {row.layer: row for row in found.layers}
        for target in plan.targets:
            moved = math.hypot(*(float((after[n] - before[n]).norm()) for n in target.parameters))
            norm = math.hypot(*(float(before[n].norm()) for n in target.parameters))
            assert rows[target.layer].relative_change == pytest.approx(moved / norm, rel=1e-4)
        assert found.output_kl is None
        assert all(row.relative_change == 0 for row in found.layers if not row.reset)


def test_a_preview_warns_of_an_edit_that_does_nothing() -> None:
    spec = resolve_model(LITE)
    wish = Wish(layers=("blocks.6.0.conv_pwl",))
    rule, options = "weight-magnitude", {"percent": 0.1}
    plan = plan_by_rule(spec, rule, options, classes=CLASSES, wish=wish)

    found = preview_plan(plan, resolve_data("bloodmnist"), samples=16, image_size=64)

    assert any("nearly a no-op" in warning for warning in found.warnings)


def test_a_preview_warns_of_an_edit_that_explodes() -> None:
    outline = outline_model(resolve_model("vit_small_patch14_dinov2"), classes=CLASSES)
    plan = make_plan(outline, ["blocks.3.mlp.fc1"], scheme="normal")

    found = preview_plan(plan, resolve_data("bloodmnist"), samples=8, image_size=70)

    assert any("blocks.3.mlp.fc1" in w and "explodes" in w for w in found.warnings)
    assert any("grows more than tenfold in norm" in warning for warning in found.warnings)


def test_the_untouched_head_is_the_one_that_answers() -> None:
    # The plan rewrites the head as well; what is compared is the body in front of the old head.
    spec = resolve_model(LITE)
    wish = Wish(scheme="normal", layers=("classifier",))
    rule, options = "weight-magnitude", {"percent": 50.0}
    plan = plan_by_rule(spec, rule, options, classes=CLASSES, wish=wish)

    found = preview_plan(plan, resolve_data("bloodmnist"), samples=8, image_size=64)

    assert found.output_kl == 0
    assert found.agreement == 1


def test_a_preview_on_other_classes_is_refused(whole: ReinitPlan) -> None:
    with pytest.raises(PlanError, match=r"made for 8 classes and Chest X-rays.*has 2"):
        preview_plan(whole, resolve_data("pneumonia"))
    with pytest.raises(OptionError, match="The number of samples is 0; give 1 to"):
        preview_plan(whole, resolve_data("bloodmnist"), samples=0)


# Afterwards


def test_weights_are_verified_to_the_bit(weights: ReinitPlan, tmp_path: Path) -> None:
    path = tmp_path / "reinit.safetensors"
    receipt = reset_weights(weights, path)
    state = load_file(path)

    assert verify_weights(weights, path).matches

    state["conv_stem.weight"].view(-1)[5] += 1e-6
    save_file(state, path)
    found = verify_weights(weights, path)
    assert not found.matches
    assert found.differing == {"conv_stem.weight": 1}
    assert found.expected_sha256 == receipt.after_sha256
    del state["conv_stem.weight"]
    state["more"] = torch.zeros(2)
    save_file(state, path)
    found = verify_weights(weights, path)
    assert (found.missing, found.unexpected) == (("conv_stem.weight",), ("more",))


def test_what_a_plan_changed_is_found_again(weights: ReinitPlan) -> None:
    before = load_model(plan_spec(weights), classes=CLASSES).module.state_dict()
    after, receipt = edited_weights(weights)

    found = changed_entries(before, after)

    assert {name: int(flags.sum()) for name, flags in found.items()} == {
        change.name: change.changed for change in receipt.changes if change.changed
    }
    assert receipt.parameters_touched == sum(change.selected for change in receipt.changes)


# Algebra


def test_two_plans_make_together_what_each_makes_alone(
    whole: ReinitPlan, weights: ReinitPlan
) -> None:
    both, reverse = compose_plans(whole, weights), compose_plans(weights, whole)

    made, (one, _), (two, _) = (
        edited_weights(both)[0],
        edited_weights(whole),
        edited_weights(weights),
    )
    assert edited_weights(reverse)[1].after_sha256 == edited_weights(both)[1].after_sha256
    touched = {name for target in whole.targets for name in (*target.parameters, *target.buffers)}
    for name, value in made.items():
        assert torch.equal(value, one[name] if name in touched else two[name])
    assert both.name == "whole + weights"


def test_plans_that_write_the_same_tensor_do_not_compose(weights: ReinitPlan) -> None:
    with pytest.raises(PlanError, match=r'Both plans write "blocks\.3\.0\.conv_pw\.weight"'):
        compose_plans(weights, weights)


def test_plans_for_other_networks_do_not_compose(whole: ReinitPlan) -> None:
    model = whole.model.model_copy(update={"classes": 3})

    with pytest.raises(PlanError, match="made for different networks or heads"):
        compose_plans(whole, whole.model_copy(update={"model": model}))


def test_a_difference_names_layer_key_and_both_sides(
    whole: ReinitPlan, weights: ReinitPlan
) -> None:
    assert diff_plans(whole, whole) == ()
    other = whole.model_copy(update={"freeze": ("bn1",), "name": "same weights"})
    rows = diff_plans(whole, other)
    assert [(row.name, row.first, row.second) for row in rows] == [("freeze", "", "bn1")]

    rows = diff_plans(whole, weights)

    said = {row.name: (row.first, row.second) for row in rows if row.what == "layer"}
    assert said["blocks.5.0.conv_pw"] == ("layer, architecture, seed 0", "")
    assert said["blocks.3.0.conv_pw"] == ("", "weight, normal-small, seed 0")


def test_other_masks_of_the_same_size_are_a_difference(weights: ReinitPlan) -> None:
    spec = resolve_model(LITE)
    wish = Wish(name="weights", scheme="normal-small", layers=("blocks.3.0.conv_pw",), seed=1)
    options = {"percent": 25.0}
    first = plan_by_rule(spec, "random", options, classes=CLASSES, wish=wish)
    second = plan_by_rule(spec, "random", options, classes=CLASSES, wish=wish)
    wish = Wish(name="weights", scheme="normal-small", layers=("blocks.3.0.conv_pw",), seed=2)
    third = plan_by_rule(spec, "random", options, classes=CLASSES, wish=wish)
    third = third.model_copy(update={"targets": first.targets}).with_companion(
        third.companion_bytes or b""
    )

    assert diff_plans(first, second) == ()
    assert [row.name for row in diff_plans(first, third)] == ["blocks.3.0.conv_pw.weight"]


# The companion


def test_plan_and_companion_name_each_other(weights: ReinitPlan, tmp_path: Path) -> None:
    written = write_plan(weights, tmp_path / "plan.json")

    assert written.companion is not None
    with (tmp_path / written.companion.file).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert header["__metadata__"] == {PLAN_KEY: plan_identity(written)}


def test_another_companion_is_refused(weights: ReinitPlan, tmp_path: Path) -> None:
    written = write_plan(weights, tmp_path / "plan.json")
    assert written.companion is not None
    path = tmp_path / written.companion.file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(PlanError, match="is not the companion that the plan names"):
        read_plan(tmp_path / "plan.json")

    path.unlink()
    with pytest.raises(PlanError, match=r'selection in "plan\.masks\.safetensors", which is not'):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="Put that file beside the plan"):
        edited_model(read_plan(plan_json(written)))


def test_a_plan_that_was_edited_by_hand_no_longer_fits_its_companion(
    weights: ReinitPlan, tmp_path: Path
) -> None:
    write_plan(weights, tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    edited = text.replace('"seed": 0', '"seed": 1')
    assert edited != text
    (tmp_path / "plan.json").write_text(edited, encoding="utf-8")

    with pytest.raises(PlanError, match="made for another plan, or the plan was changed by hand"):
        read_plan(tmp_path / "plan.json")


# Broken plans


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document."""
    found = [at] if at else []
    if isinstance(content, dict):
        for key, value in content.items():
            found += places(value, (*at, key))
    elif isinstance(content, list):
        for place, value in enumerate(content):
            found += places(value, (*at, place))
    return found


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-2, 99), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(["unit", "weight", "add", "zero", "fire", "dash", "..", "/etc/passwd"]),
)


@pytest.fixture(scope="module")
def documents(units: ReinitPlan, weights: ReinitPlan) -> list[tuple[ReinitPlan, str]]:
    return [(plan, plan_json(plan)) for plan in (units, weights)]


@functools.cache
def lite() -> torch.nn.Module:
    return load_model(resolve_model(LITE), classes=CLASSES).module


# Read, check and try to apply: what is refused must be refused in words, whichever step finds it.
# 2 x 5,000 documents; shrinking is left out, for the failing example is a small edit already.
@settings(
    max_examples=5_000,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
@pytest.mark.parametrize("which", [0, 1], ids=["units", "weights"])
@given(data=st.data())
def test_ten_thousand_broken_plans_are_refused_in_words(
    which: int, data: st.DataObject, documents: list[tuple[ReinitPlan, str]]
) -> None:
    plan, text = documents[which]
    outline = outline_model(plan_spec(plan), classes=CLASSES)
    module = lite()
    content = json.loads(text)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(content)))
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        how = data.draw(st.sampled_from(["replace", "delete", "add", "repeat"]))
        if how == "replace":
            owner[path[-1]] = data.draw(JUNK)
        elif how == "delete":
            del owner[path[-1]]
        elif how == "repeat" and isinstance(owner, list):
            owner.append(owner[path[-1]])
        elif isinstance(owner, dict):
            owner[data.draw(st.text(max_size=6))] = data.draw(JUNK)
        if not content:
            break

    # Anything but a LimberError is a traceback for the person, and fails here.
    with contextlib.suppress(LimberError):
        read = read_plan(json.dumps(content), companion=plan.companion_bytes)
        check_plan(read, outline)
        state = module.state_dict()
        before = state_sha256(state)
        edited_state(
            state,
            read,
            fresh=lambda seed: state,
            parameters=frozenset(dict(module.named_parameters())),
            sha256=lambda each: "",
            plan_text="",
        )
        assert state_sha256(state) == before


def test_a_few_of_them_through_the_command_line_write_nothing(
    documents: list[tuple[ReinitPlan, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, text = documents[1]
    broken = [
        text.replace('"count": ', '"count": 1'),
        text.replace('"axis": null', '"axis": 9'),
        text.replace('"write": "scheme"', '"write": "add"', 1),
        text.replace('"mask": "blocks', '"mask": "clocks', 1),
        text.replace("normal-small", "fire"),
        text.replace("plan.masks.safetensors", "../plan.masks.safetensors"),
        text[: len(text) // 2],
        "[" * 5000,
    ]
    write_plan(plan, tmp_path / "plan.json")
    companion = {path.name for path in tmp_path.iterdir()}

    for number, each in enumerate(broken):
        assert each != text
        (tmp_path / "plan.json").write_text(each, encoding="utf-8")
        out = str(tmp_path / "out.safetensors")

        assert main(["apply", str(tmp_path / "plan.json"), "--out", out]) == 2

        said = capsys.readouterr()
        assert said.err.startswith("limber: "), number
        assert said.err.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == companion


def test_entries_beyond_the_tensor_are_refused_by_name(units: ReinitPlan) -> None:
    content = json.loads(plan_json(units))
    entries = content["targets"][0]["entries"][0]
    entries["indices"] = [0, 99_999]
    entries["count"] = 2

    with pytest.raises(PlanError, match=f'"{entries["tensor"]}" do not fit that tensor'):
        edited_model(read_plan(json.dumps(content)))


def test_masks_are_read_from_the_companion_alone(weights: ReinitPlan) -> None:
    arrays = arrays_of(weights)

    assert {key.rpartition(":")[2] for key in arrays} <= {"scheme", "zero"}
    assert all(array.dtype.name == "uint8" for array in arrays.values())
