"""Planted truth: the trial calls what helps better, what harms worse, and the same equivalent.

The network is a narrow one, trained here on blood cells. A third of a block's units are then
killed: their bias is so low that ReLU never passes anything, so no gradient reaches them however
long they train. Only a reset brings them back.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from core.files.curves import curves_of
from core.load import decode, open_images, resolve_data
from core.records import UNTOUCHED, ABComparison, Preprocessing, TrialDesign
from core.seeding import generator, random_state_kept
from core.trial.arms import Arm, Images, Settings
from core.trial.engine import finetune
from core.trial.probe import linear_probe
from core.trial.verdict import compare_curves

CPU = torch.device("cpu")
WIDTH, KILLED, CLASSES = 6, 2, 8
RATE = 3e-2
SEEDS = tuple(range(8))


class Narrow(nn.Module):
    """Two blocks of a few units, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with random_state_kept(seed):
            self.first = nn.Conv2d(3, WIDTH, 5, stride=2, padding=2)
            self.second = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
            self.head = nn.Linear(WIDTH * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


@functools.cache
def images() -> Images:
    opened = open_images(resolve_data("bloodmnist"))
    prepared = Preprocessing(
        image_size=28, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    (train, train_labels), (val, val_labels) = (
        decode(opened, split, prepared, size=28, limit=limit, seed=0)
        for split, limit in (("train", 800), ("val", None))
    )
    return Images(
        train=train,
        train_labels=train_labels,
        val=val,
        val_labels=val_labels,
        mean=prepared.mean,
        std=prepared.std,
    )


def settings(steps: int) -> Settings:
    return Settings(steps=steps, batch_size=32, lr=RATE, eval_every=steps, augment=("flip",))


@functools.cache
def trained() -> dict[str, Tensor]:
    """The weights of the network after some training."""
    kept: list[nn.Module] = []
    arm = Arm(name=UNTOUCHED, build=lambda seed: Narrow())
    for _ in finetune(
        [arm],
        images(),
        settings(150),
        seeds=(99,),
        device=CPU,
        on_trained=lambda name, seed, model: kept.append(model),
    ):
        pass
    return {name: value.detach().clone() for name, value in kept[0].state_dict().items()}


def with_new_head(state: dict[str, Tensor], seed: int) -> Narrow:
    model = Narrow(1000 + seed)
    body = {name: value for name, value in state.items() if not name.startswith("head")}
    model.load_state_dict(body, strict=False)
    return model


def crippled() -> dict[str, Tensor]:
    """The trained weights with a third of the second block's units killed."""
    state = {name: value.clone() for name, value in trained().items()}
    state["second.bias"][:KILLED] = -50.0
    return state


def units_reset(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The killed units drawn anew."""
    state = {name: value.clone() for name, value in state.items()}
    fresh = Narrow(7)
    state["second.weight"][:KILLED] = fresh.second.weight[:KILLED].detach()
    state["second.bias"][:KILLED] = fresh.second.bias[:KILLED].detach()
    return state


def blocks_reset(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole body as a far too large random draw."""
    drawn = {}
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator(0, name))
        drawn[name] = value if name.startswith("head") else 0.02 * noise
    return drawn


def judged(
    start: dict[str, Tensor], edited: dict[str, Tensor], *, steps: int, stream: int = 0
) -> ABComparison:
    arms = [
        Arm(name=UNTOUCHED, build=functools.partial(with_new_head, start)),
        Arm(name="plan", build=functools.partial(with_new_head, edited), stream=stream),
    ]
    run = list(finetune(arms, images(), settings(steps), seeds=SEEDS, device=CPU))
    counts = torch.bincount(images().val_labels)
    probe = linear_probe(with_new_head(start, 0), images(), ["head"])
    design = TrialDesign(
        arms=(UNTOUCHED, "plan"),
        plans=("plan",),
        seeds=SEEDS,
        steps=steps,
        val_images=len(images().val),
        chance=float(counts.max()) / len(images().val),
        probe=None if probe is None else probe.accuracy,
        probe_slack=0.0 if probe is None else probe.slack,
    )
    return compare_curves(curves_of(run), design)


def verdict(found: ABComparison) -> str | None:
    (row,) = [row for row in found.differences if row.measure == "final_val_accuracy"]
    return row.verdict


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_resetting_killed_units_wins() -> None:
    found = judged(crippled(), units_reset(crippled()), steps=100)

    assert verdict(found) == "better", found.sentence
    assert 'Export "plan"' in found.what_next


def test_resetting_what_was_learned_loses() -> None:
    found = judged(trained(), blocks_reset(trained()), steps=60)

    assert verdict(found) == "worse", found.sentence


def test_resetting_nothing_is_equivalent() -> None:
    found = judged(trained(), trained(), steps=60)

    assert verdict(found) == "equivalent", found.sentence


def test_nothing_but_luck_is_no_difference() -> None:
    found = judged(trained(), trained(), steps=60, stream=1)

    assert verdict(found) in ("equivalent", "inconclusive"), found.sentence
    assert "No reset helps here" in found.what_next or "seeds would show" in found.what_next


def test_arms_at_chance_get_no_verdict() -> None:
    found = judged(trained(), blocks_reset(trained()), steps=1)

    assert found.state == "weak"
    assert verdict(found) is None
