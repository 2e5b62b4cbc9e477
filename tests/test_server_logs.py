"""The lines that a server writes, of a real one in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from served import ask, connected

SERVER = """
import asyncio, sys, uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from pumice.server.guard import Guard
from pumice.server.logs import AccessLog, config, note
from pumice.server.patience import Patient
from pumice.server.settings import Settings

app = FastAPI()

@app.post("/api/chat")
async def chat(request: Request):
    await request.body()
    for fact, value in (("model", "llava"), ("prompt_tokens", 600), ("generated_tokens", 7)):
        note(request.scope, fact, value)
    return PlainTextResponse("answer")

@app.get("/stream")
async def stream():
    async def pieces():
        while True:
            yield "x"
            await asyncio.sleep(0.01)
    return StreamingResponse(pieces())

@app.get("/broken")
async def broken():
    raise ValueError("a bug")

debug = sys.argv[1] == "debug"
guarded = AccessLog(Guard(app, Settings(keys=("sesame",))))
server = uvicorn.Server(uvicorn.Config(guarded, port=0, http=Patient, log_config=config(debug=debug)))

async def run():
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await task

asyncio.run(run())
"""
KEY = "Authorization: Bearer sesame"


class Logged:
    def __init__(self, folder: Path, mode: str) -> None:
        self.file = folder / "log"
        with self.file.open("wb") as log:
            command = [sys.executable, "-c", SERVER, mode]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def lines(self) -> list[dict[str, Any]]:
        """What a JSON reader makes of each line; all of them are such."""
        return [json.loads(line) for line in self.file.read_text(encoding="ascii").split("\n") if line]

    def requests(self, count: int) -> list[dict[str, Any]]:
        """The first `count` lines about requests, once they are written."""
        until = time.monotonic() + 60
        while True:
            found = [line for line in self.lines() if line["message"] == "request"]
            if len(found) >= count:
                return found
            assert time.monotonic() < until, found
            time.sleep(0.05)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.parametrize("mode", ["quiet", "debug"])
def test_lines(tmp_path: Path, mode: str) -> None:
    server = Logged(tmp_path, mode)
    try:
        began = datetime.now(UTC)
        body = b'{"prompt": "my secret \xe2\x80\xa8 cat"}'
        one = ask(server.port, "/api/chat?token=hidden", KEY, "X-Request-ID: abc-1", method="POST", body=body)
        assert (one.body, one.headers["x-request-id"]) == (b"answer", "abc-1")
        other = ask(server.port, "/api/%0a%22%7b%ff/" + "x" * 3000, "X-Request-ID: a b" + "c" * 500)
        assert len(other.headers["x-request-id"]) == 32
        assert ask(server.port, "/broken", KEY).status == 500
        with connected(server.port) as connection:
            connection.sendall(f"GET /stream HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n\r\n".encode())
            assert connection.recv(100)
        first, second, third, fourth = server.requests(4)
    finally:
        server.end()
    assert first.pop("seconds") < 60
    when = datetime.fromisoformat(first.pop("time"))
    assert abs((when - began).total_seconds()) < 60
    expected = {
        "level": "info", "message": "request", "request_id": "abc-1", "client": "127.0.0.1", "method": "POST",
        "path": "/api/chat", "status": 200, "model": "llava", "prompt_tokens": 600, "generated_tokens": 7,
    }  # fmt: skip
    assert first == expected
    assert (second["status"], second["request_id"]) == (401, other.headers["x-request-id"])
    assert second["path"].startswith('/api/\n"{')
    assert len(second["path"]) == 500
    assert (third["status"], third["level"]) == (500, "error")
    assert (fourth["path"], fourth["status"], fourth["broken_off"]) == ("/stream", 200, True)
    said = server.file.read_text()
    assert "sesame" not in said
    assert "hidden" not in said
    assert "my secret" not in said
    failed = [line for line in server.lines() if "error" in line]
    assert len(failed) == 1
    assert "ValueError: a bug" in failed[0]["error"]
    assert any("Uvicorn running" in line["message"] for line in server.lines())
