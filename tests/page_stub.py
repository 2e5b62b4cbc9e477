"""A server for the page alone: Ollama's answers in form, without a model, and with faults on demand.

What a question says decides what happens: "go on" answers for long, "break" ends with an error, "script" answers with
HTML and Markdown that must not come to life. Pulling "absent" fails as Ollama does.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from pumice.server.static import add_page

ANSWERS = {
    "script": "<script>document.title = 'taken'</script> <img src=http://evil.example/a.png onerror=alert(1)>\n\n"
    "![x](http://evil.example/b.png) and [y](http://evil.example/c) and **bold** and `code`.",
    "list": "## Things\n\nTwo **things**:\n\n1. a red *square*\n2. a `ring`\n   - inner\n\n"
    "```python\nprint('<b>')\n```\nEnd.",
}
PLAIN = "The sign says STOP, in white capitals on a red board."
TILE_PX = 96


@dataclass
class Stub:
    models: list[str] = field(default_factory=lambda: ["pebble:1.6", "pebble:1.5"])
    key: str | None = None
    pause_s: float = 0.01
    """Between two words of an answer, and two steps of a pull."""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    """Path and body of every POST that was let in."""
    port: int = 0
    serving: Serving | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def start(self) -> None:
        self.serving = Serving(app_of(self), self.port)
        self.port = self.serving.port

    def stop(self) -> None:
        """Go away at once, answers in the middle too."""
        if self.serving is not None:
            self.serving.end()
            self.serving = None


class Serving:
    """uvicorn in a thread, on a port of its own or a given one."""

    def __init__(self, app: FastAPI, port: int) -> None:
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = self._listening.getsockname()[1]
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=0)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()


@contextmanager
def stub() -> Iterator[Stub]:
    one = Stub()
    one.start()
    try:
        yield one
    finally:
        one.stop()


def app_of(stub: Stub) -> FastAPI:
    app = FastAPI()
    add_page(app)

    @app.middleware("http")
    async def guard(request: Request, then: Any) -> Response:
        path = request.url.path
        is_open = path == "/" or path.startswith("/page/")
        if stub.key is not None and not is_open and request.headers.get("authorization") != f"Bearer {stub.key}":
            return JSONResponse({"error": "the API key is missing or wrong"}, 401)
        answer: Response = await then(request)
        return answer

    @app.get("/api/version")
    def version() -> dict[str, str]:
        return {"version": "0.12.6"}

    @app.get("/pumice/info")
    def info() -> dict[str, Any]:
        return {"version": "0.1.0", "offline": False}

    @app.get("/api/tags")
    def tags() -> dict[str, Any]:
        return {"models": [described(name) for name in stub.models]}

    @app.get("/api/ps")
    def ps() -> dict[str, Any]:
        return {"models": [described(name) for name in stub.models[:1]]}

    @app.post("/pumice/see")
    async def see(request: Request) -> dict[str, Any]:
        body = await noted(stub, request)
        return {"images": [seen(base64.b64decode(each)) for each in body["images"]]}

    @app.post("/api/chat")
    async def chat(request: Request) -> Response:
        body = await noted(stub, request)
        if body["model"] not in stub.models:
            return JSONResponse({"error": f"model '{body['model']}' not found"}, 404)
        return StreamingResponse(lines(answer(stub, body)), media_type="application/x-ndjson")

    @app.post("/api/pull")
    async def pull(request: Request) -> Response:
        body = await noted(stub, request)
        return StreamingResponse(lines(pulled(stub, body["model"])), media_type="application/x-ndjson")

    return app


async def noted(stub: Stub, request: Request) -> Any:
    body = await request.json()
    stub.asked.append((request.url.path, body))
    return body


async def lines(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for each in objects:
        yield json.dumps(each).encode() + b"\n"


def described(name: str) -> dict[str, Any]:
    details = {"family": "llama", "families": ["llama", "clip"], "parameter_size": "5.8M", "quantization_level": "F16"}
    able = ["embedding"] if "minilm" in name else ["completion", "vision"]
    about = {"size": 11_712_345, "digest": "8d" * 32, "details": details, "capabilities": able}
    return {"name": name, "model": name, **about}


async def answer(stub: Stub, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    last = body["messages"][-1]
    question = last["content"].lower()
    text = next((each for word, each in ANSWERS.items() if word in question), PLAIN)
    if body.get("format"):
        text = '{"title":"A sign","objects":["sign","word"]}'
    if "go on" in question:
        text = "and so on, " * 2000
    began = time.perf_counter_ns()
    for at, word in enumerate(text.split(" ")):
        await asyncio.sleep(stub.pause_s)
        if "break" in question and at == (3 if body["model"] == "pebble:1.6" else 2):
            yield {"error": "the model ran out of memory: 3.1 GB are needed, 2.0 GB are free"}
            return
        message = {"role": "assistant", "content": word if at == 0 else f" {word}"}
        yield {"model": body["model"], "message": message, "done": False}
    write = time.perf_counter_ns() - began
    tokens = [2928 if body["model"] == "pebble:1.6" else 576 for _ in last.get("images", [])]
    counters = {
        "total_duration": write + 900_000_000,
        "load_duration": 210_000_000,
        "prompt_eval_count": sum(tokens) + 31,
        "prompt_eval_duration": 640_000_000,
        "eval_count": len(text.split(" ")),
        "eval_duration": write,
        "pumice": {"encode_duration": 410_000_000, "cached_tokens": 12, "image_tokens": tokens},
    }
    message = {"role": "assistant", "content": ""}
    yield {"model": body["model"], "message": message, "done": True, "done_reason": "stop"} | counters


async def pulled(stub: Stub, name: str) -> AsyncIterator[dict[str, Any]]:
    yield {"status": "pulling manifest"}
    await asyncio.sleep(stub.pause_s)
    if name == "absent":
        yield {"error": "pull model manifest: file does not exist"}
        return
    for digest, total in (("1703" * 16, 4_109_854_000), ("72d6" * 16, 624_434_000), ("c43d" * 16, 67)):
        step = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": total}
        yield step
        for tenth in range(1, 11):
            await asyncio.sleep(stub.pause_s)
            yield step | {"completed": total * tenth // 10}
    for status in ("verifying sha256 digest", "writing manifest", "success"):
        yield {"status": status}
    stub.models.append(name if ":" in name else f"{name}:latest")


def seen(data: bytes) -> dict[str, Any]:
    """The picture cut as LLaVA 1.6 would with small tiles: 2 × 2, or 1 × 2 or 2 × 1 where that is nearer its shape."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    ratio = picture.width / picture.height
    rows, columns = (1, 2) if ratio > 1.6 else (2, 1) if ratio < 0.625 else (2, 2)
    cut = picture.resize((columns * TILE_PX, rows * TILE_PX))
    boxes = [
        (x * TILE_PX, y * TILE_PX, (x + 1) * TILE_PX, (y + 1) * TILE_PX) for y in range(rows) for x in range(columns)
    ]
    views = [picture.resize((TILE_PX, TILE_PX)), *(cut.crop(box) for box in boxes)]
    facts = {"width": picture.width, "height": picture.height, "tokens": 2928, "rows": rows, "columns": columns}
    return facts | {"views": [data_url(view) for view in views]}


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
