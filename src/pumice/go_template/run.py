"""A template's nodes, run over values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pumice.errors import UserError, nearest
from pumice.go_template.functions import FUNCTIONS
from pumice.go_template.nodes import (
    Action,
    Branch,
    Chain,
    Constant,
    Field,
    Function,
    Leave,
    Node,
    Operand,
    Own,
    Pipe,
    Text,
    fault,
)
from pumice.go_template.values import Record, Trouble, Value, is_true, printed

MAX_STEPS = 500_000
"""Nodes and commands that are run: a conversation of thousands of messages, and some seconds at most."""
MAX_WRITTEN = 1 << 24
"""Characters that are written, and that functions read and make."""


@dataclass
class Budget:
    """What is left for a rendering, of which there may be several over one conversation."""

    steps: int = MAX_STEPS
    written: int = MAX_WRITTEN


def run(nodes: Sequence[Node], values: Mapping[str, Value], budget: Budget) -> list[str]:
    """What the template writes; of the pieces, those of type `Own` are the template's words.

    Raises UserError for what it cannot do with the values, and when the budget is used up.
    """
    runner = _Runner(values, budget)
    runner.block(nodes, values)
    return runner.pieces


class _Runner:
    def __init__(self, values: Mapping[str, Value], budget: Budget) -> None:
        self.pieces: list[str] = []
        self._variables: list[tuple[str, Value]] = [("$", values)]
        self._budget = budget

    def block(self, nodes: Sequence[Node], dot: Value) -> Literal["break", "continue"] | None:
        """Runs the nodes; where a {{break}} or {{continue}} left them, which."""
        for node in nodes:
            left: Literal["break", "continue"] | None = None
            if isinstance(node, Text):
                self._write(node.text, 0)
            elif isinstance(node, Leave):
                return node.kind
            elif isinstance(node, Action):
                value = self._pipe(node.pipe, dot)
                if not node.pipe.variables:
                    self._spend(_elements(value), node.pipe.line)
                    self._write(_shown(value), node.pipe.line)
            else:
                known = len(self._variables)
                left = self._loop(node, dot) if node.kind == "range" else self._choice(node, dot)
                del self._variables[known:]
            if left:
                return left
        return None

    def _choice(self, node: Branch, dot: Value) -> Literal["break", "continue"] | None:
        value = self._pipe(node.pipe, dot)
        if is_true(value):
            return self.block(node.body, value if node.kind == "with" else dot)
        return self.block(node.otherwise, dot)

    def _loop(self, node: Branch, dot: Value) -> Literal["break", "continue"] | None:
        value = self._pipe(node.pipe, dot)
        if isinstance(value, bool | float | str | Record):
            hint = "range takes a list, a map or a whole number"
            raise fault(node.pipe.line, f"range can't iterate over {_shown(value)[:80]!r}", hint)
        self._spend(len(value) if isinstance(value, Mapping) else 0, node.pipe.line)  # its keys are sorted
        known, started = len(self._variables), False
        for key, each in _pairs(value):
            started = True
            self._spend(1, node.pipe.line)
            names = node.pipe.variables
            self._set(node.pipe, (each,) if len(names) == 1 else (key, each))
            left = self.block(node.body, each)
            del self._variables[known:]
            if left == "break":
                break
        return None if started else self.block(node.otherwise, dot)

    def _pipe(self, pipe: Pipe, dot: Value) -> Value:
        """The value of a pipe; its variables are set, except those of a range, which its turns set."""
        value: Value = None
        for index, command in enumerate(pipe.commands):
            self._spend(1, pipe.line)
            value = self._command(command, dot, pipe.line, (value,) if index else ())
        if len(pipe.variables) == 1:
            self._set(pipe, (value,))
        return value

    def _set(self, pipe: Pipe, values: Sequence[Value]) -> None:
        for name, value in zip(pipe.variables, values):
            if pipe.declares:
                self._variables.append((name, value))
            else:
                at = max(place for place, (known, _) in enumerate(self._variables) if known == name)
                self._variables[at] = (name, value)

    def _command(self, command: Sequence[Operand], dot: Value, line: int, last: tuple[Value, ...]) -> Value:
        first, *rest = command
        if not isinstance(first, Function):
            return self._operand(first, dot, line)
        if first.name in ("and", "or"):
            return self._decided(first.name, rest, dot, line, last)
        return self._called(first.name, [*(self._operand(each, dot, line) for each in rest), *last], line)

    def _decided(self, name: str, rest: Sequence[Operand], dot: Value, line: int, last: tuple[Value, ...]) -> Value:
        """`and` gives its first false argument, `or` its first true one, else the last; none is looked at after it."""
        value: Value = None
        for operand in rest:
            value = self._operand(operand, dot, line)
            if is_true(value) == (name == "or"):
                return value
        if not rest and not last:
            raise fault(line, f"{name} came without an argument", "give it at least one")
        return last[0] if last else value

    def _called(self, name: str, values: Sequence[Value], line: int) -> Value:
        function = FUNCTIONS[name]
        if not function.least <= len(values) <= function.most:
            takes = f"{function.least}" if function.least == function.most else f"at least {function.least}"
            raise fault(line, f"{name} has {len(values)} arguments", f"it takes {takes}")
        self._count(sum(map(_weight, values)), line)
        if name in ("json", "print", "printf"):
            self._spend(sum(map(_elements, values)), line)
        try:
            made = function.call(*values)
        except Trouble as trouble:
            raise fault(line, str(trouble), "change the template there") from trouble
        if isinstance(made, str):
            self._count(len(made), line)
        return made

    def _operand(self, operand: Operand, dot: Value, line: int) -> Value:
        if isinstance(operand, Constant):
            return operand.value
        if isinstance(operand, Function):
            return self._command((operand,), dot, line, ())
        if isinstance(operand, Field):
            value = dot
        elif isinstance(operand, Chain):
            value = self._pipe(operand.pipe, dot)
        else:
            value = next(value for name, value in reversed(self._variables) if name == operand.name)
        for name in operand.names:
            value = _field(value, name, line)
        return value

    def _write(self, text: str, line: int) -> None:
        self._spend(1, line)
        self._count(len(text), line)
        if text:
            self.pieces.append(text)

    def _spend(self, steps: int, line: int) -> None:
        self._budget.steps -= steps
        if self._budget.steps < 0:
            raise UserError(
                f"the template takes more than {MAX_STEPS} steps, at its line {line}",
                hint="send fewer messages, or a template with less work",
            )

    def _count(self, characters: int, line: int) -> None:
        self._budget.written -= characters
        if self._budget.written < 0:
            raise UserError(
                f"the template works on more than {MAX_WRITTEN} characters, at its line {line}",
                hint="send less text, or a template that repeats it less often",
            )


def _weight(value: Value) -> int:
    """What looking at all of a value takes, in characters."""
    if isinstance(value, str):
        return len(value)
    return len(value) // 8 if isinstance(value, list | tuple | Mapping) else 0


def _elements(value: Value) -> int:
    """How many values stand in a value: what writing it takes, in steps."""
    if isinstance(value, Record):
        return _elements(value.source)
    if isinstance(value, list | tuple | Mapping):
        return len(value) + sum(map(_elements, value.values() if isinstance(value, Mapping) else value))
    return 0


def _shown(value: Value) -> str:
    """A value as an action writes it."""
    if isinstance(value, str):
        return value
    return Own("<no value>") if value is None else printed(value)


def _pairs(value: Value) -> Sequence[tuple[Value, Value]] | enumerate[Value]:
    """What a range goes over: index and element, or key and value in the order of the keys."""
    if isinstance(value, Mapping):
        return sorted(value.items())
    if value is None:
        return ()
    return enumerate(range(max(value, 0)) if isinstance(value, int) else value)  # type: ignore[arg-type]


def _field(value: Value, name: str, line: int) -> Value:
    """A map without the key gives nil, as in Go; a struct has its fields only."""
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, Record):
        if name not in value.fields:
            raise fault(line, f"can't evaluate field {name}", nearest(name, value.fields))
        return value.fields[name]
    what = "nil" if value is None else f"a {type(value).__name__}"
    raise fault(line, f"can't evaluate field {name} of {what}", "ask for it in an {{if}} of the value before it")
