"""Networks that do odd things in their forward: figures stay right, or the refusal says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ModelError
from core.measure import measure_network, watching
from tests.zoo import CLASSES, outline_of

SIDE = 6
Batches = list[tuple[Tensor, Tensor]]


class Simple(nn.Module):
    """One layer and a head; what lies between is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3 * SIDE**2, 8)
        self.head = nn.Linear(8, CLASSES)


class WritesIntoItsInput(Simple):
    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.3).div_(0.5)
        h = self.a(x.flatten(1))
        return self.head(F.gelu(h) if x.mean() > 0 else F.silu(h))


class CatchesAll(Simple):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(1))
        try:
            h = F.gelu(h) if x.mean() > 0 else F.silu(h)
        except Exception:
            h = h * 0
        return self.head(h)


class Narrows(Simple):
    def forward(self, x: Tensor) -> Tensor:
        units = 8 if len(x) == 4 else 5
        h = F.gelu(self.a(x.flatten(1))[:, :units])
        return self.head(F.pad(h, (0, 8 - units)))


class KeepsATable(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8))
        self.table: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.table:
            self.table["bias"] = self.bias * 2
        return self.head(F.gelu(self.a(x.flatten(1)) + self.table["bias"]))


class Bounded(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Hardtanh(-0.7, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(5 * self.a(x.flatten(1))))


class SwapsBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(3 * SIDE**2, 8) for _ in range(2))
        self.act_a, self.act_b = nn.GELU(), nn.GELU()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if x.mean() > 0:
            left = self.act_a(self.a(flat))
            right = self.act_b(self.b(flat))
        else:
            right = self.act_b(self.b(flat))
            left = self.act_a(self.a(flat))
        return self.head(left + right)


def batches() -> Batches:
    """Three batches, the second of negative images, the last a smaller one."""
    drawn = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn((n, 3, SIDE, SIDE), generator=drawn) + shift,
            torch.arange(n) % CLASSES,
        )
        for n, shift in ((4, 1.0), (4, -1.0), (3, 1.0))
    ]


def mean_loss(module: nn.Module) -> float:
    with torch.no_grad():
        losses = [
            F.cross_entropy(module(images.clone()), labels, reduction="sum")
            for images, labels in batches()
        ]
    return float(torch.stack(losses).sum()) / 11


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_what_a_network_writes_into_its_input_is_not_seen_by_the_next_pass() -> None:
    module = WritesIntoItsInput()
    layers = outline_of(module, size=SIDE).layers
    given, kept = batches(), batches()

    for _ in range(2):  # as the twin takes the same batches
        found = measure_network(module, given, layers)
        assert found.loss == pytest.approx(mean_loss(module), rel=1e-6)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(given, kept, strict=True))


def test_a_network_that_catches_exceptions_still_goes_its_own_way() -> None:
    module = CatchesAll()
    found = measure_network(module, batches(), outline_of(module, size=SIDE).layers)
    assert found.loss == pytest.approx(mean_loss(module), rel=1e-6)


def test_branches_in_another_order_keep_their_figures() -> None:
    module = SwapsBranches()
    with torch.no_grad():
        module.b.weight *= 10
        flat = torch.cat([images for images, _ in batches()]).flatten(1)
        wanted = {
            name: float(F.gelu(getattr(module, name)(flat)).abs().mean()) for name in ("a", "b")
        }

    found = measure_network(module, batches(), outline_of(module, size=SIDE).layers)

    for name, value in wanted.items():
        assert found.metrics[name]["activation_mean_abs"].value == pytest.approx(value, rel=1e-5)


def test_an_activation_of_another_width_is_refused_before_anything_is_added() -> None:
    module = Narrows()
    with watching(module, outline_of(module, size=SIDE).layers) as gauge:
        (images, labels), _, (fewer, last) = batches()
        gauge.add(images, labels, first=0)
        with pytest.raises(ModelError, match=r'"gelu" had 8 units .* has 5'):
            gauge.add(fewer, last, first=4)
        assert gauge.shard.samples == 4
        assert {each.reached for each in gauge.shard.gradients.values()} == {1}


def test_float16_measures_a_network_that_keeps_a_table_and_leaves_none() -> None:
    module = KeepsATable()
    found = measure_network(
        module, batches(), outline_of(module, size=SIDE).layers, dtype=torch.float16
    )
    assert module.table == {}
    assert found.loss == pytest.approx(mean_loss(module), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bound_that_a_short_type_rounds_inwards_still_saturates(dtype: torch.dtype) -> None:
    module = Bounded()
    layers = outline_of(module, size=SIDE).layers
    wide, short = (
        measure_network(module, batches(), layers, dtype=each).metrics["a"]["saturated_fraction"]
        for each in (torch.float32, dtype)
    )
    assert wide.value is not None
    assert 0.3 < wide.value < 1
    assert short.value == pytest.approx(wide.value, abs=0.05)


def test_a_frozen_layer_takes_no_interval_from_the_others() -> None:
    from tests.zoo import ZOO

    case = ZOO["frozen"]
    drawn = torch.Generator().manual_seed(2)
    images = [torch.randn((4, 3, case.size, case.size), generator=drawn) for _ in range(3)]
    found = measure_network(
        case.module(), [(each, torch.arange(4) % CLASSES) for each in images], case.outline().layers
    )
    figure = "unit_grad_mean_abs_mean"
    assert found.metrics["first"][figure].value is None
    assert found.metrics["second"][figure].half_width is not None


def test_compiled_parts_run_as_written_and_stay_compiled() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 8), nn.GELU())
            self.inner = torch.compile(inner, backend="eager")
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    module = Compiled()
    found = measure_network(module, batches(), outline_of(module, size=SIDE).layers)
    assert found.metrics["inner._orig_mod.1"]["activation_mean_abs"].value is not None
    assert found.loss == pytest.approx(mean_loss(module), rel=1e-6)
