"""The whole way through in a real browser, on the embedded network and images."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

from core.cli import main as command_line
from tests import journey
from tests.browser import ROOT, ServedApp, open_page, serve_app
from tests.pages import PAGES

pytestmark = pytest.mark.browser

# A proxy that refuses at once: the same "no network" on every machine.
NO_NETWORK = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApp]:
    with serve_app(tmp_path_factory.mktemp("browser") / "home", env=NO_NETWORK) as served:
        yield served


def _start_finetune(page: Page, *, steps: int) -> None:
    journey.start_trial(
        page,
        2,
        steps=steps,
        batch_size=8,
        image_size=64,
        training_images=32,
        validation_images=16,
        validate_every=2,
    )
    stop = page.locator("section.stMain, [data-testid=stMain]").get_by_role("button", name="Stop")
    expect(stop.first).to_be_visible(timeout=journey.PATIENCE_MS)


# Points on the page's curves. Traces carry packed bytes; calcdata holds what was drawn.
POINTS = """() => [...document.querySelectorAll('.js-plotly-plot')]
  .flatMap((each) => each.calcdata ?? [])
  .filter(([first]) => first?.trace?.type === "scatter")
  .flatMap((points) => points.filter((point) => point.x !== undefined && point.y !== undefined))
  .length"""


def _points(page: Page) -> int:
    return int(page.evaluate(POINTS))


def _wait_for_points(page: Page) -> None:
    page.wait_for_function(f"() => ({POINTS})() > 0", timeout=journey.PATIENCE_MS)


@pytest.mark.timeout(1500)
def test_the_whole_way_through_open_measure_look_watch_export(
    app: ServedApp, tmp_path: Path
) -> None:
    with open_page(app.url) as page:
        sidebar = page.locator("[data-testid=stSidebar]")
        expect(sidebar).to_contain_text("EfficientNet-Lite0", timeout=journey.PATIENCE_MS)
        expect(sidebar).to_contain_text("BloodMNIST")
        journey.heatmap(page)
        journey.go(page, "Choose")
        samples = page.locator("[data-testid=stImage] img, [data-testid=stMain] img")
        expect(samples.nth(3)).to_be_visible(timeout=journey.PATIENCE_MS)
        journey.settled(page)

        journey.measure(page, images=32)

        first = journey.click_cell(page, column=20, plan=True)
        expect(sidebar).to_contain_text("1 layer,")
        second = journey.click_cell(page, column=24, shift=True)
        expect(sidebar).to_contain_text("2 layers,")
        assert first != second

        third = journey.click_cell(page, column=30, shift=True)
        expect(sidebar).to_contain_text("3 layers,")
        sidebar.get_by_role("button", name=re.compile("Undo")).click()
        expect(sidebar).to_contain_text("2 layers,")
        assert third not in (first, second)

        journey.go(page, "Watch")
        _start_finetune(page, steps=12)
        expect(page.locator(".js-plotly-plot").first).to_be_visible(timeout=journey.PATIENCE_MS)
        _wait_for_points(page)
        early = _points(page)
        page.reload()
        expect(page.locator("body")).to_contain_text("Verdict", timeout=journey.PATIENCE_MS)
        expect(sidebar).to_contain_text("2 layers,", timeout=journey.PATIENCE_MS)
        expect(page.get_by_role("heading", name="Verdict", exact=True)).to_be_visible(
            timeout=journey.PATIENCE_MS
        )
        page.wait_for_timeout(1500)
        assert _points(page) > early, "the curves did not move"
        body = page.inner_text("[data-testid=stMain]")
        assert "untouched network" in body
        assert "random control" in body

        journey.go(page, "Export")
        with page.expect_download() as download:
            page.get_by_role("button", name=re.compile("Download plan.json")).click()
        file = tmp_path / "plan.json"
        download.value.save_as(file)
        plan = json.loads(file.read_text(encoding="utf-8"))
        schema = json.loads(
            (Path(__file__).parent.parent / "assets" / "plan.schema.json").read_text("utf-8")
        )
        jsonschema.validate(plan, schema)
        assert {target["layer"] for target in plan["targets"]} == {first, second}

        journey.go(page, "Look")
        sidebar.get_by_role("button", name="Clear").click()
        expect(sidebar).to_contain_text("No layer picked")
        journey.go(page, "Export")
        page.locator("input[type=file]").first.set_input_files(file)
        expect(sidebar).to_contain_text("2 layers,", timeout=journey.PATIENCE_MS)

        page.get_by_role("button", name="Write the weights").click()
        with page.expect_download(timeout=journey.PATIENCE_MS) as download:
            page.get_by_role("button", name=re.compile("Download reinit.safetensors")).click(
                timeout=journey.PATIENCE_MS
            )
        weights = tmp_path / "reinit.safetensors"
        download.value.save_as(weights)
        assert weights.stat().st_size > 10_000_000
    assert "Traceback" not in app.log(), app.log()


@pytest.mark.timeout(1200)
def test_a_rules_plan_is_looked_at_watched_exported_and_verified(
    app: ServedApp, tmp_path: Path
) -> None:
    with open_page(app.url) as page:
        sidebar = page.locator("[data-testid=stSidebar]")
        expect(sidebar).to_contain_text("EfficientNet-Lite0", timeout=journey.PATIENCE_MS)
        journey.settled(page)
        journey.go(page, "Look")
        journey.make_by_rule(page, "Smallest weights", **{"Share (%)": "20"})
        expect(sidebar).to_contain_text("99 layers,")
        found = re.search(r"99 layers,.*new values: \w+", sidebar.inner_text(), re.DOTALL)
        assert found is not None

        page.get_by_role("button", name="Look ahead").click()
        expect(page.get_by_text("Divergence of the outputs", exact=True)).to_be_visible(
            timeout=journey.PATIENCE_MS
        )
        expect(page.locator("[data-testid=stMain]")).to_contain_text("nats")

        journey.go(page, "Watch")
        _start_finetune(page, steps=3)
        expect(page.locator("[data-testid=stMain]")).to_contain_text(
            "random control", timeout=journey.PATIENCE_MS
        )
        expect(sidebar.get_by_role("button", name="Stop")).to_have_count(
            0, timeout=journey.PATIENCE_MS
        )

        journey.go(page, "Export")
        _download(page, "Download plan.json", tmp_path / "plan.json")
        _download(page, "Download plan.masks.safetensors", tmp_path / "plan.masks.safetensors")
        _download(page, "Download apply_plan.py", tmp_path / "apply_plan.py")
        page.get_by_role("button", name="Write the weights").click()
        _download(page, "Download reinit.safetensors", tmp_path / "reinit.safetensors")

        sidebar.get_by_role("button", name="Clear").click()
        expect(sidebar).to_contain_text("No layer picked")
        both = [tmp_path / "plan.json", tmp_path / "plan.masks.safetensors"]
        page.locator("input[type=file]").first.set_input_files(both)
        expect(sidebar).to_contain_text("99 layers,", timeout=journey.PATIENCE_MS)
        expect(sidebar).to_contain_text(found.group().splitlines()[-1])
    assert "Traceback" not in app.log(), app.log()

    said = subprocess.run(
        [sys.executable, "apply_plan.py", "reinit.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout == "These are the weights that the plan makes.\n", said.stderr


def _download(page: Page, name: str, path: Path) -> None:
    with page.expect_download(timeout=journey.PATIENCE_MS) as download:
        page.get_by_role("button", name=re.compile(re.escape(name))).click(
            timeout=journey.PATIENCE_MS
        )
    download.value.save_as(path)


@pytest.mark.timeout(900)
def test_stop_ends_a_fine_tune_at_once_and_keeps_what_was_done(app: ServedApp) -> None:
    with open_page(app.url) as page:
        sidebar = page.locator("[data-testid=stSidebar]")
        expect(sidebar).to_contain_text("EfficientNet-Lite0", timeout=journey.PATIENCE_MS)
        journey.go(page, "Look")
        journey.fill(page, "Pattern", "blocks.5.0.*")
        page.get_by_role("button", name="Add", exact=True).click()
        expect(sidebar).to_contain_text("6 layers,", timeout=journey.PATIENCE_MS)
        journey.go(page, "Watch")
        _start_finetune(page, steps=5000)
        _wait_for_points(page)
        begun = time.monotonic()
        sidebar.get_by_role("button", name="Stop").click()
        expect(page.locator("[data-testid=stMain]")).to_contain_text(
            "Stopped. What it had finished is kept.", timeout=30_000
        )
        # Stop file, then a signal after 3 s, then the end after 5 s: longer is no stop.
        assert time.monotonic() - begun < 15
        # The chart is drawn anew once the run has ended.
        _wait_for_points(page)


@pytest.mark.timeout(600)
def test_beyond_loopback_a_token_opens_the_page_and_stays_out_of_the_address(
    tmp_path: Path,
) -> None:
    token = "a-token-for-this-test"
    served = serve_app(
        tmp_path / "home", env={**NO_NETWORK, "LIMBER_TOKEN": token}, address="0.0.0.0"
    )
    errors: list[str] = []
    with served as app, open_page(app.url, errors=errors) as page:
        expect(page.get_by_label("Token")).to_be_visible()
        assert "EfficientNet" not in page.content()
        page.get_by_label("Token").fill("not-the-token")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_have_text("That is not the token.")

        page.goto(f"{app.url}/?token={token}")

        sidebar = page.locator("[data-testid=stSidebar]")
        expect(sidebar).to_contain_text("EfficientNet-Lite0", timeout=journey.PATIENCE_MS)
        journey.settled(page)
        assert token not in page.url
        assert token not in str(page.evaluate("() => performance.getEntries().map(e => e.name)"))
        journey.go(page, "Choose")
        page.get_by_role("radio", name="Upload").click()
        journey.settled(page)
        archive = ROOT / "assets" / "data" / "pneumonia.zip"
        page.locator("input[type=file]").first.set_input_files(archive)
        expect(page.get_by_role("button", name="Use these images")).to_be_enabled()
        page.get_by_role("radio", name="Folder, zip").click()
        journey.settled(page)
        for path in ("/etc", "/etc/passwd", "/nothing"):
            journey.fill(page, "Path on this machine", path)
            page.get_by_role("button", name="Use these images").click()
            expect(page.get_by_test_id("stAlert")).to_contain_text(
                f'"{path}" is outside the folders that this server reads.'
            )
        assert token not in app.log()
        assert "Traceback" not in app.log(), app.log()
    # The form comes with 403, which a browser notes; nothing else may go wrong, such as a file
    # that the content policy keeps out.
    assert [error for error in errors if "403" not in error] == []


@pytest.mark.timeout(600)
def test_without_a_network_missing_weights_give_one_sentence_in_seconds(app: ServedApp) -> None:
    with open_page(app.url) as page:
        expect(page.locator("[data-testid=stSidebar]")).to_contain_text(
            "EfficientNet-Lite0", timeout=journey.PATIENCE_MS
        )
        journey.go(page, "Choose")
        journey.choose_by_name(page, "timm:resnet18")
        begun = time.monotonic()
        expect(page.locator("[data-testid=stMain]")).to_contain_text(
            "are not on this machine", timeout=30_000
        )
        assert time.monotonic() - begun < 5
        expect(page.locator("[data-testid=stSidebar]")).to_contain_text("EfficientNet-Lite0")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_every_page_fits_the_window(app: ServedApp, width: int, height: int, dark: bool) -> None:
    with open_page(app.url, width=width, height=height, dark=dark) as page:
        page.wait_for_selector("[data-testid=stMain] [data-testid=stVerticalBlock]")
        journey.settled(page)
        for title in PAGES:
            page.goto(f"{app.url}/{title}" if title != "look" else app.url)
            page.wait_for_selector("[data-testid=stMain] [data-testid=stVerticalBlock]")
            journey.settled(page)
            overflow = page.evaluate(
                "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert overflow <= 0, f"{title} is {overflow} px wider than the window"


# --- looking and picking ----------------------------------------------------------------------


def _sidebar(page: Page) -> Locator:
    return page.locator("[data-testid=stSidebar]")


@pytest.mark.timeout(600)
def test_five_clicks_lead_from_the_first_screen_to_a_plan(app: ServedApp, tmp_path: Path) -> None:
    with open_page(app.url) as page:
        journey.heatmap(page)
        journey.settled(page)
        page.wait_for_timeout(1000)
        box = journey.heatmap(page).bounding_box()
        assert box is not None
        # Everything of the heatmap but the names of stages is above the fold.
        assert box["y"] + box["height"] <= 900
        for sentence in page.locator(".st-key-findings button:visible").all()[:3]:
            place = sentence.bounding_box()
            assert place is not None
            assert place["y"] < box["y"]

        page.locator(".st-key-findings button:visible").first.click()
        expect(_sidebar(page)).to_contain_text("2 layers,")
        page.get_by_role("link", name="Export", exact=True).first.click()
        _download(page, "Download plan.json", tmp_path / "plan.json")

    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["targets"]) == 2


@pytest.mark.timeout(600)
def test_the_strip_looks_and_picks_by_click_box_and_keys(app: ServedApp) -> None:
    with open_page(app.url) as page:
        journey.settled(page)
        sidebar = _sidebar(page)

        name = journey.click_cell(page, column=36, row=2)
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        expect(sidebar).to_contain_text("No layer picked")

        journey.click_cell(page, column=36, plan=True)
        expect(sidebar).to_contain_text("1 layer,")
        journey.click_cell(page, column=36, plan=True)
        expect(sidebar).to_contain_text("No layer picked")

        # No tool is chosen first: a drag is a box.
        start = journey.cell(page, column=40, row=1)
        stop = journey.cell(page, column=44, row=3)
        page.mouse.move(start.x, start.y)
        page.mouse.down()
        page.mouse.move((start.x + stop.x) / 2, stop.y, steps=6)
        page.mouse.move(stop.x, stop.y, steps=6)
        page.mouse.up()
        expect(sidebar).to_contain_text(re.compile("[3-6] layers,"))
        picked = sidebar.inner_text()
        journey.settled(page)

        page.keyboard.press("Control+z")
        expect(sidebar).to_contain_text("No layer picked")
        journey.settled(page)
        page.keyboard.press("Control+y")
        expect(sidebar).to_contain_text(re.compile("[3-6] layers,"))
        assert re.search("[3-6] layers,", picked)
        journey.settled(page)
        sidebar.get_by_role("button", name="Clear").click()
        expect(sidebar).to_contain_text("No layer picked")
        journey.settled(page)

        # By keyboard alone: the first cell is the plan's of the first layer.
        journey.heatmap(page).focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(400)
        page.keyboard.press("Enter")
        expect(sidebar).to_contain_text("1 layer,")
        journey.settled(page)
        journey.heatmap(page).focus()
        page.keyboard.press("ArrowDown")
        page.wait_for_timeout(400)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="conv_stem")).to_be_visible()


@pytest.mark.timeout(600)
def test_a_layer_shows_its_saturation_units_weights_and_gradients(app: ServedApp) -> None:
    with open_page(app.url) as page:
        journey.settled(page)
        journey.click_cell(page, column=36, row=2)
        main = page.locator("[data-testid=stMain]")
        expect(main).to_contain_text("lie where its derivative is practically 0")
        saturation = page.get_by_label(re.compile("Distribution of the inputs of relu6"))
        expect(saturation.locator(".barlayer .point").first).to_be_visible()

        journey.fill(page, "Unit", "7")
        expect(main).to_contain_text("of the inputs of unit 7")
        expect(main).to_contain_text("Drive it most")

        for tab, label in (
            ("Units", "per unit of the layer"),
            ("Weights", "Singular values of the layer"),
            ("Gradients", "Distribution of the layer.s gradient entries"),
        ):
            page.get_by_role("tab", name=tab).click()
            expect(page.get_by_label(re.compile(label))).to_be_visible()


@pytest.mark.timeout(900)
def test_captum_shows_a_layer_before_and_after_the_plan(app: ServedApp) -> None:
    with open_page(app.url) as page:
        journey.settled(page)
        page.locator(".st-key-findings button:visible").first.click()
        expect(_sidebar(page)).to_contain_text("2 layers,")
        journey.settled(page)
        journey.click_cell(page, column=36, row=2)
        page.get_by_role("tab", name="Carries").click()
        page.get_by_role("button", name="Look what it carries").click()

        after = page.get_by_text("After your plan", exact=True)
        expect(after).to_be_visible(timeout=journey.PATIENCE_MS)
        maps = page.locator("[data-testid=stImage] img:visible")
        # Four images, and a map of each for both states.
        expect(maps).to_have_count(12)
        main = page.locator("[data-testid=stMain]")
        expect(main).to_contain_text("LayerGradCam of Captum")
        expect(main).to_contain_text("half the squared norm of the features")


VIT = {"model": "vit_small_patch14_dinov2", "weights": "pretrained", "data": "bloodmnist"}


@pytest.fixture(scope="module")
def vit(app: ServedApp, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a workspace in which the embedded ViT is measured, from inside as well."""
    out = tmp_path_factory.mktemp("vit") / "diagnosis.json"
    arguments = ["measure", "--model", VIT["model"], "--data", VIT["data"], "--inside"]
    arguments += ["--samples", "8", "--batch-size", "4", "--image-size", "98", "--device", "cpu"]
    assert command_line([*arguments, "--out", str(out)]) == 0
    folder = app.home / "workspaces" / "00000000000000aa"
    run = folder / "runs" / "measure-20261123-010000-aaaa"
    shutil.copytree(out.parent, run)
    (folder / "workspace.json").write_text(json.dumps({"version": 1, "choice": VIT}))
    choice = {**VIT, "checkpoint": None}
    record = {"id": run.name, "kind": "measure", "state": "done", "created": 1.0, "started": 1.0}
    record |= {"ended": 2.0, "message": None, "argv": [], "pid": None, "facts": {"choice": choice}}
    (run / "run.json").write_text(json.dumps(record))
    return f"{app.url}/?w={folder.name}"


def _find(page: Page, layer: str) -> None:
    box = page.get_by_role("combobox", name="Layer").first
    box.click()
    box.fill(layer)
    page.get_by_role("option", name=layer, exact=True).first.click()
    journey.settled(page)
    expect(page.get_by_role("heading", name=layer, exact=True)).to_be_visible()


@pytest.mark.timeout(900)
def test_a_vit_shows_saturation_attention_and_what_tokens_carry(vit: str) -> None:
    with open_page(vit) as page:
        expect(_sidebar(page)).to_contain_text("DINOv2", timeout=journey.PATIENCE_MS)
        journey.heatmap(page)
        journey.settled(page)
        main = page.locator("[data-testid=stMain]")

        _find(page, "blocks.5.mlp.fc1")
        expect(main).to_contain_text("of the inputs of gelu lie where")
        journey.click_cell(page, column=40, plan=True)
        expect(_sidebar(page)).to_contain_text("1 layer,")

        page.get_by_role("tab", name="Carries").click()
        page.get_by_role("button", name="Look what it carries").click()
        expect(main).to_contain_text("LayerConductance of Captum", timeout=journey.PATIENCE_MS)
        expect(page.get_by_text("After your plan", exact=True)).to_be_visible()

        _find(page, "blocks.5.attn.qkv")
        page.get_by_role("tab", name="Attention").click()
        expect(page.get_by_label(re.compile("Attention entropy of each head"))).to_be_visible()
        page.get_by_text("All tokens", exact=True).click()
        journey.settled(page)
        expect(main).to_contain_text("attention, brightest where most")


# Streamlit's own, reported by axe-core and not ours to mend.
NOT_OURS = {"presentation-role-conflict"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_has_a_barrier_of_ours(app: ServedApp, dark: bool) -> None:
    barriers = []
    with open_page(app.url, dark=dark) as page:
        journey.settled(page)
        journey.click_cell(page, column=36, row=2)
        for title in (*PAGES, "open layer"):
            if title != "open layer":
                page.get_by_role("link", name=title.capitalize(), exact=True).first.click()
            else:
                journey.go(page, "Look")
                journey.click_cell(page, column=40, row=2)
            page.wait_for_timeout(1500)
            journey.settled(page)
            for rule in Axe().run(page).response["violations"]:
                where = [node["html"][:120] for node in rule["nodes"]]
                barriers += [
                    (title, rule["id"], html) for html in where if rule["id"] not in NOT_OURS
                ]

    assert barriers == []
