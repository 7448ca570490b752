"""What stands between the port and the pages: a token beyond loopback, and headers everywhere.

On loopback the server asks for nothing. Where other machines can reach it, every request must
show that its sender knows the token: for the page itself, its files, the websocket, uploads,
pictures and the server's metrics. Only `/_stcore/health` answers without it, with "ok".

The token is given once: in the address (`?token=`), in the form that is shown to those without it,
or in an `Authorization: Bearer` header. After that a cookie of the browser session stands for it.
The cookie is a separate secret, drawn at every start, so guessing cookies tells nothing about a
token that a person made up.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import os
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from streamlit import config

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_VARIABLE = "LIMBER_TOKEN"
# Long enough that ten tries a minute and address never find it, whatever it is made of.
LEAST_TOKEN = 16
WRONG_TRIES = 10
WRONG_WINDOW_S = 60.0
KNOWN_ADDRESSES = 4096
FORM_BYTES = 4096
HEALTH = "/_stcore/health"
# The hosts of the committed configuration. No other machine can call the server by these names.
OWN_HOSTS = ("localhost", "127.0.0.1")

# Nothing on a page comes from another host. A name can be made to load a picture from one, which
# would tell that host who is looking; this stops it even if a page showed the name raw. Streamlit's
# own pages need inline styles and scripts, and Plotly builds functions from text.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    # For browsers that do not know frame-ancestors.
    "x-frame-options": "SAMEORIGIN",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}
FORM_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}
FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Limber</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --back: #FBFBFA; --text: #10181A; --accent: #1F6F78;
  --edge: #8A9496; --wrong: #A3261B; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #101416; --text: #E3E8E8;
  --accent: #2B818B; --edge: #7A8587; --wrong: #FF8A7A; }} }}
body {{ background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
  margin: 0; padding: 12vh 1.25rem 2rem; }}
main {{ max-width: 26rem; margin: 0 auto; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .5rem; }}
label {{ display: block; margin: 1.25rem 0 .25rem; }}
input, button {{ font: inherit; box-sizing: border-box; width: 100%; padding: .6rem .75rem;
  border-radius: .5rem; }}
input {{ border: 1px solid var(--edge); background: transparent; color: inherit; }}
button {{ border: 0; margin-top: .75rem; background: var(--accent); color: #fff; cursor: pointer; }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 2px; }}
.wrong {{ color: var(--wrong); }}
</style></head><body><main>
<h1>Limber</h1>
<p>This server can be reached from other machines, so it asks for a token. It was printed in the
terminal where Limber was started, or is the one in {variable} there.</p>
<form method="post">
<label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="off" required autofocus>
{wrong}<button>Open</button>
</form></main></body></html>
"""
WRONG = '<p class="wrong" role="alert">{}</p>\n'


class TokenError(ValueError):
    """The token in the environment cannot be used."""


def is_loopback(host: str | None) -> bool:
    """Whether an address can be reached only from this machine.

    Args:
        host: An address to bind or connect to; empty or None means every interface.
    """
    if not host:
        return False
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class WrongTries:
    """How often each address gave a wrong token lately; bounded, the quietest forgotten first."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()

    def too_many(self, address: str) -> bool:
        """Whether this address has to wait."""
        tries = self._by_address.get(address)
        if tries is None:
            return False
        while tries and time.monotonic() - tries[0] > WRONG_WINDOW_S:
            tries.popleft()
        return len(tries) >= WRONG_TRIES

    def note(self, address: str) -> None:
        """Count one more."""
        tries = self._by_address.setdefault(address, deque(maxlen=WRONG_TRIES))
        tries.append(time.monotonic())
        self._by_address.move_to_end(address)
        while len(self._by_address) > KNOWN_ADDRESSES:
            self._by_address.popitem(last=False)


@dataclass(slots=True)
class Door:
    """Whether this server asks for a token, and which.

    Attributes:
        token: What a person has to show.
        told: The token came from the environment, so it need not be printed.
        beyond: The server can be reached from other machines.
        pass_: The value of the cookie that stands for the token.
        tries: Recent wrong tokens.
    """

    token: str
    told: bool
    beyond: bool
    pass_: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    tries: WrongTries = field(default_factory=WrongTries)

    def announcement(self) -> str:
        """Return what to print at the start; empty on loopback."""
        if not self.beyond:
            return ""
        said = "the one in " + TOKEN_VARIABLE if self.told else "in this address"
        query = "" if self.told else f"?token={self.token}"
        address = config.get_option("server.address") or "0.0.0.0"
        name = socket.gethostname() if address in ("0.0.0.0", "::") else address
        base = (config.get_option("server.baseUrlPath") or "").strip("/")
        scheme = "https" if config.get_option("server.sslCertFile") else "http"
        return (
            "  Limber can be reached from other machines, so it asks for a token, which is "
            f"{said}:\n\n  {scheme}://{name}:{config.get_option('server.port')}/"
            f"{base + '/' if base else ''}{query}\n"
        )


_door: Door | None = None


def open_door() -> Door:
    """Decide from the configuration whether to ask for a token, and keep to it from then on.

    Raises:
        TokenError: The token in the environment is too short.
    """
    global _door  # noqa: PLW0603 - one server a process, and its pages ask after its door
    given = os.environ.get(TOKEN_VARIABLE, "")
    beyond = not is_loopback(config.get_option("server.address"))
    if beyond and given and len(given) < LEAST_TOKEN:
        raise TokenError(
            f"{TOKEN_VARIABLE} has {len(given)} characters; give at least {LEAST_TOKEN}, or unset "
            "it to have one drawn."
        )
    if beyond and tuple(config.get_option("server.allowedHosts")) == OWN_HOSTS:
        # They keep foreign pages away from a server that asks for nothing. Here the cookie does
        # that, and other machines call this one by other names.
        config.set_option("server.allowedHosts", [])
    _door = Door(token=given or secrets.token_urlsafe(24), told=bool(given), beyond=beyond)
    return _door


def beyond() -> bool:
    """Whether this server can be reached from other machines."""
    if _door is not None:
        return _door.beyond
    return not is_loopback(config.get_option("server.address"))


def _from_elsewhere(scope: Scope) -> bool:
    """Whether a page of another port of this host asks for a websocket.

    A browser sends the cookie to all ports of a host. Other hosts are Streamlit's own affair.
    """
    headers = Headers(scope=scope)
    origin, host = headers.get("origin", ""), headers.get("host", "")
    if scope["type"] != "websocket" or not origin:
        return False
    try:
        asking, asked = urlsplit(origin), urlsplit(f"//{host}")
        usual = {"http": 80, "https": 443}.get(asking.scheme)
        # A proxy may leave the port out; then there is nothing to compare.
        return asked.port is not None and (asking.port or usual) != asked.port
    except ValueError:
        return True


def is_closed() -> bool:
    """Whether other machines reach this server and nothing stands in front of its pages.

    That is so where the script of the pages is started by itself instead of the application.
    """
    return _door is None and beyond()


class Gate:
    """ASGI middleware: asks for the token where the door says so, and sets headers."""

    def __init__(self, app: ASGIApp, *, door: Door) -> None:
        """Stand in front of `app`."""
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if self._asks(scope) and (not self._shown(scope) or _from_elsewhere(scope)):
            await self._ask(scope, receive, send)
            return
        await self._app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _asks(self, scope: Scope) -> bool:
        server = scope.get("server") or (None, None)
        if not is_loopback(server[0]):
            # The server was started in a way that the configuration does not know of.
            self._door.beyond = True
        return self._door.beyond and scope["path"] != _based(HEALTH)

    def _shown(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        cookie = _cookies(headers.get("cookie", "")).get(_cookie_name(scope), "")
        if hmac.compare_digest(cookie.encode(), self._door.pass_.encode()):
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self._right(scope, given.strip())

    def _right(self, scope: Scope, given: str) -> bool:
        address = (scope.get("client") or ("",))[0]
        if self._door.tries.too_many(address):
            return False
        if hmac.compare_digest(given.encode(), self._door.token.encode()):
            return True
        self._door.tries.note(address)
        return False

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            # Before it is accepted, so that the browser sees a plain 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        given = query.pop("token", None)
        if scope["method"] == "POST" and given is None:
            given = await _form_token(receive)
        if given is not None and self._right(scope, given):
            answer = _onward(scope, query, self._door.pass_)
        else:
            waits = self._door.tries.too_many((scope.get("client") or ("",))[0])
            answer = _refusal(scope, wrong=given is not None, waits=waits)
        await answer(scope, receive, send)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _based(path: str) -> str:
    base = (config.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{base}{path}" if base else path


def _cookie_name(scope: Scope) -> str:
    # Cookies ignore ports: two servers on one machine must not overwrite each other's.
    return f"limber-{(scope.get('server') or (None, 0))[1]}"


def _cookies(text: str) -> dict[str, str]:
    pairs = (pair.strip().partition("=") for pair in text.split(";"))
    return {name: value for name, _, value in pairs}


async def _form_token(receive: Receive) -> str | None:
    body = b""
    while True:
        message: MutableMapping[str, Any] = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > FORM_BYTES:
            return None
        if not message.get("more_body", False):
            break
    fields = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    return fields.get("token")


def _onward(scope: Scope, query: dict[str, str], pass_: str) -> Response:
    # Relative, so that it works behind a proxy that serves this below a path, and can never lead to
    # another host.
    last = scope["path"].rpartition("/")[2]
    location = f"./{quote(last)}" + (f"?{urlencode(query)}" if query else "")
    answer = Response(status_code=303, headers={"location": location, **FORM_HEADERS})
    # Without a maximum age: it ends with the browser session.
    answer.set_cookie(
        _cookie_name(scope),
        pass_,
        httponly=True,
        samesite="lax",
        secure=scope.get("scheme") == "https",
    )
    return answer


def _refusal(scope: Scope, *, wrong: bool, waits: bool) -> Response:
    status = 429 if wrong and waits else 403
    headers = {**FORM_HEADERS, **({"retry-after": f"{WRONG_WINDOW_S:.0f}"} if waits else {})}
    words = ""
    if wrong:
        words = (
            "Too many wrong tokens. Wait a minute, then try again."
            if waits
            else "That is not the token."
        )
    accepted = Headers(scope=scope).get("accept", "")
    if scope["method"] not in ("GET", "POST") or "text/html" not in accepted:
        text = words or "Open the page with the token first."
        return PlainTextResponse(f"{text}\n", status_code=status, headers=headers)
    page = FORM.format(
        variable=TOKEN_VARIABLE, wrong=WRONG.format(html.escape(words)) if words else ""
    )
    return HTMLResponse(page, status_code=status, headers=headers)
