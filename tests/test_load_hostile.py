"""Files and names that mean harm are refused with one line, in little memory, or read as they are.

The generators are in `tests/hostile.py` and `tests/attacks.py`; here each kind goes through once
where it is cheap. The long run is a command of its own.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch

from core.cli.events import Events
from core.errors import DataError, ModelError, OptionError, PlanError
from core.files.diagnoses import read_diagnosis
from core.files.inputs import JSONError, read_input, strict_json
from core.files.plans import read_plan
from core.load import read_checkpoint
from core.load.checkpoints import check_checkpoint
from core.load.models import check_spec
from core.load.sources import open_folder, open_npz, open_zip
from core.pipeline.parts import merge_parts
from core.plan import making
from core.records import ModelSpec
from core.text import printable
from tests import attacks, hostile
from tests.hostile import Hostile

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]
# A refusal may take so much beside the interpreter and torch.
MOST_MB = 90


def each(made: Iterator[Hostile]) -> Any:
    return pytest.mark.parametrize("file", [pytest.param(one, id=one.name) for one in made])


# Ordinary files alone


@pytest.mark.parametrize(
    ("suffix", "read", "refusal"),
    [
        (".json", read_plan, PlanError),
        (".pth", read_checkpoint, ModelError),
        (".safetensors", read_checkpoint, ModelError),
        (".npz", open_npz, DataError),
        (".zip", open_zip, DataError),
        (".json", read_diagnosis, OptionError),
        (".safetensors", lambda path: merge_parts([path]), OptionError),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(
    suffix: str, read: Callable[[Path], object], refusal: type[Exception], tmp_path: Path
) -> None:
    for i, place in enumerate(hostile.places(suffix)):
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises(refusal):
            read(place.make(folder))


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))

    assert read_input(tmp_path / "file", most=1000) == bytes(1000)
    with pytest.raises(OSError, match="larger than 999 bytes") as found:
        read_input(tmp_path / "file", most=999)
    assert found.value.errno == errno.EFBIG
    # Files of the system say they are empty and are not.
    assert read_input(Path("/proc/self/status"), most=2**20).startswith(b"Name:")
    with pytest.raises(OSError, match="larger than 8 bytes"):
        read_input(Path("/proc/self/status"), most=8)


# JSON


@each(one for one in hostile.json_bombs({"a": 1}, "x.json") if one.name != "300,000 unknown keys")
def test_json_that_cannot_be_meant_is_refused(file: Hostile, tmp_path: Path) -> None:
    meant = {"1e999", "a list", "a word", "null", "half a letter"}
    try:
        strict_json(read_input(file.make(tmp_path), most=2**26), most_values=10**6)
    except (JSONError, OSError):
        return
    assert file.name.removeprefix("the number ") in meant


# Weights


BOMBS = [*hostile.checkpoint_bombs(100)]


@each(iter(BOMBS))
def test_weights_that_are_not_what_they_claim_are_refused(file: Hostile, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r'^"w\.(pth|pt|safetensors)" '):
        read_checkpoint(file.make(tmp_path))


@each(hostile.odd_checkpoints())
def test_tensors_of_another_kind_are_refused_or_are_plain(file: Hostile, tmp_path: Path) -> None:
    path = file.make(tmp_path)
    if file.refused:
        with pytest.raises(ModelError, match=r'^"w\.pt" '):
            read_checkpoint(path)
        return

    (value,) = read_checkpoint(path).values()

    stored = next(iter(torch.load(path).values()))
    wide = torch.complex128 if stored.is_complex() else torch.float64
    assert torch.equal(value.to(wide), stored.to(wide))
    assert not value.is_conj()
    assert not value.is_neg()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_is_read_as_pytorch_reads_it(legacy: bool, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    network(torch.randn(5, 4)).sum().backward()
    optimiser = torch.optim.AdamW(network.parameters(), amsgrad=True)
    optimiser.step()
    content = {
        "epoch": 3,
        "args": {"lr": 0.1, "betas": (0.9, 0.99), "names": {"a", "b"}, "raw": b"\x00\xff"},
        "state_dict": network.half().state_dict(),
        "optimizer": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "complex": 1 + 2j,
        "tied": network.state_dict(),
        "narrow": torch.ones(2, dtype=torch.bfloat16 if legacy else torch.uint16),
    }
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)

    found = read_checkpoint(tmp_path / "w.pt")

    assert found.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(found[name], value)
    held = sum(value.nbytes for value in network.state_dict().values())
    assert check_checkpoint(tmp_path / "w.pt") > held


def test_bombs_are_refused_and_optimisers_left_alone_in_little_memory(tmp_path: Path) -> None:
    # In a process of its own, whose greatest size is that of these refusals.
    script = """
import resource, sys
from pathlib import Path
from core.errors import LimberError
from core.load import read_checkpoint
from core.load.sources import open_npz
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
start, refused = most(), 0
for line in sys.stdin:
    path = Path(line.strip())
    try:
        (open_npz if path.suffix == ".npz" else read_checkpoint)(path)
    except LimberError:
        refused += 1
print(refused, most() - start)
start = most()
print(float(read_checkpoint(Path(sys.argv[1]))["a"].sum()), most() - start)
"""
    beside = torch.ones(100 * 2**18)
    torch.save({"state_dict": {"a": torch.ones(4)}, "optimizer": beside}, tmp_path / "w.pt")
    paths = []
    costly = {"millions of sets", "one storage, a thousand tensors", "a header of gigabytes"}
    bombs = [*BOMBS, *hostile.npz_bombs(100)]
    for i, bomb in enumerate(bomb for bomb in bombs if bomb.name not in costly):
        folder = tmp_path / str(i)
        folder.mkdir()
        paths.append(bomb.make(folder))

    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "w.pt")],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )

    refused, grown_mb, total, beside_mb = map(float, ended.stdout.split())
    assert refused == len(paths)
    assert grown_mb < MOST_MB
    assert total == 4
    assert beside_mb < MOST_MB


def hollow(path: Path, numbers: int) -> Path:
    """Write a safetensors file of that many zeros, for which the disk keeps no room."""
    row = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    header = hostile.with_header(json.dumps({"a": row}).encode())
    path.write_bytes(header)
    os.truncate(path, len(header) + 4 * numbers)
    return path


def test_weights_for_a_far_smaller_network_are_refused(tmp_path: Path, run: Run) -> None:
    code, _, wrong = run(
        *("plan", "--model", "timm:test_resnet", "--layers", "conv1.0"),
        *("--checkpoint", hollow(tmp_path / "w.safetensors", 2**25)),
        *("--out", tmp_path / "plan.json"),
    )

    assert code == 2
    assert "the file has 128 MiB of them and the model takes " in wrong


def test_a_file_far_larger_than_the_plan_makes_is_not_read_through(
    plan: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    large = hollow(tmp_path / "w.safetensors", 2**30)

    code, _, wrong = run("verify", tmp_path / "plan.json", large)

    assert code == 2
    assert "holds 4 GiB of weights" in wrong


def test_a_tar_file_is_no_weights(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as file:
        file.addfile(tarfile.TarInfo("storages"), io.BytesIO())

    with pytest.raises(ModelError, match="no file of PyTorch's"):
        read_checkpoint(tmp_path / "w.tar")


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "much"])
def test_the_limit_of_a_file_of_weights_can_be_changed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "w.safetensors")
    monkeypatch.setenv("LIMBER_MAX_CHECKPOINT_GB", text)
    if text:
        with pytest.raises(OptionError, match="give a number of gigabytes above 0"):
            read_checkpoint(tmp_path / "w.safetensors")
    monkeypatch.setenv("LIMBER_MAX_CHECKPOINT_GB", "1e-7")
    os.truncate(tmp_path / "w.safetensors", 1000)
    with pytest.raises(ModelError, match="Set LIMBER_MAX_CHECKPOINT_GB to a larger"):
        read_checkpoint(tmp_path / "w.safetensors")


# Arrays and folders of images


@each(hostile.npz_bombs(100))
def test_arrays_that_are_not_what_they_claim_are_refused(file: Hostile, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'^"set\.npz"'):
        open_npz(file.make(tmp_path))


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3)).astype(np.uint8)
    for i, (save, images) in enumerate(
        [
            (np.savez, pixels),
            (np.savez_compressed, np.asfortranarray(pixels)),
            (np.savez_compressed, pixels[..., 0]),
        ]
    ):
        save(
            tmp_path / f"{i}.npz",
            train_images=images,
            train_labels=np.arange(6).reshape(6, 1) % 2,
            test_images=images[:2],
            test_labels=np.array([0, 1], dtype=np.uint8),
        )
        source = open_npz(tmp_path / f"{i}.npz")
        opened = [np.asarray(source.open(item)) for item in source.items if item.split == "train"]
        expected = images if images.ndim == 4 else np.repeat(images[..., None], 3, -1)
        assert np.array_equal(np.stack(opened), expected)


def test_an_npz_file_beyond_the_limit_says_which_setting_raises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64)).astype(np.uint8)
    labels = np.arange(8)
    np.savez(
        tmp_path / "set.npz",
        train_images=noise,
        train_labels=labels,
        val_images=noise,
        val_labels=labels,
    )
    monkeypatch.setenv("LIMBER_MAX_NPZ_GB", "6e-5")
    with pytest.raises(DataError, match=r"unpacks to 64 KiB .* Set LIMBER_MAX_NPZ_GB"):
        open_npz(tmp_path / "set.npz")
    monkeypatch.setenv("LIMBER_MAX_NPZ_GB", "7e-5")
    assert len(open_npz(tmp_path / "set.npz").items) == 16


def test_names_that_are_not_utf_8_are_spelt_out(tmp_path: Path) -> None:
    for label in ("a\udcff", "b"):
        (tmp_path / label).mkdir()
        for i in range(2):
            (tmp_path / label / f"{i}\udcfe.png").write_bytes(attacks._picture(i))

    source = open_folder(tmp_path)

    assert source.classes == ("a\\udcff", "b")
    for item in source.items:
        item.name.encode()
        assert source.open(item).size == (32, 32)


def test_folders_nested_without_end_in_a_zip_are_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for i in range(40):
            file.writestr("x/" * 10_000 + f"{i % 2}/{i}.png", b"")

    with pytest.raises(DataError, match="holds no images"):
        open_zip(tmp_path / "set.zip")


# Plans


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from core.cli import main

    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", *attacks.CLASSES, "--layers", "conv1.0", "--out", str(path)]) == 0
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# What is no fault of the file alone: names are looked up later, numbers may be large.
LATER = (
    *("a model named '.'", "the checkpoint", "the companion", "a thousand seeds"),
    *("20,001 patterns", "an index far out", "the seed 0"),
)


@each(hostile.plans({}))
def test_a_plan_with_what_no_plan_has_is_refused(
    file: Hostile, plan: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    change = next(each for each in hostile.plan_changes() if each[0] == file.name)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(hostile.changed_plan(plan, change)), encoding="utf-8")
    if not file.name.startswith(LATER):
        with pytest.raises(PlanError) as found:
            read_plan(path)
        assert len(str(found.value)) < 1_000
        return
    # It may be a plan; then the network or the files it names refuse it.
    code, _, wrong = run("apply", path, "--out", tmp_path / "w.safetensors")
    assert (code, wrong.count("\n")) == (0 if file.name == "the seed 0" else 2, 1 - (code == 0))


def test_twenty_thousand_names_take_no_longer_each_than_two_thousand(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    import gc
    import time

    took = []
    # A collection over all that the tests hold would count as reading.
    gc.disable()
    for count in (2_000, 20_000):
        names = [f"layer.{i}" for i in range(count)]
        rates = [{"layer": name, "factor": 1.0} for name in names]
        content = plan | {"freeze": names, "learning_rates": rates}
        text = json.dumps(content)
        tries = []
        for _ in range(3):
            begun = time.process_time()
            assert len(read_plan(text).freeze) == count
            tries.append(time.process_time() - begun)
        took.append(min(tries))
    gc.enable()

    # Ten times the names once took a hundred times as long: 7 s after 0.07 s.
    assert took[1] < 60 * took[0] + 0.5


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(source="timm", name="hf-hub:timm/resnet18.a1_in1k"),
        ModelSpec(source="timm", name="local-dir:."),
        ModelSpec(source="timm", name="hf_hub:timm/resnet18"),
        ModelSpec(source="timm", name="no_such_network"),
        ModelSpec(source="torchvision", name="timm/resnet18"),
        ModelSpec(source="embedded", name="resnet18"),
        ModelSpec(source="timm", name="test_resnet", kwargs={"pretrained_cfg": "hf-hub:a/b"}),
        ModelSpec(source="timm", name="test_resnet", kwargs={"dynamic_img_size": "yes"}),
        ModelSpec(source="torchvision", name="resnet18", kwargs={"weights": "DEFAULT"}),
    ],
    ids=lambda spec: spec.name,
)
def test_a_specification_from_elsewhere_names_a_model_of_its_library(spec: ModelSpec) -> None:
    with pytest.raises(ModelError):
        check_spec(spec)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "timm:hf-hub:a/b", "timm:local-dir:."])
def test_hub_and_folder_names_are_refused_on_the_command_line(
    name: str, run: Run, tmp_path: Path
) -> None:
    code, _, wrong = run("plan", "--model", name, "--layers", "*", "--out", tmp_path / "p.json")

    assert code == 2
    assert "hf-hub" in wrong or "local-dir" in wrong


def test_an_expression_without_end_is_given_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ("plan", *attacks.CLASSES, "--syntax", "regex", "--out", tmp_path / "plan.json")

    with monkeypatch.context() as patch:
        patch.setattr(making, "SEARCH_S", 0.3)
        code, _, wrong = run(*slow, "--layers", r"([a-z0-9.]+)+!")
    assert code == 2
    assert "takes longer than" in wrong
    monkeypatch.setattr(making, "SEARCH_S", 60)
    assert run(*slow, "--layers", r"layer[12]\.\d+\.conv\d+")[0] == 0
    assert run(*slow, "--layers", "(" * 5_000)[0] == 2
    assert run(*slow, "--layers", "a{99999999999}")[0] == 2


# Events


def test_a_full_disk_loses_events_and_not_the_work(
    run: Run, tmp_path: Path, plan: dict[str, Any]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    (tmp_path / "events.jsonl").symlink_to("/dev/full")

    code, _, wrong = run(
        *("apply", path, "--out", tmp_path / "w.safetensors"),
        *("--events", tmp_path / "events.jsonl"),
    )

    assert code == 0
    assert (tmp_path / "w.safetensors").is_file()
    assert wrong.count("\n") == 1
    assert "could not be written to its end (No space left on device)." in wrong


class Disk:
    """A file on a disk that can be full: room for five bytes of a line, then for none."""

    def __init__(self, file: Any) -> None:
        self.file, self.full, self.began = file, False, False

    def write(self, data: bytes) -> int:
        if not self.full:
            return int(self.file.write(data))
        if self.began:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.began = True
        return int(self.file.write(data[:5]))

    def close(self) -> None:
        self.file.close()


def test_events_come_again_when_there_is_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"

    with Events(path, None, terminal=False) as events:
        disk = Disk(events._file)
        events._file = cast(Any, disk)
        events.emit("one")
        disk.full = True
        events.emit("late")
        events.emit("late too")
        events.emit("progress", done=1)
        disk.full = False
        events.emit("two", name="\x1b\u202e")

    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["one", "late", "late too", "two"]
    assert printable(lines[-1]) == lines[-1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("last", ["done", "error"])
def test_events_that_find_no_room_at_all_are_told_unless_a_refusal_is(
    last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Events(tmp_path / "events.jsonl", None, terminal=False) as events:
        disk = Disk(events._file)
        events._file = cast(Any, disk)
        disk.full = True
        events.emit("one")
        events.emit(last)

    assert capsys.readouterr().err.count("\n") == (last == "done")


def test_a_pipe_that_nobody_reads_takes_no_events(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionError, match="cannot be written"):
        Events(tmp_path / "pipe", None, terminal=False).__enter__()

    def slow_reader() -> None:
        with (tmp_path / "pipe").open("rb"):
            ended.wait()

    ended = threading.Event()
    reader = threading.Thread(target=slow_reader)
    reader.start()
    while True:
        try:
            events = Events(tmp_path / "pipe", None, terminal=False).__enter__()
            break
        except OptionError:
            continue
    for _ in range(50):
        events.emit("x", text="y" * 10_000)
    events.__exit__()
    ended.set()
    reader.join()


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "a\0b", "--out", "w"),
        ("measure", "--model", "a\0b", "--data", "x", "--out", "y"),
        ("judge", "x" * 5_000),
        ("plan", "--model", "timm:test_resnet", "--checkpoint", "x" * 5_000, "--out", "y"),
        ("preview", "gone.json", "--stop-file", "x" * 5_000),
        ("\x1b[2J",),
        ("list", "\u202e"),
    ],
)
def test_names_no_file_can_have_are_one_clean_line(arguments: tuple[str, ...]) -> None:
    ended = attacks.attempt("names", list(arguments))

    assert ended.code == 2
    assert ended.fault is None


def test_warnings_of_libraries_do_not_precede_the_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "w.pt")
    command = ["diff", str(tmp_path / "w.pt"), str(tmp_path / "w.pt")]

    def shown(message: object, *_: object, **__: object) -> None:
        print(message, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", shown)
        ended = attacks.attempt("warns", command)
        assert ended.err == (
            'limber: "w.pt" holds "a" as sparse. Save the state of a dense network that is '
            "loaded.\n"
        )
        assert warnings.showwarning is shown
        # Whoever asks for warnings gets them.
        monkeypatch.setattr(sys, "warnoptions", ["always"])
        assert attacks.attempt("warns", command).err.count("\n") > 1


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> attacks.Ground:
    return attacks.prepare(tmp_path_factory.mktemp("ground"), measured=False)


def test_a_slice_of_the_attacks_ends_in_clean_lines(
    ground: attacks.Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    faults = []
    for label, arguments in attacks.commands(ground, tmp_path / "s", rounds=3, seed=7, every=31):
        if arguments[0] in ("finetune", "measure", "preview"):
            continue
        ended = attacks.attempt(label, arguments)
        if ended.fault is not None:
            faults.append(f"{label}: {ended.fault}")

    assert faults == []


def test_no_attack_is_told_to_write_outside_its_folder(
    ground: attacks.Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.parent.iterdir())
    for value in ("/proc/x", "x", "../x", f"{tmp_path}/s/../x", f"{tmp_path}/sx"):
        with pytest.raises(RuntimeError, match="lies outside"):
            attacks._confined(["apply", "p", "--out", value], tmp_path / "s")

    for label, arguments in attacks._of_names(ground, tmp_path / "s"):
        attacks._confined(arguments, tmp_path / "s")
        assert label

    assert {path.name for path in tmp_path.iterdir()} == {"s"}
    assert set(tmp_path.parent.iterdir()) == before
