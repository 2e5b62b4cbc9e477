"""Which token may come next so that an answer gets its form: a form is compiled for a vocabulary, then followed.

The work is llguidance's (Moskal et al.): an Earley parser over a lexer of regular-expression derivatives, walked along
the prefix tree of the vocabulary. Here stand what goes in (the vocabulary as bytes, a form as a grammar), limits, and
errors in words.

V vocabulary of the model, which may be larger or smaller than the tokenizer's
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark
from torch import Tensor

from pumice.engine.form import Form
from pumice.errors import UserError, shortened
from pumice.tokenizer import Tokenizer

__all__ = ["Form", "Grammar", "Guide", "compile_form"]

JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allow_general_unicode_escapes": False,
}
r"""As Python's json.dumps writes it. With no other white space allowed, names and punctuation are forced and cost no
pass, and a weak model cannot fill an answer with line ends. Characters stand for themselves, `\u` for control ones
alone: there is no half of a character pair, and no name comes a second time in disguise."""
INNER = r"(?s:[^\s\x1c-\x1f](.*[^\s\x1c-\x1f])?)?"
"""A text without white space at its ends, by the white space that an answer is stripped of (Python's)."""

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""The library's own bounds on work for a step and a grammar; states of the lexer take one or two kilobytes each."""
MAX_RULES = 500
"""Of a grammar. The time to compile it grows with their square where each needs the next."""
STACK_BYTES = 64 * 2**20
"""The compiler calls itself along references, and a stack that overflows ends the process: this is several times what
the longest chain needs that a form may have. It is address space, of which only what is used becomes memory."""


def compile_form(form: Form, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> Grammar:
    """A form for a vocabulary, to be kept: compiling takes milliseconds to seconds, a new `guide` microseconds.

    `stop_ids` end an answer, and are allowed where it is complete. Raises UserError for a form that is damaged, that is
    not supported, that needs too much work, or that no text has.
    """
    vocabulary = _vocabulary(tokenizer, tuple(stop_ids))
    stack_bytes = threading.stack_size(STACK_BYTES)
    try:
        with ThreadPoolExecutor(max_workers=1) as thread:
            grammar = thread.submit(_compiled, form, vocabulary).result()
    finally:
        threading.stack_size(stack_bytes)
    _try_beginning(grammar.guide(), tokenizer)
    return grammar


def _try_beginning(guide: Guide, tokenizer: Tokenizer) -> None:
    """A form that no text has, or whose first step is too much work, is refused before the model runs."""
    scores_V = torch.zeros(tokenizer.vocab_size)
    allowed_V = guide.mask(scores_V) == 0
    for space in tokenizer.continued(" ")[:1]:
        if allowed_V[space]:  # and behind it the form itself
            guide.push(space)
            for token in guide.forced():
                guide.push(token)
            guide.mask(scores_V)


def _compiled(form: Form, vocabulary: _Vocabulary) -> Grammar:
    matcher = LLMatcher(vocabulary.library, _grammar(form), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise UserError(f"the {form.kind} is not followed: {_message(matcher)}", hint=_HINTS[form.kind])
    return Grammar(form, matcher, vocabulary)


@dataclass(frozen=True)
class Grammar:
    """A form compiled for one vocabulary. Made by `compile_form`."""

    form: Form
    _matcher: LLMatcher
    _vocabulary: _Vocabulary

    def guide(self) -> Guide:
        """The way through it for one answer."""
        return Guide(self._matcher.deep_copy(), self._vocabulary)


class Guide:
    """One answer on its way through a grammar: ask for a mask or for forced tokens, push each token that was taken.

    All methods raise UserError where following the form takes more work than its limits allow.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def mask(self, scores_V: Tensor) -> Tensor:
        """The scores, with -inf for tokens that may not come next."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed_V = np.unpackbits(allowed, count=len(scores_V), bitorder="little")
        if not allowed_V.any():
            raise _dead_end()
        # 0 for 1 and -inf for 0. Adding is several times faster than choosing, which guesses at each token.
        return scores_V + (1 - 1 / torch.from_numpy(allowed_V).to(scores_V.device))

    def push(self, token: int) -> None:
        """The token that came. One that was not allowed is a bug of the caller: AssertionError."""
        ends = self.ended and token in self._vocabulary.stop_ids
        assert ends or self._matcher.validate_tokens([token]) == 1, f"token {token} was not allowed"
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """The tokens that must come next, in the vocabulary's own way to write them; none where there is a choice."""
        tokens = [] if self.ended else self._matcher.compute_ff_tokens()
        self._check()
        return tokens[: self.allowed(tokens)]

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these may come next, one after the other; none once the form is complete."""
        count = 0 if self.ended else self._matcher.validate_tokens(list(tokens))
        self._check()
        return count

    @property
    def ended(self) -> bool:
        """Whether only an end token may come."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            if self._matcher.get_error().startswith("NoExtension"):
                raise _dead_end()
            raise UserError(
                f"the form cannot be followed any farther: {_message(self._matcher)}",
                hint="give a simpler one: fewer optional fields, shorter repetitions, words instead of letters",
            )


def _dead_end() -> UserError:
    return UserError(
        "no text has the form, or none that this vocabulary can write",
        hint="check that some text has it; white space at the ends of an answer is not part of it",
    )


@dataclass(frozen=True)
class _Vocabulary:
    library: LLTokenizer
    stop_ids: tuple[int, ...]


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> _Vocabulary:
    """The vocabulary as the library holds it: a second of work for the largest."""
    stop_ids = tuple(id for id in stop_ids if 0 <= id < tokenizer.vocab_size)
    if not stop_ids:
        raise UserError("the model has no end token, so no form can end", hint="load it with a template that has one")
    texts = _Texts(tokenizer, stop_ids)
    texts.library = LLTokenizer(TokenizerWrapper(texts), eos_token=list(stop_ids))
    return _Vocabulary(texts.library, stop_ids)


class _Texts:
    """A tokenizer as the library asks for one; the names are its own. A token of no bytes never comes."""

    bos_token_id = None
    library: LLTokenizer

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, stop_ids[0]
        self.tokens = [b"" if id in stop_ids else tokenizer.bytes_of(id) for id in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, whose bytes are those of the text: where the tokenizer would change it (normal forms, a
        literal space mark), the longest tokens that fit, one after the other."""
        ids = self._tokenizer.continued(text)
        return ids if b"".join(self.tokens[id] for id in ids) == text.encode() else self.library.greedy_tokenize(text)


def _grammar(form: Form) -> str:
    """A form as the library's grammar. A space may stand in front: most models begin an answer with one, and it is not
    shown."""
    match form.kind:
        case "schema":
            schema = {**json.loads(form.text), "x-guidance": JSON_STYLE}
            lark = f'start: " "? value\nvalue: %json {json.dumps(schema)}'
        case "choices":
            lark = f'start: TEXT\nTEXT: " "? ({" | ".join(map(json.dumps, json.loads(form.text)))})'
        case "regex":
            _check_regex(form.text)
            lark = f'start: TEXT\nTEXT: " "? (/{regex_to_lark(form.text, "d")}/ & /{INNER}/)'
        case "grammar":
            own = _from_gbnf(form.text) if "::=" in form.text else form.text
            outer = {"name": "outer", "lark_grammar": 'start: " "? @own'}
            return json.dumps({"grammars": [outer, {"name": "own", "lark_grammar": _checked(own)}]})
    return LLMatcher.grammar_from_lark(lark)


def _check_regex(regex: str) -> None:
    """What would not survive being written between slashes: a backslash at the end, lines that a flag makes layout."""
    half_escape = (len(regex) - len(regex.rstrip("\\"))) % 2
    if half_escape or ("\n" in regex and re.search(r"\(\?[a-zA-Z]*x", regex)):
        why = "ends in half an escape" if half_escape else "has a layout of several lines"
        raise UserError(f"the regex {shortened(regex)} {why}", hint=_HINTS["regex"])


def _from_gbnf(text: str) -> str:
    if text.count("::=") > MAX_RULES:
        raise _too_many_rules()
    with _ConverterErrors():
        return gbnf_to_lark(text)


class _ConverterErrors:
    """Turns the converter's errors into a UserError: they are of class Exception itself, or one of its own."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            raise UserError(f"the GBNF grammar is not read: {shortened(str(problem))}", hint=_HINTS["grammar"])


_OTHER_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')
"""What a Lark grammar holds beside its syntax: strings, regular expressions, comments."""


def _checked(lark: str) -> str:
    """Refuse what reaches past the text (tokens by name or number) or past the limits (schemas inside, many rules)."""
    syntax = _OTHER_TEXT.sub("", lark)
    for refused, instead in (("<", "text in quotes"), ("%json", "the schema by itself"), ("%lark", "one grammar")):
        if refused in syntax:
            raise UserError(f"the grammar has {refused!r} outside of quotes", hint=f"give {instead}")
    if unheard := re.search(r"\b(?:temperature|stop)\s*=", syntax):
        raise UserError(f"the grammar sets {unheard[0]!r}, which is not followed", hint="lazy and suffix= are followed")
    if syntax.count(":") > MAX_RULES:
        raise _too_many_rules()
    return lark


def _too_many_rules() -> UserError:
    return UserError(f"the grammar has more than {MAX_RULES} rules", hint="join some of them")


_HINTS = {
    "schema": "leave that out of the schema, or say it in the question",
    "choices": "give fewer or shorter choices",
    "regex": "the syntax is that of Rust's regex crate: no look-around, no back-references",
    "grammar": "a grammar is in llguidance's Lark dialect with a rule `start`, or in GBNF with a rule `root`",
}


def _message(matcher: LLMatcher) -> str:
    """The library's message without places in a grammar that the user did not write, and advice that is not ours."""
    text = matcher.get_error().split("\n   1 |")[0].split("\n<")[0].split(" Enable 'coerce")[0]
    words = " ".join(re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", text).split())
    return words if len(words) < 300 else f"{words[:300]}…"
