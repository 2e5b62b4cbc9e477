"""Pushing to a real registry, Debian's docker-registry, and pulling from it what was pushed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pumice.errors import UserError
from pumice.store import registry, transfer
from pumice.store.layout import OwnStore
from pumice.store.link import Reach
from pumice.store.manifest import CONFIG_TYPE, ROLE_TYPE, Manifest
from pumice.store.names import Name
from pumice.store.transfer import Shelves

HERE = Reach(plain=True, inner=True)
CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: 127.0.0.1:{port}}}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a registry that runs."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed here: apt-get install docker-registry")
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.yml").write_text(CONFIG.format(root=folder / "data", port=port))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail((folder / "log").read_text())
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def made(store: OwnStore, name: Name, weights: bytes) -> Manifest:
    layers = [
        store.blobs.put([data], ROLE_TYPE + role)
        for role, data in {"model": weights, "template": b"{{ .Prompt }}", "params": b'{"stop":["x"]}\n'}.items()
    ]
    manifest = Manifest.of(store.blobs.put([b'{"model_format":"gguf"}'], CONFIG_TYPE), layers)
    store.write(name, manifest)
    return manifest


def test_what_is_pushed_is_pulled_with_the_same_digest(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CHUNK_BYTES", 1_000_000)
    name = Name.parse(f"{host}/me/tiny:q4")
    mine, theirs = OwnStore(tmp_path / "mine"), OwnStore(tmp_path / "theirs")
    weights = random.Random(1).randbytes(3_500_000)
    manifest = made(mine, name, weights)
    stored = mine.find(name)
    assert stored is not None

    steps = list(transfer.push(stored, name, HERE))
    pushed = [f"pushing {each.digest[7:19]}" for each in manifest.blobs]
    assert list(dict.fromkeys(step.status for step in steps)) == [
        "retrieving manifest", *pushed, "pushing manifest", "success",
    ]  # fmt: skip
    sent = [step.completed for step in steps if step.status == pushed[0]]
    assert sent == [None, 1_000_000, 2_000_000, 3_000_000, 3_500_000, 3_500_000]

    list(transfer.pull(name, Shelves(theirs), HERE))
    pulled = theirs.find(name)
    assert pulled is not None
    assert pulled.digest == stored.digest == manifest.digest
    assert pulled.manifest.raw == manifest.raw
    assert theirs.blobs.path(manifest.layers[0]).read_bytes() == weights

    # What is there is not sent again.
    again = [step.completed for step in transfer.push(stored, name, HERE) if step.status == pushed[0]]
    assert again == [None, 3_500_000]


def test_a_chunk_that_breaks_off_is_sent_again_from_where_the_registry_has_it(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CHUNK_BYTES", 100_000)
    name = Name.parse(f"{host}/me/broken")
    store = OwnStore(tmp_path / "mine")
    layer = made(store, name, random.Random(2).randbytes(450_000)).layers[0]
    with registry.Registry(name, HERE) as there:
        real, calls = there._link.open, iter(range(10**6))

        def unlucky(target: registry.Target) -> object:
            if target.verb == "PATCH" and next(calls) == 2:
                raise registry.Unreachable("the wire was cut", hint="")
            return real(target)

        monkeypatch.setattr(there._link, "open", unlucky)
        assert list(there.upload(layer, store.blobs.path(layer))) == [
            100_000, 200_000, 200_000, 300_000, 400_000, 450_000,
        ]  # fmt: skip
        assert there.has(layer)


def test_a_file_that_becomes_shorter_ends_the_push(host: str, tmp_path: Path) -> None:
    name, store = Name.parse(f"{host}/me/shorter"), OwnStore(tmp_path / "mine")
    layer = made(store, name, bytes(450_000)).layers[0]
    os.truncate(store.blobs.path(layer), 300_000)
    with registry.Registry(name, HERE) as there, pytest.raises(UserError, match="became shorter"):
        list(there.upload(layer, store.blobs.path(layer)))


def command(home: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PUMICE_HOME": str(home), "OLLAMA_MODELS": str(home / "none"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pumice", *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_verbs(host: str, tmp_path: Path) -> None:
    name = f"{host}/me/verbs:q4"
    manifest = made(OwnStore(tmp_path / "a" / "models"), Name.parse(name), b"w" * 1_000_000)
    refused = command(tmp_path / "a", "push", name)
    assert "insecure" in refused.communicate()[1]
    assert refused.returncode == 1
    pushing = command(tmp_path / "a", "push", name, "--insecure")
    out, err = pushing.communicate()
    assert (pushing.returncode, out) == (0, "")
    assert err.splitlines()[-1] == "success"
    pulling = command(tmp_path / "b", "pull", name, "--insecure")
    out, err = pulling.communicate()
    assert (pulling.returncode, out) == (0, "")
    assert err.splitlines() == [
        "pulling manifest",
        *(f"pulling {each.digest[7:19]} ({each.size / 1e6:.1f} MB)" for each in manifest.blobs),
        "verifying sha256 digest", "writing manifest", "removing unused layers", "success",
    ]  # fmt: skip
    found = OwnStore(tmp_path / "b" / "models").find(Name.parse(name))
    assert found is not None
    assert found.digest == manifest.digest
    missing = command(tmp_path / "b", "pull", f"{host}/me/nothing", "--insecure")
    assert missing.communicate()[1].startswith("pulling manifest\nError: pull model manifest: file does not exist\n")
    assert missing.returncode == 1


def test_ctrl_c_leaves_what_came(tmp_path: Path) -> None:
    from wires import Fake, serving

    with serving(Fake(pause_s=0.5)) as fake:
        fake.model(random.Random(3).randbytes(5_000_000), b"{}")
        stopped = command(tmp_path, "pull", f"{fake.host}/me/slow", "--insecure")
        while not any((tmp_path / "models" / "blobs").glob("*-partial-0")):
            time.sleep(0.05)
        time.sleep(0.5)
        stopped.send_signal(signal.SIGINT)
        stopped.communicate(timeout=120)
        assert stopped.returncode == 130
        (kept,) = (tmp_path / "models" / "blobs").glob("*-partial-0")
        done = json.loads(kept.read_text())["Completed"]
        assert 0 < done < 5_000_000
        fake.pause_s = 0
        going_on = command(tmp_path, "pull", f"{fake.host}/me/slow", "--insecure")
        assert going_on.communicate()[1].endswith("success\n")
        assert [headers["Range"] for _, _, headers in fake.asked if "Range" in headers] == [f"bytes={done}-4999999"]
