"""The functions that a template may call: Go's, and those that Ollama adds."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from types import MappingProxyType
from typing import Any

from pumice.errors import shortened
from pumice.go_template.nodes import Own
from pumice.go_template.values import Record, Trouble, Value, is_true, printed, quoted, to_json

_VERB = re.compile(r"%([-0+ ]*)(\d{0,3})(?:\.(\d{1,2}))?(.)?", re.DOTALL)
_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "array": "any[]",
    "object": "Record<string, any>",
    "null": "null",
}


def _kind(value: Value) -> str:
    if value is None:
        return "nil"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "list" if isinstance(value, list | tuple) else "object"


def _comparable(name: str, values: Sequence[Value], kinds: Sequence[str]) -> None:
    found = [_kind(each) for each in values]
    for kind in found:
        if kind not in kinds:
            raise Trouble(f"{name} cannot compare a {kind}")
        if kind not in (found[0], "nil") and found[0] != "nil":
            raise Trouble(f"{name} cannot compare a {found[0]} with a {kind}: incompatible types for comparison")


def _eq(first: Value, *others: Value) -> bool:
    _comparable("eq", (first, *others), ("nil", "bool", "number", "string"))
    return any(first == other for other in others)


def _ne(first: Value, second: Value) -> bool:
    _comparable("ne", (first, second), ("nil", "bool", "number", "string"))
    return first != second


def _ordered(name: str, decide: Callable[[Any, Any], bool]) -> Callable[[Value, Value], bool]:
    def compared(first: Value, second: Value) -> bool:
        # Go compares the bytes of strings; in UTF-8 that is the order of the code points, as Python compares.
        _comparable(name, (first, second), ("number", "string"))
        return decide(first, second)

    return compared


def _len(value: Value) -> int:
    if isinstance(value, str):
        return len(_bytes(value))
    if isinstance(value, list | tuple | Mapping):
        return len(value)
    raise Trouble(f"len of a {_kind(value)}: it takes a string, a list or a map")


def _index(value: Value, *indices: Value) -> Value:
    for index in indices:
        if isinstance(value, Mapping):
            if not isinstance(index, str):
                raise Trouble(f"index of a map by a {_kind(index)}, not by a string")
            value = value.get(index)
            continue
        if not isinstance(value, list | tuple | str):
            raise Trouble(f"index of a {_kind(value)}: it takes a list, a map or a string")
        within = _bytes(value) if isinstance(value, str) else value
        value = within[_position(index, len(within) - 1)]
    return value


def _slice(value: Value, *borders: Value) -> Value:
    if not isinstance(value, list | tuple | str):
        raise Trouble(f"slice of a {_kind(value)}: it takes a list or a string")
    within = _bytes(value) if isinstance(value, str) else value
    start, end = [_position(each, len(within)) for each in borders] + [0, len(within)][len(borders) :]
    if start > end:
        raise Trouble(f"slice from {start} to {end}")
    cut = within[start:end]
    return cut.decode("utf-8", "replace") if isinstance(cut, bytes) else cut


def _position(index: Value, last: int) -> int:
    if not isinstance(index, int) or isinstance(index, bool):
        raise Trouble(f"an index is a {_kind(index)}, not a whole number")
    if not 0 <= index <= last:
        raise Trouble(f"index out of range: {index}, it may be 0 to {last}")
    return index


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _print(*values: Value) -> str:
    """Go's Sprint: a space between two values of which none is a string."""
    text = ""
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            text += " "
        text += printed(value)
    return _origin(values, text)


def _printf(form: Value, *values: Value) -> str:
    """The verbs v, s, d, q, t, f and %, with width and precision."""
    if not isinstance(form, str):
        raise Trouble(f"printf takes a format string first, and a {_kind(form)} came")
    rest = list(values)

    def filled(found: re.Match[str]) -> str:
        flags, width, precision, verb = found.groups()
        if verb == "%":
            return "%"
        if verb is None or verb not in "vsdqtf":
            raise Trouble(f"printf knows %v %s %d %q %t %f and %%, and {shortened(found[0])} came")
        if not rest:
            raise Trouble(f"printf has no value for {found[0]}")
        text = _verb(verb, rest.pop(0), None if precision is None else int(precision))
        if "+" in flags and verb in "df" and text[0] != "-":
            text = f"+{text}"
        if "-" in flags:
            return text.ljust(int(width or 0))
        return text.zfill(int(width or 0)) if "0" in flags and verb in "df" else text.rjust(int(width or 0))

    text = _VERB.sub(filled, form)
    if rest:
        raise Trouble(f"printf has {len(rest)} values more than its format {shortened(form)} takes")
    return _origin((form, *values), text)


def _verb(verb: str, value: Value, precision: int | None) -> str:
    kind = _kind(value)
    whole = isinstance(value, int)
    fits = {"d": kind == "number" and whole, "t": kind == "bool", "f": kind == "number" and not whole}
    fits |= {"s": kind in ("string", "list", "object"), "q": kind == "string", "v": True}
    if not fits[verb]:
        kind = "int" if kind == "number" and whole else "float64" if kind == "number" else kind
        return f"%!{verb}({'' if value is None else f'{kind}='}{printed(value)})"
    if verb == "f":
        return f"{value:.{6 if precision is None else precision}f}"
    text = printed(value)
    if precision is not None and kind == "string":
        text = text[:precision]
    return quoted(text) if verb == "q" else text


def _origin(values: Sequence[Value], text: str) -> str:
    """The template's own words stay its own; one from outside among them, and the whole is from outside."""
    own = all(isinstance(each, Own) or not isinstance(each, str | Sequence | Mapping | Record) for each in values)
    return Own(text) if own else text


def _typescript(value: Value) -> str:
    """The type of a tool's property, as TypeScript writes it."""
    if not isinstance(value, Record):
        return "any"
    choices, kinds = value.fields.get("AnyOf"), value.fields.get("Type")
    if isinstance(choices, list | tuple) and choices:
        return " | ".join(_typescript(each) for each in choices)
    named = [kinds] if isinstance(kinds, str) and kinds else kinds if isinstance(kinds, list | tuple) else []
    return " | ".join(_TYPESCRIPT.get(str(each), "any") for each in named) or "any"


def _lazy(*values: Value) -> Value:
    raise AssertionError("the evaluator decides and, or")


@dataclass(frozen=True)
class Known:
    """A function, and how many arguments it takes."""

    call: Callable[..., Value]
    least: int
    most: int = 1 << 16


FUNCTIONS: Mapping[str, Known] = MappingProxyType(
    {
        "and": Known(_lazy, 1),
        "or": Known(_lazy, 1),
        "not": Known(lambda value: not is_true(value), 1, 1),
        "eq": Known(_eq, 2),
        "ne": Known(_ne, 2, 2),
        "lt": Known(_ordered("lt", operator.lt), 2, 2),
        "le": Known(_ordered("le", operator.le), 2, 2),
        "gt": Known(_ordered("gt", operator.gt), 2, 2),
        "ge": Known(_ordered("ge", operator.ge), 2, 2),
        "len": Known(_len, 1, 1),
        "index": Known(_index, 1),
        "slice": Known(_slice, 1, 3),
        "print": Known(_print, 0),
        "printf": Known(_printf, 1),
        "json": Known(to_json, 1, 1),
        "currentDate": Known(lambda: date.today().isoformat(), 0, 0),
        "yesterdayDate": Known(lambda: (date.today() - timedelta(days=1)).isoformat(), 0, 0),
        "toTypeScriptType": Known(_typescript, 1, 1),
    }
)
