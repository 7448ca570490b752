"""How an arm is trained: timm's optimisers and schedules by name, and what is done to images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from core.catalogue.trials import AUGMENTATIONS, SCHEDULES, augmentations
from core.errors import OptionError
from core.trial.arms import Images, Settings
from core.trial.augment import augmenter
from core.trial.probe import head_inputs, linear_probe, probe_answers
from core.trial.recipe import check_recipe, groups_of, make_optimizer, make_schedule


def picture(count: int = 6, side: int = 16) -> torch.Tensor:
    """Equal images with a bright left half and texture."""
    one = torch.randint(0, 100, (3, side, side), generator=torch.Generator().manual_seed(0))
    one[:, :, : side // 2] += 150
    return one.to(torch.uint8).expand(count, 3, side, side).clone()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "nadamw"])
def test_optimisers_come_by_timms_names(name: str) -> None:
    check_recipe(name, "cosine")
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = make_optimizer(name, [{"params": [weight]}], lr=0.1)

    (weight**2).sum().backward()
    optimizer.step()

    assert float(weight.detach().max()) < 1


def test_an_unknown_optimiser_names_those_near_to_it() -> None:
    with pytest.raises(OptionError, match=r'no optimiser "adamww".*adamw'):
        check_recipe("adamww", "cosine")


def test_an_optimiser_that_is_not_here_says_so() -> None:
    with pytest.raises(OptionError, match='"bnbadam8bit" cannot be used here'):
        check_recipe("bnbadam8bit", "cosine")


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(OptionError, match=r'no schedule "up"\. There are: cosine'):
        check_recipe("adamw", "up")


def rates(name: str, *, steps: int = 20, warmup: int = 5, scale: float = 1.0) -> list[float]:
    weight = nn.Parameter(torch.ones(1))
    groups: list[dict[str, Any]] = [{"params": [weight], "lr_scale": scale}]
    optimizer = make_optimizer("sgd", groups, lr=0.1)
    schedule = make_schedule(name, optimizer, steps=steps, warmup=warmup)
    told = []
    for step in range(1, steps + 1):
        schedule.step_update(step)
        told.append(float(optimizer.param_groups[0]["lr"]))
    return told


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_and_trains_to_the_last_step(name: str) -> None:
    found = rates(name)

    assert found[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08], rel=1e-3)
    assert max(found) <= 0.1 + 1e-12
    assert found[-1] > 0
    assert rates(name, scale=0.5) == pytest.approx([rate / 2 for rate in found])


def test_cosine_is_timms_and_half_a_cosine() -> None:
    found = rates("cosine")

    weight = nn.Parameter(torch.ones(1))
    theirs = CosineLRScheduler(
        torch.optim.SGD([weight], lr=0.1), t_initial=21, warmup_t=5, t_in_epochs=False
    )
    for step in range(5, 21):
        assert found[step - 1] == pytest.approx(theirs._get_lr(step)[0])
        assert found[step - 1] == pytest.approx(0.05 * (1 + math.cos(math.pi * step / 21)))


def test_only_matrices_decay_and_rates_group_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    parameters = dict(model.named_parameters())

    groups = groups_of(parameters, {"0.weight": 0.5}, weight_decay=0.1)

    told = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert told["0.weight"] == (0.5, 0.1)
    assert told["0.bias"] == told["1.weight"] == (1.0, 0.0)
    apart = groups_of(parameters, {}, weight_decay=0.1, apart=True)
    assert [g["names"] for g in apart] == [[name] for name in parameters]


@pytest.mark.parametrize(
    "changed",
    [
        {"warmup_steps": -1},
        {"label_smoothing": 1.0},
        {"ema": 1.0},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
    ],
)
def test_settings_that_cannot_train_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        Settings(**{"steps": 5, "batch_size": 4, "lr": 0.1, **changed})  # type: ignore[arg-type]


# Augmentation


def augmented(*names: Any, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return augmenter(names, 16)(picture())


def test_every_image_has_its_own_draw() -> None:
    for info in AUGMENTATIONS:
        found = augmented(info.name)
        assert found.shape == picture().shape, info.name
        assert found.dtype == torch.uint8
        assert len({bytes(image.numpy().tobytes()) for image in found}) > 1, info.name
        assert torch.equal(found, augmented(info.name))
        assert not torch.equal(found, augmented(info.name, seed=1))


def test_none_leaves_every_bit_and_a_flip_mirrors() -> None:
    plain = picture()

    assert torch.equal(augmented(), plain)
    flipped = augmented("flip")
    kinds = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert 0 < sum(kinds) < len(kinds)
    for image, same in zip(flipped, kinds, strict=True):
        assert same or torch.equal(image, plain[0].flip(-1))


def test_augmentations_are_applied_in_one_order_and_others_refused() -> None:
    assert augmentations(["flip", "crop"]) == ("crop", "flip")
    assert augmentations([]) == ()
    with pytest.raises(OptionError, match='no augmentation "spin"'):
        augmentations(["crop", "spin"])


# The linear probe


def test_the_probe_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 3, 60))
    features = torch.tensor(rng.normal(size=(60, 5))) + labels[:, None] * 0.8
    others, other_labels = features[40:], labels[40:]
    fitted, fitted_labels = features[:40].float(), labels[:40]

    found = probe_answers(fitted, fitted_labels, others.float(), other_labels)

    x, t = fitted.double().numpy(), np.eye(3)[fitted_labels.numpy()]
    folds = np.empty(40, dtype=int)
    folds[np.argsort(fitted_labels.numpy(), kind="stable")] = np.arange(40) % 5

    def ridge(x: np.ndarray, t: np.ndarray, z: np.ndarray, penalty: float) -> np.ndarray:
        centre = x - x.mean(0)
        scale = (centre**2).sum() / len(x)
        gram = centre.T @ centre + penalty * scale * np.eye(x.shape[1])
        said: np.ndarray = (z - x.mean(0)) @ np.linalg.solve(
            gram, centre.T @ (t - t.mean(0))
        ) + t.mean(0)
        return said

    penalties = [10.0**power for power in range(-4, 3)]
    errors = [
        sum(
            ((ridge(x[folds != f], t[folds != f], x[folds == f], p) - t[folds == f]) ** 2).sum()
            for f in range(5)
        )
        for p in penalties
    ]
    said = ridge(x, t, others.float().double().numpy(), penalties[int(np.argmin(errors))])
    assert found.tolist() == (said.argmax(1) == other_labels.numpy()).tolist()


def test_a_class_that_was_not_fitted_is_never_right() -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2

    found = probe_answers(features, labels, features[:4], torch.full((4,), 7))

    assert found.tolist() == [False] * 4


def images() -> Images:
    pixels = torch.cat([picture(20), picture(20).flip(-1)])
    labels = torch.arange(40) // 20
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    return Images(
        train=pixels[order],
        train_labels=labels[order],
        val=pixels,
        val_labels=labels,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


@pytest.mark.parametrize("kind", ["linear", "tokens", "convolution"])
def test_the_probe_reads_what_the_head_reads(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 5, 8, stride=8)
            self.head = nn.Conv2d(5, 2, 1) if kind == "convolution" else nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = self.body(x)
            if kind == "convolution":
                return self.head(maps).mean((2, 3))
            tokens = maps.flatten(2).mT
            return self.head(tokens).mean(1) if kind == "tokens" else self.head(tokens.mean(1))

    model = Net()

    read = head_inputs(model, images().val, images(), ["head"])

    assert read is not None
    inputs = (images().val.float() / 255 - 0.5) / 0.25
    assert torch.allclose(read, model.body(inputs).mean((2, 3)), atol=1e-5)
    assert head_inputs(model, images().val, images(), ["nowhere"]) is None
    assert linear_probe(model, images(), ["head"], lambda: True) is None
