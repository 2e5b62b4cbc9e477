"""Who may ask, from where, and how much: before any route, for all of them.

One check for every route, and it does not ask which route: whatever path a request spells (`//v1`, `/v1/../`, encoded,
in capitals, below a mount), it needs a known host, an origin that may ask and a key, where the server has keys. Nothing
is read from a path but these exact ones, compared as the bytes that came, so no other spelling can mean them:

- GET and HEAD of `/health`, which need none of it: who watches a server has no key, and learns one word.
- GET and HEAD of `/` and of plain file names below `/page/` need no key. A browser cannot send one when it opens a
  page; these are the files of the wheel, the same for everybody, and hold nothing of this server. What the page then
  asks for needs the key, which it asks its reader for. Host and origin are checked here too.
- POST of `/api/blobs/<digest>` is a model's file: it may be longer than `max_body_bytes` and take its time, as long as
  it does not stand still. Key, host and origin are checked as everywhere.

It is plain ASGI, put around the whole application: streams pass through piece by piece as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import socket
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pumice.server.bodies import MOST_VALUES, Budget, values, weight
from pumice.server.settings import Address, Settings
from pumice.server.streams import error_object
from pumice.server.wire import is_openai

Headers = list[tuple[bytes, bytes]]

LINGER_S = 10.0
"""How long a refused body is still taken in: closing at once would make the system throw the answer away unread."""
_LOCAL = ("localhost", "127.0.0.1", "0.0.0.0")
_SAFE_ORIGINS = (
    *(f"{scheme}://{host}{port}" for scheme in ("http", "https") for host in _LOCAL for port in ("", ":*")),
    *("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*"),
)
"""Ollama's: pages of this machine, and programs with pages of their own."""
_PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
    (
        b"access-control-allow-headers",
        b"Authorization,Content-Type,User-Agent,Accept,X-Requested-With,OpenAI-Beta,X-Stainless-Arch,X-Stainless-Async,"
        b"X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
        b"X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,"
        b"X-Stainless-Runtime-Version,X-Stainless-Timeout",
    ),
    (b"access-control-max-age", b"43200"),
]
_PAGE = re.compile(rb"/|/page(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_HEALTH = re.compile(rb"/health")
_UPLOAD = re.compile(rb"/api/blobs/[^/]+")
_NOSNIFF = (b"x-content-type-options", b"nosniff")
_GONE: Message = {"type": "http.disconnect"}


class Guard:
    """Around an application: `Guard(app, settings)` is one itself."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._is_loopback = Address(host=settings.host).is_loopback
        # Of one length, so that a comparison does not tell how long a key is.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self._bodies = Budget(settings.max_bodies_bytes)
        self._is_open = "*" in settings.origins
        origins = (re.escape(each).replace(r"\*", r"[^/\n]*") for each in (*settings.origins, *_SAFE_ORIGINS))
        self._origins = re.compile("|".join(origins), re.IGNORECASE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = _Exchange(scope, (receive, send), self._settings, self._bodies)
        if not _is_read(scope, _HEALTH) and not await self._admits(scope, exchange):
            return
        if exchange.is_too_long:
            await exchange.refuse(413)
            return
        await exchange.run(self._app)

    async def _admits(self, scope: Scope, exchange: _Exchange) -> bool:
        """May this request go on? Where not, it is answered."""
        host = _text(scope, b"host")
        if self._is_loopback and not _is_of_this_machine(host, scope):
            await exchange.refuse(403)
            return False
        origin = _text(scope, b"origin")
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            if not (self._is_open or self._origins.fullmatch(origin)):
                await exchange.refuse(403)
                return False
            exchange.headers += _allowing(b"*" if self._is_open else origin.encode("latin-1"))
            if scope["method"] == "OPTIONS":
                await exchange.answer(204, _PREFLIGHT)
                return False
        if self._keys and not _is_read(scope, _PAGE) and not self._knows(_text(scope, b"authorization")):
            await exchange.refuse(401)
            return False
        return True

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Against every key, whichever was right: how long this takes says nothing.
        found = [hmac.compare_digest(digest, each) for each in self._keys]
        return any(found) and scheme.lower() == "bearer"


class _Stalled(OSError):
    """Who asked does not read the answer."""


class _Exchange:
    """One request and its answer: counts and times the body on its way in, adds headers on the way out."""

    def __init__(self, scope: Scope, way: tuple[Receive, Send], settings: Settings, bodies: Budget) -> None:
        self.headers: Headers = [_NOSNIFF]
        """Added to the answer, whoever gives it."""
        self._scope, (self._receive, self._send), self._bodies = scope, way, bodies
        self._is_upload = scope["method"] == "POST" and _UPLOAD.fullmatch(_raw_path(scope)) is not None
        self._limit = settings.max_body_bytes
        self._read_s = settings.request_read_s
        self._until = asyncio.get_running_loop().time() + self._read_s
        self._bytes = self._values = self._held = 0
        self._is_whole = self._is_started = self._is_over = False

    @property
    def is_too_long(self) -> bool:
        """Does it announce more than it may send?"""
        length = _text(self._scope, b"content-length")
        return not self._is_upload and bool(length) and int(length) > self._limit

    async def run(self, app: ASGIApp) -> None:
        # A range of many parts costs more than the file (CVE-2025-62727), and nothing here is worth resuming.
        headers = [each for each in self._scope["headers"] if each[0] not in (b"range", b"if-range")]
        try:
            await app({**self._scope, "headers": headers}, self._take, self._give)
        except (ClientDisconnect, _Stalled):
            if not self._is_over:
                raise
        finally:
            self._bodies.give(self._held)

    async def answer(self, status: int, headers: Headers, body: bytes = b"") -> None:
        self._is_over = True
        headers = [*headers, *self.headers]
        if status != 204:
            headers.append((b"content-length", str(len(body)).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        if status != 204 and not self._is_whole:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self._linger()
            body = b""
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, status: int) -> None:
        """Say no in the words of the API that was asked; 403 says nothing, as Ollama's."""
        headers: Headers = [(b"connection", b"close")]
        if status == 403:
            await self.answer(status, headers)
            return
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status == 503:
            headers.append((b"retry-after", b"1"))
        headers.append((b"content-type", b"application/json; charset=utf-8"))
        await self.answer(status, headers, self._words(status))

    def _words(self, status: int) -> bytes:
        said = {
            400: f"the request has more than {MOST_VALUES} values, which is more than is read",
            401: "a valid API key is needed: send the header 'Authorization: Bearer <key>'",
            408: f"the request's body did not come within {self._read_s:g} seconds",
            413: f"the request is longer than {self._limit} bytes",
            503: f"server busy, please try again.  the requests that wait take {self._bodies.limit} bytes together",
        }[status]
        if not is_openai("/" + _raw_path(self._scope).decode("latin-1").lstrip("/")):
            return json.dumps({"error": said}).encode()
        code = "invalid_api_key" if status == 401 else None
        return json.dumps({"error": error_object(status, said) | {"code": code}}).encode()

    async def _take(self) -> Message:
        """What the application receives. A body that is too much or too slow ends as if its sender had gone."""
        if self._is_over:
            return _GONE
        if self._is_whole:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._read_s if self._is_upload else self._until - now):
                message = await self._receive()
        except TimeoutError:
            return await self._break_off(408)
        self._is_whole = not message.get("more_body", False)
        piece = message.get("body", b"")
        self._bytes += len(piece)
        if self._is_upload:  # which goes to the disk piece by piece
            return message
        self._values += (count := values(piece))
        if self._bytes > self._limit or self._values > MOST_VALUES:
            return await self._break_off(413 if self._bytes > self._limit else 400)
        if not self._bodies.take(size := weight(len(piece), count)):
            return await self._break_off(503)
        self._held += size
        return message

    async def _break_off(self, status: int) -> Message:
        if not self._is_started:
            await self.refuse(status)
        self._is_over = True
        return _GONE

    async def _give(self, message: Message) -> None:
        """What the application sends; nothing more, once its request was refused. Raises _Stalled in the application
        where nobody takes it."""
        if self._is_over:
            return
        if message["type"] == "http.response.start":
            self._is_started = True
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        try:
            async with asyncio.timeout(self._read_s):
                await self._send(message)
        except TimeoutError as error:
            self._is_over = True
            raise _Stalled from error

    async def _linger(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await self._receive()).get("more_body", False):
                    pass


def _is_read(scope: Scope, path: re.Pattern[bytes]) -> bool:
    """Is this GET or HEAD of such a path, in exactly these bytes?"""
    return scope["method"] in ("GET", "HEAD") and path.fullmatch(_raw_path(scope)) is not None


def _raw_path(scope: Scope) -> bytes:
    """As it came, before anybody decodes it; empty where the server under us does not say."""
    return scope.get("raw_path") or b""


def _text(scope: Scope, name: bytes) -> str:
    """A header's value; empty where there is none, and what nothing matches where there are several."""
    values = [value for key, value in scope["headers"] if key == name]
    return b"\n".join(values).decode("latin-1").strip(" \t")


def _allowing(origin: bytes) -> Headers:
    allowed = (b"access-control-allow-origin", origin)
    return [allowed] if origin == b"*" else [allowed, (b"vary", b"Origin")]


def _is_of_this_machine(host: str, scope: Scope) -> bool:
    """Ollama's list against DNS rebinding: a page whose name was bent to 127.0.0.1 still sends its name as Host."""
    name = re.sub(r":[0-9]*$", "", host) if host.count(":") == 1 or host.startswith("[") else host
    name = name.removeprefix("[").removesuffix("]").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        own = ("", "localhost", socket.gethostname().lower())
        return name in own or name.endswith((".localhost", ".local", ".internal"))
    return address.is_private or name == (scope.get("server") or ("",))[0]
