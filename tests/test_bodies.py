"""Requests that are long: others are answered while one is read, and no more lie in memory than there is room for."""

from __future__ import annotations

import base64
import gc
import json
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

from pumice.server import bodies, ollama
from pumice.server.bodies import Budget
from pumice.server.guard import Guard
from pumice.server.settings import Settings
from pumice.server.wire import Fields, Refused, image_bytes
from served import ask, connected, listening, post, reply, served

WIDE = 2 * bodies.LONG


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with served(Settings(port=0)) as base:
        yield base


def test_others_are_answered_while_a_long_request_is_read(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its JSON, and its pictures: each waits until another request was answered, which on one thread is never."""
    answered, steps = threading.Event(), list[str]()
    read, decoded = Fields.read, ollama.image_bytes

    def slowly(step: str, work: Any, *arguments: Any) -> Any:
        steps.append(step)
        assert answered.wait(60), step
        return work(*arguments)

    monkeypatch.setattr(Fields, "read", lambda *arguments: slowly("JSON", read, *arguments))
    monkeypatch.setattr(ollama, "image_bytes", lambda text: slowly("picture", decoded, text))
    body = {"model": "pebble", "prompt": "x", "images": ["A" * WIDE]}
    found = list[httpx2.Response]()
    for path in ("/api/generate", "/api/embed"):
        answered.clear()
        asking = threading.Thread(target=lambda path=path: found.append(post(base, path, body)))  # type: ignore[misc]
        asking.start()
        while not steps:
            time.sleep(0.005)
        assert httpx2.get(base + "/api/version").status_code == 200
        answered.set()
        asking.join(60)
        assert steps == ["JSON", "picture"]
        steps.clear()
    assert [each.status_code for each in found] == [400, 400]
    assert all("image" in each.json()["error"] for each in found)


def test_a_long_request_says_what_a_short_one_says(base: str) -> None:
    """Also where it is wrong: blanks in front make any request long."""
    for body in (b'{"model":"nope"}', b'{"model":', b"[1]"):
        short, long = (httpx2.post(base + "/api/show", content=blanks + body) for blanks in (b"", b" " * WIDE))
        assert (short.status_code, short.content[:20]) == (long.status_code, long.content[:20])


@pytest.mark.parametrize("piece", [b"[],", b"1,", b'"a":1,'])
def test_a_request_of_very_many_values_is_refused(base: str, piece: bytes) -> None:
    count = bodies.MOST_VALUES + 1
    ends = (b"{", b'"model":"x"}') if b":" in piece else (b'{"model":["', b'"]}')
    answer = httpx2.post(base + "/v1/chat/completions", content=ends[0] + piece * count + ends[1], timeout=60)
    assert answer.status_code == 400
    assert f"more than {bodies.MOST_VALUES} values" in answer.json()["error"]["message"]


def test_pictures_are_decoded_in_pieces() -> None:
    rng = random.Random(3)
    for length in (0, 1, 2, 3, 3 * 2**18 - 1, 3 * 2**18, 3 * 2**18 + 1, 2**20 + 1):
        data = rng.randbytes(length)
        text = base64.b64encode(data).decode()
        lines = "\r\n".join(text[at : at + 1000] for at in range(0, len(text), 1000))
        for each in (text, text.rstrip("="), lines, base64.urlsafe_b64encode(data).decode()):
            assert image_bytes(each) == data
    for text, place in (("QQ==" * 2**19, 2), ("A" * 2**21 + "=A==", 2**21), ("A" * 2**21 + "@AAA", 2**21), ("A", 1)):
        with pytest.raises(Refused, match=f"at input byte {place}$"):
            image_bytes(text)


def test_two_long_requests_leave_the_collector_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is read until the second has begun, or has had time to: neither turns it on under the other."""
    begun, over = threading.Event(), threading.Event()
    states = list[bool]()

    def first(body: bytearray, struct: str) -> None:
        begun.wait(0.3)
        states.append(gc.isenabled())

    def second(body: bytearray, struct: str) -> None:
        begun.set()
        over.wait(0.3)
        states.append(gc.isenabled())

    def read(body: bytearray, struct: str) -> None:
        (first if body else second)(body, struct)

    monkeypatch.setattr(Fields, "read", read)
    threads = [threading.Thread(target=bodies._long, args=(bytearray(each), "X")) for each in (b"1", b"")]
    for each in threads:
        each.start()
    threads[0].join()
    over.set()
    threads[1].join()
    assert states == [False, False]
    assert gc.isenabled()


# --- all of them together ---------------------------------------------------------------------------------------------


def test_a_budget() -> None:
    budget = Budget(10)
    assert [budget.take(6), budget.take(5), budget.take(4), budget.take(1)] == [True, False, True, False]
    budget.give(6)
    assert budget.take(6)


def test_g_many_long_bodies_at_once() -> None:
    """attacks.md G: each is short enough, all together are not; one more is told so, and what ends makes room."""
    app = FastAPI()

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{len(await request.body())} bytes")

    for path in ("/api/chat", "/v1/completions", "/completions", "/api/blobs/sha256:0"):
        app.add_api_route(path, answer, methods=["POST"])
    guard = Guard(app, Settings(max_bodies_bytes=100_000))
    with listening(guard) as port:
        with connected(port) as first, connected(port) as leaves:
            for each, size in ((first, 50_000), (leaves, 30_000)):
                head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 1}\r\n\r\n"
                each.sendall(head.encode() + bytes(size))
            wait_for(guard, 80_000)
            refused = [ask(port, path, method="POST", body=bytes(30_000)) for path in ("/api/chat", "/completions")]
            assert [each.status for each in refused] == [503, 503]
            assert {each.headers["retry-after"] for each in refused} == {"1"}
            said = [json.loads(each.body)["error"] for each in refused]
            assert said[0].startswith("server busy, please try again.")
            assert (said[1]["type"], said[1]["message"]) == ("api_error", said[0])
            assert ask(port, "/api/chat", method="POST", body=bytes(10_000)).status == 200
            assert ask(port, "/api/blobs/sha256:0", method="POST", body=bytes(300_000)).body == b"300000 bytes"
            leaves.close()
            wait_for(guard, 50_000)
            assert ask(port, "/api/chat", method="POST", body=bytes(30_000)).status == 200
            first.sendall(b"x")
            assert reply(first, "POST").body == b"50001 bytes"
        wait_for(guard, 0)
        assert ask(port, "/api/chat", method="POST", body=bytes(100_000)).status == 200


LEAVES = ("1", "999", "1.5", '"ab"', '"αβ"', '"😀"', r'"\ud800"', "[]", "[0]", "{}", '{"":0}', '{"":[]}', '{"":"ab"}')
DEEP = (400 * "[" + 400 * "]", 400 * '{"":' + "0" + 400 * "}")


@pytest.mark.parametrize("leaf", [*LEAVES, *DEEP], ids=lambda leaf: leaf[:12])
def test_values_take_no_more_memory_than_they_weigh(leaf: str) -> None:
    """Of whatever kind they are, in a list and behind keys of their own."""
    count = 50 if len(leaf) > 100 else 12_000
    for text in (
        f'{{"a":[{",".join([leaf] * count)}]}}',
        f'{{{",".join(f""""{n:x}":{leaf}""" for n in range(count))}}}',
    ):
        body = bytearray(text.encode())
        gc.disable()
        tracemalloc.start()
        try:
            fields = Fields.read(body, "X")
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
        assert fields.values
        assert held <= bodies.weight(len(body), bodies.values(body))


def test_the_budget_counts_values() -> None:
    """A request is read, and a second of so few bytes is refused while it is."""
    app = FastAPI()

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{len(await request.body())} bytes")

    app.add_api_route("/api/chat", answer, methods=["POST"])
    guard = Guard(app, Settings(max_bodies_bytes=100_000))
    with listening(guard) as port:
        with connected(port) as first:
            first.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 401\r\n\r\n" + b"[" * 400)
            wait_for(guard, 400 * (1 + bodies.VALUE_BYTES))
            assert ask(port, "/api/chat", method="POST", body=b"," * 400).status == 503
            assert ask(port, "/api/chat", method="POST", body=b" " * 400).status == 200
            first.sendall(b"x")
            assert reply(first, "POST").body == b"401 bytes"
        wait_for(guard, 0)


def wait_for(guard: Guard, held: int) -> None:
    until = time.monotonic() + 30
    while guard._bodies._held != held:
        assert time.monotonic() < until
        time.sleep(0.005)
