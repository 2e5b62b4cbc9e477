"""Logs: one line of JSON for each request, on standard error. What people ask and show is not in them, nor a key."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Fact = Literal["model", "prompt_tokens", "cached_tokens", "generated_tokens", "images", "reason"]
"""What a route may add to its request's line."""

_LOGGER = logging.getLogger("pumice.server")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_LONGEST = 500
"""Characters of a path that are written."""
_FACTS = "pumice.facts"


class AccessLog:
    """Around an application and its guard: gives each request an id, answers with it, and writes its line when it is
    over. `x-request-id` of the request is its id, where it can be one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = given[0] if len(given) == 1 and _ID.fullmatch(given[0]) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        began, status, is_whole = time.perf_counter(), 500, False

        async def answer(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                is_whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app({**scope, _FACTS: facts}, receive, answer)
        finally:
            line = {
                "request_id": request_id,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"][:_LONGEST],  # the query is left out: it may hold anything
                "status": status,
                "seconds": round(time.perf_counter() - began, 6),
                **facts,
            }
            if not is_whole:
                line["broken_off"] = True
            _LOGGER.log(logging.ERROR if status >= 500 else logging.INFO, "request", extra={"facts": line})


def note(scope: Scope, fact: Fact, value: str | int | float) -> None:
    """Add something to the line of the request with this scope, where an AccessLog is around it."""
    scope.get(_FACTS, {})[fact] = value


class Lines(logging.Formatter):
    """Each record as one line of ASCII JSON, so that nothing from outside can begin another."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **record.__dict__.get("facts", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def config(*, debug: bool) -> dict[str, Any]:
    """What uvicorn's `log_config` takes: its messages and ours as such lines. Its own access log stays silent."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": Lines}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "loggers": {
            "uvicorn": {"handlers": ["stderr"], "level": "DEBUG" if debug else "INFO", "propagate": False},
            "uvicorn.access": {"handlers": [], "propagate": False},
            "pumice": {"handlers": ["stderr"], "level": "DEBUG" if debug else "INFO", "propagate": False},
        },
    }
