"""Ollama's API for models: what is there, what is loaded, and bringing, giving, making, copying, removing them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, closing, nullcontext, suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pumice import store
from pumice.errors import UserError
from pumice.server.bodies import read
from pumice.server.documents import body
from pumice.server.loaded import Loaded, listed
from pumice.server.residents import Residents, named
from pumice.server.settings import Address, Settings
from pumice.server.streams import status_of, unless_gone
from pumice.server.wire import NDJSON, Fields, Json, Refused, line, timestamp
from pumice.store import Installed, Name, Stored, facts, model_info
from pumice.store.transfer import Progress

VERSION = "0.12.6"
"""Of Ollama, whose API this is: clients compare it."""
FOREVER_S = 250 * 365.25 * 86400


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """GET /api/version, status, tags and ps, POST /api/show, copy, pull and push, DELETE /api/delete."""
    router = APIRouter(tags=["models"])

    @router.get("/api/version")
    @router.head("/api/version", include_in_schema=False)
    async def version() -> Response:
        """Of Ollama's API, and of pumice."""
        return Json({"version": VERSION, "pumice": importlib.metadata.version("pumice")})

    @router.get("/api/status")
    async def status() -> Response:
        """Of Ollama's cloud, which is never asked."""
        return Json({"cloud": {"disabled": True, "source": "env"}})

    @router.post("/api/me", include_in_schema=False)
    async def account() -> Response:
        """Of ollama.com: there is none here, and nobody is asked."""
        raise Refused(401, "unauthorized")

    @router.post("/api/signout", include_in_schema=False)
    @router.delete("/api/user/keys/{key}", include_in_schema=False)
    async def sign_out() -> Response:
        raise Refused(401, "you are not currently signed in")

    @router.get("/api/tags")
    @router.head("/api/tags", include_in_schema=False)
    async def tags() -> Response:
        """The models on this machine, the newest first."""
        models = await asyncio.to_thread(lambda: [listed(each) for each in store.installed().models])
        return Json({"models": models})

    @router.get("/api/ps")
    async def loaded() -> Response:
        """The models in memory."""
        return Json({"models": [_resident(each) for each in residents.all]})

    @router.post("/api/show", openapi_extra=body("ShowRequest"))
    async def show(request: Request) -> Response:
        """What is known of a model."""
        fields = await read(request, "ShowRequest")
        model = named(required(fields))
        return Json(await asyncio.to_thread(shown, model, fields.flag("verbose")))

    _add_changes(router, residents, settings)
    return router


def _add_changes(router: APIRouter, residents: Residents, settings: Settings) -> None:
    @router.post("/api/copy", openapi_extra=body("CopyRequest"))
    async def copy(request: Request) -> Response:
        """A second name of a model."""
        fields = await read(request, "CopyRequest")
        source, destination = fields.text("source"), fields.text("destination")
        _name(source, f'source "{source:.200}" is invalid')
        name = own_name(destination, f'destination "{destination:.200}" is invalid')
        model = store.find(source)
        if model is None:
            raise Refused(404, f'model "{source:.200}" not found')
        if not isinstance(model, Stored):
            raise Refused(400, f'source "{source:.200}" is a folder; create a model from it instead')
        await asyncio.to_thread(store.own_store().copy, model, name)
        return Response()

    @router.delete("/api/delete", openapi_extra=body("DeleteRequest"))
    async def delete(request: Request) -> Response:
        """Remove a model from pumice's own store."""
        text = required(await read(request, "DeleteRequest"))
        model = named(text)
        if model.place != "pumice":
            raise Refused(400, f"model '{text:.200}' lies in a place that pumice leaves as it is")
        residents.stop(text)
        await asyncio.to_thread(store.own_store().remove, Name.parse(text))
        return Response()

    @router.post("/api/pull", openapi_extra=body("PullRequest"))
    async def pull(request: Request) -> Response:
        """Bring a model to this machine."""
        fields = await read(request, "PullRequest")
        text = required(fields)
        if settings.offline:
            if store.find(text) is None:
                raise offline("pull")
            return await told(request, iter([Progress("success")]), fields.flag("stream", True))
        return await told(request, _transfer("pull", text, fields, settings), fields.flag("stream", True))

    @router.post("/api/push", openapi_extra=body("PushRequest"))
    async def push(request: Request) -> Response:
        """Give a model to the registry that its name says."""
        fields = await read(request, "PushRequest")
        text = required(fields)
        named(text)
        if settings.offline:
            raise offline("push")
        return await told(request, _transfer("push", text, fields, settings), fields.flag("stream", True))


def _transfer(verb: str, text: str, fields: Fields, settings: Settings) -> Iterator[Progress]:
    """Addresses of the inner network are for who sits at this machine: where others reach the server, `insecure` lets
    none of them ask there."""
    from pumice.store import pulling
    from pumice.store.link import Reach

    insecure = fields.flag("insecure")
    inner = insecure and Address(host=settings.host).is_loopback
    reach = Reach(plain=insecure and not text.startswith("https://"), inner=inner)
    return (pulling.pull if verb == "pull" else pulling.push)(text, reach)


def offline(verb: str) -> Refused:
    return Refused(400, f"this server is offline and cannot {verb} a model; start it without --offline")


def required(fields: Fields) -> str:
    """The model that a request is about. Raises Refused."""
    name = fields.text("model", "name")
    if not name:
        raise Refused(400, "model is required")
    return name


def _name(text: str, wrong: str) -> Name:
    try:
        return Name.parse(text)
    except UserError as error:
        raise Refused(400, wrong) from error


def own_name(text: str, wrong: str) -> Name:
    """A name that a model may get here. Raises Refused for what is none, and for those of the bundled models."""
    name = _name(text, wrong)
    if any(Name.parse(each).matches(name) for each in store.BUNDLED):
        raise Refused(400, f"{wrong}: it is the name of a model inside the package")
    return name


async def told(request: Request, steps: Iterator[Progress], streams: bool) -> Response:
    """What is under way, a line each; without a stream the last one alone. A client that goes away ends it."""
    coming = _aside(steps)
    if streams:
        return StreamingResponse(_lines(coming), media_type=NDJSON)
    return JSONResponse(_progress(await unless_gone(request, _last(coming))))


async def _last(coming: AsyncGenerator[Progress]) -> Progress:
    last = Progress("success")
    async with aclosing(coming):
        async for step in coming:
            last = step
    return last


async def _lines(coming: AsyncGenerator[Progress]) -> AsyncIterator[bytes]:
    try:
        async for step in coming:
            yield line(_progress(step))
    except (UserError, Refused) as error:
        yield line({"error": status_of(error)[1]})


async def _aside(steps: Iterator[Progress]) -> AsyncGenerator[Progress]:
    """The steps of what is done in a thread of its own, which ends when nobody reads them any more."""
    queue: asyncio.Queue[Progress | Refused | UserError | None] = asyncio.Queue()
    loop, unwanted = asyncio.get_running_loop(), threading.Event()

    def work() -> None:
        end: Refused | UserError | None = Refused(500, "the server failed; its log says more")
        try:
            with closing(steps) if isinstance(steps, Generator) else nullcontext():
                for step in steps:
                    if unwanted.is_set():
                        return
                    loop.call_soon_threadsafe(queue.put_nowait, step)
            end = None
        except (UserError, Refused) as error:
            end = error
        except OSError as error:
            end = Refused(500, f"the store cannot be written: {error.strerror}")
        finally:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, end)

    threading.Thread(target=work, name="transfer", daemon=True).start()
    try:
        while (step := await queue.get()) is not None:
            if not isinstance(step, Progress):
                raise step
            yield step
    finally:
        unwanted.set()


def _progress(step: Progress) -> dict[str, Any]:
    told = {"digest": step.digest, "total": step.total, "completed": step.completed}
    return {"status": step.status, **{name: value for name, value in told.items() if value}}


def shown(model: Installed, verbose: bool) -> dict[str, Any]:
    """All that is known of a model, which is read from its files. Raises UserError where they are damaged."""
    stored = model if isinstance(model, Stored) else None
    found: dict[str, Any] = {
        "license": "\n".join(stored.texts("license")) if stored else "",
        "modelfile": facts.modelfile(model),
        "parameters": facts.parameters(model),
        "template": facts.template(model),
        "system": facts.system(model),
        "messages": [{"role": role, "content": text} for role, text in stored.messages()] if stored else [],
        "projector_info": model_info.of_eyes(model, whole=verbose),
        "tensors": model_info.tensors(model) if verbose else [],
    }
    return {
        **{name: value for name, value in found.items() if value},
        "details": asdict(facts.details(model)),
        "model_info": model_info.of_model(model, whole=verbose),
        "capabilities": list(facts.capabilities(model)),
        "modified_at": timestamp(model.modified_s),
    }


def _resident(resident: Loaded) -> dict[str, Any]:
    return {
        **{key: value for key, value in resident.told.items() if key != "modified_at"},
        "size": resident.bytes,
        "expires_at": timestamp(min(resident.expires_s, time.time() + FOREVER_S)),
        "size_vram": resident.bytes if resident.device.type == "cuda" else 0,
        "context_length": resident.window,
    }
