"""GGUF's container: typed metadata and tensors, read within bounds and written whole.

Every length is checked against the bytes that are left before anything is made of it, so a reader's memory is a small
multiple of the metadata, whatever a file claims. Tensors are views of the mapped file.
Format: ggml's docs/gguf.md; where it is silent, what ggml's own reader accepts (gguf.cpp).
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pumice import quant
from pumice.checkpoints.fields import Fields, shown
from pumice.checkpoints.mapped import MappedFile
from pumice.checkpoints.tensors import MAX_TENSORS, Entry, refuse_pointer
from pumice.checkpoints.whole import whole
from pumice.errors import UserError
from pumice.quant import Format, QTensor

MAGIC = b"GGUF"
VERSION = 3
VERSIONS = (2, 3)
MAX_KEYS = 2**16
MAX_ITEMS = 2**24
"""Of one array: sixty times the merges of Llama 3."""
MAX_STRING_BYTES = 2**24
MAX_NAME_BYTES = 63
MAX_SHARDS = 1000
MAX_ALIGNMENT = 2**16
DEFAULT_ALIGNMENT = 32

_SCALARS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_STRING, _ARRAY = 8, 9
_CODES = {name: code for code, (name, _) in _SCALARS.items()} | {"string": _STRING}
_LETTERS = dict(_SCALARS.values())

_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class Value:
    """A metadata value with its type: `u32`, `f32`, `bool`, `string`…; an array is a list of values of that type."""

    kind: str
    value: Any

    @property
    def is_array(self) -> bool:
        return isinstance(self.value, list)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: what it is, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch's order: the reverse of the file's."""
    format: Format
    file: MappedFile
    start: int

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.shape, self.format)

    def entry(self, load: Callable[[], Tensor | QTensor] | None = None) -> Entry:
        """The tensor as a checkpoint holds it; `load` gives its values in another order."""
        blocks = self.format if self.format.dtype is None else None
        dtype = self.format.dtype or torch.float32
        return Entry(self.name, self.shape, dtype, load or self.load, blocks, give_back=self.give_back)

    def give_back(self) -> None:
        """The pages of the values leave memory; those at its ends stay for its neighbours."""
        self.file.give_back(self.start, self.nbytes)

    def load(self) -> Tensor | QTensor:
        """The values: a view of the file; a matrix in blocks stays in them, whatever else is in blocks is unpacked."""
        raw = self.file.bytes[self.start : self.start + self.nbytes]
        if self.format.dtype is not None:
            # A file may align its tensors to less than its numbers need.
            raw = raw if self.start % self.format.dtype.itemsize == 0 else raw.clone()
            return raw.view(self.format.dtype).view(self.shape)
        blocks = QTensor(raw.view(math.prod(self.shape[:-1]), -1), self.format)
        return blocks if len(self.shape) == 2 else blocks.dense().view(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, all its shards together: metadata by key, tensors by name."""

    path: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, Stored]

    @property
    def fields(self) -> Fields:
        """The metadata without its types."""
        return Fields({key: each.value for key, each in self.values.items()}, str(self.path))


def stored_bytes(shape: Sequence[int], format: Format) -> int:
    return math.prod(shape[:-1]) * format.row_bytes(shape[-1])


def is_gguf(path: Path) -> bool:
    """Does the file say that it is a GGUF, or its name?"""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


def architecture(path: Path) -> str | None:
    """What a file says it is, without reading further than that. None for what is no GGUF, or too damaged to say."""
    if not is_gguf(path) or path.stat().st_size < 24:
        return None
    with suppress(UserError):
        for key, value, _ in metadata(path):
            if key == "general.architecture" and value.kind == "string" and not value.is_array:
                return str(value.value)
    return None


def metadata(path: Path) -> Iterator[tuple[str, Value, int]]:
    """Key after key of one file, its value and the byte behind it, reading no further than is asked for."""
    at = _Cursor(path, MappedFile(path, path.stat().st_size).memory)
    _, keys = at.header()
    for _ in range(keys):
        key = at.string("a key")
        yield key, at.value(key), at.position


def open_gguf(path: Path) -> GgufFile:
    """A file, or all files of a split one (`NAME-00001-of-00003.gguf`: any of them names all).

    Raises UserError, with the rule that is broken: no GGUF, a version or byte order that is not read, a length beyond
    the file, metadata or tensors that contradict each other; a shard that is missing or of another file.
    """
    found = _open_one(path)
    if "split.count" not in found.values or found.fields.whole("split.count", most=MAX_SHARDS) == 1:
        return found
    return _joined(path, found.fields.whole("split.count", most=MAX_SHARDS))


def _joined(path: Path, count: int) -> GgufFile:
    name = _SHARD.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise UserError(
            f"{path} is one of {count} files of a split model, and its name does not say which",
            hint=f"give the files their names back: NAME-00001-of-{count:05}.gguf and so on",
        )
    tensors: dict[str, Stored] = {}
    shards = []
    for number in range(count):
        shard = _open_one(path.with_name(f"{name['prefix']}-{number + 1:05}-of-{count:05}.gguf"))
        fields = shard.fields
        if fields.whole("split.no", least=0) != number or fields.whole("split.count") != count:
            raise fields.wrong("split.no", f"{number} of {count}, as its name has it")
        if twice := tensors.keys() & shard.tensors.keys():
            raise UserError(f"{shard.path} holds {shown(min(twice))} a second time", hint="get the shards again")
        tensors |= shard.tensors
        shards.append(shard)
    total = shards[0].fields.whole("split.tensors.count", least=0)
    if total != len(tensors):
        raise UserError(
            f"{path}: the split model has {total} tensors by its metadata, its {count} files hold {len(tensors)}",
            hint="the files belong to different models; get them again",
        )
    values = {key: each for key, each in shards[0].values.items() if not key.startswith("split.")}
    return GgufFile(path, values, tensors)


# --- reading ----------------------------------------------------------------------------------------------------------


def _open_one(path: Path) -> GgufFile:
    if not path.is_file():
        raise UserError(f"{path} is missing, or is no regular file", hint="the model is incomplete; get it again")
    refuse_pointer(path)
    size = path.stat().st_size
    if size < 24:
        raise _broken(path, f"it has {size} bytes, fewer than its header")
    mapped = MappedFile(path, size)
    at = _Cursor(path, mapped.memory)
    tensors, keys = at.header()
    values: dict[str, Value] = {}
    for _ in range(keys):
        key = at.string("a key")
        if not key:
            at.broken("a key is empty")
        if key in values:
            at.broken(f"the key {shown(key)} stands twice")
        values[key] = at.value(key)
    alignment = _alignment(at, values)
    infos = [at.tensor_info() for _ in range(tensors)]
    return GgufFile(path, values, _placed(at, mapped, infos, alignment))


def _alignment(at: _Cursor, values: Mapping[str, Value]) -> int:
    value = values.get("general.alignment", Value("u32", DEFAULT_ALIGNMENT))
    good = value.kind == "u32" and not value.is_array and 0 < value.value <= MAX_ALIGNMENT
    if not good or value.value & (value.value - 1):
        at.broken(f"general.alignment is {shown(value.value)} ({value.kind}), not a power of two up to {MAX_ALIGNMENT}")
    return int(value.value)


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int


def _placed(at: _Cursor, mapped: MappedFile, infos: list[_Info], alignment: int) -> dict[str, Stored]:
    """The tensors where they lie: each begins where the one before it ends, padded, as ggml asks for."""
    start = _padded(at.position, alignment)
    expected = 0
    placed: dict[str, Stored] = {}
    for info in infos:
        if info.name in placed:
            at.broken(f"the tensor {shown(info.name)} stands twice")
        if info.offset != expected:
            at.broken(f"the tensor {shown(info.name)} begins at {info.offset}, where {expected} is expected")
        stored = Stored(info.name, info.shape, info.format, mapped, start + info.offset)
        if stored.start + stored.nbytes > mapped.size:
            at.broken(f"the tensor {shown(info.name)} ends at {stored.start + stored.nbytes} of {mapped.size} bytes")
        placed[info.name] = stored
        expected += _padded(stored.nbytes, alignment)
    return placed


def _padded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


class _Cursor:
    """A place in the metadata. Each method reads one thing and moves behind it, or says which rule the file breaks."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self._path, self._data, self.position = path, data, 0

    def broken(self, rule: str) -> NoReturn:
        raise _broken(self._path, rule)

    def header(self) -> tuple[int, int]:
        """How many tensors, how many keys."""
        if self._take(4, "its magic") != MAGIC:
            self.broken(f"it begins with {bytes(self._data[:4])!r}, not with {MAGIC!r}")
        version = self._number("I", "its version")
        if version and version & 0xFFFF == 0:
            self.broken("it is big-endian; pumice reads the little-endian files that nearly everyone has")
        if version not in VERSIONS:
            self.broken(f"it is of version {version}; pumice reads {' and '.join(map(str, VERSIONS))}")
        tensors, keys = self._number("Q", "the number of tensors"), self._number("Q", "the number of keys")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            self.broken(f"it claims {tensors} tensors and {keys} keys; {MAX_TENSORS} and {MAX_KEYS} are the most")
        return tensors, keys

    def string(self, what: str) -> str:
        """Bytes that are no UTF-8 come as lone surrogates, so that they can be written back as they were."""
        length = self._number("Q", f"the length of {what}")
        if length > MAX_STRING_BYTES:
            self.broken(f"{what} claims {length} bytes; {MAX_STRING_BYTES} are the most")
        return self._take(length, what).decode("utf-8", errors="surrogateescape")

    def value(self, key: str) -> Value:
        code = self._number("I", f"the type of {shown(key)}")
        if code != _ARRAY:
            return Value(self._kind(code, key), self._scalars(code, 1, key)[0])
        code, count = self._number("I", f"the type of {shown(key)}"), self._number("Q", f"the length of {shown(key)}")
        kind = self._kind(code, key)
        least = 8 if code == _STRING else struct.calcsize(_SCALARS[code][1])
        if count > MAX_ITEMS or count * least > len(self._data) - self.position:
            self.broken(f"{shown(key)} claims {count} values, more than the rest of the file holds")
        return Value(kind, self._scalars(code, count, key))

    def tensor_info(self) -> _Info:
        name = self.string("the name of a tensor")
        if not name or len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES or "\0" in name:
            self.broken(f"the name of a tensor is {shown(name)}, not 1 to {MAX_NAME_BYTES} bytes without a zero")
        rank = self._number("I", f"the rank of {shown(name)}")
        if not 1 <= rank <= 4:
            self.broken(f"the tensor {shown(name)} has {rank} dimensions, not 1 to 4")
        sizes = struct.unpack(f"<{rank}q", self._take(8 * rank, f"the shape of {shown(name)}"))
        if min(sizes) < 1 or math.prod(sizes) > 2**48:
            self.broken(f"the tensor {shown(name)} is of shape {list(sizes)}, which no tensor has")
        code, offset = self._number("I", f"the type of {shown(name)}"), self._number("Q", f"the place of {shown(name)}")
        if code not in quant.BY_ID:
            known = ", ".join(quant.FORMATS)
            self.broken(f"the tensor {shown(name)} is of ggml's type {code}; pumice reads {known}")
        format = quant.BY_ID[code]
        if sizes[0] % format.block_weights:
            self.broken(
                f"the rows of {shown(name)} have {sizes[0]} weights, not whole blocks of {format.block_weights}"
            )
        return _Info(name, sizes[::-1], format, offset)

    def _kind(self, code: int, key: str) -> str:
        if code == _ARRAY:
            self.broken(f"{shown(key)} is an array of arrays, which pumice does not read")
        if code != _STRING and code not in _SCALARS:
            self.broken(f"{shown(key)} is of the unknown type {code}")
        return "string" if code == _STRING else _SCALARS[code][0]

    def _scalars(self, code: int, count: int, key: str) -> list[Any]:
        what = f"the value of {shown(key)}"
        if code == _STRING:
            return self._strings(count, what)
        letter = _SCALARS[code][1]
        raw = self._take(count * struct.calcsize(letter), what)
        if letter == "?" and not set(raw) <= {0, 1}:
            self.broken(f"{shown(key)} is neither true nor false")
        return list(struct.unpack(f"<{count}{letter}", raw))

    def _strings(self, count: int, what: str) -> list[str]:
        """A vocabulary has hundreds of thousands: read in a loop of its own, with the checks of `string`."""
        data, at, size = self._data, self.position, len(self._data)
        length_at, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += length_at(data, at)[0]
            if end > size or end - at - 8 > MAX_STRING_BYTES:
                self.position = at
                self.string(what)  # says which rule is broken
            found.append(str(data[at + 8 : end], "utf-8", "surrogateescape"))
            at = end
        self.position = at
        return found

    def _number(self, letter: str, what: str) -> int:
        number: int = struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}"), what))[0]
        return number

    def _take(self, length: int, what: str) -> bytes:
        end = self.position + length
        if end > len(self._data):
            self.broken(f"it ends at byte {len(self._data)}, within {what}")
        self.position, start = end, self.position
        return bytes(self._data[start:end])


def _broken(path: Path, rule: str) -> UserError:
    return UserError(f"{path} is no GGUF file that can be read: {rule}", hint="the file is damaged; get it again")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToStore:
    """A tensor to be written. `load` gives its bytes when their turn comes, so one tensor at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    format: Format
    load: Callable[[], np.ndarray[Any, Any]]


def write_gguf(path: Path, values: Mapping[str, Value], tensors: Sequence[ToStore]) -> Iterator[str]:
    """Writes a file of version 3, tensor after tensor, and yields each name when its bytes are written.

    Nothing stands under `path` until all of it does: the bytes go to a file beside it that takes the name at the end.
    Raises UserError when the disk does not take them.
    """
    with whole(path, replace=True) as partial:
        yield from put_gguf(partial, values, tensors)


def put_gguf(path: Path, values: Mapping[str, Value], tensors: Sequence[ToStore]) -> Iterator[str]:
    """`write_gguf` for a path that is no model's yet. Raises OSError."""
    alignment = int(values["general.alignment"].value) if "general.alignment" in values else DEFAULT_ALIGNMENT
    with path.open("wb") as file:
        file.write(_head(values, tensors, alignment))
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.load())
            assert data.nbytes == stored_bytes(tensor.shape, tensor.format), tensor.name
            file.write(data.data)
            _pad(file, alignment)
            yield tensor.name
        file.flush()
        os.fsync(file.fileno())


def _head(values: Mapping[str, Value], tensors: Sequence[ToStore], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_string(key), _encoded(value)]
    offset = 0
    for tensor in tensors:
        rank = len(tensor.shape)
        parts += [_string(tensor.name), struct.pack(f"<I{rank}q", rank, *tensor.shape[::-1])]
        parts.append(struct.pack("<IQ", tensor.format.id, offset))
        offset += _padded(stored_bytes(tensor.shape, tensor.format), alignment)
    head = b"".join(parts)
    return head.ljust(_padded(len(head), alignment), b"\0") if tensors else head


def _encoded(value: Value) -> bytes:
    code = _CODES[value.kind]
    if not value.is_array:
        return struct.pack("<I", code) + _plain(value.kind, [value.value])
    return struct.pack("<IIQ", _ARRAY, code, len(value.value)) + _plain(value.kind, value.value)


def _plain(kind: str, items: Sequence[Any]) -> bytes:
    if kind == "string":
        return b"".join(_string(each) for each in items)
    return struct.pack(f"<{len(items)}{_LETTERS[kind]}", *items)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
