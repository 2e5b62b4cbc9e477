"""Embeddings in both APIs: by an embedding model (`sentences.py`); or of texts and images by a LLaVA itself
(`Model.embed`, `Model.embed_images`). The answer says which."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from pumice.durations import keep_alive
from pumice.server.bodies import aside, read
from pumice.server.documents import body
from pumice.server.library import required
from pumice.server.loaded import Embedder
from pumice.server.ollama import pictures
from pumice.server.residents import Residents
from pumice.server.settings import Settings
from pumice.server.streams import unless_gone
from pumice.server.wire import Fields, Json, Refused

if TYPE_CHECKING:
    from pumice.model import Model
    from pumice.sentences import SentenceModel

MOST_TEXTS = 2048
"""Of one request; OpenAI's number."""
OF_LLAVA = MappingProxyType({
    "texts": "mean of the language model's last hidden states",
    "images": "mean of the features that the language model gets; not comparable with texts",
})  # fmt: skip
"""What the vectors of a model that answers are."""
OF_EMBEDDER = MappingProxyType({"texts": "an embedding model's, by sentence-transformers"})
"""What the vectors of an embedding model are."""


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """POST /api/embed, /api/embeddings and /v1/embeddings."""
    router = APIRouter(tags=["embeddings"])

    @router.post("/api/embed", openapi_extra=body("EmbedRequest"))
    async def embed(request: Request) -> Response:
        """Vectors of length 1 of texts, and behind them of images."""
        began_s = time.monotonic()
        fields = await read(request, "EmbedRequest")
        images = await aside(fields.size, lambda: pictures(fields, settings))
        found = await _found(residents, request, fields, Wanted(texts_of(fields.any("input")), images, fields))
        told = {
            "model": required(fields),
            "total_duration": int((time.monotonic() - began_s) * 1e9),
            "load_duration": int(found.loaded_s * 1e9),
            "prompt_eval_count": found.tokens,
            "pumice": dict(found.source),
        }
        return Response(_with(told, "embeddings", found.vectors), media_type=Json.media_type)

    @router.post("/api/embeddings", openapi_extra=body("EmbeddingRequest"))
    async def old(request: Request) -> Response:
        """The vector of one text, of whatever length."""
        fields = await read(request, "EmbeddingRequest")
        prompt = fields.text("prompt")
        found = await _found(
            residents, request, fields, Wanted([prompt] if prompt else [], (), fields, normalise=False)
        )
        (vector,) = found.vectors or ["[]"]
        return Response(f'{{"embedding":{vector}}}', media_type=Json.media_type)

    @router.post("/v1/embeddings", openapi_extra=body("EmbeddingsRequest"))
    @router.post("/embeddings", include_in_schema=False)
    async def openai(request: Request) -> Response:
        """Vectors of texts."""
        fields = await read(request, "EmbeddingsRequest")
        packed = _is_packed(fields)
        texts = texts_of(fields.any("input"))
        if not texts:
            raise Refused(400, "invalid input")
        found = await _found(residents, request, fields, Wanted(texts, (), fields, packed=packed))
        data = [
            f'{{"object":"embedding","index":{index},"embedding":{each}}}' for index, each in enumerate(found.vectors)
        ]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        told = {"object": "list", "model": required(fields), "usage": usage}
        return Response(_with(told, "data", data), media_type="application/json")

    return router


class Found(NamedTuple):
    """Vectors as JSON, the tokens of all texts, the seconds until the model was there, and what the vectors are."""

    vectors: list[str]
    tokens: int
    loaded_s: float
    source: Mapping[str, str]


async def _found(residents: Residents, request: Request, fields: Fields, wanted: Wanted) -> Found:
    began_s = time.monotonic()
    keep_ns = keep_alive(fields.any("keep_alive"))

    async def whole() -> Found:
        async with residents.use_for_vectors(required(fields), keep_ns) as resident, resident.turn:
            loaded_s, model = time.monotonic() - began_s, resident.model
            texts, tokens = await residents.compute(lambda: wanted.of(model))
            source = OF_EMBEDDER if isinstance(resident, Embedder) else OF_LLAVA
            return Found(texts, sum(tokens), loaded_s, source)

    return await unless_gone(request, whole())


class Wanted:
    """What is to be embedded, and how."""

    def __init__(
        self,
        texts: Sequence[str],
        images: Sequence[bytes],
        fields: Fields,
        *,
        normalise: bool = True,
        packed: bool = False,
    ) -> None:
        """packed: in base64. Raises Refused."""
        self._texts, self._images, self._normalise, self._packed = texts, images, normalise, packed
        self._truncate = fields.flag("truncate", True)
        self._width = fields.whole("dimensions")
        if self._width is not None and self._width < 1:
            raise Refused(400, f"dimensions is {self._width:.3g}; give a number from 1")

    def of(self, model: Model | SentenceModel) -> tuple[list[str], list[int]]:
        """The vectors as JSON, one after the other: all in one go would keep everybody waiting. Takes a while. Raises
        UserError."""
        found: list[str] = []
        tokens: list[int] = []
        parts = []
        if self._texts:
            parts.append(model.embed(self._texts, truncate=self._truncate, normalise=self._normalise))
        if self._images:
            parts.append(model.embed_images(self._images, normalise=self._normalise))
        for part in parts:
            vectors_ND = part.vectors_ND[:, : self._width]
            if self._width is not None and self._normalise:
                vectors_ND = vectors_ND / vectors_ND.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            found += [self._json(each.tolist()) for each in vectors_ND]
            tokens += part.tokens
        return found, tokens

    def _json(self, vector: Sequence[float]) -> str:
        return f'"{_packed(vector)}"' if self._packed else json.dumps(vector, separators=(",", ":"))


def _with(told: Mapping[str, object], name: str, items: Sequence[str]) -> str:
    """An object and one list more, whose items are JSON already."""
    return f'{json.dumps(told)[:-1]}, "{name}":[{",".join(items)}]}}'


def texts_of(value: Any) -> list[str]:
    """`input`: a text, none where it is empty, or several, whose places count. Raises Refused in Ollama's words."""
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise Refused(400, "invalid input type")
    if len(texts) > MOST_TEXTS:
        raise Refused(400, f"{len(texts)} texts came with the request; {MOST_TEXTS} are taken at most")
    return texts


def _is_packed(fields: Fields) -> bool:
    """Are vectors wanted in base64? Raises Refused in Ollama's words."""
    form = fields.text("encoding_format") or "float"
    if form not in ("float", "base64"):
        words = f"Invalid value for 'encoding_format' = {form[:50]}. Supported values: ['float', 'base64']."
        raise Refused(400, words)
    return form == "base64"


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
