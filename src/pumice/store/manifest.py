"""Manifests: the list of files that a model is made of, each by the digest of its bytes.

A model is known by the SHA-256 of its manifest's bytes, so these are kept as they came and never written anew. Facts:
Ollama's manifest/manifest.go and layer.go; the media types are those that its registry serves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pumice.errors import UserError, shortened

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
ROLE_TYPE = "application/vnd.ollama.image."
"""In front of a layer's role: model, projector, adapter, template, system, params, messages, license."""

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_LAYERS = 1000
MAX_BLOB_BYTES = 2**50
"""Above every model; a size beyond it is a lie."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Layer:
    """A blob of a model: what it is for, the digest of its bytes, and how many they are."""

    media_type: str
    digest: str
    size: int
    origin: str = ""
    """The model that a layer was taken from, where a manifest says so; Ollama's `from`."""

    def __post_init__(self) -> None:
        """Raises UserError for what is no digest: one becomes the name of a file."""
        if not _DIGEST.fullmatch(self.digest):
            raise UserError(
                f"{shortened(self.digest)} came as a digest; sha256: and 64 digits of 0-9 and a-f were expected",
                hint="the manifest is damaged or hostile; get the model from elsewhere",
            )

    @property
    def role(self) -> str:
        """model, projector, template…; the old name of a template is told as the new one. Empty for the config, and
        for a media type that is not Ollama's."""
        role = self.media_type.removeprefix(ROLE_TYPE)
        return "" if role == self.media_type else {"prompt": "template"}.get(role, role)

    @property
    def file_name(self) -> str:
        """Of the blob: a dash where the digest has a colon."""
        return self.digest.replace(":", "-")


@dataclass(frozen=True)
class Manifest:
    """The bytes of a manifest, and what they say."""

    raw: bytes
    config: Layer
    layers: tuple[Layer, ...]

    @classmethod
    def read(cls, raw: bytes, source: str) -> Manifest:
        """`raw` as it came from a file or a registry; `source` says in errors where that was.

        Raises UserError: more bytes or layers than any model has, no JSON, keys that are missing or of another kind, a
        digest that is none.
        """
        if len(raw) > MAX_MANIFEST_BYTES:
            raise _wrong(source, f"it has more than {MAX_MANIFEST_BYTES >> 20} MiB")
        try:
            found = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _wrong(source, "it is no JSON") from error
        if not isinstance(found, dict) or found.get("schemaVersion") != 2:
            raise _wrong(source, "it is no object with a schemaVersion of 2")
        layers = found.get("layers")
        if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
            raise _wrong(source, f"its layers are no list of up to {MAX_LAYERS}")
        return cls(raw, _layer(found.get("config"), source), tuple(_layer(each, source) for each in layers))

    @classmethod
    def of(cls, config: Layer, layers: Iterable[Layer]) -> Manifest:
        """A new manifest, in the bytes that Ollama would write: its order of keys, no spaces, no newline."""
        every = tuple(layers)
        content = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _written(config),
            "layers": [_written(each) for each in every],
        }
        return cls(json.dumps(content, separators=(",", ":")).encode("ascii"), config, every)

    @property
    def digest(self) -> str:
        """64 hexadecimal digits, by which Ollama knows the model; its `list` shows the first twelve."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """The layers and the config."""
        return *self.layers, self.config

    @property
    def size(self) -> int:
        """Bytes of all blobs together."""
        return sum(each.size for each in self.blobs)

    def role(self, role: str) -> list[Layer]:
        """The layers of one role, in their order."""
        return [each for each in self.layers if each.role == role]


def _layer(value: object, source: str) -> Layer:
    if not isinstance(value, dict):
        raise _wrong(source, "a layer or the config is no object")
    media_type, digest, size = (value.get(key) for key in ("mediaType", "digest", "size"))
    if not isinstance(media_type, str) or not isinstance(digest, str):
        raise _wrong(source, "a layer has no mediaType or no digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB_BYTES:
        raise _wrong(source, f"a layer's size is {shortened(str(size))}, no number of bytes")
    origin = value.get("from")
    return Layer(media_type, digest, size, origin if isinstance(origin, str) else "")


def _written(layer: Layer) -> dict[str, object]:
    origin = {"from": layer.origin} if layer.origin else {}
    return {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size, **origin}


def _wrong(source: str, why: str) -> UserError:
    return UserError(f"{source} is no manifest: {why}", hint="it is damaged or hostile; get the model again")
