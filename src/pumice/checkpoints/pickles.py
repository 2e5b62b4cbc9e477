"""PyTorch's `.bin` files, without unpickling: a reader of the few instructions that a dictionary of tensors needs.

A pickle is a program. The official LLaVA 1.5 weights, every projector and most adapters come as one, so the program is
read here by an interpreter that has no way to call anything: its values are numbers, strings, tuples, dictionaries and
descriptions of tensors, and any instruction or name beyond the lists below ends the reading. Tensors are then mapped
from the archive, whose members are stored uncompressed.

Format: torch/serialization.py (zip archive, since PyTorch 1.6); instructions: Lib/pickletools.py.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pumice.checkpoints.fields import is_whole, shown
from pumice.checkpoints.mapped import MappedFile
from pumice.errors import UserError

MAX_PROGRAM_BYTES = 4 * 2**20
"""A checkpoint of a thousand tensors takes a tenth of this."""
MAX_MEMBERS = 20_000

_ORDERED_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_GLOBALS = {_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MEMBER = re.compile(r"(?P<top>[^/\\]+)/(?:data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment"
                     r"|\.data/serialization_id)")  # fmt: skip


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of the archive, and how to map it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    first: int
    """Where it begins in its storage, in elements."""
    start_byte: int
    """Where its storage begins in the file."""
    storage_bytes: int
    file: MappedFile

    def load(self) -> Tensor:
        """A view of the file; a copy where the archive did not align the values."""
        raw = self.file.bytes[self.start_byte : self.start_byte + self.storage_bytes]
        if self.start_byte % self.dtype.itemsize:
            raw = raw.clone()
        values = raw.view(self.dtype)
        return values.as_strided(self.shape, self.strides, values.storage_offset() + self.first)


@dataclass(frozen=True)
class _Name:
    """A global of the allow-list. It stands for itself; nothing is imported."""

    text: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    member: str
    elements: int


@dataclass(frozen=True)
class _View:
    """What _rebuild_tensor_v2 is asked for."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(ValueError):
    """Raised inside this file; `open_pickle` turns it into a UserError with the file's name."""


def open_pickle(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a `.bin` file by name. Nothing in the file is executed.

    Raises UserError: no zip archive (PyTorch before 1.6, or no PyTorch file at all), cut short, a wrong checksum,
    members that a checkpoint does not have, an instruction or a name off the allow-list, values other than tensors,
    a tensor that reaches beyond its storage.
    """
    try:
        _check_ends(path)
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            if members["data.pkl"].file_size > MAX_PROGRAM_BYTES:
                raise _Refused("its list of tensors is larger than any checkpoint's")
            # A storage is as easily damaged as the list, and reading it here brings it into the page cache anyway.
            bad = archive.testzip()
            if bad is not None:
                raise _Refused(f"the checksum of {shown(bad)} is wrong")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise _Refused("it was written on a big-endian machine")
            found = _run(archive.read(members["data.pkl"]))
        return _tensors(path, found, members)
    except (ValueError, struct.error, zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is not a PyTorch file that pumice reads: {error}",
            hint="get the file again; if it is whole, convert it to safetensors with the program that wrote it",
        ) from error


# --- the archive ------------------------------------------------------------------------------------------------------


def _check_ends(path: Path) -> None:
    """That the archive fills the file, and how many members it claims, before any list is built from it."""
    with path.open("rb") as file:
        head = file.read(16)
        if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"):
            raise _Refused(
                "it has the form of PyTorch before 1.6: torch.save(torch.load(path, weights_only=True), path) renews it"
            )
        if not head.startswith(b"PK\x03\x04"):
            raise _Refused("it does not begin as a zip archive")
        size = path.stat().st_size
        file.seek(max(0, size - 42))
        tail = file.read(42)
        if len(tail) < 42 or tail[20:24] != b"PK\x05\x06":
            raise _Refused("its end is missing; it was cut short")
        count: int = struct.unpack_from("<H", tail, 30)[0]
        if count == 0xFFFF and tail[:4] == b"PK\x06\x07":
            file.seek(min(struct.unpack_from("<Q", tail, 8)[0], size))
            record = file.read(56)
            count = struct.unpack_from("<Q", record, 32)[0] if len(record) == 56 else count
        if count > MAX_MEMBERS:
            raise _Refused(f"it claims {count} members")


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by their names inside the one top folder; all stored as they are, each once, none of another kind."""
    members: dict[str, zipfile.ZipInfo] = {}
    tops = set()
    for info in archive.infolist():
        match = _MEMBER.fullmatch(info.filename)
        if match is None:
            raise _Refused(f"a checkpoint has no member {shown(info.filename)}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise _Refused(f"its member {shown(info.filename)} is compressed or encrypted")
        tops.add(match["top"])
        name = info.filename.removeprefix(f"{match['top']}/")
        if name in members:
            raise _Refused(f"it has two members {shown(name)}")
        members[name] = info
    if len(tops) != 1 or "data.pkl" not in members or min(info.header_offset for info in members.values()) != 0:
        raise _Refused("its members do not lie as torch.save lays them")
    return members


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose two last fields are variable (APPNOTE 4.3.7)."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name_bytes) + int(extra_bytes)


# --- the program ------------------------------------------------------------------------------------------------------


def _run(program: bytes) -> object:
    """What the program builds. Protocol 2, as torch.save writes it."""
    try:
        return _interpret(program)
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError) as error:  # pickletools, an empty stack, an unknown memo
        raise _Refused("its list of tensors is damaged") from error


def _interpret(program: bytes) -> object:
    stack: list[object] = []
    marks: list[list[object]] = []
    memo: dict[int, object] = {}
    argument: Any
    for opcode, argument, position in pickletools.genops(program):
        match opcode.name:
            case "PROTO" if argument == 2:
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = tuple(stack), marks.pop()
                stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = tuple(stack.pop() for _ in range(int(opcode.name[-1])))
                stack.append(items[::-1])
            case "GLOBAL":
                stack.append(_name(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_apply(stack.pop(), arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], [key, value])
            case "SETITEMS":
                pairs, stack = stack, marks.pop()
                _put(stack[-1], pairs)
            case "BUILD":  # a state_dict carries `_metadata`, versions of its modules
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                    raise _Refused("it wants to set the state of an object")
            case "STOP" if position == len(program) - 1:
                return stack.pop()
            case other:
                raise _Refused(f"it holds the instruction {other}, which no dictionary of tensors needs")
    raise _Refused("its list of tensors has no end")


def _name(text: str) -> _Name:
    if text not in _GLOBALS:
        raise _Refused(f"it names {shown(text.replace(' ', '.'))}, which is not among the names of tensors")
    return _Name(text)


def _storage(value: object) -> _Storage:
    """("storage", FloatStorage, "0", "cpu", 6)"""
    match value:
        case ("storage", _Name(kind), str(member), str(), int(elements)) if kind in _STORAGES and is_whole(elements):
            return _Storage(_STORAGES[kind], f"data/{member}", elements)
    raise _Refused("it refers to something that is not a storage")


def _apply(function: object, arguments: object) -> object:
    match function, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case (
            _Name("torch._utils _rebuild_tensor_v2"),
            (_Storage() as storage, int(first), tuple(shape), tuple(strides), bool(), dict(), *_),
        ):
            if len(shape) == len(strides) <= 8 and all(is_whole(each) for each in (first, *shape, *strides)):
                return _View(storage, first, shape, strides)
        case _Name("torch._utils _rebuild_parameter"), (_View() as view, bool(), dict()):
            return view
    raise _Refused("it calls something that does not make a tensor")


def _put(target: object, pairs: list[object]) -> None:
    if not isinstance(target, dict) or len(pairs) % 2 or not all(isinstance(key, str) for key in pairs[::2]):
        raise _Refused("its list of tensors is not a dictionary by name")
    target.update(zip(pairs[::2], pairs[1::2]))


# --- what it built ----------------------------------------------------------------------------------------------------


def _tensors(path: Path, found: object, members: dict[str, zipfile.ZipInfo]) -> dict[str, PickledTensor]:
    if not isinstance(found, dict):
        raise _Refused("it does not hold a dictionary")
    file = MappedFile(path, path.stat().st_size)
    starts: dict[str, int] = {}
    tensors = {}
    for name, view in found.items():
        if not isinstance(view, _View):
            raise _Refused(f"{shown(name)} in it is not a tensor")
        info = members.get(view.storage.member)
        if info is None:
            _beyond(name, "has no storage in the file")
        _check_view(name, view, info.file_size)
        if view.storage.member not in starts:
            starts[view.storage.member] = _data_start(path, info)
        tensors[name] = PickledTensor(
            view.shape, view.storage.dtype, view.strides, view.first, starts[view.storage.member], info.file_size, file
        )
    return tensors


def _check_view(name: str, view: _View, member_bytes: int) -> None:
    """The storage is exactly its member, and the tensor lies inside it."""
    if view.storage.elements * view.storage.dtype.itemsize != member_bytes:
        _beyond(name, f"claims {shown(view.storage.elements)} elements, its storage has {member_bytes} bytes")
    if min((view.first, *view.shape, *view.strides)) < 0:
        _beyond(name, "has a negative size")
    count = math.prod(view.shape)
    last = view.first + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides)) if count else 0
    if count > view.storage.elements or (count and last >= view.storage.elements):
        _beyond(name, f"reaches beyond its storage of {view.storage.elements} elements")


def _beyond(name: str, what: str) -> NoReturn:
    raise _Refused(f"{shown(name)} in it {what}")
