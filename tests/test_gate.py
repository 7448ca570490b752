"""What a stranger on the port can see and name: the gate, the roots of paths."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamlit import config

from core.errors import LimberError
from dashboard import gate
from dashboard.store import roots

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-of-some-length"

# Every kind of thing that Streamlit serves, and addresses that it does not know.
PATHS = (
    "/",
    "/measure",
    "/_stcore/metrics",
    "/_stcore/host-config",
    "/_stcore/script-health-check",
    "/_stcore/upload_file/session/file",
    "/_stcore/healthy",
    "/_stcore/health/",
    "//_stcore/health",
    "/media/0123.png",
    "/limber/plot/plot.js",
    "/limber/plot/plotly.min.js",
    "/static/js/index.js",
    "/app/static/x",
    "/auth/login",
    "/oauth2callback",
    "/favicon.png",
)


async def _behind(scope: Any, receive: Any, send: Any) -> None:
    """Stand in for Streamlit: whoever reads this came through."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"came through"})


class Asked:
    """What the gate answers to one request."""

    def __init__(self, door: gate.Door, path: str = "/", **given: Any) -> None:
        kind = given.pop("kind", "http")
        headers = {"accept": "text/html", **given.pop("headers", {})}
        scope = {
            "type": kind,
            "method": given.pop("method", "GET"),
            "path": path,
            "query_string": given.pop("query", "").encode(),
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
            "server": (given.pop("server", "192.0.2.7"), 8501),
            "client": (given.pop("client", "192.0.2.9"), 40000),
            "scheme": given.pop("scheme", "http"),
        }
        body = given.pop("body", b"")
        assert not given, given
        self.sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        asyncio.run(gate.Gate(_behind, door=door)(scope, receive, send))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(each.get("body", b"") for each in self.sent).decode()

    @property
    def cookie(self) -> str:
        return self.headers["set-cookie"].partition(";")[0]


def door(*, beyond: bool = True) -> gate.Door:
    return gate.Door(token=TOKEN, told=False, beyond=beyond)


@pytest.fixture
def address() -> Iterator[Any]:
    """Set the address of the configuration for one test."""
    before = {key: config.get_option(key) for key in ("server.address", "server.allowedHosts")}
    known = gate._door
    yield lambda value: config.set_option("server.address", value)
    for key, value in before.items():
        config.set_option(key, value)
    gate._door = known


# --- the token ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST", "HEAD", "OPTIONS"])
def test_nothing_is_served_without_the_token(path: str, method: str) -> None:
    answer = Asked(door(), path, method=method)

    assert answer.status == 403
    assert "came through" not in answer.text


def test_the_websocket_is_refused_before_it_is_accepted() -> None:
    sent = Asked(door(), "/_stcore/stream", kind="websocket").sent

    assert [each["type"] for each in sent] == ["websocket.close"]


def test_only_the_health_of_the_server_is_told_to_anyone() -> None:
    assert Asked(door(), "/_stcore/health").status == 200


def test_the_token_in_the_address_gives_a_cookie_and_leaves_the_address() -> None:
    entry = door()

    answer = Asked(entry, "/measure", query=f"w=0123&token={TOKEN}")

    assert answer.status == 303
    assert answer.headers["location"] == "./measure?w=0123"
    assert TOKEN not in str(answer.headers)
    attributes = answer.headers["set-cookie"].lower()
    assert "httponly" in attributes
    assert "samesite=lax" in attributes
    # Neither an age nor a date: the cookie ends with the browser.
    assert "max-age" not in attributes
    assert "expires" not in attributes
    for kind in ("http", "websocket"):
        passed = Asked(entry, "/", kind=kind, headers={"cookie": f"a=b; {answer.cookie}; c"})
        assert passed.sent[0]["type"] in ("http.response.start", "websocket.accept")
        assert passed.sent[0].get("status", 200) == 200


@pytest.mark.parametrize(
    ("origin", "host", "through"),
    [
        ("http://limber.example:8501", "limber.example:8501", True),
        ("http://limber.example", "limber.example:80", True),
        ("https://limber.example", "limber.example:443", True),
        # A proxy may leave the port out.
        ("https://limber.example:8443", "limber.example", True),
        ("", "limber.example:8501", True),
        ("http://limber.example:9999", "limber.example:8501", False),
        ("http://limber.example", "limber.example:8501", False),
        ("https://limber.example", "limber.example:80", False),
        ("http://limber.example:no", "limber.example:8501", False),
    ],
)
def test_a_page_of_another_port_of_this_host_gets_no_websocket(
    origin: str, host: str, through: bool
) -> None:
    entry = door()
    headers = {"cookie": f"limber-8501={entry.pass_}", "host": host}
    if origin:
        headers["origin"] = origin

    sent = Asked(entry, "/_stcore/stream", kind="websocket", headers=headers).sent

    assert (sent[0]["type"] == "websocket.accept") is through


@pytest.mark.parametrize(
    ("listens", "opened", "closed"),
    [
        ("0.0.0.0", False, True),
        ("0.0.0.0", True, False),
        ("127.0.0.1", False, False),
        ("127.0.0.1", True, False),
    ],
)
def test_the_pages_started_without_the_application_are_closed_beyond_loopback(
    address: Any, monkeypatch: pytest.MonkeyPatch, listens: str, opened: bool, closed: bool
) -> None:
    address(listens)
    monkeypatch.setattr(gate, "_door", door() if opened else None)

    assert gate.is_closed() is closed


def test_the_form_takes_the_token_too() -> None:
    entry = door()

    answer = Asked(entry, "/", method="POST", body=urlencode({"token": TOKEN}).encode())

    assert answer.status == 303
    assert answer.cookie == f"limber-8501={entry.pass_}"


def test_a_header_with_the_token_opens_every_request() -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "accept": "*/*"}

    assert Asked(door(), "/_stcore/metrics", headers=headers).text == "came through"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_cookie_is_kept_to_https_where_that_is_spoken(scheme: str) -> None:
    cookie = Asked(door(), query=f"token={TOKEN}", scheme=scheme).headers["set-cookie"]

    assert ("secure" in cookie.lower()) == (scheme == "https")


@given(st.text(max_size=60), st.sampled_from(["query", "form", "bearer", "cookie"]))
def test_no_other_text_opens(text: str, way: str) -> None:
    plain = text.encode("latin-1", "replace").decode("latin-1")
    given_ = {
        "query": {"query": urlencode({"token": text})},
        "form": {"method": "POST", "body": urlencode({"token": text}).encode()},
        "bearer": {"headers": {"authorization": f"Bearer {plain}"}},
        "cookie": {"headers": {"cookie": f"limber-8501={plain}"}},
    }[way]

    assert Asked(door(), **given_).status == 403


@pytest.mark.parametrize(
    "path", ["//evil.example", "/\\evil.example", "/a/..//evil.example", "/x:y", "/%0d%0aA:b", "/é"]
)
def test_the_way_on_never_leads_to_another_host(path: str) -> None:
    place = Asked(door(), path, query=f"token={TOKEN}").headers["location"]

    assert place.startswith("./")
    assert "//" not in place
    assert place.isascii()


def test_wrong_tokens_have_to_wait_and_others_need_not() -> None:
    entry = door()
    codes = [Asked(entry, query=f"token=wrong-{i}").status for i in range(gate.WRONG_TRIES + 2)]

    assert codes[0] == 403
    assert codes[-1] == 429
    assert Asked(entry, query=f"token={TOKEN}").status == 429
    assert Asked(entry, query=f"token={TOKEN}", client="192.0.2.10").status == 303
    # Whoever is in already stays in.
    cookie = f"limber-8501={entry.pass_}"
    assert Asked(entry, headers={"cookie": cookie}).status == 200


def test_wrong_tries_are_forgotten_in_time_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gate.time, "monotonic", lambda: now[0])
    tries = gate.WrongTries()
    for _ in range(gate.WRONG_TRIES):
        tries.note("a")
    waits = tries.too_many("a")
    now[0] = gate.WRONG_WINDOW_S + 1
    for i in range(gate.KNOWN_ADDRESSES + 10):
        tries.note(str(i))

    assert waits
    assert not tries.too_many("a")
    assert len(tries._by_address) == gate.KNOWN_ADDRESSES


def test_a_long_form_is_not_read_to_its_end() -> None:
    body = b"x" * (gate.FORM_BYTES + 1) + b"&token=" + TOKEN.encode()

    assert Asked(door(), method="POST", body=body).status == 403


# --- loopback -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_on_loopback_nobody_is_asked(host: str) -> None:
    assert gate.is_loopback(host)
    assert Asked(door(beyond=False), server=host).text == "came through"


@pytest.mark.parametrize(
    "host",
    [None, "", "0.0.0.0", "::", "192.168.0.4", "10.0.0.1", "fe80::1", "a.example", "localhost."],
)
def test_anything_else_is_beyond_loopback(host: str | None) -> None:
    assert not gate.is_loopback(host)


def test_a_server_that_is_reached_from_elsewhere_asks_whatever_its_configuration_says() -> None:
    entry = door(beyond=False)

    assert Asked(entry, server="192.0.2.7").status == 403
    # From then on it knows.
    assert entry.beyond
    assert Asked(entry, server="127.0.0.1").status == 403


@pytest.mark.parametrize(
    ("host", "asks"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True), (None, True)]
)
def test_the_configured_address_decides(
    address: Any, monkeypatch: pytest.MonkeyPatch, host: str | None, asks: bool
) -> None:
    monkeypatch.delenv(gate.TOKEN_VARIABLE, raising=False)
    address(host)
    config.set_option("server.allowedHosts", list(gate.OWN_HOSTS))

    opened = gate.open_door()

    assert opened.beyond == gate.beyond() == asks
    assert (opened.token in opened.announcement()) == asks
    assert len(opened.token) >= gate.LEAST_TOKEN
    # Other machines know this one by other names.
    assert (config.get_option("server.allowedHosts") == []) == asks
    assert gate.open_door().token != opened.token


def test_a_token_of_ones_own_is_not_printed(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address("0.0.0.0")
    monkeypatch.setenv(gate.TOKEN_VARIABLE, TOKEN)

    opened = gate.open_door()

    assert opened.token == TOKEN
    assert TOKEN not in opened.announcement()
    assert gate.TOKEN_VARIABLE in opened.announcement()


# --- headers --------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [True, False])
def test_every_answer_carries_frame_and_content_headers(beyond: bool) -> None:
    entry = door(beyond=beyond)
    cookie = {"cookie": f"limber-8501={entry.pass_}"}

    headers = Asked(entry, headers=cookie, server="127.0.0.1").headers

    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert "img-src 'self' data: blob:" in headers["content-security-policy"]


def test_the_form_allows_no_frame_and_no_store() -> None:
    headers = Asked(door()).headers

    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert "script-src" not in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]


# --- paths ----------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, limber_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may be read and one that may not, with a link from the first to the second."""
    for name in ("in", "out", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "set").mkdir()
    (tmp_path / "in" / "set.zip").write_bytes(b"zip")
    (tmp_path / "out" / "secret.zip").write_bytes(b"zip")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "file-link.zip").symlink_to(tmp_path / "out" / "secret.zip")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in" / "loop")
    (tmp_path / "in" / "own-link").symlink_to(tmp_path / "in" / "set")
    os.mkfifo(tmp_path / "in" / "pipe")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv(roots.ROOTS_VARIABLE, str(tmp_path / "in"))
    monkeypatch.setenv("HOME", str(tmp_path / "out"))
    return tmp_path


OUTSIDE = (
    "{out}",
    "{out}/secret.zip",
    "{out}/nothing.zip",
    "{in}/../out/secret.zip",
    "{in}/link/secret.zip",
    "{in}/link/nothing",
    "{in}/link",
    "{in}/file-link.zip",
    "{in}/loop/../../out",
    "{in}x",
    "{in}/pipe",
    "~",
    "~/secret.zip",
    "~root/x.zip",
    "..",
    "../out",
    "/",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "/etc/passwd",
    "{in}/\0/../../out",
    "{in}/" + "n" * 5000,
    "/" + "n" * 300,
)


def _named(tree: Path, pattern: str) -> str:
    return pattern.format(**{"in": tree / "in", "out": tree / "out"})


@pytest.mark.parametrize("pattern", OUTSIDE)
@pytest.mark.parametrize("prefix", ["", "torchvision:CIFAR10:"])
def test_paths_outside_the_roots_get_one_sentence_whatever_lies_there(
    tree: Path, pattern: str, prefix: str
) -> None:
    path = _named(tree, pattern)

    with pytest.raises(LimberError) as caught:
        roots.permitted_data(f"{prefix}{path}", frozenset({"bloodmnist"}))

    assert str(caught.value).replace(path, "PATH") == (
        '"PATH" is outside the folders that this server reads. Upload the file, or let whoever '
        "runs the server name its folder in LIMBER_ROOTS."
    )


@pytest.mark.parametrize(
    "pattern", ["{in}", "{in}/set", "{in}/set.zip", "{in}/set/../set.zip", "{in}/nothing", "x.zip"]
)
def test_paths_inside_the_roots_pass(tree: Path, pattern: str) -> None:
    path = _named(tree, pattern)

    assert roots.permitted_path(path) == os.path.realpath(path)


def test_links_inside_the_roots_are_followed_and_kept_as_what_they_lead_to(tree: Path) -> None:
    assert roots.permitted_path(str(tree / "in" / "own-link")) == str(tree / "in" / "set")


def test_names_of_sets_are_no_paths(tree: Path) -> None:
    assert roots.permitted_data("bloodmnist", frozenset({"bloodmnist"})) == "bloodmnist"


def test_on_loopback_every_path_may_be_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(roots.ROOTS_VARIABLE)

    assert roots.permitted_path("~/secret.zip") == "~/secret.zip"


def test_beyond_loopback_paths_are_confined_to_the_working_directory(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(roots.ROOTS_VARIABLE)
    monkeypatch.setattr(gate, "_door", door())

    assert roots.permitted_path("here.zip") == str(tree / "work" / "here.zip")
    with pytest.raises(LimberError, match="outside the folders"):
        roots.permitted_path(str(tree / "in" / "set.zip"))


def test_what_is_plainly_outside_is_refused_without_a_look_at_the_disk(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    real = os.path.realpath
    monkeypatch.setattr(
        os.path, "realpath", lambda path, **how: looked.append(str(path)) or real(path, **how)
    )

    with pytest.raises(LimberError):
        roots.permitted_path(str(tree / "out" / "secret.zip"))

    assert not [path for path in looked if "secret" in path]
