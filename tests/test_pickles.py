"""Hostile and damaged weight files: each is refused with a UserError, and nothing in it runs."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pumice.checkpoints.pickles import MAX_PROGRAM_BYTES
from pumice.checkpoints.tensors import Entry, open_file
from pumice.errors import UserError

STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
"""("storage", torch.FloatStorage, "0", "cpu", 6) as a persistent id: six floats in data/0."""
VALUES = struct.pack("<6f", *range(6))


def tensor(storage: bytes = STORAGE, view: bytes = b"K\x00K\x02K\x03\x86K\x03K\x01\x86") -> bytes:
    """A call of _rebuild_tensor_v2: by default 2 x 3, row by row."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89ccollections\nOrderedDict\n)RtR"


def program(value: bytes) -> bytes:
    """{"a": value}, protocol 2."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


def archive(path: Path, content: bytes, *, data: bytes = VALUES, more: dict[str, bytes] | None = None) -> Path:
    """What torch.save writes around a program."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, body in {
            "data.pkl": content,
            "byteorder": b"little",
            "data/0": data,
            "version": b"3\n",
            **(more or {}),
        }.items():
            file.writestr(f"x/{name}", body)
    return path


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        [entry.load() for entry in open_file(path).values()]
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 600 + len(str(path))
    return str(caught.value)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


# --- good files -------------------------------------------------------------------------------------------------------


def test_the_programs_of_these_tests_are_good(tmp_path: Path) -> None:
    """Otherwise a refusal below would prove nothing."""
    path = archive(tmp_path / "x.bin", program(tensor()))
    expected = torch.arange(6.0).view(2, 3)
    assert torch.equal(torch.load(path, weights_only=True)["a"], expected)
    assert torch.equal(open_file(path)["a"].load(), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_what_torch_saves_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = (torch.randn(7, 5) * 10).to(dtype)
    state = OrderedDict(
        whole=whole, part=whole[2:5, 1:4], turned=whole.t(), scalar=whole[0, 0], empty=whole[:0], again=whole
    )
    torch.save(state, tmp_path / "x.bin")
    found = open_file(tmp_path / "x.bin")
    for name, value in state.items():
        assert (found[name].shape, found[name].dtype) == (tuple(value.shape), dtype)
        assert torch.equal(found[name].load(), value)


def test_state_dicts_and_parameters_are_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "state.bin")
    torch.save({"p": torch.nn.Parameter(torch.ones(3))}, tmp_path / "parameter.bin")
    found = open_file(tmp_path / "state.bin")
    assert all(torch.equal(found[name].load(), value) for name, value in module.state_dict().items())
    assert torch.equal(open_file(tmp_path / "parameter.bin")["p"].load(), torch.ones(3))


def test_values_at_odd_addresses(tmp_path: Path) -> None:
    """A member may begin at any byte; the header of safetensors may have any length."""
    for name in ("x/data/0", "x/data/0" + "0"):  # the archive of these tests aligns nothing
        key = name.removeprefix("x/data/")
        storage = STORAGE.replace(b"X\x01\x00\x00\x000", struct.pack("<cI", b"X", len(key)) + key.encode())
        path = archive(tmp_path / "x.bin", program(tensor(storage)), more={f"data/{key}": VALUES})
        value = open_file(path)["a"].load()
        assert value.data_ptr() % 4 == 0
        assert torch.equal(value, torch.arange(6.0).view(2, 3))
    header = {
        "u": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "a": {"dtype": "F32", "shape": [6], "data_offsets": [3, 27]},
    }
    entry = open_file(safetensors(tmp_path / "x.safetensors", header, b"abc" + VALUES))["a"]
    assert entry.load().data_ptr() % 4 == 0
    assert torch.equal(entry.load(), torch.arange(6.0))


# --- programs that would do something ---------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(canary: Path) -> dict[str, bytes]:
    """Values that create the canary when they are unpickled, and others that pickle alone would do something with."""
    command = f"touch {canary}"
    stack_global = text("os") + text("system") + b"\x93"
    return {
        "os.system": b"cposix\nsystem\n" + text(command) + b"\x85R",
        "builtins.eval": b"cbuiltins\neval\n" + text(f"open({str(canary)!r}, 'w').close()") + b"\x85R",
        "builtins.exec": b"cbuiltins\nexec\n" + text(f"open({str(canary)!r}, 'w').close()") + b"\x85R",
        "stack_global": stack_global + text(command) + b"\x85R",
        "stack_global from memo": text("os")
        + b"q\x05"
        + text("system")
        + b"q\x060h\x05h\x06\x93"
        + text(command)
        + b"\x85R",
        "INST": b"(" + text(command) + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o",
        "NEWOBJ": b"cposix\nsystem\n" + text(command) + b"\x85\x81",
        "two-step name": b"cbuiltins\ngetattr\ncos\nsystem\n" + text("__call__") + b"\x86R" + text(command) + b"\x85R",
        "numpy": b"cnumpy.testing._private.utils\nrunstring\n"
        + text(f"open({str(canary)!r}, 'w').close()")
        + b"}\x86R",
        "torch's own exec": b"ctorch.utils.collect_env\nrun\n" + text(command) + b"\x85R",
        "torch's own load": b"ctorch\nload\n" + text(str(canary)) + b"\x85R",
        "torch.utils lookalike": b"ctorch.utils._rebuild_tensor_v2\nsystem\n" + text(command) + b"\x85R",
        "a name with a space": b"ctorch._utils _rebuild_tensor_v2\nx\n" + text(command) + b"\x85R",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "PERSID": b"P" + command.encode() + b"\n",
    }


RUNS = ("os.system", "builtins.eval", "builtins.exec", "INST", "OBJ", "two-step name", "torch's own exec")
"""Those of the attacks that really create the canary here, when nothing holds them back."""


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_no_program_runs(name: str, canary: Path, tmp_path: Path) -> None:
    attack = attacks(canary)[name]
    for index, content in enumerate(
        (
            program(attack),
            program(tensor())[:-1] + attack + b"0.",  # beside a good tensor, then dropped
            b"\x80\x02" + attack + b".",
            program(tensor(view=b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89" + attack + b"tR")),
            program(b"ccollections\nOrderedDict\n)R" + attack + b"b"),
        )
    ):
        path = archive(tmp_path / f"{index}.bin", content)
        refused(path)
        assert not canary.exists(), f"form {index}"
    if name in RUNS:
        pickle.loads(b"\x80\x02" + attack + b".")
        assert canary.exists(), "this attack does nothing; the test above proves nothing"


def test_named_attacks_are_named_in_the_error(canary: Path, tmp_path: Path) -> None:
    found = attacks(canary)
    for name, word in (
        ("os.system", "posix.system"),
        ("INST", "INST"),
        ("EXT1", "EXT1"),
        ("stack_global from memo", "POP"),
        ("stack_global", "STACK_GLOBAL"),
        ("torch.utils lookalike", "torch.utils._rebuild_tensor_v2.system"),
    ):
        refused(archive(tmp_path / "x.bin", program(found[name])), word)


SPARSE = (
    b"ctorch._utils\n_rebuild_sparse_tensor\n(ctorch.serialization\n_get_layout\nX\x10\x00\x00\x00torch.sparse_coo\x85R"
    b"(" + tensor() + tensor() + b"K\x02K\x03\x86\x89ttR"
)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (SPARSE, "torch._utils._rebuild_sparse_tensor"),
        (b"ccollections\nOrderedDict\n" + b"]\x85R", "instruction"),
        (b"ccollections\nOrderedDict\n" + b"K\x01\x85R", "calls something"),
        (tensor() + b"}b", "state of an object"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b", "state of an object"),
        (b"ctorch\nFloatStorage\n)R", "calls something"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89}tR", "calls something"),
        (b"K\x07", "'a' in it is not a tensor"),
        (STORAGE, "'a' in it is not a tensor"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n", "not a tensor"),
        (b"}X\x01\x00\x00\x00b" + tensor() + b"s", "not a tensor"),
        (b"K\x01Q", "not a storage"),
        (tensor(STORAGE.replace(b"FloatStorage", b"UntypedStorage")), "torch.UntypedStorage"),
        (tensor(STORAGE.replace(b"K\x06t", b"\x88t")), "not a storage"),
        (tensor(STORAGE.replace(b"X\x01\x00\x00\x000", text("../../0"))), "no storage in the file"),
        (tensor(STORAGE.replace(b"X\x01\x00\x00\x000", text("9"))), "no storage in the file"),
        (tensor(STORAGE.replace(b"K\x06t", b"K\x07t")), "claims 7 elements"),
        (tensor(STORAGE.replace(b"K\x06t", b"K\x05t")), "claims 5 elements"),
        (tensor(STORAGE.replace(b"K\x06t", b"J\xff\xff\xff\x7ft")), "claims 2147483647 elements"),
        (tensor(STORAGE.replace(b"FloatStorage", b"HalfStorage")), "24 bytes"),
        (tensor(view=b"K\x01K\x02K\x03\x86K\x03K\x01\x86"), "beyond its storage"),
        (tensor(view=b"K\x00K\x02K\x04\x86K\x03K\x01\x86"), "beyond its storage"),
        (tensor(view=b"K\x00K\x02K\x03\x86K\x04K\x01\x86"), "beyond its storage"),
        (tensor(view=b"K\x00K\x09K\x09\x86K\x00K\x00\x86"), "beyond its storage"),
        (tensor(view=b"J\xff\xff\xff\xffK\x02K\x03\x86K\x03K\x01\x86"), "negative"),
        (tensor(view=b"K\x00J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86K\x03K\x01\x86"), "negative"),
        (tensor(view=b"K\x05K\x02K\x03\x86J\xfd\xff\xff\xffK\x01\x86"), "negative"),
        (tensor(view=b"K\x00K\x02K\x03\x86K\x03\x85"), "calls something"),
        (tensor(view=b"K\x00\x8a\x40" + b"\x7f" * 64 + b"K\x03\x86K\x03K\x01\x86"), "beyond its storage"),
        (b"c__builtin__\nset\n]\x85R", "__builtin__.set"),
    ],
    ids=str,
)
def test_what_is_no_dictionary_of_tensors(value: bytes, words: str, tmp_path: Path) -> None:
    refused(archive(tmp_path / "x.bin", program(value)), words)


@pytest.mark.parametrize(
    "content",
    [
        b"", b".", b"\x80\x02", b"\x80\x02}", b"\x80\x03}.", b"\x80\x05}.", b"\x80\x02N.", b"\x80\x02).",
        b"\x80\x02h\x00.",
        b"\x80\x02}0.", b"\x80\x02s.", b"\x80\x02}u.", b"\x80\x02t.", b"\x80\x02R.", b"\x80\x02}}.trailing",
        b"\xff\xff",
        b"\x80\x02}K\x01" + tensor() + b"s.", b"\x80\x02}(K\x01u.", b"\x80\x02}}" + tensor() + b"s.",
        b"\x80\x02X\xff\xff\xff\xffa.", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", b"\x80\x02I" + b"9" * 9000 + b"\n.",
    ],
    ids=lambda each: repr(each)[:30],
)  # fmt: skip
def test_broken_programs(content: bytes, tmp_path: Path) -> None:
    refused(archive(tmp_path / "x.bin", content), "is not a PyTorch file")


def test_a_program_that_is_too_long(tmp_path: Path) -> None:
    started = time.process_time()
    refused(
        archive(tmp_path / "x.bin", b"\x80\x02}" + b"0}" * (MAX_PROGRAM_BYTES // 2)), "larger than any checkpoint's"
    )
    deep = b"\x80\x02)" + b"\x85" * 200_000 + b"."
    refused(archive(tmp_path / "deep.bin", deep), "does not hold a dictionary")
    assert time.process_time() - started < 10


# --- archives ---------------------------------------------------------------------------------------------------------


def test_a_wrong_checksum(tmp_path: Path) -> None:
    for name, body in (("data.pkl", program(tensor())), ("data/0", VALUES)):
        path = archive(tmp_path / "x.bin", program(tensor()))
        spoiled = path.read_bytes()
        at = spoiled.index(body) + len(body) - 3
        path.write_bytes(spoiled[:at] + bytes([spoiled[at] ^ 1]) + spoiled[at + 1 :])
        assert name in refused(path)


@pytest.mark.parametrize(
    ("member", "word"),
    [
        ("../evil", "evil"), ("data/../../evil", "evil"), ("data/0.zip", "0.zip"), ("constants.pkl", "constants.pkl"),
        ("code/__torch__.py", "__torch__.py"), ("DATA.PKL", "DATA.PKL"), ("data/x", "data/x"), ("data/", "data/"),
        ("a\\data.pkl", "data.pkl"),
    ],
)  # fmt: skip
def test_members_that_a_checkpoint_does_not_have(member: str, word: str, tmp_path: Path) -> None:
    assert word in refused(archive(tmp_path / "x.bin", program(tensor()), more={member: b"PK\x03\x04"}), "no member")


def test_other_archives(tmp_path: Path) -> None:
    good = archive(tmp_path / "good.bin", program(tensor())).read_bytes()
    path = tmp_path / "x.bin"

    path.write_bytes(b"#!/bin/sh\n" + good)
    refused(path, "does not begin as a zip")
    path.write_bytes(good[:30] + good)  # a zip whose members lie behind something else
    refused(path)
    path.write_bytes(good + b"\0" * 40)
    refused(path, "end is missing")
    path.write_bytes(b"")
    refused(path, "does not begin")
    path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    refused(path, "before 1.6")

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program(tensor()))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("x/data.pkl", program(b"cposix\nsystem\n"))
    refused(path, "two members")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program(tensor()))
        file.writestr("y/data/0", VALUES)
    refused(path, "do not lie as torch.save")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", program(tensor()))
        file.writestr("x/data/0", b"\0" * 10**7)
    refused(path, "compressed")
    archive(path, program(tensor()), more={"byteorder": b"big"})
    refused(path, "big-endian")
    count = struct.pack("<HH", 60_000, 60_000)
    path.write_bytes(good[:-14] + count + good[-10:])
    refused(path, "60000 members")


def test_legacy_files_of_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "x.bin", "before 1.6")
    with (tmp_path / "y.bin").open("wb") as file:
        pickle.dump({"a": 1}, file)
    refused(tmp_path / "y.bin", "zip archive")


def test_not_regular_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero", "absent"):
        refused(tmp_path / f"{name}.bin", "regular file")


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors(path: Path, header: object, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = struct.pack("<2f", 1, 2)


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": A}, DATA, 10**6),
        ({"a": A}, DATA, 100_000_001),
        ({"a": A}, DATA, 2**64 - 1),
        ({"a": A}, DATA, 2**63),
        ({"a": A}, DATA[:-1], None),
        ({"a": A}, DATA + b"\0", None),
        ({"a": A}, b"", None),
        ({"a": A, "b": A}, DATA, None),
        ({"a": A, "b": A | {"data_offsets": [4, 12]}}, DATA + DATA[:4], None),
        ({"a": A | {"data_offsets": [8, 16]}}, DATA * 2, None),
        ({"a": A | {"data_offsets": [8, 0]}}, DATA, None),
        ({"a": A | {"data_offsets": [-8, 0]}}, DATA, None),
        ({"a": A | {"shape": [3]}}, DATA, None),
        ({"a": A | {"shape": [-2]}}, DATA, None),
        ({"a": A | {"shape": [2**32, 2**32]}}, DATA, None),
        ({"a": A | {"shape": [2**63, 2]}}, DATA, None),
        ({"a": A | {"shape": "2"}}, DATA, None),
        ({"a": A | {"dtype": "F16"}}, DATA, None),
        ({"a": A | {"dtype": "F99"}}, DATA, None),
        ({"a": A | {"dtype": 7}}, DATA, None),
        ({"a": {}}, DATA, None),
        ({"a": 7}, DATA, None),
        ([], b"", None),
        (b'{"a":', DATA, None),
        (b"", b"", None),
        (b'{"a\xff": {}}', b"", None),
        (b"[" * 100_000, b"", None),
        (b'{"a":' * 50_000, b"", None),
        (b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}", DATA, None),
        ({"__metadata__": 7, "a": A}, DATA, None),
    ],
    ids=lambda each: repr(each)[:60],
)
def test_broken_safetensors(header: object, data: bytes, length: int | None, tmp_path: Path) -> None:
    refused(safetensors(tmp_path / "x.safetensors", header, data, length=length), "x.safetensors")


def test_the_headers_of_these_tests_are_good(tmp_path: Path) -> None:
    assert open_file(safetensors(tmp_path / "x.safetensors", {"a": A}, DATA))["a"].load().tolist() == [1, 2]


def test_safetensors_with_too_many_tensors(tmp_path: Path) -> None:
    header = {f"t{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(100_000)}
    started = time.process_time()
    refused(safetensors(tmp_path / "x.safetensors", header, b""), "20000 tensors")
    assert time.process_time() - started < 10


def test_safetensors_of_eight_bits(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "F8_E4M3", "'a'")


# --- every prefix, many mutations -------------------------------------------------------------------------------------


def small_bin() -> bytes:
    buffer = io.BytesIO()
    torch.save(OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.float16)), buffer)
    return buffer.getvalue()


def small_safetensors() -> bytes:
    text = json.dumps({"a": A, "b": A | {"data_offsets": [8, 16]}}).encode()
    return struct.pack("<Q", len(text)) + text + DATA * 2


SMALL: dict[str, Callable[[], bytes]] = {"x.bin": small_bin, "x.safetensors": small_safetensors}


@pytest.mark.parametrize("name", list(SMALL))
def test_prefixes_are_refused(name: str, tmp_path: Path) -> None:
    """All of the short file, and of the long one every fifth and all around its end."""
    whole, path = SMALL[name](), tmp_path / name
    for length in [*range(0, len(whole), 1 if len(whole) < 500 else 5), *range(len(whole) - 64, len(whole))]:
        path.write_bytes(whole[:length])
        refused(path)


@pytest.mark.parametrize("name", list(SMALL))
def test_mutations_are_refused_or_read_inside_the_file(name: str, tmp_path: Path) -> None:
    whole, path, choose = SMALL[name](), tmp_path / name, random.Random(1)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        spoiled = bytearray(whole)
        for _ in range(choose.choice((1, 1, 2, 4))):
            spoiled[choose.randrange(len(spoiled))] = choose.choice((0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)))
        path.write_bytes(spoiled)
        try:
            entries: dict[str, Entry] = open_file(path)
            assert sum(entry.load().double().nan_to_num().sum().isfinite() for entry in entries.values()) == len(
                entries
            )
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 120, outcomes


def test_mutated_programs(tmp_path: Path) -> None:
    """With a right checksum, so that the interpreter sees them."""
    whole, choose = program(tensor()), random.Random(2)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        spoiled = bytearray(whole)
        for _ in range(choose.choice((1, 1, 2, 3))):
            spoiled[choose.randrange(len(spoiled))] = choose.randrange(256)
        path = archive(tmp_path / "x.bin", bytes(spoiled))
        try:
            for entry in open_file(path).values():
                entry.load()
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 400, outcomes
