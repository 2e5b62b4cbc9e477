"""Embeddings in both APIs: of texts and images, by the LLaVA itself (`Model.embed`, `Model.embed_images`)."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pumice.durations import keep_alive
from pumice.server.documents import body
from pumice.server.library import required
from pumice.server.ollama import pictures
from pumice.server.residents import Residents, named
from pumice.server.settings import Settings
from pumice.server.streams import unless_gone
from pumice.server.wire import Fields, Refused

if TYPE_CHECKING:
    from pumice.model import Model

MOST_TEXTS = 2048
"""Of one request; OpenAI's number."""
TEXTS_ARE = "mean of the language model's last hidden states"
IMAGES_ARE = "mean of the features that the language model gets; not comparable with texts"


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """POST /api/embed, /api/embeddings and /v1/embeddings."""
    router = APIRouter(tags=["embeddings"])

    async def vectors(request: Request, fields: Fields, wanted: Wanted) -> tuple[list[list[float]], list[int], float]:
        """Vectors, the tokens of each, and the seconds until the model was there."""
        began_s = time.monotonic()
        keep_ns = keep_alive(fields.any("keep_alive"))

        async def whole() -> tuple[list[list[float]], list[int], float]:
            async with residents.use(named(required(fields)), keep_ns) as resident, resident.turn:
                loaded_s, model = time.monotonic() - began_s, resident.model
                return (*await residents.read(lambda: wanted.of(model), slow=True), loaded_s)

        return await unless_gone(request, whole())

    @router.post("/api/embed", openapi_extra=body("EmbedRequest"))
    async def embed(request: Request) -> Response:
        """Vectors of length 1 of texts, and behind them of images."""
        began_s = time.monotonic()
        fields = Fields.read(await request.body(), "EmbedRequest")
        wanted = Wanted(texts_of(fields.any("input")), pictures(fields, settings), fields)
        found, tokens, loaded_s = await vectors(request, fields, wanted)
        counts = {
            "total_duration": int((time.monotonic() - began_s) * 1e9),
            "load_duration": int(loaded_s * 1e9),
            "prompt_eval_count": sum(tokens),
        }
        own = {"texts": TEXTS_ARE, "images": IMAGES_ARE}
        return JSONResponse({"model": required(fields), "embeddings": found, **counts, "pumice": own})

    @router.post("/api/embeddings", openapi_extra=body("EmbeddingRequest"))
    async def old(request: Request) -> Response:
        """The vector of one text, of whatever length."""
        fields = Fields.read(await request.body(), "EmbeddingRequest")
        prompt = fields.text("prompt")
        found, _, _ = await vectors(request, fields, Wanted([prompt] if prompt else [], (), fields, normalise=False))
        return JSONResponse({"embedding": found[0] if found else []})

    @router.post("/v1/embeddings", openapi_extra=body("EmbeddingsRequest"))
    @router.post("/embeddings", include_in_schema=False)
    async def openai(request: Request) -> Response:
        """Vectors of texts."""
        fields = Fields.read(await request.body(), "EmbeddingsRequest")
        form = fields.text("encoding_format") or "float"
        if form not in ("float", "base64"):
            words = f"Invalid value for 'encoding_format' = {form[:50]}. Supported values: ['float', 'base64']."
            raise Refused(400, words)
        texts = texts_of(fields.any("input"))
        if not texts:
            raise Refused(400, "invalid input")
        found, tokens, _ = await vectors(request, fields, Wanted(texts, (), fields))
        data = [
            {"object": "embedding", "index": index, "embedding": _packed(each) if form == "base64" else each}
            for index, each in enumerate(found)
        ]
        usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
        return JSONResponse({"object": "list", "data": data, "model": required(fields), "usage": usage})

    return router


class Wanted:
    """What is to be embedded, and how."""

    def __init__(
        self, texts: Sequence[str], images: Sequence[bytes], fields: Fields, *, normalise: bool = True
    ) -> None:
        """Raises Refused."""
        self._texts, self._images, self._normalise = texts, images, normalise
        self._truncate = fields.flag("truncate", True)
        self._width = fields.whole("dimensions")
        if self._width is not None and self._width < 1:
            raise Refused(400, f"dimensions is {self._width:.3g}; give a number from 1")

    def of(self, model: Model) -> tuple[list[list[float]], list[int]]:
        """Takes a while. Raises UserError."""
        found: list[list[float]] = []
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
            found += vectors_ND.tolist()
            tokens += part.tokens
        return found, tokens


def texts_of(value: Any) -> list[str]:
    """`input`: a text, none where it is empty, or several, whose places count. Raises Refused in Ollama's words."""
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise Refused(400, "invalid input type")
    if len(texts) > MOST_TEXTS:
        raise Refused(400, f"{len(texts)} texts came with the request; {MOST_TEXTS} are taken at most")
    return texts


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
