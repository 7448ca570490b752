"""Blocks that trace or change a network for a while and always put everything back.

Nothing is stored on a module: a traced network pickles, deep-copies and compiles as before,
and a hook that outlives its block would keep activations alive and poison the next run.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

TRACKING = "track_running_stats"
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
# Of these, what a forward may change: hooks are put on and taken off by whoever traces.
_HOLD = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)
# Where one of them stands whenever there is any.
_SHOWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Numbers of hooks that are not the network's; torch gives none twice.
_OURS: set[int] = set()
_CONTAINERS = (dict, list, set, OrderedDict, defaultdict, deque)


class Hooks:
    """Handles of one block. Use it only through `hooks()`."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def before(self, module: nn.Module, call: Callable[..., Any]) -> None:
        """Call `call(module, args)` before the module's forward."""
        handle = module.register_forward_pre_hook(call)
        _OURS.add(handle.id)
        self._stack.callback(handle.remove)

    def after(self, module: nn.Module, call: Callable[..., Any], *, always: bool = False) -> None:
        """Call `call(module, args, output)` after the forward; `always` also on an exception."""
        handle = module.register_forward_hook(call, always_call=always)
        _OURS.add(handle.id)
        self._stack.callback(handle.remove)

    def gradient(self, tensor: Tensor, call: Callable[[Tensor], None]) -> None:
        """Call `call(gradient)` when the tensor's gradient is known, unless it needs none.

        The tensor may have any shape; the gradient has the same.

        Tensor hooks survive in-place changes of the tensor further on, which module backward
        hooks do not.
        """
        if not tensor.requires_grad:
            return
        base = tensor._base
        if base is None or base._version == 0:
            handle = tensor.register_hook(call)
        else:
            # Whoever uses a view that was written through, or the tensor behind it, hands the
            # gradient to that tensor; the view's own is a part of it.
            place = tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset()
            whole = base.size(), base.stride()

            def at_base(gradient: Tensor) -> None:
                if gradient.stride() != whole[1]:
                    gradient = gradient.new_empty_strided(*whole).copy_(gradient)
                offset = gradient.storage_offset() + place[2]
                call(gradient.as_strided(place[0], place[1], offset))

            handle = base.register_hook(at_base)
        self._stack.callback(handle.remove)

    def close(self) -> None:
        """Remove every hook."""
        self._stack.close()


@contextmanager
def hooks() -> Iterator[Hooks]:
    """Yield a holder of hooks; all of them are gone after the block, also on an exception."""
    holder = Hooks()
    try:
        yield holder
    finally:
        holder.close()


@contextmanager
def module_kept(module: nn.Module) -> Iterator[None]:
    """Run a block, then restore flags, gradients and buffers of a network.

    Restored are each module's own training flag (not only the root's, which would thaw a frozen
    BatchNorm), each parameter's `requires_grad` and `.grad` (the same object as before; none
    inside, so that a network that runs a backward of its own adds to none), the tracking flag of
    norms, and each buffer's values. Parameters themselves are not copied: the stages that use
    this never write to them.
    """
    training = [(part, part.training) for part in module.modules()]
    tracking = [
        (part, bool(getattr(part, TRACKING)))
        for part in module.modules()
        if isinstance(getattr(part, TRACKING, None), bool)
    ]
    parameters = [(part, part.requires_grad, part.grad) for part in module.parameters()]
    buffers = [
        (owner, key, part, part.detach().clone())
        for owner in module.modules()
        for key, part in owner._buffers.items()
        if part is not None
    ]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag
        for part, flag in tracking:
            setattr(part, TRACKING, flag)
        for parameter, needed, gradient in parameters:
            parameter.requires_grad_(needed)
            parameter.grad = gradient
        with torch.no_grad():
            for owner, key, buffer, before in buffers:
                owner._buffers[key] = buffer
                if not _same(buffer, before):
                    buffer.copy_(before)


@contextmanager
def memory_kept(module: nn.Module) -> Iterator[None]:
    """Run a block, then put back what modules hold: attributes, buffers, children, hooks.

    In eval mode some networks keep a table made from their parameters (attention biases, a
    position grid) for the next pass. Such a table belongs to the graph of one pass: a second
    backward would run through the first one's graph, and a table made without gradients cuts its
    parameters off. Objects are put back, and the contents of dicts, lists and sets; what is
    written into a tensor stays. Hooks that the network put on or took off go with the handles
    it keeps of them: with the handle forgotten they would add up from pass to pass.
    """
    # This runs once a batch: plain copies, and comparisons by identity, are quick.
    before = [(vars(part), vars(part).copy()) for part in module.modules()]
    contents: dict[int, tuple[Any, Any]] = {}
    for _, kept in before:
        for key, value in kept.items():
            if type(value) in _CONTAINERS and key not in _EVERY_MODULE_HAS:
                _copied(value, contents)
    # Scripted modules hold theirs elsewhere.
    own: list[Any] = [kept.get(key) for _, kept in before for key in _HOLD]
    copies = [(held, held.copy()) for held in own if type(held) in _CONTAINERS]
    hooked = {
        place: [(kept[key], kept[key].copy()) for key in _HOOKS if key in kept]
        for place, (_, kept) in enumerate(before)
        if any(map(kept.get, _SHOWN))
    }
    try:
        yield
    finally:
        for now, kept in before:
            if _holds(now, kept):
                continue
            for key in [key for key in now if key not in kept]:
                del now[key]
            for key, value in kept.items():
                # Not `get`: what held None and became a child is in another dictionary now.
                if (key not in now or now[key] is not value) and key not in _EVERY_MODULE_HAS:
                    now[key] = value
        for place, (now, _) in enumerate(before):
            if place in hooked or any(map(now.get, _SHOWN)):
                none: list[tuple[Any, dict[int, Any]]] = [
                    (now[key], {}) for key in _HOOKS if key in now
                ]
                _put_back(hooked.get(place, none))
        for held, content in (*copies, *contents.values()):
            if not held and not content:
                continue
            held.clear()
            if isinstance(held, list | deque):
                held.extend(content)
            else:
                held.update(content)


def _put_back(hooked: list[tuple[Any, dict[int, Any]]]) -> None:
    """Give a module the hooks it had, but for those of ours that are taken off by now."""
    for held, content in hooked:
        left = {key: value for key, value in content.items() if key in held or key not in _OURS}
        held.clear()
        held.update(left)


@contextmanager
def checkpoints_opened() -> Iterator[None]:
    """Run a block in which re-entrant checkpoints run what they wrap as written.

    Such a checkpoint runs its part without gradients and once more inside the backward pass, in
    a backward of its own: no hook set in the forward sees the gradient, and
    `torch.autograd.grad` is refused. Values and gradients are the same without it.
    """
    function = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _Opened  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = function  # type: ignore[misc]


class _Opened:
    """What stands in for the checkpoint."""

    @staticmethod
    def apply(part: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        del preserve_rng_state
        return part(*args)


def _holds(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Return whether a dictionary holds the same objects under the same keys, in their order."""
    same = len(now) == len(before) and all(map(is_, now.values(), before.values()))
    return same and all(map(is_, now, before))


def _copied(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Note the content of a container, and of those in it, by identity."""
    if id(value) in contents:
        return
    contents[id(value)] = value, value.copy()
    for part in value.values() if isinstance(value, dict) else value:
        if type(part) in _CONTAINERS:
            _copied(part, contents)


def _same(left: Tensor, right: Tensor) -> bool:
    # NaN equals itself here: a buffer that held NaN has not changed.
    if left.is_floating_point():
        return bool(((left == right) | (left.isnan() & right.isnan())).all())
    return bool((left == right).all())


def batch_statistics(module: nn.Module) -> None:
    """Put a network into the mode it is measured in; undo with `module_kept`.

    Everything is in eval mode (no dropout, no stochastic depth) but norms with running
    statistics, which use the batch's own and do not update theirs. Under running statistics a
    fresh network is not normalised at all, so it could not serve as the reference.
    """
    # Turning to train mode is when a network empties the tables it keeps for eval mode.
    module.train()
    module.eval()
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            part.training = True
            if isinstance(getattr(part, TRACKING, None), bool):
                setattr(part, TRACKING, False)
