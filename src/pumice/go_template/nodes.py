"""What a template is made of, after it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pumice.errors import UserError


class Own(str):
    """A text that the template wrote itself. Every other `str` came from outside, or was made of what did."""

    __slots__ = ()


@dataclass(frozen=True)
class Constant:
    value: Own | int | float | bool | None


@dataclass(frozen=True)
class Field:
    """`.A.B` of the dot; no names: the dot itself."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Variable:
    """`$x.A.B`; `$` is the values that the template was given."""

    name: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """`(pipe).A.B`, or without names a pipe in parentheses."""

    pipe: Pipe
    names: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    name: str


Operand = Constant | Field | Variable | Chain | Function


@dataclass(frozen=True)
class Pipe:
    """`$a, $b := first | second`: each command is a function and its arguments, or one operand."""

    commands: tuple[tuple[Operand, ...], ...]
    line: int
    variables: tuple[str, ...] = ()
    declares: bool = True
    """`:=` makes the variables; `=` sets those that are there."""


@dataclass(frozen=True)
class Text:
    text: Own


@dataclass(frozen=True)
class Action:
    pipe: Pipe


@dataclass(frozen=True)
class Branch:
    kind: Literal["if", "with", "range"]
    pipe: Pipe
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Leave:
    kind: Literal["break", "continue"]


Node = Text | Action | Branch | Leave


def fault(line: int, problem: str, hint: str) -> UserError:
    """What is wrong with a template, and where."""
    return UserError(f"line {line} of the template: {problem}", hint=hint)
