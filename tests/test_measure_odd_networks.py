"""Networks that do odd things in their forward: figures stay right, or the refusal says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ModelError
from core.measure import gauging, measure_network
from core.network.hooks import hooks
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
    with gauging(module, outline_of(module, size=SIDE).layers) as gauge:
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


class TokensFirst(nn.Module):
    """Tokens, batch, channels behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 2, stride=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.a(x).flatten(2).permute(2, 0, 1)).mean(0))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ChannelNorm2d(nn.LayerNorm):
    """A norm over channels as ConvNeXt has it, whose weight may fit the last axis too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Behind(nn.Module):
    """A part behind a convolution of 8 channels, whose output is fed to GELU."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a = part
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        # Pooling blends, so that the activation is the part's and not the stem's.
        x = F.gelu(self.a(F.silu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def per_unit(module: nn.Module, given: Batches, axis: int) -> Tensor:
    """Return the mean magnitude behind GELU by unit, from the values themselves."""
    kept: list[Tensor] = []
    gelu = F.gelu

    def noted(z: Tensor) -> Tensor:
        kept.append(gelu(z))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(F, "gelu", noted)
        for images, _ in given:
            module(images)
    rows = torch.cat([each.movedim(axis, -1).flatten(0, -2) for each in kept])
    return rows.double().abs().mean(0)


@pytest.mark.parametrize(
    ("module", "axis", "size"),
    [
        pytest.param(TokensFirst, 2, 6, id="batch on axis 1"),
        pytest.param(lambda: Behind(Scale()), 1, 8, id="scale"),
        pytest.param(lambda: Behind(ChannelNorm2d(8)), 1, 8, id="norm over channels"),
        pytest.param(lambda: Behind(nn.GroupNorm(2, 8)), 1, 8, id="group norm"),
    ],
)
def test_units_stay_on_their_axis_where_batch_or_image_is_as_wide(
    module: Callable[[], nn.Module], axis: int, size: int
) -> None:
    network = module()
    drawn = torch.Generator().manual_seed(3)
    given = [
        (torch.randn((8, 3, size, size), generator=drawn), torch.arange(8) % CLASSES)
        for _ in range(2)
    ]
    found = measure_network(network, given, outline_of(network, size=size).layers)
    wanted = per_unit(network, given, axis)
    assert found.units["a"]["unit_mean_abs"] == pytest.approx(wanted.numpy(), rel=1e-5)


class WritesThroughAView(Simple):
    def __init__(self, *, in_place: bool, used_too: bool) -> None:
        super().__init__()
        self.in_place, self.used_too = in_place, used_too

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x.flatten(1))
        if self.in_place:
            h = z[:, 2:6].relu_()
        else:
            h = z[:, 2:6].relu()
            z = torch.cat([z[:, :2], h, z[:, 6:]], 1)
        return self.head(z) + (h.sum(1, keepdim=True) * 3 if self.used_too else 0)


@pytest.mark.parametrize("used_too", [False, True])
def test_an_activation_written_through_a_view_has_its_whole_gradient(*, used_too: bool) -> None:
    in_place, apart = (
        WritesThroughAView(in_place=each, used_too=used_too) for each in (True, False)
    )
    apart.load_state_dict(in_place.state_dict())
    one, other = (
        measure_network(each, batches(), outline_of(each, size=SIDE).layers)
        for each in (in_place, apart)
    )
    assert one.metrics["a"]["unit_grad_mean_abs_mean"].value is not None
    assert one.units["a"]["unit_grad_mean_abs"] == pytest.approx(
        other.units["a"]["unit_grad_mean_abs"], rel=1e-6
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_view_is_cut_out_whatever_the_layout(*, transposed: bool) -> None:
    leaf = torch.arange(12.0).reshape(3, 4).requires_grad_()
    base = leaf * 1
    view = (base.T if transposed else base)[1:3, 1:]
    view.mul_(2)
    seen: list[Tensor] = []
    weights = torch.arange(12.0).reshape(4, 3).T
    with hooks() as holder:
        holder.gradient(view, seen.append)
        (base * weights).sum().backward()
    assert torch.equal(seen[0], (weights.T if transposed else weights)[1:3, 1:])


class TakesAGradientInside(Simple):
    """The loss does not reach the activation; a gradient taken inside the forward does."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x.flatten(1)))
        if torch.is_grad_enabled():
            torch.autograd.grad(h.sum(), self.a.weight, retain_graph=True)
        return self.head(h.detach())


def test_a_gradient_taken_inside_the_forward_is_not_the_losss() -> None:
    module = TakesAGradientInside()
    found = measure_network(module, batches(), outline_of(module, size=SIDE).layers).metrics["a"]
    assert found["unit_grad_mean_abs_mean"].value is None
    assert found["grad_l2"].reason is not None
    assert "no gradient reaches the layer" in found["grad_l2"].reason


class Rebuilds(Simple):
    """Changes itself in its forward in every way that Python gives."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.GELU()
        self.register_buffer("mask", None)
        self.register_parameter("late", None)
        self.tables: dict[str, list[Tensor]] = {"kept": []}

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.act, nn.GELU):
            self.act = nn.Sequential(self.act)
        if self.mask is None:
            self.mask = self.a.weight.mean(1)
            self.register_buffer("new", torch.ones(3))
        if self.late is None:
            self.late = nn.Parameter(torch.ones(1))
        self.tables["kept"].append(self.a.bias * 1)
        h = self.act(self.a(x.flatten(1)) + self.mask + self.tables["kept"][0])
        if torch.is_grad_enabled():
            (h.sum() * 1e3).backward(retain_graph=True)
        return self.head(h) * self.late


def test_a_network_that_changes_itself_in_its_forward_is_put_back_after_each_pass() -> None:
    module, other = Rebuilds(), Rebuilds()
    other.load_state_dict(module.state_dict())
    layers = outline_of(other, size=SIDE).layers
    held = [torch.full_like(each, 7.0) for each in module.parameters()]
    for parameter, gradient in zip(module.parameters(), held, strict=True):
        parameter.grad = gradient
    names = list(module.state_dict())

    found = measure_network(module, batches(), layers)

    assert list(module.state_dict()) == names
    assert type(module.act) is nn.GELU
    assert module.tables == {"kept": []}
    assert all(
        parameter.grad is gradient and bool((gradient == 7.0).all())
        for parameter, gradient in zip(module.parameters(), held, strict=True)
    )
    assert found.metrics["a"]["grad_l2"].value is not None


class Empty(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.a(x.flatten(1)))) + self.nothing.sum()


def test_a_parameter_without_entries_has_reasons_and_no_figures() -> None:
    module = Empty()
    layers = outline_of(module, size=SIDE).layers
    found = measure_network(module, batches(), layers, histograms=True)
    figures = found.metrics["nothing"]
    assert {each.value for each in figures.values()} == {None}
    assert figures["grad_l2"].reason == figures["weight_l2"].reason == "the weight has no entries"


def test_a_frozen_weight_beside_a_trained_bias_is_named() -> None:
    module = Bounded()
    module.a.weight.requires_grad_(False)
    found = measure_network(module, batches(), outline_of(module, size=SIDE).layers)
    reason = found.metrics["a"]["grad_l2"].reason
    assert reason == "a.weight is frozen: it gets no gradient, though others of its layer do"


class Turned(nn.Module):
    """A convolution whose output is turned before GELU, as wide as its images and batch."""

    def __init__(self, turn: Callable[[Tensor], Tensor], axis: int) -> None:
        super().__init__()
        self.turn, self.axis = turn, axis
        self.a = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.turn(self.a(x)))
        return self.head(h.movedim(self.axis, -1).flatten(0, -2).view(len(x), -1, 8).mean(1))


@pytest.mark.parametrize(
    ("turn", "axis"),
    [
        pytest.param(lambda z: z.flatten(2).mT, 2, id="property"),
        pytest.param(lambda z: torch.permute(input=z, dims=(0, 2, 3, 1)), 3, id="by keyword"),
        pytest.param(lambda z: z.transpose(1, 3), 3, id="transposed"),
        pytest.param(lambda z: z.roll(2, 3).permute(0, 3, 1, 2), 2, id="rolled"),
        pytest.param(
            lambda z: F.adaptive_avg_pool2d(z, 1).flatten(1)[..., None].expand(-1, -1, 64),
            1,
            id="expanded",
        ),
    ],
)
def test_units_are_followed_through_what_turns_them(
    turn: Callable[[Tensor], Tensor], axis: int
) -> None:
    module = Turned(turn, axis)
    drawn = torch.Generator().manual_seed(3)
    given = [(torch.randn((8, 3, 8, 8), generator=drawn), torch.arange(8) % CLASSES)]
    layers = outline_of(module, size=8).layers
    found = measure_network(module, given, layers)
    assert found.units["a"]["unit_mean_abs"] == pytest.approx(
        per_unit(module, given, axis).numpy(), rel=1e-5
    )


@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(lambda z: z[:, torch.arange(7, -1, -1)], id="indexed"),
        pytest.param(lambda z: z.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), id="shuffled"),
    ],
)
def test_units_out_of_order_are_not_taken_for_the_layers(turn: Callable[[Tensor], Tensor]) -> None:
    module = Turned(turn, 1)
    found = measure_network(module, batches(), outline_of(module, size=SIDE).layers).metrics["a"]
    assert found["dormant_fraction"].reason == (
        "the layer feeds no activation function to which its units can be followed"
    )
    assert found["grad_l2"].value is not None
