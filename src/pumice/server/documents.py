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
_LOGPROBS = {"type": "integer", "minimum": 0, "maximum": 20}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": _TEXT,
        "images": _IMAGES,
    },
}
_PART = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "image_url"]},
        "text": _TEXT,
        "image_url": {"type": "object", "required": ["url"], "properties": {"url": _TEXT}},
    },
}
_OPENAI_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}]},
    },
}
_COMMON: dict[str, Any] = {
    "model": _TEXT,
    "stream": _FLAG,
    "format": {"anyOf": [{"enum": ["", "json"]}, _OBJECT]},
    "options": _OBJECT,
    "keep_alive": {"anyOf": [_TEXT, _NUMBER]},
    "truncate": _FLAG,
    "logprobs": _FLAG,
    "top_logprobs": _LOGPROBS,
}
_NAMED = {"model": _TEXT, "stream": _FLAG, "insecure": _FLAG}
_DRAWN: dict[str, Any] = {
    "model": _TEXT,
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "max_tokens": {"type": "integer", "minimum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "stop": {"anyOf": [_TEXT, _TEXTS]},
    "seed": _WHOLE,
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": _NUMBER},
}

_FIELDS: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = MappingProxyType({
    "GenerateRequest": (
        {**_COMMON, "prompt": _TEXT, "suffix": _TEXT, "system": _TEXT, "template": _TEXT, "raw": _FLAG,
         "images": _IMAGES, "context": _IDS},
        ("model",),
    ),
    "ChatRequest": (
        {**_COMMON, "messages": {"type": "array", "items": _MESSAGE}, "tools": {"type": "array", "items": _OBJECT}},
        ("model",),
    ),
    "EmbedRequest": (
        {"model": _TEXT, "input": {"anyOf": [_TEXT, _TEXTS]}, "images": _IMAGES, "truncate": _FLAG,
         "dimensions": _WHOLE, "options": _OBJECT, "keep_alive": _COMMON["keep_alive"]},
        ("model",),
    ),
    "EmbeddingRequest": ({"model": _TEXT, "prompt": _TEXT, "options": _OBJECT}, ("model",)),
    "ShowRequest": ({"model": _TEXT, "verbose": _FLAG}, ("model",)),
    "PullRequest": (_NAMED, ("model",)),
    "PushRequest": (_NAMED, ("model",)),
    "CopyRequest": ({"source": _TEXT, "destination": _TEXT}, ("source", "destination")),
    "DeleteRequest": ({"model": _TEXT}, ("model",)),
    "CreateRequest": (
        {"model": _TEXT, "from": _TEXT, "files": {"type": "object", "additionalProperties": _TEXT},
         "template": _TEXT, "system": _TEXT, "license": {"anyOf": [_TEXT, _TEXTS]}, "parameters": _OBJECT,
         "messages": {"type": "array", "items": _MESSAGE}, "quantize": _TEXT, "stream": _FLAG},
        ("model",),
    ),
    "SeeRequest": ({"model": _TEXT, "images": _IMAGES, "image_tokens": _WHOLE}, ("model", "images")),
    "ChatCompletionRequest": (
        {**_DRAWN, "messages": {"type": "array", "items": _OPENAI_MESSAGE, "minItems": 1}, "logprobs": _FLAG,
         "top_logprobs": _LOGPROBS, "response_format": _OBJECT,
         "max_completion_tokens": {"type": "integer", "minimum": 1}},
        ("model", "messages"),
    ),
    "CompletionRequest": (
        {**_DRAWN, "prompt": {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1, "maxItems": 1}]}, "suffix": _TEXT,
         "logprobs": _LOGPROBS},
        ("model", "prompt"),
    ),
    "EmbeddingsRequest": (
        {"model": _TEXT, "input": {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1}]}, "dimensions": _WHOLE,
         "encoding_format": {"enum": ["float", "base64"]}},
        ("model", "input"),
    ),
})  # fmt: skip


def body(name: str) -> dict[str, Any]:
    """The `requestBody` of a route, for FastAPI's `openapi_extra`."""
    properties, required = _FIELDS[name]
    schema = {"title": name, "type": "object", "required": list(required), "properties": dict(properties)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
