"""A `tokenizer.json` on its way to the library: what would end in words that nobody understands, or end the process, is
refused before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from pumice.decoding import steps_of
from pumice.errors import UserError

AGAIN = "get tokenizer.json again from where the model came"
_STEPS = {
    "normalizer": ("normalizers", {"Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"}),
    "pre_tokenizer": ("pretokenizers", {"Split", "ByteLevel", "Metaspace", "Digits"}),
}


class LibraryErrors:
    """Turns the library's errors into a UserError: they are of class Exception itself, which nothing else here raises,
    and where its code did not expect the file, of a class that it exports under no name."""

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        if kind is not None and (kind is Exception or kind.__name__ == "PanicException"):
            raise UserError(f"the tokenizer.json does not hold together: {problem}", hint=self._hint) from problem


def content(text: str) -> dict[str, Any]:
    """What a tokenizer.json says. Raises UserError."""
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"the tokenizer.json is not JSON, or not whole: {problem}", hint=AGAIN) from problem
    return spec if isinstance(spec, dict) else {}


def library(text: str, spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's object for a tokenizer.json and its content, of the kind that pumice runs itself. Raises UserError
    for another kind, and for what is damaged."""
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(f"the tokenizer.json is of kind {kind!r}; pumice reads 'BPE'", hint=AGAIN)
    if not (isinstance(model.get("vocab"), dict) and model["vocab"]):
        raise UserError("the tokenizer.json has no vocabulary", hint=AGAIN)
    _refuse_unknown_steps(spec)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"the tokenizer.json has a {name}, which pumice does not support", hint=AGAIN)
    found = checked(text, spec)
    found.no_padding()
    found.no_truncation()
    return found


def checked(text: str, spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's object for a tokenizer.json and its content, of any kind. Raises UserError for what is damaged."""
    model = spec.get("model")
    if isinstance(model, dict) and model.get("merges"):
        _refuse_lost_merges(model)
    with LibraryErrors(AGAIN):
        return tokenizers.Tokenizer.from_str(text)


def _refuse_unknown_steps(spec: Mapping[str, Any]) -> None:
    """What the tokenizers of the Llama family do before the pairing, and nothing else: the library's other steps end
    the process's patience, or the process, on damaged settings."""
    for place, (inner, known) in _STEPS.items():
        for step in steps_of(spec.get(place), inner):
            if step["type"] not in known:
                raise UserError(f"the tokenizer.json has a {place} of type {step['type']!r}", hint=AGAIN)


def _refuse_lost_merges(model: Mapping[str, Any]) -> None:
    """Pieces that are no tokens, or join to none: the library prints an error of its own on the terminal. It also cuts
    the prefix off the second by its length in bytes, and through a character that ends the process."""
    vocab, merges, prefix = model.get("vocab"), model["merges"], model.get("continuing_subword_prefix") or ""
    if not (isinstance(vocab, dict) and isinstance(merges, list) and isinstance(prefix, str)):
        raise UserError("the tokenizer.json does not hold together: its BPE has no vocabulary or no merges", hint=AGAIN)
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise UserError(f"the tokenizer.json does not hold together: a merge is {merge!r:.100}", hint=AGAIN)
        first, second = pair
        known = first in vocab and second in vocab and second.startswith(prefix)
        if not (known and first + second.removeprefix(prefix) in vocab):
            lost = "gives no token" if known else "is of no tokens"
            raise UserError(
                f"the tokenizer.json does not hold together: it joins {pair!r:.100}, which {lost} of its vocabulary",
                hint=AGAIN,
            )
