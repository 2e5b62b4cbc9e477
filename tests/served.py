"""A server in this process, on a socket of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import uvicorn

from pumice.server.app import create_app
from pumice.server.running import listening
from pumice.server.settings import Settings


@contextmanager
def served(settings: Settings | None = None) -> Iterator[str]:
    """Its base URL, while it runs."""
    settings = settings or Settings(port=0)
    place = listening(settings)
    config = uvicorn.Config(create_app(settings), log_config=None, ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def post(base: str, path: str, body: object) -> httpx2.Response:
    return httpx2.post(base + path, json=body, timeout=120)
