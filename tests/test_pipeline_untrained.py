"""A layer that is reset and never trains: refused in the making, said in whatever reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import PlanError
from core.files.plans import read_plan
from core.load import resolve_data, resolve_model
from core.pipeline.applying import edited_model
from core.pipeline.planning.control import random_control
from core.pipeline.planning.rules import Wish, plan_by_rule
from core.pipeline.planning.subject import Sight
from core.plan.algebra import compose_plans
from core.plan.layers import random_layers
from core.plan.making import make_plan
from core.records import ModelOutline, ReinitPlan
from dashboard import words
from dashboard.store import workspace as workspace_room
from tests.zoo import ZOO

Run = Callable[..., tuple[int, str, str]]
TINY = ("--model", "timm:test_resnet", "--weights", "none", "--classes", "8")
# What a person may say to keep a layer from training.
WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "frozen": lambda layer: {"freeze": (layer,)},
    "at a rate of 0": lambda layer: {"learning_rates": {layer: 0.0}},
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def cnn() -> ModelOutline:
    return ZOO["residual_cnn"].outline()


@pytest.fixture(scope="module")
def vit() -> ModelOutline:
    return ZOO["vit"].outline()


# By hand


@ways
def test_a_layer_cannot_be_reset_by_hand_and_kept_from_training(
    cnn: ModelOutline, way: str
) -> None:
    with pytest.raises(PlanError) as refused:
        make_plan(cnn, ["stem", "block.conv1"], **WAYS[way]("stem"))

    assert str(refused.value) == (
        'The plan writes into "stem" and keeps the same from training (frozen, or a learning rate '
        "of 0): it keeps what the reset leaves, random or 0, however long you train. Unfreeze "
        "them, or leave them out of what is reset."
    )
    assert make_plan(cnn, ["block.conv1"], **WAYS[way]("stem")).untrained == ()
    # A little is not nothing.
    assert make_plan(cnn, ["stem"], learning_rates={"stem": 1e-9}).untrained == ()


@ways
def test_neither_a_parameter_of_the_root_nor_a_shared_one_slips_through(
    vit: ModelOutline, way: str
) -> None:
    with pytest.raises(PlanError, match='writes into "cls_token" and'):
        make_plan(vit, ["cls_token"], **WAYS[way]("cls_token"))
    with pytest.raises(PlanError, match='writes into "right" and'):
        make_plan(ZOO["tied"].outline(), ["left", "right"], **WAYS[way]("right"))


def test_a_scheme_that_writes_nothing_into_the_layer_does_not_matter(vit: ModelOutline) -> None:
    plan = make_plan(vit, ["cls_token", "patch"], scheme="bias-mean", freeze=["cls_token"])

    assert [target.layer for target in plan.targets] == ["patch"]


def test_many_layers_are_named_shortly(vit: ModelOutline) -> None:
    names = [layer.name for layer in vit.layers if layer.kind == "linear" and not layer.head]

    with pytest.raises(PlanError, match=rf'"{names[2]}" and {len(names) - 3} more and keeps'):
        make_plan(vit, names, freeze=names)


# By rule


@pytest.fixture(scope="module")
def by_rule() -> Callable[..., ReinitPlan]:
    spec, data = resolve_model("timm:test_resnet", weights="none"), resolve_data("bloodmnist")
    sight = Sight(data=data, samples=8, batch_size=8, image_size=32)

    def made(rule: str, options: dict[str, Any], **wish: Any) -> ReinitPlan:
        return plan_by_rule(spec, rule, options, sight=sight, wish=Wish(**wish))

    return made


def touched(plan: ReinitPlan) -> set[str]:
    return {name.rpartition(".")[0] for target in plan.targets for name in target.parameters}


@ways
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("weight-magnitude", {"percent": 5.0}),
        ("swr", {"utility": "magnitude"}),
        ("random", {"percent": 5.0}),
        ("last-blocks", {"blocks": 1.0}),
        ("threshold", {"metric": "weight_l2", "threshold": 0.0}),
        ("threshold", {"metric": "unit_weight_l2", "threshold": 0.0}),
        ("cbp", {"percent": 25.0}),
    ],
    ids=["weights", "swr", "random", "blocks", "layers", "units", "cbp"],
)
def test_a_rule_chooses_nothing_that_does_not_train(
    by_rule: Callable[..., ReinitPlan], rule: str, options: dict[str, Any], way: str
) -> None:
    free = by_rule(rule, options)
    # In the middle of units, so that it makes some and reads others.
    layer = "layer4.0.conv2"
    assert layer in touched(free)

    plan = by_rule(rule, options, **WAYS[way](layer))

    assert touched(plan)
    assert layer not in touched(plan)
    assert plan.untrained == ()
    assert "Left out layer4.0.conv2: frozen, or at a learning rate of 0." in plan.evidence.note


def test_units_by_hand_are_refused_where_a_frozen_layer_reads_them(
    by_rule: Callable[..., ReinitPlan],
) -> None:
    free = by_rule("by-hand", {}, units={"layer4.0.conv1": (1,)})
    assert {"layer4.0.conv1", "layer4.0.conv2"} <= touched(free)

    for layer in ("layer4.0.conv1", "layer4.0.conv2"):
        with pytest.raises(PlanError, match=rf'writes into "{layer}" and keeps'):
            by_rule("by-hand", {}, units={"layer4.0.conv1": (1,)}, freeze=(layer,))


def test_a_rule_told_to_choose_from_a_frozen_layer_alone_says_so(
    by_rule: Callable[..., ReinitPlan],
) -> None:
    with pytest.raises(PlanError, match=r'"conv1\.0" was named, and it does not train'):
        by_rule("random", {"percent": 5.0}, layers=("conv1.0",), freeze=("conv1.0",))


# Composed, and drawn at random


@ways
def test_two_plans_do_not_compose_where_one_freezes_what_the_other_resets(
    cnn: ModelOutline, way: str
) -> None:
    one = make_plan(cnn, ["stem"])
    other = make_plan(cnn, ["block.conv1"], **WAYS[way]("stem"))

    for first, second in ((one, other), (other, one)):
        with pytest.raises(PlanError, match='writes into "stem" and'):
            compose_plans(first, second)


@ways
def test_a_random_control_trains_all_that_it_resets(vit: ModelOutline, way: str) -> None:
    still = [layer.name for layer in vit.layers if layer.name.startswith("blocks.0.")]
    more: dict[str, Any] = {
        "frozen": {"freeze": still},
        "at a rate of 0": {"learning_rates": dict.fromkeys(still, 0.0)},
    }[way]
    plan = make_plan(vit, ["blocks.1.mlp.fc1"], **more)

    for seed in range(8):
        control = random_layers(vit, plan, seed=seed)
        assert control.untrained == ()
        assert {target.layer for target in control.targets}.isdisjoint(still)


# Read from a file


@pytest.fixture
def odd(run: Run, tmp_path: Path) -> Path:
    """A plan of an older version, or of somebody who wants random features."""
    path = tmp_path / "odd.json"
    assert run("plan", *TINY, "--layers", "layer4.0.conv1", "--out", path)[0] == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    content["freeze"] = ["layer4.0.conv1"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_command_line_refuses_to_make_such_a_plan(run: Run, tmp_path: Path) -> None:
    for more in (("--freeze", "layer4*"), ("--lr-factor", "layer4*=0")):
        code, _, wrong = run(
            *("plan", *TINY, "--layers", "layer4.0.conv1", *more, "--out", tmp_path / "p.json")
        )

        assert code == 2
        assert wrong.count("\n") == 1
        assert 'The plan writes into "layer4.0.conv1" and keeps the same from training' in wrong
        assert not (tmp_path / "p.json").exists()


def test_a_plan_that_is_read_works_and_every_command_says_what_becomes_of_it(
    run: Run, odd: Path, tmp_path: Path
) -> None:
    says = 'The plan writes into "layer4.0.conv1" and keeps the same from training'
    quick = ("--steps", 1, "--batch-size", 4, "--seeds", 0, "--image-size", 32)
    few = ("--train-images", 8, "--val-images", 8)

    shown = {
        "preview": run("preview", odd),
        "apply": run("apply", odd, "--out", tmp_path / "w.safetensors"),
        "export": run("export", odd, "--out", tmp_path / "export"),
        "finetune": run(
            *("finetune", *TINY[:4], "--data", "bloodmnist", "--plan", odd, *quick, *few),
            *("--out", tmp_path / "run"),
        ),
    }

    told = {name: (code, says in said) for name, (code, said, _) in shown.items()}
    assert told == dict.fromkeys(shown, (0, True))
    assert says in edited_model(read_plan(odd))[1].warnings[-1]
    # A control of it keeps what was wished for.
    assert random_control(read_plan(odd), seed=0).freeze == ("layer4.0.conv1",)


# On the pages

NAMES = ("a", "b", "c", "d")
SETS = st.sets(st.sampled_from(NAMES)).map(lambda names: tuple(sorted(names)))
ACTIONS = st.lists(
    st.one_of(st.tuples(st.sampled_from(("layers", "freeze")), SETS), st.just(("undo", ()))),
    max_size=8,
)


@given(actions=ACTIONS)
def test_whatever_is_clicked_no_layer_is_both_picked_and_frozen(
    actions: list[tuple[str, tuple[str, ...]]],
) -> None:
    with TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBER_HOME", home)
        space = workspace_room.Workspace("0" * 16)
        for what, names in actions:
            before = space.picks
            if what == "undo":
                space.undo()
            else:
                gave_way = space.change_picks(**{what: names})
                other = "freeze" if what == "layers" else "layers"
                assert getattr(space.picks, what) == names
                assert set(gave_way) == set(getattr(before, other)) & set(names)
            assert set(space.picks.layers).isdisjoint(space.picks.freeze)


def test_a_plan_of_parts_keeps_its_layers_and_they_stay_unfrozen(limber_home: Path) -> None:
    space = workspace_room.Workspace("0" * 16)
    space.change_picks(layers=("a", "b"), freeze=(), plan_file="plans/x/plan.json")

    gave_way = space.change_picks(freeze=("b", "c"))

    assert gave_way == ("b",)
    assert (space.picks.layers, space.picks.freeze) == (("a", "b"), ("c",))
    assert space.picks.plan_file is not None


def test_what_is_loaded_as_both_stays_both_until_one_is_chosen(limber_home: Path) -> None:
    space = workspace_room.Workspace("0" * 16)

    assert space.change_picks(layers=("a", "b"), freeze=("a",)) == ()
    assert space.change_picks(freeze=("a", "c")) == ()
    assert set(space.picks.layers) & set(space.picks.freeze) == {"a"}
    assert space.change_picks(layers=("a", "b", "d")) == ("a",)
    assert space.picks.freeze == ("c",)


@pytest.mark.parametrize(
    ("layers", "way", "says"),
    [
        (("a",), "picked", "a is reset now and no longer frozen: "),
        (("a", "b"), "frozen", "a, b are frozen now and no longer reset: "),
        (NAMES, "kept", "a, b, c and 1 more stay unfrozen, because the plan writes into them: "),
    ],
)
def test_the_sentence_says_which_layers_gave_way(
    layers: tuple[str, ...], way: Any, says: str
) -> None:
    assert words.gave_way(layers, way) == (
        f"{says}a layer that is reset and never trains would stay random."
    )
