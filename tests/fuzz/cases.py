"""Generators of odd, damaged and hostile input: a seed and a number give one case, always the same.

A case is one command. What must be refused says so; of the rest any answer is right as long as it
is one: done, or one line that says what is wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from core.catalogue.rules import RULES
from core.catalogue.schemes import SCHEMES
from tests.fuzz.corpus import MODEL, Corpus

Expected = Literal["refused", "any"]

# Names that a terminal, a page, a file system or JSON may stumble over.
ODD_NAMES = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "line\nbreak",
    "carriage\rreturn",
    "bell\x07",
    "c1\x9b31m",
    "\u202eright to left",
    "\u2066isolate\u2069",
    "zero\u200bwidth",
    "![x](http://127.0.0.1:9/x.png)",
    "<script>alert(1)</script>",
    "{braces} %s %(x)s",
    "'quotes\"",
    "../up",
    "~",
    "-dash",
    "--out",
    " ",
    "a" * 200,
    "ä" * 120,
    "\U0001f9e0",
    "CON",
    "dot.",
    "*?[a",
    "(unclosed",
    "\udcff\udcfe",
)
ODD_NUMBERS = (
    *("0", "-1", "1", "1.5", "1e309", "-inf", "nan", "1_000", "٣", "", " ", "0x10", "1e-400"),
    *("9" * 400, str(2**31), str(2**63), str(-(2**63)), "NaN", "true", "1,2", "1/2", "2/1", "0/0"),
)
# Options that make a random command cheap; a command line takes the last of two.
CHEAP: Mapping[str, tuple[str, ...]] = {
    "measure": ("--samples", "4", "--batch-size", "2", "--image-size", "32"),
    "preview": ("--samples", "4", "--batch-size", "2", "--image-size", "32"),
    "plan": ("--samples", "4", "--batch-size", "2", "--image-size", "32"),
    "finetune": (
        *("--steps", "1", "--batch-size", "2", "--seeds", "0", "--image-size", "32"),
        *("--train-images", "4", "--val-images", "2"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One command, and what must come of it."""

    argv: tuple[str, ...]
    expected: Expected = "any"
    about: str = ""


Maker = Callable[[random.Random, Corpus, Path], Case]


def make(kind: str, index: int, seed: int, corpus: Corpus, scratch: Path) -> Case:
    """Return case `index` of a kind, its files written below `scratch`."""
    return KINDS[kind](random.Random(f"{seed} {kind} {index}"), corpus, scratch)


# Commands that use a file of some sort.


def _network(checkpoint: Path) -> tuple[str, ...]:
    return ("--model", MODEL, "--checkpoint", str(checkpoint))


def _with_weights(
    noise: random.Random, corpus: Corpus, scratch: Path, weights: Path
) -> tuple[str, ...]:
    out = str(scratch / "out.json")
    images = ("--data", str(corpus.zipped))
    return noise.choice(
        (
            ("plan", *_network(weights), "--classes", "2", "--layers", "conv1", "--out", out),
            ("plan", *_network(weights), "--rule", "weight-magnitude", "--out", out),
            ("measure", *_network(weights), *images, *CHEAP["measure"], "--out", out),
            (
                *("finetune", *_network(weights), *images, *CHEAP["finetune"]),
                *("--out", str(scratch / "run")),
            ),
        )
    )


def _with_data(noise: random.Random, corpus: Corpus, scratch: Path, data: str) -> tuple[str, ...]:
    out = str(scratch / "out.json")
    network = _network(corpus.weights)
    return noise.choice(
        (
            ("plan", *network, "--data", data, "--layers", "conv1", "--out", out),
            ("measure", *network, "--data", data, *CHEAP["measure"], "--out", out),
            ("preview", str(corpus.plan), "--data", data, *CHEAP["preview"]),
            (
                *("finetune", *network, "--data", data, *CHEAP["finetune"]),
                *("--out", str(scratch / "run")),
            ),
        )
    )


def _with_plan(noise: random.Random, corpus: Corpus, scratch: Path, plan: Path) -> tuple[str, ...]:
    other = str(scratch / "other.json")
    return noise.choice(
        (
            ("apply", str(plan), "--out", str(scratch / "out.safetensors")),
            ("preview", str(plan)),
            ("verify", str(plan), str(corpus.edited)),
            ("diff", str(plan), str(corpus.plan)),
            ("diff", str(corpus.plan), str(plan)),
            ("compose", str(plan), str(corpus.masked), "--out", other),
            ("export", str(plan), "--out", str(scratch / "export")),
            ("plan", "--rule", "random", "--like", str(plan), "--out", other),
            (
                *("finetune", *_network(corpus.weights), "--data", str(corpus.zipped)),
                *("--plan", str(plan), *CHEAP["finetune"], "--out", str(scratch / "run")),
            ),
        )
    )


def _with_diagnosis(
    noise: random.Random, corpus: Corpus, scratch: Path, diagnosis: Path
) -> tuple[str, ...]:
    rule = noise.choice(("threshold", "redo", "grama"))
    return noise.choice(
        (
            ("judge", str(diagnosis)),
            ("judge", str(diagnosis), "--json"),
            ("judge", str(diagnosis), "--preset", "redo"),
            (
                *("plan", "--diagnosis", str(diagnosis), "--rule", rule),
                *("--metric", "grad_l2") * (rule == "threshold"),
                *("--out", str(scratch / "out.json")),
            ),
        )
    )


# Damage.


def damaged(noise: random.Random, data: bytes) -> bytes:
    """Return bytes with a few flips, cuts, repeats or insertions."""
    content = bytearray(data)
    for _ in range(noise.choice((1, 1, 1, 2, 5, 30))):
        if not content:
            break
        at = noise.randrange(len(content))
        how = noise.randrange(7)
        if how == 0:
            content[at] ^= 1 << noise.randrange(8)
        elif how == 1:
            content[at] = noise.choice((0, 255, 0x7F, 0x80, 0x0A, 0x22))
        elif how == 2:
            del content[at:]
        elif how == 3:
            del content[at : at + noise.choice((1, 4, 100, 10_000))]
        elif how == 4:
            content[at:at] = noise.randbytes(noise.choice((1, 8, 1000)))
        elif how == 5:
            content[at : at + 8] = noise.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"))
        else:
            content[at:at] = content[at : at + noise.choice((4, 64, 4096))]
    return bytes(content)


def odd_value(noise: random.Random, depth: int = 0) -> Any:
    """Return some JSON value nobody expects."""
    plain: tuple[Any, ...] = (
        *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63), 10**400),
        *(float("nan"), float("inf"), -float("inf"), "", "0", "\0", "a" * 100_000, [], {}),
        *("hf-hub:timm/resnet18", "local-dir:/etc", "http://127.0.0.1:9/x", "/dev/zero", "/etc"),
        *ODD_NAMES,
    )
    if depth < 2 and noise.random() < 0.2:
        inside = odd_value(noise, depth + 1)
        return noise.choice(([inside] * 3, {"x": inside}, [inside] * 5000))
    return noise.choice(plain)


def altered(noise: random.Random, document: Any) -> Any:
    """Return a JSON document with a few of its values, keys or items changed."""
    document = json.loads(json.dumps(document))
    for _ in range(noise.choice((1, 1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        stack = [document]
        while stack:
            here = stack.pop()
            inside = here.items() if isinstance(here, dict) else enumerate(here)
            for key, value in inside:
                places.append((here, key))
                if isinstance(value, (dict, list)):
                    stack.append(value)
        if not places:
            break
        # Small documents have few keys near the root and thousands of indices below.
        near = places[: max(1, len(places) // 50)] if noise.random() < 0.5 else places
        holder, key = noise.choice(near)
        how = noise.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.extend([holder[key]] * noise.choice((1, 3, 3000)))
        elif how == 2 and isinstance(holder, dict):
            holder[str(odd_value(noise))[:500]] = holder[key]
        elif how == 3:
            other, place = noise.choice(places)
            try:
                holder[key] = json.loads(json.dumps(other[place]))
            except (KeyError, IndexError):
                holder[key] = None
        else:
            holder[key] = odd_value(noise)
    return document


def written(noise: random.Random, document: Any) -> bytes:
    """Return JSON as bytes, now and then in an odd spelling."""
    try:
        text = json.dumps(document, ensure_ascii=noise.random() < 0.5)
    except ValueError:
        text = "{}"
    data = text.encode("utf-8", "surrogatepass")
    how = noise.randrange(12)
    if how == 0:
        return b"\xef\xbb\xbf" + data
    if how == 1:
        return text.encode("utf-16", "surrogatepass")
    if how == 2:
        return data + noise.choice((b"\0", b"}", b"garbage", data))
    if how == 3:
        return b"[" * noise.choice((100, 5_000, 200_000)) + data
    if how == 4:
        return data.replace(b'"name"', b'"name": 1, "name"', 1)
    return data


# Kinds.


def _options(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A command line made of the parser's own options, with sound and odd values."""
    from core.cli import _parser

    action = next(
        each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction)
    )
    command = noise.choice(sorted(action.choices))
    sound = {
        "model": (MODEL, "test_resnet", "tf_efficientnet_lite0"),
        "checkpoint": (str(corpus.weights), str(corpus.tensors)),
        "data": (str(corpus.images), str(corpus.zipped), str(corpus.arrays), "bloodmnist"),
        "plan": (str(corpus.plan), str(corpus.masked)),
        "like": (str(corpus.plan), str(corpus.masked)),
        "first": (str(corpus.plan), str(corpus.edited)),
        "second": (str(corpus.masked), str(corpus.tensors)),
        "weights": (str(corpus.edited), "none", "pretrained"),
        "diagnosis": (str(corpus.diagnosis),),
        "parts": (str(corpus.part),),
        "layers": ("conv1", "layer*", "*"),
        "freeze": ("conv1", "layer4*", "*"),
        "units": ("conv1=0", "layer1.0.conv1=0,1"),
        "rule": tuple(rule.name for rule in RULES),
        "scheme": tuple(SCHEMES),
        "metric": ("grad_l2", "dormant_fraction", "unit_dormant", "nothing"),
        "preset": ("limber", "redo", "nothing"),
        "threshold": ("0.1", "dead-units=0.1", "dead-units=x"),
        "lr_factor": ("conv1=0.1", "*=0", "conv1=-1"),
        "set": ("scale=0", "shrink=0.5", "steps=3"),
        "dtype": ("float32", "bfloat16", "int8"),
        "device": ("cpu", "auto", "cuda", "mps"),
        "what": ("models", "metrics", "rules", "nothing"),
    }
    # Never unlimited: a random command may be sound, and would then do what it says.
    writes = {"out": str(scratch / "out.json"), "events": str(scratch / "events.jsonl")}
    argv: list[str] = [command]
    for each in action.choices[command]._actions:
        if isinstance(each, argparse._HelpAction):
            continue
        wanted = each.required or not each.option_strings or noise.random() < 0.15
        if not wanted or (each.dest == "what" and noise.random() < 0.1):
            continue
        if each.option_strings:
            argv.append(each.option_strings[-1])
            if each.nargs == 0:
                continue
        if each.dest in writes and noise.random() < 0.9:
            argv.append(writes[each.dest])
        elif each.dest in sound and noise.random() < 0.8:
            argv.append(noise.choice(sound[each.dest]))
        else:
            argv.append(noise.choice((*ODD_NUMBERS, *ODD_NAMES)))
    cheap = CHEAP.get(command, ())
    if noise.random() < 0.9:
        argv += cheap
    elif cheap:
        place = noise.randrange(0, len(cheap), 2)
        argv += cheap[:place] + cheap[place + 2 :]
        argv += (cheap[place], noise.choice(("0", "-1", "1", "nan", "", "x", "1.5")))
    return Case(argv=tuple(argv))


def _paths(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A sound command with one path that leads to no ordinary file of that sort."""
    bad, about = odd_path(noise, scratch)
    which = noise.choice(("weights", "data", "plan", "diagnosis", "part", "events", "out"))
    if which == "weights":
        argv = _with_weights(noise, corpus, scratch, Path("@"))
    elif which == "data":
        argv = _with_data(noise, corpus, scratch, "@")
    elif which == "plan":
        argv = _with_plan(noise, corpus, scratch, Path("@"))
    elif which == "diagnosis":
        argv = _with_diagnosis(noise, corpus, scratch, Path("@"))
    elif which == "part":
        argv = ("merge", str(corpus.part), "@", "--out", str(scratch / "out.json"))
    elif which == "events":
        argv = ("apply", str(corpus.plan), "--out", str(scratch / "w.safetensors"), "--events", "@")
    else:
        argv = ("apply", str(corpus.plan), "--out", "@")
    expected: Expected = "refused" if which not in ("events", "out") else "any"
    return Case(
        argv=tuple(bad if each == "@" else each for each in argv),
        expected=expected,
        about=f"{which}: {about}",
    )


def odd_path(noise: random.Random, scratch: Path) -> tuple[str, str]:
    """Return a path that is no file to read, and what it is."""
    place = scratch / noise.choice(("x.json", "x.pth", "x.safetensors", "x.zip", "x.npz", "x"))
    how = noise.choice(
        (
            *("missing", "folder", "fifo", "device", "dangling", "loop", "empty", "sparse"),
            *("nul", "long", "name", "socket", "below a file", "noise", "locked"),
        )
    )
    if how == "folder":
        place.mkdir()
    elif how == "fifo":
        os.mkfifo(place)
    elif how == "device":
        return noise.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/random")), how
    elif how == "dangling":
        place.symlink_to(scratch / "nowhere")
    elif how == "loop":
        place.symlink_to(place)
    elif how == "empty":
        place.touch()
    elif how == "sparse":
        with place.open("wb") as file:
            file.truncate(2**40)
    elif how == "nul":
        return f"{place}\0x", how
    elif how == "long":
        return str(scratch / ("a" * 5000)), how
    elif how == "name":
        return str(scratch / noise.choice(ODD_NAMES).replace("/", "")), how
    elif how == "socket":
        short = Path(f"/tmp/limber-fuzz-{os.getpid()}-{noise.getrandbits(40)}")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(short))
        shutil.move(short, place)
    elif how == "below a file":
        place.write_bytes(b"{}")
        return str(place / "x"), how
    elif how == "noise":
        place.write_bytes(noise.randbytes(noise.choice((1, 8, 100, 5000))))
    elif how == "locked":
        place.write_bytes(b"{}")
        place.chmod(0)
    return str(place), how


def _checkpoints(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A file of weights with bytes that are not those that were written."""
    sound = noise.choice((corpus.weights, corpus.tensors))
    place = scratch / f"x{sound.suffix}"
    place.write_bytes(damaged(noise, sound.read_bytes()))
    return Case(argv=_with_weights(noise, corpus, scratch, place))


def _tensors(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A state dict that holds something which is no weight of this network."""
    state = torch.load(corpus.weights, weights_only=True)
    # The head is drawn anew for the images' classes, whatever the file holds in its place.
    matrices = [key for key, value in state.items() if value.ndim > 1]
    name = noise.choice([key for key in matrices if not key.startswith("fc.")])
    old = state[name]
    chance = torch.Generator().manual_seed(noise.getrandbits(32))
    odd: dict[str, Callable[[], Any]] = {
        "int8": lambda: old.to(torch.int8),
        "int64": lambda: old.to(torch.int64),
        "bool": lambda: old > 0,
        "complex": lambda: old.to(torch.complex64),
        "sparse": old.to_sparse,
        "csr": old.reshape(len(old), -1).to_sparse_csr,
        "quantised": lambda: torch.quantize_per_tensor(old, 0.1, 0, torch.qint8),
        "nan": lambda: torch.where(torch.rand(old.shape, generator=chance) < 0.1, torch.nan, old),
        "inf": lambda: torch.full_like(old, torch.inf),
        "stretched": lambda: torch.zeros(1).expand(10**10),
        "shape": lambda: old.reshape(-1),
        "empty": lambda: old[:0],
        "scalar": old.sum,
        "none": lambda: None,
        "text": lambda: "weights",
        "number": lambda: 1.0,
        "list": lambda: [old],
        "nested": lambda: {"a": {"b": old}},
        "jagged": lambda: torch.nested.nested_tensor([old.flatten(), old.flatten()[:3]]),
        "meta": lambda: old.to("meta"),
    }
    how = noise.choice(sorted(odd))
    # PyTorch says of some of these that they are in beta: once a process, whoever asks first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state[name] = odd[how]()
    place = scratch / "x.pth"
    torch.save(noise.choice((state, {"state_dict": state}, {"model": state})), place)
    return Case(
        argv=_with_weights(noise, corpus, scratch, place),
        expected="refused",
        about=f"{name}: {how}",
    )


def _bombs(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A small file that unpacks to gigabytes."""
    how = noise.choice(("npz", "npz header", "pth", "image zip", "safetensors", "json"))
    size = noise.choice((2**31, 2**32, 2**36))
    if how.startswith("npz"):
        place = scratch / "x.npz"
        shape = (size // 768, 16, 16, 3)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("train_images.npy", "w", force_zip64=True) as member:
                member.write(header.getvalue())
                if how == "npz":
                    for _ in range(48):
                        member.write(bytes(2**24))
            for name in ("train_labels", "val_images", "val_labels"):
                labels = io.BytesIO()
                np.save(labels, np.zeros((4, 1), np.uint8))
                archive.writestr(f"{name}.npy", labels.getvalue())
        return Case(
            argv=_with_data(noise, corpus, scratch, str(place)), expected="refused", about=how
        )
    if how == "pth":
        place = scratch / "x.pth"
        packed = io.BytesIO()
        state = torch.load(corpus.weights, weights_only=True)
        state["bomb"] = torch.zeros(4)
        torch.save(state, packed)
        with (
            zipfile.ZipFile(packed) as sound,
            zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            members = sound.namelist()
            for member in members:
                data = sound.read(member)
                with archive.open(member, "w", force_zip64=True) as out:
                    out.write(data)
                    if member == noise.choice(members) or len(data) == 16:
                        for _ in range(48):
                            out.write(bytes(2**24))
        argv = _with_weights(noise, corpus, scratch, place)
        return Case(argv=argv, expected="refused", about=how)
    if how == "image zip":
        place = scratch / "x.zip"
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for label in ("a", "b"):
                for i in range(2):
                    name = f"{label}/{i}.png"
                    with archive.open(name, "w", force_zip64=True) as member:
                        for _ in range(16):
                            member.write(bytes(2**24))
        argv = _with_data(noise, corpus, scratch, str(place))
        # Names alone make a plan; who reads the images must refuse.
        return Case(argv=argv, expected="any" if argv[0] == "plan" else "refused", about=how)
    if how == "safetensors":
        place = scratch / "x.safetensors"
        header = json.dumps(
            {"conv1.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, size * 4]}}
        ).encode()
        place.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        argv = _with_weights(noise, corpus, scratch, place)
        return Case(argv=argv, expected="refused", about=how)
    place = scratch / "x.json"
    document = json.loads(corpus.plan.read_text(encoding="utf-8"))
    document["targets"] = document["targets"] * 1 + [
        {**document["targets"][0], "layer": f"layer{i}"}
        for i in range(noise.choice((20_000, 10**5)))
    ]
    place.write_text(json.dumps(document), encoding="utf-8")
    return Case(argv=_with_plan(noise, corpus, scratch, place), expected="refused", about=how)


def _plans(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A plan with values changed."""
    sound = noise.choice((corpus.plan, corpus.masked))
    place = scratch / sound.name
    for companion in corpus.folder.glob("*.masks.safetensors"):
        shutil.copy(companion, scratch / companion.name)
    document = altered(noise, json.loads(sound.read_text(encoding="utf-8")))
    place.write_bytes(written(noise, document))
    return Case(argv=_with_plan(noise, corpus, scratch, place))


def _companions(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A plan beside a companion with bytes changed: its digest gives it away."""
    place = scratch / corpus.masked.name
    shutil.copy(corpus.masked, place)
    companion = scratch / "masked.masks.safetensors"
    sound = (corpus.folder / companion.name).read_bytes()
    changed = damaged(noise, sound)
    while changed == sound:
        changed = damaged(noise, changed)
    companion.write_bytes(changed)
    return Case(argv=_with_plan(noise, corpus, scratch, place), expected="refused")


def _diagnoses(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A diagnosis, or its companion, with values changed."""
    place = scratch / corpus.diagnosis.name
    units = "diagnosis.units.safetensors"
    data, beside = corpus.diagnosis.read_bytes(), (corpus.folder / units).read_bytes()
    if noise.random() < 0.8:
        data = written(noise, altered(noise, json.loads(data)))
    else:
        beside = damaged(noise, beside)
    place.write_bytes(data)
    (scratch / units).write_bytes(beside)
    return Case(argv=_with_diagnosis(noise, corpus, scratch, place))


def _parts(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A part with bytes changed: its digest gives it away."""
    place = scratch / "part2.safetensors"
    sound = corpus.part.read_bytes()
    changed = damaged(noise, sound)
    while changed == sound:
        changed = damaged(noise, changed)
    place.write_bytes(changed)
    argv = ("merge", str(corpus.part), str(place), "--out", str(scratch / "out.json"))
    return Case(argv=argv, expected="refused")


def _archives(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A zip or npz file with bytes changed."""
    sound = noise.choice((corpus.zipped, corpus.arrays))
    place = scratch / f"x{sound.suffix}"
    place.write_bytes(damaged(noise, sound.read_bytes()))
    return Case(argv=_with_data(noise, corpus, scratch, str(place)))


def _folders(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """A folder of images with odd names, links, loops, pipes and stray files in it."""
    place = scratch / "images"
    shutil.copytree(corpus.images, place)
    folders = [path for path in place.rglob("*") if path.is_dir()]
    for _ in range(noise.choice((1, 1, 2, 4))):
        inside = noise.choice(folders)
        name = noise.choice(ODD_NAMES).replace("/", "_")[:80] + noise.choice((".png", "", ".jpg"))
        odd = inside / name
        if odd.exists() or odd.is_symlink():
            continue
        how = noise.randrange(8)
        if how == 0:
            odd.symlink_to(noise.choice((place, scratch, Path("nowhere"), odd, Path("/"))))
        elif how == 1:
            os.mkfifo(odd)
        elif how == 2:
            odd.mkdir()
            shutil.copy(corpus.images / "train" / "left" / "0.png", odd / "0.png")
        elif how == 3:
            odd.write_bytes(noise.randbytes(100))
        elif how == 4:
            shutil.copy(corpus.images / "train" / "left" / "0.png", odd)
        elif how == 5:
            with odd.open("wb") as file:
                file.truncate(2**36)
        elif how == 6 and inside != place:
            inside.rename(inside.with_name(name.removesuffix(".png")))
            folders = [path for path in place.rglob("*") if path.is_dir() and not path.is_symlink()]
        else:
            odd.touch()
    return Case(argv=_with_data(noise, corpus, scratch, str(place)))


def _names(noise: random.Random, corpus: Corpus, scratch: Path) -> Case:
    """Odd text wherever a person or a file may name something."""
    name = noise.choice(ODD_NAMES)
    network = _network(corpus.weights)
    out = str(scratch / "out.json")
    cheap = CHEAP["measure"]
    return Case(
        argv=noise.choice(
            (
                ("plan", *network, "--layers", "conv1", "--name", name, "--out", out),
                ("plan", *network, "--layers", name, "--out", out),
                ("plan", *network, "--layers", name, "--syntax", "regex", "--out", out),
                ("plan", *network, "--layers", "conv1", "--freeze", name, "--out", out),
                ("plan", "--model", name, "--layers", "*", "--out", out),
                ("plan", "--model", f"timm:{name}", "--layers", "*", "--out", out),
                ("plan", "--model", f"torchvision:{name}", "--layers", "*", "--out", out),
                ("measure", *network, "--data", name, *cheap, "--out", out),
                ("measure", *network, "--data", f"torchvision:{name}:/tmp", "--out", out),
                ("apply", str(corpus.plan), "--out", str(scratch / name.replace("/", "_"))),
                ("plan", *network, "--layers", "conv1", "--set", name, "--out", out),
                ("judge", str(corpus.diagnosis), "--preset", name),
                ("judge", str(corpus.diagnosis), "--threshold", name),
                ("list", name),
                (name,),
            )
        )
    )


KINDS: Mapping[str, Maker] = {
    "options": _options,
    "paths": _paths,
    "checkpoints": _checkpoints,
    "tensors": _tensors,
    "bombs": _bombs,
    "plans": _plans,
    "companions": _companions,
    "diagnoses": _diagnoses,
    "parts": _parts,
    "archives": _archives,
    "folders": _folders,
    "names": _names,
}


def spread(total: int) -> Mapping[str, int]:
    """Return how many cases each kind gets of a total, the costly ones fewer."""
    rare = {"bombs": 0.02, "folders": 0.06, "tensors": 0.06}
    left = [kind for kind in KINDS if kind not in rare]
    share = (1 - sum(rare.values())) / len(left)
    counts = {kind: round(total * rare.get(kind, share)) for kind in KINDS}
    counts["options"] += max(0, total - sum(counts.values()))
    return counts


def kinds_of(text: str) -> Sequence[str]:
    """Return the kinds that a list with commas names.

    Raises:
        ValueError: There is no such kind.
    """
    found = text.split(",")
    known = (*KINDS, "images")
    unknown = [kind for kind in found if kind not in known]
    if unknown:
        raise ValueError(f'There is no kind "{unknown[0]}". Known: {", ".join(known)}.')
    return found
