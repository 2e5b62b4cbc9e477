"""Calls of tools in what a model writes: JSON with a name and arguments, one or several, also between <tool_call> tags.

Facts: Ollama's tools/tools.go; the formats that the templates of Qwen, Hermes, Mistral and Llama 3 teach.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pumice.server.worker import Chunk

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """What the model wants to be done."""

    name: str
    arguments: Mapping[str, Any]
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(4)}")


def named_tools(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The names of the tools of a request."""
    functions = [each.get("function") for each in tools]
    return frozenset(str(each["name"]) for each in functions if isinstance(each, Mapping) and "name" in each)


async def with_calls(chunks: AsyncIterator[Chunk], names: Collection[str]) -> AsyncIterator[Chunk]:
    """An answer in which calls of these tools are no text. What may be one is held back until the answer ends."""
    held, spoken = "", False
    async for chunk in chunks:
        held += chunk.text
        place = 0 if not spoken and held.lstrip()[:1] in ("", "{", "[") else _end_of_text(held)
        text, held = held[:place], held[place:]
        spoken = spoken or bool(text.strip())
        if chunk.answer is None:
            yield replace(chunk, text=text)
            continue
        calls = calls_in(held, names)
        yield replace(chunk, text=text if calls else text + held, calls=calls)


def _end_of_text(held: str) -> int:
    """Where a tag begins, or may begin with what is still to come."""
    found = held.find(OPENING)
    if found >= 0:
        return found
    lengths = range(min(len(held), len(OPENING) - 1), 0, -1)
    return len(held) - next((count for count in lengths if OPENING.startswith(held[-count:])), 0)


def calls_in(text: str, names: Collection[str]) -> tuple[ToolCall, ...]:
    """The calls that a text consists of; none where anything in it is something else."""
    rest = text.replace(OPENING, " ").replace(CLOSING, " ").strip()
    found: list[ToolCall] = []
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return ()
        for each in value if isinstance(value, list) else [value]:
            call = _call(each, names)
            if call is None:
                return ()
            found.append(call)
        rest = rest[end:].lstrip(" \r\n\t;,")
    return tuple(found)


def _call(value: object, names: Collection[str]) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None
