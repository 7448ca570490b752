"""Write the conformance vectors: `python -m tests.write_vectors`.

What is expected comes from the papers' formulas in `tests.vectors.papers`. Nothing is written
where our own code selects or writes anything else.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.catalogue.rules import rule_named
from core.catalogue.schemes import SCHEMES, scheme_named
from core.seeding import derived_seed
from tests.vectors import network as network_module
from tests.vectors.ours import BATCH_SIZE, SIZE, Bench, known_to_timm
from tests.vectors.papers import LAYERS, Case, Selected, fresh_state

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "conformance"
SEED = 5
CONTROL_SEED = 7
RELATIVE, ABSOLUTE = 1e-5, 1e-6
# What was selected and what was not must lie further apart than float32 rounds.
LEAST_MARGIN = 1e-4

COPIED = "Copied or constant: every bit."
ROUNDED = (
    "Sums and products are taken in float32 or in float64, in any order; what is selected is "
    f"further from the limit than {LEAST_MARGIN:g} of it."
)
NOTHING_DRAWN = "Nothing is drawn."


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One vector: what is asked of an implementation, and the formula's own answer.

    Attributes:
        select: The case and the twins by role to what the formula selects.
        formula: The rule or scheme in a line.
        drawn: Which numbers are drawn, and what holds of them whatever the generator.
    """

    name: str
    kind: str
    of: str
    formula: str
    select: Callable[[Case, Mapping[str, dict[str, Tensor]]], Selected]
    drawn: str = NOTHING_DRAWN
    rule: str = "by-hand"
    options: Mapping[str, float | str] = field(default_factory=dict)
    scheme: str = "architecture"
    numbers: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    control_of: str | None = None

    @property
    def request(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "options": dict(self.options),
            "scheme": self.scheme,
            "numbers": {**SCHEMES[self.scheme].parameters, **self.numbers},
            "seed": SEED,
            "layers": None if self.layers is None else list(self.layers),
            "units": {layer: list(units) for layer, units in self.units.items()},
            "control_of": self.control_of,
            "control_seed": None if self.control_of is None else CONTROL_SEED,
        }


def _rule(name: str, formula: str, select: Any, of: str | None = None, **more: Any) -> Asked:
    of = of or name
    scheme = more.pop("scheme", rule_named(of).scheme)
    asked = {"rule": of, "scheme": scheme, **more}
    return Asked(name=f"rule-{name}", kind="rule", of=of, formula=formula, select=select, **asked)


DEAD = {"blocks.0.conv": (1, 4), "fc": (3,)}

RULES = (
    _rule(
        "by-hand",
        "The units 1 and 4 of the first block and 3 of fc, with all that belongs to them.",
        lambda case, _: case.units([{1, 4}, set(), {3}]),
        units=DEAD,
    ),
    _rule(
        "last-blocks",
        "blocks.2 and what follows it, without the head; running statistics become the twin's.",
        lambda case, _: case.layers(LAYERS[4:], statistics=True, biases_alone=False),
        options={"blocks": 1.0},
    ),
    _rule(
        "threshold",
        "Layers whose largest parameter has an L2 norm above 2.",
        lambda case, _: case.layers(case.beyond(2.0), statistics=True, biases_alone=False),
        options={"metric": "weight_l2", "threshold": 2.0},
    ),
    _rule(
        "threshold-units",
        "Units all of whose rows have an L2 norm below 0.9 times the same row's in reference."
        "safetensors.",
        lambda case, twins: case.units(case.shrunken(0.9, twins["reference"])),
        of="threshold",
        options={"metric": "unit_weight_l2", "threshold": 0.9, "side": "below", "of": "ratio"},
    ),
    _rule(
        "weight-magnitude",
        "int(0.3 n) entries of least |w| of each matrix and kernel, head included, get the mean "
        "of their tensor; as many of each bias become 0.",
        lambda case, _: case.seed_paper(30.0, by_gradient=False),
        options={"percent": 30.0},
    ),
    _rule(
        "weight-gradient",
        "As rule-weight-magnitude by |w g|, g summed over the two batches. blocks.1.conv.bias is "
        "left out: the norm behind it takes its gradient away but for rounding.",
        lambda case, _: case.seed_paper(30.0, by_gradient=True),
        options={"percent": 30.0},
    ),
    _rule(
        "swr",
        "int(0.3 n) entries of least |w g| of each parameter before the head, g summed over the "
        "two batches; without blocks.1.conv.bias, as in rule-weight-gradient.",
        lambda case, _: case.swr(30.0, None, "gradient", SEED),
        options={"percent": 30.0},
    ),
    _rule(
        "swr-threshold",
        "Entries with |w| <= 0.4 times the mean |w| of their parameter.",
        lambda case, _: case.swr(0.0, 0.4, "magnitude", SEED),
        of="swr",
        options={"threshold": 0.4, "utility": "magnitude"},
    ),
    _rule(
        "swr-random",
        "int(0.3 n) entries of least utility of each parameter, utilities uniform in [0, 1).",
        lambda case, _: case.swr(30.0, None, "random", SEED),
        of="swr",
        options={"percent": 30.0, "utility": "random"},
        drawn="rand of the parameter's shape from stream(seed, 'swr', name). Otherwise: int(0.3 n) "
        "entries of each parameter.",
    ),
    _rule(
        "redo",
        "Units with mean |h| <= 0.3 times the mean over their layer, h taken behind the "
        "activation over images and places; of a sum the livelier part counts.",
        lambda case, _: case.units(
            case.dormant(case.figures(lambda h, _: h.abs().mean(0) / h.abs().mean()), 0.3)
        ),
        options={"threshold": 0.3},
    ),
    _rule(
        "grama",
        "As rule-redo by mean |g|, g being the gradient of the loss at h.",
        lambda case, _: case.units(
            case.dormant(case.figures(lambda _, g: g.abs().mean(0) / g.abs().mean()), 0.3)
        ),
        options={"threshold": 0.3},
    ),
    _rule(
        "cbp",
        "int(0.25 n) units of each pool with the least mean |outgoing weight| * mean |input| (over "
        "readers: the sum). Readers gain what the mean of their output loses: in their bias, or "
        "off the running mean of the norm behind them; units that are reset gain nothing.",
        lambda case, _: case.units(case.least(case.contributions(), 25.0), mean_stays=True),
        options={"percent": 25.0},
        drawn="As in scheme-kaiming-normal.",
    ),
    _rule(
        "gxd",
        "int(0.25 n) units of each pool with the least |mean of g (h - mean h)|, g being the "
        "gradient of an image's own loss at h; of a sum the larger counts.",
        lambda case, _: case.units(
            case.least(case.figures(lambda h, g: (g * (h - h.mean(0))).mean(0).abs()), 25.0)
        ),
        options={"percent": 25.0},
    ),
    _rule(
        "random",
        "int(0.3 n) entries of each matrix and kernel before the head, each as likely.",
        lambda case, _: case.random(30.0, SEED),
        options={"percent": 30.0},
        drawn="The first int(0.3 n) of randperm(n) from stream(seed, 'random', name). Otherwise: "
        "as many, each as likely.",
    ),
    _rule(
        "random-weights",
        "As many entries of each tensor as rule-weight-magnitude selects.",
        lambda case, _: case.random_weights(case.seed_paper(30.0, by_gradient=False), CONTROL_SEED),
        of="random",
        scheme="mean",
        control_of="rule-weight-magnitude",
        drawn="The first k of randperm(n) from stream(control_seed, 'random', name, write). "
        "Otherwise: as many, each as likely.",
    ),
    _rule(
        "random-units",
        "As many units of each pool as rule-by-hand selects, with all that belongs to them.",
        lambda case, _: case.units(case.random_units([{1, 4}, set(), {3}], CONTROL_SEED)),
        of="random",
        control_of="rule-by-hand",
        drawn="The first k of randperm(n) from stream(control_seed, 'random units', *layers of the "
        "pool). Otherwise: as many of each pool, each as likely.",
    ),
)

BY_HAND = ("blocks.0.conv", "blocks.0.norm", "blocks.1.conv", "fc")
SHRUNK = ("blocks.0.conv", "blocks.2.conv", "fc")
MATRICES = " in matrices and kernels; biases 0, gains as they are"
MEANS = f"{MATRICES}; m is the mean of the whole tensor"
TWINS = " in matrices and kernels; vectors from the twin"
# Scheme to formula, and what is drawn.
FORMULAS: dict[str, tuple[str, str]] = {
    "architecture": ("w = twin", NOTHING_DRAWN),
    "mean-var": (
        "w = m + s z, m and s the tensor's mean and standard deviation (divided by n)",
        "z is randn. Otherwise: mean m within 5 s / sqrt(n), deviation s within 5 s / sqrt(2 n).",
    ),
    "permute": (
        "w = the old values of the tensor in random order",
        "randperm(n). Otherwise: the same values, each as often.",
    ),
    "shrink-perturb": ("w = 0.4 w + 0.1 twin", NOTHING_DRAWN),
    "kaiming-normal": (
        "w = sqrt(2 / fan-in) z, fan-in = inputs x kernel places," + TWINS,
        "z is randn. Otherwise: mean 0 and that deviation within 5 / sqrt(n) of it.",
    ),
    "xavier-uniform": (
        "w uniform in +-sqrt(6 / (fan-in + fan-out))," + TWINS,
        "uniform_ within the bounds. Otherwise: bounds, mean 0 and deviation bound / sqrt(3).",
    ),
    "trunc-normal": (
        "w = N(0, 0.02^2) within +-0.04," + TWINS,
        "nn.init.trunc_normal_ (a=-0.04, b=0.04). Otherwise: |w| <= 0.04, mean 0 and deviation "
        "0.0176.",
    ),
    "orthogonal": (
        "w as (outputs, inputs x places) with orthonormal rows or columns: Q of the QR of z "
        "(taller than wide) in float64, columns times the signs of R's diagonal;" + TWINS,
        "z is randn of (outputs, inputs x places). Otherwise: the smaller Gram matrix is I.",
    ),
    "zero": ("w = 0", NOTHING_DRAWN),
    "mean": ("w = m" + MEANS, NOTHING_DRAWN),
    "mean-noise": (
        "w = m + e m / 10, one e a tensor," + MEANS,
        "e is one randn in float64. Otherwise: one value a tensor, within 0.6 |m| of m.",
    ),
    "normal": ("w = z" + MATRICES, "z is randn. Otherwise: mean 0 and deviation 1."),
    "normal-small": (
        "w = 0.2 z" + MATRICES,
        "z is randn. Otherwise: mean 0 and deviation 0.2.",
    ),
    "one-normal": (
        "w = e, one e a tensor," + MATRICES,
        "e is one randn in float64. Otherwise: one value a tensor.",
    ),
    "normal-tenth": (
        "w = 0.1 z" + MATRICES,
        "z is randn. Otherwise: mean 0 and deviation 0.1.",
    ),
    "bias-mean": ("Biases become the mean of their tensor, nothing else changes", NOTHING_DRAWN),
    "dash": (
        "w = w max(cos(a, w), 0.3) by kernel (out, in), row of a matrix, or whole vector; "
        "a <- 0.7 a - 0.3 g over the two batches, from a = 0",
        NOTHING_DRAWN,
    ),
    "fire": (
        "X = w / |w|, ten times X = 1.5 X - 0.5 X X'X, for each place of a kernel on its own, then "
        "times sqrt(outputs / inputs) / places; vectors stay",
        NOTHING_DRAWN,
    ),
}


def _whole(name: str) -> Callable[[Case, Mapping[str, dict[str, Tensor]]], Selected]:
    info = scheme_named(name)

    def select(case: Case, _: Mapping[str, dict[str, Tensor]]) -> Selected:
        layers = SHRUNK if name == "dash" else BY_HAND
        found = case.layers(
            layers, statistics=info.resets_buffers, biases_alone=name == "bias-mean"
        )
        return case.dash(found, 0.3, 0.3) if name == "dash" else found

    return select


WHOLE_LAYERS = tuple(
    Asked(
        name=f"scheme-{name}",
        kind="scheme",
        of=name,
        scheme=name,
        layers=SHRUNK if name == "dash" else BY_HAND,
        formula=formula,
        drawn=drawn
        if drawn == NOTHING_DRAWN
        else f"From stream(seed, '{name}', tensor name): {drawn}",
        select=_whole(name),
    )
    for name, (formula, drawn) in FORMULAS.items()
)
SINGLE_WEIGHTS = tuple(
    Asked(
        name=f"scheme-{name}-weights",
        kind="scheme",
        of=name,
        scheme=name,
        rule="weight-magnitude",
        options={"percent": 30.0},
        formula=formula,
        drawn=drawn,
        select=lambda case, _: case.seed_paper(30.0, by_gradient=False),
    )
    for name, formula, drawn in (
        (
            "permute",
            "The selected values of a tensor in random order among themselves",
            "From stream(seed, 'permute', tensor name): randperm(k) over the k selected places in "
            "row-major order. Otherwise: the same values, each as often.",
        ),
        (
            "mean-var",
            "As scheme-mean-var, of the whole tensor, of which the selected places are taken",
            "From stream(seed, 'mean-var', tensor name): z is randn of the whole tensor.",
        ),
    )
)
VECTORS = (*RULES, *WHOLE_LAYERS, *SINGLE_WEIGHTS)
EXACT = ("architecture", "permute", "zero")


class VectorError(Exception):
    """Ours and the formula differ, or a vector could be met by chance."""


# The network and its images.


def made_network() -> dict[str, Tensor]:
    """Return the network's state: lively, with running statistics, and some units nearly dead."""
    state = fresh_state(1)
    noise = torch.Generator().manual_seed(2)
    for name, value in state.items():
        place = name.rpartition(".")[2]
        if ".norm." in name and value.is_floating_point():
            spread = torch.randn(value.shape, generator=noise)
            state[name] = {
                "weight": 1 + 0.2 * spread,
                "bias": 0.3 * spread,
                "running_mean": 0.1 * spread,
                "running_var": 0.5 + spread.abs(),
            }[place]
        elif place == "num_batches_tracked":
            state[name] = torch.tensor(100)
        elif not name.startswith("head"):
            state[name] = value * (1 + 0.5 * torch.rand(value.shape, generator=noise))
    for name, unit, value in (
        *(("blocks.0.norm.bias", 2, -2.0), ("blocks.1.norm.bias", 2, -1.8)),
        # Channels of which one part of the sum is lively and the other not.
        *(("blocks.0.norm.bias", 5, -2.0), ("blocks.1.norm.bias", 0, -1.8)),
        *(("blocks.2.norm.bias", 5, -1.5), ("fc.bias", 7, -0.8)),
    ):
        state[name][unit] = value
    for name, unit in (("blocks.0.conv", 3), ("blocks.1.conv", 3), ("fc", 6)):
        state[f"{name}.weight"][unit] *= 0.5
    # A new head is drawn from seed 0, as the whole network would be.
    fresh = fresh_state(0)
    return {name: fresh[name] if name.startswith("head") else state[name] for name in state}


def made_images() -> tuple[Tensor, Tensor]:
    """Return images (12, 3, 16, 16) uint8 and labels (12,): noise, and a square for the class."""
    noise = torch.Generator().manual_seed(3)
    labels = torch.arange(2 * BATCH_SIZE) % 3
    images = torch.randint(0, 160, (len(labels), 3, SIZE, SIZE), generator=noise)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label, 4 * label : 4 * label + 6, 3:9] += 90
    return images.to(torch.uint8), labels


def write_basis(folder: Path) -> None:
    """Write the network, its twins, and the images in their batches."""
    save_file(made_network(), folder / "network.safetensors")
    save_file(fresh_state(SEED), folder / "twin.safetensors")
    reference = fresh_state(derived_seed(0, "twin"))
    save_file(
        {name: value for name, value in reference.items() if not name.startswith("head")},
        folder / "reference.safetensors",
    )
    images, labels = made_images()
    basis = {"images": images, "labels": labels}
    save_file(basis, folder / "images.safetensors")
    with known_to_timm(), tempfile.TemporaryDirectory() as scratch:
        bench = Bench.of(folder, Path(scratch))
        basis["batches"] = torch.tensor(bench.batches())
    case = case_of(folder, basis)
    basis["logits"] = torch.cat(
        [case.network().eval()(inputs.double()).detach() for inputs, _ in case.batches]
    ).float()
    save_file(basis, folder / "images.safetensors")


def case_of(folder: Path, basis: Mapping[str, Tensor] | None = None) -> Case:
    """Return the network and its batches as the files hold them."""
    stored = load_file(folder / "images.safetensors") if basis is None else basis
    batches = [
        (stored["images"][places].float() / 255, stored["labels"][places])
        for places in stored["batches"]
    ]
    return Case(load_file(folder / "network.safetensors"), batches)


# Vectors.


def expected(asked: Asked, folder: Path) -> tuple[Selected, dict[str, Tensor]]:
    """Return what the formulas select and write, from the files of a folder.

    Raises:
        VectorError: The selection hangs on rounding, or is of nothing or everything.
    """
    case = case_of(folder)
    twins = {name: load_file(folder / f"{name}.safetensors") for name in ("twin", "reference")}
    selected = {
        name: kept
        for name, writes in asked.select(case, twins).items()
        if (kept := {write: flags for write, flags in writes.items() if flags.any()})
    }
    if case.margin < LEAST_MARGIN:
        raise VectorError(f"{asked.name}: what is selected hangs on {case.margin:.1e} of a value.")
    if not selected:
        raise VectorError(f"{asked.name} selects nothing.")
    after = case.written(
        selected,
        scheme=asked.scheme,
        numbers=asked.request["numbers"],
        seed=SEED,
        twin=twins["twin"],
    )
    return selected, after


def differences(
    request: Mapping[str, Any],
    selected: Selected,
    after: Mapping[str, Tensor],
    tolerance: Mapping[str, Any],
    bench: Bench,
) -> list[str]:
    """Return how our code differs from what is expected, in words; nothing where it does not."""
    found, state = bench.result(request)
    problems = []
    for name in sorted(found.keys() | selected.keys()):
        ours, theirs = found.get(name, {}), selected.get(name, {})
        if ours.keys() != theirs.keys():
            problems.append(f"{name}: writes {sorted(ours)}, expected {sorted(theirs)}")
        elif any(not torch.equal(ours[write], theirs[write]) for write in ours):
            problems.append(f"{name}: selects other entries")
    for name, value in state.items():
        if name not in after:
            if not torch.equal(value, bench.state[name]):
                problems.append(f"{name}: changed, and is not selected")
        elif not torch.allclose(
            value.double(),
            after[name].double(),
            rtol=tolerance["relative"],
            atol=tolerance["absolute"],
        ):
            off = float((value.double() - after[name].double()).abs().max())
            problems.append(f"{name}: differs by up to {off:.1e}")
    return problems


def in_json(asked: Asked, selected: Selected) -> dict[str, Any]:
    """Return a vector as its JSON file holds it."""
    exact = asked.scheme in EXACT and not any("add" in writes for writes in selected.values())
    info = rule_named(asked.of) if asked.kind == "rule" else scheme_named(asked.of)
    return {
        "name": asked.name,
        "kind": asked.kind,
        "of": asked.of,
        "source": info.source,
        "description": info.description,
        "formula": asked.formula,
        "drawn": asked.drawn,
        "request": asked.request,
        "selected": {
            name: {
                write: "all" if bool(flags.all()) else flags.flatten().nonzero().flatten().tolist()
                for write, flags in writes.items()
            }
            for name, writes in selected.items()
        },
        "after": f"{asked.name}.safetensors",
        "tolerance": {
            "relative": 0.0 if exact else RELATIVE,
            "absolute": 0.0 if exact else ABSOLUTE,
            "why": COPIED if exact else ROUNDED,
        },
    }


def json_text(vector: Mapping[str, Any]) -> str:
    """Return a vector's text, with each list of places on one line."""
    lists: list[str] = []

    def shortened(value: Any) -> Any:
        if isinstance(value, list):
            lists.append(json.dumps(value))
            return f"<{len(lists) - 1}>"
        if isinstance(value, dict):
            return {key: shortened(each) for key, each in value.items()}
        return value

    text = json.dumps(shortened(vector), indent=1, ensure_ascii=False) + "\n"
    for place, told in enumerate(lists):
        text = text.replace(f'"<{place}>"', told)
    return text


def readme_text() -> str:
    """Return the README of the vectors."""
    code = inspect.getsource(network_module).partition('"""\n\n')[2]
    bar = "\\|"
    rows = "".join(
        f"| `{asked.name}` | {asked.kind} `{asked.of}` | {asked.formula.replace('|', bar)} |\n"
        for asked in VECTORS
    )
    return README.replace("CODE", code.rstrip()).replace("ROWS", rows.rstrip())


README = """# Conformance vectors

What each rule selects and each scheme writes, on one tiny network, so that another implementation
can be held to the same. `python -m tests.write_vectors` makes this folder; what is expected comes
from the papers' formulas in `tests/vectors/papers.py`, and the command writes nothing where
Limber's own code selects or writes anything else. `tests/test_conformance.py` reads the files.

## Files

- `network.safetensors`: the weights that are edited, by `state_dict` name.
- `images.safetensors`: `images` (12, 3, 16, 16) uint8, of which the network sees pixels / 255;
  `labels` (12,); `batches` (2, 6), the images of each batch by their place; `logits` (12, 3) of the
  unedited network in eval mode, in the order of the batches.
- `twin.safetensors`: the fresh twin, a network of the same constructor drawn from the vectors' seed
  (`torch.manual_seed(5)`). `reference.safetensors`: the twin that figures are compared with.
- `NAME.json`: one vector. `request` is what is asked, `selected` which entries of each tensor are
  written and with what: row-major places, or `"all"`.
- `NAME.safetensors`: each of these tensors as a whole, afterwards. Every other tensor keeps its
  bits.

## The network

```python
CODE
```

## Conventions

- Every pass runs norms on the batch's own statistics and leaves their running ones alone. The loss
  is the mean cross-entropy of a batch.
- A percentage p of n entries is int(p / 100 * n).
- The writes of a tensor come in this order: `scheme` and `scale` (times what `formula` says), then
  `fresh` (the twin's values) and `one`, then `zero`. They look at the values from before. `add`
  comes last and is added to what is there by then.
- A unit is a channel. Channel i of `blocks.0` and channel i of `blocks.1` are added and so are one
  unit. There are three pools: 6 units of these two blocks, 8 of `blocks.2`, 10 of `fc`.
- Resetting a unit writes the scheme into the rows that make it and 0 into the columns that read it.
  Its biases, and the shifts and running means of its norms, become 0; the gains and running
  variances of its norms become 1.
- Resetting a convolution takes the running statistics of the norm behind it along, unless the
  scheme keeps part of the weights.

## Numbers drawn

`stream(seed, *labels)` is PyTorch's CPU generator (`torch.Generator`). Its seed is the first 8
bytes of a SHA-256, big-endian, shifted right by one bit. What is hashed is the seed and the labels,
joined by the byte 0x1f: `stream(5, "normal", "fc.weight")` starts from
`int.from_bytes(sha256(b"5\\x1fnormal\\x1ffc.weight").digest()[:8], "big") >> 1`.

`randn` and `rand` draw float32 unless told otherwise. An implementation with another generator
holds itself to what follows "Otherwise" in `drawn`.

## Vectors

| file | of | what |
|---|---|---|
ROWS
"""


def write_all(folder: Path, *, basis: bool = True) -> None:
    """Write every file.

    Args:
        folder: An empty one, or one that holds vectors.
        basis: Whether network and images are made anew; else the folder's are kept.

    Raises:
        VectorError: Our code differs from a formula, or a vector shows nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if basis:
        write_basis(folder)
    answers = {asked.name: expected(asked, folder) for asked in VECTORS}
    vectors = {asked.name: in_json(asked, answers[asked.name][0]) for asked in VECTORS}
    problems = []
    with known_to_timm(), tempfile.TemporaryDirectory() as scratch:
        bench = Bench.of(folder, Path(scratch))
        for name, (selected, after) in answers.items():
            tolerance = vectors[name]["tolerance"]
            asked = resolved(vectors[name]["request"], vectors)
            problems += [
                f"{name}: {each}" for each in differences(asked, selected, after, tolerance, bench)
            ]
    if problems:
        raise VectorError("Ours and the formulas differ:\n" + "\n".join(problems))
    for name, (_, after) in answers.items():
        save_file(after, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json_text(vectors[name]), encoding="utf-8")
    (folder / "README.md").write_text(readme_text(), encoding="utf-8")


def resolved(request: Mapping[str, Any], vectors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with the vector it is a control of in place of that one's name."""
    matched = request["control_of"]
    return {**request, "control_of": None if matched is None else vectors[matched]["request"]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as fresh:
        write_all(Path(fresh))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(fresh, FOLDER)
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{len(VECTORS)} vectors, {size} bytes")
