"""The tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json declare, as tokenizer.json
writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pumice.errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken


def declared_tokens(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `added_tokens_decoder` of a tokenizer_config.json, in the order of the ids."""
    try:
        declared = sorted((int(id), token) for id, token in config.get("added_tokens_decoder", {}).items())
        return [{**added_token(id, token["content"]), **flags(token)} for id, token in declared]
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise UserError(
            f"the added_tokens_decoder of tokenizer_config.json is damaged: {problem!r}",
            hint='it maps ids to tokens: {"32000": {"content": "<image>", "special": true}}',
        ) from problem


def added_token(id: Any, content: Any) -> dict[str, Any]:
    """An added token as tokenizer.json writes it."""
    if not isinstance(id, int) or not isinstance(content, str):
        raise UserError(
            f"an added token has the id {id!r} and the content {content!r}",
            hint='added_tokens.json maps tokens to numbers: {"<image>": 32000}',
        )
    return {"id": id, "content": content, **flags({"special": True})}


def flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}


def special_words(config: Mapping[str, Any]) -> set[str]:
    """Tokens that tokenizer_config.json or special_tokens_map.json call special, as Transformers takes them even where
    tokenizer.json says otherwise."""
    more = config.get("additional_special_tokens")
    named = [config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")]
    words = {content_of(token) for token in (*named, *(more if isinstance(more, list) else ()))}
    return {word for word in words if word} | {each["content"] for each in declared_tokens(config) if each["special"]}


def content_of(token: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


class AddedWords:
    """Added tokens, looked for in a text: the first from the left, the longest of several."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        words = sorted(self._tokens, key=len, reverse=True)
        self._any = re.compile("|".join(map(self._pattern, words))) if words else None

    def _pattern(self, word: str) -> str:
        return rf"(?<!\w){re.escape(word)}(?!\w)" if self._tokens[word].single_word else re.escape(word)

    def cut(self, text: str) -> Iterator[tuple[Literal["text", "special"], str]]:
        at = 0
        for found in self._any.finditer(text) if self._any else ():
            token, before = self._tokens[found[0]], text[at : found.start()]
            before = before.rstrip() if token.lstrip else before
            if before:
                yield "text", before
            yield "special", token.content
            at = found.end()
            if token.rstrip:
                at += len(text[at:]) - len(text[at:].lstrip())
        if text[at:]:
            yield "text", text[at:]

    def behind(self, word: str, text: str) -> str:
        """A text that follows one of the tokens: without its leading white space where the token takes that."""
        token = self._tokens.get(word)
        return text.lstrip() if token is not None and token.rstrip else text
