"""Every rival against its definition, written out anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.catalogue.trials import find_rival
from core.errors import OptionError
from core.load import resolve_model
from core.pipeline.arms import HEAD_STD, decayed_rates, plan_arms, rival_arm
from core.pipeline.batches import outline_model
from core.pipeline.sweeping import sweep_rates
from core.records import UNTOUCHED
from core.trial.arms import Arm, Images, Settings
from core.trial.engine import batch_order, finetune, relative_gradients
from core.trial.figures import bits

CPU = torch.device("cpu")
HEAD = frozenset({"head.weight", "head.bias"})
TINY = resolve_model("timm:test_efficientnet", weights="none")


class Small(nn.Module):
    """A convolution, a norm with running statistics, a second convolution, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.second = nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.second(x).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count: int = 24) -> Images:
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 90, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = (noise + 120 * labels[:, None, None, None]).to(torch.uint8)
    return Images(
        train=pixels,
        train_labels=labels,
        val=pixels,
        val_labels=labels,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def arm(name: str = UNTOUCHED, **given: object) -> Arm:
    return dataclasses.replace(Arm(name=name, build=Small, head=HEAD), **given)


def settings(**given: object) -> Settings:
    base = {
        "steps": 6,
        "batch_size": 8,
        "lr": 0.01,
        "head_lr": 0.01,
        "eval_every": 6,
        "warmup_steps": 0,
        "augment": (),
    }
    return Settings(**{**base, **given})  # type: ignore[arg-type]


def trained(one: Arm, chosen: Settings, *, until: int | None = None) -> nn.Module:
    """The arm's network after its steps, or after some of them."""
    made: list[nn.Module] = []

    def build(seed: int) -> nn.Module:
        made.append(one.build(seed))
        return made[-1]

    run = finetune(
        [dataclasses.replace(one, build=build)], images(), chosen, seeds=(0,), device=CPU
    )
    list(run if until is None else islice(run, until + 1))
    return made[-1]


def same(left: nn.Module, right: nn.Module, names: Sequence[str]) -> list[bool]:
    mine, other = left.state_dict(), right.state_dict()
    return [torch.equal(mine[name], other[name]) for name in names]


BODY = [name for name in Small().state_dict() if not name.startswith("head")]


def test_a_linear_probe_moves_the_head_and_nothing_else() -> None:
    model = trained(arm(head_first=1.0), settings())

    assert same(model, Small(0), BODY) == [True] * len(BODY)
    assert same(model, Small(0), ["head.weight", "head.bias"]) == [False, False]


def test_lp_ft_has_the_head_of_a_separate_probe_and_then_trains_all() -> None:
    chosen = settings(steps=6)
    half = trained(arm(head_first=0.5), chosen, until=3)
    probe = trained(arm(head_first=1.0), settings(steps=3))

    # The batches of a short run are the first of a longer one.
    longer, shorter = (batch_order(24, s, seed=0) for s in (chosen, settings(steps=3)))
    assert all(torch.equal(a, b) for a, b in zip(longer, shorter, strict=False))
    assert same(half, probe, list(half.state_dict())) == [True] * len(half.state_dict())
    whole = trained(arm(head_first=0.5), chosen)
    assert not any(same(whole, Small(0), [n for n in BODY if n.endswith("weight")]))


def test_lp_ft_starts_the_second_phase_with_fresh_moments_and_warm_up() -> None:
    chosen = settings(steps=8, warmup_steps=2, optimizer="adamw", weight_decay=0.0)

    before = trained(arm(head_first=0.5), chosen, until=4)
    after = trained(arm(head_first=0.5), chosen, until=5)

    # AdamW's first update is the rate itself, whatever the gradient: here half of it.
    moved = (after.state_dict()["second.bias"] - before.state_dict()["second.bias"]).abs().max()
    assert float(moved) == pytest.approx(0.005, rel=1e-3)
    head = (after.state_dict()["head.bias"] - before.state_dict()["head.bias"]).abs().max()
    assert float(head) == pytest.approx(0.005, rel=1e-3)


def test_relative_gradients_are_gradient_norm_over_weight_norm() -> None:
    model = Small(0)
    with torch.no_grad():
        model.second.bias.zero_()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 2) for _ in range(3)
    ]
    parameters = dict(model.named_parameters())

    found = relative_gradients(model, batches, parameters, HEAD)

    sums = dict.fromkeys(set(parameters) - HEAD, 0.0)
    for inputs, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        for name in sums:
            weight = parameters[name]
            assert weight.grad is not None
            if float(weight.detach().norm()) > 0:
                sums[name] += float(weight.grad.norm() / weight.detach().norm()) / 3
    expected = {name: value / max(sums.values()) for name, value in sums.items()}
    # The norm's bias is 0 at first, too.
    expected |= {"second.bias": 1.0, "norm.bias": 1.0}
    assert found == pytest.approx(expected, rel=1e-4)
    assert max(found.values()) == 1.0


def test_auto_rgn_trains_at_those_rates_from_pass_to_pass() -> None:
    """With SGD and one step, how far a tensor moves is its rate times its gradient."""
    one = arm(relative_gradients=True, frozen=frozenset({"norm.weight", "norm.bias"}))
    chosen = settings(steps=1, optimizer="sgd", weight_decay=0.0, schedule="constant")

    model, plain = (trained(a, chosen) for a in (one, arm()))

    start = Small(0)
    order = batch_order(24, chosen, seed=0)
    start.train()
    inputs = (images().train[order[0]].float() / 255 - 0.5) / 0.25
    weights = relative_gradients(
        start,
        [(inputs, images().train_labels[order[0]])],
        {n: p for n, p in start.named_parameters() if not n.startswith("norm")},
        HEAD,
    )
    first = Small(0).state_dict()
    for name, weight in weights.items():
        ours = model.state_dict()[name] - first[name]
        theirs = plain.state_dict()[name] - first[name]
        assert torch.allclose(ours, weight * theirs, rtol=1e-3, atol=1e-7), name
    assert torch.equal(model.state_dict()["norm.weight"], first["norm.weight"])
    # Looking at gradients leaves running statistics to the step alone.
    assert torch.equal(
        model.state_dict()["norm.running_mean"], plain.state_dict()["norm.running_mean"]
    )


def test_rate_decay_is_a_power_of_the_distance_to_the_head() -> None:
    outline = outline_model(TINY, classes=8)
    stages = list(dict.fromkeys(x.stage for x in outline.layers if not x.head))

    rates = decayed_rates(outline)

    for layer in outline.layers:
        for parameter in layer.parameters:
            if layer.head:
                assert parameter.name not in rates
            else:
                place = len(stages) - stages.index(layer.stage)
                assert rates[parameter.name] == pytest.approx(0.75**place)


def test_a_rate_moves_a_tensor_in_proportion() -> None:
    chosen = settings(steps=1, optimizer="sgd", weight_decay=0.0, schedule="constant")
    slow = trained(arm(rates={"first.weight": 0.25}), chosen)
    plain = trained(arm(), chosen)

    first = Small(0).state_dict()["first.weight"]
    moved = [m.state_dict()["first.weight"] - first for m in (slow, plain)]
    assert torch.allclose(moved[0], 0.25 * moved[1], rtol=1e-4, atol=1e-8)
    assert same(slow, plain, ["second.weight", "head.weight"]) == [True, True]


@pytest.mark.parametrize(("name", "factor"), [("rate-up", 3.0), ("rate-down", 1 / 3)])
def test_other_rates_are_three_times_and_a_third(name: str, factor: float) -> None:
    outline = outline_model(TINY, classes=8)

    made, plan = rival_arm(find_rival(name), TINY, outline)

    assert (made.lr_factor, plan) == (pytest.approx(factor), None)
    chosen = settings(steps=1, optimizer="sgd", weight_decay=0.0, schedule="constant")
    fast, plain = (trained(a, chosen) for a in (arm(lr_factor=factor), arm()))
    first = Small(0).state_dict()["second.weight"]
    moved = [m.state_dict()["second.weight"] - first for m in (fast, plain)]
    assert torch.allclose(moved[0], factor * moved[1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["shrink-perturb", "mean-var"])
def test_references_reset_every_layer_but_the_head(name: str) -> None:
    outline = outline_model(TINY, classes=8)

    made, plan = rival_arm(find_rival(name), TINY, outline)

    assert plan is not None
    assert {target.layer for target in plan.targets} == {
        layer.name for layer in outline.layers if layer.executed and not layer.head
    }
    edited, plain = made.build(3), plan_arms(TINY, outline, {})[0].build(3)
    for (key, mine), other in zip(
        edited.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        if key in made.head:
            assert torch.equal(mine, other)


def test_a_new_head_starts_small_and_alike_in_all_arms() -> None:
    outline = outline_model(TINY, classes=8)

    (untouched,) = plan_arms(TINY, outline, {})
    parameters = dict(untouched.build(5).named_parameters())

    (weight,) = [n for n in untouched.head if parameters[n].ndim > 1]
    (bias,) = [n for n in untouched.head if parameters[n].ndim == 1]
    assert float(parameters[weight].detach().std()) == pytest.approx(HEAD_STD, rel=0.1)
    assert not parameters[bias].any()


def test_arms_of_one_stream_see_the_same_augmented_images_and_others_do_not() -> None:
    seen: dict[str, list[Tensor]] = {}

    class Sees(Small):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.setdefault(self.name, []).append(x.detach().clone())
            return super().forward(x)

    arms = [
        Arm(name=name, build=lambda _, name=name: Sees(name), head=HEAD, stream=stream)
        for name, stream in (("a", 0), ("b", 0), ("c", 1))
    ]
    list(finetune(arms, images(), settings(augment=("crop",)), seeds=(0,), device=CPU))

    assert all(torch.equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(seen["a"], seen["c"], strict=True))


def test_the_last_step_keeps_which_images_were_right() -> None:
    steps = list(finetune([arm()], images(), settings(eval_every=2), seeds=(0,), device=CPU))

    kept = [step.step for step in steps if step.answers is not None]
    assert kept == [6]
    last = steps[-1]
    assert last.answers is not None
    right = bin(int(last.answers, 16)).count("1")
    assert right / 24 == last.val_accuracy
    assert len(bits(torch.ones(24).bool().numpy())) == len(last.answers)


def test_a_sweep_takes_the_best_rate_and_goes_beyond_an_edge() -> None:
    """The higher the rate, the better, up to where the network is told to break."""

    class Picky(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    found = sweep_rates(
        arm(build=Picky),
        images(),
        settings(lr=1e-6, head_lr=None, steps=8, optimizer="sgd"),
        trial_seeds=(0,),
        device=CPU,
    )

    assert list(found.rates) == sorted(found.rates)
    assert (
        found.best == found.rates[max(range(len(found.rates)), key=lambda i: found.accuracies[i])]
    )
    assert len(found.rates) >= 5
    assert not set(found.seeds) & {0}
    assert found.at_edge == (found.best in (found.rates[0], found.rates[-1]))


def test_an_unknown_rival_is_refused() -> None:
    with pytest.raises(OptionError, match=r'no rival "magic"\. There are: random, lp-ft'):
        find_rival("magic")
