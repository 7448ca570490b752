"""A network that was traced is the network it was: after success, failure and a stop."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from core.errors import ModelError, Stopped
from core.measure import measure_network
from core.network.hooks import hooks, module_kept
from core.network.trace import traced_forward
from core.records import LayerInfo
from core.seeding import random_state_kept
from tests.zoo import BATCHES, CLASSES, ZOO, outline_of

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)

Batches = Iterator[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor]]


class BackwardError(RuntimeError):
    """Raised in the middle of a backward pass."""


class _RaisesBackward(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(*_: Any) -> Tensor:
        raise BackwardError("no way back")


class Bomb(nn.Module):
    """Passes its input on, or raises on the way there or on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.when = "never"
        self.error: type[BaseException] = RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "forward":
            raise self.error("no way through")
        return _RaisesBackward.apply(x) if self.when == "backward" else x


class Stateful(nn.Module):
    """Everything that a pass could leave behind, with a bomb in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.average = nn.BatchNorm2d(4, momentum=None)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.bomb = Bomb()
        self.head = nn.Linear(4, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        # As a network does that draws noise in eval mode too.
        _ = (random.random(), np.random.random(), torch.rand(()))
        x = self.bomb(self.act(self.average(self.norm(self.first(x)))))
        return self.head(self.drop(x.mean((2, 3))))


class Replacing(nn.Module):
    """Puts another tensor in its buffer's place instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        self.seen = self.seen + pooled.detach().mean(0)
        return self.head(pooled)


def stateful() -> Stateful:
    module = Stateful().train()
    module.norm.eval()
    module.norm.bias.requires_grad_(False)
    module.drop.eval()
    with torch.no_grad():
        module.norm.running_mean.uniform_(-1.0, 1.0)
    for i, parameter in enumerate(module.parameters()):
        if parameter.requires_grad and i % 2 == 0:
            parameter.grad = torch.full_like(parameter, 7.0)
    return module


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn((4, 3, 5, 5), generator=generator), torch.arange(4) % CLASSES)
        for _ in range(BATCHES)
    ]


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def trace_of(module: nn.Module) -> dict[str, object]:
    """All that must be as before, by a name that says what changed."""
    state: dict[str, object] = {"root": id(module)}
    for name, each in module.named_modules(remove_duplicate=False):
        state[f"{name}: attributes"] = sorted(vars(each))
        state[f"{name}: training"] = each.training
        state[f"{name}: tracking"] = vars(each).get("track_running_stats")
        state[f"{name}: forward"] = each.forward.__qualname__
        for table in HOOK_TABLES:
            state[f"{name}: {table}"] = list(vars(each).get(table) or ())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        state[f"{name}: object"] = id(parameter)
        state[f"{name}: values"] = raw(parameter)
        state[f"{name}: requires_grad"] = parameter.requires_grad
        state[f"{name}: grad"] = id(parameter.grad) if parameter.grad is not None else None
        state[f"{name}: grad values"] = raw(parameter.grad) if parameter.grad is not None else b""
        state[f"{name}: tensor hooks"] = list(parameter._backward_hooks or ())
    for name, buffer in module.named_buffers(remove_duplicate=False):
        state[f"{name}: object"] = id(buffer)
        state[f"{name}: values"] = raw(buffer)
    return state


def world() -> dict[str, object]:
    """What every network shares."""
    everywhere = torch.nn.modules.module
    return {
        "python": random.getstate(),
        "numpy": [
            each.tobytes() if isinstance(each, np.ndarray) else each
            for each in np.random.get_state()
        ],
        "torch": raw(torch.get_rng_state()),
        "grad mode": torch.is_grad_enabled(),
        "function modes": list(_get_current_function_mode_stack()),
        "global hooks": [
            list(getattr(everywhere, table))
            for table in (
                "_global_forward_hooks",
                "_global_forward_pre_hooks",
                "_global_backward_hooks",
            )
        ],
    }


def changed(before: dict[str, object], after: dict[str, object]) -> dict[str, object]:
    return {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }


def run(
    module: nn.Module, given: Batches, layers: tuple[LayerInfo, ...], **options: Any
) -> BaseException | None:
    """Measure, and return what was raised."""
    try:
        measure_network(module, given, layers, **options)
    except BaseException as error:
        return error
    return None


def failing_reader() -> Iterator[tuple[Tensor, Tensor]]:
    yield batches()[0]
    raise OSError("the disk is gone")


def interrupted(images: int) -> None:
    raise KeyboardInterrupt


def wrong_label() -> list[tuple[Tensor, Tensor]]:
    first, (inputs, labels) = batches()
    return [first, (inputs, labels + CLASSES)]


class Ending(NamedTuple):
    """How a measurement goes, and what comes out of it."""

    expected: type[BaseException] | None
    when: str = "never"
    error: type[BaseException] = RuntimeError
    given: Callable[[], Batches] = batches
    options: Callable[[], dict[str, Any]] = dict


ENDINGS = {
    "success": Ending(None),
    "a module raises": Ending(ModelError, "forward"),
    "a module raises what nobody expects": Ending(ZeroDivisionError, "forward", ZeroDivisionError),
    "the backward pass raises": Ending(ModelError, "backward"),
    "the second batch has a wrong label": Ending(ModelError, given=wrong_label),
    "reading the second batch raises": Ending(OSError, given=failing_reader),
    "a stop before the second batch": Ending(
        Stopped, options=lambda: {"should_stop": iter((False, True)).__next__}
    ),
    "the person presses Ctrl-C": Ending(
        KeyboardInterrupt, options=lambda: {"on_batch": interrupted}
    ),
}


@pytest.fixture(params=ENDINGS)
def ended(request: pytest.FixtureRequest) -> tuple[Stateful, dict[str, object], dict[str, object]]:
    """A network after its measurement, its trace before and the world's before."""
    module, ending = stateful(), ENDINGS[request.param]
    before, shared = trace_of(module), world()
    layers = outline_of(module, size=5).layers
    module.bomb.when, module.bomb.error = ending.when, ending.error
    raised = run(module, ending.given(), layers, **ending.options())
    assert (None if raised is None else type(raised)) == ending.expected, raised
    return module, before, shared


def test_a_measurement_leaves_the_network_as_it_was(
    ended: tuple[Stateful, dict[str, object], dict[str, object]],
) -> None:
    module, before, _ = ended

    assert changed(before, trace_of(module)) == {}


def test_a_measurement_leaves_random_states_and_modes_as_they_were(
    ended: tuple[Stateful, dict[str, object], dict[str, object]],
) -> None:
    _, _, shared = ended

    assert changed(shared, world()) == {}


def test_a_measured_network_pickles_and_copies(
    ended: tuple[Stateful, dict[str, object], dict[str, object]],
) -> None:
    module, _, _ = ended
    module.bomb.when = "never"
    module.eval()
    inputs = batches()[0][0]

    twins = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module)]

    wanted = module(inputs)
    assert [torch.equal(twin(inputs), wanted) for twin in twins] == [True, True]


@pytest.mark.parametrize("case", ["residual_cnn", "vit", "functional", "multi_head"])
def test_a_measured_network_compiles_in_one_graph(case: str) -> None:
    network = ZOO[case]
    module, (inputs, _) = network.module(), network.batches()[0]
    measure_network(module, network.batches(), network.outline().layers)
    module.eval()
    wanted = module(inputs)

    # A hook left behind would break the graph; the backend that runs it as it is needs no compiler.
    compiled = torch.compile(module, backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(inputs), wanted)


@pytest.mark.parametrize("case", ZOO)
def test_no_network_of_the_zoo_is_changed_by_a_measurement(case: str) -> None:
    network = ZOO[case]
    module, layers = network.module(), network.outline().layers
    before, shared = trace_of(module), world()

    measure_network(module, network.batches(), layers)

    assert changed(before, trace_of(module)) == {}
    assert changed(shared, world()) == {}


@pytest.mark.parametrize("case", ZOO)
def test_no_network_of_the_zoo_is_changed_by_its_outline(case: str) -> None:
    network = ZOO[case]
    module = network.module()
    before, shared = trace_of(module), world()

    outline_of(module, size=network.size)

    assert changed(before, trace_of(module)) == {}
    assert changed(shared, world()) == {}


def test_an_outline_that_fails_changes_nothing() -> None:
    module = stateful()
    module.bomb.when = "forward"
    before, shared = trace_of(module), world()

    with pytest.raises(ModelError, match="does not run on a 5 px image: no way through"):
        outline_of(module, size=5)

    assert changed(before, trace_of(module)) == {}
    assert changed(shared, world()) == {}


def test_a_buffer_that_the_pass_replaces_is_put_back() -> None:
    module = Replacing()
    before = trace_of(module)
    layers = outline_of(module, size=5).layers

    measure_network(module, batches(), layers)

    assert changed(before, trace_of(module)) == {}


def test_a_measured_network_goes_on_training_as_if_nothing_had_been() -> None:
    def step(module: nn.Module) -> list[bytes]:
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        optimiser.zero_grad()
        inputs, labels = network.batches()[0]
        nn.functional.cross_entropy(module(inputs), labels).backward()
        optimiser.step()
        return [raw(each) for each in module.state_dict().values()]

    network = ZOO["residual_cnn"]
    untouched, traced = network.module(), network.module()

    measure_network(traced, network.batches(), network.outline().layers)

    assert step(traced) == step(untouched)


def test_the_hooks_of_others_stay() -> None:
    network = ZOO["vit"]
    module = network.module()
    calls: list[str] = []
    module.norm.register_forward_hook(lambda each, args, output: calls.append("theirs"))

    measure_network(module, network.batches(), network.outline().layers)
    module(network.batches()[0][0])

    assert calls == ["theirs"] * (BATCHES + 1)


def test_activations_are_let_go_when_the_tracing_ends() -> None:
    network = ZOO["residual_cnn"]
    module = network.module()
    inputs, _ = network.batches()[0]
    fired: list[Tensor] = []
    with traced_forward(
        module, after_activation=lambda site, h: holder.gradient(h, fired.append)
    ) as holder:
        logits = module(inputs)

    logits.sum().backward()

    assert fired == []


def test_hooks_are_gone_after_an_exception_in_the_block() -> None:
    module = nn.Linear(2, 2)

    with suppress(ZeroDivisionError), hooks() as holder:
        holder.before(module, lambda each, args: None)
        holder.after(module, lambda each, args, output: None, always=True)
        raise ZeroDivisionError

    assert [table for table in HOOK_TABLES if vars(module).get(table)] == []


def test_a_thawed_norm_is_frozen_again_and_its_siblings_still_train() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).train()
    module[0].eval()

    with module_kept(module):
        module.train()

    assert [each.training for each in (module, *module)] == [True, False, True]


def test_a_buffer_of_nan_is_left_alone() -> None:
    module = nn.BatchNorm2d(2)
    module.running_mean.fill_(torch.nan)
    version = module.running_mean._version

    with module_kept(module):
        pass

    assert module.running_mean._version == version


@pytest.mark.parametrize("fails", [False, True], ids=["success", "exception"])
def test_a_seeded_block_repeats_itself_and_gives_the_states_back(fails: bool) -> None:
    def draw() -> tuple[float, float, float]:
        return (random.random(), float(np.random.random()), float(torch.rand(())))

    drawn: list[tuple[float, float, float]] = []
    before = world()

    for _ in range(2):
        with suppress(ZeroDivisionError), random_state_kept(3):
            drawn.append(draw())
            if fails:
                raise ZeroDivisionError

    assert changed(before, world()) == {}
    assert drawn[0] == drawn[1]
