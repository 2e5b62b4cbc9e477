"""The server on more than one process or machine: `serve run pumice.server.cluster:app`, with Ray's own commands.

A door, behind Ray's proxies, takes each request through the same guard as `pumice serve`. What needs a model goes on to
a replica, which is the whole application of `app.py`; a stream comes back piece by piece. Of the replicas Ray prefers
those that have answered for the model before, as long as they have room. What needs none (the page, lists, pull, push,
create, delete, files) the door does itself: it is the same application, in which no model is ever loaded.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from functools import partial
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pumice import store
from pumice.durations import keep_alive
from pumice.errors import UserError
from pumice.server import offline
from pumice.server.app import create_app, envelope
from pumice.server.asked import KNOWN, Known
from pumice.server.bodies import Budget, aside, parsed, values, weight
from pumice.server.guard import Guard
from pumice.server.loaded import Resident
from pumice.server.metrics import CONTENT_TYPE
from pumice.server.residents import BUSY
from pumice.server.running import SWITCH_S
from pumice.server.settings import Address, Settings
from pumice.server.streams import unless_gone
from pumice.server.wire import Refused

MODELS = "models"
"""The deployment of the replicas, as configuration files name it; the other is `door`."""
ONGOING = 32
"""Requests that a replica takes before the next one loads the same model, where OLLAMA_NUM_PARALLEL does not say."""
AT_THE_DOOR = 4096
"""Requests under way in one door, which holds little of each."""
ALL_S = 3.0
"""How long is waited for what all replicas are asked: what they have in memory, a conversation, to let a model go. Then
what is known counts; an order to one that hangs stands."""
ASKING = 32
"""Requests of one door at a time for which all replicas are asked."""
_OPENAI = ("chat/completions", "completions", "embeddings")
ANSWERS = frozenset(
    ["/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/pumice/see"]
    + [f"{start}/{each}" for start in ("/v1", "") for each in _OPENAI]
)
"""What a model answers."""
_SAYING = {"/api/generate": "prompt", "/api/chat": "messages"}
"""The field without which such a request loads a model or, with keep_alive 0, lets it go."""
_CHANGES = frozenset({("DELETE", "/api/delete"), ("POST", "/api/create")})
_PORTABLE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path"),
    *("headers", "client", "server"),
)


class Said(NamedTuple):
    """What one replica answers, whole."""

    status: int
    body: bytes
    replica: str


def app(args: dict[str, str]) -> Application:
    """What Ray's commands run: settings are those of this process's environment, as for `pumice serve`, and numbers of
    replicas those of Ray's configuration. Raises UserError for settings that cannot be, and without a key or the word
    that none is meant: where Ray listens, Ray is told."""
    if args:
        raise UserError(
            f"the application takes no arguments, and {', '.join(args)} came",
            hint="set the environment variables of pumice serve, and Ray's own configuration for replicas",
        )
    settings = Settings.of(os.environ, Address(host=""))
    ongoing = settings.parallel or ONGOING
    models = serve.deployment(
        name=MODELS,
        max_ongoing_requests=ongoing,
        max_queued_requests=settings.max_queue,
        autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": max(1, ongoing // 2)},
        graceful_shutdown_timeout_s=settings.drain_s,
    )(Replica)

    def build() -> ASGIApp:
        if settings.offline:
            offline.enforce()
        return guarded(settings, serve.get_deployment_handle(MODELS))

    door = serve.deployment(
        name="door",
        max_ongoing_requests=AT_THE_DOOR,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_s,
    )(serve.ingress(build)())
    return door.bind(models.bind(settings))


def guarded(settings: Settings, models: DeploymentHandle) -> ASGIApp:
    """The door, behind the guard."""
    return Guard(Door(create_app(settings), models), settings)


class Replica:
    """An application that holds models. It asks for nothing but its settings, so that all replicas are the same."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        if settings.offline:
            offline.enforce()
        sys.setswitchinterval(SWITCH_S)
        self._app = create_app(settings)
        self._bodies = Budget(settings.max_bodies_bytes)
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))

        async def answers_for(model: str) -> str:
            return model  # Ray is told which models are asked here; when they are loaded, residents.py decides

        self._answers_for = serve.multiplexed(answers_for, max_num_models_per_replica=settings.max_models)

    async def __del__(self) -> None:
        await self._life.aclose()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
        """What the application sends, as it comes. Who stops reading cancels it."""
        if model := serve.get_multiplexed_model_id():
            await self._answers_for(model)
        count = await aside(len(body), lambda: values(body))
        with self._bodies.holding(weight(len(body), count)) as has_room:
            app: ASGIApp = self._app if has_room else envelope(Request(scope), 503, BUSY)
            async with aclosing(sent(app, scope, body)) as coming:
                async for messages in coming:
                    yield messages

    async def whole(self, scope: Scope, body: bytes) -> Said:
        """All that the application sends."""
        status, data = 500, b""
        async for messages in self.answer(scope, body):
            for message in messages:
                status = message.get("status", status)
                data += message.get("body", b"")
        return Said(status, data, serve.get_replica_context().replica_tag)

    async def remembered(self, title: str, context: tuple[int, ...]) -> Known | None:
        """The conversation for which this replica gave these ids, pictures and all, if it still has it."""
        resident = self._app.state.residents.find(title)
        return resident.contexts.find(context) if isinstance(resident, Resident) else None

    async def check_health(self) -> None:
        """Ray asks now and then, and starts a replica anew that says no. Raises RuntimeError."""
        said = await self.whole(_get("/health"), b"")
        if said.status != 200:
            raise RuntimeError(said.body.decode())


class Door:
    """Says who answers: one replica, all of them, or the application of this process."""

    def __init__(self, own: ASGIApp, models: DeploymentHandle) -> None:
        self._own, self._models = own, models
        self._asking = ThreadPoolExecutor(ASKING, "asking")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = (scope.get("method"), scope.get("path"))
        with suppress(ClientDisconnect):
            if asked[0] == "POST" and asked[1] in ANSWERS:
                await self._ask(scope, receive, send)
            elif asked == ("GET", "/api/ps"):
                await self._gathered(scope, receive, send, loaded)
            elif asked == ("GET", "/metrics"):
                await self._gathered(scope, receive, send, counts)
            elif asked in _CHANGES:
                body = await Request(scope, receive).body()
                await self._let_go(body)
                await self._own(scope, replayed(body, receive), send)
            else:
                await self._own(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        title, unloads, context = await about(scope["path"], body)
        if unloads and (said := await self._all(scope, body)):
            worst = max(said, key=lambda each: each.status)
            await Response(worst.body, worst.status, media_type="application/json")(scope, receive, send)
            return

        async def answered() -> None:
            known = await self._known(title, context)
            one = self._models.options(method_name="answer", stream=True, multiplexed_model_id=title)
            coming = one.remote({**_portable(scope), KNOWN: known}, body)
            try:
                await self._relay(scope, coming, send)
            finally:
                coming.cancel()

        await unless_gone(Request(scope, receive), answered())

    async def _relay(self, scope: Scope, coming: Any, send: Send) -> None:
        begun = False
        words = ""
        try:
            async for messages in coming:
                for message in messages:
                    begun = True
                    await send(message)
        except BackPressureError:
            words = BUSY
        except (RayActorError, DeploymentUnavailableError):
            if begun:
                raise
            words = "the replica that was to answer has gone; please try again"
        if words:
            await envelope(Request(scope), 503, words)(scope, _silent, send)

    async def _let_go(self, body: bytes) -> None:
        """Every replica lets go of the model that a request is about."""
        if title := (await about("", body)).title:
            order = json.dumps({"model": title, "keep_alive": 0}).encode()
            await self._all({**_get("/api/generate"), "method": "POST"}, order)

    async def _gathered(self, scope: Scope, receive: Receive, send: Send, merged: Any) -> None:
        said = [each for each in await self._all(scope, b"") if each.status == 200]
        await (merged(said)(scope, receive, send) if said else self._own(scope, receive, send))

    async def _all(self, scope: Scope, body: bytes) -> list[Said]:
        return [each for each in await self._everywhere("whole", _portable(scope), body) if isinstance(each, Said)]

    async def _known(self, title: str, context: tuple[int, ...]) -> Known | None:
        """The conversation of a `context`, from the replica that gave it: another may go on with it."""
        found = await self._everywhere("remembered", title, context) if context else []
        return next((each for each in found if isinstance(each, Known)), None)

    async def _everywhere(self, method: str, *said: Any) -> list[Any]:
        """What a method gives on each replica; an exception for one that has gone or takes too long."""
        try:
            asked = self._models.broadcast(method, *said)
            # Without a thread Ray gives all of them or, where one hangs, none.
            found = partial(asked.results, timeout_s=ALL_S, return_exceptions=True)
            return await asyncio.get_running_loop().run_in_executor(self._asking, found)
        except (DeploymentUnavailableError, TimeoutError):
            return []


class About(NamedTuple):
    """What a door must know of a request."""

    title: str = ""
    """The installed model that it is about, by the name that lists have."""
    unloads: bool = False
    """All replicas are to let it go."""
    context: tuple[int, ...] = ()
    """It goes on from there."""


async def about(path: str, body: bytes) -> About:
    """Of what is wrong with a request a replica tells."""
    try:
        fields = await parsed(body, "Request")
        found = store.find(fields.text("model", "name"))
        unloads = path in _SAYING and not fields.any(_SAYING[path]) and keep_alive(fields.any("keep_alive")) == 0
        ids = fields.items("context") if path == "/api/generate" else []
    except (Refused, UserError):
        return About()
    if found is None:
        return About()
    return About(found.title, unloads, tuple(ids) if all(isinstance(each, int) for each in ids) else ())


def loaded(said: Sequence[Said]) -> Response:
    """`/api/ps` of all replicas: a line a model, with the memory of all of them and the last time that one goes."""
    models: dict[str, dict[str, Any]] = {}
    for each in said:
        for model in json.loads(each.body)["models"]:
            held = models.setdefault(model["name"], {**model, "size": 0, "size_vram": 0, "replicas": 0})
            held["size"] += model["size"]
            held["size_vram"] += model["size_vram"]
            held["replicas"] += 1
            held["expires_at"] = max(held["expires_at"], model["expires_at"])
    return JSONResponse({"models": list(models.values())})


def counts(said: Sequence[Said]) -> Response:
    """`/metrics` of all replicas, each number with its replica's name."""
    families: dict[str, Metric] = {}
    for each in said:
        for found in text_string_to_metric_families(each.body.decode()):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                family.add_sample(sample.name, {**sample.labels, "replica": each.replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Fixed(families.values()))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE)


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def sent(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
    """What an application sends, as it comes."""
    coming: asyncio.Queue[Message | None] = asyncio.Queue()
    working = asyncio.ensure_future(app(scope, replayed(body), coming.put))
    working.add_done_callback(lambda _: coming.put_nowait(None))
    try:
        more = True
        while more:
            found = [await coming.get()]
            while not coming.empty():
                found.append(coming.get_nowait())
            more = found[-1] is not None
            yield [each for each in found if each is not None]
    finally:
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working


def replayed(body: bytes, then: Receive | None = None) -> Receive:
    """A body that was read already, as an application receives it; after it what comes `then`, or nothing for ever."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await (then or _silent)()

    return receive


async def _silent() -> Message:
    return await asyncio.get_running_loop().create_future()


def _portable(scope: Scope) -> Scope:
    """Of a request what another process can be told."""
    return {name: scope[name] for name in _PORTABLE if name in scope}


def _get(path: str) -> Scope:
    common = {"type": "http", "http_version": "1.1", "scheme": "http", "query_string": b"", "headers": []}
    return {**common, "method": "GET", "path": path, "raw_path": path.encode()}
