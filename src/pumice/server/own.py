"""What is pumice's own: what a model sees of an image, and what the page must know of the server."""

from __future__ import annotations

import base64
import importlib.metadata
import io
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pumice.server.bodies import aside, read
from pumice.server.documents import body
from pumice.server.library import required
from pumice.server.ollama import pictures
from pumice.server.residents import Residents, named
from pumice.server.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from pumice.model import Model


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """POST /pumice/see and GET /pumice/info."""
    router = APIRouter(tags=["pumice"])

    @router.get("/pumice/info")
    async def info() -> Response:
        """The version, and whether the server is offline."""
        return JSONResponse({"version": importlib.metadata.version("pumice"), "offline": settings.offline})

    @router.post("/pumice/see", openapi_extra=body("SeeRequest"))
    async def see(request: Request) -> Response:
        """What a model really sees of images: for each the whole view, then its tiles row by row, and how many tokens
        it takes."""
        fields = await read(request, "SeeRequest")
        name, most = required(fields), fields.whole("image_tokens")
        images = await aside(fields.size, lambda: pictures(fields, settings))
        async with residents.use(name, named(name)) as resident, resident.turn:
            model = resident.model
            return JSONResponse({"images": await residents.read(lambda: _seen(model, images, most))})

    return router


def _seen(model: Model, images: tuple[bytes, ...], most: int | None) -> list[dict[str, Any]]:
    from pumice.question import Question

    question = Question("", images, image_tokens=most)
    prepared, views = model.see(question).images, model.views(question)
    return [
        {
            "width": image.size[1],
            "height": image.size[0],
            "tokens": image.grid.tokens,
            "rows": image.grid.rows,
            "columns": image.grid.columns,
            "views": list(map(_png, pictures)),
        }
        for image, pictures in zip(prepared, views)
    ]


def _png(picture: Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
