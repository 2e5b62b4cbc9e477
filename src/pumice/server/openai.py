"""OpenAI's API: chat completions, completions, models. What Ollama and vLLM take beyond it is taken too."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pumice import store
from pumice.durations import keep_alive
from pumice.errors import UserError
from pumice.server.answers import Call, Coming, begun
from pumice.server.asked import Asked
from pumice.server.bodies import read
from pumice.server.documents import body
from pumice.server.openai_request import asked_of, chat_turns, completion_turns
from pumice.server.residents import Residents, named
from pumice.server.settings import Settings
from pumice.server.streams import Streamed, error_object, merged, status_of, unless_gone
from pumice.server.wire import Fields, Refused

if TYPE_CHECKING:
    from pumice.answer import Answer, Likely
    from pumice.server.worker import Chunk

MOST_ANSWERS = 16
FINGERPRINT = "fp_pumice"


def routes(residents: Residents, settings: Settings) -> APIRouter:
    """POST /v1/chat/completions and /v1/completions, GET /v1/models; each also without /v1."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", openapi_extra=body("ChatCompletionRequest"))
    @router.post("/chat/completions", include_in_schema=False)
    async def chat(request: Request) -> Response:
        """The next answer of a conversation."""
        came_s = time.monotonic()
        fields = await read(request, "ChatCompletionRequest")
        order = Order.of(fields, "chat.completion", came_s)
        top = fields.whole("top_logprobs") or 0
        logprobs = top if fields.flag("logprobs") else None
        turns, images = await chat_turns(fields, settings, residents)
        asked = replace(asked_of(fields, logprobs), turns=turns, images=images, tools=fields.items("tools"))
        return await _answered(residents, request, order, asked)

    @router.post("/v1/completions", openapi_extra=body("CompletionRequest"))
    @router.post("/completions", include_in_schema=False)
    async def complete(request: Request) -> Response:
        """An answer to a prompt."""
        came_s = time.monotonic()
        fields = await read(request, "CompletionRequest")
        order = Order.of(fields, "text_completion", came_s)
        asked = asked_of(fields, fields.whole("logprobs"))
        asked = replace(asked, turns=completion_turns(fields), suffix=fields.text("suffix"))
        return await _answered(residents, request, order, asked)

    @router.get("/v1/models")
    @router.get("/models", include_in_schema=False)
    async def models() -> Response:
        """The models on this machine."""
        data = await asyncio.to_thread(lambda: [_model(each) for each in store.installed().models])
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/models/{name:path}")
    @router.get("/models/{name:path}", include_in_schema=False)
    async def model(name: str) -> Response:
        """One model."""
        return JSONResponse({**_model(named(name)), "id": name})

    return router


def _model(model: store.Installed) -> dict[str, Any]:
    owner = model.name.namespace if isinstance(model, store.Stored) else "library"
    return {"id": model.title, "object": "model", "created": int(model.modified_s), "owned_by": owner}


@dataclass(frozen=True)
class Order:
    """How a request is to be answered."""

    name: str
    installed: store.Installed
    kind: str
    came_s: float
    count: int
    streams: bool
    usage: bool
    """A stream ends with the counts."""
    keep_ns: int | None
    id: str
    created: int

    @classmethod
    def of(cls, fields: Fields, kind: str, came_s: float) -> Order:
        """Raises Refused."""
        name = fields.text("model")
        if not name:
            raise Refused(400, "model is required")
        installed = named(name)
        count = 1 if fields.whole("n") is None else fields.whole("n") or 0
        if not 1 <= count <= MOST_ANSWERS:
            raise Refused(400, f"n is {count:.3g}; 1 to {MOST_ANSWERS} answers can be had")
        id = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(12)}"
        usage = Fields(fields.mapping("stream_options"), "StreamOptions").flag("include_usage")
        keep_ns = keep_alive(fields.any("keep_alive"))
        return cls(name, installed, kind, came_s, count, fields.flag("stream"), usage, keep_ns, id, int(time.time()))

    @property
    def chats(self) -> bool:
        return self.kind == "chat.completion"

    def envelope(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        more = {} if usage is None else {"usage": usage}
        kind = f"{self.kind}.chunk" if self.streams and self.chats else self.kind
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return {**head, "system_fingerprint": FINGERPRINT, "choices": choices, **more}


async def _answered(residents: Residents, request: Request, order: Order, asked: Asked) -> Response:
    needs = AsyncExitStack()
    async with needs:
        call = Call(
            request, order.name, order.installed, order.keep_ns, order.came_s, "chat" if order.chats else "generate"
        )
        coming = await unless_gone(request, needs.enter_async_context(begun(residents, call, asked, order.count)))
        if order.streams:
            return Streamed(_frames(order, coming), needs.pop_all(), "text/event-stream")
        choices, answers = [], []
        for index, each in enumerate(coming):
            text, chunks, answer = await unless_gone(request, each.whole())
            likely = [one for chunk in chunks for one in chunk.likely]
            message = {"role": "assistant", "content": text, **_called(chunks[-1])}
            said = {"message": message} if order.chats else {"text": text}
            told = {"logprobs": _told(order, likely)} if asked.logprobs is not None else {}
            choices.append({"index": index, **said, **told, "finish_reason": _reason(chunks[-1])})
            answers.append(answer)
        return JSONResponse(order.envelope(choices, usage=_usage(answers)))


async def _frames(order: Order, coming: list[Coming]) -> AsyncGenerator[bytes]:
    answers: list[Answer] = []
    begun_: set[int] = set()
    try:
        async with aclosing(merged([each.chunks for each in coming])) as found:
            async for index, chunk in found:
                told = {"logprobs": _told(order, chunk.likely)} if chunk.likely else {}
                if chunk.text or told or chunk.calls or (index not in begun_ and chunk.answer is not None):
                    role = {} if index in begun_ else {"role": "assistant"}
                    said = (
                        {"delta": {**role, "content": chunk.text, **_called(chunk)}}
                        if order.chats
                        else {"text": chunk.text}
                    )
                    yield _frame(order.envelope([{"index": index, **said, **told, "finish_reason": None}]))
                    begun_.add(index)
                if chunk.answer is not None:
                    end: dict[str, Any] = {"delta": {}} if order.chats else {"text": ""}
                    yield _frame(order.envelope([{"index": index, **end, "finish_reason": _reason(chunk)}]))
                    answers.append(chunk.answer)
        if order.usage:
            yield _frame(order.envelope([], usage=_usage(answers)))
        yield b"data: [DONE]\n\n"
    except (UserError, Refused) as error:
        yield _frame({"error": error_object(*status_of(error))})


def _reason(last: Chunk) -> str:
    assert last.answer is not None, "an answer ended without its end"
    return "tool_calls" if last.calls else last.answer.finish_reason


def _called(chunk: Chunk) -> dict[str, Any]:
    """Calls of tools, whose arguments are a text here."""
    calls = [
        {"index": index, "id": each.id, "type": "function",
         "function": {"name": each.name, "arguments": json.dumps(each.arguments)}}
        for index, each in enumerate(chunk.calls)
    ]  # fmt: skip
    return {"tool_calls": calls} if calls else {}


def _frame(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _usage(answers: list[Answer]) -> dict[str, Any]:
    """The prompt counts once, however many answers it has."""
    prompt, new = answers[0].prompt_tokens, sum(len(each.tokens) for each in answers)
    details = {"prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens}}
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, **details}


def _told(order: Order, likely: list[Likely] | tuple[Likely, ...]) -> dict[str, Any]:
    """Probabilities in the form of either kind."""
    if order.chats:
        return {"content": [{**_one(each), "top_logprobs": [_one(top) for top in each.top]} for each in likely]}
    return {
        "tokens": [each.token for each in likely],
        "token_logprobs": [each.logprob for each in likely],
        "top_logprobs": [{top.token: top.logprob for top in each.top} for each in likely],
    }


def _one(likely: Likely) -> dict[str, Any]:
    return {"token": likely.token, "logprob": likely.logprob, "bytes": list(likely.bytes)}
