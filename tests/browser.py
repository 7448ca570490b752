"""A Chromium, a page in it and a running dashboard, for the tests that need them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# No sandbox, because CI runs as root; the rest keeps Chromium from talking to the network.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

START_LIMIT_S = 90.0
STOP_LIMIT_S = 8.0


class BrowserMissingError(RuntimeError):
    """No Chromium was found, and none could be installed."""


def find_chromium() -> Path | None:
    """Return the Chromium to use, or None.

    Raises:
        BrowserMissingError: LIMBER_CHROMIUM names a file that is not there.
    """
    named = os.environ.get("LIMBER_CHROMIUM")
    if named:
        if shutil.which(named) is None:
            raise BrowserMissingError(
                f'LIMBER_CHROMIUM is "{named}", which is not a program here; '
                "correct it, or unset it to let the tests look for one."
            )
        return Path(named)
    for command in COMMANDS:
        found = shutil.which(command)
        if found:
            return Path(found)
    return _playwrights_own()


def ensure_chromium() -> Path:
    """Return the Chromium to use, installing one where there is none.

    Raises:
        BrowserMissingError: None was found and no way of installing it worked.
    """
    found = find_chromium()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _try("apt-get", "update")
        _try("apt-get", "install", "-y", "chromium")
        found = find_chromium()
    if found is None:
        _try(sys.executable, "-m", "playwright", "install", "chromium")
        found = find_chromium()
    if found is None:
        raise BrowserMissingError(
            "The browser tests need Chromium, and neither apt-get nor Playwright could install "
            "it; install it by hand, or set LIMBER_CHROMIUM to its path."
        )
    return found


@contextmanager
def open_page(
    url: str,
    *,
    width: int = 1440,
    height: int = 900,
    dark: bool = False,
    errors: list[str] | None = None,
) -> Iterator[Page]:
    """Open the address in a fresh browser and yield its page.

    A second session beside it is `page.context.browser.new_context()`; a second `open_page` is
    not possible, because Playwright's driver runs once in a thread.

    Args:
        url: Address to open.
        width: Of the window, in pixels.
        height: Of the window, in pixels.
        dark: Whether the system asks for a dark theme.
        errors: Receives every uncaught error and every error on the console. Without it, the
            first block that ends with such errors raises AssertionError.
    """
    from playwright.sync_api import sync_playwright

    found = [] if errors is None else errors
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=ensure_chromium(), args=list(FLAGS))
        try:
            page = chromium.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
            ).new_page()
            page.on("pageerror", lambda error: found.append(f"uncaught: {error}"))
            page.on("console", lambda message: _note_error(message, found))
            page.goto(url)
            yield page
        finally:
            chromium.close()
    if errors is None and found:
        raise AssertionError("The page reported errors:\n" + "\n".join(found))


def _note_error(message: ConsoleMessage, found: list[str]) -> None:
    # Opened below the root, Streamlit's page looks for its server there first, and then above.
    address = str(message.location.get("url", ""))
    probing = re.search(r"/\w+/_stcore/(health|host-config)$", address)
    if message.type == "error" and not probing:
        found.append(f"console: {message.text} {address}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedApp:
    """A running dashboard."""

    url: str
    home: Path
    pid: int
    log_path: Path

    def log(self) -> str:
        """Return all that the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def serve_app(
    home: Path,
    *,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
) -> Iterator[ServedApp]:
    """Run the dashboard, yield it once it answers, and end it with all its workers.

    Args:
        home: Empty folder of this server alone, given to it as LIMBER_HOME.
        port: On 127.0.0.1; a free one when None.
        env: Environment variables on top of the present ones.
        address: What it listens on; the browser asks 127.0.0.1 in any case.

    Raises:
        RuntimeError: The server ended or did not answer in time; the message holds its log.
    """
    port = free_port() if port is None else port
    home.mkdir(parents=True, exist_ok=True)
    log_path = home.with_name(f"{home.name}-server.log")
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "streamlit", "run", "dashboard/app.py"),
                *("--server.address", address, "--server.port", str(port)),
                # Else Streamlit asks the network what it is called there, to print it.
                *("--browser.serverAddress", "127.0.0.1"),
            ],
            cwd=ROOT,
            env={**os.environ, **(env or {}), "LIMBER_HOME": str(home), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    app = ServedApp(url=f"http://127.0.0.1:{port}", home=home, pid=server.pid, log_path=log_path)
    try:
        _wait_until_healthy(server, app)
        yield app
    finally:
        _end(server, home)


def _playwrights_own() -> Path | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
    return own if own.exists() else None


def _try(*command: str) -> None:
    # The caller looks for the outcome, so a failed way in just leads to the next one.
    with suppress(OSError):
        subprocess.run(
            command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False
        )


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: subprocess.Popen[bytes], app: ServedApp) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with code {server.returncode}:\n{app.log()}")
        with (
            suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{app.url}/_stcore/health", timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"The server did not answer within {START_LIMIT_S:.0f} s:\n{app.log()}")


def _end(server: subprocess.Popen[bytes], home: Path) -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    # Workers live in process groups of their own and outlast the server; their home gives them
    # away.
    for worker in _processes_of(home):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def _processes_of(home: Path) -> list[int]:
    mark = b"LIMBER_HOME=" + os.fsencode(home)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]
