"""Every rule with every scheme on four networks: what is selected, written, and left alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.catalogue.rules import RULES
from core.catalogue.schemes import SCHEMES
from core.edit.apply import edited_state, entry_flags
from core.edit.draws import DRAWS
from core.errors import PlanError
from core.files.companions import arrays_of, plan_json
from core.files.diagnoses import read_units, write_diagnosis
from core.files.plans import read_plan
from core.load import (
    build_module,
    choose_items,
    decode_items,
    load_model,
    open_images,
    resolve_data,
    resolve_model,
    state_sha256,
)
from core.measure.utility import (
    entries_below_mean,
    fraction_lowest,
    lowest_entries,
    rounding_alone,
    summed_gradients,
    unit_figures,
)
from core.network.connections import connections_of, readings_of
from core.network.hooks import batch_statistics
from core.network.outline import outline_module
from core.pipeline.applying import edited_model
from core.pipeline.measuring import MeasureSettings, diagnose
from core.pipeline.planning.control import random_control
from core.pipeline.planning.rules import CHOOSERS, Wish, plan_by_rule
from core.pipeline.planning.subject import Sight
from core.plan.making import planned_size
from core.records import MetricValue, ReinitPlan, ReinitReceipt, SchemeChoice
from core.records.outline import is_bias
from core.seeding import generator
from tests.reference import scheme_values

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 8
SAMPLES = 16
SIZE = {"timm:test_resnet": 64, "timm:test_efficientnet": 64, "timm:test_vit": 160}
NETWORKS = (*SIZE, "tf_efficientnet_lite0")
# Limits at which each rule finds something, and not everything, on all four.
OPTIONS: dict[str, dict[str, float | str]] = {
    "last-blocks": {"blocks": 1},
    "threshold": {"metric": "unit_weight_l2", "threshold": 0.9, "of": "ratio", "side": "below"},
    "weight-magnitude": {"percent": 30},
    "weight-gradient": {"percent": 7},
    "swr": {"threshold": 0.4},
    "redo": {"threshold": 0.9},
    "grama": {"threshold": 0.9},
    "cbp": {"percent": 20},
    "gxd": {"percent": 20},
    "random": {"percent": 10},
}
HANDS = {
    "timm:test_resnet": "layer1.0.conv1",
    "timm:test_efficientnet": "blocks.1.0.conv_exp",
    "timm:test_vit": "blocks.0.attn.qkv",
    "tf_efficientnet_lite0": "blocks.2.1.conv_pw",
}


@dataclass
class Bench:
    """One network, its images and its diagnosis, loaded once."""

    name: str
    folder: Path
    plans: dict[str, ReinitPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        embedded = ":" not in self.name
        self.spec = resolve_model(self.name, weights="pretrained" if embedded else "none")
        self.data = resolve_data("bloodmnist")
        self.size = SIZE.get(self.name, 64)
        self.loaded = load_model(self.spec, classes=CLASSES)
        self.module = self.loaded.module
        self.state = {name: v.detach().clone() for name, v in self.module.state_dict().items()}
        self.parameters = frozenset(dict(self.module.named_parameters(remove_duplicate=False)))
        self.diagnosis = self.folder / "diagnosis.json"
        found, units = diagnose(
            self.spec,
            self.data,
            MeasureSettings(samples=SAMPLES, batch_size=8, image_size=self.size),
        )
        write_diagnosis(found, units, self.diagnosis)
        self._twins: dict[int, Mapping[str, Tensor]] = {}

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        images, card = open_images(self.data), self.loaded.card
        items = choose_items(images.splits["train"], SAMPLES, seed=0)
        rows = []
        for start in range(0, SAMPLES, 8):
            pixels, labels = decode_items(
                images, items[start : start + 8], card.preprocessing, size=self.size
            )
            mean, std = (
                torch.tensor(each).reshape(1, 3, 1, 1)
                for each in (card.preprocessing.mean, card.preprocessing.std)
            )
            rows.append(((pixels.float() / 255 - mean) / std, labels))
        return rows

    def twin(self, seed: int) -> Mapping[str, Tensor]:
        if seed not in self._twins:
            self._twins[seed] = build_module(self.spec, classes=CLASSES, seed=seed).state_dict()
        return self._twins[seed]

    def plan(self, rule: str, **wish: object) -> ReinitPlan:
        if rule == "by-hand":
            wish["units"] = {HANDS[self.name]: (1, 2)}
        sight = Sight(diagnosis=self.diagnosis, batch_size=8, image_size=self.size)
        return plan_by_rule(
            self.spec,
            rule,
            OPTIONS.get(rule, {}),
            sight=sight,
            wish=Wish(seed=3, **wish),  # type: ignore[arg-type]
        )

    def resolved(self, rule: str) -> ReinitPlan:
        if rule not in self.plans:
            self.plans[rule] = self.plan(rule)
        return self.plans[rule]

    def apply(self, plan: ReinitPlan) -> tuple[dict[str, Tensor], ReinitReceipt]:
        return edited_state(
            self.state,
            plan,
            fresh=self.twin,
            parameters=self.parameters,
            sha256=state_sha256,
            plan_text=plan_json(plan),
        )


_benches: dict[str, Bench] = {}


@pytest.fixture(params=NETWORKS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if request.param not in _benches:
        _benches[request.param] = Bench(request.param, tmp_path_factory.mktemp("bench"))
    return _benches[request.param]


def selection(bench: Bench, plan: ReinitPlan) -> dict[str, dict[str, Tensor]]:
    """Return tensor to write to flags of a plan, whole tensors included."""
    arrays = arrays_of(plan)
    found: dict[str, dict[str, Tensor]] = {}
    for target in plan.targets:
        partly = {entries.tensor for entries in target.entries}
        for name in (*target.parameters, *target.buffers):
            if name not in partly:
                write = "scheme" if name in target.parameters else "fresh"
                everything = torch.ones(bench.state[name].shape, dtype=torch.bool)
                found.setdefault(name, {})[write] = everything
        for entries in target.entries:
            old = bench.state[entries.tensor]
            flags = entry_flags(entries, old, arrays)
            if flags is None:
                flags = torch.ones(old.shape, dtype=torch.bool)
            assert entries.write not in found.get(entries.tensor, {})
            found.setdefault(entries.tensor, {})[entries.write] = flags
    return found


def test_every_rule_of_the_catalogue_has_a_chooser_and_every_scheme_a_draw() -> None:
    assert list(CHOOSERS) == [rule.name for rule in RULES]
    assert list(DRAWS) == list(SCHEMES)


# What each rule selects


def lowest(utility: Tensor, percent: float) -> Tensor:
    """Return flags of the lowest entries, by sorting; the truth that topk is held to."""
    flags = torch.zeros(utility.numel(), dtype=torch.bool)
    count = int(percent / 100 * utility.numel())
    flags[torch.topk(utility.flatten(), count, largest=False).indices] = True
    values = utility.flatten()
    if 0 < count < len(values):
        assert values[flags].max() <= values[~flags].min()
    return flags.reshape(utility.shape)


def by_autograd(bench: Bench) -> dict[str, Tensor]:
    """Return the summed gradients by plain autograd on a copy."""
    module = build_module(bench.spec, classes=CLASSES, seed=0)
    module.load_state_dict(bench.state)
    batch_statistics(module)
    total = {name: torch.zeros_like(each) for name, each in module.named_parameters()}
    for inputs, labels in bench.batches:
        module.zero_grad()
        F.cross_entropy(module(inputs), labels).backward()
        for name, each in module.named_parameters():
            total[name] += torch.zeros_like(each) if each.grad is None else each.grad
    return total


def test_gradients_are_those_of_plain_autograd(bench: Bench) -> None:
    found, truth = summed_gradients(bench.module, bench.batches), by_autograd(bench)

    # A bias before a norm gets rounding noise alone: compare on the scale of the network's.
    scale = max(float(each.norm()) for each in truth.values())
    for name, each in truth.items():
        off = float((found[name] - each).norm())
        assert off <= 1e-4 * float(each.norm()) + 1e-6 * scale, name


@pytest.mark.parametrize("rule", ["weight-magnitude", "weight-gradient"])
def test_the_seed_papers_rules_take_the_lowest_of_every_tensor(bench: Bench, rule: str) -> None:
    percent = float(OPTIONS[rule]["percent"])
    reached = summed_gradients(bench.module, bench.batches)
    rounding = rounding_alone(bench.module, *bench.batches[0])

    found = selection(bench, bench.resolved(rule))

    expected = {}
    for name in bench.parameters:
        old = bench.state[name]
        bias = is_bias(name) and old.ndim == 1
        utility = old.abs() if rule == "weight-magnitude" else (old * reached[name]).abs()
        left_out = rule == "weight-gradient" and name in rounding
        if (old.ndim > 1 or bias) and int(percent / 100 * old.numel()) and not left_out:
            expected[name] = ("zero" if bias else "scheme", utility)
    assert found.keys() == expected.keys()
    for name, (write, utility) in expected.items():
        assert found[name].keys() == {write}
        assert torch.equal(found[name][write], lowest(utility, percent)), name


def test_swr_takes_what_lies_below_a_multiple_of_the_mean(bench: Bench) -> None:
    sight = Sight(diagnosis=bench.diagnosis)
    options = {"threshold": 0.5, "utility": "magnitude"}

    found = selection(bench, plan_by_rule(bench.spec, "swr", options, sight=sight))

    for name in bench.parameters - bench.loaded.head:
        utility = bench.state[name].double().abs()
        truth = utility <= 0.5 * utility.mean()
        if truth.any():
            assert torch.equal(found[name]["scheme"], truth)
        else:
            assert name not in found
    assert not bench.loaded.head & found.keys()


@pytest.mark.parametrize(
    ("rule", "metric"), [("redo", "unit_mean_abs"), ("grama", "unit_grad_mean_abs")]
)
def test_dormant_units_are_those_far_below_their_layers_mean(
    bench: Bench, rule: str, metric: str
) -> None:
    tau = float(OPTIONS[rule]["threshold"])
    units = read_units(bench.diagnosis)
    wires = connections_of(bench.module, torch.rand(1, 3, bench.size, bench.size))

    plan = bench.resolved(rule)

    chosen = {target.layer: set(target.units) for target in plan.targets}
    owners: dict[int, set[str]] = {}
    for layer, of in wires.bundles.items():
        for bundle in of.tolist():
            owners.setdefault(bundle, set()).add(layer)
    judged = 0
    for layer, of in wires.bundles.items():
        alone = all(len(owners[bundle]) == 1 for bundle in of.tolist())
        if layer not in units or metric not in units[layer] or not alone:
            continue
        own = units[layer][metric][0].astype(float)
        judged += 1
        expected = {i for i, value in enumerate(own) if value <= tau * own.mean()}
        near = {i for i, value in enumerate(own) if abs(value - tau * own.mean()) < 1e-9}
        assert chosen.get(layer, set()) ^ expected <= near
    assert judged


def test_a_threshold_on_layers_takes_those_beyond_it(bench: Bench) -> None:
    from core.files.diagnoses import read_diagnosis

    reports = [r for r in read_diagnosis(bench.diagnosis).layers if not r.head]
    values = {r.name: r.metrics["weight_l2"].value for r in reports}
    known = sorted(value for value in values.values() if value is not None)
    limit = known[len(known) // 2]
    sight = Sight(diagnosis=bench.diagnosis)
    options: dict[str, float | str | None] = {"metric": "weight_l2", "threshold": limit}

    plan = plan_by_rule(bench.spec, "threshold", options, sight=sight)

    expected = {name for name, value in values.items() if value is not None and value > limit}
    assert {target.layer for target in plan.targets} == expected
    assert (
        plan.evidence.diagnosis_sha256 == hashlib.sha256(bench.diagnosis.read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("metric", ["weight_l2", "unit_weight_l2"])
def test_a_threshold_on_the_ratio_leaves_out_a_twin_of_0_and_says_so(
    bench: Bench, metric: str, tmp_path: Path
) -> None:
    from core.files.diagnoses import read_diagnosis, read_units

    found, units = read_diagnosis(bench.diagnosis), read_units(bench.diagnosis)
    first = next(
        layer.name
        for layer in found.layers
        # A class token is one unit that no rule over units takes.
        if not layer.head
        and "unit_weight_l2" in units.get(layer.name, {})
        and len(units[layer.name]["unit_weight_l2"][0]) > 1
    )
    whole = metric == "weight_l2"
    layers = [
        layer.model_copy(
            update={
                "twin_metrics": layer.twin_metrics
                | {"weight_l2": MetricValue(value=1e-30 if layer.name == first else 1e-3, n=1)}
            }
        )
        for layer in found.layers
    ]
    arrays = {}
    for name, figures in units.items():
        for key, (own, twin) in figures.items():
            arrays[f"{name}/{key}"] = own
            changed = np.full_like(own, 1e-30 if name == first else 1e-3)
            arrays[f"twin/{name}/{key}"] = changed if key == metric else twin
    path = tmp_path / "diagnosis.json"
    write_diagnosis(found.model_copy(update={"layers": tuple(layers)}), arrays, path)
    options: dict[str, float | str | None] = {"metric": metric, "threshold": 0.5, "of": "ratio"}

    plan = plan_by_rule(bench.spec, "threshold", options, sight=Sight(diagnosis=path))

    reset = {target.layer for target in plan.targets if whole or target.units}
    assert first not in reset
    assert reset
    # A unit that is 0 itself lies on this side of any limit, whatever its twin is.
    count = "1" if whole else f"{np.count_nonzero(units[first][metric][0])} units"
    note = f"Left out {count} without a ratio: the fresh twin's {metric} is 0 there."
    assert note in plan.evidence.note


def test_the_last_blocks_are_a_tail_without_the_head(bench: Bench) -> None:
    plan = bench.resolved("last-blocks")

    layers = [target.layer for target in plan.targets]
    assert layers
    assert not {name.rpartition(".")[0] for name in bench.loaded.head} & set(layers)


@pytest.mark.parametrize("rule", ["cbp", "gxd"])
def test_a_share_of_every_pool_of_units_is_taken(bench: Bench, rule: str) -> None:
    plan = bench.resolved(rule)

    for target in plan.targets:
        layer = bench.state.get(f"{target.layer}.weight")
        if target.units and layer is not None and layer.ndim > 1:
            assert len(target.units) == int(0.2 * layer.shape[0])


# What each scheme writes into it


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_every_scheme_writes_its_formula_and_nothing_else(bench: Bench, rule: str) -> None:
    plan = bench.resolved(rule)
    chosen = selection(bench, plan)
    granularity = plan.targets[0].granularity

    tried = 0
    for scheme, info in SCHEMES.items():
        if granularity not in info.granularities or info.needs_data:
            continue
        numbers = info.parameters
        targets = tuple(
            each.model_copy(update={"scheme": SchemeChoice(name=scheme)}) for each in plan.targets
        )
        swapped = plan.model_copy(update={"targets": targets})

        edited, receipt = bench.apply(swapped)

        if scheme == plan.targets[0].scheme.name:
            assert receipt.after_sha256 == bench.apply(swapped)[1].after_sha256
        for name, old in bench.state.items():
            expected = old.clone()
            for write in ("scheme", "fresh", "one", "zero", "add"):
                flags = chosen.get(name, {}).get(write)
                if flags is None:
                    continue
                twin = bench.twin(3)[name]
                if write == "scheme" and name in bench.parameters:
                    values = scheme_values(
                        scheme,
                        old,
                        twin,
                        generator(3, scheme, name),
                        numbers=numbers,
                        bias=is_bias(name),
                        selected=None if bool(flags.all()) and not partly(plan, name) else flags,
                    )
                elif write == "add":
                    values = expected + torch.from_numpy(arrays_of(plan)[f"{name}:add"]).reshape(
                        expected.shape
                    )
                else:
                    values = {
                        "fresh": twin,
                        "one": torch.ones_like(old),
                        "zero": torch.zeros_like(old),
                    }[write]
                expected = torch.where(flags, values.to(old.dtype), expected)
            # The formulas here take float64 throughout; the network holds float32, in which a
            # mean and a draw of either sign may cancel.
            assert torch.allclose(edited[name], expected, rtol=1e-5, atol=1e-6), (scheme, name)
            touched = torch.zeros(old.shape, dtype=torch.bool)
            for flags in chosen.get(name, {}).values():
                touched |= flags
            assert torch.equal(edited[name][~touched], old[~touched])
        tried += 1
    assert tried >= 15


def partly(plan: ReinitPlan, name: str) -> bool:
    return any(e.tensor == name for target in plan.targets for e in target.entries)


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_plan_survives_its_files(bench: Bench, rule: str, tmp_path: Path) -> None:
    from core.files.plans import write_plan

    plan = bench.resolved(rule)

    written = write_plan(plan, tmp_path / "mine.json")
    read = read_plan(tmp_path / "mine.json")

    assert read == written
    assert read.targets == plan.targets
    assert (read.companion is None) == (plan.companion is None)
    if read.companion is not None:
        data = (tmp_path / read.companion.file).read_bytes()
        assert read.companion.file == "mine.masks.safetensors"
        assert hashlib.sha256(data).hexdigest() == read.companion.sha256
    assert bench.apply(read)[1].after_sha256 == bench.apply(plan)[1].after_sha256


@pytest.mark.parametrize("network", ["timm:test_resnet", "timm:test_vit"])
def test_another_process_makes_the_same_plan_and_the_same_bits(
    network: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if network not in _benches:
        _benches[network] = Bench(network, tmp_path_factory.mktemp("bench"))
    bench = _benches[network]
    rules = [rule.name for rule in RULES]
    script = (
        "import sys, json; from pathlib import Path; from tests.test_pipeline_rules import *\n"
        "bench = Bench.__new__(Bench); bench.plans = {}; bench.name = sys.argv[1]\n"
        "bench.diagnosis = Path(sys.argv[2])\n"
        "bench.spec = resolve_model(bench.name, weights='none')\n"
        "bench.size = SIZE[bench.name]\n"
        "print(json.dumps({r: hashlib.sha256((plan_json(p) + edited_model(p)[1].after_sha256)"
        ".encode()).hexdigest() for r in sys.argv[3:] for p in [bench.plan(r)]}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, network, str(bench.diagnosis), *rules],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )

    expected = {}
    for rule in rules:
        plan = bench.resolved(rule)
        text = plan_json(plan) + edited_model(plan)[1].after_sha256
        expected[rule] = hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(done.stdout) == expected


# What is left of the function


@pytest.mark.parametrize("rule", ["redo", "grama", "cbp"])
@pytest.mark.parametrize("network", ["timm:test_resnet"])
def test_outputs_lose_the_removed_units_and_nothing_else(
    rule: str, network: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if network not in _benches:
        _benches[network] = Bench(network, tmp_path_factory.mktemp("bench"))
    bench = _benches[network]
    plan = bench.resolved(rule)
    inputs = bench.batches[0][0].double()
    edited, _ = bench.apply(plan)
    module = build_module(bench.spec, classes=CLASSES, seed=0).double().eval()
    # A head whose architecture starts it near zero would hide every difference.
    head = {name for name in bench.loaded.head if bench.state[name].ndim > 1}
    for name in head:
        scale = 1 / float(bench.state[name].std())
        for state in (bench.state, edited):
            state[name] = state[name] * scale if state is edited else state[name]

    def outputs(state: Mapping[str, Tensor]) -> Tensor:
        module.load_state_dict(state)
        with torch.no_grad():
            return module(inputs)

    # The original with what reads the units cut, and nothing redrawn.
    cut = {name: value.clone() for name, value in bench.state.items()}
    for name in head:
        cut[name] = cut[name] * (1 / float(bench.state[name].std()))
    wires = connections_of(bench.module, torch.rand(1, 3, bench.size, bench.size))
    bundles = {
        int(wires.bundles[target.layer][unit])
        for target in plan.targets
        if target.layer in wires.bundles
        for unit in target.units
    }
    for part in wires.wiring(sorted(bundles)).outgoing:
        cut[part.tensor].view(-1)[torch.from_numpy(part.entries)] = 0
    for name, writes in selection(bench, plan).items():
        if "add" in writes:
            gained = torch.from_numpy(arrays_of(plan)[f"{name}:add"]).reshape(cut[name].shape)
            cut[name] = cut[name] + gained

    assert bundles
    assert torch.allclose(outputs(edited), outputs(cut), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(outputs(cut), outputs(bench.state), rtol=1e-3, atol=1e-6)


def test_a_unit_that_is_cut_is_as_if_its_activation_were_zero() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).double()
    inputs = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    wires = connections_of(net, inputs[:1])
    handle = net[1].register_forward_hook(lambda m, a, h: h.index_fill(1, torch.tensor([3]), 0))
    silenced = net(inputs)
    handle.remove()

    wiring = wires.wiring([int(wires.bundles["0"][3])])
    with torch.no_grad():
        for part in wiring.outgoing:
            dict(net.named_parameters())[part.tensor].view(-1)[torch.from_numpy(part.entries)] = 0

    assert torch.allclose(net(inputs), silenced, rtol=0, atol=1e-14)


# The arithmetic by hand


def read_by_hand() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a net whose hidden units have the means 1, 10 and 4, and its images."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 1.0]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 0.5]]))
    labels = torch.zeros(1, dtype=torch.long)
    pixels = [[2.0, 1.0], [0.0, 3.0]]
    return Flat(net), [(torch.tensor(each).reshape(1, 2, 1, 1), labels) for each in pixels]


def test_contribution_is_mean_outgoing_weight_times_mean_activation() -> None:
    net, batches = read_by_hand()
    wires = connections_of(net, batches[0][0])

    found = wires.contributions(readings_of(net, wires, batches), net.state_dict())

    values = [found[bundle] for bundle in wires.bundles["net.0"]]
    assert values == pytest.approx([2.0 * 1.0, 3.0 * 10.0, 0.25 * 4.0])


def test_the_reader_takes_over_a_removed_units_mean() -> None:
    net, batches = read_by_hand()
    wires = connections_of(net, batches[0][0])
    unit = int(wires.bundles["net.0"][1])

    found = wires.shifts([unit], readings_of(net, wires, batches), net.state_dict())

    assert found.values.keys() == {"net.2.bias"}
    assert found.values["net.2.bias"].tolist() == [-20.0, 40.0]


class Flat(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


def test_figures_of_units_are_those_of_plain_autograd(bench: Bench) -> None:
    outline = outline_module(bench.module, bench.loaded.card, bench.loaded.head)
    layer = next(each for each in outline.layers if each.activation)

    found = unit_figures(bench.module, outline.layers, bench.batches)[layer.name]

    seen: list[Tensor] = []
    place = dict(bench.module.named_modules())[layer.activation.partition(":")[0].partition("#")[0]]
    handle = place.register_forward_hook(lambda m, a, h: seen.append(h) or h.retain_grad())
    was = bench.module.training
    rows, grads = [], []
    batch_statistics(bench.module)
    for inputs, labels in bench.batches:
        seen.clear()
        loss = F.cross_entropy(bench.module(inputs), labels) * len(inputs)
        (grad,) = torch.autograd.grad(loss, seen[0])
        axis = 1 if layer.kind == "conv" else -1
        rows.append(seen[0].detach().movedim(axis, -1).flatten(0, -2).double())
        grads.append(grad.movedim(axis, -1).flatten(0, -2).double())
    handle.remove()
    bench.module.train(was)
    bench.module.load_state_dict(bench.state)
    h, g = torch.cat(rows), torch.cat(grads)
    scale = float(h.abs().mean())
    assert torch.allclose(found.activation, h.mean(0), rtol=1e-4, atol=1e-6 * scale)
    cost = (g * (h - h.mean(0))).mean(0).abs()
    assert np.allclose(
        found.replacement_cost, cost.numpy(), rtol=1e-2, atol=1e-3 * float(cost.max())
    )


def test_lowest_entries_counts_as_the_formula_does() -> None:
    # 0.29 * 100 is 28.999... in floating point, and int() of that is 28: so does the paper's code.
    assert len(lowest_entries(torch.arange(100.0), 29)) == int(29 / 100 * 100) == 28
    assert lowest_entries(torch.tensor([3.0, 1.0, 2.0]), 67).tolist() == [1, 2]
    assert len(lowest_entries(torch.rand(5), 10)) == 0
    assert entries_below_mean(torch.tensor([1.0, 2.0, 6.0]), 0.5).tolist() == [0]
    assert fraction_lowest({7: 2.0, 3: 1.0, 5: 1.0, 9: 4.0}, 50) == [3, 5]


def test_gradients_leave_running_statistics_alone(bench: Bench) -> None:
    before = {name: value.clone() for name, value in bench.module.state_dict().items()}

    summed_gradients(bench.module, bench.batches)

    after = bench.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in bench.module.parameters())


# The random control


@pytest.mark.parametrize("rule", ["weight-magnitude", "swr", "redo", "by-hand"])
def test_the_random_control_selects_as_much_of_each_tensor(bench: Bench, rule: str) -> None:
    plan = bench.resolved(rule)

    control = random_control(plan, seed=5)

    own, other = selection(bench, plan), selection(bench, control)
    assert own.keys() == other.keys()
    counts = {
        name: {write: int(flags.sum()) for write, flags in writes.items()}
        for name, writes in own.items()
    }
    assert counts == {
        name: {write: int(flags.sum()) for write, flags in writes.items()}
        for name, writes in other.items()
    }
    assert plan_json(random_control(plan, seed=5)) == plan_json(control)
    assert control.targets[0].seed == plan.targets[0].seed


# DASH carries what it multiplies with


def test_dash_factors_travel_with_the_plan(bench: Bench) -> None:
    convs = [
        target.layer
        for target in bench.resolved("last-blocks").targets
        if (weight := bench.state.get(f"{target.layer}.weight")) is not None
        and weight.ndim > 1
        and (weight.ndim == 2 or weight[0, 0].numel() > 1)
    ]
    direction = summed_gradients(bench.module, bench.batches, decay=0.3)
    sight = Sight(diagnosis=bench.diagnosis, batch_size=8, image_size=bench.size)
    wish = Wish(scheme="dash", layers=tuple(convs))

    plan = plan_by_rule(bench.spec, "by-hand", sight=sight, wish=wish)

    edited, _ = bench.apply(plan)
    for layer in convs:
        old, new = bench.state[f"{layer}.weight"], edited[f"{layer}.weight"]
        rows = (old.shape[0], -1) if old.ndim == 2 else (old.shape[0] * old.shape[1], -1)
        left, right = direction[f"{layer}.weight"].reshape(rows), old.reshape(rows)
        cosine = F.cosine_similarity(left.double(), right.double(), dim=1).clamp(0.3, 1)
        expected = (right.double() * cosine[:, None]).reshape(old.shape)
        assert torch.allclose(new.double(), expected, rtol=1e-3, atol=1e-6)
    assert plan.evidence.data_fingerprint is not None


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.plan("redo", scheme="fire"), "selects single units.*for whole layers"),
        (lambda b: b.plan("swr", scheme="orthogonal"), "selects single weights"),
        (lambda b: b.plan("nosuch"), 'no rule "nosuch". Known: by-hand, last-blocks'),
        (lambda b: b.plan("redo", scheme="nosuch"), 'no scheme "nosuch"'),
        (
            lambda b: plan_by_rule(b.spec, "redo", {"percent": 5.0}),
            'The rule "redo" takes no "percent"',
        ),
        (
            lambda b: plan_by_rule(b.spec, "cbp", {"percent": 101.0}),
            '"cbp" must be a number from 0 to 100; it is 101.0',
        ),
        (lambda b: plan_by_rule(b.spec, "threshold", {}), 'rule "threshold" needs a "metric"'),
        (lambda b: plan_by_rule(b.spec, "redo", {}), 'rule "redo" looks at figures'),
        (
            lambda b: plan_by_rule(b.spec, "swr", {"utility": "age"}),
            'must be gradient or magnitude or random; it is "age"',
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    call: Callable[[Bench], object], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    network = "timm:test_resnet"
    if network not in _benches:
        _benches[network] = Bench(network, tmp_path_factory.mktemp("bench"))

    with pytest.raises(PlanError, match=message):
        call(_benches[network])


def test_the_size_of_a_plan_is_what_applying_it_touches(bench: Bench) -> None:
    outline = outline_module(bench.module, bench.loaded.card, bench.loaded.head)
    for rule in RULES:
        plan = bench.resolved(rule.name)

        size = planned_size(outline, plan)

        assert size.parameters == bench.apply(plan)[1].parameters_touched
