"""What a pickle of a state dict claims, found out without building any of it.

PyTorch's own reader runs no foreign code (`weights_only`), but a few of the functions it does call
take a number and fill that much memory, nested tuples overflow the stack, and a storage may say
it is longer than its bytes. So the pickle is walked first: every operation is followed on a stack
of small stand-ins, calls are held to those a state dict needs, and storages are added up.

Source:
    The operations are those of torch/_weights_only_unpickler.py; what they do is in the
    documentation of Python's pickletools.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

# A tensor takes some 25 operations, and a checkpoint with Adam's state holds three per parameter:
# ten thousand parameters.
MAX_OPERATIONS = 1_000_000
MAX_DEPTH = 100
ITEM_BYTES = {
    **dict.fromkeys(("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8"), 1),
    **dict.fromkeys(("QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float", "QInt32"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
# Functions that make a tensor of a storage, or wrap one that is made.
REBUILDS = frozenset(
    f"torch._utils._rebuild_{name}"
    for name in (
        *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "qtensor"),
        *("sparse_tensor", "meta_tensor_no_storage", "nested_tensor"),
    )
)
CONTAINERS = frozenset({"collections.OrderedDict", "collections.Counter", "builtins.set"})
CALLS = (
    REBUILDS
    | CONTAINERS
    | frozenset(
        {
            *("torch.Size", "torch.device", "torch.serialization._get_layout"),
            *("builtins.complex", "torch.nn.parameter.Parameter"),
        }
    )
)
_OTHER = "it holds more than tensors, or is no such file at all"


class PickleError(ValueError):
    """No pickle of a state dict that can be meant; the message is a phrase for people."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that is named, not looked up."""

    name: str


@dataclass(slots=True)
class Claims:
    """What pickles claim.

    Attributes:
        storages: Key of a storage to its bytes.
        texts: Every text of the last pickle that was walked.
        operations: How many operations are left.
    """

    storages: dict[str, int] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    operations: int = MAX_OPERATIONS

    def walk(self, stream: IO[bytes]) -> None:
        """Take in the next pickle of a stream.

        Raises:
            PickleError: Not a pickle, too long, nested too deeply, or it calls for something
                other than tensors and plain containers.
        """
        self.texts = set()
        walker = _Walker(self)
        try:
            for operation, argument in _operations(stream):
                self.operations -= 1
                if self.operations < 0:
                    raise PickleError(f"it takes more than {MAX_OPERATIONS:,} steps to read")
                walker.step(operation, argument)
        except PickleError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
            # A stack that runs empty, a text that is none, an end in the middle.
            raise PickleError(_OTHER) from error


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for operation, argument, _ in pickletools.genops(stream):
        yield operation.name, argument


# A stand-in is its depth and, where calls look at it, its value; None for anything else.
_Item = tuple[int, Any]
_PLAIN: _Item = (0, None)


class _Walker:
    """The stack and memo of one pickle."""

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        self.stack: list[_Item] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Item] = {}

    def step(self, operation: str, argument: Any) -> None:
        """Follow one operation."""
        stack = self.stack
        if operation in ("BINUNICODE", "SHORT_BINSTRING"):
            self.claims.texts.add(argument)
            stack.append((0, argument))
        elif operation in ("BININT", "BININT1", "BININT2", "LONG1"):
            stack.append((0, argument))
        elif operation in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif operation in _EMPTY:
            stack.append(_PLAIN)
        elif operation in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"):
            items = self._marked() if operation == "TUPLE" else self._popped(_SIZE[operation])
            depth = 1 + max((item[0] for item in items), default=0)
            if depth > MAX_DEPTH:
                raise PickleError(f"it nests more than {MAX_DEPTH} tuples")
            stack.append((depth, tuple(item[1] for item in items)))
        elif operation == "MARK":
            self.marks.append(len(stack))
        elif operation in ("APPENDS", "SETITEMS"):
            self._marked()
        elif operation in _DROPPED:
            self._popped(_DROPPED[operation])
        elif operation == "GLOBAL":
            module, _, name = argument.partition(" ")
            module = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}.get(
                module, module
            )
            stack.append((0, _Global(f"{module}.{name}")))
        elif operation in ("REDUCE", "NEWOBJ"):
            (_, function), (depth, arguments) = self._popped(2)
            self._check_call(operation, function, arguments)
            stack.append((depth, None))
        elif operation == "BINPERSID":
            ((_, identity),) = self._popped(1)
            self._claim(identity)
            stack.append(_PLAIN)
        elif operation not in ("PROTO", "STOP"):
            raise PickleError(_OTHER)

    def _popped(self, count: int) -> list[_Item]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise PickleError(_OTHER)
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _marked(self) -> list[_Item]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _check_call(self, operation: str, function: Any, arguments: Any) -> None:
        name = function.name if isinstance(function, _Global) else ""
        if not isinstance(arguments, tuple):
            raise PickleError(_OTHER)
        if operation == "NEWOBJ":
            allowed = name in CONTAINERS or name == "torch.nn.parameter.Parameter"
        elif name == "torch._tensor._rebuild_from_type_v2":
            inner = arguments[0]
            allowed = isinstance(inner, _Global) and inner.name in REBUILDS
        elif name in ("_codecs.encode", "builtins.bytearray"):
            # Bytes are written as text and a codec; some codecs take quadratic time, and a number
            # in their place would be that many bytes.
            allowed = not arguments or (
                isinstance(arguments[0], str) and arguments[1:] in (("latin1",), ("latin-1",))
            )
        else:
            allowed = name in CALLS
        if not allowed:
            raise PickleError(_OTHER)

    def _claim(self, identity: Any) -> None:
        kind, storage, key, _, numel, *_ = identity
        if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str):
            raise PickleError(_OTHER)
        name = storage.name.rpartition(".")[2].removesuffix("Storage")
        if name not in ITEM_BYTES or not isinstance(numel, int) or numel < 0:
            raise PickleError("it holds numbers of an unknown kind")
        size = numel * ITEM_BYTES[name]
        self.claims.storages[key] = max(size, self.claims.storages.get(key, 0))


_EMPTY = frozenset(
    {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BINFLOAT"}
)
_SIZE = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# The container stays, what goes into it is dropped.
_DROPPED = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
