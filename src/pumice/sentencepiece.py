"""sentencepiece's `tokenizer.model`, read as data: a protobuf message, without protobuf and without sentencepiece.

Only what the Llama family has: BPE, text left as it is but for spaces. The field numbers are those of sentencepiece's
sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pumice.errors import UserError

SPACE = "\u2581"
"""The mark that stands for a space in a piece."""

MAX_PIECE_CHARACTERS = 1024
"""The work of finding merges grows with the square of it; trainers end at 16."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_Value = int | bytes


class Piece(NamedTuple):
    """One row of the vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """A BPE vocabulary: the row of a piece is its id."""

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    dummy_prefix: bool
    """A text gets a space in front."""
    unk: str
    bos: str | None
    eos: str | None

    @property
    def symbols(self) -> tuple[str, ...]:
        """Pieces that are found in a text before anything else, whole."""
        return tuple(piece.text for piece in self.pieces if piece.kind == USER_DEFINED)

    @property
    def silent(self) -> frozenset[int]:
        """Ids without text of their own."""
        return frozenset(id for id, piece in enumerate(self.pieces) if piece.kind in (UNKNOWN, CONTROL))

    def merges(self) -> list[list[str]]:
        """Pairs in the order in which they are joined: the better the piece they give, the earlier.

        sentencepiece joins the best-scored pair first, the left one of equals; of two ways to the same piece the one
        with the longer left half is reached first.
        """
        scores = {piece.text: piece.score for piece in self.pieces if piece.kind == NORMAL}
        pairs = [
            (-score, -cut, place, text)
            for place, (text, score) in enumerate(scores.items())
            for cut in range(1, len(text))
            if text[:cut] in scores and text[cut:] in scores
        ]
        return [[text[:-cut], text[-cut:]] for _, cut, _, text in sorted(pairs)]

    def as_json(self, added: Sequence[dict[str, Any]], bos: str | None) -> dict[str, Any]:
        """What a tokenizer.json says with the same pieces, `added` tokens beside them, and `bos` in front of a text.

        Nothing in it puts a space in front of a text: `Tokenizer` does.
        """
        vocab = {piece.text: id for id, piece in enumerate(self.pieces)}
        rows = dict(enumerate(piece.text for piece in self.pieces))
        for token in added:
            id, content = token["id"], token["content"]
            if vocab.setdefault(content, id) != id or rows.setdefault(id, content) != content:
                raise UserError(
                    f"the added token {content!r} has id {id}, the tokenizer.model has {content!r} at "
                    f"{vocab[content]} and {rows.get(id)!r} at {id}",
                    hint="added_tokens.json, tokenizer_config.json and tokenizer.model must come from one checkpoint",
                )
        if bos is not None and bos not in vocab:
            raise UserError(
                f"the tokenizer's bos_token is {bos!r}, which its vocabulary does not have",
                hint="tokenizer_config.json and the vocabulary beside it must come from the same checkpoint",
            )
        front = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos is not None else []
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        model = {"type": "BPE", "vocab": vocab, "merges": self.merges(), "unk_token": self.unk, "fuse_unk": True}
        return {
            "version": "1.0",
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": {"type": "Sequence", "normalizers": [replace]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [*front, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}} if bos else {},
            },
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {**model, "byte_fallback": self.byte_fallback},
        }


def read_model(data: bytes, name: str) -> PieceModel:
    """A ModelProto. Raises UserError with `name` for what is no such message, or a kind that is not supported."""
    try:
        return _model(data)
    except (ValueError, TypeError, struct.error) as problem:
        raise UserError(
            f"{name} is not a sentencepiece model that pumice reads: {problem}",
            hint="get tokenizer.model again from where the model came, or a tokenizer.json beside it",
        ) from problem


def _model(data: bytes) -> PieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, _Value] = {}
    normalizer: dict[int, _Value] = {}
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(_bytes(value)))
        elif field == 2:
            trainer.update(_fields(_bytes(value)))
        elif field == 3:
            normalizer.update(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it has no pieces")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ValueError("a piece occurs twice")
    kind = trainer.get(3, 1)
    if kind != 2:
        raise ValueError(f"its model type is {_MODELS.get(_int(kind), kind)!r}, and only 'bpe' is supported")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        rules = _bytes(normalizer.get(1, b"")).decode(errors="replace")
        raise ValueError(
            f"its normaliser {rules!r} changes the text; only 'identity' with all spaces kept is supported"
        )
    if any(piece.kind == UNUSED for piece in pieces):
        raise ValueError("it has pieces of type UNUSED")

    def named(field: int, otherwise: int) -> str | None:
        id = _int(trainer.get(field, otherwise))
        return pieces[id].text if id < len(pieces) else None  # -1 is written as 2**64 - 1: there is none

    unknown = [piece.text for piece in pieces if piece.kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} pieces for unknown text instead of one")
    fallback, prefix = bool(trainer.get(35, 0)), bool(normalizer.get(3, 1))
    return PieceModel(tuple(pieces), fallback, prefix, unknown[0], named(41, 1), named(42, 2))


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    kind = _int(fields.get(3, NORMAL))
    if kind not in range(NORMAL, BYTE + 1):
        raise ValueError(f"a piece has the unknown type {kind}")
    if score != score:
        raise ValueError("a piece has a score that is no number")
    text = _bytes(fields.get(1, b"")).decode()
    if len(text) > MAX_PIECE_CHARACTERS:
        raise ValueError(f"a piece has {len(text)} characters")
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """The fields of a message: a varint as int, everything else as its bytes. Raises ValueError where it ends early."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field at byte {at} says it has {size} bytes, and {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends in the middle of a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError(f"a number before byte {at} is too long")


def _bytes(value: _Value) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"the number {value} stands where bytes are expected")
    return value


def _int(value: _Value) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes stand where a number is expected")
    return value
