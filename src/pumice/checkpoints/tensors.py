"""Weights in files: what each tensor is, without reading it, and its values, mapped from the file instead of copied."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pumice.checkpoints import pickles
from pumice.checkpoints.fields import read_json, shown
from pumice.errors import UserError
from pumice.quant import Format, QTensor

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""
MAX_TENSORS = 20_000
"""Several times the tensors of the largest LLaVA (80 layers: about 1 400)."""

WRONG_FILE = SafetensorError
"""What the library raises for a file that it cannot read."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _stays() -> None:
    """Of files whose pages stay in memory once they are there."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, before its values are asked for. `key` is what its file calls it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of its values; float32 for blocks."""
    load: Callable[[], Tensor | QTensor]
    blocks: Format | None = None
    """The format of quantised values."""
    computed: bool = False
    """Are the values made when they are loaded, in memory of their own? Else they are a view of the file."""
    give_back: Callable[[], None] = _stays
    """Lets the file's pages leave memory that hold the values alone; a view of them reads them again."""

    def dense(self) -> Tensor:
        """The values as plain numbers, unpacked where the file holds blocks."""
        values = self.load()
        return values.dense() if isinstance(values, QTensor) else values

    def rows(self, start: int, stop: int | None) -> Entry:
        """Some rows of a matrix: a view of its values, of blocks too."""

        def load() -> Tensor | QTensor:
            values = self.load()
            if isinstance(values, QTensor):
                assert not values.head_width, "rows of turned heads are no stretch"
                return replace(values, data_RB=values.data_RB[start:stop])
            return values[start:stop]

        count = len(range(self.shape[0])[start:stop])
        return replace(self, shape=(count, *self.shape[1:]), load=load)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, as the file stores them."""
        if self.blocks is not None:
            return math.prod(self.shape[:-1]) * self.blocks.row_bytes(self.shape[-1])
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """Tensors by name. A value is a view of its mapped file wherever the file allows it; do not write into it."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        """As plain numbers."""
        return self._entries[name].dense()

    def stored(self, name: str) -> Tensor | QTensor:
        """As the file holds them."""
        return self._entries[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def computed_in(self, device: torch.device) -> torch.dtype:
        """The type that the network computes with on a device where no other is asked for: that of the embeddings; of
        blocks float32 on a CPU, and on a GPU that of their scales, which is also that of LLaVA's own inference."""
        in_blocks = self.blocks("language_model.layers.0.self_attn.q_proj.weight") is not None
        if in_blocks and device.type == "cuda":
            return torch.float16
        return self.dtype("language_model.embed_tokens.weight")

    def blocks(self, name: str) -> Format | None:
        """The format of quantised values."""
        return self._entries[name].blocks

    def computed(self, name: str) -> bool:
        """Whether loading the tensor takes memory beside the file's pages."""
        return self._entries[name].computed

    def give_back(self, name: str) -> Callable[[], None]:
        """What lets the tensor's pages leave memory: see `Entry.give_back`."""
        return self._entries[name].give_back

    def kinds(self, *parts: str) -> str:
        """Which types the values have, and how many tensors of each: `Q4_K 193, F32 65`. parts: how the names of those
        that count begin; all without."""
        counted = [each for name, each in self._entries.items() if name.startswith(parts or "")]
        names = [each.blocks.name if each.blocks else str(each.dtype)[6:] for each in counted]
        return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())

    @property
    def nbytes(self) -> int:
        """Bytes of all values, as the files store them."""
        return sum(each.nbytes for each in self._entries.values())


def open_weights(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder by the keys of its files; empty when it holds no weights under the usual names.

    Looks where Transformers looks, in its order. Raises UserError: a shard that is missing, damaged, or named outside
    the folder; a key that two shards hold, or that the index has and no shard.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return open_file(folder / single)
        if (folder / index).is_file():
            return _open_shards(folder, index)
    return {}


def open_file(path: Path) -> dict[str, Entry]:
    """The tensors of one `.safetensors` or `.bin` file by key. Raises UserError for what is not whole and sane."""
    if not path.is_file():
        raise UserError(f"{path} is missing, or is no regular file", hint="the checkpoint is incomplete; get it again")
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return {name: Entry(name, each.shape, each.dtype, each.load) for name, each in pickles.open_pickle(path).items()}


def save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one `.safetensors` file, which appears whole or not at all. Raises UserError when the disk does not take
    it."""
    half_written = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        half_written.write_bytes(b"")  # what may not be written here is said by the system, in its own words
        safetensors.torch.save_file(dict(tensors), str(half_written))
        half_written.chmod(0o644)  # the library makes it private
        half_written.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", hint="check the disk and the folder") from error
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}", hint="check the disk and the folder") from error
    finally:
        half_written.unlink(missing_ok=True)


def _open_shards(folder: Path, index: str) -> dict[str, Entry]:
    weight_map = read_json(folder / index).inner("weight_map")
    files = {key: weight_map.text(key) for key in weight_map.names}
    entries: dict[str, Entry] = {}
    for name in sorted(set(files.values())):
        # Links inside the folder are fine, the Hub's cache is made of them; a name that leaves it is not.
        if Path(name).name != name or "\\" in name or Path(name).suffix not in (".safetensors", ".bin"):
            raise UserError(
                f"{folder / index} points to {shown(name)}, which is not a weight file of that folder",
                hint="do not load this checkpoint; a good index names .safetensors or .bin files beside it",
            )
        for key, entry in open_file(folder / name).items():
            if key in entries:
                raise UserError(f"{folder}: two shards hold {shown(key)}", hint="get the checkpoint again")
            entries[key] = entry
    absent = files.keys() - entries.keys()
    if absent:
        raise UserError(
            f"{folder / index} lists {listed(absent)}, and no shard holds it",
            hint="index and shards belong to different checkpoints, or a shard is incomplete; get them again",
        )
    return entries


def listed(names: set[str] | list[str]) -> str:
    """The first few names, and how many more."""
    first = ", ".join(shown(name) for name in sorted(names)[:4])
    return first if len(names) <= 4 else f"{first} and {len(names) - 4} more"


# --- safetensors ------------------------------------------------------------------------------------------------------


def opened(path: Path) -> Any:
    """A safetensors file, as `safe_open` maps it, with its header checked: lengths, types, no overlap, no hole, nothing
    left over. Raises UserError for what is not whole."""
    refuse_pointer(path)
    _check_header(path)
    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise _broken(path, str(error)) from error
    _refuse_duplicates(path)
    return file


def _open_safetensors(path: Path) -> dict[str, Entry]:
    """Its tensors are views of the mapping, which lives as long as one of them."""
    file = opened(path)
    entries = {}
    try:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(key)
            entries[key] = _entry(path, file, key, (tuple(part.get_shape()), part.get_dtype()))
    except SafetensorError as error:
        raise _broken(path, str(error)) from error
    return entries


def _entry(path: Path, file: Any, key: str, kind: tuple[tuple[int, ...], str]) -> Entry:
    shape, dtype = kind
    if dtype not in _DTYPES:
        raise UserError(
            f"{path}: {shown(key)} holds values of type {dtype}; pumice reads {', '.join(_DTYPES)}",
            hint="this is a quantised checkpoint; take the one in 16 or 32 bits",
        )

    def load() -> Tensor:
        tensor: Tensor = file.get_tensor(key)
        # The format lets a tensor begin at any byte; kernels may assume that its address fits its type.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    return Entry(key, shape, _DTYPES[dtype], load)


def _check_header(path: Path) -> None:
    """What the library does not bound, or says less clearly: how long the header is, how many tensors it lists."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"the file has {size} bytes, its header claims {length}")
        if file.read(length).count(b'"data_offsets"') > MAX_TENSORS:
            raise _broken(path, f"it lists more than {MAX_TENSORS} tensors")


def _refuse_duplicates(path: Path) -> None:
    """Of two entries with one name the library takes the last. Only called on a header that the library has accepted,
    which bounds its depth."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise _broken(path, "a name stands twice in its header")
        return dict(pairs)

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique)


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not a whole safetensors file: {reason}",
        hint="the file is damaged or its download was cut short; get it again",
    )


def refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git-"):
            raise UserError(
                f"{path} is a Git LFS pointer of {os.path.getsize(path)} bytes, not the weights themselves",
                hint="run `git lfs pull` in that folder",
            )
