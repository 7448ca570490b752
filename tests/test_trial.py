"""Arms differ by what their plan changed and by nothing else; the comparison says no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core.errors import ModelError, OptionError, PlanError
from core.files.curves import CURVE_COLUMNS, curves_csv, curves_of, read_curves
from core.load import resolve_data, resolve_model
from core.pipeline.applying import edited_model, edited_weights
from core.pipeline.batches import outline_model
from core.pipeline.planning.control import random_control
from core.pipeline.planning.rules import plan_by_rule
from core.pipeline.trial import Trial, prepare_trial, write_run
from core.plan.making import make_plan
from core.records import ModelSpec, ReinitPlan, StepRecord
from core.trial.arms import Arm, Images, Settings
from core.trial.engine import batch_order, evaluate, finetune
from core.trial.verdict import compare_curves

CPU = torch.device("cpu")
DATA = resolve_data("bloodmnist")
# Small, with BatchNorm, and with dropout so that masks must be shared as well.
TINY = resolve_model("timm:test_efficientnet", weights="none").model_copy(
    update={"kwargs": {"drop_rate": 0.3}}
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run on one thread: on a busy machine, threads that wait for each other take far longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_plan(layers: Sequence[str] = ("blocks.3.0.conv_pw",), **chosen: Any) -> ReinitPlan:
    # Another seed than that of the random weights, which the twin would only repeat.
    return make_plan(outline_model(TINY, classes=8), layers, **{"seed": 9, **chosen})


def tiny_trial(*plans: ReinitPlan, spec: ModelSpec = TINY, steps: int = 4, **chosen: Any) -> Trial:
    settings = Settings(steps=steps, batch_size=8, lr=1e-3, eval_every=2)
    given = {"seeds": (0,), "image_size": 32, "train_images": 20, "val_images": 16, **chosen}
    return prepare_trial(spec, DATA, plans, settings=settings, device="cpu", **given)


def without_time(steps: Iterable[StepRecord]) -> list[tuple[Any, ...]]:
    return [(step.arm, step.seed, step.step, step.train_loss, step.val_accuracy) for step in steps]


def by_arm(steps: Iterable[StepRecord]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for arm, *rest in without_time(steps):
        found.setdefault(arm, []).append(tuple(rest))
    return found


# Paired


def test_an_arm_whose_plan_changes_nothing_is_the_control_bit_for_bit() -> None:
    same = tiny_plan(
        [layer.name for layer in outline_model(TINY, classes=8).layers],
        scheme="shrink-perturb",
        scheme_parameters={"shrink": 1.0, "perturb": 0.0},
        resets_buffers=False,
        name="same",
    )

    arms = by_arm(tiny_trial(same, seeds=(0, 3)).steps)

    assert list(arms) == ["untouched", "same"]
    assert arms["untouched"] == arms["same"]
    assert len(arms["untouched"]) == 2 * 5


def test_an_arm_whose_plan_changes_something_goes_its_own_way() -> None:
    arms = by_arm(tiny_trial(tiny_plan()).steps)

    losses = {arm: [row[2] for row in rows] for arm, rows in arms.items()}
    assert losses["untouched"][1] != losses["plan"][1]


def test_the_same_seeds_give_the_same_curves_again() -> None:
    first, second = (without_time(tiny_trial(tiny_plan()).steps) for _ in range(2))

    assert first == second


def test_another_seed_gives_another_curve() -> None:
    rows = without_time(tiny_trial(seeds=(0, 1)).steps)

    assert [row[3] for row in rows if row[1] == 0] != [row[3] for row in rows if row[1] == 1]


def test_the_global_random_state_plays_no_part_and_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = without_time(tiny_trial().steps)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)

    assert without_time(tiny_trial().steps) == first


def test_one_arm_does_not_change_another() -> None:
    alone = by_arm(tiny_trial().steps)
    among = by_arm(tiny_trial(tiny_plan(), tiny_plan(scheme="zero", name="zero")).steps)

    assert among["untouched"] == alone["untouched"]


def test_arms_take_each_step_in_turn_and_are_evaluated_when_due() -> None:
    steps = list(tiny_trial(tiny_plan(), steps=5).steps)

    assert [(step.step, step.arm) for step in steps] == [
        (number, arm) for number in range(6) for arm in ("untouched", "plan")
    ]
    assert [step.step for step in steps if step.val_accuracy is not None][::2] == [0, 2, 4, 5]
    assert [step.step for step in steps if step.train_loss is None][::2] == [0]
    times = [step.wall_s for step in steps]
    assert times == sorted(times)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(2, 16),
    steps=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_batches_are_whole_shuffled_passes_over_all_images(
    count: int, batch_size: int, steps: int, seed: int
) -> None:
    settings = Settings(steps=steps, batch_size=batch_size, lr=1.0)

    batches = batch_order(count, settings, seed=seed)

    assert [len(batch) for batch in batches] == [min(batch_size, count)] * steps
    stream = torch.cat(batches).tolist()
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))
    rest = stream[len(stream) // count * count :]
    assert len(set(rest)) == len(rest)
    again = torch.cat(batch_order(count, settings, seed=seed)).tolist()
    assert stream == again


def test_passes_and_seeds_are_shuffled_differently() -> None:
    settings = Settings(steps=2, batch_size=30, lr=1.0)

    first, second = batch_order(30, settings, seed=0)

    assert first.tolist() != second.tolist()
    assert first.tolist() != batch_order(30, settings, seed=1)[0].tolist()


# Inside a run


class Recorder(nn.Module):
    """A small classifier that keeps what it saw, and the mode it saw it in."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4, momentum=0.01)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(4, 2)
        self.seen: list[tuple[bool, Tensor]] = []
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, x.detach().clone()))
        mask = self.drop(torch.ones(len(x), 4))
        if self.training:
            self.masks.append(mask)
        return self.head(self.norm(self.body(x)).relu().mean((2, 3)) * mask)


def toy_images(count: int = 12) -> Images:
    """Two classes that differ in brightness."""
    labels = torch.arange(count) % 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 60, (count, 3, 8, 8), generator=generator)
    pixels = (noise + 150 * labels[:, None, None, None]).to(torch.uint8)
    return Images(
        train=pixels,
        train_labels=labels,
        val=pixels,
        val_labels=labels,
        mean=(0.5, 0.4, 0.3),
        std=(0.5, 0.25, 0.125),
    )


def toy_arm(name: str, made: list[Recorder], **chosen: Any) -> Arm:
    def build(seed: int) -> nn.Module:
        made.append(Recorder(seed))
        return made[-1]

    return Arm(name=name, build=build, **chosen)


def toy_settings(**changed: Any) -> Settings:
    return Settings(**{"steps": 3, "batch_size": 4, "lr": 0.01, "eval_every": 2, **changed})


def test_arms_of_a_seed_see_the_same_batches_and_the_same_masks() -> None:
    made: list[Recorder] = []
    arms = [toy_arm("untouched", made), toy_arm("plan", made)]

    list(finetune(arms, toy_images(), toy_settings(), seeds=(0,), device=CPU))

    left, right = made
    assert len(left.seen) == len(right.seen)
    assert all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(left.seen, right.seen, strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(left.masks, right.masks, strict=True))
    assert not torch.equal(left.masks[0], left.masks[1])


def test_networks_see_normalised_pixels() -> None:
    made: list[Recorder] = []
    images = toy_images()

    list(finetune([toy_arm("untouched", made)], images, toy_settings(), seeds=(0,), device=CPU))

    training, first = made[0].seen[0]
    assert not training
    expected = (images.val.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1)) / (
        torch.tensor([0.5, 0.25, 0.125]).reshape(3, 1, 1)
    )
    assert torch.allclose(first.double(), expected, atol=1e-6)


def test_frozen_parameters_hold_and_the_others_train() -> None:
    made: list[Recorder] = []
    arm = toy_arm("plan", made, frozen=frozenset({"body.weight", "body.bias"}))
    before = {name: value.clone() for name, value in Recorder(0).named_parameters()}

    list(finetune([arm], toy_images(), toy_settings(), seeds=(0,), device=CPU))

    changed = {
        name for name, value in made[0].named_parameters() if not torch.equal(value, before[name])
    }
    assert changed == set(before) - {"body.weight", "body.bias"}


def test_a_plans_freeze_reaches_the_network() -> None:
    frozen = tiny_plan(freeze=["conv_stem", "blocks.2.0.conv_pwl"], name="frozen")
    free = tiny_plan(name="free")

    arms = by_arm(tiny_trial(frozen, free).steps)

    assert arms["frozen"][1] == arms["free"][1]  # the first loss comes before the first update
    assert arms["frozen"][2:] != arms["free"][2:]


def test_everything_frozen_is_refused() -> None:
    names = frozenset(name for name, _ in Recorder(0).named_parameters())
    arm = toy_arm("plan", [], frozen=names)

    with pytest.raises(ModelError, match="Every parameter is frozen"):
        list(finetune([arm], toy_images(), toy_settings(), seeds=(0,), device=CPU))


def first_update(made: list[Recorder], name: str, start: Tensor) -> float:
    now = dict(made[0].named_parameters())[name]
    return float((now - start).detach().abs().max())


def test_the_head_learns_faster_and_the_rate_warms_up() -> None:
    made: list[Recorder] = []
    start = Recorder(0)
    settings = toy_settings(steps=10, lr=0.01, head_lr=0.1, warmup_steps=5)
    arm = toy_arm("untouched", made, head=frozenset({"head.weight", "head.bias"}))

    # Step 0 and step 1.
    list(islice(finetune([arm], toy_images(), settings, seeds=(0,), device=CPU), 2))

    # AdamW's first update is the rate itself; biases do not decay. One fifth of it: warm-up.
    assert first_update(made, "head.bias", start.head.bias) == pytest.approx(0.02, rel=1e-3)
    assert first_update(made, "body.bias", start.body.bias) <= 0.002 * 1.001


@pytest.mark.parametrize(
    ("lr", "head_lr", "taken"),
    [(1e-4, None, 3e-3), (1e-2, None, 1e-2), (1e-4, 1e-5, 1e-5)],
    ids=["at-least", "as-the-rest", "as-given"],
)
def test_the_heads_rate_is_the_given_one_or_large_enough_for_a_new_layer(
    lr: float, head_lr: float | None, taken: float
) -> None:
    assert toy_settings(lr=lr, head_lr=head_lr).rate_of_head == taken


def test_slow_running_statistics_are_quickened() -> None:
    made: list[Recorder] = []

    list(
        finetune([toy_arm("untouched", made)], toy_images(), toy_settings(), seeds=(0,), device=CPU)
    )

    assert made[0].norm.momentum == 0.1


def stops_after(count: int) -> Callable[[], bool]:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > count

    return should_stop


@pytest.mark.parametrize("asked", range(12))
def test_a_stop_ends_the_run_soon_with_whole_steps(asked: int) -> None:
    arms = [toy_arm("untouched", []), toy_arm("plan", [])]
    whole = list(finetune(arms, toy_images(), toy_settings(), seeds=(0,), device=CPU))

    part = list(
        finetune(
            arms,
            toy_images(),
            toy_settings(),
            seeds=(0,),
            device=CPU,
            should_stop=stops_after(asked),
        )
    )

    expected = without_time(whole[: len(part)])
    rows = without_time(part)
    if rows and rows[-1] != expected[-1]:
        # Stopped in the evaluation after a step: the step counts, its accuracy is not there.
        assert rows[-1] == (*expected[-1][:-1], None)
        rows[-1] = expected[-1]
    assert len(part) < len(whole) or asked >= 10
    assert rows == expected


def test_evaluation_is_the_share_of_images_that_are_right() -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = (x.mean((1, 2, 3)) > 0).long()
            return nn.functional.one_hot(bright, 2).float()

    images = toy_images(70)  # more than one batch of the evaluation
    wrong = images.val_labels.clone()
    wrong[:7] = 1 - wrong[:7]

    right = evaluate(Bright(), images.val, wrong, (0.5,) * 3, (0.5,) * 3)

    assert right is not None
    assert right.tolist() == [False] * 7 + [True] * 63


def test_a_loss_that_is_no_longer_finite_ends_the_run_with_advice() -> None:
    class Broken(Recorder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (math.nan if self.training else 1.0)

    arm = Arm(name="plan", build=Broken)

    with pytest.raises(ModelError, match=r'arm "plan" is no longer finite at step 1\. Lower'):
        list(finetune([arm], toy_images(), toy_settings(), seeds=(0,), device=CPU))


def test_a_step_that_fails_names_arm_and_step() -> None:
    class Narrow(Recorder):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return super().forward(x)

    arm = Arm(name="plan", build=Narrow)

    with pytest.raises(ModelError, match='Arm "plan" cannot take step 1: mat1 and mat2'):
        list(finetune([arm], toy_images(), toy_settings(), seeds=(0,), device=CPU))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"steps": 0}, r"The steps? (is|are) 0; give 1 to"),
        ({"batch_size": 1}, r"batch size is 1; give 2 to"),
        ({"eval_every": 0}, r"evaluation interval is 0; give 1 to"),
        ({"lr": 0.0}, r"learning rate is 0; give a number above 0"),
        ({"lr": -1.0}, "learning rate is -1"),
        ({"lr": math.nan}, "learning rate is nan"),
        ({"lr": math.inf}, "learning rate is inf"),
        ({"head_lr": math.nan}, "learning rate is nan"),
        ({"head_lr": -1.0}, "learning rate is -1"),
    ],
)
def test_settings_that_cannot_train_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        toy_settings(**changed)


# Does the untouched network learn


def test_the_untouched_default_network_learns_in_a_short_run() -> None:
    """The embedded default at its own learning rate, on fewer and smaller images.

    Measured over four seeds: validation accuracy 0.56 to 0.61 after 30 steps, and the last five
    losses at most 0.73 of the first five. Chance is 0.125; the first loss is that of a head that
    knows nothing, ln 8 = 2.08; 96 images leave a standard error of 0.05.
    """
    spec = resolve_model("tf_efficientnet_lite0")
    rate = outline_model(spec, classes=8).default_lr
    settings = Settings(steps=30, batch_size=16, lr=rate, eval_every=30)

    steps = list(
        prepare_trial(
            spec,
            DATA,
            [],
            settings=settings,
            seeds=(0,),
            image_size=64,
            train_images=256,
            val_images=96,
            device="cpu",
        ).steps
    )

    losses = [step.train_loss for step in steps if step.train_loss is not None]
    assert losses[0] == pytest.approx(math.log(8), abs=0.2)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    accuracies = [step.val_accuracy for step in steps if step.val_accuracy is not None]
    assert accuracies[0] < 0.3
    assert accuracies[-1] > 0.45


# What a trial refuses


def test_a_plan_of_a_random_network_with_another_head_is_refused() -> None:
    plan = make_plan(outline_model(TINY, classes=5), ["conv_stem"])

    with pytest.raises(PlanError, match=r"depends on the size of its head.*5 classes.*has .* 8"):
        tiny_trial(plan)


@pytest.mark.parametrize("classes", [None, 5], ids=["own head", "other classes"])
def test_a_plan_that_writes_into_the_head_is_refused_under_another(classes: int | None) -> None:
    plan = plan_by_rule(
        resolve_model("tf_efficientnet_lite0"), "weight-magnitude", {"percent": 1}, classes=classes
    )

    with pytest.raises(PlanError, match=r'writes into the head "classifier".*new head of 8'):
        tiny_trial(plan, spec=resolve_model("tf_efficientnet_lite0"))


@pytest.mark.parametrize("classes", [None, 5], ids=["own head", "other classes"])
def test_a_plan_that_leaves_the_head_alone_trains_under_any(classes: int | None) -> None:
    spec = resolve_model("tf_efficientnet_lite0")
    other = make_plan(outline_model(spec, classes=classes), ["conv_head", "bn2"], seed=3)
    same = make_plan(outline_model(spec, classes=8), ["conv_head", "bn2"], seed=3)

    trial = tiny_trial(other, random_control(other, seed=0), spec=spec, steps=1)

    assert len({step.arm for step in trial.steps}) == 3
    assert trial.record.plans["plan"] == other
    edited = edited_model(other, classes=8)[0].module.state_dict()
    expected = edited_model(same)[0].module.state_dict()
    assert edited.keys() == expected.keys()
    # The values are the plan's own, whatever head it runs under: those of its export.
    exported, _ = edited_weights(other)
    for name in ("conv_head.weight", "bn2.weight", "bn2.running_mean", "blocks.0.0.conv_dw.weight"):
        assert torch.equal(edited[name], exported[name]), name
    assert torch.equal(edited["classifier.weight"], expected["classifier.weight"])


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,)])
def test_seeds_must_be_different_and_from_nought(seeds: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="Seeds must be different whole numbers from 0"):
        tiny_trial(seeds=seeds)


def test_plans_of_one_name_become_arms_of_their_own() -> None:
    trial = tiny_trial(tiny_plan(), tiny_plan(seed=1), tiny_plan(name="untouched"))

    assert trial.record.arms == ("untouched", "plan", "plan 2", "plan 3")


def test_a_random_control_is_an_arm_beside_the_plan() -> None:
    plan = tiny_plan()
    trial = tiny_trial(plan, random_control(plan, seed=0))

    assert trial.record.arms == ("untouched", "plan", "random control")
    drawn = {target.layer for target in trial.record.plans["random control"].targets}
    assert drawn.isdisjoint({"blocks.3.0.conv_pw", "classifier"})


# Curves as a file


def step(
    arm: str, seed: int, number: int, loss: float | None, accuracy: float | None
) -> StepRecord:
    return StepRecord(
        arm=arm, seed=seed, step=number, train_loss=loss, val_accuracy=accuracy, wall_s=0.5 * number
    )


def test_curves_survive_the_file(tmp_path: Path) -> None:
    steps = [
        step("untouched", 0, 0, None, 0.125),
        step('odd, "name"\né', 0, 0, None, 0.25),
        step("untouched", 0, 1, 0.1 + 0.2, None),
        step('odd, "name"\né', 0, 1, 1e-300, 1 / 3),
    ]
    (tmp_path / "curves.csv").write_text(curves_csv(steps), encoding="utf-8", newline="")

    assert read_curves(tmp_path / "curves.csv") == curves_of(steps)
    assert read_curves(tmp_path) == curves_of(steps)
    head = (tmp_path / "curves.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head == "arm,seed,step,train_loss,val_accuracy,wall_s" == ",".join(CURVE_COLUMNS)


@pytest.mark.parametrize(
    "content",
    ["arm,seed\ncontrol,0\n", "arm,seed,step,train_loss,val_accuracy,wall_s\ncontrol,x,1,,,0\n"],
    ids=["columns", "number"],
)
def test_a_file_that_is_no_curves_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "curves.csv").write_text(content, encoding="utf-8")

    with pytest.raises(OptionError, match=r"curves\.csv\" cannot be read as curves"):
        read_curves(tmp_path)


def test_curves_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read as curves"):
        read_curves(tmp_path / "gone.csv")


def test_a_run_is_written_whole(tmp_path: Path) -> None:
    trial = tiny_trial(tiny_plan(name="a/b"), steps=2)
    steps = list(trial.steps)

    comparison = write_run(trial.record, steps, tmp_path / "run", finished=True)

    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "run/answers.safetensors",
        "run/curves.csv",
        "run/plans/a_b.json",
        "run/summary.json",
    ]
    told = compare_curves(read_curves(tmp_path / "run"), trial.record.design)
    assert comparison.model_copy(update={"caveats": ()}) == told.model_copy(update={"caveats": ()})
