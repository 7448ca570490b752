"""The server behind its gate, started as a person starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dashboard import gate

ROOT = Path(__file__).resolve().parent.parent


def test_a_short_token_ends_the_start_with_one_line() -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "streamlit", "run", "dashboard/app.py"),
            *("--server.address", "0.0.0.0", "--server.port", "0"),
            *("--browser.serverAddress", "localhost"),
        ],
        cwd=ROOT,
        env={**os.environ, gate.TOKEN_VARIABLE: "short"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1] == (
        f"limber: {gate.TOKEN_VARIABLE} has 5 characters; give at least {gate.LEAST_TOKEN}, or "
        "unset it to have one drawn."
    )
