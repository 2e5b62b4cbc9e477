"""What a template works on, and how Go prints it.

A value is None (missing, or nil), a bool, an int, a float, a str, a list or tuple, a mapping with text keys, or a
Record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from pumice.errors import UserError

Value = object
MAX_NESTING = 100
"""Lists and objects in one another, in what comes from outside."""
_LARGEST = 2**64


@dataclass(frozen=True)
class Record:
    """A Go struct: it has the fields that it has, is never empty, and prints as the JSON that it was made of."""

    fields: Mapping[str, Value]
    source: Value


class Trouble(Exception):
    """A function or a field that cannot work on its values; the template's line is known further up."""


def is_true(value: Value) -> bool:
    """Go's truth: false, zero, nil and what has no elements are false; a struct is true."""
    if isinstance(value, str | Sequence | Mapping):
        return len(value) > 0
    return value is not None and value != 0


def printed(value: Value) -> str:
    """As Go's %v writes it; objects, and lists that hold one, are tools or their arguments and write themselves as
    JSON."""
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, Record | Mapping) or any(isinstance(each, Record | Mapping) for each in listed(value)):
        return to_json(value)
    return f"[{' '.join(printed(each) for each in listed(value))}]"


def listed(value: Value) -> Sequence[Value]:
    assert isinstance(value, Sequence), value
    return value


def float_text(value: float) -> str:
    """A float64 as Go's %v: the fewest digits, with an exponent below -4 and from 6 on."""
    return _number(value, range(-4, 6))


def _number(value: float, plain: range) -> str:
    """With an exponent where the first digit's power of ten is not among the plain ones."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    shortest = Decimal(repr(value))
    if not value or shortest.adjusted() in plain:
        return f"{shortest.normalize():f}"
    sign, digits, _ = shortest.normalize().as_tuple()
    first, *rest = map(str, digits)
    return f"{'-' * sign}{first}{'.' * bool(rest)}{''.join(rest)}e{shortest.adjusted():+03d}"


def quoted(text: str) -> str:
    """A text in Go's double quotes, as %q writes it."""
    simple = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}
    simple |= {'"': '\\"', "\\": "\\\\"}

    def written(letter: str) -> str:
        code = ord(letter)
        if letter in simple or letter.isprintable():
            return simple.get(letter, letter)
        return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return f'"{"".join(map(written, text))}"'


def to_json(value: Value) -> str:
    """As Go's json.Marshal: compact, with <, > and & escaped, numbers as JavaScript writes them, keys as they came."""
    return "".join(_json(value))


def _json(value: Value) -> list[str]:
    if isinstance(value, Record):
        return _json(value.source)
    if isinstance(value, float):
        return [_number(value, range(-6, 21)).replace("e-0", "e-")]
    if value is None or isinstance(value, bool | int):
        return [json.dumps(value)]
    if isinstance(value, str):
        return [_json_text(value)]
    parts: list[str] = []
    if isinstance(value, Mapping):
        for key, each in value.items():
            parts += [",", _json_text(str(key)), ":", *_json(each)]
        return ["{", *parts[1:], "}"]
    for each in listed(value):
        parts += [",", *_json(each)]
    return ["[", *parts[1:], "]"]


def _json_text(text: str) -> str:
    written = json.dumps(text, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


def check(value: Value, what: str, nesting: int = MAX_NESTING) -> None:
    """Raises UserError for what cannot come out of JSON, or is nested too deeply."""
    if isinstance(value, Mapping | list | tuple):
        if not nesting:
            raise UserError(f"{what} is nested more than {MAX_NESTING} times", hint="send it with less depth")
        for each in value.values() if isinstance(value, Mapping) else value:
            check(each, what, nesting - 1)
        for key in value if isinstance(value, Mapping) else ():
            check_text(key, what)
    elif isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, float | int):
        if not (math.isfinite(value) if isinstance(value, float) else abs(value) <= _LARGEST):
            raise UserError(f"{what} holds a number that is too large", hint="send numbers of at most 64 bits")
    elif value is not None:
        raise UserError(f"{what} holds a {type(value).__name__}", hint="send what JSON can hold")


def check_text(text: Value, what: str) -> None:
    """Raises UserError for what is no text of whole characters: images stand in texts as halves of character pairs,
    which no text of a person can hold."""
    if not isinstance(text, str):
        raise UserError(f"{what} holds a {type(text).__name__}, where a text belongs", hint="send a text")
    if not text.isascii() and any(0xD800 <= ord(each) < 0xE000 for each in text):
        hint = "send the text as UTF-8"
        raise UserError(f"{what} holds half of a character pair (a lone surrogate), which is not Unicode", hint=hint)
