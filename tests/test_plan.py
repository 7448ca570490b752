"""A plan means one thing: it is written, read, checked and refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.errors import PlanError
from core.files.companions import plan_json
from core.files.plans import plan_schema, read_plan
from core.plan.algebra import compose_plans
from core.plan.layers import random_layers
from core.plan.making import check_plan, make_plan, match_layers, plan_size
from core.records import Evidence, ModelOutline, Pattern, ReinitPlan
from tests.write_schema import SCHEMA_FILE, schema_text
from tests.zoo import ZOO

Json = dict[str, Any]


@pytest.fixture(scope="module")
def cnn() -> ModelOutline:
    return ZOO["residual_cnn"].outline()


@pytest.fixture(scope="module")
def vit() -> ModelOutline:
    return ZOO["vit"].outline()


@pytest.fixture(scope="module")
def tied() -> ModelOutline:
    return ZOO["tied"].outline()


def full_plan(outline: ModelOutline) -> ReinitPlan:
    """A plan that uses every part of the format."""
    return make_plan(
        outline,
        ("stem", "block.conv2"),
        scheme="shrink-perturb",
        scheme_parameters={"shrink": 0.25, "perturb": 0.75},
        seed=7,
        name="überprüft",
        patterns=(Pattern(text="stem", syntax="name"), Pattern(text="block.c*2", syntax="glob")),
        freeze=("norm",),
        evidence=Evidence(diagnosis_sha256="a" * 64, data_fingerprint="b" * 64, note="seen"),
    )


PLAN_TEXT = plan_json(full_plan(ZOO["residual_cnn"].outline()))


def valid() -> Json:
    """The full plan as JSON content, to be broken."""
    content: Json = json.loads(PLAN_TEXT)
    return content


# Writing and reading


def test_a_plan_that_is_written_read_and_written_again_keeps_its_bytes(cnn: ModelOutline) -> None:
    plan = full_plan(cnn)

    again = read_plan(plan_json(plan))

    assert again == plan
    assert plan_json(again).encode() == plan_json(plan).encode()


def test_a_plan_is_read_from_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(PLAN_TEXT, encoding="utf-8-sig")

    assert plan_json(read_plan(file)) == PLAN_TEXT


def test_the_order_in_which_layers_are_picked_does_not_matter(cnn: ModelOutline) -> None:
    picked = ("block.conv2", "stem", "stem", "block.norm1")

    plan = make_plan(cnn, picked)

    assert [target.layer for target in plan.targets] == ["stem", "block.norm1", "block.conv2"]
    assert plan_json(plan) == plan_json(make_plan(cnn, tuple(reversed(picked))))


def test_a_target_names_its_parameters_and_the_statistics_that_describe_it(
    cnn: ModelOutline,
) -> None:
    target = make_plan(cnn, ["stem"]).targets[0]

    assert target.parameters == ("stem.weight",)
    assert target.buffers == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def test_statistics_stay_out_when_the_scheme_keeps_them(cnn: ModelOutline) -> None:
    plan = make_plan(cnn, ["stem", "norm"], resets_buffers=False)

    assert [target.buffers for target in plan.targets] == [(), ()]


def test_the_plan_records_the_network_it_was_made_for(cnn: ModelOutline) -> None:
    model = make_plan(cnn, ["stem"]).model

    assert (model.source, model.name, model.weights) == ("timm", "tiny", "none")
    assert (model.classes, model.head) == (cnn.classes, "new")
    assert model.backbone_sha256 == cnn.backbone_sha256


# Refusals of a file


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("", "schema_version, name, model, patterns, targets, freeze, learning_rates, rule"),
        ("model", "source, name, weights, checkpoint, classes"),
        ("patterns.0", "text, syntax"),
        ("targets.1", "layer, granularity, parameters, buffers, units, entries, scheme, seed"),
        ("targets.0.scheme", "name, parameters"),
        ("evidence", "diagnosis_sha256, data_fingerprint, note"),
    ],
)
def test_an_unknown_key_is_refused_by_name_at_every_level(place: str, allowed: str) -> None:
    content = valid()
    owner = at(content, place)
    owner["colour"] = 1
    where = f"{place}.colour".lstrip(".")

    with pytest.raises(PlanError) as caught:
        read_plan(json.dumps(content))

    assert f'has the unknown key "{where}"' in str(caught.value)
    assert f"Allowed there: {allowed}" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        *("model", "targets", "model.source", "model.name", "model.classes"),
        *("model.backbone_sha256", "patterns.0.text", "patterns.1.syntax"),
        *("targets.0.layer", "targets.0.parameters", "targets.1.scheme", "targets.1.scheme.name"),
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    content = valid()
    place, _, last = key.rpartition(".")
    del at(content, place)[last]

    with pytest.raises(PlanError, match=rf'^The plan lacks the key "{key}"\.$'):
        read_plan(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("schema_version", 2, "Input should be 1"),
        ("name", 5, "valid string"),
        ("name", "", "at least 1 character"),
        ("model.source", "hub", "'embedded', 'timm' or 'torchvision'"),
        ("model.classes", -1, "greater than or equal to 0"),
        ("model.classes", 2.5, "valid integer"),
        ("model.backbone_sha256", "123", "match pattern"),
        ("patterns.0.syntax", "sql", "'name', 'glob', 'regex' or 'type'"),
        ("targets", {}, "valid"),
        ("targets.0.granularity", "channel", "'layer'"),
        ("targets.0.parameters", "stem.weight", "valid"),
        ("targets.0.seed", -1, "greater than or equal to 0"),
        ("targets.0.seed", 2**63, "less than"),
        ("targets.0.scheme.parameters", {"shrink": "much"}, "valid number"),
        ("evidence.note", None, "valid string"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(key: str, value: Any, says: str) -> None:
    content = valid()
    place, _, last = key.rpartition(".")
    at(content, place)[last] = value

    with pytest.raises(PlanError) as caught:
        read_plan(json.dumps(content))

    assert f'"{key}' in str(caught.value)
    assert says in str(caught.value)


def test_further_problems_are_counted() -> None:
    content = valid()
    content["colour"] = content["shape"] = 1

    with pytest.raises(PlanError, match=r"\(1 more such\.\)$"):
        read_plan(json.dumps(content))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"is not JSON \(line 1, column 1"),
        ("{", "is not JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "should be an object"),
        ("null", "should be an object"),
        ('{"name": ' + "9" * 5_000 + "}", "The plan"),
    ],
    ids=["empty", "half", "binary", "deep", "list", "null", "huge-number"],
)
def test_what_is_no_plan_at_all_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        read_plan(text)


def test_a_key_that_stands_twice_is_refused() -> None:
    text = PLAN_TEXT.replace('"seed": 7', '"seed": 7, "seed": 8', 1)

    with pytest.raises(PlanError, match='has the key "seed" twice in one place'):
        read_plan(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gone\.json.*cannot be read.*Check the path"):
        read_plan(tmp_path / "gone.json")


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path)


def test_a_file_too_large_for_a_plan_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with file.open("wb") as handle:
        handle.truncate(65 * 2**20)

    with pytest.raises(PlanError, match=r"larger than 64 MiB"):
        read_plan(file)


def at(content: Any, place: str) -> Any:
    """The value at a dotted place; "" is the whole."""
    for part in place.split(".") if place else ():
        content = content[int(part) if part.isdigit() else part]
    return content


def places(content: Any, here: str = "") -> list[str]:
    """The dotted place of every value below `content`."""
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = list(enumerate(content))
    else:
        return []
    found = []
    for key, value in pairs:
        place = f"{here}.{key}".lstrip(".")
        found += [place, *places(value, place)]
    return found


PLACES = places(valid())
ODD_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "a" * 600, "0" * 64, "1", "\ud800", "NaN", "stem", 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)


def replaced(content: Json, place: str, value: Any) -> Json:
    """A copy with another value at that place."""
    content = copy.deepcopy(content)
    owner, _, last = place.rpartition(".")
    inside = at(content, owner)
    inside[int(last) if isinstance(inside, list) else last] = value
    return content


def removed(content: Json, place: str, _: Any) -> Json:
    """A copy without that place."""
    content = copy.deepcopy(content)
    owner, _, last = place.rpartition(".")
    inside = at(content, owner)
    del inside[int(last) if isinstance(inside, list) else last]
    return content


def added(content: Json, place: str, value: Any) -> Json:
    """A copy with something more beside that place."""
    content = copy.deepcopy(content)
    inside = at(content, place.rpartition(".")[0])
    if isinstance(inside, list):
        inside.append(value)
    else:
        inside[str(value)[:40]] = value
    return content


Breaking = Callable[[Json, str, Any], Json]
SCHEMA = jsonschema.Draft202012Validator(plan_schema())


def no_number(text: str) -> float:
    """Refuse what Python writes for a number that JSON does not have."""
    raise AssertionError(f"{text} is not JSON")


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from([replaced, removed, added]), st.sampled_from(PLACES), ODD_VALUES),
        min_size=1,
        max_size=3,
    )
)
@example([(replaced, "targets.0.scheme.parameters", {"shrink": float("nan")})])
@example([(replaced, "targets.0.scheme.parameters", {"shrink": 10**400})])
@example([(replaced, "model.kwargs", {"drop_rate": float("inf")})])
@example([(replaced, "targets.0.seed", "5")])
@example([(replaced, "model.kwargs", {"depth": True})])
@example([(replaced, "schema_version", True)])
def test_a_broken_plan_is_refused_or_is_one_that_the_schema_allows_too(
    breaks: list[tuple[Breaking, str, Any]],
) -> None:
    content = valid()
    for breaking, place, value in breaks:
        try:
            content = breaking(content, place, value)
        except (KeyError, IndexError, TypeError, ValueError):
            continue  # an earlier break took the place away

    try:
        plan = read_plan(json.dumps(content))
    except PlanError:
        return

    SCHEMA.validate(content)
    written = plan_json(plan)
    assert plan_json(read_plan(written)) == written
    SCHEMA.validate(json.loads(written, parse_constant=no_number))


@settings(max_examples=200)
@given(
    st.integers(0, len(PLAN_TEXT) - 1),
    st.integers(0, 12),
    st.text(alphabet='{}[]",:0123456789eE+-.\\unatrf \x00é', max_size=6),
)
def test_text_with_a_hole_in_it_is_refused_or_is_a_plan(start: int, length: int, put: str) -> None:
    text = PLAN_TEXT[:start] + put + PLAN_TEXT[start + length :]

    try:
        plan = read_plan(text)
    except PlanError:
        return

    assert read_plan(plan_json(plan)) == plan


# Picking


@pytest.mark.parametrize(
    ("text", "syntax", "found"),
    [
        ("block.conv*", "glob", ("block.conv1", "block.conv2")),
        ("block", "glob", ("block.conv1", "block.norm1", "block.conv2", "block.norm2")),
        ("*conv1", "glob", ("block.conv1",)),
        ("block.conv[2]", "glob", ("block.conv2",)),
        ("conv[12]$", "regex", ("block.conv1", "block.conv2")),
        ("^norm", "regex", ("norm",)),
        ("batchnorm*", "type", ("norm", "block.norm1", "block.norm2")),
        ("Linear", "type", ("head",)),
        ("stem", "name", ("stem",)),
    ],
)
def test_a_pattern_finds_layers_in_running_order(
    cnn: ModelOutline, text: str, syntax: Any, found: tuple[str, ...]
) -> None:
    assert match_layers(cnn, text, syntax=syntax) == found


@pytest.mark.parametrize(
    ("text", "syntax", "says"),
    [
        ("", "glob", "pattern is empty"),
        ("  ", "regex", "pattern is empty"),
        ("layer9.*", "glob", r'No layer of tiny matches the glob "layer9\.\*"\. It has stem, norm'),
        ("Block", "glob", "No layer of tiny matches"),
        ("conv", "name", "No layer of tiny matches the name"),
        ("nothing", "regex", "No layer of tiny matches the regex"),
        ("(", "regex", r'"\(" is not a regular expression'),
        ("LayerNorm", "type", "No layer type of tiny.*It has BatchNorm2d, Conv2d, Linear"),
    ],
)
def test_a_pattern_that_finds_nothing_says_what_there_is(
    cnn: ModelOutline, text: str, syntax: Any, says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        match_layers(cnn, text, syntax=syntax)


@pytest.mark.parametrize("keyword", ["layers", "freeze"])
def test_a_layer_the_network_does_not_have_is_named(cnn: ModelOutline, keyword: str) -> None:
    asked = {"layers": ["stem"], "freeze": [], keyword: ["stem9"]}

    with pytest.raises(PlanError, match=r'tiny has no layer "stem9"'):
        make_plan(cnn, asked["layers"], freeze=asked["freeze"])


def test_nothing_picked_is_no_plan(cnn: ModelOutline) -> None:
    with pytest.raises(PlanError, match="nothing to reset: pick at least one layer"):
        make_plan(cnn, [])


def test_a_new_head_is_left_out(cnn: ModelOutline) -> None:
    plan = make_plan(cnn, ["stem", "head"])

    assert [target.layer for target in plan.targets] == ["stem"]


def test_a_new_head_alone_is_no_plan(cnn: ModelOutline) -> None:
    with pytest.raises(PlanError, match=r'Only the head \("head"\) was picked, and it is new'):
        make_plan(cnn, ["head"])


def test_the_weights_own_head_can_be_reset(cnn: ModelOutline) -> None:
    own = cnn.model_copy(update={"own_head": True})

    plan = make_plan(own, ["head"])

    assert plan.targets[0].parameters == ("head.weight", "head.bias")
    assert plan.model.head == "own"


@pytest.mark.parametrize(("picked", "other"), [("left", "right"), ("right", "left")])
def test_half_of_a_tie_is_refused_with_the_way_out(
    tied: ModelOutline, picked: str, other: str
) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(tied, [picked])

    assert str(caught.value) == (
        f'"{picked}" shares its parameter with "{other}". Pick both (the shared tensor is reset '
        "once) or neither."
    )


def test_a_whole_tie_is_a_plan(tied: ModelOutline) -> None:
    plan = make_plan(tied, ["right", "left"])

    assert [target.layer for target in plan.targets] == ["left", "right"]


# Size


def test_the_size_counts_layers_tensors_and_parameters(cnn: ModelOutline) -> None:
    size = plan_size(cnn, ["stem", "norm"])

    assert (size.layers, size.tensors) == (2, 3)
    assert size.parameters == 6 * 3 * 9 + 6 + 6
    # Three kernels, three norms and the head.
    assert size.total == 6 * 3 * 9 + 2 * 6 * 6 * 9 + 3 * 12 + 6 * cnn.classes + cnn.classes
    assert size.fraction == size.parameters / size.total


def test_the_size_leaves_a_new_head_out_and_counts_names_once(cnn: ModelOutline) -> None:
    assert plan_size(cnn, ["stem", "stem", "head"]) == plan_size(cnn, ["stem"])


def test_the_size_counts_a_shared_parameter_once(tied: ModelOutline) -> None:
    size = plan_size(tied, ["left", "right"])

    assert (size.layers, size.tensors) == (2, 3)
    assert size.parameters == 12 * 12 + 12 + 12


def test_nothing_has_no_size(cnn: ModelOutline) -> None:
    size = plan_size(cnn, [])

    assert (size.layers, size.tensors, size.parameters, size.fraction) == (0, 0, 0, 0.0)


# Does it fit


def test_a_plan_fits_the_network_it_was_made_for(cnn: ModelOutline) -> None:
    check_plan(full_plan(cnn), cnn)


def test_a_plan_for_another_model_is_refused_with_both_names(
    cnn: ModelOutline, vit: ModelOutline
) -> None:
    other = vit.model_copy(update={"spec": vit.spec.model_copy(update={"name": "other"})})

    with pytest.raises(PlanError) as caught:
        check_plan(full_plan(cnn), other)

    assert "made for timm:tiny, and the model at hand is timm:other" in str(caught.value)
    assert 'layer "stem" is not in other' in str(caught.value)


def test_a_plan_for_other_weights_is_refused_with_both_digests(cnn: ModelOutline) -> None:
    other = cnn.model_copy(update={"backbone_sha256": "c" * 64})

    with pytest.raises(PlanError, match=r"made for weights 000000000000\.\.\..*are cccccccccccc"):
        check_plan(full_plan(cnn), other)


OTHER_HEADS = [{"classes": 9}, {"own_head": True}]


@pytest.mark.parametrize("change", OTHER_HEADS)
def test_a_plan_of_a_random_network_is_refused_under_another_head(
    cnn: ModelOutline, change: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=r"random network.*was made for a new head of 4 classes"):
        check_plan(full_plan(cnn), cnn.model_copy(update=change))


@pytest.mark.parametrize("change", OTHER_HEADS)
def test_a_plan_fits_another_head_unless_it_writes_into_it(
    cnn: ModelOutline, change: dict[str, Any]
) -> None:
    loaded = cnn.model_copy(
        update={"spec": cnn.spec.model_copy(update={"weights": "pretrained"}), "own_head": False}
    )
    (head,) = [layer for layer in loaded.layers if layer.head]
    body = make_plan(loaded, [layer.name for layer in loaded.layers if not layer.head])
    parameters = tuple(parameter.name for parameter in head.parameters)
    first = body.targets[0]
    written = first.model_copy(
        update={"layer": head.name, "parameters": parameters, "buffers": (), "entries": ()}
    )
    into_head = body.model_copy(update={"targets": (*body.targets, written)})

    check_plan(body, loaded.model_copy(update=change))
    check_plan(into_head, loaded)
    with pytest.raises(PlanError, match=f'writes into the head "{head.name}"'):
        check_plan(into_head, loaded.model_copy(update=change))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("targets.0.parameters.0", r'layer "stem" names the parameter "gone\.weight"'),
        ("targets.0.buffers.0", r'layer "stem" names the buffer "gone\.weight"'),
        ("freeze.0", r'freezes "gone\.weight", which tiny does not have'),
    ],
)
def test_a_name_the_network_does_not_have_is_refused(
    cnn: ModelOutline, key: str, says: str
) -> None:
    plan = read_plan(json.dumps(replaced(valid(), key, "gone.weight")))

    with pytest.raises(PlanError, match=says):
        check_plan(plan, cnn)


# The random control


def test_a_random_control_takes_as_many_layers_of_the_same_kind(vit: ModelOutline) -> None:
    plan = make_plan(vit, ["blocks.0.mlp.fc1", "blocks.0.norm1", "blocks.1.attn.proj"])

    control = random_layers(vit, plan, seed=0)

    kinds = {layer.name: layer.kind for layer in vit.layers}
    assert sorted(kinds[target.layer] for target in control.targets) == ["linear", "linear", "norm"]
    assert control.name == "random control"


@pytest.mark.parametrize("seed", range(20))
def test_a_random_control_never_takes_the_plans_own_layers(vit: ModelOutline, seed: int) -> None:
    plan = make_plan(vit, ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2", "norm", "pos_embed"])

    control = random_layers(vit, plan, seed=seed)

    drawn = [target.layer for target in control.targets]
    assert not set(drawn) & {target.layer for target in plan.targets}
    assert len(set(drawn)) == len(drawn)
    assert "head" not in drawn


def test_a_random_control_depends_on_its_seed_alone(vit: ModelOutline) -> None:
    plan = make_plan(vit, ["blocks.0.mlp.fc1", "blocks.0.norm1"])

    texts = {seed: plan_json(random_layers(vit, plan, seed=seed)) for seed in range(8)}

    assert texts == {seed: plan_json(random_layers(vit, plan, seed=seed)) for seed in range(8)}
    assert len(set(texts.values())) > 1


def test_a_random_control_keeps_scheme_numbers_seed_and_freeze(vit: ModelOutline) -> None:
    plan = make_plan(
        vit,
        ["blocks.0.mlp.fc1"],
        scheme="shrink-perturb",
        scheme_parameters={"shrink": 0.5},
        seed=11,
        freeze=["patch"],
    )

    target = random_layers(vit, plan, seed=3).targets[0]

    assert target.scheme == plan.targets[0].scheme
    assert target.seed == 11
    assert random_layers(vit, plan, seed=3).freeze == ("patch",)


def test_a_random_control_keeps_what_each_target_writes(vit: ModelOutline) -> None:
    zeros = make_plan(vit, ["blocks.0.mlp.fc1"], scheme="zero", seed=5)
    shuffled = make_plan(vit, ["blocks.1.norm1"], scheme="permute", seed=6)
    plan = compose_plans(zeros, shuffled)

    control = random_layers(vit, plan, seed=0)

    kinds = {layer.name: layer.kind for layer in vit.layers}
    found = {(kinds[t.layer], t.scheme.name, t.seed) for t in control.targets}
    assert found == {("linear", "zero", 5), ("norm", "permute", 6)}


def test_a_random_control_says_how_the_sizes_compare(vit: ModelOutline) -> None:
    plan = make_plan(vit, ["blocks.0.mlp.fc1"])

    control = random_layers(vit, plan, seed=1)

    own, other = (
        100 * plan_size(vit, [target.layer for target in each.targets]).fraction
        for each in (plan, control)
    )
    assert control.evidence.note == (
        f"Random control: 1 other layer drawn with seed 1, {other:.3g} % of the parameters "
        f"against the plan's {own:.3g} %."
    )


def test_a_random_control_is_near_the_plan_in_size(vit: ModelOutline) -> None:
    plan = make_plan(vit, ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"])
    asked = plan_size(vit, [target.layer for target in plan.targets]).parameters

    for seed in range(10):
        control = random_layers(vit, plan, seed=seed)
        drawn = plan_size(vit, [target.layer for target in control.targets]).parameters
        # The smallest linear layer is half of those the plan has, the largest half as much again.
        assert 0.5 * asked <= drawn <= 1.6 * asked


def test_a_plan_of_everything_leaves_no_random_control(cnn: ModelOutline) -> None:
    plan = make_plan(cnn, [layer.name for layer in cnn.layers])

    with pytest.raises(PlanError, match="no other layer is left for a random control"):
        random_layers(cnn, plan, seed=0)


# The published schema


def test_the_published_schema_is_the_one_in_the_code() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()


def test_the_schema_allows_a_real_plan() -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))

    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(valid())


@pytest.mark.parametrize(
    "broken",
    [
        added(valid(), "name", "colour"),
        added(valid(), "targets.0.scheme.name", "colour"),
        removed(valid(), "model.backbone_sha256", None),
        replaced(valid(), "targets.0.granularity", "channel"),
        replaced(valid(), "targets.0.seed", "5"),
        replaced(valid(), "schema_version", 2),
    ],
    ids=["key", "deep-key", "missing", "granularity", "type", "version"],
)
def test_the_schema_refuses_a_broken_plan(broken: Json) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_every_key_of_the_schema_is_described() -> None:
    schema = plan_schema()
    parts = {"ReinitPlan": schema, **schema["$defs"]}

    bare = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, about in part["properties"].items()
        if not (about.get("description") or part_of(about, parts).get("description"))
    ]

    assert bare == []


def part_of(about: Json, parts: dict[str, Json]) -> Json:
    """The part that a key refers to, if any: it carries the words when both would say the same."""
    return parts.get(str(about.get("$ref", "")).rpartition("/")[2], {})
