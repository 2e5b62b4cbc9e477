"""The server on a Ray cluster: what the door decides, then two nodes of this machine with a replica each, against which
the tests of both APIs run too."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

import pumice
from pumice.errors import UserError
from pumice.ollama_prompt import Turn
from pumice.server.app import create_app
from pumice.server.asked import KNOWN, Known
from pumice.server.bodies import LONG, VALUE_BYTES, Budget
from pumice.server.settings import Settings
from pumice.server.wire import Fields
from served import listening, post
from test_ollama_api import RED

yaml = pytest.importorskip("yaml", reason="ray is not installed: pip install 'pumice[ray]'")
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'pumice[ray]'")
cluster = pytest.importorskip("pumice.server.cluster", reason="ray is not installed: pip install 'pumice[ray]'")
DeploymentBroadcastResponse = pytest.importorskip("ray.serve.handle").DeploymentBroadcastResponse

HERE = Path(__file__).parent
KEY = {"Authorization": "Bearer sesame"}
MARK = f"PUMICE_TEST_CLUSTER={os.getpid()}"
"""In the environment of every process of the cluster."""
START_S = 150
HANGS = object()
WALKS = ("tests/test_ollama_api.py", "tests/test_openai_api.py")


# --- the door, with replicas that only say what reached them ----------------------------------------------------------


class Replicas:
    """Stands for Ray's handle: answers with its script, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        """Path and multiplexed model."""
        self.known: list[Any] = []
        """What came with each as the conversation of its `context`."""
        self.remembers: dict[tuple[str, tuple[int, ...]], Known] = {}
        self.everywhere: list[tuple[str, bytes]] = []
        self.fails: Exception | None = None
        self.says: list[Any] = []
        self.cancelled = 0

    def options(self, *, method_name: str, stream: bool, multiplexed_model_id: str) -> Any:
        assert (method_name, stream) == ("answer", True)

        def remote(scope: dict[str, Any], body: bytes) -> Any:
            self.asked.append((scope["path"], multiplexed_model_id))
            self.known.append(scope[KNOWN])
            return Coming(self)

        return SimpleNamespace(remote=remote)

    def broadcast(self, method: str, *said: Any) -> Any:
        if method == "remembered":
            says: list[Any] = [None, HANGS, ray.exceptions.RayActorError(), self.remembers.get(said)]  # type: ignore[call-overload]
        else:
            assert method == "whole"
            self.everywhere.append((said[0]["path"], said[1]))
            says = self.says

        async def results() -> list[Any]:
            return [Result(each) for each in says]

        return DeploymentBroadcastResponse(results(), None)


class Result:
    """What one replica says, in Ray's own answer of all: an exception is raised, and HANGS never comes."""

    def __init__(self, said: Any) -> None:
        self._said = said

    def get(self, timeout_s: float) -> Any:
        assert 0 < timeout_s <= cluster.ALL_S
        if self._said is HANGS:
            raise ray.exceptions.GetTimeoutError
        if isinstance(self._said, Exception):
            raise self._said
        return self._said


class Coming:
    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    async def __aiter__(self) -> AsyncIterator[list[dict[str, Any]]]:
        if self._replicas.fails is not None:
            raise self._replicas.fails
        yield [{"type": "http.response.start", "status": 200, "headers": []}]
        yield [{"type": "http.response.body", "body": b"answer", "more_body": False}]

    def cancel(self) -> None:
        self._replicas.cancelled += 1


@contextmanager
def door(settings: Settings) -> Iterator[tuple[str, Replicas]]:
    replicas = Replicas()
    with listening(cluster.guarded(settings, replicas)) as port:
        yield f"http://127.0.0.1:{port}", replicas


def test_the_guard_stands_before_the_door() -> None:
    with door(Settings(keys=("sesame",), max_body_bytes=1000)) as (base, replicas):
        for verb, path in (("POST", "/api/chat"), ("POST", "/v1/completions"), ("GET", "/api/ps"), ("GET", "/metrics")):
            assert httpx2.request(verb, base + path, json={"model": "pebble"}).status_code == 401
        assert httpx2.post(base + "/api/chat", headers=KEY, content=b" " * 1001).status_code == 413
        for bad in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            assert httpx2.post(base + "/api/chat", headers=KEY | bad, json={"model": "pebble"}).status_code == 403
        assert httpx2.get(base + "/health").status_code == 200
        assert not replicas.asked
        assert not replicas.everywhere
        assert httpx2.post(base + "/api/chat", headers=KEY, json={"model": "pebble"}).text == "answer"
        assert replicas.asked == [("/api/chat", "pebble:1.6")]
        until = time.monotonic() + 60
        while not replicas.cancelled:  # one that has ended is cancelled too, to no effect, behind its answer
            assert time.monotonic() < until
            time.sleep(0.01)


def test_who_answers() -> None:
    """A model's requests go to one replica under one name, whatever name they use; the rest stays at the door."""
    with door(Settings()) as (base, replicas):
        for path, body, model in (
            ("/api/generate", b'{"MODEL":"Pebble","prompt":"x"}', "pebble:1.6"),
            ("/api/chat", b'{"model":"pebble:1.5","messages":[{}],"keep_alive":0}', "pebble:1.5"),
            ("/v1/embeddings", b'{"model":"pebble:9"}', ""),
            ("/api/embed", b"[]", ""),
            ("/pumice/see", b"", ""),
        ):
            assert httpx2.post(base + path, content=body).text == "answer"
            assert replicas.asked.pop() == (path, model)
        assert httpx2.get(base + "/api/tags").json()["models"]
        assert httpx2.get(base + "/").status_code == 200
        assert post(base, "/api/show", {"model": "pebble"}).status_code == 200
        assert httpx2.get(base + "/api/ps").json() == {"models": []}  # no replica says anything
        assert not replicas.asked


def test_a_conversation_goes_with_its_context_to_whichever_replica_goes_on_with_it() -> None:
    with door(Settings()) as (base, replicas):
        known = Known((Turn("user", "What?", 1), Turn("assistant", "It.")), (b"picture",))
        replicas.remembers["pebble:1.6", (1, 2)] = known
        for body, expected in (
            ({"context": [1, 2]}, known),
            ({"context": [1]}, None),
            ({"context": ["1", "2"]}, None),  # what is wrong with it, a replica says
            ({}, None),
        ):
            post(base, "/api/generate", {"model": "pebble", "prompt": "And?", **body})
            assert replicas.known.pop() == expected
        post(base, "/api/chat", {"model": "pebble", "messages": [{}], "context": [1, 2]})
        assert replicas.known.pop() is None


def test_others_are_answered_while_the_door_reads_a_long_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread they never would be: it is read when another was answered."""
    begun, answered, read = threading.Event(), threading.Event(), Fields.read

    def slowly(body: bytes, struct: str) -> Fields:
        begun.set()
        assert answered.wait(60)
        return read(body, struct)

    body = json.dumps({"model": "pebble", "prompt": "x" * 2 * LONG}).encode()
    with door(Settings()) as (base, replicas), ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Fields, "read", slowly)
        asking = pool.submit(httpx2.post, base + "/api/generate", content=body, timeout=60)
        assert begun.wait(60)
        assert httpx2.get(base + "/api/version").status_code == 200
        answered.set()
        assert asking.result().text == "answer"
        assert replicas.asked == [("/api/generate", "pebble:1.6")]


def test_a_replica_takes_no_more_than_it_has_room_for() -> None:
    """Beside one that is read, a second of so many bytes finds none; when the first is over, another does."""
    scope = {**cluster._get("/api/show"), "method": "POST"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        await receive()  # which never ends

    async def statuses() -> list[int]:
        replica = SimpleNamespace(_app=app, _bodies=Budget(1000 + VALUE_BYTES))
        found = []
        first = cluster.Replica.answer(replica, scope, b"x" * 600)
        for answer in (first, cluster.Replica.answer(replica, scope, b"x" * 600)):
            found.append((await anext(answer))[0]["status"])
        await first.aclose()
        for body in (b"," + b"x" * 600, b",," + b"x" * 900):
            async with aclosing(cluster.Replica.answer(replica, scope, body)) as answer:
                found.append((await anext(answer))[0]["status"])
        return found

    assert asyncio.run(statuses()) == [200, 503, 200, 503]


def test_what_changes_a_model_is_told_to_all() -> None:
    with door(Settings()) as (base, replicas):
        replicas.says = [cluster.Said(200, b"gone", "a"), cluster.Said(500, b"wrong", "b")]
        answer = post(base, "/api/generate", {"model": "pebble", "keep_alive": 0})
        assert (answer.status_code, answer.text) == (500, "wrong")
        assert replicas.everywhere.pop()[0] == "/api/generate"
        assert httpx2.request("DELETE", base + "/api/delete", json={"model": "pebble"}).status_code == 400
        path, order = replicas.everywhere.pop()
        assert (path, json.loads(order)) == ("/api/generate", {"model": "pebble:1.6", "keep_alive": 0})
        assert httpx2.request("DELETE", base + "/api/delete", json={"model": "nope"}).status_code == 404
        assert not replicas.everywhere
        assert not replicas.asked


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_no_room_and_no_replica(path: str) -> None:
    with door(Settings()) as (base, replicas):
        for failure, words in (
            (cluster.BackPressureError(9, 9), "server busy, please try again.  maximum pending requests exceeded"),
            (ray.exceptions.RayActorError(), "has gone"),
        ):
            replicas.fails = failure
            answer = post(base, path, {"model": "pebble"})
            said = answer.json()["error"]
            assert answer.status_code == 503
            assert words in (said if path == "/api/chat" else said["message"])


def test_what_is_in_memory_is_counted_together() -> None:
    def model(name: str, size: int, until: str) -> dict[str, Any]:
        return {"name": name, "size": size, "size_vram": 1, "expires_at": until}

    first = json.dumps({"models": [model("a", 10, "2026-01-02T00:00:00Z"), model("b", 5, "2026")]}).encode()
    second = json.dumps({"models": [model("a", 30, "2026-01-01T00:00:00Z")]}).encode()
    found = json.loads(cluster.loaded([cluster.Said(200, first, "x"), cluster.Said(200, second, "y")]).body)["models"]
    assert found == [
        {"name": "a", "size": 40, "size_vram": 2, "expires_at": "2026-01-02T00:00:00Z", "replicas": 2},
        {"name": "b", "size": 5, "size_vram": 1, "expires_at": "2026", "replicas": 1},
    ]
    text = b'# HELP pumice:n_total N.\n# TYPE pumice:n_total counter\npumice:n_total{m="a"} 3.0\n'
    merged = cluster.counts([cluster.Said(200, text, "x"), cluster.Said(200, text, "y")]).body.decode()
    assert merged.splitlines() == [
        "# HELP pumice:n_total N.", "# TYPE pumice:n_total counter",
        'pumice:n_total{m="a",replica="x"} 3.0', 'pumice:n_total{m="a",replica="y"} 3.0',
    ]  # fmt: skip


def test_a_replica_that_hangs_is_left_out() -> None:
    """The others are heard, and one that is not well, or has gone, says nothing that counts."""
    with door(Settings()) as (base, replicas):
        models = json.dumps({"models": [{"name": "a", "size": 1, "size_vram": 0, "expires_at": "2026"}]}).encode()
        others = [HANGS, ray.exceptions.RayActorError(), cluster.Said(503, b"busy", "c")]
        replicas.says = [*others, cluster.Said(200, models, "a")]
        (held,) = httpx2.get(base + "/api/ps").json()["models"]
        assert (held["name"], held["replicas"]) == ("a", 1)
        replicas.says = [*others, cluster.Said(200, b"# TYPE n gauge\nn 3.0\n", "a")]
        assert httpx2.get(base + "/metrics").text.splitlines()[-1] == 'n{replica="a"} 3.0'
        replicas.says = [HANGS, cluster.Said(200, b"gone", "a")]
        assert post(base, "/api/generate", {"model": "pebble", "keep_alive": 0}).text == "gone"
        replicas.says = others
        assert httpx2.get(base + "/api/ps").json() == {"models": []}


def test_every_route_is_given_to_somebody() -> None:
    """A new route that asks a model must be in ANSWERS, or the door would load one."""
    here = {"/api/show", "/api/copy", "/api/pull", "/api/push", "/api/create", "/api/blobs/{digest}",
            "/api/me", "/api/signout"}  # fmt: skip
    paths: set[str] = set()

    def walk(routes: Any) -> None:
        for each in routes:
            if isinstance(each, APIRoute) and "POST" in each.methods:
                paths.add(each.path)
            elif isinstance(inner := vars(each).get("original_router"), object) and inner is not None:
                walk(inner.routes)

    walk(create_app(Settings()).routes)
    assert paths == here | cluster.ANSWERS


def test_settings_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1")
    with pytest.raises(UserError, match="no API key"):
        cluster.app({})
    with pytest.raises(UserError, match="takes no arguments, and replicas came"):
        cluster.app({"replicas": "3"})


# --- two nodes --------------------------------------------------------------------------------------------------------


def test_a_cluster_of_two() -> None:
    """One test, because a cluster takes long to start: its parts are below, in the order in which they run."""
    with two_nodes() as base:
        the_walks_pass(base)
        both_replicas_answer(base)
        a_context_keeps_its_picture_on_either_replica(base)
        a_client_that_leaves_ends_its_answer(base)
        evil = {"Origin": "https://evil.example"}
        assert httpx2.get(base + "/api/tags", headers=evil, timeout=30).status_code == 403
        assert post(base, "/api/generate", {"model": "pebble", "keep_alive": 0}).json()["done_reason"] == "unload"
        assert httpx2.get(base + "/api/ps", timeout=30).json() == {"models": []}
        one_that_hangs_is_left_out(base)
        one_that_dies_is_replaced(base)


def the_walks_pass(base: str) -> None:
    """Asked one after another, they come to the replica that has the model: `context` is known to it alone."""
    assert post(base, "/api/generate", {"model": "pebble"}).status_code == 200
    time.sleep(2)  # until the door knows where the model is
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", *WALKS],
        cwd=HERE.parent, env={**os.environ, "PUMICE_TEST_SERVER": base}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def both_replicas_answer(base: str) -> None:
    """Each takes two at a time here; of six the others wait, and none is lost or another's."""
    model = pumice.load("pebble")
    questions = [f"What is {number}?" for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        bodies = [
            {"model": "pebble", "prompt": each, "stream": False, "options": {"temperature": 0}} for each in questions
        ]
        found = list(pool.map(lambda body: post(base, "/api/generate", body).json()["response"], bodies))
    assert found == [model.ask(each).text for each in questions]
    (held,) = httpx2.get(base + "/api/ps", timeout=30).json()["models"]
    assert held["replicas"] == 2


def a_context_keeps_its_picture_on_either_replica(base: str) -> None:
    """Of six at a time some come to the replica that did not give it."""
    options = {"model": "pebble", "stream": False, "options": {"temperature": 0}}
    first = {**options, "prompt": "Which colour is it?", "images": [RED]}
    follow = {**options, "prompt": "What is it?", "context": post(base, "/api/generate", first).json()["context"]}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: post(base, "/api/generate", follow).json(), range(12)))
    # A prompt with the picture is that much longer than one of the texts alone.
    assert len({(each["response"], each["prompt_eval_count"]) for each in found}) == 1
    assert found[0]["prompt_eval_count"] > len(follow["context"]) + 100


def a_client_that_leaves_ends_its_answer(base: str) -> None:
    ends = pumice.load("pebble").config.stop_ids
    body = {
        "model": "pebble",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 700,
        "temperature": 1.5,
        "logit_bias": {str(each): -100 for each in ends},
    }
    before = ended(base, "abort")
    began = time.monotonic()
    with httpx2.stream("POST", base + "/v1/chat/completions", json={**body, "stream": True}, timeout=60) as answer:
        pieces = answer.iter_raw()
        for _ in range(3):
            next(pieces)
    first_s = time.monotonic() - began
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(base + "/v1/chat/completions", json=body, timeout=0.3)
    until = time.monotonic() + 20
    while ended(base, "abort") < before + 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    whole = post(base, "/v1/chat/completions", body)
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    assert whole.elapsed.total_seconds() > first_s, "the pieces of a stream came at its end"


def one_that_hangs_is_left_out(base: str) -> None:
    names = set(re.findall('replica="(.*?)"', httpx2.get(base + "/metrics", timeout=30).text))
    assert len(names) == 2
    hangs, _ = both()
    os.kill(hangs, signal.SIGSTOP)
    try:
        found = set(re.findall('replica="(.*?)"', httpx2.get(base + "/metrics", timeout=30).text))
        assert len(found) == 1
        assert found < names
    finally:
        os.kill(hangs, signal.SIGCONT)


def both() -> list[int]:
    """The processes of the replicas."""
    replicas = [
        each for each in marked() if b"ServeReplica:pumice:models" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]
    assert len(replicas) == 2
    return replicas


def one_that_dies_is_replaced(base: str) -> None:
    """Whoever was waiting for it is told so; who asks again is answered by the other."""
    os.kill(both()[0], signal.SIGKILL)
    until = time.monotonic() + 20
    while True:
        answer = post(base, "/api/generate", {"model": "pebble", "prompt": "Hi", "stream": False})
        if answer.status_code == 200:
            break
        assert (answer.status_code, answer.json().keys()) == (503, {"error"})
        assert time.monotonic() < until


def ended(base: str, reason: str) -> float:
    lines = httpx2.get(base + "/metrics", timeout=30).text.splitlines()
    mine = [each for each in lines if each.startswith("pumice:request_success_total") and f'"{reason}"' in each]
    return sum(float(each.rpartition(" ")[2]) for each in mine)


@contextmanager
def two_nodes() -> Iterator[str]:
    """The example's configuration with two small replicas, run by Ray's own command; the base URL. No process of it is
    left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = yaml.safe_load((HERE.parent / "examples" / "cluster.yaml").read_text())
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"] = {"PUMICE_OPEN_BIND": "1", "PUMICE_OFFLINE": "1"}
    models, _ = application["deployments"]
    models |= {"max_ongoing_requests": 2, "ray_actor_options": {"num_cpus": 1}}
    models["autoscaling_config"] = {"min_replicas": 2, "max_replicas": 2, "target_ongoing_requests": 1}
    # Not pytest's own folder: the names of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "ray").mkdir()
        (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
        # A token of its own, or Ray would write one into the home folder.
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment = {**os.environ, **dict([MARK.split("=")]), **secret, "RAY_TMPDIR": name}
        environment["RAY_USAGE_STATS_ENABLED"] = "0"
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "cluster_of_two.py"), str(folder / "cluster.yaml")],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            base = f"http://127.0.0.1:{port}"
            await_start(base, process, folder / "log")
            yield base
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(150)
            finally:
                left = marked()
                for each in left:
                    os.kill(each, signal.SIGKILL)
        assert not left, "processes of Ray stayed behind"


def await_start(base: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            if httpx2.get(base + "/api/version", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.3)


def marked() -> list[int]:
    """The processes of the cluster."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if MARK.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found
