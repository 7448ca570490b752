"""The published vectors: our code meets them, each rule and scheme has one, and none is stale."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.catalogue.rules import RULES
from core.catalogue.schemes import SCHEMES
from tests.vectors.ours import CLASSES, Bench, known_to_timm
from tests.vectors.papers import Selected
from tests.write_vectors import FOLDER, SEED, differences, resolved, write_all, write_basis

SMALL = 400_000


def stored() -> dict[str, dict[str, Any]]:
    """The vectors as they lie on disk, by name."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")]
    return {vector["name"]: vector for vector in sorted(read, key=lambda vector: vector["name"])}


def selected_in(vector: dict[str, Any], after: dict[str, Tensor]) -> Selected:
    """Flags in each tensor's shape, from the places that the JSON lists."""
    flags: Selected = {}
    for name, writes in vector["selected"].items():
        for write, places in writes.items():
            chosen = torch.full((after[name].numel(),), places == "all")
            if places != "all":
                chosen[places] = True
            flags.setdefault(name, {})[write] = chosen.reshape(after[name].shape)
    return flags


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with known_to_timm():
        yield Bench.of(FOLDER, tmp_path)


@pytest.mark.parametrize("name", stored())
def test_our_code_selects_and_writes_what_the_vector_says(name: str, bench: Bench) -> None:
    vectors = stored()
    after = load_file(FOLDER / vectors[name]["after"])
    selected = selected_in(vectors[name], after)

    found = differences(
        resolved(vectors[name]["request"], vectors),
        selected,
        after,
        vectors[name]["tolerance"],
        bench,
    )

    assert selected.keys() == after.keys()
    assert found == []


@pytest.mark.parametrize("kind", ["rule", "scheme"])
def test_every_rule_and_scheme_has_a_vector(kind: str) -> None:
    known = {"rule": [rule.name for rule in RULES], "scheme": list(SCHEMES)}[kind]

    shown = {vector["of"] for vector in stored().values() if vector["kind"] == kind}

    assert shown == set(known)


def test_the_files_are_what_the_formulas_give_today(tmp_path: Path) -> None:
    # From the network and images on disk, so that a draw on another machine cannot matter.
    basis = ("network", "twin", "reference", "images")
    for name in basis:
        shutil.copy(FOLDER / f"{name}.safetensors", tmp_path)

    write_all(tmp_path, basis=False)

    names = sorted(path.name for path in FOLDER.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            old, new = load_file(FOLDER / name), load_file(tmp_path / name)
            assert old.keys() == new.keys(), name
            for tensor, value in old.items():
                assert value.dtype == new[tensor].dtype
                torch.testing.assert_close(new[tensor], value, rtol=1e-5, atol=1e-6)
        else:
            assert (tmp_path / name).read_text("utf-8") == (FOLDER / name).read_text("utf-8"), name


def test_network_images_and_twins_are_made_as_they_lie_on_disk(tmp_path: Path) -> None:
    write_basis(tmp_path)

    for name in ("network", "twin", "reference", "images"):
        old, new = (load_file(where / f"{name}.safetensors") for where in (FOLDER, tmp_path))
        assert old.keys() == new.keys()
        for tensor, value in old.items():
            torch.testing.assert_close(new[tensor], value, rtol=1e-5, atol=1e-6)


def test_the_twin_of_the_vectors_is_the_one_our_code_builds(bench: Bench) -> None:
    built = bench.fresh(SEED)

    twin = load_file(FOLDER / "twin.safetensors")
    assert built.keys() == twin.keys()
    assert all(torch.equal(built[name], value) for name, value in twin.items())


def test_somebody_with_the_readme_alone_can_rebuild_the_network() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": "rebuilt"}
    stored_images = load_file(FOLDER / "images.safetensors")

    exec(code[1], names)

    network = names["Network"](CLASSES).eval()
    network.load_state_dict(load_file(FOLDER / "network.safetensors"))
    order = stored_images["batches"].flatten()
    with torch.no_grad():
        logits = network(stored_images["images"][order].float() / 255)
    torch.testing.assert_close(logits, stored_images["logits"], rtol=1e-4, atol=1e-5)


def test_the_readme_names_every_vector() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")

    assert set(re.findall(r"^\| `([^`]+)` \|", readme, re.MULTILINE)) == set(stored())


def test_the_vectors_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < SMALL
