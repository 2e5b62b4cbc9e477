"""Names, manifests, blobs and the own store: whole, whoever is killed, whatever is hostile, however many write."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ollama_store
from ollama_store import PARAMS, TEMPLATE, small
from pumice import UserError, store
from pumice.store.blobs import Blobs
from pumice.store.layout import OwnStore
from pumice.store.manifest import CONFIG_TYPE, MAX_LAYERS, ROLE_TYPE, Layer, Manifest
from pumice.store.names import Name

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "full", "shortest"), [
    ("llava", "registry.ollama.ai/library/llava:latest", "llava:latest"),
    ("LLaVA:7b-v1.5-q4_0", "registry.ollama.ai/library/LLaVA:7b-v1.5-q4_0", "LLaVA:7b-v1.5-q4_0"),
    ("llava-hf/llava-v1.6-mistral-7b-hf", "registry.ollama.ai/llava-hf/llava-v1.6-mistral-7b-hf:latest",
     "llava-hf/llava-v1.6-mistral-7b-hf:latest"),
    ("hf.co/user/repo:Q4_K_M", "hf.co/user/repo:Q4_K_M", "hf.co/user/repo:Q4_K_M"),
    ("host:5000/ns/m", "host:5000/ns/m:latest", "host:5000/ns/m:latest"),
    ("http://host:5000/ns/m:t", "host:5000/ns/m:t", "http://host:5000/ns/m:t"),
    ("host/library/m", "host/library/m:latest", "host/library/m:latest"),
    ("https://llava", "registry.ollama.ai/library/llava:latest", "llava:latest"),
    ("registry.ollama.ai/library/llava:13b", "registry.ollama.ai/library/llava:13b", "llava:13b"),
    (f"llava:7b@sha256:{'a' * 64}", "registry.ollama.ai/library/llava:7b", "llava:7b"),
    ("llava:7b:local", "registry.ollama.ai/library/llava:7b", "llava:7b"),
])  # fmt: skip
def test_names_are_read_as_ollama_reads_them(text: str, full: str, shortest: str) -> None:
    name = Name.parse(text)
    assert (name.full, str(name)) == (full, shortest)
    assert "/".join(name.parts) == full[::-1].replace(":", "/", 1)[::-1]


@pytest.mark.parametrize("text", [
    "", ":", "a:", ":a", "/a", "a/", "a//b", "a/b/c/d", "../x", "a/../b", ".hidden", "-a", "a:b:c", "a b", "a\0", "a\n",
    "a:\n", "ü", "a:é", "ftp://a/b/c", "://a", "a.b/c", "x" * 81, f"a:{'t' * 81}", f"{'n' * 81}/a", f"{'h' * 351}/n/m",
    "a\\b", "~", "llava:cloud", "a%2fb", "C:\\x", "@sha256:ab",
])  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Name.parse(text)
    assert len(str(caught.value)) < 400


def test_the_longest_names_pass() -> None:
    Name.parse(f"http://{'h' * 350}/{'n' * 80}/{'m' * 80}:{'t' * 80}")


LETTERS = "abzABZ019_"


def part(others: str) -> st.SearchStrategy[str]:
    """A part of a name: its first character, and those that may follow."""
    return st.builds(str.__add__, st.sampled_from(LETTERS), st.text(LETTERS + others, max_size=20))


NAMES = st.builds(Name, part(".:-"), part("-"), part(".-"), part(".-"), st.sampled_from(["https", "http"]))


@settings(deadline=None)
@given(NAMES.filter(lambda name: name.tag.lower() != "cloud"))
def test_a_name_is_what_its_text_reads_as(name: Name) -> None:
    assert Name.parse(str(name)) == name
    assert Name.parse(name.full).full == name.full
    assert name.matches(Name.parse(name.full.upper()))
    assert Path(*name.parts).parts == name.parts
    assert not {".", ".."} & set(name.parts)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        name = Name.parse(text)
    except UserError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_./:-]+", name.full)


# --- manifests --------------------------------------------------------------------------------------------------------

PUBLISHED = [
    ("model", "170370233dd5c5415250a2ecd5c71586352850729062ccef1496385647293868", 4108916992),
    ("projector", "72d6f08a42f656d36b356dbe0920675899a99ce21192fd66266fb7d82ed07539", 624434368),
    ("license", "43070e2d4e532684de521b885f385d0841030efa2b1a20bafb76133a5e1379c1", 11356),
    ("template", "c43332387573e98fdfad4a606171279955b53d891ba2500552c2984a6560ffb4", 67),
    ("params", "ed11eda7790d05b49395598a42b155812b17e263214292f7b87d15e14003d337", 30),
]
"""llava:latest of Ollama's library, whose manifest has the digest below."""
PUBLISHED_ID = "8dd30f6b0cb19f555f2c7a7ebda861449ea2cc76bf1f44e262931f45fc81d081"
PUBLISHED_CONFIG = "7c658f9561e5dbbafb042a00f6a4de57877adddd957809111f3123e272632b4d"


def published() -> Manifest:
    layers = [Layer(ROLE_TYPE + role, f"sha256:{digest}", size) for role, digest, size in PUBLISHED]
    return Manifest.of(Layer(CONFIG_TYPE, f"sha256:{PUBLISHED_CONFIG}", 564), layers)


def test_a_manifest_is_written_in_ollamas_bytes() -> None:
    written = published()
    assert (written.digest, len(written.raw), written.size) == (PUBLISHED_ID, 1011, 4733363377)
    assert Manifest.read(written.raw, "it") == written


def test_the_store_of_these_tests_is_ollamas(tmp_path: Path) -> None:
    """Its texts and config have the digests that the library publishes."""
    assert ollama_store.sha256(TEMPLATE) == PUBLISHED[3][1]
    assert ollama_store.sha256(PARAMS) == PUBLISHED[4][1]
    digests = [f"sha256:{digest}" for _, digest, _ in PUBLISHED]
    config = {**ollama_store.CONFIG, "rootfs": {"type": "layers", "diff_ids": digests}}
    assert ollama_store.sha256(ollama_store.compact(config) + b"\n") == PUBLISHED_CONFIG


def test_a_manifest_keeps_its_bytes() -> None:
    """Spaces and unknown keys are part of what a model is known by."""
    raw = json.dumps(json.loads(published().raw) | {"later": [1]}, indent=3).encode()
    found = Manifest.read(raw, "it")
    assert found.raw == raw
    assert found.layers == published().layers
    assert found.digest == ollama_store.sha256(raw)


BAD_DIGESTS = {
    "63": "sha256:" + "a" * 63, "65": "sha256:" + "a" * 65, "none": "sha256:", "upper": "sha256:" + "A" * 64,
    "up": "sha256:../../x", "absolute": "/etc/passwd", "sha512": "sha512:" + "a" * 64,
    "nul": "sha256:" + "a" * 63 + "\0",
    "percent": "sha256:%2e%2e%2f" + "a" * 55, "newline": "sha256:" + "a" * 64 + "\n", "dash": "sha256-" + "a" * 64,
}  # fmt: skip


@pytest.mark.parametrize("digest", BAD_DIGESTS.values(), ids=BAD_DIGESTS)
@pytest.mark.parametrize("where", ["config", "layer"])
def test_a1_a_digest_that_is_none_is_refused(digest: str, where: str) -> None:
    content = json.loads(published().raw)
    (content["config"] if where == "config" else content["layers"][0])["digest"] = digest
    with pytest.raises(UserError, match="came as a digest"):
        Manifest.read(json.dumps(content).encode(), "it")


def bad_manifests() -> Iterator[tuple[str, bytes]]:
    good = json.loads(published().raw)
    yield "gzip bomb", gzip.compress(bytes(10**6))
    yield "no JSON", b"{"
    yield "no UTF-8", b"\xff\xfe{}"
    yield "UTF-16", json.dumps(good).encode("utf-16")
    yield "deep", b'{"schemaVersion":2,"layers":' + b"[" * 100_000
    yield "too long", published().raw + b" " * 5 * 2**20
    yield "list", b"[]"
    yield "version 1", json.dumps(good | {"schemaVersion": 1}).encode()
    yield "10^6 layers", b'{"schemaVersion":2,"layers":[' + b"0," * 10**6 + b"0]}"
    yield "too many layers", json.dumps(good | {"layers": good["layers"][:1] * (MAX_LAYERS + 1)}).encode()
    for name, change in {
        "no config": {"config": None}, "no layers": {"layers": None}, "layer of text": {"layers": ["x"]},
        "huge number": {"config": good["config"] | {"size": 10**30}},
        "negative": {"config": good["config"] | {"size": -1}},
        "truth": {"config": good["config"] | {"size": True}}, "text": {"config": good["config"] | {"size": "1"}},
        "no type": {"config": good["config"] | {"mediaType": None}},
    }.items():  # fmt: skip
        yield name, json.dumps(good | change).encode()


@pytest.mark.parametrize("raw", [raw for _, raw in bad_manifests()], ids=[name for name, _ in bad_manifests()])
def test_a5_a_bad_manifest_is_refused_and_left_alone(places: Path, raw: bytes) -> None:
    with pytest.raises(UserError, match="no manifest"):
        Manifest.read(raw, "it")
    root = places / "ollama"
    small(root)
    bad = root / "manifests" / "registry.ollama.ai" / "library" / "llava" / "bad"
    bad.write_bytes(raw)
    before = ollama_store.tree(root)
    shelf = store.installed()
    assert [each.title for each in shelf.models if each.place == "Ollama"] == ["llava:7b"]
    assert [str(bad) in each.message for each in shelf.broken] == [True]
    with pytest.raises(UserError, match="no manifest"):
        store.find("llava:bad")
    assert ollama_store.tree(root) == before


# --- blobs ------------------------------------------------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    return f"sha256:{ollama_store.sha256(data)}"


def test_a_blob_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    layer = blobs.put(iter([b"one", b"two"]), "text")
    assert layer == Layer("text", digest_of(b"onetwo"), 6)
    assert blobs.has(layer)
    assert blobs.read(layer, 6) == b"onetwo"
    assert blobs.path(layer).stat().st_mode & 0o777 == 0o644
    wanted = digest_of(b"three")
    with pytest.raises(UserError, match="digest mismatch"):
        blobs.put([b"thr33"], "text", digest=wanted)

    def until_full() -> Iterator[bytes]:
        yield b"th"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blobs.put(until_full(), "text", digest=wanted)
    assert [each.name for each in (tmp_path / "blobs").iterdir()] == [layer.file_name]


def test_i_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system refuses the bytes in the same place."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from pumice import UserError\n"
        "from pumice.store.blobs import Blobs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: Blobs(Path(sys.argv[1])).put([bytes(700), bytes(700)], 'text')\n"
        "except UserError as error: print(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert os.strerror(errno.EFBIG) in done.stdout
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a3_a_blob_of_other_bytes_is_not_read(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    layer = blobs.put([b"text"], "text")
    for data, why in ((b"tex", "other bytes"), (b"text!", "other bytes"), (b"TEXT", "other bytes")):
        blobs.path(layer).write_bytes(data)
        with pytest.raises(UserError, match=why):
            blobs.read(layer, 100)
    with pytest.raises(UserError, match="4 bytes"):
        blobs.read(layer, 3)
    blobs.path(layer).unlink()
    with pytest.raises(UserError, match="No such file"):
        blobs.read(layer, 100)
    os.mkfifo(blobs.path(layer))
    with pytest.raises(UserError, match="regular file"):
        blobs.read(layer, 100)


def test_a4_a_symlink_at_a_blobs_name_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"text")
    blobs = Blobs(tmp_path / "store")
    layer = Layer("text", digest_of(b"text"), 4)
    (tmp_path / "store" / "blobs").mkdir(parents=True)
    blobs.path(layer).symlink_to(outside)
    assert not blobs.has(layer)
    with pytest.raises(UserError, match="symbolic links"):
        blobs.read(layer, 100)
    assert blobs.put([b"text"], "text") == layer
    assert not blobs.path(layer).is_symlink()
    blobs.path(layer).unlink()
    blobs.path(layer).symlink_to(outside)
    blobs.path(layer).unlink()
    (tmp_path / "store" / "blobs" / layer.file_name).symlink_to(tmp_path / "nothing")
    blobs.take(outside, layer)
    assert blobs.has(layer)
    assert not (tmp_path / "nothing").exists()
    assert outside.read_bytes() == b"text"


@pytest.mark.parametrize("may_link", [True, False])
def test_a_file_becomes_a_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_link: bool) -> None:
    if not may_link:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EXDEV, "other disk")))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    blobs, layer = Blobs(tmp_path / "store"), Layer("model", digest_of(b"weights"), 7)
    blobs.take(path, layer)
    assert blobs.read(layer, 7) == b"weights"
    assert blobs.path(layer).samefile(path) is may_link
    with pytest.raises(UserError, match="other bytes"):
        blobs.take(path, Layer("model", digest_of(b"other"), 5))


# --- the own store ----------------------------------------------------------------------------------------------------


def put(own: OwnStore, name: str, *texts: bytes) -> Name:
    config = own.blobs.put([b"{}\n"], CONFIG_TYPE)
    layers = [own.blobs.put([each], f"{ROLE_TYPE}license") for each in texts]
    return own.write(Name.parse(name), Manifest.of(config, layers))


def whole(own: OwnStore) -> list[str]:
    """The names of the models, each of which is complete, to the byte."""
    models, broken = own.models()
    assert not broken
    for each in models:
        for layer in each.manifest.blobs:
            own.blobs.read(layer, layer.size)
    return [each.title for each in models]


def texts_of(own: OwnStore) -> set[bytes]:
    return {path.read_bytes() for path in own.blobs.folder.iterdir() if not path.name.startswith(".")}


def test_blobs_go_with_the_last_model_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumice.store.layout.YOUNG_S", 0.0)
    own = OwnStore(tmp_path / "own")
    assert own.remove(Name.parse("x")) is None
    assert not own.root.exists()
    put(own, "Shared", b"both", b"first")
    assert str(put(own, "shared:OLD", b"both", b"second")) == "shared:OLD"
    assert str(put(own, "SHARED", b"both", b"third")) == "Shared:latest"
    assert sorted(whole(own)) == ["Shared:latest", "shared:OLD"]
    assert texts_of(own) == {b"{}\n", b"both", b"second", b"third"}
    assert str(own.remove(Name.parse("shared:old"))) == "shared:OLD"
    assert texts_of(own) == {b"{}\n", b"both", b"third"}
    broken = own.root / "manifests" / "h" / "n" / "m" / "t"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    own.remove(Name.parse("shared"))
    assert texts_of(own) == {b"{}\n", b"both", b"third"}, "the broken manifest may need them"
    own.remove(Name.parse("h/n/m:t"))
    assert list((own.root / "manifests").iterdir()) == []


def test_a2_a_name_is_not_given_to_blobs_that_are_not_there(tmp_path: Path) -> None:
    own = OwnStore(tmp_path)
    manifest = Manifest.of(own.blobs.put([b"{}"], CONFIG_TYPE), [Layer("x", digest_of(b"missing"), 7)])
    with pytest.raises(UserError, match="lacks the blob"):
        own.write(Name.parse("x"), manifest)
    assert own.models() == ([], [])


def test_a_name_too_long_for_the_disk_is_an_error(tmp_path: Path) -> None:
    own = OwnStore(tmp_path)
    with pytest.raises(UserError, match="File name too long"):
        put(own, f"{'h' * 300}/n/m", b"x")
    assert own.models() == ([], [])


def script(body: str, root: Path, *words: str) -> subprocess.Popen[bytes]:
    head = (
        "import random, sys, time; from pathlib import Path; from pumice import UserError\n"
        "from pumice.store.layout import OwnStore; from pumice.store.manifest import Layer, Manifest\n"
        "from pumice.store.names import Name; own = OwnStore(Path(sys.argv[1]))\n"
        "def put(name, *texts):\n"
        "    layers = [own.blobs.put([text], 'text') for text in (b'{}', *texts)]\n"
        "    own.write(Name.parse(name), Manifest.of(layers[0], layers[1:]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", head + body, str(root), *words], stdout=subprocess.PIPE)


def test_a10_two_processes_write_and_remove_at_once(tmp_path: Path) -> None:
    body = (
        "for number in range(25):\n"
        "    try:\n"
        "        put('shared', b'common', b'%d' % (number % 3))\n"
        "        put(sys.argv[2], b'common', sys.argv[2].encode(), b'%d' % (number % 3))\n"
        "        if number % 4 == 1: own.remove(Name.parse('shared'))\n"
        "    except UserError as error: assert 'lacks the blob' in str(error), error\n"
        "put(sys.argv[2], b'last', sys.argv[2].encode())\n"
    )
    processes = [script(body, tmp_path, name) for name in ("one", "two")]
    assert [each.wait(120) for each in processes] == [0, 0]
    for each in processes:
        each.communicate()
    own = OwnStore(tmp_path)
    assert {"one:latest", "two:latest"} <= set(whole(own)) <= {"one:latest", "two:latest", "shared:latest"}
    own.remove(Name.parse("shared"))
    own.blobs.put([b"sweeps"], "text")
    assert {b"last", b"one", b"two", b"{}"} <= texts_of(own)
    assert not [path for path in own.blobs.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("seed", range(5))
def test_a10_a_process_that_is_killed_leaves_a_whole_store(tmp_path: Path, seed: int) -> None:
    body = (
        "print('ready', flush=True)\n"
        "while True:\n"
        "    put(f'm{random.randrange(3)}', b'common', b'%d' % random.randrange(9), bytes(300_000))\n"
        "    own.remove(Name.parse(f'm{random.randrange(3)}'))\n"
    )
    process = script(body, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.05 + 0.04 * seed)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    own = OwnStore(tmp_path)
    whole(own)
    put(own, "after", b"text")
    assert "after:latest" in whole(own)
    assert not [path for path in own.blobs.folder.iterdir() if path.name.startswith(".")]


def test_a_file_that_is_being_written_is_not_swept_away(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)

    def slowly() -> Iterator[bytes]:
        yield b"a"
        blobs.put([b"meanwhile"], "text")
        (tmp_path / "blobs" / ".left.part").write_bytes(b"of a process that is gone")
        blobs.put([b"again"], "text")
        yield b"b"

    assert blobs.has(blobs.put(slowly(), "text"))
    assert sorted(path.read_bytes() for path in blobs.folder.iterdir()) == [b"ab", b"again", b"meanwhile"]
