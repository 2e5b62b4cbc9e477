"""What a GGUF file says of itself, read without its weights and without PyTorch: for lists and for `show`.

Every length is checked against the bytes that are left before anything is made of it. Whether a file's tensors are what
it says is not looked at here: that is `checkpoints.gguf_file`'s, which reads models. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pumice.errors import UserError, shortened
from pumice.store.blobs import open_regular

FILE_TYPES: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
})  # fmt: skip
"""Of general.file_type: llama.cpp's numbers."""
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_TEXT_BYTES, _MOST_RANK = 2**16, 2**16, 2**24, 8
SHORT = 5
"""Arrays of more values are left out of what is told, as in Ollama's `show`."""


@dataclass(frozen=True)
class Said:
    """The metadata by key, and each tensor's name, type and shape, in the file's order of sizes."""

    values: Mapping[str, object]
    """An array that was left out is None."""
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(shape) for _, _, shape in self.tensors)

    @property
    def architecture(self) -> str:
        """Empty where the file does not say."""
        found = self.values.get("general.architecture")
        return found if isinstance(found, str) else ""

    @property
    def file_type(self) -> str:
        """`Q4_K_M`, `F16`…; "unknown" where the file does not say, as in Ollama."""
        found = self.values.get("general.file_type")
        return FILE_TYPES.get(found, "unknown") if isinstance(found, int) else "unknown"

    @property
    def is_projector(self) -> bool:
        """Is this a model's eyes (mmproj)? By general.type, or by what there is and what not; Ollama's rule."""
        blocks, kind = self.values.get(f"{self.architecture}.block_count"), self.values.get("general.type")
        seeing = any(
            self.values.get(f"{self.architecture}.{key}")
            for key in ("has_vision_encoder", "has_audio_encoder", "vision.block_count")
        )
        return kind in ("projector", "mmproj") or (seeing and not blocks)


def said(path: Path, name: str, *, whole: bool = False) -> Said:
    """What a file says; `name` is what errors call it. whole: with long arrays, such as a vocabulary.

    Raises UserError for what is no GGUF file, or says more than its bytes can hold.
    """
    try:
        with open_regular(path) as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
            return _Cursor(data, name).said(whole)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{name} cannot be read", hint="check that it is a whole file, and who may read it") from error


class _Cursor:
    """A place in the file. Each method reads one thing and moves behind it."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data, self._name, self._at = data, name, 0

    def said(self, whole: bool) -> Said:
        if self._data[:4] != b"GGUF":
            raise UserError("supplied file was not in GGUF format", hint=f"look at {self._name}")
        self._at = 4
        version, tensors, keys = self._one("I"), self._one("Q"), self._one("Q")
        if version not in (2, 3) or keys > _MOST_KEYS or tensors > _MOST_TENSORS:
            raise self._broken(f"version {version}, {tensors} tensors and {keys} keys")
        values = {self._text(): self._value(whole) for _ in range(keys)}
        return Said(values, tuple(self._tensor() for _ in range(tensors)))

    def _value(self, whole: bool) -> object:
        code = self._one("I")
        if code == _ARRAY:
            return self._array(whole)
        return self._text() if code == _STRING else self._one(self._letter(code))

    def _array(self, whole: bool) -> list[object] | None:
        code, count = self._one("I"), self._one("Q")
        letter = "Q" if code == _STRING else self._letter(code)
        if count * struct.calcsize(letter) > len(self._data) - self._at:
            raise self._broken(f"an array of {count} values")
        told = whole or count <= SHORT
        if code == _STRING:
            texts = [self._text() if told else self._skipped() for _ in range(count)]
            return list(texts) if told else None
        start = self._moved(count * struct.calcsize(letter))
        return list(struct.unpack_from(f"<{count}{letter}", self._data, start)) if told else None

    def _tensor(self) -> tuple[str, str, tuple[int, ...]]:
        name, rank = self._text(), self._one("I")
        if rank > _MOST_RANK:
            raise self._broken(f"a tensor of {rank} dimensions")
        shape = tuple(self._one("Q") for _ in range(rank))
        code, _ = self._one("I"), self._one("Q")
        return name, _TENSOR_TYPES.get(code, f"unknown type {code}"), shape

    def _text(self) -> str:
        length = self._one("Q")
        if length > _MOST_TEXT_BYTES:
            raise self._broken(f"a text of {length} bytes")
        start = self._moved(length)
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def _skipped(self) -> str:
        self._moved(self._one("Q"))
        return ""

    def _one(self, letter: str) -> int:
        start = self._moved(struct.calcsize(letter))
        number: int = struct.unpack_from(f"<{letter}", self._data, start)[0]
        return number

    def _moved(self, length: int) -> int:
        """Where the next so many bytes begin. Raises UserError where there are fewer."""
        start = self._at
        if length > len(self._data) - start:
            raise self._broken(f"{length} bytes behind byte {start}")
        self._at = start + length
        return start

    def _letter(self, code: int) -> str:
        if code not in _NUMBERS:
            raise self._broken(f"a value of type {code}")
        return _NUMBERS[code]

    def _broken(self, claim: str) -> UserError:
        return UserError(
            f"{shortened(self._name)} is no GGUF file that can be read: it claims {claim}",
            hint="the file is damaged; get it again",
        )
