"""Go's text/template, as much of it as the templates of Ollama's models use, with Ollama's functions.

Semantics: https://pkg.go.dev/text/template. Not here: define, template, block, complex numbers, methods. A template and
what it is given may be hostile: reading and running end in bounded time and memory, with a UserError at the bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pumice.go_template.functions import FUNCTIONS
from pumice.go_template.nodes import Action, Branch, Chain, Field, Node, Own, Pipe, Variable
from pumice.go_template.parser import parse
from pumice.go_template.run import Budget, run
from pumice.go_template.values import Record, Value, float_text, quoted

__all__ = ["Budget", "Own", "Record", "Template", "Value", "float_text", "quoted", "read_template"]

_RESPONSE = Action(Pipe(((Field(("Response",)),),), 0))


@dataclass(frozen=True)
class Template:
    """A template that was read: its nodes, and the implicit `{{ .Response }}` where it needs one."""

    nodes: tuple[Node, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """The identifiers of its fields and variables in lower case. They decide what a model can do: `messages`,
        `suffix`, `tools`."""
        return frozenset(name.lower() for name in _names_of(self.nodes))

    def run(self, values: Mapping[str, Value], budget: Budget | None = None) -> list[str]:
        """What it writes, in pieces. Those of type `Own` are the template's own words; all others hold something that
        came from outside, whatever they say.

        Raises UserError for what it cannot do with the values, and when the budget is used up.
        """
        return run(self.nodes, values, budget or Budget())

    @cached_property
    def cut(self) -> Template:
        """Without all that stands after the first action that writes `.Response`, as Ollama asks for an answer."""
        return replace(self, nodes=_cut(self.nodes)[0])


def read_template(text: str) -> Template:
    """A template of a model. One that names neither messages nor a response gets `{{ .Response }}` at its end.

    Raises UserError for what is no template, with its line and what was expected.
    """
    template = Template(parse(text, FUNCTIONS))
    if template.names.isdisjoint(("messages", "response")):
        return Template((*template.nodes, _RESPONSE))
    return template


def _names_of(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Action | Branch):
            yield from _names_in(node.pipe)
        if isinstance(node, Branch):
            yield from _names_of(node.body)
            yield from _names_of(node.otherwise)


def _names_in(pipe: Pipe) -> Iterator[str]:
    for command in pipe.commands:
        for operand in command:
            if isinstance(operand, Field | Variable):
                yield from operand.names
            elif isinstance(operand, Chain):
                yield from _names_in(operand.pipe)


def _cut(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], bool]:
    """The nodes up to the one that writes `.Response`, and whether there is one. A condition does not write."""
    kept: list[Node] = []
    for node in nodes:
        found = False
        if isinstance(node, Branch):
            body, found = _cut(node.body)
            otherwise, later = ((), False) if found else _cut(node.otherwise)
            node, found = replace(node, body=body, otherwise=otherwise), found or later
        elif isinstance(node, Action):
            found = _writes_response(node.pipe)
        kept.append(node)
        if found:
            return tuple(kept), True
    return tuple(kept), False


def _writes_response(pipe: Pipe) -> bool:
    return any(
        (isinstance(operand, Field) and "Response" in operand.names)
        or (isinstance(operand, Chain) and _writes_response(operand.pipe))
        for command in pipe.commands
        for operand in command
    )
