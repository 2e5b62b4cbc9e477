"""A template's text, cut into tokens.

Rules: Go's text/template/parse. White space, a trim marker takes and separates words by, is space, tab and line ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pumice.errors import shortened
from pumice.go_template.nodes import fault

SPACE = " \t\r\n"

Kind = Literal["outside", "open", "close", "text", "number", "character", "field", "variable", "word", "mark"]


@dataclass(frozen=True)
class Token:
    """`outside` is what stands between actions, `open` and `close` the borders of an action, the rest stands inside."""

    kind: Kind
    text: str
    line: int
    spaced: bool
    """White space stands in front of it."""


_TOKEN = re.compile(
    r"""(?P<close>\}\})
    |(?P<text>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
    |(?P<character>'(?:[^'\\\n]|\\.)+')
    |(?P<number>[+-]?\.?\d[\w.]*(?:(?<=[eE])[+-]\d+)?)
    |(?P<field>\.(?:[^\W\d]\w*)?)
    |(?P<variable>\$\w*)
    |(?P<word>[^\W\d]\w*)
    |(?P<mark>:=|[=|(),])""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"/\*(?:(?!\*/).)*\*/(\}\}|[ \t\r\n]-\}\})", re.DOTALL)
_GAP = re.compile(r"[ \t\r\n]*")
_OPENED = {
    '"': "a string ends at its line's end without a closing quote",
    "`": "a `string` has no closing quote",
    "'": "a character has no closing quote",
}


def tokens(text: str) -> Iterator[Token]:
    """Raises UserError for what is no token, and for an action or a comment without an end."""
    at, line, trimming = 0, 1, False
    while True:
        start = text.find("{{", at)
        outside = text[at:] if start < 0 else text[at:start]
        kept = outside.lstrip(SPACE) if trimming else outside
        if start < 0:
            yield Token("outside", kept, line, False)
            return
        after = start + 2
        if text.startswith("-", after) and text[after + 1 : after + 2] in tuple(SPACE):
            kept, after = kept.rstrip(SPACE), after + 2
        yield Token("outside", kept, line, False)
        line += text.count("\n", at, after)
        if text.startswith("/*", after):
            found = _COMMENT.match(text, after)
            if found is None:
                raise fault(line, "a comment has no end", "a comment is written {{/* ... */}}, alone in its braces")
            trimming, at = found[1] != "}}", found.end()
            line += text.count("\n", after, at)
            continue
        yield Token("open", "{{", line, False)
        inside = list(_action(text, after, line))
        yield from (token for token, _ in inside)
        last, at = inside[-1]
        trimming, line = last.text != "}}", last.line


def _action(text: str, at: int, line: int) -> Iterator[tuple[Token, int]]:
    """The tokens of an action and where each one ends; the last is its `close`."""
    opened = line
    while True:
        gap = _GAP.match(text, at)
        assert gap is not None
        line += gap[0].count("\n")
        spaced, at = gap.end() > at, gap.end()
        if spaced and text.startswith("-}}", at):
            yield Token("close", "-}}", line, spaced), at + 3
            return
        if at == len(text):
            raise fault(opened, "an action has no end", "close it with }}")
        found = _TOKEN.match(text, at)
        if found is None:
            problem = _OPENED.get(text[at], f"the character {shortened(text[at])} stands inside an action")
            raise fault(line, problem, "an action holds names, .Fields, $variables, literals, pipes and parentheses")
        kind: Kind = found.lastgroup  # type: ignore[assignment]
        yield Token(kind, found[0], line, spaced), found.end()
        if kind == "close":
            return
        at, line = found.end(), line + found[0].count("\n")
