"""A store as Ollama lays it out, written from the description of its format and without pumice's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

TYPE = "application/vnd.ollama.image."
CONFIG = {
    "model_format": "gguf", "model_family": "llama", "model_families": ["llama", "clip"], "model_type": "7B",
    "file_type": "Q4_0", "architecture": "amd64", "os": "linux",
}  # fmt: skip
LLAVA = "registry.ollama.ai/library/llava/7b"
TEMPLATE = b"[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]"
PARAMS = b'{"stop":["[INST]","[/INST]"]}\n'
"""Of llava:latest in Ollama's library."""


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(root: Path, data: bytes) -> dict[str, object]:
    digest = sha256(data)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def install(root: Path, path: str, layers: Iterable[tuple[str, bytes]], config: dict[str, object] | None = None) -> str:
    """Write a model under `manifests/path` and return the digest of its manifest."""
    written = [{"mediaType": TYPE + role, **blob(root, data)} for role, data in layers]
    rootfs = {"type": "layers", "diff_ids": [each["digest"] for each in written]}
    config_blob = blob(root, compact({**(config or CONFIG), "rootfs": rootfs}) + b"\n")
    manifest = compact({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **config_blob},
        "layers": written,
    })  # fmt: skip
    place = root / "manifests" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(manifest)
    return sha256(manifest)


def small(root: Path, path: str = LLAVA, *licenses: bytes) -> str:
    """A model of no real weights."""
    return install(root, path, [("model", b"GGUF" + bytes(60)), *(("license", each) for each in licenses)])


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder: its mode, and its bytes or where it leads."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode,
            str(path.readlink()) if path.is_symlink() else sha256(path.read_bytes()) if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }
