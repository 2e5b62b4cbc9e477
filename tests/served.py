"""An application on a real socket, in a thread, and requests to it byte for byte."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import uvicorn

from pumice.server.app import application
from pumice.server.patience import Patient
from pumice.server.settings import Settings


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[int]:
    """Serve `app` with uvicorn, in the protocol that pumice uses, on a free port of 127.0.0.1; that port."""
    usual: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http": Patient, "log_level": "critical"}
    config = uvicorn.Config(app, **(usual | {"access_log": False} | options))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def served(settings: Settings | None = None) -> Iterator[str]:
    """The whole server; its base URL. PUMICE_TEST_SERVER is that of one that runs already, for tests that need no
    settings of their own."""
    if settings is None and (running := os.environ.get("PUMICE_TEST_SERVER")):
        yield running
        return
    settings = settings or Settings(port=0)
    with listening(application(settings), port=settings.port, timeout_graceful_shutdown=5) as port:
        yield f"http://127.0.0.1:{port}"


def post(base: str, path: str, body: object) -> httpx2.Response:
    return httpx2.post(base + path, json=body, timeout=120)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    """By lower-case name, several of one name with a comma between."""
    body: bytes


def connected(port: int, timeout_s: float = 60) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=timeout_s)


def reply(connection: socket.socket, method: str = "GET") -> Reply:
    """The next answer that comes over a connection."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        headers[name.lower()] = f"{headers[name.lower()]}, {value}" if name.lower() in headers else value
    return Reply(response.status, headers, response.read())


def ask(port: int, target: str, *lines: str, method: str = "GET", body: bytes = b"") -> Reply:
    """One request with this target, exactly, and these header lines; Host is 127.0.0.1 where none of them is one."""
    named = {line.partition(":")[0].lower() for line in lines}
    more = [] if "host" in named else ["Host: 127.0.0.1"]
    if body and not named & {"content-length", "transfer-encoding"}:
        more.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *more, "Connection: close", *lines, "", ""])
    with connected(port) as connection:
        connection.sendall(head.encode("latin-1") + body)
        return reply(connection, method)
