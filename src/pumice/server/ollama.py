"""Ollama's API for answers: generate and chat. Facts: Ollama's server/routes.go and api/types.go."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from pumice.durations import keep_alive
from pumice.errors import UserError
from pumice.ollama_prompt import Turn
from pumice.server.answers import Call, Coming, begun
from pumice.server.asked import KNOWN, Asked, ready
from pumice.server.bodies import aside, read
from pumice.server.documents import body
from pumice.server.residents import Residents, named
from pumice.server.settings import Settings
from pumice.server.streams import Streamed, status_of, unless_gone
from pumice.server.wire import NDJSON, Fields, Json, Refused, image_bytes, line, timestamp
from pumice.store import Installed, Stored, facts

if TYPE_CHECKING:
    from pumice.answer import Answer, Likely
    from pumice.server.calls import ToolCall

ROLES = ("system", "user", "assistant", "tool")


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """POST /api/generate and /api/chat."""
    router = APIRouter(tags=["Ollama"])

    @router.post("/api/generate", openapi_extra=body("GenerateRequest"))
    async def generate(request: Request) -> Response:
        """An answer to a prompt."""
        came_s = time.monotonic()
        fields = await read(request, "GenerateRequest")
        common = Common.of(fields, Refused(404, f"model '{fields.text('model', 'name')}' not found"))
        if not fields.text("prompt") and common.keep_ns == 0:
            return await _unload(residents, common, {"response": ""})
        asked = await _prompted(fields, common, settings)
        if not asked.turns[-1].content and not asked.suffix:
            return await _load(residents, common, {"response": ""})
        asked = replace(asked, known=request.scope.get(KNOWN))
        kind = "generate" if asked.raw is None else "raw"
        exchange = Exchange(request, asked, came_s, kind, fields.flag("_debug_render_only"))
        return await _answered(residents, common, exchange)

    @router.post("/api/chat", openapi_extra=body("ChatRequest"))
    async def chat(request: Request) -> Response:
        """The next answer of a conversation."""
        came_s = time.monotonic()
        fields = await read(request, "ChatRequest")
        common = Common.of(fields, Refused(400, "model is required"))
        turns, images = await aside(fields.size, lambda: _messages(fields, settings))
        empty = {"message": {"role": "assistant", "content": ""}}
        if not turns and common.keep_ns == 0:
            return await _unload(residents, common, empty)
        tools = _tools(fields, common)
        asked = replace(common.asked(fields), turns=turns, images=images, tools=tools)
        if not turns:
            return await _load(residents, common, empty)
        exchange = Exchange(request, asked, came_s, "chat", fields.flag("_debug_render_only"))
        return await _answered(residents, common, exchange)

    return router


@dataclass(frozen=True)
class Common:
    """What both requests say of the model."""

    name: str
    """As it was asked for."""
    installed: Installed
    keep_ns: int | None
    streams: bool

    @classmethod
    def of(cls, fields: Fields, unnamed: Refused) -> Common:
        """Raises Refused, in Ollama's order of checks."""
        top = fields.whole("top_logprobs") or 0
        if not 0 <= top <= 20:
            raise Refused(400, "top_logprobs must be between 0 and 20")
        name = fields.text("model", "name")
        if not name:
            raise unnamed
        installed = named(name)
        keep_ns = keep_alive(fields.any("keep_alive"))
        return cls(name, installed, keep_ns, fields.flag("stream", True))

    def asked(self, fields: Fields) -> Asked:
        """What is drawn, and how. Raises Refused."""
        think = fields.any("think")
        if think not in (None, False, ""):
            raise Refused(400, f'"{self.name}" does not support thinking')
        format = fields.any("format")
        if not (format in (None, "", "json") or isinstance(format, dict)):
            raise Refused(400, f'invalid format: {format!r:.100}; expected "json" or a valid JSON Schema object')
        logprobs = (fields.whole("top_logprobs") or 0) if fields.flag("logprobs") else None
        return Asked(
            options=fields.mapping("options"),
            format=format,
            logprobs=logprobs,
            truncate=fields.flag("truncate", True),
            image_tokens=fields.whole("image_tokens"),
        )


@dataclass(frozen=True)
class Exchange:
    """A request, what it asks, when it came, and how it is answered: chat, generate or raw."""

    request: Request
    asked: Asked
    came_s: float
    kind: str
    renders: bool = False
    """Only the prompt is wanted: `_debug_render_only`."""

    @property
    def to(self) -> Literal["generate", "chat"]:
        return "chat" if self.kind == "chat" else "generate"

    def said(self, text: str, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        """Text as this API has it, and calls of tools."""
        if self.kind != "chat":
            return {"response": text}
        called = [
            {"id": each.id, "function": {"index": index, "name": each.name, "arguments": each.arguments}}
            for index, each in enumerate(calls)
        ]
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": called} if called else {})}}


async def _answered(residents: Residents, common: Common, exchange: Exchange) -> Response:
    if exchange.renders:
        return await unless_gone(exchange.request, _rendered(residents, common, exchange))
    needs = AsyncExitStack()
    async with needs:
        call = Call(exchange.request, common.name, common.installed, common.keep_ns, exchange.came_s, exchange.to)
        opening = begun(residents, call, exchange.asked)
        (coming,) = await unless_gone(exchange.request, needs.enter_async_context(opening))
        if common.streams:
            return Streamed(_lines(common.name, exchange, coming), needs.pop_all(), NDJSON)
        text, chunks, answer = await unless_gone(exchange.request, coming.whole())
        likely = [each for chunk in chunks for each in chunk.likely]
        told = {"logprobs": [_told(each) for each in likely]} if likely else {}
        said = exchange.said(text, chunks[-1].calls)
        return Json({**_head(common.name), **said, **told, **_end(exchange, coming, answer)})


async def _rendered(residents: Residents, common: Common, exchange: Exchange) -> Response:
    """The prompt as the model sees it, with `[img-0]` where the features of an image stand."""
    async with residents.use(common.name, common.installed, common.keep_ns, exchange.to) as resident, resident.turn:
        model, contexts, context = resident.model, resident.contexts, resident.context
        seen = (await residents.read(lambda: ready(exchange.asked, model, contexts, context))).seen
    numbers = count()
    texts = [f"[img-{next(numbers)}]" if each.kind == "image" else each.text for each in seen.parts]
    told = {"rendered_template": "".join(texts), "image_count": len(seen.images)}
    return Json({**_head(common.name), **exchange.said(""), "done": False, "_debug_info": told})


async def _lines(name: str, exchange: Exchange, coming: Coming) -> AsyncGenerator[bytes]:
    try:
        async for chunk in coming.chunks:
            told = {"logprobs": [_told(each) for each in chunk.likely]} if chunk.likely else {}
            if chunk.text or told or chunk.calls:
                yield line({**_head(name), **exchange.said(chunk.text, chunk.calls), "done": False, **told})
            if chunk.answer is not None:
                yield line({**_head(name), **exchange.said(""), **_end(exchange, coming, chunk.answer)})
    except (UserError, Refused) as error:
        yield line({"error": status_of(error)[1]})


def _head(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": timestamp(time.time())}


def _end(exchange: Exchange, coming: Coming, answer: Answer) -> dict[str, Any]:
    """What the last object says; `pumice` is not Ollama's."""
    context = {"context": coming.context(answer)} if exchange.kind == "generate" else {}
    own = {
        "encode_duration": int(answer.timings.encode_s * 1e9),
        "cached_tokens": answer.cached_tokens,
        "image_tokens": list(answer.image_tokens),
    }
    counters = coming.clock.durations(answer)
    return {"done": True, "done_reason": answer.finish_reason, **context, **counters, "pumice": own}


def _told(likely: Likely) -> dict[str, Any]:
    top = [{"token": each.token, "logprob": each.logprob, "bytes": each.bytes} for each in likely.top]
    more = {"top_logprobs": top} if top else {}
    return {"token": likely.token, "logprob": likely.logprob, "bytes": likely.bytes, **more}


async def _load(residents: Residents, common: Common, said: Mapping[str, Any]) -> Response:
    """One object, whatever was asked of streaming."""
    async with residents.use(
        common.name, common.installed, common.keep_ns, "chat" if "message" in said else "generate"
    ):
        return Json({**_head(common.name), **said, "done": True, "done_reason": "load"})


async def _unload(residents: Residents, common: Common, said: Mapping[str, Any]) -> Response:
    residents.stop(common.name)
    return Json({**_head(common.name), **said, "done": True, "done_reason": "unload"})


async def _prompted(fields: Fields, common: Common, settings: Settings) -> Asked:
    """What /api/generate asks. Raises Refused, in Ollama's order of checks."""
    prompt, suffix, raw = fields.text("prompt"), fields.text("suffix"), fields.flag("raw")
    if raw and (fields.text("template") or fields.text("system") or fields.items("context", "int")):
        raise Refused(400, "raw mode does not support template, system, or context")
    images = await aside(fields.size, lambda: pictures(fields, settings))
    if suffix and "insert" not in facts.capabilities(common.installed):
        raise Refused(400, f"{full_name(common.installed)} does not support insert")
    system = [Turn("system", fields.text("system"))] if fields.text("system") else []
    return replace(
        common.asked(fields),
        turns=(*system, Turn("user", prompt, len(images))),
        images=images,
        raw=prompt if raw else None,
        suffix=suffix,
        template=fields.text("template"),
        context=_context(fields),
    )


def _tools(fields: Fields, common: Common) -> list[dict[str, Any]]:
    """Raises Refused, also for a model whose template knows none."""
    tools = fields.items("tools", "api.Tool")
    if tools and "tools" not in facts.capabilities(common.installed):
        raise Refused(400, f"{full_name(common.installed)} does not support tools")
    if not all(isinstance(each, dict) for each in tools):
        raise Refused(400, "json: cannot unmarshal into Go struct field ChatRequest.tools of type api.Tool")
    return tools


def _messages(fields: Fields, settings: Settings) -> tuple[tuple[Turn, ...], tuple[bytes, ...]]:
    turns: list[Turn] = []
    images: list[bytes] = []
    for each in fields.objects("messages", "Message"):
        role = each.text("role").lower()
        if role not in ROLES:
            raise Refused(400, f"message role must be one of system, user, assistant, or tool, not {role!r:.100}")
        shown = pictures(each, settings)
        images += shown
        calls = [dict(call) for call in each.items("tool_calls", "api.ToolCall") if isinstance(call, dict)]
        turns.append(
            Turn(
                role,  # type: ignore[arg-type]
                each.text("content"),
                len(shown),
                each.text("thinking"),
                calls,
                each.text("tool_name"),
                each.text("tool_call_id"),
            )
        )
    if len(images) > settings.max_images:
        raise Refused(400, f"{len(images)} images came with the request; {settings.max_images} are taken at most")
    return tuple(turns), tuple(images)


def pictures(fields: Fields, settings: Settings) -> tuple[bytes, ...]:
    """The `images` of a request or a message. Raises Refused."""
    texts = fields.texts("images")
    if len(texts) > settings.max_images:
        raise Refused(400, f"{len(texts)} images came with the request; {settings.max_images} are taken at most")
    return tuple(map(image_bytes, texts))


def _context(fields: Fields) -> tuple[int, ...]:
    ids: Sequence[Any] = fields.items("context", "int")
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**31:
            raise Refused(400, "json: cannot unmarshal into Go struct field GenerateRequest.context of type int")
    return tuple(ids)


def full_name(installed: Installed) -> str:
    """With nothing left out, as Ollama's errors have it."""
    return installed.name.full if isinstance(installed, Stored) else installed.title
