"""Go's literals: strings with escapes, characters, numbers."""

from __future__ import annotations

import math
import re

from pumice.errors import shortened
from pumice.go_template.lexer import Token
from pumice.go_template.nodes import Own, fault

_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_REAL = re.compile(r"[+-]?(?=\d*[.eE])(?=\.?\d)\d*\.?\d*(?:[eE][+-]?\d+)?")
_INT64 = range(-(2**63), 2**63)


def text_of(token: Token) -> Own:
    """A "string" or a `string`. Raises UserError for an escape that Go does not have, or that is no character."""
    body = token.text[1:-1]
    if token.text[0] == "`":
        return Own(body.replace("\r", ""))  # as Go does it

    def written(found: re.Match[str]) -> str:
        byte, short, long, octal, letter = found.groups()
        if letter is not None:
            if letter in _SIMPLE or letter == token.text[0]:
                return _SIMPLE.get(letter, letter)
            raise _bad(token, found[0])
        code = int(octal, 8) if octal else int(byte or short or long, 16)
        is_byte = byte or octal
        if (is_byte and code >= 0x80) or 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise _bad(token, found[0])
        return chr(code)

    return Own(_ESCAPE.sub(written, body))


def _bad(token: Token, escape: str) -> Exception:
    hint = r"write \n, \t, \\, \" or \u and four hexadecimal digits of a character"
    return fault(token.line, f"the string {shortened(token.text)} has the escape {shortened(escape)}", hint)


def number_of(token: Token) -> int | float:
    """A number or a 'character', which is a number too. Raises UserError for what is none, or too large for Go."""
    if token.kind == "character":
        character = text_of(token)
        if len(character) == 1:
            return ord(character)
    elif token.text.isascii() and len(token.text) <= 100:
        try:
            number = float(token.text) if _REAL.fullmatch(token.text) else int(token.text, 0)
        except ValueError:
            number = math.nan
        if number in _INT64 if isinstance(number, int) else math.isfinite(number):
            return number
    hint = "write a number of 64 bits, such as 12 or 0.5"
    raise fault(token.line, f"{shortened(token.text)} is no number that Go reads", hint)
