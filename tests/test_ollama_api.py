"""Ollama's API over a socket: the test vectors of its protocol, and its own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import ollama
import pytest
from PIL import Image

import pumice
from pumice.ollama_prompt import Turn
from pumice.server.asked import Asked, Contexts, ready
from served import post, served

PICTURES = Path(pumice.__file__).parent.parent.parent / "examples"
COLD = {"temperature": 0}


def red() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 20, 20)).save(data, "PNG")
    return data.getvalue()


RED = base64.b64encode(red()).decode()


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with served() as base:
        yield base


@pytest.fixture(scope="module")
def model() -> pumice.Model:
    return pumice.load("pebble")


def expected(model: pumice.Model, prompt: str, image: bytes | None = None, **more: Any) -> str:
    return model.ask(prompt, image, sampling=pumice.Sampling(max_tokens=512), **more).text


# --- what Ollama's server says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body", "status", "error"), [
    ("/api/generate", "", 400, "missing request body"),
    ("/api/generate", "[1]", 400, "json: cannot unmarshal array into Go value of type api.GenerateRequest"),
    ("/api/generate", '{"model":"nope","prompt":"x"}', 404, "model 'nope' not found"),
    ("/api/generate", '{"prompt":"x"}', 404, "model '' not found"),
    ("/api/generate", '{"model":"pebble","prompt":"x","keep_alive":"300"}', 400,
     'time: missing unit in duration "300"'),
    ("/api/generate", '{"model":"pebble","prompt":"x","options":{"top_k":"40"}}', 400,
     'option "top_k" must be of type integer'),
    ("/api/generate", '{"model":"pebble","prompt":"x","raw":true,"system":"s"}', 400,
     "raw mode does not support template, system, or context"),
    ("/api/generate", '{"model":"pebble","prompt":"x","think":true}', 400, '"pebble" does not support thinking'),
    ("/api/generate", '{"model":"pebble","prompt":"x","format":"yaml"}', 400, "invalid format: "),
    ("/api/generate", '{"model":"pebble","prompt":"x","suffix":"y"}', 400, "does not support insert"),
    ("/api/generate", '{"model":"pebble","prompt":"x","top_logprobs":21}', 400,
     "top_logprobs must be between 0 and 20"),
    ("/api/generate", '{"model":"pebble","prompt":"x","images":["AAA@"]}', 400,
     "illegal base64 data at input byte 3"),
    ("/api/generate", '{"model":"pebble","prompt":"x","images":["AAAA"]}', 400, "image"),
    ("/api/chat", "{}", 400, "model is required"),
    ("/api/chat", '{"model":"pebble","messages":[{"role":"user","content":["a"]}]}', 400,
     "json: cannot unmarshal array into Go struct field Message.content of type string"),
    ("/api/chat", '{"model":"pebble","messages":[{"role":"user","content":"a"}],"tools":[{"type":"function"}]}', 400,
     "does not support tools"),
    ("/api/chat", '{"model":"pebble","messages":[{"role":"robot","content":"a"}]}', 400, "message role must be one of"),
    ("/api/show", "{}", 400, "model is required"),
    ("/api/show", '{"name":"nope"}', 404, "model 'nope' not found"),
    ("/api/copy", '{"source":"nope","destination":"x"}', 404, 'model "nope" not found'),
    ("/api/copy", '{"source":"pebble","destination":"../x"}', 400, 'destination "../x" is invalid'),
    ("/api/copy", '{"source":"a b","destination":"x"}', 400, 'source "a b" is invalid'),
])  # fmt: skip
def test_what_is_wrong_is_said_in_ollamas_words(base: str, path: str, body: str, status: int, error: str) -> None:
    answer = httpx2.post(base + path, content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json; charset=utf-8")
    assert answer.json().keys() == {"error"}
    assert error in answer.json()["error"]


def test_there_is_no_cloud_and_no_account(base: str) -> None:
    cloud = httpx2.get(base + "/api/status")
    assert (cloud.status_code, cloud.json()) == (200, {"cloud": {"disabled": True, "source": "env"}})
    asked = [("POST", "/api/me"), ("POST", "/api/signout"), ("DELETE", "/api/user/keys/abc")]
    found = [httpx2.request(verb, base + path) for verb, path in asked]
    assert [each.status_code for each in found] == [401, 401, 401]
    assert [each.json()["error"] for each in found] == ["unauthorized", *["you are not currently signed in"] * 2]


@pytest.mark.parametrize("images", [0, 2])
def test_the_prompt_alone(base: str, model: pumice.Model, images: int) -> None:
    """`_debug_render_only`: what the model is asked, with marks where its images stand; a mark in a text is one too."""
    seen = model.see(pumice.Question("Hi [img-0]", [red()] * images))
    parts = pumice.prompt.prompt_text(seen.parts).split("<image>")
    expected = parts[0] + "".join(f"[img-{number}]{each}" for number, each in enumerate(parts[1:]))
    turn = {"role": "user", "content": "Hi [img-0]", "images": [RED] * images}
    body = {"model": "pebble", "_debug_render_only": True}
    generated = post(base, "/api/generate", {**body, "prompt": turn["content"], "images": turn["images"]}).json()
    chatted = post(base, "/api/chat", {**body, "messages": [turn]}).json()
    for found, said in ((generated, {"response": ""}), (chatted, {"message": {"role": "assistant", "content": ""}})):
        del found["created_at"]
        told = {"rendered_template": expected, "image_count": images}
        assert found == {"model": "pebble", **said, "done": False, "_debug_info": told}


def test_paths_and_verbs(base: str) -> None:
    for verb, path, status, text in [
        ("GET", "/api/nothing", 404, "404 page not found"),
        ("POST", "/api/delete", 405, "405 method not allowed"),
        ("GET", "/api/generate", 405, "405 method not allowed"),
    ]:
        answer = httpx2.request(verb, base + path)
        assert (answer.status_code, answer.text) == (status, text)
    for path in ("/api/tags", "/api/version"):
        assert httpx2.head(base + path).status_code == 200
    assert httpx2.request("DELETE", base + "/api/delete", json={"model": "nope"}).status_code == 404


def test_loading_and_unloading(base: str) -> None:
    answer = httpx2.post(base + "/api/generate", content='{"MODEL":"PEBBLE","Prompt":"","STREAM":true}', timeout=60)
    assert {name: value for name, value in answer.json().items() if name != "created_at"} == {
        "model": "PEBBLE", "response": "", "done": True, "done_reason": "load",
    }  # fmt: skip
    loaded = httpx2.get(base + "/api/ps").json()["models"]
    assert [each["name"] for each in loaded] == ["pebble:1.6"]
    assert loaded[0]["size"] > 10_000_000
    assert loaded[0]["size_vram"] == 0
    for _ in range(2):  # what is not there is unloaded too
        answer = post(base, "/api/chat", {"model": "pebble", "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload"
        assert answer.json()["message"] == {"role": "assistant", "content": ""}
    assert httpx2.get(base + "/api/ps").json() == {"models": []}


def lines(base: str, path: str, body: object) -> list[dict[str, Any]]:
    answer = post(base, path, body)
    assert answer.headers["content-type"] == "application/x-ndjson", answer.text
    assert answer.text.endswith("\n")
    assert answer.text.isascii()
    return [json.loads(each) for each in answer.text[:-1].split("\n")]


def test_a_stream_has_the_answer_and_real_counters(base: str, model: pumice.Model) -> None:
    question = "What is in the picture?"
    found = lines(base, "/api/generate", {"model": "pebble", "prompt": question, "images": [RED], "options": COLD})
    wanted = model.ask(question, red())
    assert "".join(each["response"] for each in found) == wanted.text
    assert [each["done"] for each in found] == [False] * (len(found) - 1) + [True]
    assert all(each.keys() == {"model", "created_at", "response", "done"} for each in found[:-1])
    last = found[-1]
    assert (last["prompt_eval_count"], last["eval_count"]) == (wanted.prompt_tokens, len(wanted.tokens))
    assert last["pumice"]["image_tokens"] == list(wanted.image_tokens)
    parts = last["load_duration"] + last["prompt_eval_duration"] + last["eval_duration"]
    assert 0 < parts <= last["total_duration"]
    assert last["done_reason"] == "stop"


def test_a_chat_is_the_same_question(base: str, model: pumice.Model) -> None:
    chat = model.chat(system="Be brief.")
    first = chat.ask("What is in the picture?", red())
    second = chat.ask("Which colour?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is in the picture?", "images": [RED]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Which colour?"},
    ]
    body = {"model": "pebble", "messages": messages, "stream": False, "options": COLD}
    answer = post(base, "/api/chat", body).json()
    assert answer["message"] == {"role": "assistant", "content": second.text}
    assert answer["prompt_eval_count"] == second.prompt_tokens
    assert "context" not in answer


def test_context_keeps_the_picture(base: str, model: pumice.Model) -> None:
    body = {"model": "pebble", "prompt": "What is in the picture?", "images": [RED], "options": COLD, "stream": False}
    first = post(base, "/api/generate", body).json()
    again = {
        "model": "pebble",
        "prompt": "Which colour?",
        "context": first["context"],
        "options": COLD,
        "stream": False,
    }
    second = post(base, "/api/generate", again).json()
    chat = model.chat()
    assert chat.ask("What is in the picture?", red()).text == first["response"]
    asked = chat.ask("Which colour?")
    assert (second["response"], second["prompt_eval_count"]) == (asked.text, asked.prompt_tokens)


def test_a_context_of_before_is_read_as_text(base: str) -> None:
    body = {"model": "pebble", "prompt": "Hi", "context": [10, 11, 12], "options": COLD, "stream": False}
    without = post(base, "/api/generate", {**body, "context": []}).json()
    assert post(base, "/api/generate", body).json()["prompt_eval_count"] > without["prompt_eval_count"]


def test_a_form_is_kept_to(base: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body = {"model": "pebble", "prompt": "How many?", "format": schema, "stream": False, "options": {"num_predict": 40}}
    answer = post(base, "/api/generate", body).json()
    if answer["done_reason"] == "stop":
        assert isinstance(json.loads(answer["response"])["n"], int)
    body |= {"format": "json"}
    assert post(base, "/api/generate", body).json()["response"].startswith("{")


def test_a_schema_gets_the_names_that_it_has_and_no_others(base: str) -> None:
    """As from Ollama, whose llama.cpp reads `properties` so. Clients' schemas (of pydantic, of `llm --schema`) say
    nothing of others, and a small model would make up one after the other until its context is full."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body = {"model": "pebble", "stream": False, "options": {**COLD, "num_predict": 60}, "format": schema}
    message = {"role": "user", "content": "How many?"}
    answer = post(base, "/api/chat", {**body, "messages": [message]}).json()
    assert answer["done_reason"] == "stop"
    assert json.loads(answer["message"]["content"]).keys() == {"n"}
    wanted = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    body = {"model": "pebble", "messages": [message], "response_format": wanted, "temperature": 0, "max_tokens": 60}
    answer = post(base, "/v1/chat/completions", body).json()
    assert json.loads(answer["choices"][0]["message"]["content"]).keys() == {"n"}


def test_logprobs(base: str) -> None:
    body = {"model": "pebble", "prompt": "Hi", "logprobs": True, "top_logprobs": 2, "stream": False}
    answer = post(base, "/api/generate", {**body, "options": {**COLD, "num_predict": 4}}).json()
    told = answer["logprobs"]
    assert len(told) == answer["eval_count"]
    for each in told:
        assert each["logprob"] <= 0
        assert len(each["top_logprobs"]) == 2
        assert bytes(each["bytes"]).decode(errors="replace") == each["token"]


def test_raw_and_marks(base: str, model: pumice.Model) -> None:
    body = {"model": "pebble", "prompt": "[img-0]A red", "images": [RED], "raw": True, "stream": False, "options": COLD}
    answer = post(base, "/api/generate", body).json()
    wanted = model.ask("<image>A red", red(), raw=True)
    assert (answer["response"], answer["prompt_eval_count"]) == (wanted.text, wanted.prompt_tokens)
    assert "context" not in answer


def test_a_long_chat_loses_its_oldest_turns(base: str, model: pumice.Model) -> None:
    turns = [{"role": "user", "content": f"word {number} " * 200} for number in range(8)]
    mixed = [each for turn in turns for each in (turn, {"role": "assistant", "content": "Yes."})]
    body = {"model": "pebble", "messages": [*mixed, {"role": "user", "content": "Hi"}], "stream": False}
    options = {"num_predict": 2}
    answer = post(base, "/api/chat", {**body, "options": options}).json()
    assert 0 < answer["prompt_eval_count"] < model.config.text.max_positions
    refused = post(base, "/api/chat", {**body, "options": options, "truncate": False})
    assert refused.status_code == 400
    assert "tokens long" in refused.json()["error"]


def test_a_chat_loses_turns_beyond_its_context(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(Turn("user", f"word {number} " * 60), Turn("assistant", "Yes.")) for number in range(8)]
    chat = Asked((*(turn for pair in pairs for turn in pair), Turn("user", "Hi")))

    def tokens(asked: Asked, context: int | None = None) -> int:
        return len(ready(asked, model, Contexts(), context).seen.encoded.ids)

    whole = tokens(chat)
    assert 1200 < whole < 2048
    assert tokens(chat, 10) == whole  # a model that sees has 2048 at least
    monkeypatch.setattr("pumice.server.asked.LEAST_WITH_EYES", 300)
    assert 150 < tokens(chat, 10) < 300
    assert 600 < tokens(chat, 900) < 900
    assert 600 < tokens(replace(chat, options={"num_ctx": 900}), 400) < 900
    assert tokens(replace(chat, truncate=False), 10) == whole
    assert tokens(Asked((Turn("user", "word " * 700),)), 10) > 300  # what is asked now is never cut


def test_the_beginning_of_an_answer_is_continued(base: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "There are two"}]
    body = {"model": "pebble", "messages": messages, "stream": False, "options": {**COLD, "num_predict": 3}}
    assert post(base, "/api/chat", body).json()["message"]["content"]


# --- Ollama's own client ----------------------------------------------------------------------------------------------


def test_ollamas_client(base: str, model: pumice.Model, tmp_path: Path) -> None:
    with ollama.Client(base) as client:
        walk(client, model, tmp_path)


def walk(client: ollama.Client, model: pumice.Model, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(red())
    question = "What is in the picture?"
    wanted = model.ask(question, red()).text
    for image in (str(path), path, red(), RED):
        assert client.generate("pebble", question, images=[image], options=COLD).response == wanted
    message = ollama.Message(role="user", content=question, images=[ollama.Image(value=red())])
    assert client.chat("pebble", [message], options=COLD).message.content == wanted
    pieces = list(client.chat("pebble", [message], options=COLD, stream=True))
    assert "".join(each.message.content or "" for each in pieces) == wanted
    assert pieces[-1].done_reason == "stop"
    names = [each.model for each in client.list().models]
    assert "pebble:1.6" in names
    assert client.ps().models[0].expires_at is not None
    shown = client.show("pebble")
    assert "vision" in (shown.capabilities or [])
    assert shown.modelinfo is not None
    assert client.pull("pebble").status == "success"
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("nope", [message])
    assert (caught.value.status_code, caught.value.error) == (404, "model 'nope' not found")


def test_ollamas_client_in_an_event_loop(base: str, model: pumice.Model) -> None:
    async def ask() -> str:
        async with ollama.AsyncClient(base) as client:
            return (await client.generate("pebble", "Hi", options=COLD)).response

    assert asyncio.run(ask()) == model.ask("Hi").text
