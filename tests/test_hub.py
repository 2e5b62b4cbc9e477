"""Pulling from the Hub: a server on this machine that speaks the part of its API that huggingface_hub uses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from pumice.store.hub_cache import wanted
from wires import Fake, Handler, send, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "llava-hf/tiny"
FILES = {
    "config.json": b'{"model_type":"llava"}',
    "model.safetensors": bytes(3_000_000),
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "README.md": b"# no",
    "images/cat.json": b"{}",
    ".gitattributes": b"",
}


def hub(files: dict[str, bytes], repository: str = REPOSITORY) -> Fake:
    """A Hub with one repository."""

    def fault(handler: Handler, of: Fake) -> bool:
        path = unquote(handler.path.partition("?")[0])
        described = [
            {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        if path.startswith(f"/api/models/{repository}/tree/"):
            send(handler, 200, json.dumps(described).encode())
        elif path.startswith(f"/api/models/{repository}"):
            send(handler, 200, json.dumps({"id": repository, "sha": COMMIT, "siblings": described}).encode())
        elif path.startswith(f"/{repository}/resolve/") and (name := path.split("/", 5)[5]) in files:
            data, first = files[name], 0
            if "Range" in handler.headers:
                first = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
            about = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
            if first:
                about["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            send(handler, 206 if first else 200, data[first:], about, pause_s=of.pause_s)
        else:
            send(handler, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        return True

    return Fake(fault=fault)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(hub(FILES)) as running:
        yield running


def pumice(url: str, home: Path, name: str = REPOSITORY) -> subprocess.Popen[str]:
    """`pumice pull` in a process of its own: huggingface_hub reads its settings when it is imported."""
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "PUMICE_HOME": str(home / "own"), "HF_TOKEN": "",
        "OLLAMA_MODELS": str(home / "none"),
    }  # fmt: skip
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(variable, None)
    return subprocess.Popen(
        [sys.executable, "-m", "pumice", "pull", name],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate()
    assert process.returncode == 0, err


def snapshot(home: Path) -> Path:
    return home / "hub" / "models--llava-hf--tiny" / "snapshots" / COMMIT


def test_a_pull_brings_what_pumice_reads_and_a_second_one_nothing(fake: Fake, tmp_path: Path) -> None:
    process = pumice(fake.url, tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, ""), err
    assert err.splitlines() == [
        "pulling manifest", "pulling config.json (0.0 MB)", "pulling model.safetensors (3.0 MB)",
        "pulling tokenizer.json (0.0 MB)", "pulling tokenizer.model (0.0 MB)", "success",
    ]  # fmt: skip
    read = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert {each.name: each.read_bytes() for each in snapshot(tmp_path).iterdir()} == {
        each: FILES[each] for each in read
    }
    assert (tmp_path / "hub" / "models--llava-hf--tiny" / "refs" / "main").read_text() == COMMIT
    assert all(REPOSITORY in path and "torch/" not in str(headers) for _, path, headers in fake.asked)

    fake.asked.clear()
    ended(pumice(fake.url, tmp_path))
    assert not [path for verb, path, _ in fake.asked if verb == "GET" and "/resolve/" in path]


def test_without_the_hub_what_is_whole_is_a_success(fake: Fake, tmp_path: Path) -> None:
    ended(pumice(fake.url, tmp_path))
    gone = "http://127.0.0.1:9"
    process = pumice(gone, tmp_path)
    assert process.communicate()[1].splitlines()[-1] == "success"
    (snapshot(tmp_path) / "model.safetensors").unlink()
    process = pumice(gone, tmp_path)
    err = process.communicate()[1]
    assert process.returncode == 1
    assert "Error: the Hub cannot be reached, and 'llava-hf/tiny' is not here whole" in err


def test_a_killed_pull_begins_anew_with_the_file_it_was_at_and_keeps_those_before(fake: Fake, tmp_path: Path) -> None:
    # huggingface_hub writes in stretches of 10 MB, so what has come is not seen on the disk: the server knows.
    fake.pause_s = 0.1
    process = pumice(fake.url, tmp_path)
    while not weights_asked(fake):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (snapshot(tmp_path) / "model.safetensors").exists()
    fake.pause_s = 0
    fake.asked.clear()
    ended(pumice(fake.url, tmp_path))
    got = [path.rpartition("/")[2] for verb, path, _ in fake.asked if verb == "GET" and "/resolve/" in path]
    assert "config.json" not in got
    assert "model.safetensors" in got
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def weights_asked(fake: Fake) -> bool:
    return any(verb == "GET" and path.endswith("model.safetensors") for verb, path, _ in list(fake.asked))


PARTS = {
    "modules.json": b"[]", "config.json": b"{}", "model.safetensors": bytes(9), "tokenizer.json": b"{}",
    "vocab.txt": b"a", "1_Pooling/config.json": b"{}", "2_Dense/model.safetensors": bytes(9),
    "2_Dense/pytorch_model.bin": b"pickle", "pytorch_model.bin": b"pickle", "onnx/config.json": b"{}",
    "onnx/model.onnx": b"", "train_script.py": b"", "README.md": b"",
}  # fmt: skip


def test_an_embedding_model_comes_with_its_parts_by_ollamas_name(tmp_path: Path) -> None:
    repository = "sentence-transformers/all-MiniLM-L6-v2"
    here = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    with serving(hub(PARTS, repository)) as fake:
        ended(pumice(fake.url, tmp_path, "all-minilm"))
    assert sorted(str(each.relative_to(here)) for each in here.rglob("*") if each.is_file()) == [
        "1_Pooling/config.json", "2_Dense/model.safetensors", "config.json", "model.safetensors", "modules.json",
        "tokenizer.json", "vocab.txt",
    ]  # fmt: skip
    gone = "http://127.0.0.1:9"
    ended(pumice(gone, tmp_path, "all-minilm"))
    (here / "1_Pooling" / "config.json").unlink()
    assert "is not here whole" in pumice(gone, tmp_path, "all-minilm").communicate()[1]


def test_a_repository_that_is_not_there(fake: Fake, tmp_path: Path) -> None:
    process = pumice(fake.url, tmp_path, "llava-hf/nothing")
    err = process.communicate()[1]
    assert process.returncode == 1
    assert "Error: the Hub has no model 'llava-hf/nothing', or not for you" in err


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
             "model.safetensors.index.json", "mm_projector.bin", "chat_template.jinja", "x.py", "a/config.json"],
            ["chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "mm_projector.bin", "optimizer.bin"],
            ["mm_projector.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ),
        (
            ["adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin", "adapter_config.json"],
            ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"],
        ),
        (["model.gguf", "README.md"], []),
    ],
)  # fmt: skip
def test_no_pickle_where_safetensors_say_the_same(names: list[str], expected: list[str]) -> None:
    assert wanted(names) == expected
