"""The command line: one clear line for bad input, whole files for good input, a stop that works."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from core import plan_schema
from core.cli import main
from core.load import build_module, resolve_model
from core.records import Pace, RunRecord

ROOT = Path(__file__).resolve().parent.parent
# A network of timm that takes milliseconds, with random weights: no network, no waiting.
TINY = ("--model", "timm:test_efficientnet", "--weights", "none")
SMALL_RUN = (
    *("--image-size", "32", "--train-images", "16", "--val-images", "8"),
    *("--batch-size", "4", "--device", "cpu"),
)

Answer = tuple[int, str, str]


@pytest.fixture
def command(run: Callable[..., Answer]) -> Callable[..., Answer]:
    """Run a command here and return its exit code, what it printed and what it complained of."""
    return run


@pytest.fixture
def good_plan(tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    code = main(
        [
            *("plan", *TINY, "--data", "bloodmnist", "--layers", "blocks.3", "--seed", "4"),
            *("--out", str(folder / "plan.json")),
        ]
    )
    assert code == 0
    return folder / "plan.json"


def files_below(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def events_of(path: Path) -> list[dict[str, Any]]:
    """The events, each line a whole JSON object with a name and a time."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(row["event"], str) and isinstance(row["t"], float) for row in rows)
    return rows


# Lists

MODEL_KEYS = {"name", "source", "embedded", "parameters"}
LISTED: dict[str, tuple[set[str], str]] = {
    "models": (MODEL_KEYS, "tf_efficientnet_lite0"),
    "datasets": ({"name", "embedded", "images", "classes"}, "bloodmnist"),
    "metrics": ({"name", "title", "formula"}, "grad_l2"),
    "presets": ({"name", "title", "description", "rules"}, "redo"),
    "rules": ({"name", "title", "description", "source"}, "by-hand"),
    "schemes": ({"name", "title", "description", "parameters", "source"}, "architecture"),
}


def test_measuring_and_fine_tuning_say_what_the_images_are_like(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    for split, names in (("train", "abc"), ("val", "abd")):
        for place, name in enumerate(names):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(3):
                values = np.arange(900, dtype=np.uint16).reshape(30, 30) * 4 + place + number
                Image.fromarray(values).save(tmp_path / "set" / split / name / f"{number}.png")
    (tmp_path / "set" / "train" / "a" / "gone.png").symlink_to("nowhere")
    data = ("--data", tmp_path / "set", "--image-size", "32", "--device", "cpu")
    small = ("--train-images", "6", "--val-images", "6", "--batch-size", "3", "--steps", "1")

    measured = command("measure", *TINY, *data, "--samples", "4", "--out", tmp_path / "d.json")
    tuned = command("finetune", *TINY, *data, *small, "--seeds", "0", "--out", tmp_path / "run")

    told = (
        '1 class has validation images and no training image: "d" (3).',
        '1 class has training images and no validation image: "c" (3).',
        "18 16-bit images: intensities 0 to 4,095",
        "Left out of the folder: links that lead nowhere or in a circle (1).",
    )
    assert (measured[0], tuned[0]) == (0, 0)
    header = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))["header"]
    record = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["record"]
    for each in told:
        assert each in measured[1]
        assert each in tuned[1]
        assert any(each in note for note in header["notes"])
    assert all(any(each in caveat for caveat in record["caveats"]) for each in told[:2])
    assert header["intensities"] == record["intensities"]
    assert (header["intensities"][0]["low"], header["intensities"][0]["high"]) == (0, 4_095)


@pytest.mark.parametrize("what", sorted(LISTED))
def test_a_list_as_json_has_the_promised_keys(command: Callable[..., Answer], what: str) -> None:
    keys, known = LISTED[what]

    code, out, err = command("list", what, "--json")

    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert rows
    assert all(keys <= row.keys() for row in rows)
    names = [row["name"] for row in rows]
    assert known in names
    assert len(set(names)) == len(names)


def test_listed_models_and_data_sets_have_values_of_the_promised_types(
    command: Callable[..., Answer],
) -> None:
    models = json.loads(command("list", "models", "--json")[1])
    sets = json.loads(command("list", "datasets", "--json")[1])

    assert all(type(row["embedded"]) is bool for row in models + sets)
    assert {row["source"] for row in models} == {"embedded", "timm", "torchvision"}
    assert all(row["parameters"] is None or row["parameters"] > 0 for row in models)
    assert [row["name"] for row in models if row["embedded"]] == [
        "tf_efficientnet_lite0",
        "vit_small_patch14_dinov2",
    ]
    assert {row["name"]: (row["images"], row["classes"]) for row in sets if row["embedded"]} == {
        "bloodmnist": (1136, 8),
        "pneumonia": (900, 2),
    }


@pytest.mark.parametrize("what", sorted(LISTED))
def test_a_list_for_people_has_a_line_each(command: Callable[..., Answer], what: str) -> None:
    rows = json.loads(command("list", what, "--json")[1])

    code, out, _ = command("list", what)

    lines = out.splitlines()
    assert code == 0
    listed = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert listed == [row["name"] for row in rows]
    below = [line.split()[0] for line in lines if line.startswith("  ")]
    assert below == [rule["name"] for row in rows for rule in row.get("rules", ())]


# Bad input

MEASURE = ("measure", *TINY, "--data", "bloodmnist", "--device", "cpu", "--out", "OUT")
PLAN = ("plan", *TINY, "--classes", "8", "--out", "OUT")
TUNE = ("finetune", *TINY, "--data", "bloodmnist", *SMALL_RUN, "--steps", "1", "--out", "OUT")

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no command": ((), "arguments are required"),
    "unknown command": (("paint",), "invalid choice"),
    "unknown list": (("list", "colours"), "invalid choice"),
    "unknown option": ((*MEASURE, "--colour", "red"), "nrecognized arguments: --colour"),
    "option left out": (("measure", *TINY, "--data", "bloodmnist"), "required: --out"),
    "unknown data": (("measure", *TINY, "--data", "nosuch", "--out", "OUT"), 'Data "nosuch"'),
    "data of nobody": (
        ("measure", *TINY, "--data", "~nobody-of-that-name/x", "--out", "OUT"),
        "nor a path that exists",
    ),
    "unknown model": (
        ("measure", "--model", "resnet188", "--data", "bloodmnist", "--out", "OUT"),
        'Model "resnet188" is not in',
    ),
    "unknown library": (
        ("measure", "--model", "keras:x", "--data", "bloodmnist", "--out", "OUT"),
        'library "keras"',
    ),
    "unknown tag": (
        ("plan", "--model", "resnet18.nosuchtag", "--layers", "*", "--out", "OUT"),
        "nosuchtag",
    ),
    "unknown weights": (
        ("plan", "--model", "resnet18", "--weights", "best", "--layers", "*", "--out", "OUT"),
        "invalid choice: 'best'",
    ),
    "bad device": ((*MEASURE, "--device", "tpu"), 'device is "tpu"; give auto, cpu or cuda'),
    "no samples": ((*MEASURE, "--samples", "0"), "samples is 0; give 1 to"),
    "samples in words": ((*MEASURE, "--samples", "many"), "'many' is not a whole number"),
    "half a sample": ((*MEASURE, "--samples", "1.5"), "'1.5' is not a whole number"),
    "no batch": ((*MEASURE, "--batch-size", "0"), "batch size is 0; give 1 to"),
    "negative seed": ((*MEASURE, "--seed", "-1"), "'-1' is not a seed"),
    "image size of nothing": ((*MEASURE, "--image-size", "0"), "image size is 0; give 16 to"),
    "tiny image": ((*MEASURE, "--image-size", "8"), "image size is 8; give 16 to"),
    "image size between patches": (
        (
            *("measure", "--model", "vit_small_patch14_dinov2", "--weights", "none"),
            *("--data", "bloodmnist", "--image-size", "100", "--out", "OUT"),
        ),
        "multiples of 14, such as 98 or 112",
    ),
    "checkpoint missing": (
        (
            *("plan", "--model", "tf_efficientnet_lite0", "--checkpoint", "gone.pt"),
            *("--layers", "*", "--out", "OUT"),
        ),
        'no checkpoint file "gone.pt"',
    ),
    "out is a folder": ((*MEASURE[:-1], "FOLDER"), "is a folder; give a file name"),
    "out below a file": ((*MEASURE[:-1], "FILE/deep/out.json"), "which is a file"),
    "out name too long": ((*PLAN[:-1], "x" * 3_000, "--layers", "*"), "cannot be used"),
    "events into a folder": ((*MEASURE, "--samples", "2", "--events", "FOLDER"), "--events"),
    "scheme unknown": ((*PLAN, "--layers", "*", "--scheme", "magic"), 'no scheme "magic"'),
    "number of no scheme": (
        (*PLAN, "--layers", "*", "--set", "shrink=0.5"),
        'Scheme "architecture" has no number "shrink"',
    ),
    "number in words": (
        (*PLAN, "--layers", "*", "--scheme", "shrink-perturb", "--set", "shrink=half"),
        "is not NAME=NUMBER",
    ),
    "unknown preset": ((*MEASURE, "--preset", "nosuch"), 'There is no preset "nosuch"'),
    "unknown rule of judgement": (
        (*MEASURE, "--threshold", "dead=0.1"),
        'has no check "dead". It has',
    ),
    "threshold in words": (
        (*MEASURE, "--threshold", "dead-units=few"),
        '--threshold "dead-units=few" is not NAME=NUMBER',
    ),
    "threshold for a part": (
        (*MEASURE, "--part", "1/2", "--preset", "redo"),
        "Parts are not judged",
    ),
    "nothing to judge": (("judge", "gone.json"), '"gone.json" cannot be read as a diagnosis'),
    "judging words": (("judge", "FILE"), "cannot be read as a diagnosis"),
    "merging words": (("merge", "FILE", "--out", "OUT"), "cannot be read as a part"),
    "part of nothing": ((*MEASURE, "--part", "0/0"), "There are 0 parts"),
    "part in words": ((*MEASURE, "--part", "half"), "'half' is no part"),
    "glob without match": ((*PLAN, "--layers", "layer9.*"), 'matches the glob "layer9.*"'),
    "broken regex": ((*PLAN, "--syntax", "regex", "--layers", "("), "not a regular expression"),
    "head alone": ((*PLAN, "--layers", "classifier"), "is new already"),
    "no classes": (("plan", *TINY, "--classes", "0", "--layers", "*", "--out", "OUT"), "0 classes"),
    "data and classes": (
        (*PLAN, "--data", "bloodmnist", "--layers", "*"),
        "Give --data or --classes, not both",
    ),
    "plan missing": (("apply", "gone.json", "--out", "OUT"), 'plan "gone.json" cannot be read'),
    "plan not JSON": (("apply", "FILE", "--out", "OUT"), "is not JSON"),
    "plan with unknown key": (("apply", "UNKNOWN-KEY", "--out", "OUT"), 'unknown key "colour"'),
    "plan for other weights": (("apply", "OTHER-MODEL", "--out", "OUT"), "weights"),
    "seeds in words": ((*TUNE, "--seeds", "one,two"), "'one' is not a whole number"),
    "seeds twice": ((*TUNE, "--seeds", "1,1"), "Seeds must be different"),
    "no seeds": ((*TUNE, "--seeds", ""), "not a whole number"),
    "no steps": ((*TUNE, "--steps", "0"), "steps"),
    "learning rate of nothing": ((*TUNE, "--lr", "0"), "learning rate is 0"),
    "negative learning rate": ((*TUNE, "--lr", "-1"), "learning rate is -1"),
    "learning rate that is no number": ((*TUNE, "--lr", "nan"), "learning rate is nan"),
    "learning rate in words": ((*TUNE, "--lr", "fast"), "'fast' is not a number"),
    "head rate that is no number": ((*TUNE, "--head-lr", "nan"), "learning rate is nan"),
    "one training image": ((*TUNE, "--train-images", "1"), "1 images are too few"),
    "batch of one": ((*TUNE, "--batch-size", "1"), "batch size is 1; give 2 to"),
    "out is a file": ((*TUNE[:-1], "FILE"), "is a file; give a folder"),
    "plan for other classes": (
        (*TUNE, "--plan", "OTHER-CLASSES"),
        "made for a new head of 5 classes",
    ),
    "control of nothing": ((*TUNE, "--random-control"), "needs a plan whose size"),
}


@pytest.fixture
def places(tmp_path: Path, good_plan: Path) -> dict[str, str]:
    """What the placeholders of the table stand for."""
    given = good_plan.parent
    content = json.loads(good_plan.read_text(encoding="utf-8"))
    model = content["model"]
    for name, changed in (
        ("UNKNOWN-KEY", {**content, "colour": 1}),
        ("OTHER-CLASSES", {**content, "model": {**model, "classes": 5}}),
        (
            "OTHER-MODEL",
            {**content, "model": {**model, "source": "embedded", "name": "tf_efficientnet_lite0",
                                  "weights": "pretrained"}},
        ),
    ):  # fmt: skip
        (given / name).write_text(json.dumps(changed), encoding="utf-8")
    (given / "FILE").write_text("words", encoding="utf-8")
    (given / "FOLDER").mkdir()
    found = {path.name: str(path) for path in given.iterdir()}
    return {**found, "OUT": str(tmp_path / "out" / "result")}


def filled(arguments: Sequence[str], places: dict[str, str]) -> list[str]:
    return [
        places["FILE"] + argument.removeprefix("FILE")
        if argument.startswith("FILE/")
        else places.get(argument, argument)
        for argument in arguments
    ]


def one_line(err: str) -> str:
    assert err.startswith("limber: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_gives_one_line_and_exit_code_2_and_writes_nothing(
    command: Callable[..., Answer],
    tmp_path: Path,
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    arguments, says = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)

    code, out, err = command(*filled(arguments, places))

    assert code == 2
    assert out == ""
    assert says in one_line(err)
    assert files_below(tmp_path) == before


def test_cuda_is_refused_where_there_is_none(
    command: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    code, _, err = command(*MEASURE[:-1], tmp_path / "out.json", "--device", "cuda")

    assert code == 2
    assert "There is no CUDA device on this machine" in one_line(err)


def test_a_refusal_is_an_event_as_well(command: Callable[..., Answer], tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"

    _, _, err = command(
        *("measure", *TINY, "--data", "nosuch", "--out", tmp_path / "out.json"),
        *("--events", events),
    )

    (row,) = events_of(events)
    assert row["event"] == "error"
    assert " ".join(row["message"].split()) == err.removeprefix("limber: ").strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("measure", "--model", "resnet18", "--data", "nosuch", "--out", "x.json"), "nosuch"),
        (("list", "models", "--colour"), "--colour"),
        (("apply", "gone.json", "--out", "x.safetensors"), "gone.json"),
    ],
)
def test_a_real_process_refuses_in_one_line_too(arguments: tuple[str, ...], says: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "core", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert answer.returncode == 2
    assert answer.stdout == ""
    assert says in one_line(answer.stderr)


def test_an_error_of_ours_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("core.load.resolve_data", broken)
    events = tmp_path / "events.jsonl"

    with pytest.raises(ZeroDivisionError, match="a defect"):
        main([*MEASURE[:-1], str(tmp_path / "out.json"), "--events", str(events)])

    assert events_of(events)[-1]["message"] == "An error of ours: ZeroDivisionError: a defect"


EMBEDDED = Path("assets/weights/tf_efficientnet_lite0.fp16.safetensors").resolve()


# Good input


def test_a_measurement_is_written_with_its_companion(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    out, events = tmp_path / "new" / "diagnosis.json", tmp_path / "events.jsonl"

    code, said, err = command(
        *(*MEASURE[:-1], out, "--samples", 8, "--batch-size", 4, "--image-size", 32),
        *("--events", events),
    )

    assert (code, err) == (0, "")
    assert said.startswith("test_efficientnet on BloodMNIST (blood cells): 31 layers, 8 images")
    diagnosis = json.loads(out.read_text(encoding="utf-8"))
    header = diagnosis["header"]
    assert {"model", "data_fingerprint", "samples", "device", "dtype", "seed", "versions"} <= set(
        header
    )
    assert (header["samples"], header["device"], header["dtype"]) == (8, "cpu", "float32")
    assert len(diagnosis["layers"]) == 31
    for layer in diagnosis["layers"]:
        assert {"name", "type", "parameters", "metrics", "twin_metrics"} <= set(layer)
        assert layer["metrics"].keys() == layer["twin_metrics"].keys()
    companion = out.parent / header["units_file"]
    assert hashlib.sha256(companion.read_bytes()).hexdigest() == header["units_sha256"]
    rows = events_of(events)
    assert rows[-1]["event"] == "done"
    shares = [row["done"] / row["total"] for row in rows if row["event"] == "progress"]
    assert max(shares) == 1.0


@pytest.mark.parametrize("kind", ["units", "inside"])
def test_no_companion_of_a_measurement_takes_the_place_of_a_checkpoint(
    command: Callable[..., Answer], tmp_path: Path, kind: str
) -> None:
    start = tmp_path / f"d.{kind}.safetensors"
    start.write_bytes(EMBEDDED.read_bytes())

    code, said, err = command(
        *("measure", "--model", "tf_efficientnet_lite0", "--checkpoint", start),
        *("--data", "bloodmnist", "--samples", 2, "--image-size", 32, "--inside"),
        *("--out", tmp_path / "d.json"),
    )

    assert (code, said) == (2, "")
    assert "would overwrite" in err
    assert start.read_bytes() == EMBEDDED.read_bytes()


def test_a_link_beside_the_result_is_refused_before_anything_is_measured(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "d.inside.safetensors").symlink_to(tmp_path / "elsewhere")

    code, _, err = command(*MEASURE[:-1], tmp_path / "d.json", "--inside")

    assert code == 2
    assert "is a link" in err
    assert [path.name for path in tmp_path.iterdir()] == ["d.inside.safetensors"]


def test_a_network_that_overflows_has_reasons_for_figures_and_says_so(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    spec = resolve_model("timm:test_efficientnet", weights="none")
    state = build_module(spec, classes=8, seed=0).state_dict()
    state["blocks.2.0.conv_pwl.weight"][0, 0] = 3e38
    checkpoint, out = tmp_path / "odd.pt", tmp_path / "diagnosis.json"
    torch.save(state, checkpoint)

    code, said, err = command(
        *("measure", "--model", "timm:test_efficientnet", "--checkpoint", checkpoint),
        *("--data", "bloodmnist", "--samples", 12, "--batch-size", 6, "--image-size", 32),
        *("--device", "cpu", "--transfer", "--out", out),
    )

    text = out.read_text(encoding="utf-8")
    diagnosis = json.loads(text)
    ruled = command(
        *("plan", "--rule", "redo", "--diagnosis", out, "--out", tmp_path / "plan.json")
    )
    assert (code, err) == (0, "")
    assert "warning: The network's loss on these images is not a finite number" in said
    assert ruled[0] == 2
    assert "looks at figures of the network, whose loss on these images is not a" in ruled[2]
    assert any(
        "loss on these images is not a finite number" in note
        for note in diagnosis["header"]["notes"]
    )
    for layer in diagnosis["layers"]:
        for side in ("metrics", "twin_metrics"):
            for figure in layer[side].values():
                assert (figure["value"] is None) == bool(figure["reason"])
                assert figure["value"] is None or isinstance(figure["value"], float | int)


def test_a_diagnosis_is_judged_by_another_preset_and_other_thresholds(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    out = tmp_path / "diagnosis.json"
    command(
        *(*MEASURE[:-1], out, "--samples", 4, "--batch-size", 4, "--image-size", 32),
        *("--preset", "fastai", "--threshold", "near-zero-outputs=0"),
    )

    diagnosis = json.loads(out.read_text(encoding="utf-8"))
    code, said, beside = command("judge", out, "--json")
    inflated = command(
        *("judge", out, "--preset", "limber", "--threshold", "inflated-weights=0.01", "--json")
    )
    silent = command("judge", out, "--preset", "fastai", "--threshold", "near-zero-outputs=1")

    assert (diagnosis["preset"], diagnosis["thresholds"]) == ("fastai", {"near-zero-outputs": 0})
    assert code == 0
    # The network is random like its twin, and what both show is said apart.
    assert diagnosis["findings"] == json.loads(said) == []
    (remark,) = diagnosis["remarks"]
    assert remark["sentence"].startswith("As in the fresh twin (")
    assert beside == f"{remark['sentence']}\n"
    assert "inflated-weights" in {finding["rule"] for finding in json.loads(inflated[1])}
    assert silent == (0, 'Nothing stands out by the rules of "fastai".\n', "")


def test_a_plan_is_written_as_its_schema_says(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"

    code, said, err = command(
        *("plan", *TINY, "--data", "bloodmnist", "--layers", "blocks.3", "--layers", "classifier"),
        *("--scheme", "shrink-perturb", "--set", "shrink=0.5", "--freeze", "conv_stem"),
        *("--name", "mine", "--seed", 3, "--out", out),
    )

    plan = json.loads(out.read_text(encoding="utf-8"))
    assert (code, err) == (0, "")
    jsonschema.validate(plan, plan_schema())
    assert plan["name"] == "mine"
    assert {target["layer"].rpartition(".")[0] for target in plan["targets"]} <= {
        "blocks.3.0",
        "blocks.3.0.se",
    }
    assert [each["text"] for each in plan["patterns"]] == ["blocks.3", "classifier"]
    assert plan["targets"][0]["scheme"]["parameters"] == {"shrink": 0.5}
    # A scheme that keeps part of the weights keeps the statistics that describe them.
    assert all(target["buffers"] == [] for target in plan["targets"])
    assert plan["freeze"] == ["conv_stem"]
    assert "left out, because the head is new already: classifier" in said


def test_the_same_choice_writes_the_same_plan(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        command(*PLAN[:-1], tmp_path / name, "--layers", "blocks.2", "--layers", "blocks.3")

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_weights_are_written_with_a_receipt(
    command: Callable[..., Answer], tmp_path: Path, good_plan: Path
) -> None:
    out = tmp_path / "reinit.safetensors"

    code, said, err = command("apply", good_plan, "--out", out, "--json")

    receipt = json.loads(said)
    assert (code, err) == (0, "")
    assert receipt["file_sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert receipt["plan_sha256"] == hashlib.sha256(good_plan.read_bytes()).hexdigest()
    assert receipt["before_sha256"] != receipt["after_sha256"]
    assert receipt["parameters_touched"] == sum(
        change["entries"] for change in receipt["changes"] if not change["buffer"]
    )


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "curves.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_fine_tune_writes_curves_summary_and_events(
    command: Callable[..., Answer], tmp_path: Path, good_plan: Path
) -> None:
    run, events = tmp_path / "run", tmp_path / "events.jsonl"

    code, said, err = command(
        *("finetune", *TINY, "--data", "bloodmnist", "--plan", good_plan, *SMALL_RUN),
        *("--steps", 3, "--seeds", "0,1", "--eval-every", 2, "--out", run, "--events", events),
    )

    assert (code, err) == (0, "")
    assert "12 of 12 steps" in said
    rows = rows_of(run)
    assert list(rows[0]) == ["arm", "seed", "step", "train_loss", "val_accuracy", "wall_s"]
    assert len(rows) == 2 * 2 * 4
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["finished"] is True
    assert summary["steps_done"] == 12
    assert summary["final_val_accuracy"].keys() == {"untouched", "plan"}
    assert (run / "plans" / "plan.json").read_bytes() == good_plan.read_bytes()
    told = events_of(events)
    steps = [row for row in told if row["event"] == "step"]
    assert [(row["arm"], row["seed"], row["step"]) for row in steps] == [
        (row["arm"], int(row["seed"]), int(row["step"])) for row in rows
    ]
    names = [row["event"] for row in told]
    assert names[-1] == "done"
    assert names.index("phase") < names.index("record") < names.index("step")


def test_an_estimate_times_two_seconds_and_writes_nothing(
    command: Callable[..., Answer], tmp_path: Path, good_plan: Path
) -> None:
    events = tmp_path / "events.jsonl"
    before = sorted(tmp_path.rglob("*"))

    code, said, err = command(
        *("finetune", *TINY, "--data", "bloodmnist", "--plan", good_plan, *SMALL_RUN),
        *("--rival", "lp-ft", "--steps", 600, "--seeds", 8, "--estimate", "--events", events),
    )

    assert (code, err) == (0, "")
    done = events_of(events)[-1]
    pace = Pace.model_validate(done["pace"])
    # Three arms under eight seeds: the steps alone take so long.
    assert done["seconds"] >= 3 * 8 * 600 * pace.step_s > 0
    assert "for 3 arms on cpu" in said
    assert sorted(path for path in tmp_path.rglob("*") if path != events) == before


def test_rivals_and_the_design_are_in_the_record(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    code, said, err = command(
        *("finetune", *TINY, "--data", "bloodmnist", *SMALL_RUN, "--steps", 2, "--seeds", 2),
        *("--rival", "lp-ft", "--rival", "shrink-perturb", "--outcome", "auc", "--margin", 2),
        *("--optimizer", "sgd", "--schedule", "poly", "--augment", "flip", "--out", run),
    )

    assert (code, err) == (0, "")
    record = RunRecord.model_validate(
        json.loads((run / "summary.json").read_text(encoding="utf-8"))["record"]
    )
    assert record.arms == ("untouched", "LP-FT", "shrink and perturb")
    assert record.rivals == {"LP-FT": "lp-ft", "shrink and perturb": "shrink-perturb"}
    assert record.design is not None
    assert (record.design.outcome, record.design.margin) == ("auc", 0.02)
    assert record.design.plans == ()
    assert (record.optimizer, record.schedule, record.augment) == ("sgd", "poly", ("flip",))
    assert (run / "plans" / "shrink and perturb.json").is_file()
    assert "No verdict" in said or "nothing is claimed" in said


# A stop


def wait_for_steps(events: Path, count: int, *, patience_s: float = 90.0) -> None:
    """Return once so many steps were told of."""
    limit = time.monotonic() + patience_s
    while time.monotonic() < limit:
        if events.exists() and events.read_text(encoding="utf-8").count('"event": "step"') >= count:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{events.name} never told of {count} steps")


def endless(tmp_path: Path, good_plan: Path) -> list[str]:
    """A fine-tune that nobody would wait for."""
    return [
        *("finetune", *TINY, "--data", "bloodmnist", "--plan", str(good_plan), *SMALL_RUN),
        *("--steps", "100000", "--seeds", "0", "--lr", "1e-5", "--out", str(tmp_path / "run")),
        *("--events", str(tmp_path / "events.jsonl"), "--stop-file", str(tmp_path / "stop")),
    ]


def check_stopped(tmp_path: Path) -> None:
    """A stopped run has written what it did, and no arm is further than a step ahead."""
    rows = rows_of(tmp_path / "run")
    told = events_of(tmp_path / "events.jsonl")
    steps = [row for row in told if row["event"] == "step"]
    assert told[-1]["event"] == "stopped"
    assert len(rows) == len(steps) >= 6
    done = [sum(row["arm"] == arm for row in rows) for arm in ("untouched", "plan")]
    assert done[0] - done[1] in (0, 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["finished"] is False
    assert summary["steps_done"] == len([row for row in rows if row["step"] != "0"])


def test_a_stop_file_ends_a_run_with_its_steps_written(
    command: Callable[..., Answer], tmp_path: Path, good_plan: Path
) -> None:
    def asks() -> None:
        wait_for_steps(tmp_path / "events.jsonl", 6)
        (tmp_path / "stop").touch()

    asker = threading.Thread(target=asks)
    asker.start()
    code, said, err = command(*endless(tmp_path, good_plan))
    asker.join()

    assert (code, err) == (0, "")
    assert "(stopped)" in said
    check_stopped(tmp_path)


def test_sigterm_ends_a_run_with_its_steps_written(tmp_path: Path, good_plan: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "core", *endless(tmp_path, good_plan)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_steps(tmp_path / "events.jsonl", 6)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        took_s = time.monotonic() - asked
    finally:
        process.kill()
        process.communicate()

    assert (process.returncode, err) == (0, "")
    assert "(stopped)" in out
    # A step of this network takes hundredths of a second.
    assert took_s < 5
    check_stopped(tmp_path)


def test_a_stop_before_the_first_step_is_no_failure(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "stop").touch()

    code, out, err = command(
        *(*MEASURE[:-1], tmp_path / "diagnosis.json", "--stop-file", tmp_path / "stop"),
    )

    assert (code, out) == (0, "")
    assert "nothing was written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stop"]


def test_a_command_gives_the_signal_handlers_back(
    command: Callable[..., Answer], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    command("list", "schemes")
    command("apply", "gone.json", "--out", tmp_path / "x")

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_reader_that_has_had_enough_is_no_failure() -> None:
    reading, writing = os.pipe()
    os.close(reading)

    process = subprocess.run(
        [sys.executable, "-m", "core", "list", "models"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(writing)

    assert process.returncode == 0
    assert process.stderr == b""
