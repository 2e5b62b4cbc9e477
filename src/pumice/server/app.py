"""The server: routes, what happens at its start and its end, and how errors are said."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from pumice import store
from pumice.errors import UserError
from pumice.server import library, making, ollama, openai, own, vectors
from pumice.server.guard import Guard
from pumice.server.logs import AccessLog
from pumice.server.metrics import CONTENT_TYPE
from pumice.server.residents import Residents
from pumice.server.settings import Settings
from pumice.server.static import add_page
from pumice.server.streams import error_object, status_of
from pumice.server.wire import Json, Refused, is_openai


def application(settings: Settings) -> ASGIApp:
    """The whole server: the routes, who may ask them, and a line in the log for each request."""
    return AccessLog(Guard(create_app(settings), settings))


def create_app(settings: Settings) -> FastAPI:
    """The routes."""
    residents = Residents(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(residents.watch())
        if settings.prunes:
            threading.Thread(target=_prune, name="pruning", daemon=True).start()
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await residents.close()

    app = FastAPI(title="pumice", lifespan=lifespan, redirect_slashes=False)
    app.state.residents = residents
    app.include_router(ollama.routes(residents, settings))
    app.include_router(library.routes(residents, settings))
    app.include_router(openai.routes(residents, settings))
    app.include_router(own.routes(residents, settings))

    app.include_router(making.routes(residents, settings))
    app.include_router(vectors.routes(residents, settings))
    add_page(app)

    @app.get("/health", tags=["operations"])
    async def health() -> Response:
        """200 while answers come; 503 when work has waited too long without a step."""
        stuck = [each.installed.title for each in residents.all if each.silent_s > settings.stuck_s]
        if stuck:
            return JSONResponse({"status": "stuck", "models": stuck}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", tags=["operations"])
    async def counts() -> Response:
        """For Prometheus."""
        return Response(residents.metrics.text(), media_type=CONTENT_TYPE)

    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    @app.exception_handler(UserError)
    async def refused(request: Request, error: Refused | UserError) -> Response:
        return envelope(request, *status_of(error))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        """A bug of ours; uvicorn writes it into the log."""
        return envelope(request, 500, f"the server failed: {type(error).__name__}; its log says more")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> Response:
        words = {404: "404 page not found", 405: "405 method not allowed"}
        return PlainTextResponse(words.get(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return envelope(request, 400, str(error.errors()[:1])[:300])


def _prune() -> None:
    own = store.own_store()
    if own.root.is_dir():
        try:
            own.prune()
        except UserError as error:
            logging.getLogger("pumice").warning("the store was not pruned: %s", error)


def envelope(request: Request, status: int, message: str) -> Response:
    """An error in the form of the API that was asked."""
    if is_openai(request.url.path):
        return JSONResponse({"error": error_object(status, message)}, status)
    return Json({"error": message}, status)
