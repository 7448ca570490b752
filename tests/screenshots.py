"""Take screenshots of every page after a real way through, to look at and for the README.

python -m tests.screenshots --out FOLDER [--readme assets/screenshots]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests import journey
from tests.browser import open_page, serve_app
from tests.pages import PAGES

WINDOWS = ((1440, 900), (390, 844))
STEPS = PAGES
README = ("look", "layer", "unit", "carries", "watch", "export")
# A layer that feeds an activation, for the picture of its saturation.
LAYER_COLUMN = 36
# A palette would lose the pale ends of the diverging scale.
QUALITY = 78
WIDTH = 1200


def _work(page: Page) -> str:
    """Measure, pick and fine-tune once, and return the workspace's id."""
    sidebar = page.locator("[data-testid=stSidebar]")
    expect(sidebar).to_contain_text("EfficientNet-Lite0", timeout=journey.PATIENCE_MS)
    journey.settled(page)
    journey.measure(page, images=64)
    journey.go(page, "Look")
    journey.fill(page, "Pattern", "blocks.5.0")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(sidebar).to_contain_text("6 layers,", timeout=journey.PATIENCE_MS)
    journey.go(page, "Watch")
    journey.start_trial(
        page,
        2,
        steps=30,
        image_size=64,
        training_images=256,
        validation_images=96,
        validate_every=5,
    )
    expect(page.get_by_role("heading", name="Verdict", exact=True)).to_be_visible(
        timeout=2 * journey.PATIENCE_MS
    )
    return page.url.partition("w=")[2].partition("&")[0]


def _drawn(page: Page) -> None:
    journey.settled(page)
    # Plots report no end of drawing; their note is hidden when they have drawn.
    page.wait_for_timeout(2500)


def main() -> None:
    """Run the way through and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, serve_app(Path(folder) / "home") as app:
        with open_page(app.url, errors=[]) as page:
            workspace = _work(page)
        for dark in (False, True):
            for width, height in WINDOWS:
                with open_page(
                    f"{app.url}/?w={workspace}", width=width, height=height, dark=dark, errors=[]
                ) as page:
                    _drawn(page)
                    for step in STEPS:
                        page.goto(f"{app.url}/{step if step != 'look' else ''}?w={workspace}")
                        _drawn(page)
                        theme = "dark" if dark else "light"
                        page.screenshot(path=options.out / f"{step}_{width}_{theme}.png")
                        page.evaluate(
                            "() => document.querySelector('[data-testid=stMain]')"
                            ".scrollTo(0, innerHeight * 0.75)"
                        )
                        page.wait_for_timeout(700)
                        page.screenshot(path=options.out / f"{step}_{width}_{theme}_below.png")
                    if width > 1000:
                        page.goto(f"{app.url}/?w={workspace}")
                        _drawn(page)
                        journey.click_cell(page, column=LAYER_COLUMN, row=2)
                        _drawn(page)
                        page.screenshot(path=options.out / f"layer_{width}_{theme}.png")
                        journey.fill(page, "Unit", "7")
                        page.get_by_text("Drive it least").scroll_into_view_if_needed()
                        _drawn(page)
                        page.screenshot(path=options.out / f"unit_{width}_{theme}.png")
                        page.get_by_role("tab", name="Carries").click()
                        start = page.get_by_role("button", name="Look what it carries")
                        if start.count():
                            start.click()
                        expect(page.get_by_text("After your plan", exact=True)).to_be_visible(
                            timeout=journey.PATIENCE_MS
                        )
                        page.get_by_text("Orange adds").scroll_into_view_if_needed()
                        _drawn(page)
                        page.screenshot(path=options.out / f"carries_{width}_{theme}.png")
    if options.readme:
        options.readme.mkdir(parents=True, exist_ok=True)
        for step in README:
            # The verdict stands below the form.
            place = "watch_1440_light_below" if step == "watch" else f"{step}_1440_light"
            picture = Image.open(options.out / f"{place}.png").convert("RGB")
            small = picture.resize((WIDTH, picture.height * WIDTH // picture.width))
            small.save(options.readme / f"{step}.webp", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
