"""What one forward pass tells of a network: order, coupling, and who feeds which activation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ModelError
from core.load import build_module, head_names, resolve_model
from core.measure import measure_network
from core.network.activations import FUNCTIONS, Activation, derivative
from core.network.attention import attention_of
from core.network.outline import example_input, stage_of
from core.network.trace import OtherPassError, Site, first_tensor, traced, traced_forward
from tests.reference import (
    elu,
    gelu,
    gelu_tanh,
    hardswish,
    mish,
    relu,
    relu6,
    sigmoid,
    silu,
    softplus,
    tanh,
)
from tests.zoo import CLASSES, ZOO, layer, outline_of, statistics


def sites_of(call: Callable[[Tensor], Tensor]) -> list[Site]:
    """The sites that a call, or a pass of a network, comes by, in order."""
    found: list[Site] = []
    module = call if isinstance(call, nn.Module) else nn.Identity()
    with traced_forward(module, before_activation=lambda site, z: found.append(site)):
        call(torch.randn(2, 3))
    return found


# Catching activations.


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (nn.ReLU(), Activation("relu")),
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.ReLU6(inplace=True), Activation("relu6")),
        (nn.Hardtanh(-2.0, 0.5), Activation("hardtanh", (-2.0, 0.5))),
        (nn.LeakyReLU(0.2, inplace=True), Activation("leaky_relu", (0.2,))),
        (nn.ELU(0.5), Activation("elu", (0.5,))),
        (nn.CELU(0.5), Activation("celu", (0.5,))),
        (nn.SELU(inplace=True), Activation("selu")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        (nn.SiLU(inplace=True), Activation("silu")),
        (nn.Mish(inplace=True), Activation("mish")),
        (nn.Hardswish(inplace=True), Activation("hardswish")),
        (nn.Hardsigmoid(inplace=True), Activation("hardsigmoid")),
        (nn.Sigmoid(), Activation("sigmoid")),
        (nn.Tanh(), Activation("tanh")),
        (nn.Softsign(), Activation("softsign")),
    ],
    ids=str,
)
def test_an_activation_module_is_caught_once_with_its_settings(
    module: nn.Module, activation: Activation
) -> None:
    found = sites_of(module)

    assert [site.activation for site in found] == [activation]


@pytest.mark.parametrize("call", [F.softplus, nn.Softplus()])
def test_a_softplus_is_caught(call: Callable[[Tensor], Tensor]) -> None:
    assert [site.activation.name for site in sites_of(call)] == ["softplus"]


@pytest.mark.parametrize(
    ("call", "activation"),
    [
        (F.relu, Activation("relu")),
        (lambda x: F.relu(x, inplace=True), Activation("relu")),
        (torch.relu, Activation("relu")),
        (torch.relu_, Activation("relu")),
        (lambda x: x.relu(), Activation("relu")),
        (lambda x: x.relu_(), Activation("relu")),
        (F.relu6, Activation("relu6")),
        (lambda x: F.leaky_relu(x, 0.3), Activation("leaky_relu", (0.3,))),
        (lambda x: F.leaky_relu(x, negative_slope=0.3), Activation("leaky_relu", (0.3,))),
        (lambda x: F.leaky_relu(input=x), Activation("leaky_relu", (0.01,))),
        (lambda x: F.hardtanh(x, max_val=0.5), Activation("hardtanh", (-1.0, 0.5))),
        (lambda x: F.gelu(x, approximate="tanh"), Activation("gelu_tanh")),
        (F.gelu, Activation("gelu")),
        (lambda x: x.sigmoid(), Activation("sigmoid")),
        (lambda x: x.sigmoid_(), Activation("sigmoid")),
        (torch.sigmoid, Activation("sigmoid")),
        (F.sigmoid, Activation("sigmoid")),
        (lambda x: x.tanh(), Activation("tanh")),
        (torch.tanh, Activation("tanh")),
    ],
)
def test_an_activation_called_as_a_function_is_caught_once_with_its_settings(
    call: Callable[[Tensor], Tensor], activation: Activation
) -> None:
    assert [site.activation for site in sites_of(call)] == [activation]


@pytest.mark.parametrize(
    "call", [torch.exp, F.dropout, lambda x: F.softmax(x, dim=1), lambda x: x.clamp(0, 6), abs]
)
def test_what_is_no_activation_is_not_caught(call: Callable[[Tensor], Tensor]) -> None:
    assert sites_of(call) == []


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", relu),
        ("relu6", relu6),
        ("gelu", gelu),
        ("gelu_tanh", gelu_tanh),
        ("silu", silu),
        ("mish", mish),
        ("hardswish", hardswish),
        ("sigmoid", sigmoid),
        ("tanh", tanh),
    ],
)
def test_an_activation_and_its_derivative_follow_the_written_formula(
    name: str, formula: Callable[[Tensor], Tensor]
) -> None:
    z = torch.linspace(-8.05, 8.05, 231, dtype=torch.float64)
    leaf = z.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(formula(leaf).sum(), leaf)

    # Both are float64; the formulas cancel a few of its digits.
    torch.testing.assert_close(Activation(name)(z), formula(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(derivative(Activation(name), z), slope, rtol=0, atol=1e-12)


def test_the_derivative_leaves_its_input_alone_even_without_gradients() -> None:
    z = torch.tensor([-1.0, 2.0])

    with torch.no_grad():
        slope = derivative(Activation("relu"), z)

    assert slope.tolist() == [0.0, 1.0]
    assert (z.requires_grad, z.grad, slope.requires_grad) == (False, None, False)


def test_the_softplus_and_elu_of_the_table_follow_their_formulas() -> None:
    z = torch.linspace(-8.0, 8.0, 101, dtype=torch.float64)

    torch.testing.assert_close(F.softplus(z), softplus(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(Activation("elu", (1.0,))(z), elu(z), rtol=0, atol=1e-12)
    assert {F.softplus, F.elu} <= FUNCTIONS.keys()


# Sites.


class Everything(nn.Module):
    """Sites of every kind of name in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.act = nn.Tanh()
        self.inner = ZOO["functional"].module().inner
        self.inner.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.act(self.lin(x)))
        return torch.sigmoid(self.inner(F.relu(F.relu(x))))


def test_sites_are_named_after_the_module_and_numbered_by_call() -> None:
    module = Everything()

    found = sites_of(module)

    assert [(site.name, site.type) for site in found] == [
        ("act", "Tanh"),
        ("act#2", "Tanh"),
        ("relu", "relu"),
        ("relu#2", "relu"),
        ("inner:silu", "silu"),
        ("sigmoid", "sigmoid"),
    ]


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FallingBack(nn.Module):
    """Tries a child that raises, and goes on without it."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = Refusing()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.fast(x)
        except NotImplementedError:
            return F.relu(x)


def test_a_child_that_raised_no_longer_names_the_sites_behind_it() -> None:
    assert [site.name for site in sites_of(FallingBack())] == ["relu"]


def test_site_names_are_the_same_in_every_pass() -> None:
    module = Everything()

    assert sites_of(module) == sites_of(module)


def test_an_in_place_activation_shows_its_input_before_and_its_output_after() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True))
    seen: list[list[float]] = []

    with traced_forward(
        module,
        before_activation=lambda site, z: seen.append(z.tolist()),
        after_activation=lambda site, h: seen.append(h.tolist()),
    ):
        module(torch.tensor([-1.0, 2.0]))

    assert seen == [[-1.0, 2.0], [0.0, 2.0]]


def test_gradients_of_an_output_that_is_overwritten_later_are_those_of_the_output() -> None:
    seen: list[list[float]] = []
    z = torch.tensor([1.0, 1.0], requires_grad=True)

    with traced_forward(
        nn.Identity(),
        after_activation=lambda site, h: holder.gradient(h, lambda g: seen.append(g.tolist())),
    ) as holder:
        h = F.silu(z)
        h *= 3.0
        h.sum().backward()

    assert seen == [[3.0, 3.0]]


def test_layers_are_reported_once_a_call_also_when_one_runs_twice() -> None:
    module = ZOO["tied"].module()
    ran: list[str] = []

    with traced_forward(module, on_layer=lambda name, each, args, output: ran.append(name)):
        module(torch.randn(2, 3, 2, 2))

    assert ran == ["left", "right", "loop", "loop", "head"]


def test_nothing_is_caught_after_the_block() -> None:
    found: list[Site] = []
    with traced_forward(nn.Identity(), before_activation=lambda site, z: found.append(site)):
        pass

    F.relu(torch.zeros(1))

    assert found == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((None, [torch.tensor(1), torch.tensor(2)]), 1),
        ({"out": torch.tensor(3), "aux": torch.tensor(4)}, 3),
        (("text", {}, ()), None),
        (torch.tensor(5), 5),
    ],
)
def test_first_tensor_is_found_in_nested_outputs(value: object, expected: int | None) -> None:
    found = first_tensor(value)

    assert (None if found is None else int(found)) == expected


# Outlines.


@pytest.mark.parametrize("case", ZOO)
def test_layers_come_in_running_order_with_unexecuted_ones_last(case: str) -> None:
    layers = ZOO[case].outline().layers

    assert tuple(each.name for each in layers) == ZOO[case].order
    assert [each.index for each in layers] == list(range(len(layers)))


@pytest.mark.parametrize("case", ZOO)
def test_each_layer_feeds_the_activation_that_reads_it(case: str) -> None:
    found = {each.name: each.activation for each in ZOO[case].outline().layers}

    assert {name: site for name, site in found.items() if site} == ZOO[case].feeds


@pytest.mark.parametrize("case", ZOO)
def test_running_statistics_are_coupled_to_the_layer_they_describe(case: str) -> None:
    found = {each.name: each.coupled_buffers for each in ZOO[case].outline().layers}

    assert {name: buffers for name, buffers in found.items() if buffers} == ZOO[case].coupled


@pytest.mark.parametrize("case", ZOO)
def test_attention_belongs_to_the_layer_that_makes_its_queries(case: str) -> None:
    found = {each.name: each.attention for each in ZOO[case].outline().layers}

    assert {name: site for name, site in found.items() if site} == ZOO[case].asks


@pytest.mark.parametrize("case", ZOO)
def test_an_outline_lists_every_parameter_and_buffer_of_the_state_once(case: str) -> None:
    module = ZOO[case].module()
    outline = ZOO[case].outline()
    with_parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]

    parameters = [p.name for each in outline.layers for p in each.parameters]
    buffers = [name for each in outline.layers for name in each.buffers]

    assert sorted(parameters) == sorted(with_parameters)
    # A module without parameters is no layer, so its constants are nobody's.
    wanted = [name for name in module.state_dict() if name not in with_parameters]
    assert sorted(buffers) == sorted(name for name in wanted if not name.startswith("fixed."))


@pytest.mark.parametrize("case", ZOO)
def test_only_layers_sized_by_the_classes_are_the_head(case: str) -> None:
    assert ZOO[case].outline().head == ("head",)


@pytest.mark.parametrize("case", ZOO)
def test_only_the_layer_that_never_runs_is_marked_so(case: str) -> None:
    idle = [each.name for each in ZOO[case].outline().layers if not each.executed]

    assert idle == (["spare"] if case == "tuple" else [])


def test_tied_parameters_name_their_whole_group() -> None:
    outline = ZOO["tied"].outline()

    assert {each.name: each.tied for each in outline.layers} == {
        "left": (("left.weight", "right.weight"),),
        "right": (("left.weight", "right.weight"),),
        "loop": (),
        "head": (),
    }
    # Counted once: 12 x 12 twice, three biases of 12, and the head.
    assert outline.parameters == 2 * 144 + 3 * 12 + 12 * CLASSES + CLASSES


@pytest.mark.parametrize(
    ("case", "name", "kind"),
    [
        ("vit", "patch", "conv"),
        ("vit", "cls_token", "other"),
        ("vit", "norm", "norm"),
        ("vit", "blocks.0.attn.qkv", "linear"),
        ("residual_cnn", "block.norm2", "norm"),
        ("tuple", "pair", "linear"),
    ],
)
def test_layers_are_told_apart_by_kind(case: str, name: str, kind: str) -> None:
    assert layer(ZOO[case].outline(), name).kind == kind


class Branching(nn.Module):
    """An addition that makes a new tensor behind a branch whose own last layer ran last."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.skip(x)
        x = F.relu(skipped + self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))


def test_the_last_layer_of_a_branch_feeds_the_activation_behind_an_addition() -> None:
    outline = outline_of(Branching(), size=3)

    assert {each.name: each.activation for each in outline.layers} == {
        "skip": None,
        "conv": "relu",
        "norm": None,
        "head": None,
    }


class NormAfterActivation(nn.Module):
    """Convolution, ReLU and only then the norm, whose statistics are those of the ReLU's output."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act1 = nn.ReLU(inplace=inplace)
        self.norm = nn.BatchNorm2d(4)
        self.act2 = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.norm(self.act1(self.conv(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True], ids=["new tensor", "in place"])
def test_a_norm_behind_an_activation_is_a_feeder_of_its_own(inplace: bool) -> None:
    outline = outline_of(NormAfterActivation(inplace=inplace), size=3)

    assert [(each.name, each.activation, each.coupled_buffers) for each in outline.layers] == [
        ("conv", "act1", ()),
        ("norm", "act2", ()),
        ("head", None, ()),
    ]


class Fused(nn.BatchNorm2d):
    """A norm that holds its activation, as timm's do."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_norm_fused_with_its_activation_is_fed_by_the_layer_before() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), Fused(4), nn.Flatten(), nn.Linear(16, CLASSES))

    outline = outline_of(module, size=2)

    assert [(each.name, each.activation, each.coupled_buffers) for each in outline.layers] == [
        ("0", "1.act", statistics("1")),
        ("1", None, ()),
        ("3", None, ()),
    ]


class TurnedRound(nn.Module):
    """A depthwise convolution among tokens: its channels lie last when the activation comes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.act = nn.GELU()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = self.depthwise(x.transpose(1, 2).unflatten(2, (side, side)))
        return self.head(self.act(x.flatten(2).transpose(1, 2)).mean(1))


def test_units_that_were_turned_round_are_still_those_of_the_convolution() -> None:
    module = TurnedRound()
    layers = outline_of(module, size=4).layers

    found = measure_network(module, [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))], layers)

    assert {each.name: each.activation for each in layers}["depthwise"] == "act"
    assert found.unit_counts["depthwise"] == 6
    assert found.metrics["depthwise"]["saturated_fraction"].n == 2 * 16


class GatedHalves(nn.Module):
    """One layer makes gate and value; the activation sees half of its units."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(12, 10)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x.flatten(1)).chunk(2, dim=-1)
        return self.head(F.silu(gate) * value)


def test_a_gate_that_is_half_of_a_layer_speaks_of_that_layer() -> None:
    module = GatedHalves()
    layers = outline_of(module, size=2).layers

    found = measure_network(module, [(torch.randn(4, 3, 2, 2), torch.arange(4) % CLASSES)], layers)

    assert {each.name: each.activation for each in layers}["both"] == "silu"
    assert found.unit_counts["both"] == 5


class WithTorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        mixed, _ = self.attn(x, x, x, need_weights=False)
        return self.head(mixed.mean(1))


def test_the_projection_that_torch_attention_uses_as_a_tensor_counts_as_run() -> None:
    outline = outline_of(WithTorchAttention(), size=2)

    assert [(each.name, each.executed) for each in outline.layers] == [
        ("embed", True),
        ("attn", True),
        ("attn.out_proj", True),
        ("head", True),
    ]


def test_a_network_that_cannot_run_is_named_with_its_size() -> None:
    with pytest.raises(
        ModelError, match=r"tiny does not run on a 5 px image: .*Choose another model\."
    ):
        outline_of(ZOO["vit"].module(), size=5)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("cls_token", "cls_token"),
        ("head", "head"),
        ("blocks.3.attn.qkv", "blocks.3"),
        ("layer1.0.conv1", "layer1.0"),
        ("encoder.layers.2.mlp.fc1", "encoder.layers.2"),
        ("patch_embed.proj", "patch_embed"),
    ],
)
def test_a_layer_is_shown_under_its_block(name: str, stage: str) -> None:
    assert stage_of(name) == stage


def test_the_example_input_is_on_the_networks_own_dtype_and_repeats() -> None:
    module = nn.Linear(2, 2).double()

    first, second = example_input(module, size=3), example_input(module, size=3)

    assert (first.dtype, tuple(first.shape)) == (torch.float64, (2, 3, 3, 3))
    assert torch.equal(first, second)


def test_the_head_of_a_library_model_is_found_by_its_shape() -> None:
    spec = resolve_model("timm:test_vit", weights="none")

    assert head_names(spec) == {"head.weight", "head.bias"}


def test_a_library_transformer_is_outlined_whole() -> None:
    spec = resolve_model("timm:test_vit", weights="none")
    module = build_module(spec, classes=CLASSES, seed=0)

    outline = outline_of(module, size=160, head=head_names(spec))

    assert outline.head == ("head",)
    assert all(each.executed for each in outline.layers)
    assert sum(math.prod(p.shape) for each in outline.layers for p in each.parameters) == (
        outline.parameters
    )
    assert {each.name: each.activation for each in outline.layers if each.activation} == {
        f"blocks.{i}.mlp.fc1": f"blocks.{i}.mlp.act" for i in range(len(module.blocks))
    }


# Later passes are held to the first


class Turning(nn.Module):
    """Goes one way with bright images and another with dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bright = bool(x.mean() > 0)
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x)) if bright else F.gelu(self.right(x))
        return self.fc(x.mean((2, 3)))


def hooked(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def test_modules_run_undisturbed_once_their_activations_are_known() -> None:
    module = Turning()
    passes: list[list[str]] = []
    hooks_in_the_pass: list[int] = []
    with traced(module) as tracing:
        for _ in range(3):
            passes.append([])

            def seen(site: Site, z: Tensor) -> None:
                passes[-1].append(site.name)
                hooks_in_the_pass.append(hooked(module))

            with tracing.kept(), tracing.forward(before_activation=seen):
                module(torch.ones(2, 3, 4, 4))

    assert passes == [["relu", "relu#2"]] * 3
    assert hooks_in_the_pass[0] > 0
    assert hooks_in_the_pass[2:] == [0] * 4
    assert hooked(module) == 0


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_a_pass_that_goes_another_way_is_refused(first: float) -> None:
    module = Turning()
    with traced(module) as tracing:
        with tracing.kept(), tracing.forward():
            module(torch.full((2, 3, 4, 4), first))

        with pytest.raises(OtherPassError), tracing.kept(), tracing.forward():
            module(torch.full((2, 3, 4, 4), -first))

        tracing.forget()
        with tracing.kept(), tracing.forward():
            module(torch.full((2, 3, 4, 4), -first))
    assert hooked(module) == 0


def test_a_pass_through_another_branch_that_looks_alike_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = nn.ModuleList(
                nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            kinds = x[:, 0].round().long()
            rows = [x[kinds == i] for i in range(3)]
            return torch.cat(
                [each(own) for each, own in zip(self.made, rows, strict=True) if len(own)]
            )

    module = Experts()
    seen: list[str] = []

    def passed(*kinds: float) -> list[str]:
        seen.clear()
        with (
            tracing.kept(),
            tracing.forward(before_activation=lambda site, z: seen.append(site.name)),
        ):
            module(torch.tensor(kinds, dtype=torch.float32)[:, None].expand(-1, 3))
        return list(seen)

    with traced(module) as tracing:
        assert passed(0, 1, 1) == ["made.0.1", "made.1.1"]
        assert passed(1, 0) == ["made.0.1", "made.1.1"]
        with pytest.raises(OtherPassError):
            passed(0, 2)
        tracing.forget()
        assert passed(0, 2) == ["made.0.1", "made.2.1"]


def test_a_pass_that_ends_early_or_goes_on_is_refused() -> None:
    class Longer(nn.Module):
        times = 2

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = F.relu(x)
            return x

    module = Longer()
    for times in (1, 3):
        module.times = 2
        with traced(module) as tracing:
            with tracing.kept(), tracing.forward():
                module(torch.ones(2, 3))
            module.times = times
            with pytest.raises(OtherPassError), tracing.kept(), tracing.forward():
                module(torch.ones(2, 3))


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_heads_are_counted_where_windows_stand_between(place: int, fused: bool) -> None:
    heads, windows = 3, 4
    lead = [2, windows]
    lead.insert(place, heads)
    query, key = torch.randn(*lead, 6, 8), torch.randn(*lead, 6, 8)
    scores = (query @ key.transpose(-2, -1)) * 8**-0.5
    if fused:
        found = attention_of(
            F.scaled_dot_product_attention, (query, key, key), {}, None, heads=heads
        )
    else:
        found = attention_of(torch.softmax, (scores, -1), {}, scores.softmax(-1), heads=heads)

    assert found is not None
    assert found.shape == (2 * windows, heads, 6, 6)
    assert found.heads_apart
    chosen = torch.zeros(2 * windows, 1, dtype=torch.long)
    expected = scores.softmax(-1).movedim(place, 2).flatten(0, 1)[:, :, :1]
    torch.testing.assert_close(found.weights_of(chosen), expected)


def test_heads_that_share_an_axis_with_images_are_not_told_apart() -> None:
    scores = torch.randn(2 * 8, 4, 6, 6)

    found = attention_of(torch.softmax, (scores, -1), {}, scores.softmax(-1), heads=8)

    assert found is not None
    assert not found.heads_apart


def test_later_passes_know_how_many_heads_there_are() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 3

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    module = nn.Sequential(Windows(), nn.Identity())
    seen = []
    with traced(module) as tracing:
        for _ in range(3):
            with tracing.forward(on_attention=lambda _, __, found: seen.append(found)):
                module(torch.rand(2, 3, 4, 6, 5))

    assert [found.shape for found in seen] == [(8, 3, 6, 6)] * 3
    assert all(found.heads_apart for found in seen)
