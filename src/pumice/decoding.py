"""Token ids to text, piece by piece: whole characters, and no farther than a stop string."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from pumice.errors import UserError
from pumice.sentencepiece import SPACE

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream:
    """Ids in, text out, never half a character. The work for a token does not grow with the text before it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._strip, self._run = decoder, decoder.strip, bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(decoder.errors)

    def push(self, id: int) -> str:
        """The text that this id completes, often nothing while a character is still under way."""
        piece = self._decoder.piece(id)
        if isinstance(piece, str):
            return self._stripped(self._ended() + piece) if piece else ""
        if self._decoder.whole_runs:
            self._run += piece
            return ""
        self._strip = 0  # sentencepiece takes a space mark from the front, not a space that is a byte
        return self._utf8.decode(piece).translate(_ESCAPED)

    def finish(self) -> str:
        """What is left; bytes that are no whole character as U+FFFD."""
        return self._stripped(self._ended())

    def _ended(self) -> str:
        """A run of bytes is over."""
        text = self._utf8.decode(b"", final=True).translate(_ESCAPED)
        run, self._run = self._run, bytearray()
        try:
            return text + run.decode()
        except UnicodeDecodeError:
            # The `tokenizers` library (ByteFallback) gives up a whole run of bytes for one that is wrong.
            return text + "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            text, self._strip = (text[1:], self._strip - 1) if text[0] == " " else (text, 0)
        return text


_ESCAPED = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")
"""What `surrogateescape` makes of wrong bytes, one each; no valid UTF-8 decodes to these."""


class Decoder:
    """What a token is in text, by the `decoder` of a tokenizer.json.

    Wrong bytes: `tokenizers` replaces a whole run of byte tokens, sentencepiece each byte, byte-level BPE each
    broken character.
    """

    def __init__(
        self, spec: Any, token_of: Callable[[int], str | None], skipped: Set[int], *, sentencepiece_strip: int | None
    ) -> None:
        """`skipped` ids have no text. `sentencepiece_strip`: the text comes as sentencepiece gives it, and so many
        spaces go from its front; None follows `spec`."""
        self._token_of, self._skipped = token_of, skipped
        flat = steps_of(spec, "decoders")
        steps = [step["type"] for step in flat]
        self._levels: Mapping[int, int] = {}
        match steps:
            case ["Replace", "ByteFallback", "Fuse", *rest] if rest in ([], ["Strip"]):
                strip = int(flat[3].get("start", 0)) if rest else 0
            case ["ByteLevel"]:
                strip, self._levels = 0, _byte_levels()
            case _:
                raise UserError(
                    f"the tokenizer decodes by {' + '.join(steps) or 'nothing'}, which pumice does not know",
                    hint="pumice reads Llama's tokenizers: byte fallback (Llama 1 and 2, Mistral, Yi) or ByteLevel (3)",
                )
        self.strip = strip if sentencepiece_strip is None else sentencepiece_strip
        self.whole_runs = not self._levels and sentencepiece_strip is None
        self.errors = "replace" if self._levels else "surrogateescape"

    def piece(self, id: int) -> str | bytes:
        """Text, or bytes that may be a part of a character; empty for special tokens and images."""
        token = self._token_of(id) if id >= 0 and id not in self._skipped else None
        if token is None:
            return ""
        if self._levels:
            codes = [self._levels.get(ord(character)) for character in token]
            return token.encode() if None in codes else bytes(code for code in codes if code is not None)
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ")


def steps_of(spec: Any, name: str) -> list[dict[str, Any]]:
    """One step, or a Sequence of them and of Sequences, as a list."""
    match spec:
        case None:
            return []
        case {"type": "Sequence"} if isinstance(spec.get(name), list):
            return [step for each in spec[name] for step in steps_of(each, name)]
        case {"type": str(kind)} if kind != "Sequence":
            return [spec]
    raise UserError(
        f"the tokenizer.json has a step that is none: {str(spec)[:80]}",
        hint="get tokenizer.json again from where the model came",
    )


def _byte_levels() -> dict[int, int]:
    """Character code -> byte of byte-level BPE (GPT-2, encoder.py): printable bytes are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + index: byte for index, byte in enumerate(others)}


class StopText:
    """Cuts an answer before the first stop string to be complete, however the text arrives in pieces. The work for a
    character grows with the number of stop strings, and not with their length."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Empty strings are no stops."""
        self._stops = [_Stop(each) for each in dict.fromkeys(stops) if each]
        self._held: deque[str] = deque()
        self._held_size = 0
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string was met; text that may become one is held back."""
        if self.stopped:
            return "", True
        before = self._held_size
        self._held.append(text)
        self._held_size += len(text)
        for end, character in enumerate(text if self._stops else "", before + 1):
            met = [stop.size for stop in self._stops if stop.push(character)]
            if met:
                shown, self.stopped = self._front(end - max(met)), True
                self._front(self._held_size)
                return shown, True
        return self._front(self._held_size - max((stop.begun for stop in self._stops), default=0)), False

    def finish(self) -> str:
        """What was held back and became no stop string."""
        return self._front(self._held_size)

    def _front(self, count: int) -> str:
        """The first characters of what is held back, which then are not any more."""
        self._held_size -= count
        taken = []
        while count:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
            taken.append(piece[:count])
            count -= len(taken[-1])
        return "".join(taken)


class _Stop:
    """A stop string, and how much of its beginning the text so far ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self._text, self.size, self.begun = text, len(text), 0
        self._borders = [0, 0]
        """Of so many first characters: the longest beginning, short of all, that is their end too. As far as needed."""

    def push(self, character: str) -> bool:
        """Whether it makes the stop string complete; after that nothing may be pushed."""
        self.begun = self._longer(self.begun, character)
        if self.begun == len(self._borders):
            self._borders.append(self._longer(self._borders[-1], character))
        return self.begun == self.size

    def _longer(self, begun: int, character: str) -> int:
        """How much of the beginning stands at the end when a character follows after so much of it."""
        while begun and self._text[begun] != character:
            begun = self._borders[begun]
        return begun + (self._text[begun] == character)
