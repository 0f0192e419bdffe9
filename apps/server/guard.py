"""Guard: one middleware before every route, that decides who is let in and how much they may send.

A web page anywhere can send requests to this machine. What it cannot choose is the Host header after DNS rebinding (the
attacker's name), the Origin header of a write, and Sec-Fetch-Site. Each is compared with an allow-list, Origin before
Sec-Fetch-Site, since a native window's own writes are marked cross-site by some web views.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "edge_sd"
# Bytes of a body; OpenAI's limit of 50 MB for a picture.
MAX_BODY = 50_000_000
# Seconds in which a body has to come, and bytes a second that add to them.
BODY_SECONDS, BODY_PACE = 20.0, 100_000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::(\d{1,5}))?")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class Rules:
    """Who is let in.

    hosts      further names in the Host header, with a port or for any port; loopback names go with our own port
    origins    further values of Origin, such as "https://chat.example"
    token      what clients have to show; "" lets everyone in who reaches the port
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    token: str = ""


@dataclass(frozen=True)
class Refusal(Exception):
    """Why a request is not let in."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Guard:
    """ASGI middleware. `refuse(path, refusal)` makes the response in the shape of the API that was called."""

    def __init__(self, app: ASGIApp, rules: Rules, refuse: Callable[[str, Refusal], Response]) -> None:
        self.app, self.rules, self.refuse = app, rules, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "cache-control": "no-store"}.items():
                    found.setdefault(name, value)
            await send(message)

        try:
            check_host(headers, scope, self.rules)
            check_origin(headers, scope, self.rules)
            if not is_public(scope):
                check_token(headers, self.rules.token)
            limited = _Limited(receive, headers)
        except Refusal as refusal:
            await self.refuse(scope["path"], refusal)(scope, receive, guarded)
            return

        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            if limited.refusal is None or begun:
                # What a route makes of a body that was cut off is replaced below.
                begun = True
                await guarded(message)

        try:
            await self.app(scope, limited, noted)
        except Refusal:
            if begun:
                raise
        if limited.refusal is not None and not begun:
            await self.refuse(scope["path"], limited.refusal)(scope, receive, guarded)


def is_public(scope: Scope) -> bool:
    """The page itself, which holds nothing of anyone, and whether the server is up."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/page/"))


def check_host(headers: Headers, scope: Scope, rules: Rules) -> None:
    """Refuse a Host that is not ours: the one sign of a rebound name."""
    given = headers.getlist("host")
    match = HOST.fullmatch(given[0]) if len(given) == 1 else None
    if match is not None:
        name, port = match[1].strip("[]").lower(), int(match[2] or 80)
        server = scope.get("server") or ("", 0)
        own = name in LOOPBACK or name == str(server[0]).lower()
        if (own and port == server[1]) or given[0].lower() in rules.hosts or name in rules.hosts:
            return
    raise Refusal(403, "this Host is not served here; the option --allow-host lets one more in")


def check_origin(headers: Headers, scope: Scope, rules: Rules) -> None:
    """Refuse pages of other origins, `null` and mere embedding included."""
    origins = headers.getlist("origin")
    if origins:
        own = {f"{scheme}://{headers['host'].lower()}" for scheme in ("http", "https")}
        if len(origins) == 1 and (origins[0].lower() in own or origins[0] in rules.origins):
            return
        raise Refusal(403, "pages of this Origin are not let in; the option --allow-origin lets one more in")
    site = headers.get("sec-fetch-site", "none")
    followed = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET" and scope["path"] == "/"
    if site not in ("none", "same-origin") and not followed:
        raise Refusal(403, "pages of other sites are not let in")


def check_token(headers: Headers, token: str) -> None:
    """The token as Bearer, as the password of Basic (AUTOMATIC1111's clients), or as the page's cookie."""
    if not token:
        return
    kind, _, value = headers.get("authorization", "").partition(" ")
    shown = ""
    if kind.lower() == "bearer":
        shown = value.strip()
    elif kind.lower() == "basic":
        try:
            shown = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            shown = ""
    elif "cookie" in headers:
        try:
            morsel = SimpleCookie(headers["cookie"]).get(COOKIE)
        except CookieError:
            morsel = None
        shown = morsel.value if morsel is not None else ""
    if not hmac.compare_digest(shown.encode(), token.encode()):
        raise Refusal(
            401, "the token is missing or wrong", {"www-authenticate": 'Bearer, Basic realm="edge-sd", charset="UTF-8"'}
        )


class _Limited:
    """`receive` with a limit on the bytes and on the time of a body."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive, self._bytes, self._whole = receive, 0, False
        self.refusal: Refusal | None = None
        self._started: float | None = None
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise Refusal(400, "Content-Length is not a number")
        self._check(int(length))

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._started = self._started or now
        left = self._started + BODY_SECONDS + self._bytes / BODY_PACE - now
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            self.refusal = Refusal(408, "the body did not come in time", {"connection": "close"})
            raise self.refusal from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._check(self._bytes)
            self._whole = not message.get("more_body", False)
        else:
            self._whole = True
        return message

    def _check(self, count: int) -> None:
        if count > MAX_BODY:
            self.refusal = Refusal(413, f"the body has more than {MAX_BODY} bytes", {"connection": "close"})
            raise self.refusal
