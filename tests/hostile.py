"""Inputs that mean harm: generators of files and names that every command and page must bear.

Each generator yields a `Hostile`: a name to report it by, and a function that writes it into a
folder and returns the path to give. `refused` says whether nothing in it is of use; the others
may be read or refused, but never end in a traceback, a hang or gigabytes. Random ones take a
seed, and the same seed gives the same file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import socket
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

MB = 2**20


@dataclass(frozen=True, slots=True)
class Hostile:
    """One input: its name, how it is made in a folder, and whether it must be refused."""

    name: str
    make: Callable[[Path], Path]
    refused: bool = True


# Names


NAMES = (
    "\x1b[2J\x1b]0;owned\x07",
    "two\nlimber: lines",
    "carriage\rreturn",
    "tab\tand\x00nul",
    "\x7fdelete\x9b31m",
    "\u202egnp.exe",
    "\u2066isolate\u2069",
    "line\u2028and\u2029paragraph",
    "zero\u200bwidth\ufeff",
    "\U000e0041tag",
    "half \ud83d",
    "not utf-8 \udcff",
    "<script>alert(1)</script>",
    "$(reboot) `reboot` ; reboot",
    "../../up/and/away",
    "/proc/self/mem",
    "hf-hub:someone/something",
    "local-dir:/tmp",
    "http://127.0.0.1:9/x",
    "%s%n{0}{x}",
    "CON",
    " ",
    "",
    "-rf",
    "--help",
    "long" * 30_000,
    "長" * 5_000,
)


# Places


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as opened:
        # A socket's address is short: it is bound under a short name.
        opened.bind(f"/tmp/limber-{os.getpid()}-{random.getrandbits(32)}")
        Path(opened.getsockname()).rename(path)
    return path


def _made(path: Path, make: Callable[[], object]) -> Path:
    make()
    return path


def places(suffix: str) -> Iterator[Hostile]:
    """Yield paths of a given ending at which no ordinary file is to be found."""
    name = f"place{suffix}"
    yield Hostile("a pipe", lambda folder: _pipe(folder / name))
    yield Hostile("a socket", lambda folder: _socket(folder / name))
    yield Hostile("a folder", lambda f: _made(f / name, (f / name).mkdir))
    for device in ("zero", "random", "full", "null", "tty"):
        yield Hostile(
            f"a link to /dev/{device}",
            lambda f, to=device: _made(f / name, lambda: (f / name).symlink_to(f"/dev/{to}")),
        )
    yield Hostile(
        "a dangling link", lambda f: _made(f / name, lambda: (f / name).symlink_to(f / "gone"))
    )
    yield Hostile("a loop", lambda f: _made(f / name, lambda: (f / name).symlink_to(f / name)))
    yield Hostile("nothing", lambda f: f / name)
    yield Hostile("a name too long", lambda f: f / ("x" * 5_000 + suffix))
    yield Hostile("below a file", lambda f: _made(f / "file" / name, (f / "file").touch))
    yield Hostile("an empty file", lambda f: _made(f / name, (f / name).touch))
    yield Hostile("a NUL", lambda f: f / f"nul\0{suffix}")


def written(name: str, content: bytes | str) -> Callable[[Path], Path]:
    """Return what writes a file of that name and content."""

    def make(folder: Path) -> Path:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return folder / name

    return make


def damaged(content: bytes, seed: int) -> bytes:
    """Return the content with some bytes changed, cut, doubled or moved, by seed."""
    chooser = random.Random(seed)
    data = bytearray(content)
    for _ in range(chooser.randint(1, 6)):
        if not data:
            break
        place = chooser.randrange(len(data))
        how = chooser.randrange(6)
        if how == 0:
            data[place] = chooser.randrange(256)
        elif how == 1:
            data[place] ^= 1 << chooser.randrange(8)
        elif how == 2:
            del data[place : place + chooser.randint(1, 64)]
        elif how == 3:
            data[place:place] = data[place : place + chooser.randint(1, 64)]
        elif how == 4:
            width = chooser.choice((1, 2, 4, 8))
            data[place : place + width] = chooser.choice((b"\xff", b"\0", b"\x7f")) * width
        else:
            del data[place:]
    return bytes(data)


# Files of weights


class _Storage:
    def __init__(self, key: str, numel: int, kind: type = torch.FloatStorage) -> None:
        self.key, self.numel, self.kind = key, numel, kind


class _Tensor:
    """Pickles as a tensor would, with whatever it claims."""

    def __init__(
        self, storage: _Storage, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
    ) -> None:
        self.made_of = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.made_of


class Called:
    """Pickles as a call of that function with these arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, thing: object) -> tuple[Any, ...] | None:
        if not isinstance(thing, _Storage):
            return None
        more = (None,) if self.legacy else ()
        return ("storage", thing.kind, thing.key, "cpu", thing.numel, *more)


def pickled(content: object, *, legacy: bool = False) -> bytes:
    """Return content as torch.save pickles it; storages are claims."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=2)
    pickler.legacy = legacy
    pickler.dump(content)
    return buffer.getvalue()


def zip_file(
    path: Path,
    table: bytes,
    records: Mapping[str, bytes | int],
    *,
    packed: bool = False,
) -> Path:
    """Write a file as torch.save does. A record that is a number stands for so many zeros."""
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method, allowZip64=True, compresslevel=1) as file:
        file.writestr("archive/data.pkl", table)
        for key, content in records.items():
            with file.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                if isinstance(content, bytes):
                    member.write(content)
                else:
                    for start in range(0, content, MB):
                        member.write(bytes(min(MB, content - start)))
        file.writestr("archive/version", b"3\n")
    return path


def legacy_file(path: Path, content: object, keys: list[str], numbers: bytes) -> Path:
    """Write a file in the format of before PyTorch 1.6."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    data = b"".join(pickle.dumps(each, protocol=2) for each in head)
    data += pickled(content, legacy=True) + pickle.dumps(keys, protocol=2) + numbers
    path.write_bytes(data)
    return path


def _tensor(numel: int, size: tuple[int, ...] | None = None, **more: Any) -> _Tensor:
    shape = (numel,) if size is None else size
    return _Tensor(_Storage("0", numel), shape, more.pop("stride", (1,) * len(shape)), **more)


def _zip(
    table: Callable[[], object] | bytes, records: Mapping[str, bytes | int], **how: Any
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        data = table if isinstance(table, bytes) else pickled(table())
        return zip_file(folder / "w.pth", data, records, **how)

    return make


def _op_tuples(depth: int) -> bytes:
    """A dict with a key of nested tuples: its hash goes as deep as they do."""
    return b"\x80\x02}K\x01" + b"\x85" * depth + b"K\x01s."


def _tampered(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = zip_file(folder / "w.pth", pickled({"a": _tensor(1)}), {"0": bytes(4)})
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def _doubled(folder: Path) -> Path:
    path = zip_file(folder / "w.pth", pickled({"a": _tensor(1)}), {"0": bytes(4)})
    with zipfile.ZipFile(path, "a") as file:
        # The warning of zipfile would be an error here.
        info = zipfile.ZipInfo("archive/data/1")
        file.writestr(info, bytes(8))
    path.write_bytes(path.read_bytes().replace(b"archive/data/1", b"archive/data/0"))
    return path


def checkpoint_bombs(size_mb: int = 2_900) -> Iterator[Hostile]:
    """Yield files of weights that are small and claim, or unpack to, `size_mb` megabytes.

    All must be refused, each in little memory.
    """
    huge = size_mb * MB // 4
    state = lambda: {"a": _tensor(huge)}  # noqa: E731
    yield Hostile("storage deflated", _zip(state, {"0": size_mb * MB}, packed=True))
    yield Hostile("storage shorter than claimed", _zip(state, {"0": bytes(64)}))
    yield Hostile("storage missing", _zip(state, {}))
    expanded = lambda: {"a": _tensor(1, (10**9,), stride=(0,))}  # noqa: E731
    yield Hostile("one number, repeated by stride", _zip(expanded, {"0": bytes(4)}))
    many = lambda: {f"a{i}": _tensor(MB, (MB,)) for i in range(1_000)}  # noqa: E731
    yield Hostile("one storage, a thousand of tensors", _zip(many, {"0": bytes(4 * MB)}))
    for name, function, arguments in (
        ("bytearray", bytearray, (size_mb * MB,)),
        ("a tensor of a length", torch.Tensor, (huge,)),
        ("a storage of a length", torch.FloatStorage, (huge,)),
        (
            "bytearray through a type",
            torch._tensor._rebuild_from_type_v2,
            (bytearray, torch.Tensor, (size_mb * MB,), {}),
        ),
        (
            "a copy for a device",
            torch._utils._rebuild_device_tensor_from_cpu_tensor,
            (_tensor(1, (huge,), stride=(0,)), torch.float64, "cpu", False),
        ),
    ):
        table = lambda f=function, a=arguments: {"a": Called(f, *a)}  # noqa: E731
        yield Hostile(f"{name}, called", _zip(table, {"0": bytes(4)}))
    punycode = b"\x80\x02c_codecs\nencode\nX" + struct.pack("<I", 200_000) + "é".encode() * 100_000
    yield Hostile("a slow codec", _zip(punycode + b"X\x08\0\0\0punycode\x86R.", {}))
    yield Hostile("millions of sets", _zip(b"\x80\x02](" + b"\x8f" * 4_000_000 + b"e.", {}))
    for depth in (200, 1_000_000):
        yield Hostile(f"{depth} nested tuples", _zip(_op_tuples(depth), {}))
    yield Hostile(
        "a text that claims gigabytes", _zip(b"\x80\x02X" + b"\xff\xff\xff\xff" + b"a.", {})
    )
    yield Hostile("a memo far out", _zip(b"\x80\x02}r\xff\xff\xff\xff.", {}))
    yield Hostile("two storages of one name", _doubled)
    yield Hostile("bytes before the zip", _tampered(lambda data: b"PK\3\4" + data))
    yield Hostile("bytes behind the zip", _tampered(lambda data: data + b"\0"))
    yield Hostile("the table deflated", _zip(state, {"0": bytes(4)}, packed=True))
    yield Hostile(
        "a million members",
        written("w.pth", b"PK\3\4" + _end_record(members=65_535, table_bytes=0xFFFF0000)),
    )
    zero = struct.pack("<q", huge)
    yield Hostile(
        "old format, storage cut off",
        lambda f: legacy_file(f / "w.pt", state(), ["0"], zero + bytes(64)),
    )
    yield Hostile(
        "old format, storage not listed",
        lambda f: legacy_file(f / "w.pt", {"a": _tensor(4)}, [], bytes(64)),
    )
    yield Hostile(
        "old format, repeated by stride",
        lambda f: legacy_file(f / "w.pt", expanded(), ["0"], struct.pack("<q", 1) + bytes(4)),
    )
    yield Hostile(
        "old format, bytearray",
        lambda f: legacy_file(f / "w.pt", {"a": Called(bytearray, size_mb * MB)}, [], b""),
    )
    yield from safetensors_bombs()


def _end_record(*, members: int, table_bytes: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, members, members, table_bytes, 0, 0)


def with_header(header: bytes, *, length: int | None = None, data: bytes = b"") -> bytes:
    """Return the bytes of a safetensors file with that header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def safetensors_bombs() -> Iterator[Hostile]:
    """Yield safetensors files that are not what they say."""

    def file(name: str, content: bytes) -> Hostile:
        return Hostile(f"safetensors, {name}", written("w.safetensors", content))

    row: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for name, change in (
        ("more numbers than bytes", {"shape": [10**9]}),
        ("a side below 0", {"shape": [-1]}),
        ("a product beyond 64 bits", {"shape": [2**32, 2**32, 2**32]}),
        ("offsets beyond the file", {"data_offsets": [0, 2**60]}),
        ("offsets that turn round", {"data_offsets": [4, 0]}),
        ("an unknown type", {"dtype": "F13"}),
        ("a shape of words", {"shape": ["a"]}),
    ):
        yield file(name, with_header(json.dumps({"a": row | change}).encode(), data=bytes(4)))
    two = {"a": row, "b": row}
    yield file("two tensors in one place", with_header(json.dumps(two).encode(), data=bytes(4)))
    text = json.dumps({"a": row})
    yield file("bytes left over", with_header(text.encode(), data=bytes(4_000)))
    twice = text[:-1] + ", " + text[1:]
    yield file("a name twice", with_header(twice.encode(), data=bytes(4)))
    yield file("a header beyond the file", with_header(text.encode(), length=2**62))
    yield file("a header of gigabytes", with_header(text.encode(), length=2**31, data=bytes(4)))
    yield file("NaN", with_header(b'{"a": NaN}'))
    yield file("nested lists", with_header(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
    yield file("a million lists", with_header(b'{"a": [' + b"[]," * 1_500_000 + b"[]]}"))
    yield file("not JSON", with_header(b"\xff" * 100))
    yield file("seven bytes", bytes(7))

    def sparse(folder: Path) -> Path:
        path = folder / "w.safetensors"
        path.write_bytes(with_header(text.encode()))
        os.truncate(path, 2**40)
        return path

    yield Hostile("safetensors, a terabyte of nothing", sparse)


def odd_checkpoints() -> Iterator[Hostile]:
    """Yield files that torch.save wrote and whose tensors are no plain numbers in memory."""
    plain = torch.arange(16.0).reshape(4, 4)
    makers: dict[str, Callable[[], Any]] = {
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "quantised by channel": lambda: torch.quantize_per_channel(
            plain, torch.ones(4), torch.zeros(4), 0, torch.quint8
        ),
        "sparse COO": plain.to_sparse,
        "sparse CSR": plain.to_sparse_csr,
        "sparse CSC": plain.to_sparse_csc,
        "sparse BSR": lambda: plain.to_sparse_bsr((2, 2)),
        "sparse BSC": lambda: plain.to_sparse_bsc((2, 2)),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "meta": lambda: plain.to("meta"),
        "a subclass": lambda: plain.as_subclass(_Subclass),
        "bits": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
    }
    for name, make in makers.items():
        yield Hostile(name, lambda f, make=make: _saved(f / "w.pt", lambda: {"a": make()}))
    for name, content in (
        ("a number for a name", {1: plain}),
        ("no tensors", {"a": 1}),
        ("half a letter for a name", {"a\ud800": plain}),
    ):
        yield Hostile(name, lambda f, c=content: _saved(f / "w.pt", lambda: c))
    for name, make in {
        "conjugate": lambda: torch.complex(plain, plain).conj(),
        "imaginary part": lambda: torch.complex(plain, plain).conj().imag,
        "eight bits": lambda: plain.to(torch.float8_e4m3fn),
        "booleans": lambda: plain > 3,
        "integers": lambda: plain.to(torch.uint16),
        "empty": lambda: torch.zeros(0, 3),
        "a number alone": lambda: torch.tensor(1.0),
        "turned": plain.t,
    }.items():
        yield Hostile(
            name, lambda f, make=make: _saved(f / "w.pt", lambda: {"a": make()}), refused=False
        )
    for name in NAMES:
        if name.isprintable() or "\ud83d" in name or "\udcff" in name:
            continue
        yield Hostile(
            f"tensor named {name[:20]!r}",
            lambda f, name=name: _saved(f / "w.pt", lambda: {name: plain}),
            refused=False,
        )


class _Subclass(torch.Tensor):
    pass


def _saved(path: Path, make: Callable[[], object]) -> Path:
    with warnings.catch_warnings():
        # That such tensors will not be made for ever, or are new.
        warnings.simplefilter("ignore")
        torch.save(make(), path)
    return path


def damaged_checkpoints(
    state: Mapping[str, torch.Tensor], count: int, seed: int = 0
) -> Iterator[Hostile]:
    """Yield damaged copies of a state in each of the three formats."""
    whole = {"safetensors": safetensors.torch.save(dict(state))}
    for suffix, new in (("pth", True), ("pt", False)):
        buffer = io.BytesIO()
        torch.save({"state_dict": dict(state)}, buffer, _use_new_zipfile_serialization=new)
        whole[suffix] = buffer.getvalue()
    for i in range(count):
        for suffix, content in whole.items():
            data = damaged(content, seed * 1_000_003 + i)
            yield Hostile(f"damaged {suffix} {i}", written(f"w.{suffix}", data), refused=False)


# Arrays of images


def _member(content: bytes | int, header: bytes | None = None) -> list[bytes | int]:
    return [header or b"", content]


def array_header(shape: object, dtype: str = "|u1", *, more: str = "") -> bytes:
    """Return the header of an npy file that claims that shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, {more}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _npz(
    members: Mapping[str, list[bytes | int]], *, packed: bool = True
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "set.npz", "w", method, compresslevel=1) as file:
            for name, parts in members.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    for part in parts:
                        if isinstance(part, bytes):
                            member.write(part)
                        else:
                            for start in range(0, part, MB):
                                member.write(bytes(min(MB, part - start)))
        return folder / "set.npz"

    return make


def npz_bombs(size_mb: int = 2_900) -> Iterator[Hostile]:
    """Yield npz files that are small and claim, or unpack to, `size_mb` megabytes."""
    few = np.zeros((8, 4, 4), np.uint8).tobytes()
    good: dict[str, list[bytes | int]] = {
        "train_images": [array_header((8, 4, 4)), few],
        "train_labels": [array_header((8, 1), "<i8"), np.arange(8, dtype="<i8").tobytes()],
        "val_images": [array_header((8, 4, 4)), few],
        "val_labels": [array_header((8, 1), "<i8"), np.arange(8, dtype="<i8").tobytes()],
    }
    side = int((size_mb * MB / 8) ** 0.5)
    held = 8 * side * side
    huge = array_header((8, side, side))

    def images(*parts: bytes | int) -> dict[str, list[bytes | int]]:
        return good | {"train_images": list(parts)}

    yield Hostile("zeros that unpack", _npz(images(huge, held)))
    yield Hostile("a header that claims more", _npz(images(huge, few)))
    yield Hostile("a header that claims more, not packed", _npz(images(huge, few), packed=False))
    yield Hostile("a header that claims less", _npz(images(array_header((8, 4, 4)), 80 * MB)))
    yield Hostile("a million tiny images", _npz(images(array_header((10**9, 1, 1)), few)))
    yield Hostile("a side below 0", _npz(images(array_header((8, -4, -4)), few)))
    yield Hostile("a product beyond 64 bits", _npz(images(array_header((2**40, 2**40, 3)), few)))
    yield Hostile("objects", _npz(images(array_header((8, 4, 4), "|O"), few)))
    yield Hostile("a type without bytes", _npz(images(array_header((8, 4, 4), "|V0"), few)))
    long = b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFF00)
    yield Hostile("a header of gigabytes", _npz(images(long, 80 * MB)))
    nested = array_header(0, more="'x': " + "(" * 9_000)
    yield Hostile("a nested header", _npz(images(nested, few)))
    yield Hostile("no images at all", _npz({}))
    labels = good | {"train_labels": [array_header((10**9,), "<i8"), 8]}
    yield Hostile("labels that claim more", _npz(labels))
    classes = good | {
        "train_labels": [
            array_header((8, 1), "<i8"),
            np.full(8, 2**60, dtype="<i8").tobytes(),
        ]
    }
    yield Hostile("classes without end", _npz(classes))
    yield Hostile(
        "thousands of arrays", _npz({f"a{i}": [array_header((0,))] for i in range(3_000)})
    )
    yield Hostile(
        "a million members",
        written("set.npz", b"PK\3\4" + _end_record(members=65_535, table_bytes=0xFFFF0000)),
    )


def damaged_arrays(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Yield damaged copies of a small set of images."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        train_images=np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4),
        train_labels=np.arange(8),
        val_images=np.zeros((4, 4, 4), np.uint8),
        val_labels=np.arange(4),
    )
    for i in range(count):
        data = damaged(buffer.getvalue(), seed * 1_000_003 + i)
        yield Hostile(f"damaged npz {i}", written("set.npz", data), refused=False)


# Plans and diagnoses


def json_bombs(base: Mapping[str, Any], name: str) -> Iterator[Hostile]:
    """Yield texts that are no JSON, or none that can be meant, made from a good document."""
    text = json.dumps(base)
    key = json.dumps(next(iter(base)))

    def file(what: str, content: bytes | str) -> Hostile:
        return Hostile(what, written(name, content))

    yield file("nested lists", "[" * 200_000)
    yield file("nested objects", '{"a":' * 200_000)
    yield file("nested lists inside", text[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}")
    yield file("millions of lists", "[" + "[]," * 4_000_000 + "[]]")
    yield file("millions of objects", "[" + '{"a":1},' * 2_000_000 + "{}]")
    yield file("a key twice", f"{{{key}: 1, {text[1:]}")
    yield file("a key twice inside", text[:-1] + ', "x": {"a": 1, "a": 2}}')
    for word in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5_000, "0x10", "1_000", "True"):
        yield file(f"the number {word[:12]}", f'{text[:-1]}, "x": {word}}}')
    yield file("half a letter", f'{text[:-1]}, "\\ud800": 1}}')
    yield file("not UTF-8", text.encode()[:-1] + b', "\xff": 1}')
    yield file("UTF-16", text.encode("utf-16"))
    yield file("a NUL", text + "\0")
    yield file("two documents", text + text)
    yield file("cut off", text[:-2])
    yield file("a list", f"[{text}]")
    yield file("a word", '"plan"')
    yield file("null", "null")
    yield file("nothing", "")
    unknown = ", ".join(f'"k{i}": 1' for i in range(300_000))
    yield file("300,000 unknown keys", f"{text[:-1]}, {unknown}}}")

    def sparse(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        os.truncate(folder / name, 2**40)
        return folder / name

    yield Hostile("a terabyte of nothing", sparse)


Change = tuple[str, tuple[str | int, ...], Any]


def plan_changes(counts: Sequence[int] = (20_001,)) -> Iterator[Change]:
    """Yield values that no plan has: what for, the way to the key, the value.

    Args:
        counts: How many layers, targets and the like a plan names that names too many.
    """
    for name in (
        *("hf-hub:timm/resnet18.a1_in1k", "hf_hub:a/b", "local-dir:/tmp", "http://127.0.0.1:9/x"),
        *("timm/resnet18", "../resnet18", "/proc/version", "a\0b", "no such", "x" * 600, "", "."),
        *("test_resnet\n", "test_resnet\x1b[2J", "test_resnet\u202e"),
    ):
        yield f"a model named {name[:20]!r}", ("model", "name"), name
    for key, value in (
        *(("pretrained_cfg", "hf-hub:a/b"), ("checkpoint_path", "/proc/version")),
        *(("features_only", True), ("exportable", True), ("img_size", 10**9), ("depth", 10**6)),
        *(("act_layer", "torch.nn.ReLU"), ("dynamic_img_size", "yes"), ("dynamic_img_size", 2)),
        *(("pretrained", True), ("scriptable", True), ("x" * 10_000, True), ("", True)),
        *(
            ("cache_dir", "/tmp"),
            ("weights", "DEFAULT"),
            ("in_chans", 10**6),
            ("drop_rate", 5.0),
            ("drop_rate", "0.5"),
        ),
    ):
        yield f"the argument {key[:20]}", ("model", "kwargs"), {key: value}
    yield "65 arguments", ("model", "kwargs"), {f"k{i}": 1 for i in range(65)}
    for path in (
        "/dev/zero",
        "/proc/version",
        "/proc/self/mem",
        "gone.pt",
        "a\0b",
        "x" * 5_000,
        "",
    ):
        yield (
            f"the checkpoint {path[:20]!r}",
            ("model",),
            {"weights": "checkpoint", "checkpoint": path},
        )
    for file in ("../x", "..", ".", "/proc/version", "a\0b", "x" * 300, "", "\x1b[2J", "gone"):
        companion = {"file": file, "sha256": "0" * 64}
        yield f"the companion {file[:20]!r}", ("companion",), companion
    for count in counts:
        names = [f"layer{i}" for i in range(count)]
        yield f"{count:,} frozen layers", ("freeze",), names
        rates = [{"layer": each, "factor": 1.0} for each in names]
        yield f"{count:,} learning rates", ("learning_rates",), rates
        patterns = [{"text": each, "syntax": "glob"} for each in names]
        yield f"{count:,} patterns", ("patterns",), patterns
        target = {"parameters": [], "scheme": {"name": "zero"}}
        targets = [target | {"layer": each} for each in names]
        yield f"{count:,} targets", ("targets",), targets
        yield f"{count:,} parameters", ("targets", 0, "parameters"), names
        entry = {"tensor": "conv1.0.weight", "write": "zero", "count": 1}
        yield f"{count:,} entries", ("targets", 0, "entries"), [entry] * count
    yield "one layer frozen twice", ("freeze",), ["a", "b", "a"]
    yield "a thousand seeds", ("targets",), _SEEDS
    yield "a note of a megabyte", ("evidence",), {"note": "x" * MB}
    yield "a name of a megabyte", ("name",), "x" * MB
    yield "numbers for names", ("freeze",), list(range(counts[-1] // 2))
    yield "units of words", ("targets", 0, "units"), ["a"] * (counts[-1] // 2)
    yield "a number for a target", ("targets",), [1] * (counts[-1] // 2)
    for value in (-1, 2**63, 2**200, 0.5, "0", True, None, [], {}):
        yield f"the seed {value!r:.20}", ("targets", 0, "seed"), value
    yield (
        "an axis of 9",
        ("targets", 0, "entries"),
        [{"tensor": "conv1.0.weight", "axis": 9, "count": 1}],
    )
    yield (
        "an index far out",
        ("targets", 0, "entries"),
        [{"tensor": "conv1.0.weight", "indices": [10**15], "count": 1}],
    )


_SEEDS = "a thousand seeds"


def changed_plan(plan: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Return the plan's content with one value changed."""
    _, way, value = change
    content = json.loads(json.dumps(plan))
    if value is _SEEDS:
        target = content["targets"][0]
        content["targets"] = [target | {"seed": i} for i in range(1_000)]
        return content
    place: Any = content
    for step in way[:-1]:
        place = place[step]
    if way == ("model",):
        place["model"] |= value
    else:
        place[way[-1]] = value
    return content


def plans(plan: Mapping[str, Any], counts: Sequence[int] = (20_001,)) -> Iterator[Hostile]:
    """Yield plans with a value that no plan has; see `plan_changes`."""
    for change in plan_changes(counts):
        yield Hostile(
            change[0],
            lambda f, change=change: written("plan.json", json.dumps(changed_plan(plan, change)))(
                f
            ),
        )


def shaken(content: Any, seed: int) -> Any:
    """Return JSON content with a few values replaced, dropped or doubled, by seed."""
    chooser = random.Random(seed)
    copy = json.loads(json.dumps(content))
    for _ in range(chooser.randint(1, 4)):
        place = copy
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = chooser.choice(list(keys))
            if not isinstance(place[key], dict | list) or not place[key] or chooser.random() < 0.3:
                how = chooser.randrange(3)
                if how == 0:
                    del place[key]
                elif how == 1 and isinstance(place, list):
                    place.insert(key, place[key])
                else:
                    place[key] = chooser.choice(VALUES)
                break
            place = place[key]
    return copy


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, -0.0),
    *("", "NaN", "Infinity", "-Infinity", "a", "\0", "\x1b[2J", "\ud800", "../x", "/dev/zero"),
    *("x" * 2_000, [], {}, [[]], [None], ["a"], [1, 2, 3], {"a": 1}, [{}] * 3),
)
