"""Ollama's API for models of one's own: files by their digests, and what is made of them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from pumice import store
from pumice.creating.recipe import digest_of
from pumice.server.bodies import read
from pumice.server.documents import body
from pumice.server.library import offline, own_name, required, told
from pumice.server.residents import Residents
from pumice.server.settings import Settings

PIECE = 4 * 2**20


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """HEAD and POST /api/blobs/{digest}, POST /api/create."""
    router = APIRouter(tags=["models"])

    @router.head("/api/blobs/{digest}")
    async def has(digest: str) -> Response:
        """Is a file here?"""
        held = await run_in_threadpool(store.own_store().blobs.held, digest_of(digest))
        return Response(status_code=404 if held is None else 200)

    @router.post("/api/blobs/{digest}", openapi_extra=_FILE)
    async def send(digest: str, request: Request) -> Response:
        """A file, which `create` may then use."""
        wanted, blobs = digest_of(digest), store.own_store().blobs
        if await run_in_threadpool(blobs.held, wanted) is not None:
            return Response()
        with blobs.arriving(wanted) as arrival:
            held = bytearray()
            async for piece in request.stream():
                held += piece
                if len(held) >= PIECE:
                    await run_in_threadpool(arrival.write, bytes(held))
                    held.clear()
            await run_in_threadpool(arrival.write, bytes(held))
        return Response(status_code=201)

    @router.post("/api/create", openapi_extra=body("CreateRequest"))
    async def create(request: Request) -> Response:
        """Make a model."""
        fields = await read(request, "CreateRequest")
        name = own_name(required(fields), "invalid model name")
        from pumice import creating

        own = store.own_store()
        recipe = creating.asked(fields.values, own)
        if settings.offline and recipe.source and store.find(recipe.source) is None:
            raise offline("pull")
        residents.stop(str(name))
        return await told(request, creating.create(name, recipe, own), fields.flag("stream", True))

    return router


_FILE: dict[str, Any] = {
    "requestBody": {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "required": True,
    }
}
