"""Ollama's Modelfile: read into a value, and written back. Grammar: Ollama's parser/parser.go."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from pumice.errors import UserError, shortened
from pumice.options import DEPRECATED, parameter_texts, parameter_value

Role = Literal["system", "user", "assistant"]
_SINGLE = ("template", "system", "requires", "renderer", "parser", "draft")
"""Commands of which the last one counts."""
_COMMANDS = ("from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message")
_MAX_LENGTH = 1 << 22

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_COMMAND = re.compile(r"([A-Za-z]+)[ \t]+")
_NAME = re.compile(r"([A-Za-z0-9_]+)[ \t]+")


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says. `sources` are the values of FROM, as written: paths or names. `parameters` have the types
    of `pumice.options`; a `stop` is a list. `ignored` names the deprecated parameters that were there."""

    sources: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    messages: tuple[tuple[Role, str], ...] = ()
    licenses: tuple[str, ...] = ()
    requires: str | None = None
    renderer: str | None = None
    parser: str | None = None
    draft: str | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A Modelfile that reads back as this. Raises UserError for a text that no Modelfile can hold."""
        lines = [f"FROM {_quoted(each)}" for each in self.sources]
        lines += [f"ADAPTER {_quoted(each)}" for each in self.adapters]
        single = {name: getattr(self, name) for name in _SINGLE}
        lines += [f"{name.upper()} {_quoted(text)}" for name, text in single.items() if text is not None]
        for name, value in self.parameters.items():
            lines += [f"PARAMETER {name} {_quoted(text)}" for text in parameter_texts(value)]
        lines += [f"MESSAGE {role} {_quoted(text)}" for role, text in self.messages]
        lines += [f"LICENSE {_quoted(each)}" for each in self.licenses]
        return "".join(f"{line}\n" for line in lines)


def read_modelfile(content: str | bytes) -> Modelfile:
    """A Modelfile: its text, or its bytes in UTF-8 or in UTF-16 with a byte order mark.

    Raises UserError, with the line, for what is no Modelfile; in Ollama's words where it has some.
    """
    text = content if isinstance(content, str) else _decoded(content)
    if len(text) > _MAX_LENGTH:
        raise UserError(f"the Modelfile has {len(text)} characters", hint=f"it may have {_MAX_LENGTH}")
    found: dict[str, list[str]] = defaultdict(list)
    parameters: dict[str, object] = {}
    messages: list[tuple[Role, str]] = []
    for line, command, name, value in _commands(_LINE.findall(text.removeprefix("\ufeff"))):
        if command == "message":
            messages += [(role, value) for role in get_args(Role) if role == name]
        elif command != "parameter":
            if command in ("from", "adapter") and not value:
                raise _fault(line, f"{command.upper()} came without a value", "name a model, a folder or a file")
            found[command].append(value)
        elif name in DEPRECATED:
            found["ignored"].append(name)
        else:
            _set(parameters, name, value, line)
    if not found["from"]:
        raise UserError("no FROM line", hint="name the model, folder or file that this builds on: FROM llava")
    return Modelfile(
        tuple(found["from"]),
        adapters=tuple(found["adapter"]),
        parameters={name: tuple(each) if isinstance(each, list) else each for name, each in parameters.items()},
        messages=tuple(messages),
        licenses=tuple(found["license"]),
        ignored=tuple(found["ignored"]),
        **{name: found[name][-1] for name in _SINGLE if found[name]},
    )


def _decoded(content: bytes) -> str:
    kind = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(kind)
    except UnicodeDecodeError as problem:
        hint = "save it as UTF-8"
        raise UserError(f"the Modelfile is no {kind[:6].rstrip('-').upper()} text: {problem}", hint=hint) from problem


def _set(parameters: dict[str, object], name: str, value: str, line: int) -> None:
    """Sets a parameter; a further `stop` comes to those that are there."""
    try:
        made = parameter_value(name, value)
    except UserError as error:
        raise _fault(line, error.message, error.hint) from error
    if isinstance(made, tuple):
        listed = parameters.setdefault(name, [])
        assert isinstance(listed, list)
        listed += made
    else:
        parameters[name] = made


def _commands(lines: Sequence[str]) -> Iterator[tuple[int, str, str, str]]:
    """The number of a line, its command, the name of a parameter or a role, and the value."""
    at = 0
    while at < len(lines):
        line, number = lines[at].lstrip(" \t"), at + 1
        at += 1
        if not line.strip("\r\n") or line.startswith("#"):
            continue
        found = _COMMAND.match(line)
        command, name = found[1].lower() if found else "", ""
        if found is None or command not in (*_COMMANDS, "requires"):
            known = ", ".join(f'"{each}"' for each in _COMMANDS)
            hint = 'a line is a command, a space and a value; a longer value stands in """three quotes"""'
            raise _fault(number, f'command must be one of {known}, or "requires"', hint)
        start = found.end()
        if command in ("parameter", "message"):
            named = _NAME.match(line, start)
            name = named[1] if named else line[start:].strip()
            if command == "message" and name not in get_args(Role):
                hint = f"{shortened(name)} came; write MESSAGE user Hello"
                raise _fault(number, 'message role must be one of "system", "user", or "assistant"', hint)
            if named is None:
                hint = "write PARAMETER temperature 0.2, or MESSAGE user Hello"
                raise _fault(number, f"{shortened(name)} came without a value", hint)
            start = named.end()
        value, at = _value(line[start:], lines, at)
        yield number, command, name, value


def _value(first: str, lines: Sequence[str], at: int) -> tuple[str, int]:
    """A value that begins with the rest of a line, and the line after it. A value that opens with quotes goes on up to
    a line that ends in them."""
    start, stripped = at, first.strip()
    quotes = next((each for each in ('"""', '"') if stripped.startswith(each)), "")
    if not quotes:
        return stripped, at
    closed = len(stripped) >= 2 * len(quotes) and stripped.endswith(quotes)
    while not closed:
        if at == len(lines):
            raise _fault(start, f"the value that opens with {quotes} has no end", f"end a line with {quotes}")
        closed = lines[at].rstrip().endswith(quotes)
        at += 1
    whole = "".join((first, *lines[start:at])).strip()
    return whole[len(quotes) : -len(quotes)], at


def _quoted(text: str) -> str:
    """A value as a Modelfile writes it: as it is where that reads back, else in one quote or three."""
    forms = (text, f'"{text}"', f'"""{text}"""')
    for form in (forms[2], forms[1]) if "\n" in text else forms:
        lines = _LINE.findall(form)
        try:
            if text and lines and _value(lines[0], lines, 1) == (text, len(lines)):
                return form
        except UserError:
            continue  # the quotes do not close; the next form may
    if not text:
        return '""'
    hint = "change that line: a Modelfile has no way to write it"
    raise UserError(f"the text {shortened(text)} has a line that ends in quotes", hint=hint)


def _fault(line: int, problem: str, hint: str) -> UserError:
    return UserError(f"(line {line}): {problem}", hint=hint)
