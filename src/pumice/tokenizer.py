"""Text to token ids and back, from `tokenizer.json` or sentencepiece's `tokenizer.model`.

The `tokenizers` library does the pairing; what stands around it is decided here, because the references differ in it:
where a stretch of text gets a space in front, which words are special tokens, how bytes become characters again.
Text of a person is tokenised without special tokens, so no literal `</s>` in it can become one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tokenizers

from pumice import tokenizer_json
from pumice.decoding import Decoder, TextStream, steps_of
from pumice.errors import UserError
from pumice.prompt import IMAGE_MARK, SPECIAL_WORDS, Part
from pumice.sentencepiece import SPACE, PieceModel, read_model
from pumice.special_tokens import AddedWords, added_token, content_of, declared_tokens, flags, special_words
from pumice.tokenizer_json import LibraryErrors

LARGEST_FILE_BYTES = 128 << 20
"""Several times the largest tokenizer.json of a Llama."""

_NEVER_TEXT = frozenset({*SPECIAL_WORDS, IMAGE_MARK})
"""Not to be found in a person's text even where a vocabulary calls them ordinary."""


@dataclass(frozen=True)
class Encoded:
    """A prompt as ids. An image is `image_id` repeated, once a feature."""

    ids: list[int]
    learned: list[bool]
    """Per id: does training compute its loss here."""
    images: list[tuple[int, int]]
    """(start, length) of each image in `ids`."""


@dataclass(frozen=True)
class _Prefix:
    """Which stretches of text, cut at special tokens and images, get a space mark in front."""

    where: Literal["always", "chunk", "prompt", "never"]
    """All; the first after an image or at the start; the first of the prompt if nothing stands before it; none."""
    doubles: bool = True
    """Even where the text begins with a space itself."""

    def of(self, text: str, *, opens_prompt: bool, opens_chunk: bool) -> str:
        wanted = {"always": True, "chunk": opens_chunk, "prompt": opens_prompt, "never": False}[self.where]
        return SPACE if wanted and text and (self.doubles or text[0] not in (" ", SPACE)) else ""


@dataclass(frozen=True)
class _Sentencepiece:
    """What a tokenizer.model asks for and a tokenizer.json cannot say."""

    prefix: _Prefix
    strip: int
    """How many spaces go from the front of a decoded text."""
    symbols: tuple[str, ...]
    """Words that are found in a text before anything else, without a cut in it."""
    silent: frozenset[int]


@dataclass
class _Section:
    """A stretch of a prompt that is tokenised as one; `learned` holds a flag for each character."""

    kind: Literal["text", "special", "image"]
    text: str
    learned: list[bool] = field(default_factory=list)


class Tokenizer:
    """A vocabulary and its rules. Made by `from_folder`, `from_json` or `from_sentencepiece`."""

    def __init__(
        self, text: str, spec: Mapping[str, Any], config: Mapping[str, Any], *, model: _Sentencepiece | None = None
    ) -> None:
        """`text` is a tokenizer.json, `spec` its content; `model` holds what such a file cannot say. Use the class
        methods instead."""
        self._library = tokenizer_json.library(text, spec)
        _add_missing(self._library, config)
        added = self._library.get_added_tokens_decoder()
        prefix, normalizer, pre_tokenizer = _prefix(spec)
        self._prefix = model.prefix if model else prefix
        self._text = _bare(self._library, normalizer, pre_tokenizer)
        if model:
            self._text.add_tokens([tokenizers.AddedToken(word, normalized=True) for word in model.symbols])
        special = special_words(config) | {token.content for token in added.values() if token.special}
        self._all_words = AddedWords(added.values())
        self._plain_words = AddedWords(token for token in added.values() if token.content not in special | _NEVER_TEXT)
        skipped = {id for word in special if (id := self.id_of(word)) is not None}
        skipped |= model.silent if model else set()
        if (image := self.id_of(IMAGE_MARK)) is not None:
            skipped.add(image)
        self._reserved = frozenset(skipped - {self.id_of(str(spec["model"].get("unk_token")))})
        self._never_text = _NEVER_TEXT | {str(spec["model"].get("unk_token"))}
        strip = model.strip if model else None
        self._decoder = Decoder(spec.get("decoder"), self._library.id_to_token, skipped, sentencepiece_strip=strip)
        self._front = _front(spec, self._library)
        self.vocab_size = max(itertools.chain(spec["model"]["vocab"].values(), added)) + 1
        self.adds_bos = bool(self._front)
        self.bos_id = self._front[0] if self._front else self._declared(config, "bos_token")
        self.eos_id = self._declared(config, "eos_token")
        pad = content_of(config.get("pad_token"))
        self.pad_id = None if pad is None else self.id_of(pad)

    @classmethod
    def from_json(cls, source: Path | str | Mapping[str, Any], *, config: Mapping[str, Any] | None = None) -> Tokenizer:
        """A tokenizer.json as it stands, as AutoTokenizer uses it: a file, a text that begins with `{`, or its content.

        `config` is tokenizer_config.json. Raises UserError when the file is damaged or of a kind that is not supported.
        """
        if isinstance(source, Mapping):
            return cls(json.dumps(source), source, config or {})
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = str(source) if is_text else _read(Path(source)).decode(errors="replace")
        return cls(text, tokenizer_json.content(text), config or {})

    @classmethod
    def from_sentencepiece(
        cls, path: Path | str, *, config: Mapping[str, Any] | None = None, added: Mapping[str, int] | None = None
    ) -> Tokenizer:
        """A tokenizer.model (BPE), as Transformers' slow LlamaTokenizer uses it; `added` is added_tokens.json.

        `config["legacy"]` False: only a chunk's first text gets a space in front (transformers 4.37, LlamaTokenizer).
        Raises UserError when the file is damaged, or a unigram model, or changes text before it splits it.
        """
        return cls.from_pieces(read_model(_read(Path(path)), str(path)), config=config, added=added)

    @classmethod
    def from_pieces(
        cls, proto: PieceModel, *, config: Mapping[str, Any] | None = None, added: Mapping[str, int] | None = None
    ) -> Tokenizer:
        """As `from_sentencepiece`, from pieces that have been read, whatever file they stood in."""
        config = config or {}
        marks = [word for word in proto.symbols if word in _NEVER_TEXT]
        symbols = tuple(word for word in proto.symbols if word not in _NEVER_TEXT)
        own = {"bos_token": proto.bos, "eos_token": proto.eos, "unk_token": proto.unk}
        config = {**own, **{key: value for key, value in config.items() if value is not None}}
        if config.get("legacy") is False:
            model = _Sentencepiece(_Prefix("chunk"), 1, symbols, proto.silent)
        else:
            # Two marks go in decoding: Transformers takes one away, and sentencepiece another.
            where: Literal["always", "never"] = "always" if proto.dummy_prefix else "never"
            model = _Sentencepiece(_Prefix(where), 2, symbols, proto.silent)
        bos = content_of(config["bos_token"]) if config.get("add_bos_token", True) else None
        ids = {piece.text: id for id, piece in enumerate(proto.pieces)}
        names = [content_of(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")]
        tokens = {name: added_token(ids[name], name) for name in (*marks, *names) if name in ids}
        tokens |= {content: added_token(id, content) for content, id in (added or {}).items()}
        tokens |= {token["content"]: token for token in declared_tokens(config)}
        spec = proto.as_json(list(tokens.values()), bos)
        return cls(json.dumps(spec), spec, config, model=model)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint: tokenizer.json if it is there, otherwise tokenizer.model."""
        folder = Path(folder)
        named, config = (_read_object(folder / f"{name}.json") for name in ("special_tokens_map", "tokenizer_config"))
        config = {**named, **{key: value for key, value in config.items() if value is not None}}
        if (folder / "tokenizer.json").exists():
            return cls.from_json(folder / "tokenizer.json", config=config)
        if (folder / "tokenizer.model").exists():
            added = _read_object(folder / "added_tokens.json")
            return cls.from_sentencepiece(folder / "tokenizer.model", config=config, added=added)
        raise UserError(
            f"there is no tokenizer in {folder}",
            hint="a checkpoint holds tokenizer.json or tokenizer.model: copy it there from where the model came",
        )

    def id_of(self, token: str) -> int | None:
        """The id of a token as it is stored: `▁What`, `</s>`."""
        return self._library.token_to_id(token)

    def token_of(self, id: int) -> str:
        """The token of an id as it is stored; empty for an id outside the vocabulary."""
        return (self._library.id_to_token(id) or "") if 0 <= id < self.vocab_size else ""

    def encode(self, parts: Sequence[Part], image_tokens: Sequence[int], *, image_id: int) -> Encoded:
        """The ids of a rendered prompt; `image_tokens[i]` is how many features image i has.

        A BOS that the template writes is not doubled. A template's special word that the vocabulary does not have is
        tokenised as text, as the references do it. Raises UserError when pictures and `image_tokens` differ in number.
        """
        sections = self._sections(parts, self._plain_words)
        begins = bool(sections) and sections[0].kind == "special" and self.id_of(sections[0].text) == self.bos_id
        return self._encoded(sections, image_tokens, image_id, front=[] if begins else self._front)

    def encode_raw(self, parts: Sequence[Part], image_tokens: Sequence[int], *, image_id: int) -> Encoded:
        """As `encode`, for a prompt that stands as it is: special tokens written in its text count, and BOS is put in
        front even of a written one, as both references do."""
        return self._encoded(self._sections(parts, self._all_words), image_tokens, image_id, front=self._front)

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens and images. What is no UTF-8 becomes U+FFFD as the reference does it."""
        stream = self.stream()
        return "".join([stream.push(id) for id in ids] + [stream.finish()])

    def bytes_of(self, id: int) -> bytes:
        """What an id adds to a text in UTF-8, often a part of a character; nothing for images, special tokens and the
        words that only templates write."""
        if self.token_of(id) in self._never_text:
            return b""
        piece = self._decoder.piece(id)
        return piece if isinstance(piece, bytes) else piece.encode()

    def continued(self, text: str) -> list[int]:
        """The ids of a text inside an answer: nothing in front, no special token in it."""
        return self._text.encode(text, add_special_tokens=False).ids

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time; its pieces together are what `decode` gives."""
        return TextStream(self._decoder)

    def _declared(self, config: Mapping[str, Any], name: str) -> int | None:
        token = content_of(config.get(name))
        if token is not None and self.id_of(token) is None:
            raise UserError(
                f"the tokenizer's {name} is {token!r}, which its vocabulary does not have",
                hint="tokenizer_config.json and the vocabulary beside it must come from the same checkpoint",
            )
        return None if token is None else self.id_of(token)

    def _sections(self, parts: Sequence[Part], words: AddedWords) -> list[_Section]:
        """Parts cut at the added tokens of `words`, then neighbouring texts joined: they are tokenised together."""
        sections: list[_Section] = []
        for part in parts:
            own = "text" if part.kind == "special" and self.id_of(part.text) is None else part.kind
            for kind, text in words.cut(part.text) if part.kind == "text" else [(own, part.text)]:
                if kind == "text" and sections and sections[-1].kind == "special":
                    text = self._all_words.behind(sections[-1].text, text)
                    if not text:
                        continue
                if kind == "text" and sections and sections[-1].kind == "text":
                    sections[-1].text += text
                else:
                    sections.append(_Section(kind, text))
                sections[-1].learned += [part.learned] * max(1, len(text))
        return sections

    def _encoded(
        self, sections: Sequence[_Section], image_tokens: Sequence[int], image_id: int, *, front: Sequence[int]
    ) -> Encoded:
        images = sum(section.kind == "image" for section in sections)
        if images != len(image_tokens):
            raise UserError(
                f"the prompt has {images} images, and {len(image_tokens)} came with it",
                hint="give one image for each place in the prompt, in their order",
            )
        result, lengths = Encoded(list(front), [False] * len(front), []), iter(image_tokens)
        opens_chunk = True
        for index, section in enumerate(sections):
            if section.kind == "image":
                result.images.append((len(result.ids), next(lengths)))
                ids, learned = [image_id] * result.images[-1][1], [False] * result.images[-1][1]
            elif section.kind == "special":
                ids, learned = [self._known(section.text)], section.learned[:1]
            else:
                prefix = self._prefix.of(section.text, opens_prompt=not index, opens_chunk=opens_chunk)
                ids, learned = self._tokenised(section, prefix)
            opens_chunk = section.kind == "image"
            result.ids.extend(ids)
            result.learned.extend(learned)
        return result

    def _known(self, token: str) -> int:
        id = self.id_of(token)
        assert id is not None, token
        return id

    def _tokenised(self, section: _Section, prefix: str) -> tuple[list[int], list[bool]]:
        """A token is learned when its first character is; a space mark put in front belongs to the first one."""
        try:
            with LibraryErrors(tokenizer_json.AGAIN):
                found = self._text.encode(prefix + section.text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as problem:
            raise UserError(
                "the text holds half of a character pair (a lone surrogate), which is not Unicode",
                hint="send the text as UTF-8",
            ) from problem
        if not self._reserved.isdisjoint(found.ids):
            raise UserError(
                "the vocabulary spells a special token out of ordinary text, so a person's words could become one",
                hint="get the tokenizer again from where the model came",
            )
        starts = [max(0, start - len(prefix)) for start, _ in found.offsets]
        return found.ids, [section.learned[start] for start in starts]


def _prefix(spec: Mapping[str, Any]) -> tuple[_Prefix, Any, Any]:
    """Where a space is put in front of a text, and the normaliser and the pre-tokeniser without it."""
    normalizer: Any = spec.get("normalizer")
    pre_tokenizer: Any = spec.get("pre_tokenizer")
    first, *rest = steps_of(normalizer, "normalizers") or [{}]
    metaspace = [step for step in steps_of(pre_tokenizer, "pretokenizers") if step.get("type") == "Metaspace"]
    if first.get("type") == "Prepend" and not metaspace and first.get("prepend") == SPACE:
        return _Prefix("always"), {"type": "Sequence", "normalizers": rest}, pre_tokenizer
    if any(step.get("type") == "Prepend" for step in (first, *rest)) or metaspace not in ([], [pre_tokenizer]):
        raise UserError(
            "the tokenizer.json puts spaces in front of a text in a way that pumice does not know",
            hint="pumice knows a first Prepend of a space mark, or a Metaspace that stands alone",
        )
    if not metaspace:
        return _Prefix("never"), normalizer, pre_tokenizer
    scheme = pre_tokenizer.get("prepend_scheme", "always" if pre_tokenizer.get("add_prefix_space", True) else "never")
    where: Literal["prompt", "always", "never"] = "prompt" if scheme == "first" else scheme
    return _Prefix(where, doubles=False), normalizer, {**pre_tokenizer, "prepend_scheme": "never"}


def _bare(library: tokenizers.Tokenizer, normalizer: Any, pre_tokenizer: Any) -> tokenizers.Tokenizer:
    """The same vocabulary without added tokens, and without BOS."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    shell = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": empty})
    )
    shell.model = library.model
    return shell


def _front(spec: Mapping[str, Any], library: tokenizers.Tokenizer) -> list[int]:
    """What stands in front of every prompt: BOS or nothing."""
    steps = [step for step in steps_of(spec.get("post_processor"), "processors") if step["type"] != "ByteLevel"]
    match [(step["type"], step.get("single")) for step in steps]:
        case [] | [("TemplateProcessing", [{"Sequence": _}])]:
            return []
        case [("TemplateProcessing", [{"SpecialToken": {"id": str(token)}}, {"Sequence": _}])]:
            id = library.token_to_id(token)
            if id is not None:
                return [id]
    raise UserError(
        f"the tokenizer.json wraps a prompt in tokens by {steps}; pumice knows one BOS in front, or nothing",
        hint="a token after a prompt would end it before the answer: set add_eos_token to false",
    )


def _add_missing(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json names, as Transformers adds them."""
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    for token in declared_tokens(config):
        if token["content"] not in known:
            library.add_tokens([tokenizers.AddedToken(token["content"], **flags(token))])
        if library.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"tokenizer_config.json gives {token['content']!r} the id {token['id']}, the vocabulary gives it "
                f"{library.token_to_id(token['content'])}",
                hint="tokenizer_config.json and the vocabulary beside it must come from the same checkpoint",
            )


def _read(path: Path) -> bytes:
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}", hint="name a tokenizer.json or a tokenizer.model")
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, too many for a tokenizer",
            hint=f"the largest that pumice reads has {LARGEST_FILE_BYTES}",
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="check who may read it") from error


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that may be absent."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not JSON: {problem}", hint="get it again from where the model came") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object", hint="get it again from where the model came")
    return content
