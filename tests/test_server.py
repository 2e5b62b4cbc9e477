"""The server whole: models of one's own, vectors, clients of others, models that come and go, clients that leave."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import ollama
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

import pumice
import tiny
from pumice import creating
from pumice.server import library
from pumice.server.app import create_app
from pumice.server.running import listening
from pumice.server.settings import Settings
from pumice.store.transfer import Progress
from served import post, served

COLD = {"temperature": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's file, with its projector's beside it."""
    folder = tmp_path_factory.mktemp("pair")
    pumice.convert(tiny.hf_folder(folder / "hf", family="1.5", seed=5), folder / "lm.gguf")
    return folder


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with served() as base:
        yield base


@pytest.fixture
def client(base: str) -> Iterator[ollama.Client]:
    with ollama.Client(base) as client:
        yield client


# --- models of one's own ----------------------------------------------------------------------------------------------


def test_a_model_is_made_of_files_shown_asked_copied_and_removed(
    client: ollama.Client, pair: Path, places: Path
) -> None:
    files = {}
    for name in ("lm.gguf", "mmproj-lm.gguf"):
        files[name] = client.create_blob(pair / name)
        assert files[name] == "sha256:" + hashlib.sha256((pair / name).read_bytes()).hexdigest()
    made = client.create(
        "mine", files=files, template="{{ .System }} {{ .Prompt }}", system="Be brief.",
        parameters={"temperature": 0, "num_predict": 3, "stop": ["x"]}, license="Free.",
        messages=[ollama.Message(role="user", content="Hi"), ollama.Message(role="assistant", content="Ho")],
    )  # fmt: skip
    assert made.status == "success"
    shown = client.show("mine")
    assert (shown.template, shown.license) == ("{{ .System }} {{ .Prompt }}", "Free.")
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.details is not None
    assert shown.details.families == ["llama", "clip"]
    assert "PARAMETER num_predict 3" in (shown.modelfile or "")
    answer = client.chat("mine", [ollama.Message(role="user", content="What?")])
    model = pumice.load("mine")
    assert model.dressing.system == "Be brief."
    assert answer.message.content == model.ask("What?").text
    assert answer.eval_count is not None
    assert answer.eval_count <= 3
    client.copy("mine", "other")
    assert {"mine:latest", "other:latest"} <= {each.model for each in client.list().models}
    derived = client.create("third", from_="mine", system="Be long.", stream=True)
    assert [each.status for each in derived][-1] == "success"
    assert client.show("third").template == shown.template
    for name in ("mine", "other", "third"):
        client.delete(name)
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.delete("mine")
    assert not list((places / "home" / "models" / "blobs").glob("sha256-*"))


def test_blobs(base: str, places: Path) -> None:
    data = b"some bytes"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    url = f"{base}/api/blobs/{digest}"
    assert httpx2.head(url).status_code == 404
    assert [httpx2.post(url, content=data).status_code for _ in range(2)] == [201, 200]
    assert httpx2.head(url).status_code == 200
    wrong = httpx2.post(f"{base}/api/blobs/sha256:{'0' * 64}", content=data)
    assert (wrong.status_code, wrong.json()["error"][:30]) == (400, 'digest mismatch, expected "sha'[:30])
    assert httpx2.head(f"{base}/api/blobs/xyz").status_code == 400


@pytest.mark.parametrize("prunes", [True, False])
def test_what_a_stopped_upload_left_is_removed_at_the_start(places: Path, prunes: bool) -> None:
    with served(Settings(port=0)) as base:
        for data in (b"old", b"new"):
            post_url = f"{base}/api/blobs/sha256:{hashlib.sha256(data).hexdigest()}"
            assert httpx2.post(post_url, content=data).status_code == 201
    blobs = places / "home" / "models" / "blobs"
    old = blobs / f"sha256-{hashlib.sha256(b'old').hexdigest()}"
    os.utime(old, (0, 0))
    with served(Settings(port=0, prunes=prunes)):
        ends = time.monotonic() + (10 if prunes else 0.5)
        while old.exists() and time.monotonic() < ends:
            time.sleep(0.02)
    assert old.exists() != prunes
    assert len(list(blobs.glob("sha256-*"))) == (1 if prunes else 2)


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(("body", "words"), [
    ({"model": "x"}, "neither 'from' or 'files' was specified"),
    ({"model": "pebble", "from": "pebble"}, "invalid model name"),
    ({"model": "x", "from": "pebble", "template": "{{ if }}"}, "template"),
    ({"model": "x", "files": {"a.gguf": "sha256:1"}}, "invalid digest format"),
    ({"model": "x", "from": "pebble", "quantize": "q99"}, "q99"),
])  # fmt: skip
def test_what_no_model_is_made_of(base: str, body: dict[str, Any], words: str) -> None:
    answer = post(base, "/api/create", {**body, "stream": False})
    assert answer.status_code == 400
    assert words.lower() in answer.json()["error"].lower()


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_vectors(base: str, client: ollama.Client) -> None:
    model = pumice.load("pebble")
    texts = ["A red square.", "A blue circle."]
    wanted = model.embed(texts).vectors_ND.numpy()
    found = client.embed("pebble", texts)
    np.testing.assert_allclose(np.array(found.embeddings), wanted, atol=2e-2)
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)
    assert found.prompt_eval_count == sum(model.embed(texts).tokens)
    one = client.embeddings("pebble", texts[0]).embedding
    np.testing.assert_allclose(np.array(one) / np.linalg.norm(one), wanted[0], atol=2e-2)
    assert len(client.embed("pebble", texts[0], dimensions=8).embeddings[0]) == 8
    assert client.embed("pebble", []).embeddings == []
    with openai.OpenAI(base_url=base + "/v1", api_key="x") as other:
        # Left to itself the client asks for base64.
        for more in ({}, {"encoding_format": "float"}):
            data = other.embeddings.create(model="pebble", input=texts, **more).data  # type: ignore[arg-type]
            np.testing.assert_allclose(np.array([each.embedding for each in data]), wanted, atol=2e-2)
    refused = post(base, "/v1/embeddings", {"model": "pebble", "input": [], "encoding_format": "float"})
    assert refused.json()["error"]["message"] == "invalid input"


def test_each_text_has_its_vector_an_empty_one_too(base: str) -> None:
    """A client counts: the third vector is that of its third text."""
    wanted = pumice.load("pebble").embed(["one", "", "two"]).vectors_ND.tolist()
    found = post(base, "/api/embed", {"model": "pebble", "input": ["one", "", "two"]}).json()["embeddings"]
    data = post(base, "/v1/embeddings", {"model": "pebble", "input": ["one", "", "two"]}).json()["data"]
    for vectors in (found, [each["embedding"] for each in data]):
        np.testing.assert_allclose(vectors, wanted, atol=1e-5)
    assert post(base, "/api/embed", {"model": "pebble", "input": ""}).json()["embeddings"] == []
    for wrong in (0, False, {}, ["one", 2]):
        assert post(base, "/api/embed", {"model": "pebble", "input": wrong}).status_code == 400


# --- clients of others ------------------------------------------------------------------------------------------------


def test_langchain(base: str) -> None:
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        _with_langchain(base)
        gc.collect()  # it never closes its clients


def _with_langchain(base: str) -> None:
    wanted = pumice.load("pebble").ask("Hi").text
    options: dict[str, Any] = {"model": "pebble:1.6", "base_url": base, "temperature": 0}
    chat = ChatOllama(**options, validate_model_on_init=True)
    said = chat.invoke("Hi")
    assert said.content == wanted
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(str(each.content) for each in chat.stream("Hi")) == wanted
    assert OllamaLLM(**options).invoke("Hi") == wanted
    schema = {"title": "Count", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert isinstance(chat.with_structured_output(schema, method="json_schema").invoke("Hi"), dict)
    vectors = OllamaEmbeddings(model="pebble", base_url=base).embed_documents(["a", "b"])
    assert len(vectors) == 2


def test_what_langchain_community_sends(base: str) -> None:
    """Nulls everywhere, no `stream`."""
    names = (
        "mirostat", "mirostat_eta", "mirostat_tau", "num_ctx", "num_gpu", "num_thread", "num_predict", "repeat_last_n",
        "repeat_penalty", "stop", "tfs_z", "top_k", "top_p",
    )  # fmt: skip
    nulls = dict.fromkeys(("format", "system", "template", "context", "raw", "keep_alive"))
    body = {"model": "pebble", "prompt": "Hi", **nulls, "options": {**dict.fromkeys(names), "temperature": 0}}
    answer = post(base, "/api/generate", body)
    lines = [json.loads(each) for each in answer.text.splitlines()]
    assert lines[-1]["done"]
    assert "".join(each["response"] for each in lines) == pumice.load("pebble").ask("Hi").text


def test_what_open_webui_asks(base: str) -> None:
    version = httpx2.get(base + "/api/version", headers={"Authorization": "Bearer x"}).json()["version"]
    assert all(each.isdigit() for each in version.split("."))
    body = {
        "model": "pebble", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "metadata": {},
        "options": {"temperature": 0, "mirostat": 1, "num_gpu": 1, "use_mlock": True}, "session_id": "x",
    }  # fmt: skip
    lines = [json.loads(each) for each in post(base, "/api/chat", body).text.splitlines()]
    assert lines[-1]["eval_duration"] >= 0
    post(base, "/api/generate", {"model": "pebble", "keep_alive": 0, "prompt": ""})
    assert httpx2.get(base + "/api/ps").json()["models"] == []


# --- models come and go, clients leave --------------------------------------------------------------------------------


def names(base: str) -> list[str]:
    return [each["name"] for each in httpx2.get(base + "/api/ps").json()["models"]]


def until(base: str, expected: list[str]) -> None:
    ends = time.monotonic() + 20
    while names(base) != expected:
        assert time.monotonic() < ends, names(base)
        time.sleep(0.05)


def test_models_stay_as_long_as_they_are_asked_to() -> None:
    with served(Settings(port=0, keep_alive_ns=400_000_000)) as base:
        body = {"model": "pebble", "prompt": "Hi", "stream": False, "options": {"num_predict": 1}}
        post(base, "/api/generate", body)
        until(base, [])
        post(base, "/api/generate", {**body, "keep_alive": -1})
        time.sleep(1.2)
        assert names(base) == ["pebble:1.6"]
        assert httpx2.get(base + "/api/ps").json()["models"][0]["expires_at"] > "2200"
        post(base, "/api/generate", {**body, "keep_alive": "1ms"})
        until(base, [])


def test_the_model_that_was_asked_longest_ago_goes_first() -> None:
    with served(Settings(port=0, max_models=1)) as base:
        for name in ("pebble", "pebble:1.5", "pebble"):
            post(base, "/api/generate", {"model": name})
            assert len(names(base)) == 1
        assert names(base) == ["pebble:1.6"]


def test_a_client_that_leaves_ends_its_answer(base: str) -> None:
    ends = pumice.load("pebble").config.stop_ids
    body = {"model": "pebble", "prompt": "Hi", "max_tokens": 1500, "logit_bias": dict.fromkeys(map(str, ends), -100)}
    post(base, "/api/generate", {"model": "pebble"})
    with httpx2.stream("POST", base + "/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(base + "/v1/completions", json=body, timeout=0.5)
    last = time.monotonic() + 20
    while 'pumice:num_requests_running{model_name="pebble:1.6"} 0.0' not in httpx2.get(base + "/metrics").text:
        assert time.monotonic() < last
        time.sleep(0.05)


@pytest.mark.parametrize(("path", "what"), [("/api/pull", "_transfer"), ("/api/create", "create")])
def test_a_client_that_leaves_ends_what_it_waits_for(
    base: str, monkeypatch: pytest.MonkeyPatch, path: str, what: str
) -> None:
    """Without a stream nothing is sent to it meanwhile: that it has gone is all there is to be seen."""
    begun, ended = threading.Event(), threading.Event()

    def endless(*_: object) -> Iterator[Progress]:
        try:
            while True:
                begun.set()
                time.sleep(0.01)
                yield Progress("on and on")
        finally:
            ended.set()

    monkeypatch.setattr(library if what == "_transfer" else creating, what, endless)
    body = {"model": "a/b", "from": "pebble", "stream": False}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(base + path, json=body, timeout=0.5)
    assert begun.is_set()
    assert ended.wait(30)
    assert httpx2.get(base + "/api/tags").status_code == 200


def test_metrics_count(base: str) -> None:
    def count(name: str) -> float:
        lines = httpx2.get(base + "/metrics").text.splitlines()
        return sum(float(each.rpartition(" ")[2]) for each in lines if each.startswith(f"pumice:{name}{{"))

    before = [count("generation_tokens_total"), count("prompt_tokens_total"), count("request_success_total")]
    body = {"model": "pebble", "prompt": "Hi", "stream": False, "options": COLD}
    answer = post(base, "/api/generate", body).json()
    after = [count("generation_tokens_total"), count("prompt_tokens_total"), count("request_success_total")]
    more = [b - a for a, b in zip(before, after)]
    assert more == [answer["eval_count"], answer["prompt_eval_count"], 1]


def test_the_openapi_document_is_shown(base: str) -> None:
    assert "swagger" in httpx2.get(base + "/docs").text.lower()
    assert "/api/chat" in httpx2.get(base + "/openapi.json").json()["paths"]


# --- bugs of ours -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_is_said_in_the_form_of_the_api(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr("pumice.server.answers.ready", bug)
    monkeypatch.setattr("pumice.store.pulling.pull", lambda *_: iter(lambda: {}["a bug"], None))
    for path, body in (("/api/chat", {}), ("/v1/chat/completions", {}), ("/api/pull", {"stream": False})):
        answer = post(base, path, {"model": "pebble", "messages": [{"role": "user", "content": "Hi"}], **body})
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert "the server failed" in (error["message"] if path.startswith("/v1") else error)
    for each in threading.enumerate():  # it may still be saying what it died of, after it was answered for
        if each.name == "transfer":
            each.join(30)


# --- requests out of the document -------------------------------------------------------------------------------------

document = schemathesis.openapi.from_asgi("/openapi.json", create_app(Settings(port=0)))


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a store of its own, which asks no other machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PUMICE_HOME", str(tmp_path_factory.mktemp("home")))
        with served(Settings(port=0, offline=True)) as base:
            yield base


@document.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_out_of_the_document_breaks_the_server(case: Any, offline: str) -> None:
    answer = case.call(base_url=offline, timeout=60)
    assert answer.status_code < 500, answer.text[:300]


def test_offline_is_said_in_words(offline: str) -> None:
    for path, body, verb in (
        ("/api/pull", {"model": "llava"}, "pull"),
        ("/api/push", {"model": "pebble"}, "push"),
        ("/api/create", {"model": "mine", "from": "llava"}, "pull"),
    ):
        answer = post(offline, path, body)
        words = f"this server is offline and cannot {verb} a model; start it without --offline"
        assert (answer.status_code, answer.json()) == (400, {"error": words})
    assert post(offline, "/api/pull", {"model": "pebble", "stream": False}).json() == {"status": "success"}


def test_small_answers_are_sent_at_once() -> None:
    """With Nagle's algorithm each answer waits for the client's delayed acknowledgement, 40 ms."""
    with listening(Settings(port=0)) as place:
        assert place.proto == socket.IPPROTO_TCP
