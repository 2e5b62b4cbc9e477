"""OpenAI's API over a socket: its own client, the form of its errors, and what others take beyond it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from PIL import Image

import pumice
from pumice.server.settings import Settings
from pumice.server.streams import merged
from pumice.server.worker import Chunk
from served import post, served

QUESTION = "What is in the picture?"


def red() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 20, 20)).save(data, "PNG")
    return data.getvalue()


URL = "data:image/png;base64," + base64.b64encode(red()).decode()
SHOWN: Any = [
    {"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": URL}}]}
]
SAID: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with served() as base:
        yield base


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base + "/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> pumice.Model:
    return pumice.load("pebble")


def test_a_chat_completion(client: openai.OpenAI, model: pumice.Model) -> None:
    found = client.chat.completions.create(model="pebble", messages=SHOWN, temperature=0)
    wanted = model.ask(QUESTION, red())
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.tokens))
    assert found.model == "pebble"


def test_a_stream(client: openai.OpenAI, model: pumice.Model) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(
        model="pebble", messages=SHOWN, temperature=0, stream=True, stream_options=options
    ))  # fmt: skip
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == model.ask(QUESTION, red()).text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "stop"
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert len({(each.id, each.created) for each in chunks}) == 1


def test_the_frames_of_a_stream(base: str) -> None:
    body = {"model": "pebble", "messages": SAID, "stream": True, "max_tokens": 1, "temperature": 0}
    answer = post(base, "/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    last = json.loads(frames[-3].removeprefix("data: "))
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]


def test_the_clients_stream_helper(client: openai.OpenAI, model: pumice.Model) -> None:
    with client.chat.completions.stream(model="pebble", messages=SAID, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == model.ask("Hi").text


class Count(pydantic.BaseModel):
    shapes: int
    round: bool


def test_a_parsed_answer(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="pebble", messages=SHOWN, response_format=Count, temperature=0)
    assert isinstance(found.choices[0].message.parsed, Count)


@pytest.mark.parametrize("more", [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
    {"guided_json": {"type": "object"}},
    {"structured_outputs": {"regex": r"\{[a-z]{3}"}},
])  # fmt: skip
def test_forms(base: str, more: dict[str, Any]) -> None:
    body = {"model": "pebble", "messages": SAID, "max_tokens": 5, **more}
    assert post(base, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"].startswith("{")


def test_choices(base: str) -> None:
    body = {"model": "pebble", "messages": SHOWN, "structured_outputs": {"choice": ["yes", "no"]}}
    assert post(base, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"] in ("yes", "no")


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI, model: pumice.Model) -> None:
    options: Any = {"model": "pebble", "messages": SAID, "temperature": 1.5, "seed": 7, "max_tokens": 20}
    found = client.chat.completions.create(n=3, **options)
    texts = [each.message.content for each in found.choices]
    assert [each.index for each in found.choices] == [0, 1, 2]
    alone = [client.chat.completions.create(**options | {"seed": 7 + each}) for each in range(3)]
    assert texts == [each.choices[0].message.content for each in alone]
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(n=3, stream=True, **options):
        for each in chunk.choices:
            streamed[each.index] = streamed.get(each.index, "") + (each.delta.content or "")
    assert [streamed[each] for each in range(3)] == texts


def test_several_answers_need_one_turn(model: pumice.Model) -> None:
    with served(Settings(port=0, parallel=1, max_queue=2)) as base:
        body = {"model": "pebble", "messages": SAID, "temperature": 0, "n": 4}
        answer = httpx2.post(base + "/v1/chat/completions", json=body, timeout=30).json()
        assert [each["message"]["content"] for each in answer["choices"]] == [model.ask("Hi").text] * 4


def test_who_leaves_a_stream_of_several_answers_leaves_nothing_running() -> None:
    async def source() -> AsyncGenerator[Chunk]:
        while True:
            yield Chunk("a")
            await asyncio.sleep(0)

    async def leave() -> None:
        found = merged([source(), source()])
        await anext(found)
        await found.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(leave())


def test_logprobs(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="pebble", messages=SAID, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for each in logprobs.content:
        assert each.logprob == max(top.logprob for top in each.top_logprobs)
        assert len(each.top_logprobs) == 3
    old = client.completions.create(model="pebble", prompt="Hi", logprobs=2, max_tokens=4, temperature=0)
    assert old.choices[0].logprobs is not None
    assert old.choices[0].logprobs.token_logprobs == [each.logprob for each in logprobs.content]


def test_completions(client: openai.OpenAI, model: pumice.Model) -> None:
    found = client.completions.create(model="pebble", prompt="Hi", temperature=0, max_tokens=300)
    assert found.choices[0].text == model.ask("Hi").text
    pieces = client.completions.create(model="pebble", prompt=["Hi"], temperature=0, max_tokens=300, stream=True)
    came = list(pieces)
    assert "".join(each.choices[0].text for each in came) == found.choices[0].text
    assert [each.choices[0].finish_reason for each in came[-2:]] == [None, found.choices[0].finish_reason]
    assert {each.object for each in came} == {"text_completion"}
    counted = client.completions.create(
        model="pebble", prompt="Hi", temperature=0, max_tokens=300, stream=True, stream_options={"include_usage": True}
    )
    *_, last = counted
    assert (last.choices, last.usage) == ([], found.usage)


def test_biases_and_stops(client: openai.OpenAI, model: pumice.Model) -> None:
    token = model.tokenizer.continued(" red")[-1]
    options: Any = {"model": "pebble", "messages": SAID, "temperature": 0, "max_tokens": 3}
    found = client.chat.completions.create(logit_bias={str(token): 100}, **options)
    word = (found.choices[0].message.content or "").split()
    assert word == ["red"] * len(word)
    stopped = client.chat.completions.create(stop=["red"], logit_bias={str(token): 100}, **options)
    assert stopped.choices[0].message.content == ""
    assert stopped.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert {"pebble:1.5", "pebble:1.6"} <= {each.id for each in client.models.list()}
    assert client.models.retrieve("pebble:1.6").owned_by == "library"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("user/nothing")


@pytest.mark.parametrize(("change", "status", "words"), [
    ({"model": "nope"}, 404, "model 'nope' not found"),
    ({"model": None}, 400, "model is required"),
    ({"messages": []}, 400, "[] is too short - 'messages'"),
    ({"messages": [{"role": "user"}]}, 400, "invalid message content type: <nil>"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "invalid message format"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "message role must be one of"),
    ({"n": 10**9}, 400, "1 to 16"),
    ({"n": 0}, 400, "1 to 16"),
    ({"max_tokens": -1}, 400, "give a number from 1"),
    ({"max_tokens": 2**63}, 400, "cannot unmarshal number"),
    ({"max_tokens": "5"}, 400, "cannot unmarshal string"),
    ({"temperature": 3}, 400, "temperature is 3"),
    ({"top_p": -0.1}, 400, "top_p is -0.1"),
    ({"logprobs": True, "top_logprobs": 10**6}, 400, "between 0 and 20"),
    ({"seed": 2**65}, 400, "cannot unmarshal number"),
    ({"stop": ["x"] * 10**5}, 400, "stop"),
    ({"logit_bias": {"x": 1}}, 400, "no token id"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias names token"),
    ({"response_format": {"type": "yaml"}}, 400, "type 'yaml'"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"contains": {}}}}}, 400, "contains"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_openais_form(base: str, change: dict[str, Any], status: int, words: str) -> None:
    answer = post(base, "/v1/chat/completions", {"model": "pebble", "messages": SAID, **change})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert answer.headers["content-type"] == "application/json"
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/embeddings"])
def test_errors_have_openais_form_with_v1_and_without(base: str, path: str) -> None:
    with httpx2.Client(base_url=base) as client:
        for body, status in (({"model": "nope", "input": "x", "prompt": "x"}, 404), ({}, 400), ([], 400)):
            found = [client.post(prefix + path, json=body) for prefix in ("/v1", "")]
            assert [each.status_code for each in found] == [status, status]
            assert found[0].json() == found[1].json()
            assert found[0].json()["error"].keys() == {"message", "type", "param", "code"}
        assert client.get("/models/nope").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(("url", "words"), [
    ("data:text/html;base64,AAAA", "no image"),
    ("data:image/png,AAAA", "no image"),
    ("data:image/png;base64,A@AA", "illegal base64"),
    ("data:image/png;base64,", "empty"),
    ("data:image/png;base64,AAAA", "image"),
    ("file:///etc/passwd", "invalid image input"),
    ("ftp://x/y.png", "invalid image input"),
])  # fmt: skip
def test_what_is_no_picture(base: str, url: str, words: str) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    answer = post(base, "/v1/chat/completions", {"model": "pebble", "messages": messages})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_bare_base64_and_no_prefix(base: str, model: pumice.Model) -> None:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": URL.partition(",")[2]}]
    body = {"model": "pebble", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    answer = post(base, "/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == model.ask(QUESTION, red()).text


def test_keep_alive_goes_through(base: str) -> None:
    post(base, "/v1/chat/completions", {"model": "pebble:1.5", "messages": SAID, "max_tokens": 1, "keep_alive": 0})
    assert "pebble:1.5" not in {each["name"] for each in httpx2.get(base + "/api/ps").json()["models"]}
