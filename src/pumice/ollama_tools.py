"""Tools and their calls, from JSON to what a template knows: Go's field names, and empty values for what is not there.

The fields are those of Ollama's API (api/types.go): Tool, ToolFunction, ToolProperty, ToolCall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pumice.errors import UserError
from pumice.go_template import Record, Value
from pumice.go_template.values import check

_Field = tuple[str, str, Value]
"""Go's name, what it holds (a name of `_SHAPES`, `[]` or `{}` of one, or nothing of ours), and its empty value."""

_SHAPES: Mapping[str, Mapping[str, _Field]] = {
    "tool": {
        "type": ("Type", "", ""),
        "items": ("Items", "", None),
        "function": ("Function", "function", {}),
    },
    "function": {
        "name": ("Name", "", ""),
        "description": ("Description", "", ""),
        "parameters": ("Parameters", "property", {}),
    },
    "property": {
        "anyOf": ("AnyOf", "[]property", ()),
        "type": ("Type", "", ""),
        "$defs": ("Defs", "", None),
        "items": ("Items", "", None),
        "description": ("Description", "", ""),
        "enum": ("Enum", "", ()),
        "properties": ("Properties", "{}property", {}),
        "required": ("Required", "", ()),
    },
    "call": {
        "id": ("ID", "", ""),
        "function": ("Function", "called", {}),
    },
    "called": {
        "index": ("Index", "", 0),
        "name": ("Name", "", ""),
        "arguments": ("Arguments", "", {}),
    },
}


def tools_of(tools: Sequence[Mapping[str, object]]) -> tuple[Record, ...]:
    """The `tools` of a request. Raises UserError for what is none."""
    return tuple(_record("tool", tool, "a tool") for tool in _checked(tools, "tools"))


def calls_of(calls: Sequence[Mapping[str, object]]) -> tuple[Record, ...]:
    """The `tool_calls` of a message. Raises UserError for what is none."""
    return tuple(_record("call", call, "a tool call") for call in _checked(calls, "tool_calls"))


def _checked(given: object, name: str) -> Sequence[object]:
    check(given, name)
    if not isinstance(given, list | tuple):
        raise UserError(f"{name} is a {type(given).__name__}", hint="give a list of objects")
    return given


def _record(shape: str, source: object, what: str) -> Record:
    if not isinstance(source, Mapping):
        raise UserError(f"{what} is a {type(source).__name__}", hint="give an object, as Ollama's API has it")
    fields: dict[str, Value] = {}
    for name, (go_name, holds, empty) in _SHAPES[shape].items():
        given = source.get(name)
        fields[go_name] = _held(holds, empty if given is None else given, f"the {name} of {what}")
    return Record(fields, source)


def _held(holds: str, value: Value, what: str) -> Value:
    kind = holds[2:]
    if holds.startswith("[]"):
        if not isinstance(value, list | tuple):
            raise UserError(f"{what} is a {type(value).__name__}", hint="give a list")
        return tuple(_record(kind, each, f"an entry of {what}") for each in value)
    if holds.startswith("{}"):
        if not isinstance(value, Mapping):
            raise UserError(f"{what} is a {type(value).__name__}", hint="give an object")
        return {name: _record(kind, each, f"an entry of {what}") for name, each in value.items()}
    return _record(holds, value, what) if holds else value
