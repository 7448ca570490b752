"""The steps a person takes through the dashboard, for the browser tests and the screenshots."""

from __future__ import annotations

import re
from dataclasses import dataclass

from playwright.sync_api import Locator, Page, expect

# A worker starts by importing torch; on a busy machine that alone takes a while.
PATIENCE_MS = 300_000
# A page that answers within half a second on a quiet machine takes some on a busy one.
expect.set_options(timeout=30_000)

# Where a heatmap's cell lies on the page, and whose it is: Plotly keeps the edges of the drawn
# cells in calcdata, in the units of its axes.
CELL = """([figure, column, row, plan]) => {
  const heatmaps = figure.calcdata.map(([first]) => first)
    .filter((first) => first?.trace?.type === "heatmap" && first.trace.hoverinfo !== "skip");
  const drawn = heatmaps[plan ? heatmaps.length - 1 : 0];
  const { x, y, trace } = drawn;
  const { xaxis, yaxis } = figure._fullLayout._plots[trace.xaxis + trace.yaxis];
  const box = figure.getBoundingClientRect();
  const custom = trace.customdata[row][column];
  return {
    x: box.left + xaxis._offset + xaxis.c2p((x[column] + x[column + 1]) / 2),
    y: box.top + yaxis._offset + yaxis.c2p((y[row] + y[row + 1]) / 2),
    name: Array.isArray(custom) ? custom[0] : custom,
  };
}"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a heatmap: where it is on the page and which layer it stands for."""

    x: float
    y: float
    name: str


def go(page: Page, title: str) -> None:
    """Open a step through the navigation and wait until it is drawn."""
    page.get_by_role("link", name=title, exact=True).first.click()
    page.wait_for_url(re.compile(rf"/{title.lower()}|/\?"), timeout=PATIENCE_MS)
    settled(page)


def settled(page: Page) -> None:
    """Wait until no script runs, and fail on an error that reached the page."""
    page.wait_for_function(
        "() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState"
        " === 'notRunning' && !document.querySelector('[data-testid=stSpinner]')",
        timeout=PATIENCE_MS,
    )
    assert page.locator("[data-testid=stException]").count() == 0, page.inner_text("body")


def start_trial(page: Page, seeds: int, **fields: int) -> None:
    """Set up a quick look on the page Watch and start it.

    Args:
        page: On Watch, with a plan.
        seeds: How many.
        fields: Labels of other fields in lower case with "_" for spaces, and their values.
    """
    page.get_by_text("Settings", exact=True).click()
    labels = {
        "steps": "Steps",
        "batch_size": "Batch size",
        "image_size": "Image size (px)",
        "training_images": "Training images",
        "validation_images": "Validation images",
        "validate_every": "Validate every (steps)",
    }
    for name, value in fields.items():
        fill(page, labels[name], str(value))
    fill(page, "Seeds, quick look", str(seeds))
    page.get_by_role("button", name=f"Quick look, {seeds} seeds", exact=True).click()


def fill(page: Page, label: str, value: str) -> None:
    """Type into the field of that label and leave it."""
    # A heading of the page that is still there may bear the same name.
    fields = page.get_by_label(label, exact=True).and_(page.locator("input, textarea"))
    field = fields.locator("visible=true").first
    field.fill(value)
    field.press("Tab")
    settled(page)


def measure(page: Page, *, images: int) -> None:
    """Measure the present choice on so many images and wait for the heatmap."""
    start_measuring(page, images=images)
    expect(page.locator("[data-testid=stMain]")).to_contain_text(
        f"{images} images of", timeout=PATIENCE_MS
    )
    settled(page)
    heatmap(page)


def start_measuring(page: Page, *, images: int) -> None:
    """Start to measure the present choice on so many images."""
    go(page, "Look")
    again = page.get_by_role("button", name="Measure again")
    if again.count():
        again.click()
        page.wait_for_timeout(500)
    fill(page, "Images", str(images))
    start = page.get_by_role("button", name=re.compile("^Measure( now)?$"))
    start.locator("visible=true").first.click()
    expect(page.get_by_role("button", name="Stop").first).to_be_visible(timeout=PATIENCE_MS)


def heatmap(page: Page) -> Locator:
    """Return the first drawn heatmap of the page."""
    found = page.locator(".js-plotly-plot:has(.heatmaplayer .hm)").first
    expect(found).to_be_visible(timeout=PATIENCE_MS)
    return found


def cell(page: Page, *, column: int, row: int = 0, plan: bool = False) -> Cell:
    """Return where a cell of the strip is, scrolled into view.

    Args:
        page: On Look.
        column: Which layer, in forward order.
        row: Which metric, from the top.
        plan: In the plan's row instead, in which a click picks.
    """
    figure = heatmap(page)
    figure.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    found = page.evaluate(CELL, [figure.element_handle(), column, 0 if plan else row, plan])
    return Cell(**found)


def click_cell(
    page: Page, *, column: int, row: int = 0, plan: bool = False, shift: bool = False
) -> str:
    """Click a cell of the strip and return the name of its layer."""
    target = cell(page, column=column, row=row, plan=plan)
    if shift:
        page.keyboard.down("Shift")
    page.mouse.click(target.x, target.y)
    if shift:
        page.keyboard.up("Shift")
    settled(page)
    return target.name


def plan_line(page: Page) -> str:
    """Return what the sidebar says of the plan."""
    return page.locator("[data-testid=stSidebar]").inner_text()


def choose_by_name(page: Page, name: str) -> None:
    """Ask for a timm or torchvision network by name on the first page."""
    page.get_by_text("timm, torchvision", exact=True).locator("visible=true").first.click()
    settled(page)
    box = page.get_by_role("combobox", name=re.compile("Name")).locator("visible=true").first
    box.click()
    box.fill(name)
    page.get_by_role("option").filter(has_text=name).first.click()
    settled(page)
    page.get_by_role("button", name="Use this network").click()


def make_by_rule(page: Page, title: str, **fields: str) -> None:
    """On Look, choose a rule by its title, fill its fields, and wait for its plan."""
    page.get_by_text("Choose by a published rule").click()
    box = page.locator("[data-testid=stSelectbox]").filter(has_text="Rule").locator("input").first
    box.click()
    page.wait_for_timeout(500)
    page.keyboard.type(title)
    page.wait_for_timeout(500)
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    settled(page)
    for label, value in fields.items():
        fill(page, label, value)
    page.get_by_role("button", name="Make the plan").click()
    expect(page.get_by_text("The rule made a plan")).to_be_visible(timeout=PATIENCE_MS)
    settled(page)
