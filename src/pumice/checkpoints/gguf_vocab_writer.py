"""A tokenizer's files as GGUF's metadata, for llama.cpp: pieces with scores, or byte-level BPE's merges.

Facts: convert_hf_to_gguf.py, llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pumice.checkpoints.fields import Fields, json_if_there
from pumice.checkpoints.gguf_file import Value
from pumice.checkpoints.gguf_vocab import SPLITS
from pumice.checkpoints.sidefiles import chat_template
from pumice.decoding import steps_of
from pumice.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceModel,
    read_model,
)
from pumice.special_tokens import declared_tokens, special_words
from pumice.tokenizer import Tokenizer

NEVER_JOINED = -1e4
"""The score of a piece that no two others make."""


@dataclass
class _Rows:
    """A vocabulary, row by row, as llama.cpp has it."""

    tokens: dict[int, str]
    kinds: dict[int, int] = field(default_factory=dict)
    """By id; a row without one is an ordinary piece."""
    scores: dict[int, float] = field(default_factory=dict)


def vocab_values(
    folder: Path, tokenizer: Tokenizer, rows: int, stop_ids: Sequence[int]
) -> tuple[dict[str, Value], list[str]]:
    """The tokenizer in `folder` as metadata of a model with so many rows of embeddings; and where llama.cpp will
    differ from it, in words. Rows without a token get `[PADn]`, which no text becomes."""
    config = {**_raw(folder, "special_tokens_map"), **_known(_raw(folder, "tokenizer_config"))}
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    pieces = read_model((folder / "tokenizer.model").read_bytes(), "tokenizer.model") if _has_model(folder) else None
    notes: list[str] = []
    if spec is not None and any(step["type"] == "ByteLevel" for step in _steps(spec, "pre_tokenizer", "pretokenizers")):
        found, values = _byte_level(spec, notes)
    elif spec is not None:
        found, values = _pieces_of_json(spec, pieces, notes)
    else:
        assert pieces is not None, folder
        found, values = _pieces_of_model(pieces)
    _add_special(found, folder, config, spec)
    kept = {id: text for id, text in found.tokens.items() if id < rows}
    if lost := len(found.tokens) - len(kept):
        notes.append(f"{lost} tokens of the tokenizer have no row in the embedding; they are left out")
    tokens = [kept.get(id, f"[PAD{id}]") for id in range(rows)]
    kinds = [found.kinds.get(id, NORMAL) if id in kept else UNUSED for id in range(rows)]
    values |= {"tokenizer.ggml.tokens": Value("string", tokens), "tokenizer.ggml.token_type": Value("i32", kinds)}
    if values["tokenizer.ggml.model"].value == "llama":
        scores = [found.scores.get(id, NEVER_JOINED) for id in range(rows)]
        values["tokenizer.ggml.scores"] = Value("f32", scores)
    values |= _roles(tokenizer, kinds, stop_ids)
    if (jinja := chat_template(folder)) is not None:
        values["tokenizer.chat_template"] = Value("string", jinja)
    return values, notes


# --- pieces -----------------------------------------------------------------------------------------------------------


def _pieces_of_model(model: PieceModel) -> tuple[_Rows, dict[str, Value]]:
    found = _Rows(
        {id: piece.text for id, piece in enumerate(model.pieces)},
        {id: piece.kind for id, piece in enumerate(model.pieces)},
        {id: piece.score for id, piece in enumerate(model.pieces)},
    )
    return found, _of_kind("llama", "default", space=model.dummy_prefix)


def _pieces_of_json(spec: dict[str, Any], model: PieceModel | None, notes: list[str]) -> tuple[_Rows, dict[str, Value]]:
    vocab: dict[str, int] = spec["model"]["vocab"]
    found = _Rows({id: text for text, id in vocab.items()})
    unknown = spec["model"].get("unk_token")
    for text, id in vocab.items():
        if text == unknown:
            found.kinds[id] = UNKNOWN
        elif spec["model"].get("byte_fallback") and _is_byte(text):
            found.kinds[id] = BYTE
    if model is not None and all(vocab.get(piece.text) == id for id, piece in enumerate(model.pieces)):
        found.scores = {id: piece.score for id, piece in enumerate(model.pieces)}
    else:
        found.scores, lost = scores_of([_pair(each) for each in spec["model"]["merges"]], vocab)
        if lost:
            notes.append(
                f"{lost} pairs of pieces make a piece that the tokenizer does not join and llama.cpp will; "
                "it may find other tokens in some texts"
            )
    return found, _of_kind("llama", "default", space=_prefixes(spec))


def scores_of(merges: Sequence[tuple[str, str]], vocab: Mapping[str, int]) -> tuple[dict[int, float], int]:
    """Scores by which llama.cpp joins pieces in the order of the merges: the earlier a piece is made, the higher.

    It joins any two pieces whose text is one. The number counts pairs that it would join so and the merges do not.
    """
    scores: dict[int, float] = {}
    for left, right in merges:
        scores.setdefault(vocab[left + right], -float(len(scores) + 1))
    listed, made = set(merges), {text for text, id in vocab.items() if id in scores}
    pieces = made | {part for pair in merges for part in pair}
    lost = sum(
        (text[:cut], text[cut:]) not in listed
        for text in made
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    )
    return scores, lost


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _prefixes(spec: Mapping[str, Any]) -> bool:
    """Does a text get a space in front?"""
    steps = _steps(spec, "normalizer", "normalizers")
    marks = [step for step in _steps(spec, "pre_tokenizer", "pretokenizers") if step["type"] == "Metaspace"]
    schemes = [
        step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") for step in marks
    ]
    return any(step["type"] == "Prepend" and step.get("prepend") == SPACE for step in steps) or any(
        scheme != "never" for scheme in schemes
    )


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def _byte_level(spec: dict[str, Any], notes: list[str]) -> tuple[_Rows, dict[str, Value]]:
    values = _of_kind("gpt2", _named_split(spec, notes), space=False)
    values["tokenizer.ggml.merges"] = Value("string", [" ".join(_pair(each)) for each in spec["model"]["merges"]])
    return _Rows({id: text for text, id in spec["model"]["vocab"].items()}), values


def _named_split(spec: Mapping[str, Any], notes: list[str]) -> str:
    """llama.cpp's name for the way a text is cut before the pairing."""
    *cuts, last = _steps(spec, "pre_tokenizer", "pretokenizers")
    patterns = tuple(step.get("pattern", {}).get("Regex") for step in cuts)
    if last["type"] == "ByteLevel" and last.get("use_regex", True) and not cuts:
        return "gpt-2"
    for name, known in SPLITS.items():
        if patterns == known and not last.get("use_regex", True) and all(step["type"] == "Split" for step in cuts):
            return name
    notes.append(
        "llama.cpp has no name for the way this tokenizer cuts a text, and will find other tokens in some; the nearest "
        "that it has is named, and pumice reads the tokenizer's own file"
    )
    return "gpt-2"


# --- both -------------------------------------------------------------------------------------------------------------


def _of_kind(model: str, pre: str, *, space: bool) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": Value("string", model),
        "tokenizer.ggml.pre": Value("string", pre),
        "tokenizer.ggml.add_space_prefix": Value("bool", space),
    }


def _add_special(found: _Rows, folder: Path, config: Mapping[str, Any], spec: Mapping[str, Any] | None) -> None:
    """Tokens that are found in a text as a whole, those of the files beside the vocabulary too."""
    own = list(spec.get("added_tokens") or ()) if spec else []
    beside = json_if_there(folder / "added_tokens.json")
    named = [{"id": beside.whole(text, least=0), "content": text, "special": True} for text in beside.names]
    words = special_words(config)
    for token in (*(named if spec is None else ()), *own, *declared_tokens(config)):
        id, text = token["id"], token["content"]
        found.tokens[id] = text
        if found.kinds.get(id) not in (UNKNOWN, BYTE):
            found.kinds[id] = CONTROL if token["special"] or text in words else USER_DEFINED
    for id, text in found.tokens.items():
        if text in words and found.kinds.get(id, NORMAL) == NORMAL:
            found.kinds[id] = CONTROL


def _roles(tokenizer: Tokenizer, kinds: Sequence[int], stop_ids: Sequence[int]) -> dict[str, Value]:
    ids = {
        "bos": tokenizer.bos_id,
        "eos": stop_ids[0] if stop_ids else tokenizer.eos_id,
        "eot": stop_ids[1] if len(stop_ids) > 1 else None,
        "unknown": kinds.index(UNKNOWN) if UNKNOWN in kinds else None,
        "padding": tokenizer.pad_id,
    }
    found = {
        f"tokenizer.ggml.{role}_token_id": Value("u32", id)
        for role, id in ids.items()
        if id is not None and id < len(kinds)
    }
    return found | {
        "tokenizer.ggml.add_bos_token": Value("bool", tokenizer.adds_bos),
        "tokenizer.ggml.add_eos_token": Value("bool", False),
    }


def _steps(spec: Mapping[str, Any], place: str, inner: str) -> list[dict[str, Any]]:
    return steps_of(spec.get(place), inner)


def _has_model(folder: Path) -> bool:
    return (folder / "tokenizer.model").is_file()


def _raw(folder: Path, name: str) -> dict[str, Any]:
    fields: Fields = json_if_there(folder / f"{name}.json")
    return {key: fields.raw(key) for key in fields.names}


def _known(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}
