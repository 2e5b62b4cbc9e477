"""What the OpenAPI document says of request bodies. They are read by hand, as Ollama's and OpenAI's servers do, so that
what those take is taken; here is what a client should send."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_TEXT, _FLAG, _WHOLE, _NUMBER = ({"type": each} for each in ("string", "boolean", "integer", "number"))
_OBJECT = {"type": "object"}
_TEXTS = {"type": "array", "items": _TEXT}
_IMAGES = {"type": "array", "items": {"type": "string", "format": "byte"}, "description": "base64"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_DIGESTS = {"type": "object", "additionalProperties": _TEXT}
_LOGPROBS = {"type": "integer", "minimum": 0, "maximum": 20}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_OLD_NAME = {"type": "string", "deprecated": True, "description": "an older word for `model`"}
_KEEP_ALIVE = {"anyOf": [_TEXT, _NUMBER]}
_MOST_TOKENS = {"type": "integer", "minimum": 1, "description": "the most that one image may take"}
_TOOLS = {"type": "array", "items": _OBJECT}
_CALLS = {"type": "array", "items": _OBJECT, "description": "that an earlier answer made"}


def _object(title: str, properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    needed = {"required": list(required)} if required else {}
    return {"title": title, "type": "object", **needed, "properties": dict(properties)}


_MESSAGE = _object(
    "Message",
    {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": _TEXT,
        "images": _IMAGES,
        "thinking": _TEXT,
        "tool_calls": _CALLS,
        "tool_name": _TEXT,
        "tool_call_id": _TEXT,
    },
    "role",
)
_SAID_BEFORE = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": _TEXT},
}
_PART = _object(
    "ContentPart",
    {
        "type": {"enum": ["text", "image_url"]},
        "text": _TEXT,
        "image_url": {"type": "object", "required": ["url"], "properties": {"url": _TEXT}},
    },
    "type",
)
_OPENAI_MESSAGE = _object(
    "Message",
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}]},
        "tool_calls": _CALLS,
        "tool_call_id": _TEXT,
        "name": _TEXT,
    },
    "role",
    "content",
)
_COMMON: dict[str, Any] = {
    "model": _TEXT,
    "name": _OLD_NAME,
    "stream": _FLAG,
    "format": {"anyOf": [{"enum": ["", "json"]}, _OBJECT]},
    "options": _OBJECT,
    "keep_alive": _KEEP_ALIVE,
    "truncate": _FLAG,
    "logprobs": _FLAG,
    "top_logprobs": _LOGPROBS,
    "image_tokens": _MOST_TOKENS,
    "think": {"enum": [False, ""], "description": "no model here thinks before it answers"},
    "_debug_render_only": {"type": "boolean", "description": "the prompt as the model would get it, and no answer"},
}
_NAMED = {"model": _TEXT, "name": _OLD_NAME}
_CARRIED = {**_NAMED, "stream": _FLAG, "insecure": _FLAG}
_EMBEDDED = {**_NAMED, "truncate": _FLAG, "dimensions": {"type": "integer", "minimum": 1}, "keep_alive": _KEEP_ALIVE}
_JSON_SCHEMA = _object("JsonSchema", {"schema": _OBJECT})
_FORMS: dict[str, Any] = {"json": _OBJECT, "choice": _TEXTS, "regex": _TEXT, "grammar": _TEXT}
_DRAWN: dict[str, Any] = {
    "model": _TEXT,
    "stream": _FLAG,
    "stream_options": _object("StreamOptions", {"include_usage": _FLAG}),
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": _SHARE,
    "top_k": _WHOLE,
    "min_p": _SHARE,
    "max_tokens": {"type": "integer", "minimum": 1},
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "stop": {"anyOf": [_TEXT, _TEXTS]},
    "seed": _WHOLE,
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repeat_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "logit_bias": {"type": "object", "additionalProperties": _NUMBER},
    "options": {"type": "object", "description": "Ollama's"},
    "keep_alive": _KEEP_ALIVE,
    "image_tokens": _MOST_TOKENS,
    "response_format": _object(
        "ResponseFormat",
        {"type": {"enum": ["text", "json_object", "json_schema"]}, "schema": _OBJECT, "json_schema": _JSON_SCHEMA},
    ),
    "structured_outputs": _object("StructuredOutputs", _FORMS),
    **{f"guided_{name}": form for name, form in _FORMS.items()},
}

_FIELDS: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = MappingProxyType({
    "GenerateRequest": (
        {**_COMMON, "prompt": _TEXT, "suffix": _TEXT, "system": _TEXT, "template": _TEXT, "raw": _FLAG,
         "images": _IMAGES, "context": _IDS},
        ("model",),
    ),
    "ChatRequest": ({**_COMMON, "messages": {"type": "array", "items": _MESSAGE}, "tools": _TOOLS}, ("model",)),
    "EmbedRequest": ({**_EMBEDDED, "input": {"anyOf": [_TEXT, _TEXTS]}, "images": _IMAGES}, ("model",)),
    "EmbeddingRequest": ({**_EMBEDDED, "prompt": _TEXT}, ("model",)),
    "ShowRequest": ({**_NAMED, "verbose": _FLAG}, ("model",)),
    "PullRequest": (_CARRIED, ("model",)),
    "PushRequest": (_CARRIED, ("model",)),
    "CopyRequest": ({"source": _TEXT, "destination": _TEXT}, ("source", "destination")),
    "DeleteRequest": (_NAMED, ("model",)),
    "CreateRequest": (
        {**_NAMED, "from": _TEXT, "files": _DIGESTS, "template": _TEXT, "system": _TEXT,
         "license": {"anyOf": [_TEXT, _TEXTS]}, "parameters": _OBJECT, "quantize": _TEXT, "quantization": _TEXT,
         "messages": {"type": "array", "items": _SAID_BEFORE}, "modelfile": _TEXT, "stream": _FLAG},
        ("model",),
    ),
    "SeeRequest": ({**_NAMED, "images": _IMAGES, "image_tokens": _MOST_TOKENS}, ("model", "images")),
    "ChatCompletionRequest": (
        {**_DRAWN, "messages": {"type": "array", "items": _OPENAI_MESSAGE, "minItems": 1}, "tools": _TOOLS,
         "logprobs": _FLAG, "top_logprobs": _LOGPROBS},
        ("model", "messages"),
    ),
    "CompletionRequest": (
        {**_DRAWN, "prompt": {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1, "maxItems": 1}]}, "suffix": _TEXT,
         "logprobs": _LOGPROBS},
        ("model", "prompt"),
    ),
    "EmbeddingsRequest": (
        {**_EMBEDDED, "input": {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1}]},
         "encoding_format": {"enum": ["float", "base64"]}},
        ("model", "input"),
    ),
})  # fmt: skip


def body(name: str) -> dict[str, Any]:
    """The `requestBody` of a route, for FastAPI's `openapi_extra`."""
    properties, required = _FIELDS[name]
    schema = _object(name, properties, *required)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
