"""The tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json declare, as tokenizer.json
writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pumice.errors import UserError


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
