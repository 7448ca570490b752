"""Every page in every state, through Streamlit's AppTest."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

import core
from core.catalogue.attributions import METHODS
from core.catalogue.trials import OUTCOMES
from core.errors import OfflineError, Remedy
from core.records import ModelOutline, Note, Preprocessing
from dashboard import store, words
from dashboard.store import workspace as workspace_room
from dashboard.store.runs import RunQueue
from tests.calibration import drawn_trial
from tests.pages import (
    HOSTILE,
    HOSTILE_FILE,
    PAGES,
    PICKED,
    REFUSE,
    ROOT,
    STEERING,
    WAIT_FOR_STOP,
    assert_well,
    open_app,
    outline,
    put_measurement,
    put_run,
    shown,
    space,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("fresh_queue")

# As many as Choose shows.
SHOWN_IMAGES = 8


# --- choose ---------------------------------------------------------------------------------


def test_another_embedded_data_set_changes_choice_and_head() -> None:
    app = open_app("choose")

    app.button(key="use_data_pneumonia").click().run()

    assert_well(app)
    assert space().choice.data == "pneumonia"
    assert "2 classes" in shown(app)


def test_a_folder_that_is_not_there_gives_a_sentence_and_keeps_the_choice() -> None:
    app = open_app("choose")
    app.segmented_control(key="data_way").set_value("Folder, zip").run()

    app.text_input(key="data_path").set_value("no/such/folder").run()
    app.button(key="use_folder").click().run()

    assert_well(app)
    assert len(app.error) == 1
    assert space().choice.data == "bloodmnist"


def test_deep_images_show_what_is_black_and_white_and_unequal_parts_warn(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("val", "ab")):
        for place, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            values = np.arange(900, dtype=np.uint16).reshape(30, 30) * 4 + place
            Image.fromarray(values).save(tmp_path / split / name / "0.png")
    app = open_app("choose")
    app.segmented_control(key="data_way").set_value("Folder, zip").run()

    app.text_input(key="data_path").set_value(str(tmp_path)).run()
    app.button(key="use_folder").click().run()

    assert_well(app)
    assert (
        "5 16-bit images: intensities 0 to 4,095 (12 bits; the brightest pixel of 3 training "
        "images is 3,598) are shown and measured as black to white"
    ) in shown(app)
    (warned,) = app.warning
    assert "1 class has training images and no validation image" in warned.value.replace("\\", "")


def test_a_checkpoint_on_disk_becomes_the_network() -> None:
    app = open_app("choose")
    weights = ROOT / "assets" / "weights" / "tf_efficientnet_lite0.fp16.safetensors"
    app.segmented_control(key="model_way").set_value("Your checkpoint").run()

    app.text_input(key="checkpoint_model").set_value("timm:tf_efficientnet_lite0").run()
    app.text_input(key="checkpoint_path").set_value(str(weights)).run()
    app.button(key="use_checkpoint").click().run()

    assert_well(app)
    assert space().choice.checkpoint == str(weights)
    # The worker's answer went through JSON; the layers are those of the network that ships.
    assert store.model_outline(space().choice).layers == outline().layers
    assert "replaced by a new, random one for the 8 classes" in shown(app)


def test_weights_that_are_not_here_give_one_sentence_and_keep_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OfflineError("The host cannot be reached.", Remedy.CONNECT)

    app = open_app("choose")
    app.segmented_control(key="model_way").set_value("timm, torchvision").run()
    monkeypatch.setattr(core, "outline_model", unreachable)

    app.selectbox(key="model_name").set_value("timm:resnet18").run()
    app.button(key="use_named").click().run()

    assert_well(app)
    assert 'switch on "Random weights"' in app.error[0].value.replace("\\", "")
    assert space().choice.model == "tf_efficientnet_lite0"


def test_the_head_is_said_once_and_other_notes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    outline = store.model_outline

    def noted(*args: Any, **kwargs: Any) -> ModelOutline:
        notes = (
            Note(about="head", sentence="Replaced the head of old."),
            Note(about="file", sentence="Left out the head of the file."),
        )
        return outline(*args, **kwargs).model_copy(update={"notes": notes})

    monkeypatch.setattr(store, "model_outline", noted)

    app = open_app("choose")

    shown = [text.value for text in app.text]
    assert_well(app)
    assert "Left out the head of the file." in shown
    assert "Replaced the head of old." not in shown


# --- measure --------------------------------------------------------------------------------


def test_measure_shows_what_the_running_worker_says_and_stops_it(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    app = open_app("look")

    app.button(key="measure_start").click().run()
    wait_until(lambda: fresh_queue.live()[0].total == 60)
    app.run()

    assert app.button(key="stop_measure")
    run_id = fresh_queue.live()[0].id
    app.button(key="stop_measure").click().run()
    wait_until(lambda: not fresh_queue.live())
    app.run()
    assert_well(app)
    assert fresh_queue.view(space().folder, run_id).state == "stopped"
    assert "Stopped" in shown(app)


def test_measure_shows_the_workers_own_sentence_when_it_failed(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(REFUSE)
    app = open_app("look")

    app.button(key="measure_start").click().run()
    wait_until(lambda: not fresh_queue.live())
    app.run()

    assert_well(app)
    assert "The folder holds no images" in app.error[0].value.replace("\\", "")


def test_findings_follow_the_preset_and_its_limits_and_both_are_kept() -> None:
    put_measurement()
    app = open_app("look")
    assert [button.label for button in app.button if button.key == "findings_0"] == [
        words.escape(f"2 layers have more than 5 % of units that never fire. ({', '.join(PICKED)})")
    ]

    app.number_input(key="limit_limber_dead-units").set_value(0.45).run()

    assert_well(app)
    assert not [button for button in app.button if button.key == "findings_0"]
    assert space().judging.thresholds == {"dead-units": 0.45}
    assert checks_box(app).label == "Checks: Limber, 1 limit changed"

    app.button(key="judge_reset").click().run()

    assert_well(app)
    assert app.number_input(key="limit_limber_dead-units").value == 0.05
    assert [button for button in app.button if button.key == "findings_0"]

    app.selectbox(key="judge_preset").set_value("weightwatcher").run()

    assert_well(app)
    assert space().judging.preset == "weightwatcher"
    # An exponent of 0.3 lies below the useful range in every layer, and in the twin's as well.
    assert not [button for button in app.button if button.key == "findings_0"]
    (said,) = [each.value for each in app.caption if "exponent below 2" in each.value]
    assert "As in the fresh twin" in said
    assert checks_box(open_app("look")).label == "Checks: WeightWatcher"


def test_a_twin_of_0_has_a_word_in_the_table_of_each_page() -> None:
    put_measurement(twin={"grad_l2": 0.0, "weight_l2": 0.0})

    app = open_app("look")

    app.selectbox(key="strip_layer").set_value(PICKED[0]).run()
    assert_well(app)
    numbers = table(app, "Against the twin").set_index("Metric")
    assert (
        numbers["Against the twin"].to_dict()
        | {
            "Gradient size (L2 norm)": "the fresh twin's value is 0: no ratio",
            "Weight norm": "the fresh twin's value is 0: no ratio",
        }
        == numbers["Against the twin"].to_dict()
    )
    assert numbers["Interval of the ratio"]["Gradient size (L2 norm)"] == ""
    layers = table(app, "No ratio: twin is 0")
    assert set(layers["No ratio: twin is 0"]) == {"Gradient size, Weight norm"}
    assert layers["Gradient size, ratio"].isna().all()
    assert (layers["Relative gradient norm, ratio"] == 1).all()
    assert words.escape("Dot: measured, but no ratio") in shown(app)


def table(app: AppTest, column: str) -> Any:
    (found,) = [each.value for each in app.dataframe if column in each.value.columns]
    return found


def checks_box(app: AppTest) -> Any:
    (found,) = [each for each in app.expander if each.label.startswith("Checks: ")]
    return found


def test_limits_of_a_check_that_is_gone_are_let_go() -> None:
    put_measurement()
    space().set_judging(store.Judging(preset="nosuch", thresholds={"gone": 1.0}))

    app = open_app("look")

    assert_well(app)
    assert [button for button in app.button if button.key == "findings_0"]


def test_a_measurement_of_other_images_is_called_stale() -> None:
    put_measurement()
    space().choose(data="pneumonia")

    app = open_app("look")

    assert "Measure again" in app.warning[0].value


# --- pick -----------------------------------------------------------------------------------


def test_patterns_buttons_and_undo_share_one_selection() -> None:
    app = open_app("look")

    app.text_input(key="pattern_text").set_value("blocks.5.0.*").run()
    app.button(key="pattern_add").click().run()
    after_add = space().picks.layers
    app.text_input(key="pattern_text").set_value("*.bn?").run()
    app.button(key="pattern_remove").click().run()
    after_remove = space().picks.layers
    app.button(key="undo").click().run()

    assert_well(app)
    assert set(after_remove) < set(after_add)
    assert not [name for name in after_remove if ".bn" in name]
    assert space().picks.layers == after_add


def test_a_pattern_without_a_match_gives_a_sentence() -> None:
    app = open_app("look")

    app.text_input(key="pattern_text").set_value("nothing*").run()
    app.button(key="pattern_add").click().run()

    assert_well(app)
    assert "nothing" in app.error[0].value
    assert space().picks.layers == ()


def test_undo_also_reaches_the_scheme() -> None:
    app = open_app("look")
    first = space().picks.scheme
    other = next(info.name for info in core.list_schemes() if info.name != first)

    app.selectbox(key="scheme").set_value(other).run()
    chosen = space().picks.scheme
    app.button(key="undo").click().run()

    assert_well(app)
    assert (chosen, space().picks.scheme) == (other, first)
    assert app.selectbox(key="scheme").value == first


def test_picks_belong_to_their_network() -> None:
    app = open_app("choose")
    space().change_picks(layers=PICKED)

    space().choose(model="vit_small_patch14_dinov2")
    elsewhere = space().picks.layers
    space().choose(model="tf_efficientnet_lite0")

    assert_well(app)
    assert (elsewhere, space().picks.layers) == ((), PICKED)


# --- glossary -------------------------------------------------------------------------------


def test_the_glossary_holds_every_metric_check_rule_scheme_and_word_of_a_trial() -> None:
    app = open_app("glossary")

    titles = {box.label for box in app.expander}
    checks = {check for preset in core.list_presets() for check in preset.checks}
    expected = {
        *(words.escape(info.title) for info in core.list_metrics()),
        *(words.escape(words.check_title(check)) for check in checks),
        *(words.escape(f"{info.title} ({info.name})") for info in store.rule_infos()),
        *(words.escape(f"{info.title} ({info.name})") for info in core.list_schemes()),
        *(words.escape(method.title) for method in METHODS),
        *(words.escape(title) for title in (*words.TRIAL_WORDS, *(o.title for o in OUTCOMES))),
        *(words.escape(f"{rival.title} ({rival.name})") for rival in core.list_rivals()),
        *(words.escape(f"{each.title} ({each.name})") for each in core.list_augmentations()),
    }
    assert titles == expected


# --- watch ----------------------------------------------------------------------------------


def test_watch_says_what_it_waits_for() -> None:
    app = open_app("watch")

    assert "Pick at least one layer" in shown(app)


def test_watch_starts_a_run_and_shows_it_after_a_reload(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    space().change_picks(layers=PICKED)
    app = open_app("watch")

    app.button(key="train_start").click().run()
    assert_well(app)
    wait_until(lambda: [r.total for r in fresh_queue.live() if r.kind == "finetune"] == [60])
    reloaded = open_app("watch")

    assert "Verdict so far" in shown(reloaded)
    assert reloaded.button(key="stop_finetune")


def test_a_verdict_takes_eight_seeds_and_a_quick_look_three(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    space().change_picks(layers=PICKED)

    for button, seeds in (("train_start", 3), ("train_verdict", 8)):
        app = open_app("watch")
        app.button(key=button).click().run()
        assert_well(app)
        run = fresh_queue.runs(space().folder, "finetune")[0]
        assert run.facts["seeds"] == list(range(seeds))
        fresh_queue.stop(run.id)
        wait_until(lambda: not fresh_queue.live())


def test_watch_times_a_few_steps_before_the_start(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    pace = {
        "step_s": 0.5,
        "image_s": 0.01,
        "read_s": 0.0,
        "build_s": 0.0,
        "batch_size": 32,
        "image_size": 112,
        "device": "cpu",
    }
    worker(f"say(event='done', pace={pace!r})\n")
    space().change_picks(layers=PICKED)

    app = open_app("watch")
    assert_well(app)
    wait_until(lambda: not fresh_queue.live())
    app.run()

    assert [run.kind for run in fresh_queue.runs(space().folder)] == ["estimate"]
    assert "Quick look with 3 seeds: about" in shown(app).replace("\\", "")
    assert "two-second probe" in shown(app).replace("\\", "")


def test_rivals_outcome_and_recipe_reach_the_command_line(
    worker: Callable[[str], None], fresh_queue: RunQueue
) -> None:
    worker(WAIT_FOR_STOP)
    space().change_picks(layers=PICKED)
    app = open_app("watch")
    app.pills(key="train_rivals").set_value(["lp-ft", "llrd"]).run()
    app.selectbox(key="train_outcome").set_value("auc").run()
    app.number_input(key="train_margin_auc").set_value(2.0).run()
    app.pills(key="train_augment").set_value(["crop"]).run()
    app.checkbox(key="train_sweep").set_value(True).run()

    app.button(key="train_start").click().run()

    assert_well(app)
    options = space().train_options
    assert options is not None
    assert (options.rivals, options.random_control) == (("lp-ft", "llrd"), False)
    assert (options.outcome, options.margin, options.sweep) == ("auc", 2.0, True)
    assert options.augment == ("crop",)


def test_plans_of_earlier_runs_can_be_arms(fresh_queue: RunQueue) -> None:
    folder = put_run("finetune", facts={"choice": space().choice.model_dump(mode="json")})
    earlier = core.make_plan(outline(), ["blocks.6.0.conv_pw"], name="late one")
    core.write_plan(earlier, folder / "plan.json")
    space().change_picks(layers=PICKED)

    app = open_app("watch")

    assert_well(app)
    (label,) = app.multiselect(key="train_more_plans").options
    assert label.replace("\\", "").startswith("late one, ")


def test_a_run_of_another_plan_is_marked(fresh_queue: RunQueue) -> None:
    space().change_picks(layers=PICKED)
    put_run("finetune", facts={"choice": space().choice.model_dump(mode="json")})

    app = open_app("watch")

    assert_well(app)
    assert "not of your current plan" in app.info[0].value


def test_a_trial_shows_its_forest_plot_and_what_to_do_next() -> None:
    curves, design = drawn_trial(1, 2, effect=0.05)
    folder = put_run("finetune")
    lines = [{"event": "record", "record": {"design": design.model_dump(mode="json")}}]
    lines += [{"event": "step", **asdict(step)} for curve in curves for step in curve.steps]
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

    app = open_app("watch")

    assert_well(app)
    text = shown(app).replace("\\", "")
    assert '"plan 1" is better than the untouched network' in text
    assert 'Next: Export "plan 1"' in text


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        ("failed", "The loss is not a number.", "The loss is not a number"),
        ("stopped", None, "Stopped"),
        ("done", None, "nothing to compare"),
    ],
)
def test_watch_says_how_an_earlier_run_ended(
    state: str, message: str | None, expected: str
) -> None:
    put_run("finetune", state=state, message=message)

    app = open_app("watch")

    assert expected in shown(app).replace("\\", "")


# --- export ---------------------------------------------------------------------------------


def test_export_says_what_it_waits_for() -> None:
    app = open_app("export")

    assert "There is no plan yet" in shown(app)


def test_an_exported_plan_loaded_again_gives_the_same_selection() -> None:
    space().change_picks(layers=PICKED, freeze=("conv_stem",), seed=7)
    app = open_app("export")
    text = next(code.value for code in app.code if code.language == "json")
    space().change_picks(layers=(), freeze=(), seed=0)
    app.run()

    app.file_uploader[0].set_value(("plan.json", text.encode(), "application/json")).run()

    assert_well(app)
    picks = space().picks
    assert (set(picks.layers), picks.freeze, picks.seed) == (set(PICKED), ("conv_stem",), 7)
    again = next(code.value for code in app.code if code.language == "json")
    assert again == text


def test_a_plan_that_resets_and_freezes_is_kept_as_it_was_loaded_and_says_so() -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))

    odd = json.dumps({**plan, "freeze": PICKED[:1]}).encode()
    app.file_uploader[0].set_value(("plan.json", odd, "application/json")).run()

    assert_well(app)
    assert "is reset but not trained" in shown(app)
    again = json.loads(next(code.value for code in app.code if code.language == "json"))
    assert (again["targets"], again["freeze"]) == (plan["targets"], list(PICKED[:1]))


def test_a_pick_that_an_older_version_froze_as_well_gets_a_sentence() -> None:
    space().change_picks(layers=PICKED, freeze=PICKED[:1])

    app = open_app("export")

    assert_well(app)
    assert "and keeps the same from training" in shown(app)


def test_the_plan_in_words_counts_a_buffer_that_two_layers_name_once() -> None:
    pair = ("blocks.5.0.conv_pw", "blocks.5.0.bn1")
    plan = core.make_plan(outline(), pair, scheme="architecture", seed=0, name="plan")
    assert plan.targets[0].buffers == plan.targets[1].buffers

    said = words.plan_words(plan, "EfficientNet-Lite0", 1, 2)

    assert "Also reset 3 buffers: running statistics" in said


def test_a_plan_with_an_unknown_key_is_refused_by_name() -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))

    app.file_uploader[0].set_value(
        ("plan.json", json.dumps({**plan, "colour": 1}).encode(), "application/json")
    ).run()

    assert_well(app)
    assert "colour" in app.error[0].value


@pytest.mark.parametrize("named", ["/etc/passwd", "gone.pt", "core/../README.md"])
def test_a_plan_opens_no_file_on_this_machine(named: str) -> None:
    space().change_picks(layers=PICKED)
    app = open_app("export")
    plan = json.loads(next(code.value for code in app.code if code.language == "json"))
    plan["model"] |= {"weights": "checkpoint", "checkpoint": named}

    app.file_uploader[0].set_value(
        ("plan.json", json.dumps(plan).encode(), "application/json")
    ).run()

    assert_well(app)
    assert "A plan does not open files here" in app.error[0].value
    assert space().choice.checkpoint is None


# --- names from elsewhere -------------------------------------------------------------------

LIVE = re.compile(
    r"(?<!\\)!?\[[^\]]*(?<!\\)\]\(|https?\\?:(?:\\?/){2}|www\\?\.|:\\?material/|&#|(?<!\\)<(?:img|b>)"
)
# Elements that show their text as it is; the rest is markdown or HTML.
PLAIN = {"text", "code", "arrow_data_frame", "bidi_component", "default", "value", "alt"}
# What a page writes itself: its styles and scripts, its icons, the addresses it links to.
OURS = {"html", "icon", "url", "id", "page", "element_id"}


def _strings(message: Any, place: str = "") -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        for each in value if isinstance(value, (list, tuple)) or hasattr(value, "add") else [value]:
            if hasattr(each, "ListFields"):
                yield from _strings(each, f"{place}/{field.name}")
            elif isinstance(each, str) and field.name not in OURS:
                yield f"{place}/{field.name}", each


def _shown_strings(app: AppTest) -> Iterator[tuple[str, str]]:
    def walk(node: Any) -> Iterator[tuple[str, str]]:
        proto = getattr(node, "proto", None)
        if proto is not None and node.type != "html":
            yield from ((f"{node.type}{place}", text) for place, text in _strings(proto))
        for child in getattr(node, "children", {}).values():
            yield from walk(child)

    yield from walk(app._tree)


def _seen() -> Preprocessing:
    model = outline()
    return model.preprocessing.model_copy(update={"image_size": model.default_size})


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of images that a worker looks at once for all tests here."""
    folder = tmp_path_factory.mktemp("hostile") / f"set {HOSTILE_FILE}"
    for name in ("a", HOSTILE_FILE):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}{HOSTILE_FILE}.png")
    return folder


@pytest.fixture
def hostile_work(limber_home: Path, hostile_folder: Path) -> None:
    """Everything that a person can name, named to do harm."""
    other = workspace_room.workspace("fedcba9876543210")
    other.set_name(HOSTILE)
    other.choose(model=HOSTILE, data=HOSTILE_FILE, checkpoint=HOSTILE_FILE)
    space().set_name(HOSTILE)
    # With pictures at once, so that one worker does for all of this.
    choice = space().choice.model_copy(update={"data": str(hostile_folder)})
    store.look_at_data(choice, _seen(), SHOWN_IMAGES)
    space().choose(data=str(hostile_folder))
    space().change_picks(layers=PICKED, name=HOSTILE)
    for kind in ("measure", "finetune", "preview", "apply"):
        put_run(kind, state="failed", message=HOSTILE, facts={"plan": HOSTILE, "title": HOSTILE})


@pytest.mark.parametrize("page", PAGES)
def test_no_page_shows_a_name_that_steers_it(hostile_work: None, page: str) -> None:
    app = open_app(page)
    if page == "choose":
        app.segmented_control(key="model_way").set_value("Your checkpoint").run()
        app.text_input(key="checkpoint_model").set_value(HOSTILE).run()
        app.text_input(key="checkpoint_path").set_value(HOSTILE_FILE).run()
        app.button(key="use_checkpoint").click().run()
    elif page == "look":
        app.text_input(key="pattern_text").set_value(HOSTILE).run()
        app.button(key="pattern_add").click().run()
    elif page == "export":
        plan = json.dumps({"format": HOSTILE, HOSTILE: 1})
        app.file_uploader(key="plan_upload_0").set_value(
            (f"{HOSTILE_FILE}.json", plan.encode(), "x/y")
        ).run()
    assert_well(app)

    strings = list(_shown_strings(app))

    typed = {"checkpoint_model", "checkpoint_path", "pattern_text"}
    typed_values = {app.session_state[key] for key in typed if key in app.session_state}
    shown_here = [(place, text) for place, text in strings if text not in typed_values]
    assert any("evil" in text for _, text in shown_here), "nothing hostile was shown at all"
    assert [each for each in shown_here if STEERING.search(each[1])] == []
    live = [
        (place, text)
        for place, text in shown_here
        if not PLAIN & {place.partition("/")[0], place.rpartition("/")[2]} and LIVE.search(text)
    ]
    assert live == []


MARKDOWN_CALLS = {
    *("markdown", "caption", "write", "error", "info", "warning", "success", "toast", "header"),
    *("subheader", "title", "text", "code", "button", "expander", "download_button", "checkbox"),
    *("toggle", "badge", "popover", "spinner"),
}
# The helps escape each part of the markdown that they make.
DOORS = {"escape", "clean", "code", "metric_help", "check_help", "method_help"}


def _is_ours(node: ast.expr) -> bool:
    """Whether an expression is a text of ours, or went through a door."""
    match node:
        case ast.Constant() | ast.Attribute(value=ast.Name(id="words")):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="words"), attr=door)):
            return door in DOORS or all(map(_is_ours, node.args)) or door in NUMBERS
        case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[inside]):
            return isinstance(inside, ast.GeneratorExp) and _is_ours(inside.elt)
        case ast.JoinedStr():
            return all(
                isinstance(part, ast.Constant)
                or (isinstance(part, ast.FormattedValue) and _is_shown(part))
                for part in node.values
            )
        case ast.IfExp(body=first, orelse=second) | ast.BinOp(left=first, right=second):
            return _is_ours(first) and _is_ours(second)
    return False


# Sentences that words makes of numbers alone.
NUMBERS = {"count", "short", "estimate", "trial_estimate", "percent", "duration", "figure"}


def _is_shown(part: ast.FormattedValue) -> bool:
    numeric = part.format_spec is not None
    return numeric or _is_ours(part.value)


def _texts_of(call: ast.Call, name: str) -> Iterator[ast.expr]:
    if name in MARKDOWN_CALLS:
        yield from call.args[:1]
    yield from (each.value for each in call.keywords if each.arg in ("label", "text", "body"))


def test_every_text_that_a_page_shows_goes_through_a_door() -> None:
    past = []
    for path in sorted((ROOT / "dashboard").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="st"), attr=name)):
                    past += [
                        f"{path.relative_to(ROOT)}:{text.lineno} {ast.unparse(text)}"
                        for text in _texts_of(node, name)
                        if not _is_ours(text)
                    ]

    assert past == []
