"""Networks that are neighbours of those whose figures were once wrong, against plain autograd.

Each network has an odd way through itself and a plain one: the same function, written out for the
reference. Everything in them is 8: units, batch, height and width, so that no size tells an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn

from core.measure import Measured, measure_network
from tests import reference
from tests.reference import Formula, Pass, convolution, layer_norm, linear, truth
from tests.test_measure_reference import FLOAT32, tolerance
from tests.zoo import CLASSES, outline_of

SIDE = 8
Way = Callable[[nn.Module, Tensor], Tensor]
Plain = Callable[[nn.Module, Tensor, Pass], Tensor]
Op = Callable[[Tensor], Tensor]


class Odd(nn.Module):
    """Two convolutions, a part and a head; what happens between them is the way's."""

    def __init__(self, way: Way, part: nn.Module | None = None) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.part = part
        self.act: nn.Module = nn.GELU()
        self.seq, self.parts = nn.Sequential(nn.GELU()), nn.ModuleList()
        self.late: nn.Module | None = None
        self.hook = None
        self.count = 0
        self.register_buffer("kept", None)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def given() -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(3)
    return [
        (torch.randn((8, 3, SIDE, SIDE), generator=drawn), torch.arange(8) % CLASSES)
        for _ in range(2)
    ]


def held_to_the_reference(
    way: Way, plain: Plain, part: Callable[[], nn.Module] | None = None, *, empty: bool = False
) -> Measured:
    """Measure a network and hold every figure to the truth; the network must be as it was."""
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(Odd(way, part() if part else None))
        with torch.no_grad():
            for parameter in networks[-1].parameters():
                parameter.mul_(1.7)
    measured, other = networks
    layers = outline_of(measured, size=SIDE).layers
    had = {name: set(vars(each)) for name, each in measured.named_modules()}

    found = measure_network(measured, given(), layers)

    # Of what nothing is used the reference says nothing.
    used = ["a", "b", "head", *(["part"] if part and not empty else [])]
    wanted = truth(other, given(), plain, used)
    assert found.loss == pytest.approx(wanted.loss, rel=FLOAT32)
    for name in used:
        for metric, (value, _) in wanted.metrics[name].items():
            # Signal to noise is a difference of nearly equal numbers.
            near = 1e-3 if metric == "grad_snr" else 3 * tolerance(metric)
            figure = found.metrics[name][metric]
            spread = (wanted.metrics[name]["weight_std"][0] or 0.0) * (metric == "weight_mean")
            assert figure.value == (
                None if value is None else pytest.approx(value, rel=near, abs=near * spread + 1e-12)
            ), (name, metric, figure.reason)
        for metric, values in wanted.units[name].items():
            loose = 3 * tolerance(metric) * float(np.abs(values).max())
            np.testing.assert_allclose(
                found.units[name][metric], values, rtol=3 * FLOAT32, atol=loose, err_msg=metric
            )
    assert {name: set(vars(each)) for name, each in measured.named_modules()} == had
    assert measured.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, measured.state_dict().values(), other.state_dict().values()))
    assert not any(each._forward_hooks for each in measured.modules())
    return found


# Units on another axis, or on none

PERMUTED = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
MIXES = torch.randn((8, 8), generator=torch.Generator().manual_seed(9))


def written_over(z: Tensor) -> Tensor:
    new = torch.empty_like(z)
    new[:, PERMUTED] = z
    return new


def mixes(z: Tensor) -> Tensor:
    return MIXES.to(z.dtype)


# What is done to a convolution's output before GELU; all give 8 x 8 x 8 x 8.
FOLLOWED: Mapping[str, tuple[Op, int]] = {
    "rolled in space": (lambda z: torch.roll(z, 1, 2), 1),
    "where": (lambda z: torch.where(z > 0, z, z * 2), 1),
    "swapped": (lambda z: z.swapaxes(1, 2), 2),
    "moved": (lambda z: torch.movedim(z, 1, 3), 3),
    "mT of moved": (lambda z: z.movedim(1, 3).mT, 2),
    "permuted": (lambda z: torch.permute(z, (0, 3, 2, 1)), 3),
    "units in front": (lambda z: z.permute(1, 0, 2, 3), 0),
    "gated by its mean": (lambda z: z * z.mean(1, keepdim=True), 1),
    "pooled": (lambda z: F.avg_pool2d(z, 3, 1, 1), 1),
    "normalised": (lambda z: F.normalize(z, dim=1), 1),
    "norm on moved axes": (lambda z: F.layer_norm(z.transpose(1, 3), (8,)).transpose(1, 3), 1),
    "copied over": (lambda z: torch.zeros_like(z).copy_(z), 1),
    "negative": (lambda z: -z, 1),
    "detached sum": (lambda z: z + z.detach(), 1),
}
LOST: Mapping[str, Op] = {
    "flipped": lambda z: z.flip(1),
    "flipped left to right": torch.fliplr,
    "indexed": lambda z: z[:, PERMUTED.tolist()],
    "index_select": lambda z: z.index_select(1, PERMUTED),
    "gathered": lambda z: z.gather(1, PERMUTED.view(1, 8, 1, 1).expand_as(z)),
    "taken along": lambda z: z.take_along_dim(PERMUTED.view(1, 8, 1, 1), 1),
    "summed up": lambda z: z.cumsum(1),
    "sorted": lambda z: z.sort(1).values,
    "top": lambda z: z.topk(8, 1).values,
    "halves exchanged": lambda z: torch.cat([z[:, 4:], z[:, :4]], 1),
    "parts exchanged": lambda z: torch.cat(z.split(2, 1)[::-1], 1),
    "stacked backwards": lambda z: torch.stack(z.unbind(1)[::-1], 1),
    "rolled": lambda z: z.roll(1, 1),
    "matrix": lambda z: (z.movedim(1, -1) @ mixes(z)).movedim(-1, 1),
    "einsum": lambda z: torch.einsum("nchw,dc->ndhw", z, mixes(z)),
    "tensordot": lambda z: torch.tensordot(z, mixes(z), ([1], [0])).movedim(-1, 1),
    "bmm": lambda z: torch.bmm(mixes(z).expand(len(z), 8, 8), z.flatten(2)).view_as(z),
    "fixed convolution": lambda z: F.conv2d(z, mixes(z)[:, :, None, None]),
    "shuffled": lambda z: F.channel_shuffle(z, 2),
    "shuffled by hand": lambda z: z.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "doubled": lambda z: z.repeat_interleave(2, 1)[:, :8],
    "tiled": lambda z: torch.tile(z[:, :4], (1, 2, 1, 1)),
    "rotated": lambda z: torch.rot90(z, 1, (1, 2)),
    "spectrum": lambda z: torch.fft.fft(z, dim=1).real,
    "pooled over units": lambda z: F.avg_pool2d(z.mT.transpose(1, 2), (3, 1), 1, (1, 0)),
    "greatest over units": lambda z: F.max_pool2d(z.transpose(1, 2), (3, 1), 1, (1, 0)),
    "padded with units": lambda z: F.pad(z, (0, 0, 0, 0, 1, 0))[:, :8],
    "resized over units": lambda z: F.interpolate(
        F.interpolate(z.transpose(1, 2), size=(4, 8)), size=(8, 8)
    ).transpose(1, 2),
    "written over in another order": written_over,
    "mean of all": lambda z: z.mean(1, keepdim=True).expand_as(z),
    "norm of flipped": lambda z: F.layer_norm(z.flip(1), (8,)),
}


def by_unit(h: Tensor, axis: int, images: int) -> Tensor:
    return h.movedim(axis, -1).reshape(images, -1, 8).mean(1)


@pytest.mark.parametrize("name", FOLLOWED)
def test_units_are_found_on_their_axis(name: str) -> None:
    op, axis = FOLLOWED[name]
    held_to_the_reference(
        lambda m, x: m.head(by_unit(F.gelu(op(m.a(x))), axis, len(x))),
        lambda m, x, run: linear(
            m.head,
            by_unit(
                run.feed("a", reference.gelu, op(convolution(m.a, x)), axis=axis), axis, len(x)
            ),
        ),
    )


@pytest.mark.parametrize("name", LOST)
def test_units_that_were_mixed_or_moved_feed_no_activation(name: str) -> None:
    module = Odd(lambda m, x: m.head(F.gelu(LOST[name](m.a(x))).mean((2, 3))))
    layer = outline_of(module, size=SIDE).layer("a")
    assert layer is not None
    assert layer.activation is None


def tokens(z: Tensor) -> Tensor:
    return z.mean(3).transpose(1, 2)


# A layer behind the first: what it is, how it is called, its output written out, its axis.
LAYERS: Mapping[
    str, tuple[Callable[[], nn.Module], Way, Callable[[nn.Module, Tensor], Tensor], int]
] = {
    "product of pixels": (
        *(lambda: nn.Linear(8, 8), lambda part, z: part(z.permute(0, 2, 3, 1))),
        *(lambda part, z: linear(part, z.permute(0, 2, 3, 1)), 3),
    ),
    "product over tokens": (
        *(lambda: nn.Linear(64, 8), lambda part, z: part(z.flatten(2))),
        *(lambda part, z: linear(part, z.flatten(2)), 2),
    ),
    "product over tokens, turned": (
        *(lambda: nn.Linear(64, 8), lambda part, z: part(z.flatten(2)).mT),
        *(lambda part, z: linear(part, z.flatten(2)).mT, 1),
    ),
    "sequence first": (
        *(lambda: nn.Linear(8, 8), lambda part, z: part(z.mean(3).permute(2, 0, 1))),
        *(lambda part, z: linear(part, z.mean(3).permute(2, 0, 1)), 2),
    ),
    "convolution over tokens": (
        *(lambda: nn.Conv1d(8, 8, 1), lambda part, z: part(z.mean(3))),
        lambda part, z: (
            torch.einsum("nil,oi->nol", z.mean(3), part.weight[:, :, 0]) + part.bias[:, None]
        ),
        1,
    ),
    "transposed convolution": (
        *(lambda: nn.ConvTranspose2d(8, 8, 1), lambda part, z: part(z)),
        lambda part, z: (
            torch.einsum("nihw,io->nohw", z, part.weight[:, :, 0, 0]) + part.bias.view(-1, 1, 1)
        ),
        1,
    ),
    "bilinear": (
        lambda: nn.Bilinear(8, 8, 8),
        lambda part, z: part(tokens(z).contiguous(), tokens(z).contiguous()),
        lambda part, z: (
            torch.einsum("nti,oij,ntj->nto", tokens(z), part.weight, tokens(z)) + part.bias
        ),
        2,
    ),
    "layer norm of tokens": (
        *(lambda: nn.LayerNorm(8), lambda part, z: part(tokens(z))),
        *(lambda part, z: layer_norm(part, tokens(z)), 2),
    ),
    "windows": (
        lambda: nn.Linear(8, 8),
        lambda part, z: part(z.unflatten(2, (2, 4)).permute(0, 2, 3, 4, 1).reshape(-1, 32, 8)),
        lambda part, z: linear(
            part, z.unflatten(2, (2, 4)).permute(0, 2, 3, 4, 1).reshape(-1, 32, 8)
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_any_kind_has_its_units_on_their_axis(name: str) -> None:
    part, called, written, axis = LAYERS[name]

    def pooled(h: Tensor, images: int) -> Tensor:
        last = h.movedim(axis, -1)
        # In a sequence first the images are on the second axis.
        last = last.transpose(0, 1) if name == "sequence first" else last
        return last.reshape(images, -1, 8).mean(1)

    def way(m: nn.Module, x: Tensor) -> Tensor:
        z = m.b(F.silu(m.a(x)))
        return m.head(pooled(F.gelu(called(m.part, z)), len(x)))

    def plain(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
        h = run.feed("a", reference.silu, convolution(m.a, x), axis=1)
        z = written(m.part, convolution(m.b, h))
        return linear(m.head, pooled(run.feed("part", reference.gelu, z, axis=axis), len(x)))

    held_to_the_reference(way, plain, part)


# Activations that write through views


def first(run: Pass, formula: Formula, z: Tensor, axis: int = 1) -> Tensor:
    return run.feed("a", formula, z, axis=axis)


def sliced(z: Tensor) -> Tensor:
    z[:, 2:6].relu_()
    return z


def strided(z: Tensor) -> Tensor:
    z[:, ::2].relu_()
    return z


def transposed(z: Tensor) -> Tensor:
    F.relu(z.transpose(1, 3), inplace=True)
    return z


def view_of_view(z: Tensor) -> Tensor:
    z.view(len(z), 8, -1)[:, 1:7].relu_()
    return z


def channels_last(z: Tensor) -> Tensor:
    z = z.contiguous(memory_format=torch.channels_last)
    z[:, 2:6].relu_()
    return z


def used_twice(z: Tensor) -> Tensor:
    h = z[:, :4].relu_()
    return torch.cat([h * 2, z], 1)[:, 4:] + z.sum(1, keepdim=True)


def used_twice_plainly(z: Tensor, run: Pass) -> Tensor:
    h = first(run, reference.relu, z[:, :4])
    whole = torch.cat([h, z[:, 4:]], 1)
    return torch.cat([h * 2, whole], 1)[:, 4:] + whole.sum(1, keepdim=True)


def output_view_used(z: Tensor) -> Tensor:
    h = F.gelu(z)
    view = h[:, :4]
    view.mul_(3)
    return torch.cat([view, h[:, :4]], 1)


def output_view_used_plainly(z: Tensor, run: Pass) -> Tensor:
    h = first(run, reference.gelu, z)[:, :4] * 3
    return torch.cat([h, h], 1)


def assigned(z: Tensor) -> Tensor:
    z[:, :4] = z[:, :4].relu()
    return z


def over(function: Callable[[Tensor], Tensor], begin: int, end: int) -> Op:
    def write(z: Tensor) -> Tensor:
        function(z[:, begin:end])
        return z

    return write


def only(formula: Formula, begin: int, end: int) -> Callable[[Tensor, Pass], Tensor]:
    return lambda z, run: torch.cat(
        [z[:, :begin], first(run, formula, z[:, begin:end]), z[:, end:]], 1
    )


VIEWS: Mapping[str, tuple[Op, Callable[[Tensor, Pass], Tensor]]] = {
    "slice": (sliced, only(reference.relu, 2, 6)),
    "strided": (
        strided,
        lambda z, run: torch.stack([first(run, reference.relu, z[:, ::2]), z[:, 1::2]], 2).flatten(
            1, 2
        ),
    ),
    "transposed": (
        transposed,
        lambda z, run: first(run, reference.relu, z.transpose(1, 3), 3).transpose(1, 3),
    ),
    "view of a view": (
        view_of_view,
        lambda z, run: only(reference.relu, 1, 7)(z.flatten(2), run).unflatten(2, (8, 8)),
    ),
    "channels last": (channels_last, only(reference.relu, 2, 6)),
    "both used": (used_twice, used_twice_plainly),
    "output's view used": (output_view_used, output_view_used_plainly),
    "assigned": (assigned, only(reference.relu, 0, 4)),
    "hardtanh": (over(F.hardtanh_, 0, 4), only(reference.hardtanh, 0, 4)),
    "elu": (over(F.elu_, 4, 8), only(reference.elu, 4, 8)),
    "silu": (over(lambda z: F.silu(z, inplace=True), 1, 5), only(reference.silu, 1, 5)),
    "sigmoid": (over(Tensor.sigmoid_, 3, 8), only(reference.sigmoid, 3, 8)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_written_through_a_view_is_measured_as_if_it_were_not(name: str) -> None:
    write, pure = VIEWS[name]
    held_to_the_reference(
        lambda m, x: m.head(m.b(write(m.a(x))).mean((2, 3))),
        lambda m, x, run: linear(
            m.head, convolution(m.b, pure(convolution(m.a, x), run)).mean((2, 3))
        ),
    )


# Gradients taken inside a forward


def taken(m: nn.Module, h: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        torch.autograd.grad(h.sum(), m.a.weight, retain_graph=True)
    return h


def backward_run(m: nn.Module, h: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        (h**2).sum().backward(retain_graph=True)
        m.count = m.a.weight.grad.norm()
    return h


def used(m: nn.Module, h: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return 3 * h
    return h + torch.autograd.grad((h**2).sum(), h, create_graph=True)[0]


def own_leaf(m: nn.Module, h: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((leaf**3).sum(), leaf)
    return h + gradient


def inner_steps(m: nn.Module, h: Tensor) -> Tensor:
    with torch.enable_grad():
        for _ in range(2):
            leaf = h.detach().requires_grad_()
            h = h - 0.1 * torch.autograd.grad(F.softplus(leaf).sum(), leaf)[0]
    return h


def inner_steps_plainly(h: Tensor) -> Tensor:
    for _ in range(2):
        h = h - 0.1 * reference.sigmoid(h).detach()
    return h


class Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h)
        return F.silu(h)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            leaf = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(F.silu(leaf), leaf, gradient)[0]


INNER: Mapping[str, tuple[Way, Op]] = {
    "taken": (taken, lambda h: h),
    "backward": (backward_run, lambda h: h),
    "used": (used, lambda h: 3 * h),
    "own leaf": (own_leaf, lambda h: h + (3 * h**2).detach()),
    "inner steps": (inner_steps, inner_steps_plainly),
    "func.grad": (
        lambda m, h: h + torch.func.grad(lambda t: (t**3).sum())(h),
        lambda h: h + 3 * h**2,
    ),
    "func.jvp": (
        lambda m, h: h + torch.func.jvp(torch.sin, (h,), (torch.ones_like(h),))[1],
        lambda h: h + torch.cos(h),
    ),
    "recomputed": (lambda m, h: Recomputed.apply(h), reference.silu),
}


@pytest.mark.parametrize("name", INNER)
def test_a_gradient_taken_inside_changes_no_figure(name: str) -> None:
    inner, pure = INNER[name]
    held_to_the_reference(
        lambda m, x: m.head(m.b(inner(m, F.gelu(m.a(x)))).mean((2, 3))),
        lambda m, x, run: linear(
            m.head,
            convolution(m.b, pure(first(run, reference.gelu, convolution(m.a, x)))).mean((2, 3)),
        ),
    )


# Modules replaced, parts checkpointed, parameters of nothing


def usual(m: nn.Module, x: Tensor, act: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    return m.head(F.silu(m.b(act(m.a(x)))).mean((2, 3)))


def usual_plainly(m: nn.Module, x: Tensor, run: Pass) -> Tensor:
    h = first(run, reference.gelu, convolution(m.a, x))
    return linear(m.head, run.feed("b", reference.silu, convolution(m.b, h), axis=1).mean((2, 3)))


def doing(change: Callable[[nn.Module], object], act: str = "act") -> Way:
    def way(m: nn.Module, x: Tensor) -> Tensor:
        change(m)
        return usual(m, x, getattr(m, act))

    return way


def made_late(m: nn.Module) -> None:
    if m.late is None:
        m.late = nn.GELU()


def rebuilt(m: nn.Module) -> None:
    new = nn.Conv2d(8, 8, 1)
    new.weight, new.bias = m.b.weight, m.b.bias
    m.b = new


def weight_made_again(m: nn.Module) -> None:
    weight = m.b.weight
    del m.b.weight
    m.b.weight = weight * 1


def alternating(m: nn.Module) -> None:
    m.count += 1
    m.act = nn.GELU() if m.count % 2 else nn.Sequential(nn.GELU())


def hooked(m: nn.Module) -> None:
    if m.hook is not None:
        m.hook.remove()
    m.hook = m.head.register_forward_hook(lambda module, args, output: output * 1)


def hooked_apart(m: nn.Module) -> None:
    m.b.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


def without_child(m: nn.Module, x: Tensor) -> Tensor:
    act = m.act
    del m.act
    return usual(m, x, act)


def functional_call(m: nn.Module, x: Tensor) -> Tensor:
    own = {"weight": m.b.weight * 1, "bias": m.b.bias}
    z = torch.func.functional_call(m.b, own, (F.gelu(m.a(x)),))
    return m.head(F.silu(z).mean((2, 3)))


REPLACED: Mapping[str, Way] = {
    "activation": doing(lambda m: setattr(m, "act", nn.Sequential(nn.GELU()))),
    "child made late": doing(made_late, "late"),
    "layer rebuilt": doing(rebuilt),
    "weight made again": doing(weight_made_again),
    "alternating": doing(alternating),
    "in a sequence": doing(lambda m: m.seq.__setitem__(0, nn.GELU()), "seq"),
    "buffer": doing(lambda m: setattr(m, "kept", torch.ones(3))),
    "attributes": doing(lambda m: (vars(m).pop("count"), setattr(m, "seen", [1]))),
    "method": doing(lambda m: setattr(m.act, "forward", F.gelu)),
    "own hook": doing(hooked),
    "another hook each pass": doing(hooked_apart),
    "child deleted": without_child,
    "functional call": functional_call,
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_network_that_changes_its_modules_is_measured_right_and_put_back(name: str) -> None:
    held_to_the_reference(REPLACED[name], usual_plainly)


def behind(m: nn.Module, h: Tensor) -> Tensor:
    return m.head(h.mean((2, 3)))


def fed(x: Tensor) -> Tensor:
    # A re-entrant checkpoint hands gradients on only if it is given one to take.
    return x * torch.ones((), dtype=x.dtype, requires_grad=True)


CHECKPOINTED: Mapping[str, Callable[[nn.Module, Tensor, bool], Tensor]] = {
    "block": lambda m, x, r: behind(
        m,
        checkpoints.checkpoint(lambda h: F.silu(m.b(h)), F.gelu(m.a(x)), use_reentrant=r),
    ),
    "all": lambda m, x, r: behind(
        m,
        checkpoints.checkpoint(lambda y: F.silu(m.b(F.gelu(m.a(y)))), fed(x), use_reentrant=r),
    ),
    "nested": lambda m, x, r: behind(
        m,
        checkpoints.checkpoint(
            lambda h: checkpoints.checkpoint(lambda k: F.silu(m.b(k)), h, use_reentrant=r) * 1,
            F.gelu(m.a(x)),
            use_reentrant=r,
        ),
    ),
    "in place": lambda m, x, r: behind(
        m,
        checkpoints.checkpoint(
            lambda h: F.silu(m.b(h), inplace=True), F.gelu(m.a(x)), use_reentrant=r
        ),
    ),
    "sequence": lambda m, x, r: behind(
        m,
        checkpoints.checkpoint_sequential(
            nn.Sequential(m.b, nn.SiLU()), 2, F.gelu(m.a(x)), use_reentrant=r
        ),
    ),
    # Without a gradient to take it in, re-entrant, it would train nothing inside.
    "input without gradient": lambda m, x, r: usual(
        m, x, lambda z: checkpoints.checkpoint(F.gelu, z, use_reentrant=r)
    ),
}


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, True) for name in CHECKPOINTED), ("all", False)]
)
def test_a_checkpoint_hides_nothing(name: str, *, reentrant: bool) -> None:
    before = checkpoints.CheckpointFunction
    held_to_the_reference(
        lambda m, x: CHECKPOINTED[name](m, x, reentrant),
        usual_plainly,
    )
    assert checkpoints.CheckpointFunction is before


EMPTY: Mapping[str, tuple[Callable[[], nn.Module], Way]] = {
    "parameter": (
        lambda: nn.ParameterList([torch.zeros(0, 8)]),
        lambda part, h: h + part[0].sum(),
    ),
    "position": (
        lambda: nn.ParameterList([torch.zeros(1, 0, 8)]),
        lambda part, h: torch.cat([part[0].expand(len(h), -1, -1), h[:, None]], 1).mean(1),
    ),
    "no outputs": (lambda: nn.Linear(8, 0, bias=False), lambda part, h: h + part(h).sum()),
    "no outputs, activated": (
        lambda: nn.Linear(8, 0, bias=False),
        lambda part, h: h + F.relu(part(h)).sum(),
    ),
    "no outputs and their bias": (lambda: nn.Linear(8, 0), lambda part, h: h + part(h).sum()),
    "no inputs": (
        lambda: nn.Linear(0, 8, bias=False),
        lambda part, h: h + part(h.new_zeros(len(h), 0)),
    ),
    "convolution": (lambda: nn.Conv2d(0, 8, 1, bias=False), lambda part, h: h),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_parameter_of_nothing_disturbs_no_other_and_has_reasons(name: str) -> None:
    part, used_by = EMPTY[name]

    def way(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(used_by(m.part, F.silu(m.b(F.gelu(m.a(x)))).mean((2, 3))))

    of_part = held_to_the_reference(way, usual_plainly, part, empty=True).metrics["part"]
    assert {each.value for each in of_part.values()} == {None}
    assert of_part["weight_l2"].reason == "the weight has no entries"
