"""The commands about plans, as a person types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from core.files.plans import read_plan
from core.pipeline.planning.control import random_control

LITE = ("--model", "tf_efficientnet_lite0", "--classes", "8")
TINY = ("--model", "timm:test_resnet", "--weights", "none", "--classes", "8")
QUICK = ("--samples", "16", "--image-size", "64", "--batch-size", "8")

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("last-blocks", ("--blocks", "2")),
        ("weight-magnitude", ("--percent", "5", "--keep-head")),
        ("swr", ("--utility", "magnitude", "--threshold", "0.2")),
        ("random", ("--percent", "3")),
    ],
)
def test_a_rule_that_needs_no_images_makes_a_plan(
    rule: str, more: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"

    code, said, _ = run("plan", *TINY, "--rule", rule, *more, "--out", out)

    assert code == 0
    assert "layers" in said
    assert json.loads(out.read_text(encoding="utf-8"))["rule"]["name"] == rule


def test_from_a_diagnosis_to_an_export_and_back(run: Run, tmp_path: Path) -> None:
    diagnosis, plan = tmp_path / "diagnosis.json", tmp_path / "redo.json"
    weights, folder = tmp_path / "mine.safetensors", tmp_path / "export"
    data = ("--data", "bloodmnist")
    model = ("--model", "tf_efficientnet_lite0")

    assert run("measure", *model, *data, *QUICK, "--out", diagnosis)[0] == 0
    code, said, _ = run(
        *("plan", "--diagnosis", diagnosis, "--rule", "redo", "--threshold", "0.1"),
        *("--freeze", "conv_stem", "--lr-factor", "blocks.0*=0.5", "--out", plan),
    )
    assert code == 0
    assert " units in " in said
    assert "Left out conv_stem: frozen, or at a learning rate of 0." in said
    content = json.loads(plan.read_text(encoding="utf-8"))
    assert content["freeze"] == ["conv_stem"]
    assert {row["factor"] for row in content["learning_rates"]} == {0.5}
    assert content["evidence"]["diagnosis_sha256"]

    code, said, _ = run("preview", plan, *data, "--samples", "16", "--image-size", "64", "--json")
    assert code == 0
    assert json.loads(said)["output_kl"] > 0

    assert run("apply", plan, "--out", weights)[0] == 0
    code, said, _ = run("verify", plan, weights)
    assert (code, said) == (0, "296 tensors, every bit as the plan makes them.\n")
    code, said, _ = run("verify", plan, weights, "--json")
    assert json.loads(said)["matches"] is True

    nothing = tmp_path / "nothing.json"
    run(
        # A layer without -0, which adding 0 would turn into 0.
        *("plan", *LITE, "--layers", "blocks.2.0.bn1", "--scheme", "shrink-perturb", "--set"),
        *("shrink=1", "--set", "perturb=0", "--out", nothing),
    )
    run("apply", nothing, "--out", tmp_path / "before.safetensors")
    changes = run("diff", tmp_path / "before.safetensors", weights, "--json")[1]
    entries = json.loads(run("apply", plan, "--out", weights, "--json")[1])["changes"]
    assert {row["name"]: row["changed"] for row in json.loads(changes)} == {
        each["name"]: each["changed"] for each in entries if each["changed"]
    }
    same = run("diff", weights, weights)[1]
    assert same == "Every tensor is the same, bit for bit.\n"

    assert run("export", plan, "--out", folder)[0] == 0
    assert (folder / "reinit.safetensors").read_bytes() == weights.read_bytes()

    control = tmp_path / "control.json"
    assert run("plan", "--rule", "random", "--like", plan, "--out", control)[0] == 0
    code, said, _ = run("diff", plan, control)
    assert code == 0
    assert "units" in said
    assert run("diff", plan, plan)[1] == "The plans reset, freeze and train the same.\n"
    code, _, wrong = run("verify", control, weights)
    assert code == 2
    assert "is not what the plan makes" in wrong

    code, said, _ = run(
        *("finetune", *model, *data, "--plan", plan, "--random-control", "--steps", "2"),
        *("--batch-size", "8", "--seeds", "0", "--image-size", "64", "--train-images", "16"),
        *("--val-images", "16", "--out", tmp_path / "run"),
    )
    assert code == 0
    kept = tmp_path / "run" / "plans"
    assert {path.name for path in kept.iterdir()} >= {"plan.json", "random control.json"}
    assert run("apply", kept / "plan.json", "--out", tmp_path / "again.safetensors")[0] == 0
    assert (tmp_path / "again.safetensors").read_bytes() != b""


def test_dash_and_its_control_carry_their_own_factors(run: Run, tmp_path: Path) -> None:
    tiny = TINY[:4]
    plan, folder = tmp_path / "dash.json", tmp_path / "run"
    data = ("--data", "bloodmnist")

    code, said, _ = run(
        *("plan", *tiny, *data, *QUICK, "--layers", "layer2.0.conv1", "--layers", "bn1"),
        *("--scheme", "dash", "--out", plan),
    )
    assert code == 0
    assert "linear layers and convolutions larger than 1x1; left out: bn1." in said

    code, _, wrong = run(
        *("finetune", *tiny, *data, "--plan", plan, "--random-control", "--steps", "2"),
        *("--batch-size", "8", "--seeds", "0", "--image-size", "64", "--train-images", "16"),
        *("--val-images", "16", "--out", folder),
    )
    assert (code, wrong) == (0, "")
    kept = {path.name for path in (folder / "plans").iterdir()}
    assert {"random control.json", "random control.masks.safetensors"} <= kept


def test_two_plans_are_composed_with_their_companions(run: Run, tmp_path: Path) -> None:
    one, two, both = (tmp_path / f"{name}.json" for name in ("one", "two", "both"))
    rule = ("--rule", "weight-magnitude", "--percent", "20")
    run("plan", *LITE, *rule, "--layers", "blocks.5.0.conv_pw", "--out", one)
    run("plan", *LITE, *rule, "--layers", "blocks.4.0.conv_pw", "--out", two)

    code, said, _ = run("compose", one, two, "--out", both)

    assert code == 0
    assert said.startswith("2 layers -> ")
    assert (tmp_path / "both.masks.safetensors").is_file()
    assert run("apply", both, "--out", tmp_path / "both.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "nosuch"), 'There is no rule "nosuch". Known: by-hand, last-blocks'),
        (("--rule", "redo"), 'The rule "redo" looks at a diagnosis. Give --data or --diagnosis.'),
        (("--rule", "cbp"), 'The rule "cbp" looks at images. Give --data or --diagnosis.'),
        (
            ("--rule", "last-blocks", "--percent", "3"),
            'takes no "percent". It takes "blocks". Leave --percent out.',
        ),
        (("--rule", "last-blocks", "--blocks", "99"), "blocks, not 99. Give 1 to"),
        (("--rule", "weight-magnitude", "--percent", "0"), "nothing to reset: 0 % of any tensor"),
        (
            ("--rule", "weight-magnitude", "--percent", "-1"),
            "from 0 to 100; it is -1.0. Give another --percent.",
        ),
        (("--rule", "weight-magnitude", "--percent", "nan"), "a number from 0 to 100; it is nan."),
        (("--rule", "random", "--scheme", "fire"), '"fire" is for whole layers'),
        (("--rule", "swr", "--utility", "magnitude", "--percent", "1", "--threshold", "1"), "both"),
        (("--units", "conv1.0"), "is not LAYER=NUMBER,NUMBER"),
        (("--units", "nosuch=1"), 'has no layer "nosuch"'),
        (("--units", "layer1.0.conv1=9999"), "units 0 to"),
        (("--units", "fc=1"), "its units are the network's outputs"),
        (("--layers", "fc"), "Only the head"),
        (("--layers", "conv1.0", "--lr-factor", "conv1.0=-1"), "give 0 to 1,000,000"),
        (("--layers", "conv1.0", "--lr-factor", "conv1.0"), "is not GLOB=NUMBER"),
        (("--layers", "conv1.0", "--scheme", "dash"), "looks at images"),
        (("--rule", "random", "--samples", "0"), "The number of samples is 0; give 1 to"),
        (("--rule", "random", "--batch-size", "0"), "The batch size is 0; give 1 to"),
        (("--layers", "conv1.0", "--like", "x.json"), "--like only goes with the rule random"),
        ((), "--layers (or --units, or a --rule)"),
        (("--rule", "random", "--name", ""), "--name has 0 letters; give 1 to 200"),
        (("--rule", "random", "--name", "n" * 201), "--name has 201 letters"),
        (("--rule", "random", "--layers", "*" * 1100), "has 1100 letters; give at most 1,024"),
        (("--rule", "weight-magnitude", "--layers", "fc", "--keep-head"), "it is new already"),
        (("--rule", "last-blocks", "--layers", "conv1.0"), "named is in the last 1 blocks"),
        (
            ("--rule", "swr", "--utility", "magnitude", "--threshold", "-1"),
            "must be 0 or more, because",
        ),
        (("--layers", "conv1.0", "--scheme", "fire", "--set", "steps=2.5"), "a whole number"),
        (("--layers", "conv1.0", "--scheme", "fire", "--set", "scale=0.5"), "a whole number"),
        (("--layers", "conv1.0", "--scheme", "bias-mean"), "writes only biases"),
    ],
)
def test_bad_plans_are_refused_in_one_line(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    code, said, wrong = run("plan", *TINY, *arguments, "--out", tmp_path / "plan.json")

    assert (code, said) == (2, "")
    assert message in wrong
    assert wrong.startswith("limber: ")
    assert wrong.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("preview", "nosuch.json"),
        ("verify", "nosuch.json", "nosuch.safetensors"),
        ("diff", "nosuch.json", "nosuch.json"),
        ("compose", "nosuch.json", "nosuch.json", "--out", "both.json"),
        ("export", "nosuch.json", "--out", "folder"),
    ],
)
def test_a_plan_that_is_not_there_is_said_so(
    arguments: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    code, _, wrong = run(*arguments)

    assert code == 2
    assert 'plan "nosuch.json" cannot be read' in wrong
    assert list(tmp_path.iterdir()) == []


def test_nothing_a_plan_needs_is_written_over(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", *TINY, "--rule", "random", "--percent", "30", "--out", plan)
    companion = tmp_path / "plan.masks.safetensors"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    for command in (
        ("apply", plan, "--out", companion),
        ("apply", plan, "--out", plan),
        ("preview", plan, "--out", companion),
        ("plan", "--rule", "random", "--like", plan, "--out", plan),
        ("plan", "--rule", "random", "--like", plan, "--out", companion),
        ("compose", plan, plan, "--out", plan),
    ):
        code, _, wrong = run(*command)
        assert code == 2
        assert "would overwrite" in wrong

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_is_never_written_over(run: Run, tmp_path: Path) -> None:
    start, plan = tmp_path / "start.safetensors", tmp_path / "plan.json"
    run("plan", *TINY[:4], "--layers", "conv1.0", "--seed", "1", "--out", plan)
    run("apply", plan, "--out", start)
    before = start.read_bytes()
    own = ("--model", "timm:test_resnet", "--checkpoint", start)

    assert run("plan", *own, "--layers", "conv1.0", "--out", start)[0] == 2
    assert run("plan", *own, "--layers", "conv1.0", "--out", plan)[0] == 0
    code, _, wrong = run("apply", plan, "--out", start)

    assert code == 2
    assert "would overwrite" in wrong
    assert start.read_bytes() == before


def test_the_sign_of_a_zero_is_a_difference(run: Run, tmp_path: Path) -> None:
    plan, weights = tmp_path / "plan.json", tmp_path / "mine.safetensors"
    run("plan", *TINY, "--layers", "conv1.0", "--scheme", "zero", "--out", plan)
    run("apply", plan, "--out", weights)
    state = load_file(weights)
    state["conv1.0.weight"].view(-1)[0] = -0.0
    save_file(state, weights)

    code, _, wrong = run("verify", plan, weights)

    assert code == 2
    assert '1 differ, first "conv1.0.weight"' in wrong


def test_the_random_control_trains_at_the_plans_rates(run: Run, tmp_path: Path) -> None:
    plan, control = tmp_path / "plan.json", tmp_path / "control.json"
    more = ("--lr-factor", "layer2*=0.5", "--freeze", "conv1.0")
    for rule in (("--layers", "layer4.0.conv1"), ("--rule", "weight-magnitude")):
        run("plan", *TINY, *rule, *more, "--out", plan)

        twin = random_control(read_plan(plan), seed=0)
        run("plan", "--rule", "random", "--like", plan, "--out", control)

        assert twin.learning_rates == read_plan(plan).learning_rates
        assert twin.freeze == ("conv1.0",)


# The random control of another plan


def test_the_control_of_a_composed_plan_keeps_what_each_part_writes(
    run: Run, tmp_path: Path
) -> None:
    one, two, three, both, all_three, control = (
        tmp_path / f"{name}.json" for name in ("one", "two", "three", "both", "all", "control")
    )
    zero = ("--scheme", "zero", "--seed", "3")
    drawn = ("--rule", "weight-magnitude", "--scheme", "normal-tenth", "--seed", "4")
    run("plan", *TINY, "--layers", "layer1.0.conv1", *zero, "--out", one)
    run("plan", *TINY, *drawn, "--layers", "layer2.0.conv1", "--out", two)
    run("plan", *TINY, "--units", "layer3.0.conv1=1,2", "--seed", "5", "--out", three)
    assert run("compose", one, two, "--out", both)[0] == 0
    assert run("compose", both, three, "--out", all_three)[0] == 0

    assert run("plan", "--rule", "random", "--like", all_three, "--out", control)[0] == 0

    plan, twin = read_plan(all_three), read_plan(control)
    for granularity in ("layer", "weight", "unit"):
        ways = [
            {(t.scheme.name, t.seed) for t in each.targets if t.granularity == granularity}
            for each in (plan, twin)
        ]
        assert ways[0] == ways[1] != set()
    assert "layer1.0.conv1" not in {t.layer for t in twin.targets if t.granularity == "layer"}
    weights = [t for t in twin.targets if t.granularity == "weight"]
    own = [t for t in plan.targets if t.granularity == "weight"]
    assert [(t.layer, t.entries[0].count) for t in weights] == [
        (t.layer, t.entries[0].count) for t in own
    ]
    assert run("apply", control, "--out", tmp_path / "control.safetensors")[0] == 0


def test_a_control_that_is_no_match_in_size_says_so(run: Run, tmp_path: Path) -> None:
    plan, control, folder = (tmp_path / name for name in ("plan.json", "control.json", "run"))
    data = ("--data", "bloodmnist")
    run("plan", *TINY, "--rule", "last-blocks", "--blocks", "4", "--out", plan)

    said = run("plan", "--rule", "random", "--like", plan, "--out", control)[1]

    sizes = {name: read_plan(path).targets for name, path in (("own", plan), ("twin", control))}
    assert len(sizes["own"]) > len(sizes["twin"])
    note = read_plan(control).evidence.note
    assert note.startswith("Random control: ")
    assert " % of the parameters against the plan's " in note
    assert note in said
    code, said, _ = run(
        *("finetune", *TINY[:4], *data, "--plan", plan, "--random-control", "--steps", "2"),
        *("--batch-size", "8", "--seeds", "0", "--image-size", "64", "--train-images", "16"),
        *("--val-images", "16", "--out", folder),
    )
    assert code == 0
    assert '"random control" resets ' in said
    assert "their sizes may explain a difference" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("--percent", "5"),
        ("--scheme", "zero"),
        ("--set", "shrink=1"),
        ("--layers", "conv1.0"),
        ("--freeze", "conv1.0"),
        ("--lr-factor", "conv1.0=2"),
        ("--keep-head",),
        ("--classes", "9"),
        ("--diagnosis", "d.json"),
    ],
)
def test_what_the_matched_plan_decides_cannot_be_given(
    arguments: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    run("plan", *TINY, "--rule", "random", "--percent", "1", "--keep-head", "--out", plan)

    code, _, wrong = run(
        "plan", "--rule", "random", "--like", plan, *arguments, "--out", tmp_path / "c.json"
    )

    assert code == 2
    assert f"{arguments[0]} does not go with --like" in wrong


def test_a_plan_is_matched_on_its_own_network_alone(run: Run, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "control.json"
    run("plan", *TINY, "--layers", "layer1.0.conv1", "--out", plan)
    like = ("plan", "--rule", "random", "--like", plan, "--out", out)

    assert run(*like, "--model", "timm:test_resnet", "--weights", "none")[0] == 0
    assert "--model says timm:test_vit" in run(*like, "--model", "timm:test_vit")[2]
    assert run(*like, "--seed", "9", "--name", "other")[0] == 0
    assert read_plan(out).name == "other"


def test_the_control_of_dash_draws_what_dash_can_take(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "dash.json"
    model = ("--model", "timm:test_efficientnet", "--weights", "none", "--data", "bloodmnist")
    code, _, wrong = run(
        *("plan", *model, *QUICK, "--layers", "conv_stem", "--scheme", "dash", "--out", plan)
    )
    assert (code, wrong) == (0, "")

    for seed in range(8):
        twin = tmp_path / f"{seed}.json"
        code, _, wrong = run(
            *("plan", "--rule", "random", "--like", plan, "--data", "bloodmnist", *QUICK),
            *("--seed", seed, "--out", twin),
        )
        assert (code, wrong) == (0, "")
        assert {each.write for t in read_plan(twin).targets for each in t.entries} == {"scale"}
