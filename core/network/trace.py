"""Trace one forward pass: which layers ran, which activations, and what fed them.

Activations are caught where they are computed, not where a module says so: a functional
`F.relu`, a module used several times and an in-place one are all the same call here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.network.activations import Activation, activation_of
from core.network.attention import Attention, attention_of
from core.network.hooks import Hooks, hooks, memory_kept

OnLayer = Callable[[str, nn.Module, tuple[Any, ...], Any], None]
OnCall = Callable[[Any, Sequence[Any], Mapping[str, Any], Any, frozenset[str]], None]


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the forward pass where an activation is applied.

    Attributes:
        name: The innermost module running, with "#2" and so on for its later calls and
            ":relu" for a functional call inside a module that is no activation itself.
        activation: The function.
        type: Class name of the module, or of the function.
    """

    name: str
    activation: Activation
    type: str


OnActivation = Callable[[Site, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Cue:
    """One activation or attention of a pass, by which the next pass knows its own.

    Attributes:
        site: The activation; None for attention.
        fed: The parameter last used before it, by identity: of branches that look alike and of
            which each pass takes another, it tells which one this is.
        shape: Shape of its input but for the first axis.
        attention: Name of the attention's site.
        inside: Path of the module it ran in.
    """

    site: Site | None
    fed: int
    shape: tuple[int, ...] = ()
    attention: str = ""
    inside: str = ""


class OtherPassError(BaseException):
    """A pass took another way through the network than the pass it was held to.

    Not an Exception: a network that catches these must not go on in a way it never goes.
    """


def _heads_by_path(module: nn.Module) -> dict[str, int]:
    """Return how many heads each module that says so has, by its path."""
    found = {}
    for path, part in module.named_modules():
        for name in ("num_heads", "heads", "num_attention_heads"):
            heads = getattr(part, name, None)
            if type(heads) is int:
                found[path] = heads
                break
    return found


class _Catcher(TorchFunctionMode):
    def __init__(
        self,
        running: Sequence[tuple[str, nn.Module]],
        before: Callable[[Site, Tensor], None],
        after: Callable[[Site, Tensor], None],
        attended: Callable[[str, str, Attention], None] | None,
        called: OnCall | None,
        known: Sequence[_Cue] | None,
        heads: Mapping[str, int],
    ) -> None:
        super().__init__()
        self._heads = heads
        self._running, self._before, self._after = running, before, after
        self._attended, self._called = attended, called
        self._calls: Counter[str] = Counter()
        self._known = known
        self._fed = 0
        self.cues: list[_Cue] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Not isinstance, which Parameter answers slowly.
        if len(args) > 1 and type(args[1]) is nn.Parameter:
            self._fed = id(args[1])
        result = self._run(func, args, kwargs)
        if self._called is not None:
            inside = frozenset(name for name, _ in self._running)
            self._called(func, args, kwargs, result, inside)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        activation = activation_of(func, args, kwargs)
        z = args[0] if args else kwargs.get("input")
        if activation is None or not isinstance(z, Tensor):
            result = func(*args, **kwargs)
            if self._attended is not None:
                attention = attention_of(func, args, kwargs, result, heads=self._heads_here())
                if attention is not None:
                    cue = self._attention_cue()
                    self._attended(cue.attention, cue.inside, attention)
            return result
        site = self._site(activation, z)
        # An in-place activation overwrites z: whoever wants z must read it now.
        self._before(site, z)
        result = func(*args, **kwargs)
        self._after(site, result)
        return result

    def _heads_here(self) -> int | None:
        """Return how many heads the innermost module that says so has."""
        path = self._running[-1][0]
        if self._known is not None and len(self.cues) < len(self._known):
            path = self._known[len(self.cues)].inside
        while path and path not in self._heads:
            path = path.rpartition(".")[0]
        return self._heads.get(path)

    def _attention_cue(self) -> _Cue:
        if self._known is not None:
            cue = self._next()
            if cue.site is not None or cue.fed != self._fed:
                raise OtherPassError
            return cue
        inside = self._running[-1][0]
        named = self._named(f"{inside}:attention".lstrip(":"))
        self.cues.append(_Cue(None, self._fed, attention=named, inside=inside))
        return self.cues[-1]

    def _site(self, activation: Activation, z: Tensor) -> Site:
        shape = tuple(z.shape[1:])
        if self._known is not None:
            cue = self._next()
            if (
                cue.site is None
                or cue.site.activation != activation
                or cue.shape != shape
                or cue.fed != self._fed
            ):
                raise OtherPassError
            return cue.site
        name, module = self._running[-1]
        own = not any(True for _ in module.children()) and not any(
            True for _ in module.parameters(recurse=False)
        )
        base = name if own else f"{name}:{activation.name}".lstrip(":")
        site = Site(
            name=self._named(base),
            activation=activation,
            type=type(module).__name__ if own else activation.name,
        )
        self.cues.append(_Cue(site, self._fed, shape))
        return site

    def _next(self) -> _Cue:
        known = self._known or ()
        if len(self.cues) >= len(known):
            raise OtherPassError
        self.cues.append(known[len(self.cues)])
        return self.cues[-1]

    def _named(self, base: str) -> str:
        self._calls[base] += 1
        count = self._calls[base]
        return base if count == 1 else f"{base}#{count}"


class Tracing:
    """A network traced for several passes. Use it only through `traced`.

    In the first pass modules tell when they run, which names its activations. Every later one is
    held to it, activation by activation, and its modules run undisturbed.
    """

    def __init__(self, module: nn.Module, on_layer: OnLayer | None) -> None:
        self._module, self._on_layer = module, on_layer
        self._running: list[tuple[str, nn.Module]] = [("", module)]
        self._heads = _heads_by_path(module)
        self._holder = Hooks()
        self._cues: list[_Cue] | None = None
        self.forget()

    def forget(self) -> None:
        """Have modules tell when they run, in the next pass."""
        self._cues = None
        self.close()
        for name, module in self._module.named_modules():

            def enter(entered: nn.Module, _: Any, name: str = name) -> None:
                self._running.append((name, entered))

            def leave(left: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self._running.pop()
                if self._on_layer is not None and output is not None and left._parameters:
                    self._on_layer(name, left, args, output)

            self._holder.before(module, enter)
            self._holder.after(module, leave, always=True)

    def close(self) -> None:
        """Take every hook off the modules."""
        self._holder.close()

    @contextmanager
    def kept(self) -> Iterator[Hooks]:
        """Hold hooks for one forward and backward pass, and forget what modules remember of it."""
        with memory_kept(self._module), hooks() as holder:
            yield holder

    @contextmanager
    def forward(
        self,
        *,
        before_activation: OnActivation = lambda site, z: None,
        after_activation: OnActivation = lambda site, h: None,
        on_attention: Callable[[str, str, Attention], None] | None = None,
        on_call: OnCall | None = None,
    ) -> Iterator[None]:
        """Tracing the one forward pass run inside the block; see `traced_forward`.

        Raises:
            OtherPassError: It took another way than the first; `forget` that one.
        """
        del self._running[1:]
        catcher = _Catcher(
            self._running,
            before_activation,
            after_activation,
            on_attention,
            on_call,
            self._cues,
            self._heads,
        )
        with catcher:
            yield
        if self._cues is not None:
            if len(catcher.cues) != len(self._cues):
                raise OtherPassError
        elif self._on_layer is None and on_call is None:
            self._cues = catcher.cues
            self.close()


@contextmanager
def traced(module: nn.Module, *, on_layer: OnLayer | None = None) -> Iterator[Tracing]:
    """Have a network's modules tell when they run, for as many passes as the block holds.

    Args:
        module: The network.
        on_layer: Called with (path, module, args, output) after each module that owns
            parameters has run, once a call.
    """
    tracing = Tracing(module, on_layer)
    try:
        yield tracing
    finally:
        tracing.close()


@contextmanager
def traced_forward(
    module: nn.Module,
    *,
    on_layer: OnLayer | None = None,
    before_activation: OnActivation = lambda site, z: None,
    after_activation: OnActivation = lambda site, h: None,
    on_attention: Callable[[str, str, Attention], None] | None = None,
    on_call: OnCall | None = None,
) -> Iterator[Hooks]:
    """Tracing the one forward pass run inside the block.

    What modules remembered of the pass in attributes of their own is forgotten after the block.

    Args:
        module: The network.
        on_layer: Called with (path, module, args, output) after each module that owns
            parameters has run, once a call.
        before_activation: Called with the site and the pre-activation z.
        after_activation: Called with the site and the output h.
        on_attention: Called with the site's name, the path of the module it ran in, and what
            was computed.
        on_call: Called with (function, arguments, those by keyword, result, paths of the
            modules running) after every torch function.

    Yields:
        The holder of hooks, for gradient hooks of the caller's own.
    """
    with (
        traced(module, on_layer=on_layer) as tracing,
        tracing.kept() as holder,
        tracing.forward(
            before_activation=before_activation,
            after_activation=after_activation,
            on_attention=on_attention,
            on_call=on_call,
        ),
    ):
        yield holder


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor, of any shape, in an output nested in tuples, lists or dicts."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            tensor = first_tensor(part)
            if tensor is not None:
                return tensor
    return None
