"""GGUF's container: what the gguf package writes is read and the other way round; every broken rule has a name."""

from __future__ import annotations

import mmap
import os
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from pumice.checkpoints import gguf_file
from pumice.checkpoints.gguf_file import GgufFile, ToStore, Value, architecture, open_gguf, write_gguf
from pumice.errors import UserError
from pumice.quant import FORMATS, QTensor

VALUES = {
    "general.architecture": Value("string", "llama"),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65535),
    "a.i16": Value("i16", -32768),
    "a.u32": Value("u32", 2**32 - 1),
    "a.i32": Value("i32", -(2**31)),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f32": Value("f32", 0.5),
    "a.f64": Value("f64", 0.1),
    "a.bool": Value("bool", True),
    "a.text": Value("string", "größer ▁ \udcff"),
    "a.words": Value("string", ["a", "", "▁b"]),
    "a.numbers": Value("f32", [0.25, -1.5]),
    "a.flags": Value("bool", [True, False]),
    "a.none": Value("i32", []),
}


def stored(path: Path, values: dict[str, Value] | None = None) -> Path:
    """A file with a tensor of each sort."""
    torch.manual_seed(0)
    plain, blocks = torch.randn(3, 5), torch.randint(0, 256, (4, 36), dtype=torch.uint8)
    tensors = [
        ToStore("plain", (3, 5), FORMATS["F32"], plain.numpy),
        ToStore("blocks", (4, 64), FORMATS["Q4_0"], blocks.numpy),
        ToStore("deep", (2, 1, 2, 3), FORMATS["F16"], torch.ones(12).half().numpy),
    ]
    assert list(write_gguf(path, VALUES if values is None else values, tensors)) == ["plain", "blocks", "deep"]
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return stored(tmp_path / "a.gguf")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_gguf(path)
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_what_is_written_is_read(file: Path) -> None:
    found = open_gguf(file)
    assert dict(found.values) == VALUES
    assert {name: each.shape for name, each in found.tensors.items()} == {
        "plain": (3, 5), "blocks": (4, 64), "deep": (2, 1, 2, 3),
    }  # fmt: skip
    torch.manual_seed(0)
    assert torch.equal(_dense(found, "plain"), torch.randn(3, 5))
    blocks = found.tensors["blocks"].load()
    assert isinstance(blocks, QTensor)
    assert torch.equal(blocks.data_RB, torch.randint(0, 256, (4, 36), dtype=torch.uint8))
    assert torch.equal(_dense(found, "deep"), torch.ones(2, 1, 2, 3).half())
    assert architecture(file) == "llama"
    assert not list(file.parent.glob(".*")), "no half-written file stays"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what lies in memory")
def test_pages_that_are_given_back(tmp_path: Path) -> None:
    """The pages of a tensor alone leave memory, and its values are read again when they are used again."""
    page, words = mmap.PAGESIZE, 2**19
    first, middle, last = (torch.randint(0, 2**15, (words,), dtype=torch.int16).half() for _ in range(3))
    tensors = [
        ToStore(name, (words,), FORMATS["F16"], each.numpy)
        for name, each in (("first", first), ("middle", middle), ("last", last))
    ]
    assert list(write_gguf(tmp_path / "a.gguf", VALUES, tensors)) == ["first", "middle", "last"]
    found = open_gguf(tmp_path / "a.gguf").tensors
    views = {name: found[name].load() for name in found}
    assert all(torch.equal(views[name], each) for name, each in (("first", first), ("middle", middle), ("last", last)))
    whole = _resident(tmp_path / "a.gguf")
    assert whole >= 3 * 2 * words
    found["middle"].give_back()
    assert found["middle"].start % page, "its ends lie in pages of its neighbours"
    assert whole - _resident(tmp_path / "a.gguf") == 2 * words - page
    assert torch.equal(views["middle"], middle)
    assert _resident(tmp_path / "a.gguf") == whole
    for start, size in ((5, 3 * page - 6), (page + 1, page), (0, 0), (page - 1, page - 1)):
        found["middle"].file.give_back(start, size)
        assert whole - _resident(tmp_path / "a.gguf") == {0: 0, 3 * page - 6: page}.get(size, 0)
        assert float(views["first"].sum()) == float(first.sum())


def _resident(path: Path) -> int:
    """Bytes of the file that the process has in its memory."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def _dense(found: GgufFile, name: str) -> torch.Tensor:
    values = found.tensors[name].load()
    return values.dense() if isinstance(values, QTensor) else values


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    values = {key: each for key, each in VALUES.items() if key not in ("a.text", "a.none")}
    reader = gguf.GGUFReader(stored(tmp_path / "a.gguf", values))
    assert {each.name: [int(size) for size in each.shape] for each in reader.tensors} == {
        "plain": [5, 3], "blocks": [64, 4], "deep": [3, 2, 1, 2],
    }  # fmt: skip
    for key, value in values.items():
        field = reader.fields[key]
        assert field.contents() == pytest.approx(value.value) if "f" in value.kind else field.contents() == value.value
    assert reader.tensors[1].tensor_type == gguf.GGMLQuantizationType.Q4_0


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "p.gguf", "llama")
    writer.add_context_length(7)
    writer.add_array("list", ["x", "y"])
    writer.add_custom_alignment(64)
    matrix = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("m", matrix)
    writer.add_tensor(
        "q", gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = open_gguf(tmp_path / "p.gguf")
    assert (found.values["llama.context_length"], found.values["list"].value) == (Value("u32", 7), ["x", "y"])
    assert torch.equal(_dense(found, "m"), torch.from_numpy(matrix))
    assert float((_dense(found, "q") - torch.from_numpy(matrix)).abs().max()) < 0.4


@pytest.mark.parametrize("edge", [1, 2, 4096])
def test_any_alignment(edge: int, tmp_path: Path) -> None:
    """Tensors that begin at odd bytes too, a vector in blocks and one of more than two dimensions."""
    numbers, blocks = np.arange(3, dtype=np.float32), np.arange(18 * 6, dtype=np.uint8)
    tensors = [
        ToStore("bytes", (1, 32), FORMATS["Q4_0"], lambda: blocks[:18]),
        ToStore("odd", (3,), FORMATS["F32"], lambda: numbers),
        ToStore("vector", (32,), FORMATS["Q4_0"], lambda: blocks[:18]),
        ToStore("cube", (2, 3, 32), FORMATS["Q4_0"], lambda: blocks),
    ]
    list(write_gguf(tmp_path / "a.gguf", {"general.alignment": Value("u32", edge), "k": Value("bool", True)}, tensors))
    found = open_gguf(tmp_path / "a.gguf")
    assert torch.equal(_dense(found, "odd"), torch.arange(3.0))
    assert torch.equal(_dense(found, "vector"), _dense(found, "bytes")[0])
    assert torch.equal(_dense(found, "cube")[0, 0], _dense(found, "vector"))


def test_a_damaged_file_beside_says_nothing(file: Path) -> None:
    for length in (3, 10, 30, 60):
        (file.parent / "cut.gguf").write_bytes(file.read_bytes()[:length])
        assert architecture(file.parent / "cut.gguf") is None


def test_reading_and_writing_keeps_every_byte(file: Path, tmp_path: Path) -> None:
    found = open_gguf(file)

    def raw(name: str) -> Callable[[], Any]:
        tensor = found.tensors[name]
        return lambda: tensor.file.bytes[tensor.start : tensor.start + tensor.nbytes].numpy()

    again = [ToStore(each.name, each.shape, each.format, raw(name)) for name, each in found.tensors.items()]
    list(write_gguf(tmp_path / "b.gguf", found.values, again))
    assert (tmp_path / "b.gguf").read_bytes() == file.read_bytes()


def shards(folder: Path, *, count: int = 3) -> list[Path]:
    paths = []
    for number in range(count):
        values = {
            "general.architecture": Value("string", "llama"), "split.no": Value("u16", number),
            "split.count": Value("u16", count), "split.tensors.count": Value("i32", count),
        }  # fmt: skip
        tensor = ToStore(f"t{number}", (2,), FORMATS["F32"], lambda: np.zeros(2, np.float32))
        paths.append(folder / f"m-{number + 1:05}-of-{count:05}.gguf")
        list(write_gguf(paths[-1], values, [tensor]))
    return paths


def test_split_files(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    for path in paths:
        found = open_gguf(path)
        assert (list(found.tensors), list(found.values)) == (["t0", "t1", "t2"], ["general.architecture"])
    other = paths[1].read_bytes()
    paths[1].unlink()
    refused(paths[0], "m-00002-of-00003.gguf is missing")
    paths[1].write_bytes(paths[2].read_bytes())
    refused(paths[0], "split.no is 2")
    paths[1].write_bytes(other.replace(b"t1", b"t0"))
    refused(paths[0], "'t0' a second time")
    renamed = paths[0].rename(tmp_path / "model.gguf")
    refused(renamed, "one of 3 files")


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        stored(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    tensors = [ToStore(name, (2,), FORMATS["F32"], lambda: np.zeros(2, np.float32)) for name in "ab"]
    writing = write_gguf(tmp_path / "a.gguf", {}, tensors)
    assert next(writing) == "a"
    writing.close()
    assert list(tmp_path.iterdir()) == []


# --- one file a broken rule -------------------------------------------------------------------------------------------


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def header(tensors: int = 0, keys: int = 0, *, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def info(
    name: bytes = b"t", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    rank = len(sizes) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(sizes)}qIQ", rank, *sizes, kind, offset)


def key(name: bytes = b"k", kind: int = 4, value: bytes = struct.pack("<I", 1)) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def with_tensors(*infos: bytes, data: int = 64, keys: bytes = b"", count: int = 0) -> bytes:
    head = header(len(infos), count) + keys + b"".join(infos)
    return head + b"\0" * (-len(head) % 32 + data)


def alignment(kind: int, value: bytes) -> bytes:
    return with_tensors(info(), keys=key(b"general.alignment", kind, value), count=1)


BROKEN = {
    "magic": (header(magic=b"GGUG"), "not with b'GGUF'"),
    "version 0": (header(version=0), "version 0"),
    "version 1": (header(version=1), "version 1"),
    "version 99": (header(version=99), "version 99"),
    "byte-swapped": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 tensors": (header(2**63), "claims 9223372036854775808 tensors"),
    "2^63 keys": (header(0, 2**63), "9223372036854775808 keys"),
    "empty key": (header(0, 1) + key(b""), "a key is empty"),
    "key of 2^64 - 1": (header(0, 1) + struct.pack("<Q", 2**64 - 1), "claims 18446744073709551615 bytes"),
    "unknown type": (header(0, 1) + key(kind=13), "unknown type 13"),
    "type 2^31": (header(0, 1) + key(kind=2**31), "unknown type"),
    "bool 2": (header(0, 1) + key(kind=7, value=b"\2"), "neither true nor false"),
    "key twice": (header(0, 2) + key() + key(), "'k' stands twice"),
    "nested": (header(0, 1) + key(kind=9, value=struct.pack("<IQ", 9, 1)), "array of arrays"),
    "array of unknown": (header(0, 1) + key(kind=9, value=struct.pack("<IQ", 77, 1)), "unknown type 77"),
    "2^62 strings": (header(0, 1) + key(kind=9, value=struct.pack("<IQ", 8, 2**62)), "claims 4611686018427387904"),
    "2^60 numbers": (header(0, 1) + key(kind=9, value=struct.pack("<IQ", 4, 2**60)), "more than the rest"),
    "string past the end": (header(0, 1) + key(kind=8, value=struct.pack("<Q", 99) + b"x"), "ends at byte"),
    "string in an array past the end": (
        header(0, 1) + key(kind=9, value=struct.pack("<IQ", 8, 2) + text(b"x") + struct.pack("<Q", 9) + b"y"),
        "ends at byte",
    ),
    "alignment 0": (alignment(4, struct.pack("<I", 0)), "general.alignment is 0"),
    "alignment 3": (alignment(4, struct.pack("<I", 3)), "general.alignment is 3"),
    "alignment 2^31": (alignment(4, struct.pack("<I", 2**31)), "general.alignment is 2147483648"),
    "alignment i32": (alignment(5, struct.pack("<I", 32)), "general.alignment is 32 (i32)"),
    "name too long": (with_tensors(info(b"x" * 64)), "not 1 to 63 bytes"),
    "no name": (with_tensors(info(b"")), "not 1 to 63 bytes"),
    "name with NUL": (with_tensors(info(b"a\0b")), "without a zero"),
    "name twice": (with_tensors(info(), info(offset=32)), "'t' stands twice"),
    "rank 0": (with_tensors(info(sizes=())), "0 dimensions"),
    "rank 5": (with_tensors(info(sizes=(1,) * 5)), "5 dimensions"),
    "rank 2^32 - 1": (with_tensors(info(rank=2**32 - 1)), "4294967295 dimensions"),
    "zero": (with_tensors(info(sizes=(4, 0))), "of shape [4, 0]"),
    "negative": (with_tensors(info(sizes=(4, -4))), "of shape [4, -4]"),
    "overflow": (with_tensors(info(sizes=(2**62, 2**62))), "which no tensor has"),
    "type 4": (with_tensors(info(kind=4)), "ggml's type 4"),
    "type 2^32 - 1": (with_tensors(info(kind=2**32 - 1)), "ggml's type 4294967295"),
    "half a block": (with_tensors(info(sizes=(48,), kind=2)), "not whole blocks of 32"),
    "unaligned": (with_tensors(info(offset=8)), "begins at 8, where 0 is expected"),
    "overlap": (with_tensors(info(), info(b"u", offset=0)), "begins at 0, where 32 is expected"),
    "hole": (with_tensors(info(), info(b"u", offset=64), data=128), "begins at 64, where 32 is expected"),
    "offset 2^64 - 32": (with_tensors(info(offset=2**64 - 32)), "where 0 is expected"),
    "beyond the file": (with_tensors(info(sizes=(1000,))), "of 128 bytes"),
    "no data": (with_tensors(info(), data=0), "ends at"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_has_a_name(name: str, tmp_path: Path) -> None:
    data, words = BROKEN[name]
    (tmp_path / "bad.gguf").write_bytes(data.ljust(24, b"\0") if len(data) < 24 else data)
    refused(tmp_path / "bad.gguf", words)


def test_the_frame_of_those_files_is_good(tmp_path: Path) -> None:
    """They are refused for their rule, not for what surrounds it."""
    (tmp_path / "good.gguf").write_bytes(with_tensors(info(), info(b"u", offset=32), keys=key(), count=1))
    assert list(open_gguf(tmp_path / "good.gguf").tensors) == ["t", "u"]
    (tmp_path / "v2.gguf").write_bytes(header(version=2))
    assert not open_gguf(tmp_path / "v2.gguf").tensors


def test_every_prefix_is_refused(file: Path) -> None:
    last = open_gguf(file).tensors["deep"]
    whole = last.start + last.nbytes  # the padding behind may be missing, as ggml allows
    os.truncate(file, whole)
    assert open_gguf(file)
    for length in reversed(range(whole)):  # shortened in place: a file written anew takes a disk ten times as long
        os.truncate(file, length)
        with pytest.raises(UserError):
            open_gguf(file)


MUTATIONS = 100_000
FILES = 4
"""Among which the keys are dealt: a short file costs little, and each of its bytes is changed often."""
MOST_CPU_S = 2
"""For one file, which takes 0.0001: it is bounded, on any machine and however busy that is."""


def test_mutations_are_read_or_refused(tmp_path: Path) -> None:
    """Nothing but a UserError, at a bounded cost; what is read can be loaded, from the file's own bytes."""
    dice, read, worst_s = random.Random(0), 0, 0.0
    for number in range(FILES):
        path = stored(tmp_path / f"{number}.gguf", dict([*VALUES.items()][number::FILES]))
        data, end = path.read_bytes(), open_gguf(path).tensors["plain"].start  # behind it, any bytes are good
        with path.open("r+b", buffering=0) as changing:
            for _ in range(MUTATIONS // FILES):
                places = [dice.randrange(end) for _ in range(dice.choice((1, 1, 1, 2, 4)))]
                for place in places:
                    os.pwrite(
                        changing.fileno(), bytes([dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))]), place
                    )
                began = time.process_time()
                found = opened(path)
                worst_s = max(worst_s, time.process_time() - began)
                read += found is not None
                if found is not None and read % 50 == 0:
                    for tensor in found.tensors.values():
                        values = tensor.load()
                        assert (values.data_RB if isinstance(values, QTensor) else values).nbytes == tensor.nbytes
                for place in places:
                    os.pwrite(changing.fileno(), data[place : place + 1], place)
        assert path.read_bytes() == data
    assert 10_000 < read < 90_000, "as many are good as broken, within a factor"
    assert worst_s < MOST_CPU_S


def opened(path: Path) -> GgufFile | None:
    try:
        return open_gguf(path)
    except UserError:
        return None
