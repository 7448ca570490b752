"""How fast the first page is in a real browser, and what it costs the server.

python -m tests.page_speed [--out assets/page_speed.json]

Medians of ten on the embedded example: page open to heatmap, a pick to its mark, a click to the
open layer, and what a pick moves over the network; the server's memory with one and ten sessions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page

from tests import journey
from tests.browser import ServedApp, open_page, serve_app

TIMES = 10
SESSIONS = 10
FIRST_LAYER = 8
MARKS = """() => JSON.stringify(
  document.querySelector('.js-plotly-plot').layout.shapes.map((shape) => [shape.x0, shape.x1]))"""


def opened(page: Page, url: str) -> float:
    """Return seconds from asking for the page to the drawn heatmap."""
    begun = time.perf_counter()
    page.goto(url)
    page.wait_for_selector(".js-plotly-plot .heatmaplayer .hm")
    return time.perf_counter() - begun


def picked(page: Page, column: int) -> float:
    """Return seconds from a click in the plan's row to the mark of the pick."""
    target = journey.cell(page, column=column, plan=True)
    before = page.evaluate(MARKS)
    begun = time.perf_counter()
    page.mouse.click(target.x, target.y)
    page.wait_for_function(f"(before) => ({MARKS})() !== before", arg=before)
    seconds = time.perf_counter() - begun
    journey.settled(page)
    return seconds


def layer_opened(page: Page, column: int) -> float:
    """Return seconds from a click on a figure to the layer's name next to the strip."""
    target = journey.cell(page, column=column, row=1)
    begun = time.perf_counter()
    page.mouse.click(target.x, target.y)
    page.get_by_role("heading", name=target.name, exact=True).wait_for()
    seconds = time.perf_counter() - begun
    journey.settled(page)
    return seconds


def memory_mb(app: ServedApp) -> float:
    """Return the server's resident memory."""
    status = Path(f"/proc/{app.pid}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _median(measure: Callable[[int], float]) -> float:
    return round(statistics.median(measure(turn) for turn in range(TIMES)), 3)


def measured(app: ServedApp) -> dict[str, object]:
    """Return the figures of one running server."""
    with open_page(app.url, errors=[]) as page:
        opened(page, app.url)
        journey.settled(page)
        browser = page.context.browser
        assert browser is not None
        alone = memory_mb(app)
        fresh = page.context.new_page()
        found: dict[str, object] = {"open_s": _median(lambda _: opened(fresh, app.url))}
        fresh.close()
        moved = [0]
        channel = page.context.new_cdp_session(page)
        channel.send("Network.enable")
        channel.on(
            "Network.webSocketFrameReceived",
            lambda event: moved.append(len(event["response"]["payloadData"]) * 3 // 4),
        )
        found["pick_s"] = _median(lambda turn: picked(page, FIRST_LAYER + 2 * turn))
        found["pick_kb"] = round(sum(moved) / TIMES / 1000)
        found["layer_s"] = _median(lambda turn: layer_opened(page, FIRST_LAYER + 3 * turn))
        others = [browser.new_context().new_page() for _ in range(SESSIONS - 1)]
        for other in others:
            opened(other, app.url)
            journey.settled(other)
        found["memory_mb"] = {"1": round(alone), str(SESSIONS): round(memory_mb(app))}
    return found


def main() -> None:
    """Serve the app, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve_app(Path(folder) / "home") as app:
        found = {"machine": platform.machine(), "times": TIMES, **measured(app)}
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
