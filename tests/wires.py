"""A registry to be tested against, on this machine: a real server that can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = BaseHTTPRequestHandler
Fault = Callable[[Handler, "Fake"], bool]
"""Answers a GET itself, or says False."""


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Fake:
    """What the server has, what it does otherwise than it should, and what it was asked."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    fault: Fault = lambda handler, fake: False
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    pause_s: float = 0.0
    """Between stretches of 64 KiB of a blob."""
    url: str = ""

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    def model(self, *layers: bytes, tag: str = "latest", **changes: Any) -> bytes:
        """Take in a model of these layers, the last of which is its config, and return its manifest."""
        for each in layers:
            self.blobs[digest(each)] = each
        kinds = ["vnd.ollama.image.model", "vnd.ollama.image.template", "vnd.ollama.image.params"]
        described = [
            {"mediaType": f"application/{kind}", "digest": digest(each), "size": len(each)}
            for kind, each in zip([*kinds, *["vnd.ollama.image.license"] * 9], layers[:-1])
        ]
        config = {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": digest(layers[-1]),
            "size": len(layers[-1]),
        }
        content = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": config,
            "layers": described,
        }
        # Spaces: the bytes are kept as they came, not written anew.
        raw = json.dumps(content | changes, separators=(", ", ":  ")).encode()
        self.manifests[tag] = raw
        return raw


@contextmanager
def serving(fake: Fake, tls: ssl.SSLContext | None = None) -> Iterator[Fake]:
    class Serve(Handler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            fake.asked.append((self.command, self.path, dict(self.headers)))
            try:
                if not fake.fault(self, fake):
                    respond(self, fake)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Serve)
    server.daemon_threads = True
    server.handle_error = lambda *of: None  # type: ignore[method-assign]  # a client that goes away is no news
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def respond(handler: Handler, fake: Fake, *, ranges: bool = True) -> None:
    """As a good registry does."""
    kind, _, name = handler.path.partition("?")[0].rpartition("/")
    if kind.endswith("/manifests") and name in fake.manifests:
        send(handler, 200, fake.manifests[name])
    elif kind.endswith("/blobs") and name in fake.blobs:
        data = fake.blobs[name]
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if not span or not ranges:
            send(handler, 200, data, pause_s=fake.pause_s)
            return
        first, last = int(span[1]), min(int(span[2]), len(data) - 1)
        send(
            handler,
            206,
            data[first : last + 1],
            {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
            pause_s=fake.pause_s,
        )
    else:
        send(handler, 404, b"{}")


def send(
    handler: Handler, status: int, body: bytes, headers: dict[str, str] | None = None, *, pause_s: float = 0.0
) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
        return
    for at in range(0, len(body), 2**16):
        handler.wfile.write(body[at : at + 2**16])
        handler.wfile.flush()
        if pause_s:
            time.sleep(pause_s)
