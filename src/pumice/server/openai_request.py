"""What an OpenAI request asks, as `Asked`. Facts: its API reference, Ollama's openai/openai.go, vLLM's protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pumice.ollama_prompt import Turn
from pumice.server.asked import Asked
from pumice.server.bodies import aside
from pumice.server.remote import Remote
from pumice.server.residents import Residents
from pumice.server.settings import Settings
from pumice.server.wire import Fields, Refused, image_bytes

ROLES: Mapping[str, Any] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
REMOTE = ("http://", "https://")


def asked_of(fields: Fields, logprobs: int | None) -> Asked:
    """How the answer is drawn and what it must look like. Raises Refused."""
    if logprobs is not None and not 0 <= logprobs <= 20:
        raise Refused(400, "logprobs must be between 0 and 20")
    format, form = _form(fields)
    return Asked(
        options=_options(fields),
        format=format,
        form=form,
        logprobs=logprobs,
        logit_bias=_biases(fields),
        image_tokens=fields.whole("image_tokens"),
    )


def _options(fields: Fields) -> dict[str, object]:
    """Ollama's options. Temperature and top_p have OpenAI's defaults, whatever the model's own are."""
    temperature = _bounded(fields, "temperature", 0.0, 2.0)
    longest = fields.whole("max_completion_tokens")
    longest = fields.whole("max_tokens") if longest is None else longest
    if longest is not None and longest < 1:
        raise Refused(400, f"max_tokens is {longest:.3g}; give a number from 1")
    stop = fields.any("stop")
    stops = [stop] if isinstance(stop, str) else fields.texts("stop")
    given = {
        "num_predict": longest,
        "seed": None if fields.whole("seed") is None else (fields.whole("seed") or 0) % 2**63,
        "presence_penalty": _bounded(fields, "presence_penalty", -2.0, 2.0),
        "frequency_penalty": _bounded(fields, "frequency_penalty", -2.0, 2.0),
        "stop": [each for each in stops if each] or None,
        "top_k": fields.whole("top_k"),
        "min_p": _bounded(fields, "min_p", 0.0, 1.0),
        "repeat_penalty": fields.number("repeat_penalty") or fields.number("repetition_penalty"),
    }
    top_p = _bounded(fields, "top_p", 0.0, 1.0)
    drawn = {"temperature": 1.0 if temperature is None else temperature, "top_p": 1.0 if top_p is None else top_p}
    return {**fields.mapping("options"), **drawn, **{name: value for name, value in given.items() if value is not None}}


def _bounded(fields: Fields, name: str, low: float, high: float) -> float | None:
    value = fields.number(name)
    if value is not None and not low <= value <= high:
        raise Refused(400, f"{name} is {value:.6g}; give a number from {low:g} to {high:g}")
    return value


def _biases(fields: Fields) -> dict[int, float]:
    found = {}
    for token, bias in fields.mapping("logit_bias").items():
        if not token.isascii() or not token.isdecimal() or len(token) > 9:
            raise Refused(400, f"logit_bias names {token[:50]!r}, which is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise Refused(400, f"logit_bias of token {token} is no number")
        found[int(token)] = float(bias)
    return found


def _form(fields: Fields) -> tuple[str | Mapping[str, Any] | None, dict[str, Any]]:
    """`response_format` as Ollama's format, or vLLM's `structured_outputs` and `guided_…` as a form."""
    wanted = Fields(fields.mapping("response_format"), "ResponseFormat")
    match wanted.text("type"):
        case "" | "text":
            pass
        case "json_object":
            schema = wanted.mapping("schema")
            return (schema or "json"), {}
        case "json_schema":
            schema = Fields(wanted.mapping("json_schema"), "JsonSchema").any("schema")
            if not isinstance(schema, dict):
                raise Refused(400, "response_format.json_schema.schema is no JSON schema object")
            return schema, {}
        case other:
            raise Refused(400, f"response_format has type {other!r:.100}; give text, json_object or json_schema")
    inner = Fields(fields.mapping("structured_outputs"), "StructuredOutputs")
    names = {"json": "schema", "choice": "choices", "regex": "regex", "grammar": "grammar"}
    form = {ours: inner.any(theirs) or fields.any(f"guided_{theirs}") for theirs, ours in names.items()}
    return None, {name: value for name, value in form.items() if value is not None}


def completion_turns(fields: Fields) -> tuple[Turn, ...]:
    """The prompt, one text. Raises Refused."""
    prompt = fields.any("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise Refused(400, "prompt must be one text, or a list of one")
    return (Turn("user", prompt),)


async def chat_turns(
    fields: Fields, settings: Settings, residents: Residents
) -> tuple[tuple[Turn, ...], tuple[bytes, ...]]:
    """The turns of a conversation and their pictures. Raises Refused."""
    messages = fields.objects("messages", "Message")
    if not messages:
        raise Refused(400, "[] is too short - 'messages'")
    turns: list[Turn] = []
    images: list[bytes] = []
    remote = Remote(settings)
    for each in messages:
        role = ROLES.get(each.text("role").lower())
        if role is None:
            raise Refused(400, f"message role must be one of {', '.join(ROLES)}, not {each.text('role')!r:.100}")
        content, urls = _content(each)
        if len(images) + len(urls) > settings.max_images:
            raise Refused(400, f"too many images came with the request; {settings.max_images} are taken at most")
        images += [await _image(url, remote, residents) for url in urls]
        calls = [_call(call) for call in each.items("tool_calls") if isinstance(call, dict)]
        turns.append(Turn(role, content, len(urls), "", calls, each.text("name"), each.text("tool_call_id")))
    return tuple(turns), tuple(images)


def _call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call of a tool as templates know it: its arguments are a text here, and an object there. Raises Refused."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise Refused(400, "invalid tool call arguments: they are no JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _content(message: Fields) -> tuple[str, list[str]]:
    """The words of a message, with a blank line between their parts, and where its pictures are."""
    content = message.any("content")
    if isinstance(content, str):
        return content, []
    if content is None and message.items("tool_calls"):
        return "", []
    if not isinstance(content, list):
        kind = "<nil>" if content is None else type(content).__name__
        raise Refused(400, f"invalid message content type: {kind}")
    texts: list[str] = []
    urls: list[str] = []
    for each in message.objects("content", "ContentPart"):
        match each.text("type"):
            case "text" | "input_text":
                texts.append(each.text("text"))
            case "image_url" | "input_image":
                url = each.any("image_url")
                url = url.get("url") if isinstance(url, dict) else url
                if not isinstance(url, str):
                    raise Refused(400, "invalid message format: image_url has no url")
                urls.append(url)
            case other:
                raise Refused(400, f"invalid message format: a part of type {other!r:.100}")
    return "\n\n".join(texts), urls


async def _image(url: str, remote: Remote, residents: Residents) -> bytes:
    if url.lower().startswith(REMOTE):
        return await residents.read(lambda: remote.fetch(url), slow=True)
    if ":" in url[:30] and not url.startswith("data:"):
        raise Refused(400, "invalid image input: give a data: URL with base64")
    head = url.partition(",")[0].lower() if url.startswith("data:") else ""
    if head and not (head.endswith(";base64") and (head.startswith(("data:image/", "data:;")))):
        raise Refused(400, f"invalid image input: {head[:60]!r} is no image in base64")
    try:
        data = await aside(len(url), lambda: image_bytes(url))
    except Refused as error:
        raise Refused(400, f"invalid image input: {error.message}") from None
    if not data:
        raise Refused(400, "invalid image input: it is empty")
    return data
