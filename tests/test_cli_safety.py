"""What commands must not do: overwrite, lose, agree to what is not so, fail with a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.files.plans import read_plan
from core.plan.algebra import diff_plans

TINY = ("--model", "timm:test_resnet", "--weights", "none", "--classes", "8")
QUICK = ("--samples", "16", "--image-size", "64", "--batch-size", "8")
SHORT = (
    *("--steps", "2", "--batch-size", "8", "--seeds", "0", "--image-size", "64"),
    *("--train-images", "16", "--val-images", "16"),
)
ROOT = Path(__file__).parents[1]

Run = Callable[..., tuple[int, str, str]]


# What would be lost, or mean nothing


def test_an_export_never_writes_over_another_plan(run: Run, tmp_path: Path) -> None:
    plan, folder = tmp_path / "mine.json", tmp_path / "there"
    other = folder / "plan.json"
    run("plan", *TINY, "--rule", "random", "--percent", "40", "--out", plan)
    run("plan", *TINY, "--rule", "random", "--percent", "41", "--out", other)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    code, _, wrong = run("export", plan, "--out", folder)

    assert code == 2
    assert "is no export's, and this one would overwrite it" in wrong
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run("export", plan, "--out", tmp_path / "export")[0] == 0
    assert run("export", other, "--out", tmp_path / "export")[0] == 0
    assert run("export", other, "--out", folder)[0] == 0


def test_an_export_never_writes_over_its_checkpoint(run: Run, tmp_path: Path) -> None:
    start = tmp_path / "folder" / "reinit.safetensors"
    plan, own = tmp_path / "plan.json", tmp_path / "own.json"
    run("plan", *TINY[:4], "--layers", "conv1.0", "--seed", "1", "--out", plan)
    run("apply", plan, "--out", start)
    checkpoint = ("--model", "timm:test_resnet", "--checkpoint", start)
    assert run("plan", *checkpoint, "--layers", "conv1.0", "--out", own)[0] == 0

    code, _, wrong = run("export", own, "--out", tmp_path / "folder")

    assert code == 2
    assert "would overwrite" in wrong


def test_plans_whose_names_differ_in_their_ending_have_companions_of_their_own(
    run: Run, tmp_path: Path
) -> None:
    one, two = tmp_path / "a.json", tmp_path / "a.txt"
    for percent, path in (("30", one), ("31", two)):
        run("plan", *TINY, "--rule", "random", "--percent", percent, "--out", path)

    assert read_plan(one).companion != read_plan(two).companion
    assert run("apply", one, "--out", tmp_path / "w.safetensors")[0] == 0
    code, _, wrong = run("plan", *TINY, "--layers", "conv1.0", "--out", tmp_path / "b.safetensors")
    assert code == 2
    assert "give a name that ends in .json" in wrong


def test_events_are_appended_to_files_of_events_alone(run: Run, tmp_path: Path) -> None:
    plan, events = tmp_path / "plan.json", tmp_path / "events.jsonl"
    run("plan", *TINY, "--layers", "conv1.0", "--out", plan)
    before = plan.read_bytes()

    code, _, wrong = run("apply", plan, "--out", tmp_path / "w.safetensors", "--events", plan)

    assert code == 2
    assert "is a file of another kind" in wrong
    assert plan.read_bytes() == before
    for _ in range(2):
        assert run("preview", plan, "--events", events)[0] == 0
    assert events.read_text(encoding="utf-8").count('"event": "done"') == 2


def test_a_diagnosis_and_images_of_other_classes_do_not_go_together(
    run: Run, tmp_path: Path
) -> None:
    diagnosis = tmp_path / "diagnosis.json"
    run("measure", *TINY[:4], "--data", "bloodmnist", *QUICK, "--out", diagnosis)
    rule = ("plan", *TINY[:4], "--rule", "weight-gradient", "--out", tmp_path / "plan.json")

    code, _, wrong = run(*rule, "--diagnosis", diagnosis, "--data", "pneumonia")
    assert code == 2
    assert "measured a head of 8 classes, and " in wrong
    code, _, wrong = run(*rule, "--diagnosis", diagnosis, "--classes", "5")
    assert code == 2
    assert "Give --diagnosis or --classes, not both" in wrong


def test_a_name_that_is_no_text_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    out = f"{tmp_path}/pl\udcffan.json"

    code, _, wrong = run("plan", *TINY, "--rule", "random", "--percent", "40", "--out", out)

    assert code == 2
    assert "is no text in UTF-8" in wrong
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("freeze", ["nosuch"], 'freezes "nosuch", which is no layer of the model'),
        (
            "learning_rates",
            [{"layer": "nosuch", "factor": 2.0}],
            'sets a learning rate for "nosuch", which is no layer',
        ),
        ("freeze", ["conv1.0", "conv1.0"], 'freeze names "conv1.0" twice'),
        ("targets.0.layer", "nosuch", 'resets "nosuch", which is no layer of the model'),
        ("model.backbone_sha256", "0" * 64, "made for weights 000000000000"),
    ],
)
def test_names_a_network_does_not_have_are_refused_by_every_command(
    key: str, value: object, says: str, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    run("plan", *TINY, "--layers", "conv1.0", "--out", path)
    content = json.loads(path.read_text(encoding="utf-8"))
    place = content
    *way, last = key.split(".")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")

    for command in (
        ("apply", path, "--out", tmp_path / "w.safetensors"),
        ("export", path, "--out", tmp_path / "folder"),
        ("preview", path),
    ):
        code, _, wrong = run(*command)
        assert code == 2
        assert says in wrong
    assert {each.name for each in tmp_path.iterdir()} == {"plan.json"}


def test_a_plan_that_resets_nothing_says_so(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    run("plan", *TINY, "--layers", "conv1.0", "--out", path)
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "targets": []}), encoding="utf-8")

    code, said, _ = run("apply", path, "--out", tmp_path / "w.safetensors")

    assert code == 0
    assert "warning: The plan changes no parameter at all" in said


def test_a_random_network_that_is_its_own_twin_says_so(run: Run, tmp_path: Path) -> None:
    said = {
        seed: run("plan", *TINY, "--layers", "conv1.0", "--seed", seed, "--out", tmp_path / "p")[1]
        for seed in (0, 1)
    }

    assert "this plan changes nothing. Give another seed." in said[0]
    assert "changes nothing" not in said[1]


@pytest.mark.parametrize("command", ["apply", "export", "preview", "finetune", "verify"])
def test_a_plan_whose_values_are_not_finite_is_refused_by_name(
    run: Run, tmp_path: Path, command: str
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    run(
        *("plan", *TINY, "--layers", "conv1.0", "--scheme", "shrink-perturb", "--set"),
        *("shrink=1e300", "--out", plan),
    )
    out.write_bytes(b"x") if command == "verify" else None
    given = {
        "verify": (plan, out),
        "finetune": (
            *TINY[:-2],
            "--data",
            "bloodmnist",
            "--plan",
            plan,
            "--steps",
            1,
            "--out",
            out,
        ),
    }.get(command, (plan, "--out", out))

    code, _, wrong = run(command, *given)

    assert code == 2
    assert 'The plan "plan" writes values that are not finite numbers: ' in wrong
    assert 'in "conv1.0.weight". Make the plan again with smaller numbers.' in wrong


def test_learning_rates_that_disagree_do_not_compose(run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for path, layer, factor in ((one, "layer1.0.conv1", "0.5"), (two, "layer2.0.conv1", "2")):
        run("plan", *TINY, "--layers", layer, "--lr-factor", f"conv1.0={factor}", "--out", path)

    code, _, wrong = run("compose", one, two, "--out", tmp_path / "both.json")

    assert code == 2
    assert '"conv1.0" trains at 0.5 times the learning rate in "plan" and at 2 times' in wrong


@pytest.mark.parametrize("scheme", ["orthogonal", "fire"])
def test_the_number_of_threads_changes_no_bit(scheme: str, run: Run, tmp_path: Path) -> None:
    plan, weights = tmp_path / "plan.json", tmp_path / "w.safetensors"
    model = ("--model", "torchvision:resnet18", "--weights", "none", "--classes", "8")
    run("plan", *model, "--layers", "layer3*", "--scheme", scheme, "--seed", "3", "--out", plan)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert run("apply", plan, "--out", weights)[0] == 0
        torch.set_num_threads(2)
        assert run("verify", plan, weights)[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Differences


def changed(path: Path, change: Callable[[dict[str, object]], None]) -> Path:
    """Return the plan with its JSON changed by hand, in another file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    other = path.with_name(f"other-{path.name}")
    other.write_text(json.dumps(content), encoding="utf-8")
    return other


@pytest.mark.parametrize("key", ["parameters", "buffers"])
def test_a_tensor_that_one_plan_leaves_out_is_a_difference(
    key: str, run: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    run("plan", *TINY, "--layers", "layer1.0.bn1", "--scheme", "zero", "--out", plan)

    def shorten(content: dict[str, object]) -> None:
        target = content["targets"][0]  # type: ignore[index]
        target[key] = target[key][:-1]

    other = changed(plan, shorten)

    for first, second in ((plan, other), (other, plan)):
        code, said, _ = run("diff", first, second)
        assert code == 0
        assert said.startswith("entries layer1.0.bn1.")


def test_every_digit_of_a_number_is_compared(run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for path, number in ((one, "0.1234567"), (two, "0.12345671")):
        run(
            *("plan", *TINY, "--layers", "conv1.0", "--scheme", "shrink-perturb"),
            *("--set", f"shrink={number}", "--lr-factor", f"conv1.0={number}", "--out", path),
        )

    rows = diff_plans(read_plan(one), read_plan(two))

    assert [row.name for row in rows] == ["conv1.0", "learning_rates"]


def test_the_order_of_a_composition_is_no_difference(run: Run, tmp_path: Path) -> None:
    one, two, both, turned = (tmp_path / f"{name}.json" for name in ("a", "b", "ab", "ba"))
    for path, layer in ((one, "layer1.0.conv1"), (two, "layer2.0.conv1")):
        more = ("--freeze", layer.replace("conv1", "bn1"), "--lr-factor", f"{layer}=0.5")
        run("plan", *TINY, "--layers", layer, *more, "--out", path)
    run("compose", one, two, "--out", both)
    run("compose", two, one, "--out", turned)

    assert run("diff", both, turned)[1] == "The plans reset, freeze and train the same.\n"


def test_weights_are_compared_as_bits(run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({"a": torch.tensor([0.0, torch.nan, 1.0])}, one)
    save_file({"a": torch.tensor([-0.0, torch.nan, 1.0])}, two)

    assert run("diff", one, one)[1] == "Every tensor is the same, bit for bit.\n"
    assert run("diff", one, two)[1].startswith("a: 1 of 3, ")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_weights_that_are_no_plain_tensors_are_refused(kind: str, run: Run, tmp_path: Path) -> None:
    plan, weights = tmp_path / "plan.json", tmp_path / "w.pt"
    run("plan", *TINY, "--layers", "conv1.0", "--out", plan)
    odd = torch.eye(3).to_sparse() if kind == "sparse" else torch.empty(3, device="meta")
    torch.save({"a": odd}, weights)

    code, _, wrong = run("verify", plan, weights)

    assert code == 2
    assert wrong.startswith('limber: "w.pt" ')


# A trial


def test_arms_share_a_head_that_each_seed_draws_anew(run: Run, tmp_path: Path) -> None:
    plan, folder = tmp_path / "plan.json", tmp_path / "run"
    model = ("--model", "tf_efficientnet_lite0", "--data", "bloodmnist")
    run("plan", *model, "--rule", "weight-magnitude", "--percent", "20", "--out", plan)
    assert "classifier" in {target.layer for target in read_plan(plan).targets}

    code, said, _ = run("finetune", *model, "--plan", plan, *SHORT, "--out", folder)

    assert code == 0
    assert "what it writes into the new head is left out" in said
    kept = read_plan(folder / "plans" / "plan.json")
    assert "classifier" not in {target.layer for target in kept.targets}
    assert len(kept.targets) == len(read_plan(plan).targets) - 1
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert any("new head" in each for each in summary["comparison"]["caveats"])
    run("plan", *model, "--rule", "weight-magnitude", "--layers", "classifier", "--out", plan)
    code, _, wrong = run("finetune", *model, "--plan", plan, *SHORT, "--out", tmp_path / "again")
    assert code == 2
    assert "resets only the new head" in wrong


def test_a_run_is_never_written_over_and_any_name_of_an_arm_is_kept(
    run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    plans = []
    for i, name in enumerate(("a/b", "a:b", "長" * 100)):
        plans.append(tmp_path / f"{i}.json")
        run("plan", *TINY, "--layers", "conv1.0", "--seed", i, "--name", name, "--out", plans[-1])
    arms = [each for plan in plans for each in ("--plan", plan)]
    tune = ("finetune", *TINY[:4], "--data", "bloodmnist", *arms, *SHORT, "--out", folder)

    assert run(*tune)[0] == 0

    kept = {read_plan(path).name for path in (folder / "plans").glob("*.json")}
    assert kept == {"a/b", "a:b", "長" * 100}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, wrong = run(*tune)
    assert code == 2
    assert "holds a run already" in wrong
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# Files


def test_no_two_files_share_a_companion(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("k", "k.json", "k.txt", "k.masks")]
    for i, path in enumerate(paths):
        run("plan", *TINY, "--rule", "random", "--percent", 30 + i, "--out", path)

    for path in paths:
        assert run("apply", path, "--out", tmp_path / "w.safetensors")[0] == 0


def test_a_companion_is_found_though_the_plan_names_no_checkpoint(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", *TINY, "--rule", "random", "--percent", "30", "--out", plan)
    content = json.loads(plan.read_text(encoding="utf-8"))
    del content["model"]["checkpoint"]
    plan.write_text(json.dumps(content), encoding="utf-8")

    code, _, wrong = run("apply", plan, "--out", tmp_path / "plan.masks.safetensors")

    assert code == 2
    assert "would overwrite" in wrong


def test_a_diagnosis_guards_the_checkpoint_it_names(run: Run, tmp_path: Path) -> None:
    plan, start, diagnosis = (tmp_path / name for name in ("p.json", "w.safetensors", "d.json"))
    run("plan", *TINY[:4], "--layers", "conv1.0", "--seed", "1", "--out", plan)
    run("apply", plan, "--out", start)
    model = ("--model", "timm:test_resnet", "--checkpoint", start, "--data", "bloodmnist")
    before = start.read_bytes()

    code, _, wrong = run("measure", *model, *QUICK, "--out", start)
    assert (code, "would overwrite" in wrong) == (2, True)
    assert run("measure", *model, *QUICK, "--out", diagnosis)[0] == 0
    rule = ("plan", "--diagnosis", diagnosis, "--rule", "last-blocks")
    code, _, wrong = run(*rule, "--out", start)
    assert (code, "would overwrite" in wrong) == (2, True)
    assert start.read_bytes() == before


def test_an_image_is_never_written_over(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    image = tmp_path / "images" / "a" / "1.png"
    before = image.read_bytes()

    code, _, wrong = run(
        *("plan", *TINY[:4], "--data", tmp_path / "images", "--rule", "random", "--out", image)
    )

    assert code == 2
    assert "would overwrite" in wrong
    assert image.read_bytes() == before


def test_an_export_keeps_its_hands_off_what_is_no_export(run: Run, tmp_path: Path) -> None:
    plan, folder = tmp_path / "plan.json", tmp_path / "mine"
    run("plan", *TINY, "--layers", "conv1.0", "--seed", "1", "--out", plan)
    run("apply", plan, "--out", folder / "reinit.safetensors")
    before = (folder / "reinit.safetensors").read_bytes()
    run("plan", *TINY, "--layers", "conv1.0", "--seed", "2", "--out", plan)

    code, _, wrong = run("export", plan, "--out", folder)

    assert code == 2
    assert "is no export's" in wrong
    assert (folder / "reinit.safetensors").read_bytes() == before


def test_an_export_loads_into_a_network_with_format_versions(run: Run, tmp_path: Path) -> None:
    plan, folder = tmp_path / "plan.json", tmp_path / "export"
    model = ("--model", "torchvision:mnasnet0_5", "--weights", "none", "--classes", "8")
    run("plan", *model, "--layers", "layers.12*", "--seed", "3", "--out", plan)
    assert run("export", plan, "--out", folder)[0] == 0

    loaded = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import torchvision; from apply_plan import apply_plan\n"
            "model = torchvision.models.get_model('mnasnet0_5', weights=None, num_classes=8)\n"
            "print(apply_plan(model))",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )

    assert len(loaded.stdout.strip()) == 64
    odd = subprocess.run(
        [sys.executable, "apply_plan.py", "USE.md"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (odd.returncode, odd.stderr) == (2, "")
    assert "cannot be read as safetensors" in odd.stdout


# Plans by hand that no rule would make


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"axis": 7}, "do not fit that tensor: it has 4 axes"),
        ({"write": "add", "values": "x"}, "as no rule does"),
        ({"count": 10**30}, "count is"),
    ],
)
def test_no_control_is_drawn_of_what_no_rule_chooses(
    change: dict[str, object], says: str, run: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    by = ("--rule", "random", "--percent", "1", "--layers", "conv1.0")
    run("plan", *TINY, *by, "--out", plan)

    def put(content: dict[str, object]) -> None:
        content["targets"][0]["entries"][0] |= change  # type: ignore[index]

    like = changed(plan, put)
    code, _, wrong = run("plan", "--rule", "random", "--like", like, "--out", tmp_path / "c.json")

    assert code == 2
    assert says in wrong
    assert wrong.count("\n") == 1


def test_a_unit_the_layer_does_not_have_has_no_control(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", *TINY, "--units", "layer1.0.conv1=1", "--out", plan)

    def put(content: dict[str, object]) -> None:
        for target in content["targets"]:  # type: ignore[attr-defined]
            target["units"] = [9999] if target["units"] else []

    like = changed(plan, put)
    code, _, wrong = run("plan", "--rule", "random", "--like", like, "--out", tmp_path / "c.json")

    assert code == 2
    assert "names unit 9999" in wrong


def test_the_control_of_continual_backpropagation_has_its_compensation(
    run: Run, tmp_path: Path
) -> None:
    plan, control = tmp_path / "plan.json", tmp_path / "control.json"
    data = ("--data", "bloodmnist", *QUICK)
    model = ("--model", "timm:test_vit", "--weights", "none")
    code, _, wrong = run(
        *("plan", *model, *data, "--rule", "cbp", "--percent", "10", "--out", plan)
    )
    assert (code, wrong) == (0, "")

    code, _, wrong = run("plan", "--rule", "random", "--like", plan, "--out", control)
    assert code == 2
    assert "looks at images. Give --data" in wrong
    assert run("plan", "--rule", "random", "--like", plan, *data, "--out", control)[0] == 0

    def added(path: Path) -> int:
        plan = read_plan(path)
        return sum(each.write == "add" for target in plan.targets for each in target.entries)

    assert added(control) == added(plan) > 0


def test_the_control_of_a_scheme_of_biases_writes_biases(run: Run, tmp_path: Path) -> None:
    plan, control = tmp_path / "plan.json", tmp_path / "control.json"
    scheme = ("--layers", "layer1.0.bn1", "--scheme", "bias-mean")
    run("plan", *TINY, *scheme, "--out", plan)

    for seed in range(6):
        like = ("--rule", "random", "--like", plan, "--seed", seed)
        assert run("plan", *like, "--out", control)[0] == 0
        names = [name for target in read_plan(control).targets for name in target.parameters]
        assert names
        assert all(name.endswith("bias") for name in names)


def test_a_control_never_takes_layers_of_another_kind(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", *TINY, "--layers", "Conv2d", "--syntax", "type", "--out", plan)

    code, _, wrong = run("plan", "--rule", "random", "--like", plan, "--out", tmp_path / "c.json")

    assert code == 2
    assert "resets every layer of its kinds" in wrong


def test_a_convolution_and_its_norm_compose(run: Run, tmp_path: Path) -> None:
    one, two, both, together = (tmp_path / f"{name}.json" for name in ("a", "b", "ab", "all"))
    run("plan", *TINY, "--layers", "layer1.0.conv1", "--seed", "2", "--out", one)
    run("plan", *TINY, "--layers", "layer1.0.bn1", "--seed", "2", "--out", two)
    run(
        *("plan", *TINY, "--layers", "layer1.0.conv1", "--layers", "layer1.0.bn1"),
        *("--seed", "2", "--out", together),
    )

    assert run("compose", one, two, "--out", both)[0] == 0

    for path in (both, together):
        run("apply", path, "--out", path.with_suffix(".safetensors"))
    own, other = (load_file(path.with_suffix(".safetensors")) for path in (both, together))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_ratio_that_may_be_noise_selects_nothing(run: Run, tmp_path: Path) -> None:
    diagnosis, plan = tmp_path / "d.json", tmp_path / "plan.json"
    run("measure", *TINY[:4], "--data", "bloodmnist", *QUICK, "--out", diagnosis)
    content = json.loads(diagnosis.read_text(encoding="utf-8"))
    noisy = {
        layer["name"]
        for layer in content["layers"]
        if (span := layer["ratio_intervals"].get("grad_l2")) and span[0] <= 1 <= span[1]
    }
    assert noisy
    rule = ("--rule", "threshold", "--metric", "grad_l2", "--of", "ratio", "--side", "above")

    code, said, wrong = run(
        "plan", "--diagnosis", diagnosis, *rule, "--threshold", "0", "--out", plan
    )

    assert "whose ratio's 95 % interval contains 1" in said + wrong
    if code == 0:
        assert not noisy & {target.layer for target in read_plan(plan).targets}


# Words that cannot be written


@pytest.mark.parametrize(
    "arguments",
    [
        ("--layers", "\udcff*"),
        ("--layers", "conv1.0", "--name", "\udcff"),
        ("--layers", "conv1.0", "--checkpoint", "x\udcff.pt"),
    ],
)
def test_what_is_no_text_is_refused(arguments: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    code, _, wrong = run("plan", *TINY, *arguments, "--out", tmp_path / "plan.json")

    assert code == 2
    assert "is no text in UTF-8" in wrong


def test_a_terminal_without_letters_and_a_full_disk_are_no_tracebacks(tmp_path: Path) -> None:
    plan = tmp_path / "é.json"
    command = [sys.executable, "-m", "core"]
    made = subprocess.run(
        [*command, "plan", *TINY, "--layers", "conv1.0", "--out", str(plan)],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (made.returncode, made.stderr) == (0, "")
    assert "\\xe9.json" in made.stdout
    with Path("/dev/full").open("w") as full:
        lost = subprocess.run(
            [*command, "diff", str(plan), str(plan)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert lost.returncode == 2
    assert "cannot be written" in lost.stderr.splitlines()[0]
    assert "Traceback" not in lost.stderr


@pytest.mark.parametrize("leads", ["file", "nowhere", "device"])
def test_a_link_is_no_place_for_a_result(run: Run, tmp_path: Path, leads: str) -> None:
    target = {"file": tmp_path / "real", "nowhere": tmp_path / "gone", "device": Path("/dev/null")}
    if leads == "file":
        target[leads].write_text("mine")
    link = tmp_path / "plan.json"
    link.symlink_to(target[leads])

    code, _, err = run(
        *("plan", "--model", "timm:test_resnet", "--weights", "none"),
        *("--layers", "layer4*", "--out", link),
    )

    assert code == 2
    assert "is a link; give the place it leads to" in err
    assert link.is_symlink()
    assert leads != "file" or target[leads].read_text() == "mine"


def test_an_export_does_not_take_the_place_of_a_link(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made = ("plan", "--model", "timm:test_resnet", "--weights", "none", "--layers", "layer4*")
    assert run(*made, "--out", plan)[0] == 0
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "reinit.safetensors").symlink_to(tmp_path / "elsewhere")

    code, _, err = run("export", plan, "--out", folder)

    assert code == 2
    assert "is a link" in err or "overwrite" in err
    assert (folder / "reinit.safetensors").is_symlink()
