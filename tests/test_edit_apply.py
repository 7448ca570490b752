"""A plan changes what it names, into what its scheme says, to the same bits every time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from core.catalogue.schemes import SCHEMES, scheme_numbers
from core.edit.apply import edited_state
from core.errors import LimberError, OptionError, PlanError
from core.files.companions import plan_json
from core.files.plans import read_plan, write_plan
from core.files.snippets import TRAINERS, snippet
from core.load import build_module, load_model, resolve_model, state_sha256
from core.pipeline.applying import edited_model, plan_outline, plan_spec, reset_weights
from core.pipeline.batches import outline_model
from core.plan.making import check_plan, make_plan
from core.portable import SCRIPT
from core.records import ReinitPlan, ReinitReceipt
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 8

# Picked by hand in the embedded models: a convolution whose BatchNorm goes along, a depthwise
# one, a norm; an attention projection, an MLP layer, a norm, a layer scale, a root parameter.
PICKS = {
    "tf_efficientnet_lite0": ("conv_stem", "blocks.2.1.conv_dw", "blocks.6.0.bn2"),
    "vit_small_patch14_dinov2": (
        *("blocks.11.attn.qkv", "blocks.11.mlp.fc2", "blocks.10.norm1", "blocks.11.ls1"),
        "cls_token",
    ),
}
EMBEDDED = tuple(PICKS)


def embedded_plan(name: str, **chosen: object) -> ReinitPlan:
    outline = outline_model(resolve_model(name), classes=CLASSES)
    return make_plan(outline, PICKS[name], seed=5, **chosen)  # type: ignore[arg-type]


def named(plan: ReinitPlan) -> set[str]:
    return {name for target in plan.targets for name in (*target.parameters, *target.buffers)}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(
            left.contiguous().reshape(-1).view(torch.uint8),
            right.contiguous().reshape(-1).view(torch.uint8),
        )
    )


class Bench:
    """A tiny network of the zoo, its plan, and a twin, to apply by hand."""

    def __init__(self, name: str) -> None:
        self.case = ZOO[name]
        self.module = self.case.module()
        self.outline = self.case.outline()
        self.state = self.module.state_dict()
        for key, value in self.state.items():
            # Running statistics that a fresh network would not have.
            if key.endswith("running_mean"):
                value.fill_(3.0)
            elif key.endswith("running_var"):
                value.fill_(5.0)
            elif key.endswith("num_batches_tracked"):
                value.fill_(7)

    def fresh(self, seed: int) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000 + seed)
            return self.case.build().state_dict()

    def apply(self, plan: ReinitPlan) -> tuple[dict[str, Tensor], ReinitReceipt]:
        return edited_state(
            self.state,
            plan,
            fresh=self.fresh,
            parameters=frozenset(
                name for name, _ in self.module.named_parameters(remove_duplicate=False)
            ),
            sha256=state_sha256,
            plan_text=plan_json(plan),
        )


@pytest.fixture
def cnn() -> Bench:
    return Bench("residual_cnn")


NUMBERS = [
    (scheme.name, option) for scheme in SCHEMES.values() for option in sorted(scheme.parameters)
]


@pytest.mark.parametrize(("scheme", "option"), NUMBERS)
@pytest.mark.parametrize("value", [1e39, -1e39, 1e300])
def test_a_number_beyond_float32_is_refused_or_does_no_harm(
    cnn: Bench, scheme: str, option: str, value: float
) -> None:
    with suppress(LimberError):
        plan = make_plan(
            cnn.outline, ["block.conv2"], scheme=scheme, scheme_parameters={option: value}
        )
        edited, _ = cnn.apply(plan)
        assert all(bool(tensor.isfinite().all()) for tensor in edited.values())


# What changes, and what does not


def test_only_what_the_plan_names_changes(cnn: Bench) -> None:
    plan = make_plan(cnn.outline, ["stem", "block.conv2"])
    before = {name: value.clone() for name, value in cnn.state.items()}

    edited, _ = cnn.apply(plan)

    changed = {name for name in edited if not same_bits(edited[name], before[name])}
    assert changed == named(plan)
    assert list(edited) == list(before)


def test_the_given_weights_are_left_alone(cnn: Bench) -> None:
    before = {name: value.clone() for name, value in cnn.state.items()}

    cnn.apply(make_plan(cnn.outline, ["stem", "norm"], scheme="zero"))

    assert all(same_bits(cnn.state[name], before[name]) for name in before)


def test_the_architecture_scheme_copies_the_twin_with_its_statistics(cnn: Bench) -> None:
    plan = make_plan(cnn.outline, ["stem", "block.conv1"], seed=4)
    twin = cnn.fresh(4)

    edited, _ = cnn.apply(plan)

    assert all(same_bits(edited[name], twin[name]) for name in named(plan))
    assert edited["norm.running_mean"].eq(0).all()
    assert edited["norm.running_var"].eq(1).all()
    assert int(edited["norm.num_batches_tracked"]) == 0


def test_statistics_stay_when_the_plan_does_not_name_them(cnn: Bench) -> None:
    plan = make_plan(cnn.outline, ["stem", "norm"], resets_buffers=False)

    edited, _ = cnn.apply(plan)

    assert edited["norm.running_mean"].eq(3).all()


def test_each_target_uses_its_own_seed(cnn: Bench) -> None:
    plan = make_plan(cnn.outline, ["stem", "block.conv1"], seed=1)
    first, second = plan.targets
    mixed = plan.model_copy(update={"targets": (first, second.model_copy(update={"seed": 2}))})

    edited, _ = cnn.apply(mixed)

    assert same_bits(edited["stem.weight"], cnn.fresh(1)["stem.weight"])
    assert same_bits(edited["block.conv1.weight"], cnn.fresh(2)["block.conv1.weight"])


# DASH multiplies by factors that a plan carries: tests/test_pipeline_rules.py.
DRAWN = sorted(name for name, info in SCHEMES.items() if not info.needs_data)


@pytest.mark.parametrize("scheme", DRAWN)
def test_a_layer_gets_the_same_values_whoever_else_is_reset(cnn: Bench, scheme: str) -> None:
    # The one scheme of biases is for layers that have one.
    layer = "block.norm2" if scheme == "bias-mean" else "block.conv2"
    alone, _ = cnn.apply(make_plan(cnn.outline, [layer], scheme=scheme))
    among, _ = cnn.apply(make_plan(cnn.outline, ["stem", "norm", layer], scheme=scheme))

    changed = [name for name in alone if name.startswith(layer)]
    assert changed
    assert all(same_bits(alone[name], among[name]) for name in changed)


@pytest.mark.parametrize("scheme", DRAWN)
def test_the_global_random_state_plays_no_part(cnn: Bench, scheme: str) -> None:
    plan = make_plan(cnn.outline, ["stem", "block.norm1"], scheme=scheme)
    torch.manual_seed(1)
    state_before = torch.get_rng_state()
    first, _ = cnn.apply(plan)
    assert torch.equal(torch.get_rng_state(), state_before)
    torch.manual_seed(2)
    second, _ = cnn.apply(plan)

    assert all(same_bits(first[name], second[name]) for name in first)


# What each scheme writes


def reset(bench: Bench, layer: str, scheme: str, **numbers: float) -> Callable[[str], Tensor]:
    edited, _ = bench.apply(
        make_plan(bench.outline, [layer], scheme=scheme, scheme_parameters=numbers, seed=3)
    )
    return lambda name: edited[name]


def test_shrink_perturb_of_one_and_nothing_changes_nothing(cnn: Bench) -> None:
    plan = make_plan(
        cnn.outline,
        [layer.name for layer in cnn.outline.layers],
        scheme="shrink-perturb",
        scheme_parameters={"shrink": 1.0, "perturb": 0.0},
        resets_buffers=SCHEMES["shrink-perturb"].resets_buffers,
    )

    edited, receipt = cnn.apply(plan)

    assert all(same_bits(edited[name], cnn.state[name]) for name in edited)
    assert receipt.before_sha256 == receipt.after_sha256
    assert receipt.warnings == (
        "The plan changes no parameter at all: it is a no-op on these weights.",
    )


def test_shrink_perturb_mixes_old_and_fresh(cnn: Bench) -> None:
    new = reset(cnn, "stem", "shrink-perturb", shrink=0.5, perturb=0.25)

    expected = 0.5 * cnn.state["stem.weight"] + 0.25 * cnn.fresh(3)["stem.weight"]
    assert torch.equal(new("stem.weight"), expected)


def test_shrink_perturb_defaults_to_the_papers_numbers() -> None:
    assert scheme_numbers("shrink-perturb", {}) == {"shrink": 0.4, "perturb": 0.1}


def test_permute_keeps_the_values_and_moves_them(cnn: Bench) -> None:
    new = reset(cnn, "block.conv1", "permute")("block.conv1.weight")

    old = cnn.state["block.conv1.weight"]
    assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)
    assert (new != old).float().mean() > 0.9


def test_mean_var_keeps_mean_and_spread_and_drops_the_order(cnn: Bench) -> None:
    cnn.state["block.conv1.weight"].mul_(0.5).add_(2.0)

    new = reset(cnn, "block.conv1", "mean-var")("block.conv1.weight")

    old = cnn.state["block.conv1.weight"]
    # 324 draws: the standard error of the mean is std / 18, that of the spread std / 25.
    spread = float(old.std())
    assert abs(float(new.mean() - old.mean())) < 4 * spread / 18
    assert abs(float(new.std()) - spread) < 4 * spread / 25
    correlation = torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.25


def test_zero_writes_zeros(cnn: Bench) -> None:
    new = reset(cnn, "norm", "zero")

    assert not new("norm.weight").any()
    assert not new("norm.bias").any()


def test_kaiming_normal_has_the_variance_of_its_fan_in(cnn: Bench) -> None:
    new = reset(cnn, "block.conv1", "kaiming-normal")("block.conv1.weight")

    # Fan-in 6 * 3 * 3; 324 draws leave the spread uncertain by 4 %.
    assert float(new.std()) == pytest.approx(math.sqrt(2 / 54), rel=0.16)
    assert abs(float(new.mean())) < 4 * math.sqrt(2 / 54) / 18


def test_xavier_uniform_fills_its_bound(cnn: Bench) -> None:
    new = reset(cnn, "block.conv1", "xavier-uniform")("block.conv1.weight")

    bound = math.sqrt(6 / (54 + 54))
    assert float(new.abs().max()) <= bound
    assert float(new.abs().max()) > 0.95 * bound
    assert float(new.std()) == pytest.approx(bound / math.sqrt(3), rel=0.16)


def test_trunc_normal_stays_within_two_standard_deviations(cnn: Bench) -> None:
    new = reset(cnn, "block.conv1", "trunc-normal")("block.conv1.weight")

    assert float(new.abs().max()) <= 0.04
    # A normal cut at two standard deviations keeps 0.88 of its spread.
    assert float(new.std()) == pytest.approx(0.88 * 0.02, rel=0.16)


def test_orthogonal_rows_are_orthonormal(cnn: Bench) -> None:
    new = reset(cnn, "block.conv1", "orthogonal")("block.conv1.weight").reshape(6, -1)

    assert torch.allclose(new @ new.T, torch.eye(6), atol=1e-5)


@pytest.mark.parametrize(
    "scheme", ["kaiming-normal", "xavier-uniform", "trunc-normal", "orthogonal"]
)
def test_schemes_without_a_fan_in_copy_the_twin_into_vectors(scheme: str) -> None:
    bench = Bench("vit")

    new = reset(bench, "blocks.0.mlp.fc1", scheme)

    twin = bench.fresh(3)
    assert torch.equal(new("blocks.0.mlp.fc1.bias"), twin["blocks.0.mlp.fc1.bias"])
    assert not torch.equal(new("blocks.0.mlp.fc1.weight"), twin["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    "scheme", sorted(set(DRAWN) - {"architecture", "zero", "mean", "bias-mean", "fire"})
)
def test_another_seed_draws_other_values(cnn: Bench, scheme: str) -> None:
    drawn = [
        cnn.apply(make_plan(cnn.outline, ["block.conv1"], scheme=scheme, seed=seed))[0]
        for seed in (0, 1)
    ]

    assert not torch.equal(drawn[0]["block.conv1.weight"], drawn[1]["block.conv1.weight"])


@pytest.mark.parametrize(
    ("scheme", "numbers", "says"),
    [
        ("magic", {}, r'no scheme "magic"\. Known: architecture, mean-var'),
        ("zero", {"shrink": 1.0}, r'Scheme "zero" has no number "shrink"\. It takes: none'),
        ("shrink-perturb", {"size": 1.0}, r"It takes: shrink, perturb"),
        ("shrink-perturb", {"shrink": math.nan}, r"shrink is nan\. Give a finite number"),
        ("shrink-perturb", {"perturb": math.inf}, r"perturb is inf\. Give a finite number"),
    ],
)
def test_a_scheme_or_number_that_does_not_exist_is_refused(
    cnn: Bench, scheme: str, numbers: dict[str, float], says: str
) -> None:
    plan = make_plan(cnn.outline, ["stem"])
    target = plan.targets[0]
    choice = target.scheme.model_copy(update={"name": scheme, "parameters": numbers})
    plan = plan.model_copy(update={"targets": (target.model_copy(update={"scheme": choice}),)})

    with pytest.raises(PlanError, match=says):
        cnn.apply(plan)


# Refusals


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("parameters", "gone.weight", r'layer "stem" names the parameter "gone\.weight"'),
        ("parameters", "norm.running_mean", r'names the parameter "norm\.running_mean"'),
        ("buffers", "gone.running_mean", r'names the buffer "gone\.running_mean"'),
        ("buffers", "norm.weight", r'names the buffer "norm\.weight"'),
    ],
)
def test_a_name_that_is_not_there_is_refused(cnn: Bench, kind: str, name: str, says: str) -> None:
    plan = make_plan(cnn.outline, ["stem"])
    target = plan.targets[0].model_copy(update={kind: (name,)})

    with pytest.raises(PlanError, match=says + r".*which the model does not have"):
        cnn.apply(plan.model_copy(update={"targets": (target,)}))


def test_a_parameter_that_is_listed_twice_is_refused(cnn: Bench) -> None:
    plan = make_plan(cnn.outline, ["stem"])

    with pytest.raises(PlanError, match=r'resets "stem\.weight" twice, in "stem" and in "stem"'):
        cnn.apply(plan.model_copy(update={"targets": plan.targets * 2}))


def test_half_of_a_tie_is_refused_when_applied() -> None:
    bench = Bench("tied")
    plan = make_plan(bench.outline, ["left", "right"])

    with pytest.raises(PlanError, match=r'"left\.weight" shares its memory with "right\.weight"'):
        bench.apply(plan.model_copy(update={"targets": plan.targets[:1]}))


@pytest.mark.parametrize("scheme", ["architecture", "permute", "kaiming-normal"])
def test_a_tie_is_reset_once_and_stays_tied(scheme: str) -> None:
    bench = Bench("tied")

    edited, receipt = bench.apply(make_plan(bench.outline, ["left", "right"], scheme=scheme))

    assert edited["left.weight"] is edited["right.weight"]
    assert not torch.equal(edited["left.weight"], bench.state["left.weight"])
    assert receipt.parameters_touched == 12 * 12 + 12 + 12
    assert receipt.parameters_total == sum(each.numel() for each in bench.module.parameters())


# The receipt


def test_the_receipt_says_what_changed_and_by_how_much(cnn: Bench) -> None:
    plan = make_plan(cnn.outline, ["stem"], scheme="zero")

    edited, receipt = cnn.apply(plan)

    change = receipt.changes[0]
    assert (change.name, change.layer, change.buffer) == ("stem.weight", "stem", False)
    assert (change.entries, change.changed) == (162, 162)
    assert change.relative_change == 1.0
    assert change.norm_after == 0.0
    assert [each.name for each in receipt.changes if each.buffer] == list(plan.targets[0].buffers)
    assert receipt.parameters_touched == 162
    assert receipt.plan_sha256 == hashlib.sha256(plan_json(plan).encode()).hexdigest()
    assert receipt.before_sha256 == state_sha256(cnn.state)
    assert receipt.after_sha256 == state_sha256(edited)


def test_the_receipt_warns_of_weights_that_grow_tenfold(cnn: Bench) -> None:
    numbers = {"shrink": 11.0, "perturb": 0.0}
    plan = make_plan(cnn.outline, ["stem"], scheme="shrink-perturb", scheme_parameters=numbers)

    _, receipt = cnn.apply(plan)

    assert receipt.warnings == ('"stem.weight" grows more than tenfold in norm.',)


# The embedded models, whole


@pytest.fixture(scope="module", params=EMBEDDED)
def reset_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReinitPlan, Path]:
    """A plan for an embedded model and the weights it makes."""
    plan = embedded_plan(request.param, freeze=("conv_head",) if "eff" in request.param else ())
    out = tmp_path_factory.mktemp("reset") / "reinit.safetensors"
    reset_weights(plan, out)
    return plan, out


def test_an_embedded_model_changes_where_the_plan_says_and_nowhere_else(
    reset_file: tuple[ReinitPlan, Path],
) -> None:
    plan, out = reset_file
    spec = plan_spec(plan)
    before = load_model(spec, classes=CLASSES).module.state_dict()
    twin = build_module(spec, classes=CLASSES, seed=5).state_dict()

    after = load_file(out)

    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed <= named(plan)
    # A parameter may have kept the value of its initialisation; a kernel never has.
    assert {name for name in named(plan) if before[name].ndim > 1} <= changed
    assert all(same_bits(after[name], twin[name]) for name in named(plan))


def test_the_cnn_takes_its_running_statistics_along() -> None:
    plan = embedded_plan("tf_efficientnet_lite0")

    buffers = {name for target in plan.targets for name in target.buffers}

    assert buffers == {
        f"{norm}.{key}"
        for norm in ("bn1", "blocks.2.1.bn2", "blocks.6.0.bn2")
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_the_file_carries_its_plan(reset_file: tuple[ReinitPlan, Path]) -> None:
    plan, out = reset_file

    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()

    digest = state_sha256(load_file(out))
    assert metadata == {"format": "pt", "limber_plan": plan_json(plan), "limber_sha256": digest}
    assert read_plan(metadata["limber_plan"]) == plan


def test_the_file_loads_strictly_into_the_library_model(
    reset_file: tuple[ReinitPlan, Path],
) -> None:
    plan, out = reset_file
    model = timm.create_model(plan.model.name, num_classes=CLASSES, **plan.model.kwargs)

    model.load_state_dict(load_file(out), strict=True)

    after = edited_model(plan)[0].module.state_dict()
    assert all(same_bits(value, after[name]) for name, value in model.state_dict().items())


def pack(plan: ReinitPlan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay the plan and the script beside the weights, and work from there."""
    write_plan(plan, folder / "plan.json")
    (folder / "apply_plan.py").write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "apply_plan", raising=False)


def test_the_torch_snippet_runs_and_gives_the_edited_network(
    reset_file: tuple[ReinitPlan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = reset_file
    pack(plan, out.parent, monkeypatch)
    scope: dict[str, object] = {}

    exec(compile(snippet(plan, "torch"), "snippet", "exec"), scope)

    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    after = load_file(out)
    assert model.state_dict().keys() == after.keys()
    assert all(same_bits(value, after[name]) for name, value in model.state_dict().items())
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {f"{layer}.weight" for layer in plan.freeze}


def test_the_torchvision_snippet_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve_model("torchvision:shufflenet_v2_x0_5", weights="none")
    plan = make_plan(outline_model(spec, classes=3), ["conv1.0"], freeze=["fc"])
    reset_weights(plan, tmp_path / "reinit.safetensors")
    pack(plan, tmp_path, monkeypatch)
    scope: dict[str, object] = {}

    exec(compile(snippet(plan, "torchvision"), "snippet", "exec"), scope)

    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    after = edited_model(plan)[0].module.state_dict()
    assert all(same_bits(value, after[name]) for name, value in model.state_dict().items())
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {"fc.weight", "fc.bias"}


def test_the_timm_snippet_names_model_weights_and_classes() -> None:
    text = snippet(embedded_plan("vit_small_patch14_dinov2"), "timm", weights="mine.safetensors")

    assert "--model vit_small_patch14_dinov2" in text
    assert "--initial-checkpoint mine.safetensors --num-classes 8" in text
    assert "dynamic_img_size=True" in text


def test_there_is_no_snippet_for_an_unknown_trainer() -> None:
    with pytest.raises(OptionError, match=rf'no snippet for "keras"\. Known: {TRAINERS[0]}, '):
        snippet(embedded_plan("tf_efficientnet_lite0"), "keras")


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys; from core.cli import main; out, *plans = sys.argv[1:];"
        "sys.exit(max(main(['apply', plan, '--out', out, '--json']) for plan in plans))"
    )
    plans = []
    for name, scheme in ((EMBEDDED[0], "architecture"), (EMBEDDED[1], "orthogonal")):
        plans.append(tmp_path / f"{name}.json")
        plans[-1].write_text(plan_json(embedded_plan(name, scheme=scheme)), encoding="utf-8")

    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / f"{hash_seed}.safetensors"), *plans],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("0", "1")  # which order the two keys of the metadata differently
    ]
    digests = [
        re.findall(r'"file_sha256": "(\w{64})"', process.communicate(timeout=120)[0])
        for process in running
    ]

    assert [process.returncode for process in running] == [0, 0]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(EMBEDDED)


def test_a_plan_for_other_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = embedded_plan("tf_efficientnet_lite0")
    model = plan.model.model_copy(update={"backbone_sha256": "d" * 64})
    plan = plan.model_copy(update={"model": model})

    with pytest.raises(PlanError, match=r"made for weights dddddddddddd\.\.\."):
        reset_weights(plan, tmp_path / "reinit.safetensors")

    assert list(tmp_path.iterdir()) == []


def test_a_plan_finds_its_own_network_again() -> None:
    plan = embedded_plan("tf_efficientnet_lite0")

    outline = plan_outline(plan)

    check_plan(plan, outline)
    assert outline.backbone_sha256 == plan.model.backbone_sha256


def test_another_head_seed_changes_the_head_alone() -> None:
    plan = embedded_plan("tf_efficientnet_lite0")

    first, second = (edited_model(plan, head_seed=seed)[0] for seed in (1, 2))

    left, right = first.module.state_dict(), second.module.state_dict()
    changed = {name for name in left if not torch.equal(left[name], right[name])}
    assert changed == {"classifier.weight"}
    assert json.loads(plan_json(plan))["model"]["head_seed"] == 0


def test_units_that_are_all_alike_are_warned_of(cnn: Bench) -> None:
    for scheme, warned in (("mean", True), ("zero", True), ("normal", False), ("permute", False)):
        _, receipt = cnn.apply(make_plan(cnn.outline, ["stem", "block.conv1"], scheme=scheme))

        said = [each for each in receipt.warnings if "all units there are alike" in each]
        assert bool(said) is warned
        if warned:
            assert "stem.weight" in said[0]
