"""Who may ask, over a socket: every route, every spelling, hosts, origins, keys, bodies that are too long or too slow.

The identifiers H and G are those of attacks.md 5.3."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from pumice.server import guard
from pumice.server.guard import Guard
from pumice.server.patience import Patient
from pumice.server.running import allow_connections
from pumice.server.settings import Settings
from served import ask, connected, listening, reply

KEY = "Authorization: Bearer sesame"
LIMIT = 100_000


@dataclass
class Site:
    """A server to be guarded, with a dozen routes, and what reached them."""

    app: FastAPI
    reached: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    port: int = 0


def site(folder: Path) -> Site:
    (folder / "app.js").write_text("x" * 50_000)
    (folder / ".secret").write_text("s")
    app = FastAPI()
    made = Site(app)

    async def answer(request: Request) -> PlainTextResponse:
        body = await request.body()
        made.reached.append(f"{request.method} {request.url.path}")
        return PlainTextResponse(f"{len(body)} bytes")

    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            try:
                yield "one\n"
                await asyncio.to_thread(made.go_on.wait, 60)
                while True:
                    yield "two\n"
                    await asyncio.sleep(0.01)
            finally:
                made.gone.set()

        return StreamingResponse(pieces(), media_type="application/x-ndjson")

    async def flood() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield bytes(100_000)

        return StreamingResponse(pieces())

    async def file() -> FileResponse:
        return FileResponse(folder / "app.js")

    for path, methods in (
        ("/", ["GET", "HEAD"]),
        ("/health", ["GET", "HEAD"]),
        ("/api/version", ["GET", "HEAD"]),
        ("/api/tags", ["GET", "HEAD"]),
        ("/api/chat", ["POST"]),
        ("/api/generate", ["POST"]),
        ("/api/delete", ["DELETE"]),
        ("/api/blobs/{digest}", ["HEAD", "POST"]),
        ("/v1/models", ["GET"]),
        ("/v1/models/{name:path}", ["GET"]),
        ("/v1/chat/completions", ["POST"]),
        ("/metrics", ["GET"]),
    ):
        app.add_api_route(path, answer, methods=methods, include_in_schema=False)
    app.add_api_route("/stream", stream, methods=["GET"])
    app.add_api_route("/flood", flood, methods=["GET"])
    app.add_api_route("/file", file, methods=["GET"])
    app.mount("/page", StaticFiles(directory=folder))
    return made


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With keys, on loopback."""
    made = site(tmp_path_factory.mktemp("page"))
    settings = Settings(keys=("other", "sesame", "third"), max_body_bytes=LIMIT, request_read_s=1.0)
    with listening(Guard(made.app, settings)) as made.port:
        yield made


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Without keys, on loopback, with origins of its own."""
    made = site(tmp_path_factory.mktemp("page"))
    settings = Settings(origins=("https://*.mine.example", "chrome-extension://*"), request_read_s=0.5)
    with listening(Guard(made.app, settings)) as made.port:
        yield made


def targets(site: Site) -> list[tuple[str, str]]:
    """Every method and path of the router, walked."""
    found = []
    for route in site.app.routes:
        if isinstance(route, Mount):
            found += [("GET", f"{route.path}/app.js"), ("POST", f"{route.path}/app.js")]
            continue
        assert isinstance(route, APIRoute | Route)
        path = route.path.replace("{digest}", "sha256:0").replace("{name:path}", "me/llava")
        found += [(method, path) for method in sorted(route.methods or ())]
    assert len(found) >= 20
    return found


FREE = {(method, path) for method in ("GET", "HEAD") for path in ("/health", "/", "/page/app.js")}


def test_h_every_route_needs_a_key_but_health_and_the_page(locked: Site) -> None:
    """attacks.md H: walk the router; 401 everywhere without a key, health apart (and the page's files)."""
    locked.reached.clear()
    closed = [each for each in targets(locked) if each not in FREE]
    assert FREE & set(targets(locked)) >= {
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/"),
        ("GET", "/page/app.js"),
    }
    for method, path in closed:
        assert ask(locked.port, path, method=method).status == 401, (method, path)
        assert ask(locked.port, path, "Authorization: Bearer wrong", method=method).status == 401, (method, path)
    assert not locked.reached
    for method, path in sorted(FREE):
        assert ask(locked.port, path, method=method).status == 200, (method, path)
    for method, path in closed:
        if path not in ("/stream", "/flood"):
            assert ask(locked.port, path, KEY, method=method).status in (200, 405), (method, path)


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/v1/../api/tags", "/v1/%2e%2e/api/tags", "/api%2ftags", "/%61pi/tags", "/API/TAGS",
        "/api/tags/", "/health/", "/health/../api/tags", "//health", "/HEALTH", "/%68ealth", "/health%00",
        "/health;x", "/health%3f", "/healthz", "/./health", "/page/../api/tags",
        "/page/..%2fapi%2ftags", "/page/%2e%2e/api/tags", "/page//app.js",
        "/page/.secret", "/page/\\..\\app.js", "/page/app.js/", "/page/", "/page", "/Page/app.js", "/page/app%2ejs",
        "/page/./app.js", "//", "/%2f", "/?/../health/x#", "http://127.0.0.1/health", "http://127.0.0.1/api/tags", "*",
        "/docs", "/openapi.json", "/redoc",
    ],
)  # fmt: skip
def test_h_no_other_spelling_passes(locked: Site, target: str) -> None:
    """attacks.md H, CVE-2026-48746: doubled and encoded slashes, dots, case: nothing but the exact paths is free."""
    if target.startswith("/?"):
        target = target.replace("/?", "/api/tags?")
    locked.reached.clear()
    for method in ("GET", "HEAD", "POST", "OPTIONS", "get", "PROPFIND"):
        found = ask(locked.port, target, method=method)
        assert found.status == 401, method
    assert not locked.reached


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "TRACE"])
@pytest.mark.parametrize("path", ["/health", "/", "/page/app.js"])
def test_h_what_is_free_is_so_for_reading_only(locked: Site, method: str, path: str) -> None:
    assert ask(locked.port, path, method=method).status == 401


def test_h_no_way_around_below_a_prefix(locked: Site) -> None:
    """attacks.md H: neither a mount nor uvicorn's root_path opens anything."""
    guarded = Guard(locked.app, Settings(keys=("sesame",)))
    locked.reached.clear()
    with listening(Starlette(routes=[Mount("/under", guarded), Mount("/health", guarded)])) as port:
        for target in ("/under/api/tags", "/under/health", "/under//health", "/health/api/tags", "/health/health"):
            assert ask(port, target).status == 401, target
        assert ask(port, "/under/api/tags", KEY).status == 200
    with listening(guarded, root_path="/health") as port:
        assert ask(port, "/api/tags").status == 401
        assert ask(port, "/../api/tags").status == 401
        assert ask(port, "/api/tags", KEY).status == 200
    assert locked.reached == ["GET /under/api/tags", "GET /health/api/tags"]


def test_h_words_of_a_missing_key(locked: Site) -> None:
    native, openai = ask(locked.port, "/api/tags"), ask(locked.port, "/v1/models")
    for each in (native, openai):
        assert each.headers["www-authenticate"] == "Bearer"
        assert each.headers["content-type"].startswith("application/json")
    said = json.loads(native.body)
    assert list(said) == ["error"]
    assert "Authorization: Bearer" in said["error"]
    nested = json.loads(openai.body)["error"]
    assert nested["message"] == said["error"]
    assert (nested["code"], nested["param"]) == ("invalid_api_key", None)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Authorization: Bearer sesame"], 200),
        (["authorization: bearer other"], 200),
        (["Authorization: Bearer   third  "], 200),
        (["Authorization: sesame"], 401),
        (["Authorization: Basic sesame"], 401),
        (["Authorization: Bearer sesam"], 401),
        (["Authorization: Bearer sesame1"], 401),
        (["Authorization: Bearer SESAME"], 401),
        (["Authorization: Bearer other,sesame"], 401),
        (["Authorization: Bearer "], 401),
        (["Authorization:"], 401),
        (["Authorization: Bearer s\xe9same\xff"], 401),
        (["Authorization: Bearer sesame", "Authorization: Bearer sesame"], 401),
        (["X-Api-Key: sesame"], 401),
        (["Cookie: Authorization=Bearer sesame"], 401),
    ],
)
def test_h_keys(locked: Site, lines: list[str], status: int) -> None:
    assert ask(locked.port, "/api/tags", *lines).status == status


def test_h_a_key_in_the_url_is_none(locked: Site) -> None:
    assert ask(locked.port, "/api/tags?api_key=sesame&key=sesame&token=sesame").status == 401


def test_h_keys_are_compared_in_constant_time(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """attacks.md H, CVE-2025-59425: with hmac.compare_digest, every key whichever is right, of one length."""
    seen: list[tuple[bytes, bytes]] = []
    right = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return right(one, other)

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    for key in ("other", "sesame", "third", "no", "x" * 5000):
        seen.clear()
        ask(locked.port, "/api/tags", f"Authorization: Bearer {key}")
        assert len(seen) == 3, key
        assert {len(each) for pair in seen for each in pair} == {32}


def test_h_websockets_are_refused(locked: Site) -> None:
    sent: list[Any] = []

    async def reached(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(reached, Settings())({"type": "websocket", "headers": []}, receive, send))
    assert [each["type"] for each in sent] == ["websocket.close"]
    lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    assert ask(locked.port, "/api/tags", *lines, "Sec-WebSocket-Version: 13").status in (401, 403)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LocalHost:11434", "127.0.0.1", "127.0.0.1:80", "127.1.2.3", "[::1]", "[::1]:8", "0.0.0.0:1",
        "192.168.1.7", "10.0.0.1:99", "172.16.0.1", "[fd00::1]", "::1", "app.localhost", "box.local:5",
        "host.docker.internal", socket.gethostname(), "",
    ],
)  # fmt: skip
def test_h_hosts_of_this_machine(unlocked: Site, host: str) -> None:
    assert ask(unlocked.port, "/api/tags", f"Host: {host}").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:11434", "localhost.evil.example", "127.0.0.1.evil.example", "8.8.8.8",
        "[2606::1]", "notlocalhost", "local", "internal", "evil.local.example", "localhost@evil.example",
        "localhost/evil", "evil.example#.local.", "localhost:11434:80", "2130706433", "[::1",
        "127.0.0.1\t.evil.example",
    ],
)  # fmt: skip
def test_h_other_hosts_are_refused(unlocked: Site, host: str) -> None:
    """attacks.md H, CVE-2024-28224: DNS rebinding. A name that was bent to loopback is still sent as Host."""
    unlocked.reached.clear()
    for method in ("GET", "HEAD", "OPTIONS", "POST"):
        found = ask(unlocked.port, "/api/tags", f"Host: {host}", f"Origin: http://{host}", method=method)
        assert found.status in (400, 403)
        assert found.status == 403 or "\t" in host or "/" in host or "#" in host  # some, HTTP itself refuses
        assert found.body == b"" or found.status == 400
    assert not unlocked.reached
    assert ask(unlocked.port, "/health", f"Host: {host}").status in (200, 400)


def test_h_without_any_host(unlocked: Site) -> None:
    with connected(unlocked.port) as connection:
        connection.sendall(b"GET /api/tags HTTP/1.0\r\n\r\n")
        assert reply(connection).status == 200
    with connected(unlocked.port) as connection:
        connection.sendall(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert reply(connection).status == 400


def test_h_hosts_are_free_where_others_reach_it(unlocked: Site) -> None:
    with listening(Guard(unlocked.app, Settings(host="0.0.0.0", keys=("sesame",)))) as port:
        assert ask(port, "/api/tags", "Host: pumice.example", KEY).status == 200
        assert ask(port, "/api/tags", "Host: pumice.example").status == 401


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost", "https://localhost:3000", "http://127.0.0.1:8080", "https://0.0.0.0", "app://obsidian.md",
        "file://", "tauri://localhost", "vscode-webview://1a2b", "vscode-file://vscode-app", "https://a.mine.example",
        "https://a.b.mine.example", "chrome-extension://abcdef", "HTTP://LOCALHOST:1",
    ],
)  # fmt: skip
def test_h_origins_that_may_ask(unlocked: Site, origin: str) -> None:
    """wire.md 1.10: the origin is echoed, Vary says so, and nothing allows credentials."""
    plain = ask(unlocked.port, "/api/tags", f"Origin: {origin}")
    assert (plain.status, plain.headers["access-control-allow-origin"]) == (200, origin)
    assert "Origin" in plain.headers["vary"]
    unlocked.reached.clear()
    before = ask(
        unlocked.port,
        "/api/chat",
        f"Origin: {origin}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization, content-type, x-stainless-os",
        method="OPTIONS",
    )
    assert (before.status, before.body, before.headers["access-control-allow-origin"]) == (204, b"", origin)
    assert before.headers["access-control-max-age"] == "43200"
    assert set(before.headers["access-control-allow-methods"].split(",")) == {
        "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"
    }  # fmt: skip
    allowed = set(before.headers["access-control-allow-headers"].lower().split(","))
    assert allowed == {
        "authorization", "content-type", "user-agent", "accept", "x-requested-with", "openai-beta",
        *(f"x-stainless-{each}" for each in (
            "arch", "async", "custom-poll-interval", "helper-method", "lang", "os", "package-version", "poll-helper",
            "retry-count", "runtime", "runtime-version", "timeout",
        )),
    }  # fmt: skip
    assert "access-control-allow-credentials" not in before.headers | plain.headers
    assert not unlocked.reached


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "https://localhost.evil.example", "http://evil.example:11434", "null", "moz-extension://a",
        "https://mine.example", "http://a.mine.example", "https://evil.example/.mine.example", "https://a.mine.example.evil",
        "http://localhost:80@evil.example/", "http://127.0.0.10", "ftp://localhost", "localhost", "*", "\xe9",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE"])
def test_h_other_origins_are_refused(unlocked: Site, origin: str, method: str) -> None:
    """attacks.md H: 403 with nothing in it, and no header that would let a page read more."""
    unlocked.reached.clear()
    found = ask(unlocked.port, "/api/tags", f"Origin: {origin}", method=method)
    assert (found.status, found.body) == (403, b"")
    assert not [name for name in found.headers if name.startswith("access-control")]
    assert not unlocked.reached


def test_h_origins_beside_each_other(unlocked: Site) -> None:
    for second in ("http://evil.example", "http://localhost", "x"):
        assert ask(unlocked.port, "/api/tags", "Origin: app://x", f"Origin: {second}").status == 403


def test_the_servers_own_pages_may_ask(unlocked: Site) -> None:
    for scheme in ("http", "https"):
        found = ask(unlocked.port, "/api/tags", "Host: box.local:99", f"Origin: {scheme}://box.local:99")
        assert found.status == 200
        assert "access-control-allow-origin" not in found.headers


def test_h_no_star_unless_it_is_asked_for(locked: Site, unlocked: Site) -> None:
    """attacks.md H: no CORS `*` by default; with OLLAMA_ORIGINS=* it is one, and keys are still needed."""
    for port in (locked.port, unlocked.port):
        assert ask(port, "/health", "Origin: http://localhost").headers.get("access-control-allow-origin") != "*"
        assert ask(port, "/", "Origin: http://localhost").headers["access-control-allow-origin"] == "http://localhost"
    with listening(Guard(unlocked.app, Settings(origins=("*",), keys=("sesame",)))) as port:
        found = ask(port, "/api/tags", "Origin: http://evil.example")
        assert (found.status, found.headers["access-control-allow-origin"]) == (401, "*")
        assert "vary" not in found.headers
        assert ask(port, "/api/tags", "Origin: null", KEY).status == 200
        assert ask(port, "/api/tags", "Origin: http://evil.example", method="OPTIONS").status == 204


def test_h_a_preflight_needs_no_key_and_reaches_nothing(locked: Site) -> None:
    locked.reached.clear()
    assert ask(locked.port, "/api/tags", "Origin: http://localhost:5", method="OPTIONS").status == 204
    assert ask(locked.port, "/api/tags", "Origin: http://evil.example", method="OPTIONS").status == 403
    assert ask(locked.port, "/api/tags", "Origin: http://localhost:5").status == 401
    assert not locked.reached


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_g_a_body_that_is_too_long(locked: Site) -> None:
    """attacks.md G: refused by what it announces, before a byte of it is read; and 413 in each API's words."""
    locked.reached.clear()
    assert ask(locked.port, "/api/chat", KEY, method="POST", body=b"x" * LIMIT).body == b"100000 bytes"
    for length in (LIMIT + 1, 2**30, 10**19):
        with connected(locked.port) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\nContent-Length: {length}\r\n"
            connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            found = reply(connection)
        assert found.status == 413
        said = json.loads(found.body)["error"]
        assert said["type"] == "invalid_request_error"
        assert str(LIMIT) in said["message"]
    assert json.loads(ask(locked.port, "/api/chat", KEY, method="POST", body=b"x" * (LIMIT + 1)).body).keys() == {
        "error"
    }
    assert locked.reached == ["POST /api/chat"]


def test_g_a_long_body_that_comes_all_the_same_is_answered(locked: Site) -> None:
    """Not reset: who sends on without waiting reads why it was refused."""
    assert ask(locked.port, "/api/chat", KEY, method="POST", body=bytes(8_000_000)).status == 413
    assert ask(locked.port, "/api/chat", method="POST", body=bytes(8_000_000)).status == 401


@pytest.mark.parametrize("more", [0, 1])
def test_g_a_body_in_chunks_that_is_too_long(locked: Site, more: int) -> None:
    """attacks.md G: what announces no length is counted."""
    locked.reached.clear()
    body = b"".join(chunk(b"x" * 1000) for _ in range(LIMIT // 1000)) + (chunk(b"x") if more else b"") + chunk(b"")
    found = ask(locked.port, "/api/chat", KEY, "Transfer-Encoding: chunked", method="POST", body=body)
    assert found.status == (413 if more else 200)
    assert found.body == b"100000 bytes" or more
    assert len(locked.reached) == 1 - more


def test_g_an_endless_body(locked: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """attacks.md G: it is cut off, and the next request is answered."""
    monkeypatch.setattr(guard, "LINGER_S", 0.5)
    with connected(locked.port) as connection:
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        sent, until = 0, time.monotonic() + 30
        try:
            while time.monotonic() < until:
                connection.sendall(chunk(bytes(50_000)))
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() < until
        assert sent > 2
    assert ask(locked.port, "/api/tags", KEY).status == 200


def test_g_a_slow_body(locked: Site) -> None:
    """attacks.md E and G (slow loris): a byte now and then does not hold a request open."""
    began, sent = time.monotonic(), 0
    with connected(locked.port) as connection:
        connection.sendall(
            f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\nContent-Length: 900\r\n\r\n".encode()
        )
        connection.settimeout(0.05)
        while True:
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                connection.sendall(b"x")
                sent += 1
        connection.settimeout(60)
        found = reply(connection)
    assert found.status == 408
    assert "1 seconds" in json.loads(found.body)["error"]
    assert sent > 3
    assert time.monotonic() - began < 30


def test_a_models_file_may_be_long_and_slow_but_not_stand_still(unlocked: Site) -> None:
    head = "POST /api/blobs/sha256:0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70000000\r\n\r\n"
    with connected(unlocked.port) as connection:
        connection.sendall(head.encode())
        for _ in range(7):
            time.sleep(0.2)
            connection.sendall(bytes(10_000_000))
        assert reply(connection).body == b"70000000 bytes"
    with connected(unlocked.port) as connection:
        connection.sendall(head.encode() + b"x")
        assert reply(connection).status == 408
    found = ask(unlocked.port, "/api//blobs/sha256:0", "Content-Length: 70000000", method="POST")
    assert found.status == 413


def test_h_nosniff_on_every_answer(locked: Site) -> None:
    """attacks.md F and H: what a browser gets is what its type says."""
    asked = [
        ("GET", "/", []), ("GET", "/health", []), ("GET", "/page/app.js", []), ("GET", "/api/tags", []),
        ("GET", "/api/tags", [KEY]), ("GET", "/nowhere", [KEY]), ("DELETE", "/api/tags", [KEY]),
        ("GET", "/", ["Host: evil.example"]), ("GET", "/", ["Origin: http://evil.example"]),
        ("OPTIONS", "/", ["Origin: http://localhost"]), ("POST", "/api/chat", [KEY, "Content-Length: 999999999"]),
    ]  # fmt: skip
    found = [ask(locked.port, path, *lines, method=method) for method, path, lines in asked]
    assert [each.status for each in found] == [200, 200, 200, 401, 200, 404, 405, 403, 403, 204, 413]
    assert all(each.headers["x-content-type-options"] == "nosniff" for each in found)


def test_h_ranges_are_not_read(locked: Site) -> None:
    """attacks.md H, CVE-2025-62727: 10^4 parts of a file cost what the file costs."""
    parts = ",".join(["0-0"] * 10_000)
    for path in ("/page/app.js", "/file"):
        for span in (parts, "0-9"):
            began = time.monotonic()
            found = ask(locked.port, path, KEY, f"Range: bytes={span}")
            assert (found.status, len(found.body)) == (200, 50_000)
            assert time.monotonic() - began < 10


def test_streams_pass_piece_by_piece(locked: Site) -> None:
    """The first piece is here while the second is not made, and who leaves is seen to leave."""
    locked.gone.clear()
    locked.go_on.clear()
    with connected(locked.port) as connection:
        connection.sendall(f"GET /stream HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n\r\n".encode())
        got = b""
        while b"one\n" not in got:
            got += connection.recv(1000)
        assert b"two" not in got
        locked.go_on.set()
        while b"two\n" not in got:
            got += connection.recv(1000)
        assert not locked.gone.is_set()
        time.sleep(1.5)  # longer than a body may take: that clock is not this one
        assert not locked.gone.is_set()
    assert locked.gone.wait(30)


def test_requests_follow_each_other_on_one_connection(locked: Site) -> None:
    with connected(locked.port) as connection:
        for length in (0, 5, 70_000):
            head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\nContent-Length: {length}\r\n\r\n"
            connection.sendall(head.encode() + bytes(length))
            assert reply(connection).body == f"{length} bytes".encode()


class Quick(Patient):
    head_s = 1.0


def closed_after(connection: socket.socket, began: float) -> float:
    """Seconds until the other side hangs up."""
    connection.settimeout(60)
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def test_g_idle_connections(locked: Site) -> None:
    """attacks.md G: many connections that ask nothing, or not to the end, go; meanwhile others are answered."""
    with listening(Guard(locked.app, Settings()), http=Quick) as port:
        began = time.monotonic()
        idle = [connected(port) for _ in range(300)]
        for number, each in enumerate(idle):
            each.sendall((b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")[number % 3])
        assert ask(port, "/api/tags").status == 200
        for each in idle:
            with each:
                assert closed_after(each, began) < 30
        with connected(port) as slow:
            began, until = time.monotonic(), time.monotonic() + 30
            slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            try:
                while time.monotonic() < until:
                    slow.sendall(b"X: y\r\n")
                    time.sleep(0.05)
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert time.monotonic() < until


class Waiting(Patient):
    head_s = 600.0
    open = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        type(self).open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        type(self).open -= 1


def test_g_ten_thousand_idle_connections(locked: Site) -> None:
    """attacks.md G: as many as this process may have, where one half of each is the client's. Others are answered
    meanwhile; when they have gone, all is given back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_connections()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    before = len(os.listdir("/proc/self/fd"))
    count = min(10_000, (hard - before - 200) // 2)
    idle: list[socket.socket] = []
    try:
        with listening(Guard(locked.app, Settings()), http=Waiting) as port:
            try:
                idle += (connected(port) for _ in range(count))
                assert ask(port, "/api/tags").status == 200
                assert ask(port, "/api/chat", method="POST", body=b"x").body == b"1 bytes"
                assert Waiting.open >= count
            finally:
                for each in idle:
                    each.close()
            until = time.monotonic() + 60
            while Waiting.open:
                assert time.monotonic() < until
                time.sleep(0.05)
            assert ask(port, "/api/tags").status == 200
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_busy_connections_stay(locked: Site) -> None:
    """Neither a connection that asks again and again is hung up, nor one whose answer takes long."""
    locked.go_on.clear()
    with listening(Guard(locked.app, Settings()), http=Quick) as port, connected(port) as busy, connected(port) as long:
        long.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(12):
            busy.sendall(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert reply(busy).status == 200
            time.sleep(0.3)
        locked.go_on.set()
        got = b""
        while b"two\n" not in got:
            got += long.recv(1000)


def test_g_a_client_that_does_not_read(unlocked: Site) -> None:
    """attacks.md G (slow clients): its request ends, as if it had left, and its connection, with what it held."""
    guarded, ended, lost = Guard(unlocked.app, Settings(request_read_s=0.5)), threading.Event(), threading.Event()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        await guarded(scope, receive, send)
        if scope.get("path") == "/flood":
            ended.set()

    class Watched(Quick):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.set()

    with listening(watched, http=Watched) as port, connected(port) as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(30)
        assert lost.wait(30)
        assert ask(port, "/api/tags").status == 200
