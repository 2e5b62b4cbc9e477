"""Calls of tools: what is one, and how both APIs say it. No bundled model calls tools, so a form makes one do it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ollama
import openai
import pytest

import pumice
from pumice.server.calls import calls_in, with_calls
from pumice.server.openai_request import _call
from pumice.server.worker import Chunk
from served import post, served

TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLED = '{"name": "add", "arguments": {"x": [1, 2]}}'


@pytest.mark.parametrize(("text", "count"), [
    (CALLED, 1),
    (f"<tool_call>\n{CALLED}\n</tool_call>", 1),
    (f"<tool_call>{CALLED}</tool_call>\n<tool_call>{CALLED}</tool_call>", 2),
    (f"[{CALLED}, {CALLED}]", 2),
    (f"{CALLED}; {CALLED}", 2),
    ('{"name": "add", "parameters": {"x": [1, 2]}}', 1),
    ('{"type": "function", "function": {"name": "add", "arguments": {"x": [1, 2]}}}', 1),
    ("", 0),
    (CALLED + " is what I would do", 0),
    (CALLED[:-1], 0),
    (CALLED.replace("add", "remove"), 0),
    ('{"name": "add"}', 0),
    ('{"name": ["add"], "arguments": {}}', 0),
    ("[1]", 0),
    ("[" * 100_000, 0),
])  # fmt: skip
def test_what_is_a_call(text: str, count: int) -> None:
    found = calls_in(text, ["add"])
    assert [(each.name, each.arguments) for each in found] == [("add", {"x": [1, 2]})] * count
    assert len({each.id for each in found}) == count


@pytest.mark.parametrize(("answer", "spoken", "calls"), [
    (CALLED, "", 1),
    (f"I add.\n<tool_call>{CALLED}</tool_call>", "I add.\n", 1),
    ("It is <b>3</b>, or <tool", "It is <b>3</b>, or <tool", 0),
    ('{"n": 3}', '{"n": 3}', 0),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_are_no_text(answer: str, spoken: str, calls: int, size: int) -> None:
    async def chunks() -> AsyncIterator[Chunk]:
        for place in range(0, len(answer), size):
            yield Chunk(answer[place : place + size])
        yield Chunk("", answer=pumice.load("pebble").ask("Hi"))

    async def read() -> list[Chunk]:
        return [each async for each in with_calls(chunks(), {"add"})]

    found = asyncio.run(read())
    assert "".join(each.text for each in found) == spoken
    assert [len(each.calls) for each in found] == [0] * (len(found) - 1) + [calls]


@pytest.fixture
def base(places: object) -> Iterator[str]:
    with served() as base:
        body = {"model": "caller", "from": "pebble", "template": "{{ .Tools }} {{ .Prompt }}", "stream": False}
        assert post(base, "/api/create", body).status_code == 200
        yield base


SCHEMA = {
    "type": "object", "properties": {"name": {"const": "add"}, "arguments": {"type": "object", "maxProperties": 0}},
    "required": ["name", "arguments"], "additionalProperties": False,
}  # fmt: skip
SAID: Any = [{"role": "user", "content": "Hi"}]


def test_both_apis_say_calls(base: str) -> None:
    options: Any = {"model": "caller", "messages": SAID, "tools": TOOLS}
    with ollama.Client(base) as client:
        whole = client.chat(**options, format=SCHEMA)
        pieces = list(client.chat(**options, format=SCHEMA, stream=True))
        assert whole.done_reason == pieces[-1].done_reason == "stop"
        for found in (whole, *[each for each in pieces if each.message.tool_calls]):
            assert found.message.content == ""
            assert found.message.tool_calls is not None
            assert [(each.function.name, each.function.arguments) for each in found.message.tool_calls] == [("add", {})]
        assert sum(bool(each.message.tool_calls) for each in pieces) == 1
    with openai.OpenAI(base_url=base + "/v1", api_key="x", max_retries=0) as other:
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        choice = other.chat.completions.create(**options, response_format=form).choices[0]
        with other.chat.completions.stream(**options, response_format=form) as stream:
            streamed = stream.get_final_completion().choices[0]
        for one in (choice, streamed):
            assert one.finish_reason == "tool_calls"
            (call,) = one.message.tool_calls or []
            assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "add", {})
        result = {"role": "tool", "tool_call_id": "x", "content": "3"}
        turns = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}, result]
        assert other.chat.completions.create(model="caller", messages=turns, max_tokens=1).choices
    turns[1]["tool_calls"][0]["function"]["arguments"] = "{"
    refused = post(base, "/v1/chat/completions", {"model": "caller", "messages": turns})
    assert refused.json()["error"]["message"] == "invalid tool call arguments: they are no JSON"


def test_what_was_called_before_is_an_object_for_the_template() -> None:
    call = {"id": "x", "function": {"name": "add", "arguments": '{"Left": null}'}}
    assert _call(call) == {"id": "x", "function": {"name": "add", "arguments": {"Left": None}}}
