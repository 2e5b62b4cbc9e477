"""Tokens to nodes: the grammar of Go's text/template, as much of it as Ollama's templates use."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pumice.errors import UserError, nearest, shortened
from pumice.go_template.lexer import Token, tokens
from pumice.go_template.literals import number_of, text_of
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
    Variable,
    fault,
)

MAX_LENGTH = 1 << 16
"""Characters of a template; Ollama's longest, with tools, has a tenth of it."""
MAX_DEPTH = 50
"""Blocks and parentheses in one another; each `else if` is one."""
MAX_VARIABLES = 100
"""Those that a line can name."""

_WORDS = {"true": True, "false": False, "nil": None}
_KEYWORDS = ("if", "with", "range", "else", "end", "break", "continue", "define", "template", "block")


def parse(text: str, functions: Collection[str]) -> tuple[Node, ...]:
    """Raises UserError for what is no template, with its line and what was expected."""
    if len(text) > MAX_LENGTH:
        raise UserError(
            f"the template has {len(text)} characters", hint=f"a template may have {MAX_LENGTH}: make it shorter"
        )
    half = next((each for each in text if 0xD800 <= ord(each) < 0xE000), None)
    if half is not None:
        raise UserError(f"the template holds {half!a}, half of a character pair", hint="write the template as UTF-8")
    parser = _Parser(list(tokens(text)), functions)
    nodes, closer = parser.nodes()
    if closer is not None:
        raise fault(closer.line, f"{{{{{closer.text}}}}} closes nothing", "remove it, or write its {{if}}")
    return nodes


class _Parser:
    def __init__(self, found: list[Token], functions: Collection[str]) -> None:
        self._tokens, self._at = found, 0
        self._functions = functions
        self._variables = ["$"]
        self._blocks: list[str] = []
        self._depth = 0

    def nodes(self) -> tuple[tuple[Node, ...], Token | None]:
        """Up to an {{else}} or {{end}}, whose word is given back, or the end of the text."""
        found: list[Node] = []
        while self._at < len(self._tokens):
            token = self._next()
            if token.kind == "outside":
                if token.text:
                    found.append(Text(Own(token.text)))
                continue
            word = self._peek()
            if word.kind == "word" and word.text in ("else", "end"):
                return tuple(found), self._next()
            found.append(self._statement(word))
        if self._blocks:
            raise fault(self._tokens[-1].line, f"an {{{{{self._blocks[-1]}}}}} has no end", "close it with {{end}}")
        return tuple(found), None

    def _statement(self, word: Token) -> Node:
        if word.kind != "word" or word.text not in _KEYWORDS:
            return Action(self._pipe("close", most=1))
        self._next()
        if word.text == "if" or word.text == "with" or word.text == "range":
            return self._branch(word)
        if word.text == "break" or word.text == "continue":
            self._expect("close", f"}}}} after {word.text}")
            if "range" not in self._blocks:
                raise fault(word.line, f"{{{{{word.text}}}}} stands outside of a {{{{range}}}}", "move it into one")
            return Leave(word.text)  # type: ignore[arg-type]
        hint = "pumice reads what Ollama's templates use: text, values, if, with, range, break, continue"
        raise fault(word.line, f"{{{{{word.text}}}}} is not supported", hint)

    def _branch(self, word: Token) -> Branch:
        """From after its keyword to its {{end}}. Its variables are known up to there."""
        self._deeper(word.line)
        known = len(self._variables)
        self._blocks.append(word.text)
        pipe = self._pipe("close", most=2 if word.text == "range" else 1)
        inner = len(self._variables)
        body, closer = self.nodes()
        assert closer is not None  # nodes() of a block ends in one, or raises
        del self._variables[inner:]
        otherwise: tuple[Node, ...] = ()
        if closer.text == "else":
            if word.text == "range":
                self._blocks[-1] = "else"  # what stands there is not repeated, so nothing to break out of
            again = self._peek()
            if again.kind == "word" and again.text == word.text and word.text != "range":
                otherwise = (self._branch(self._next()),)
                closer = None
            else:
                self._expect("close", "}} after else")
                otherwise, closer = self.nodes()
        if closer is not None:
            if closer.text == "else":
                raise fault(closer.line, "a second {{else}} follows {{else}}", "close the block with {{end}}")
            self._expect("close", "}} after end")
        self._blocks.pop()
        del self._variables[known:]
        self._depth -= 1
        return Branch(word.text, pipe, body, otherwise)  # type: ignore[arg-type]

    def _pipe(self, end: str, *, most: int) -> Pipe:
        """Up to `end`, a `close` or a `)`. `most`: variables that it may declare."""
        line = self._peek().line
        variables, declares = self._declaration(most)
        commands: list[tuple[Operand, ...]] = []
        while True:
            commands.append(self._command(line, first=not commands))
            token = self._next()
            if token.text == "|":
                continue
            if (token.kind if end == "close" else token.text) == end:
                break
            expected = "}}" if end == "close" else end
            raise fault(token.line, f"{shortened(token.text)} came, | or {expected} was expected", "close the action")
        if declares:
            self._variables += variables
        if len(self._variables) > MAX_VARIABLES:
            raise fault(line, f"more than {MAX_VARIABLES} variables are in use", "set those that are there, with =")
        return Pipe(tuple(commands), line, variables, declares)

    def _declaration(self, most: int) -> tuple[tuple[str, ...], bool]:
        """The `$a, $b :=` or `$a =` in front of a pipe, if there is one."""
        names: list[str] = []
        at = self._at
        while self._tokens[at].kind == "variable":
            names.append(self._tokens[at].text)
            mark = self._tokens[at + 1]
            at += 2
            if mark.text in (":=", "="):
                break
            if mark.text != ",":
                return (), True
        else:
            if not names:
                return (), True
            raise fault(
                self._tokens[at].line, "a $variable was expected after the comma", "write {{range $i, $each := .List}}"
            )
        if len(names) > most:
            raise fault(mark.line, f"{len(names)} variables are set at once", "only range sets two: index and element")
        if mark.text == "=":
            for name in names:
                self._known(name, mark.line)
        self._at = at
        return tuple(names), mark.text == ":="

    def _command(self, line: int, *, first: bool) -> tuple[Operand, ...]:
        operands: list[Operand] = []
        while (token := self._peek()).kind not in ("close", "mark") or token.text == "(":
            if operands and not token.spaced:
                raise fault(token.line, f"{shortened(token.text)} came without a space in front", "put one there")
            operands.append(self._operand(self._next()))
        if not operands:
            raise fault(
                token.line, f"a value is missing before {shortened(token.text)}", "write a .Field or a $variable"
            )
        called = isinstance(operands[0], Function)
        if not called and (len(operands) > 1 or not first):
            hint = "only a function takes arguments, in its own command or from a pipe"
            raise fault(line, "a value that is no function is given an argument", hint)
        if operands == [Constant(None)]:
            raise fault(line, "nil is no command", "nil can only be an argument")
        return tuple(operands)

    def _operand(self, token: Token) -> Operand:
        if token.kind == "text":
            return Constant(text_of(token))
        if token.kind in ("number", "character"):
            return Constant(number_of(token))
        if token.kind == "field":
            return Field(tuple(self._names(token))) if token.text != "." else Field(())
        if token.kind == "variable":
            self._known(token.text, token.line)
            return Variable(token.text, tuple(self._names(None)))
        if token.text == "(":
            self._deeper(token.line)
            pipe = self._pipe(")", most=1)
            self._depth -= 1
            return Chain(pipe, tuple(self._names(None)))
        if token.text in _WORDS:
            return Constant(_WORDS[token.text])
        if token.text in _KEYWORDS:
            raise fault(token.line, f"the word {token.text} stands where a value was expected", "write a .Field")
        if token.text not in self._functions:
            raise fault(token.line, f'function "{token.text}" not defined', nearest(token.text, self._functions))
        return Function(token.text)

    def _names(self, first: Token | None) -> Iterator[str]:
        """`.A.B`: fields that follow one another without a space."""
        if first is not None:
            yield first.text[1:]
        while (token := self._peek()).kind == "field" and token.text != "." and not token.spaced:
            yield self._next().text[1:]

    def _known(self, name: str, line: int) -> None:
        if name not in self._variables:
            raise fault(line, f'undefined variable "{name}"', f"set it first: {{{{ {name} := .Value }}}}")

    def _deeper(self, line: int) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise fault(line, f"more than {MAX_DEPTH} blocks stand in one another", "write fewer")

    def _peek(self) -> Token:
        return self._tokens[self._at]

    def _next(self) -> Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, kind: str, what: str) -> None:
        token = self._next()
        if token.kind != kind:
            raise fault(token.line, f"{shortened(token.text)} came, {what} was expected", "close the action there")
