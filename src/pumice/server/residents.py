"""Models in memory: loaded when they are asked, kept for a while after, let go when others need the room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Literal, TypeVar

from pumice import store
from pumice.durations import FOREVER_NS
from pumice.errors import UserError
from pumice.room.memory import host
from pumice.server.loaded import Embedder, Loaded, Resident, listed
from pumice.server.metrics import Metrics, Standing
from pumice.server.settings import Settings
from pumice.server.wire import Refused
from pumice.store import Installed, Stored, embedders

if TYPE_CHECKING:
    from pumice.model import Model
    from pumice.sentences import SentenceModel
    from pumice.server.worker import Worker

T = TypeVar("T")
BUSY = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's words, with its two spaces."""
ROWS = 64
"""Answers of one model at a time, where the settings do not say."""
WATCH_S = 0.5
LOW = 0.03
"""Of the machine's memory: with less of it free, models go that nobody asks."""


class Residents:
    """All models in memory. Used from one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._residents: dict[str, Loaded] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._loading = asyncio.Lock()
        self._ended = asyncio.Event()
        """Set whenever the last answer of a model ends."""
        self._loader = ThreadPoolExecutor(1, "loading")
        """Models come and go here, one after the other: who waits for room waits for what goes."""
        self._readers = ThreadPoolExecutor(2, "reading")
        """Where pictures are decoded and prompts are cut into tokens."""
        self._others = ThreadPoolExecutor(4, "working")
        """Where what takes longer is done, so that no question waits to be read: vectors, pictures from elsewhere."""
        self.pending = 0
        self.metrics = Metrics(self._standings)

    @property
    def all(self) -> list[Loaded]:
        """The one that goes last first, as `ps` shows them."""
        return sorted(self._residents.values(), key=lambda each: -each.expires_s)

    @asynccontextmanager
    async def use(
        self, name: str, installed: Installed, keep_ns: int | None = None, to: Literal["generate", "chat"] = "generate"
    ) -> AsyncIterator[Resident]:
        """A model that answers, loaded if it must be, that stays at least until the end of this block.

        installed: what `named` found by the name. keep_ns: how long it then stays; None leaves that as it is. to: what
        it is asked, for the error of a model that only gives vectors. Raises Refused for too many requests and for such
        a model, UserError for a model that cannot be loaded.
        """
        if embedders.embeds(installed):
            raise _only_vectors(name, to)
        async with self._held(installed, keep_ns) as loaded:
            if isinstance(loaded, Embedder):  # its folder became another model's since
                raise _only_vectors(name, to)
            yield loaded

    @asynccontextmanager
    async def use_for_vectors(self, name: str, keep_ns: int | None = None) -> AsyncIterator[Loaded]:
        """Any model, as `use`; also an embedding model by its folder, where the settings allow it."""
        here = await asyncio.to_thread(embedders.at, name) if self._settings.folders else None
        async with self._held(here or named(name), keep_ns) as loaded:
            yield loaded

    @asynccontextmanager
    async def _held(self, installed: Installed, keep_ns: int | None) -> AsyncIterator[Loaded]:
        if self.pending >= self._settings.max_queue:
            self.metrics.refused(installed.title)
            raise Refused(503, BUSY)
        self.pending += 1
        try:
            resident = await self._resident(installed)
            resident.users += 1
            if keep_ns is not None:
                resident.keep_ns = keep_ns
            try:
                yield resident
            finally:
                resident.users -= 1
                resident.ended_s = time.time()
                if not resident.users:
                    self._ended.set()
                    if resident.keep_ns == 0:
                        self.drop(resident)
        finally:
            self.pending -= 1

    def find(self, name: str) -> Loaded | None:
        """The resident of a name, where it is in memory."""
        installed = store.find(name)
        return None if installed is None else self._residents.get(_key(installed))

    def stop(self, name: str) -> bool:
        """Let a model go as soon as its answers have ended. Whether it was in memory."""
        resident = self.find(name)
        if resident is None:
            return False
        resident.keep_ns = 0
        if not resident.users:
            self.drop(resident)
        return True

    def drop(self, resident: Loaded) -> None:
        """Let a model go; answers under way fail. Nobody waits for it but the next load."""
        if self._residents.get(key := _key(resident.installed)) is resident:
            del self._residents[key]
            self._loader.submit(_let_go, resident)

    async def watch(self) -> None:
        """Lets models go when their time is over, and the one that was asked longest ago where the machine's memory
        runs out; runs until it is cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            if (idle := self._idle()) and _is_scarce():
                self.drop(idle)
            for each in self.all:
                if not each.users and each.keep_ns < FOREVER_NS and each.expires_s <= time.time():
                    self.drop(each)

    async def close(self) -> None:
        loads = list(self._loads.values())
        for each in loads:
            each.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        for resident in self.all:
            self.drop(resident)
        self._loader.shutdown()
        for pool in (self._readers, self._others):
            pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, work: Callable[[], T], *, slow: bool = False) -> T:
        """Do what takes time in a thread; what is slow keeps no question waiting. Raises what it raises, Refused where
        memory runs out."""
        with _memory():
            return await self._in(self._others if slow else self._readers, work)

    async def compute(self, work: Callable[[], T]) -> T:
        """As `read` of what is slow, for what uses a model: nothing stops work that has begun, so a cancellation counts
        when it has ended, and what is held for it stays held."""
        queued = self._others.submit(work)
        ended, stopped = asyncio.wrap_future(queued), None
        while not ended.done():
            try:
                await asyncio.wait((ended,))
            except asyncio.CancelledError as error:
                queued.cancel()
                stopped = error
        with _memory():
            if stopped is None:
                return ended.result()
        if not ended.cancelled():
            ended.exception()  # nobody is there to be told
        raise stopped

    async def _in(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    def _standings(self) -> list[Standing]:
        # A request may have several answers under way.
        return [
            Standing(each.installed.title, at_work := each.at_work, max(0, each.users - at_work), each.cache_share)
            for each in self._residents.values()
        ]  # fmt: skip

    async def _resident(self, installed: Installed) -> Loaded:
        key = _key(installed)
        while (found := self._residents.get(key)) is None or not found.alive:
            if found is not None:
                self.drop(found)
            if key not in self._loads:
                self._loads[key] = asyncio.create_task(self._load(installed))
            # A load goes on when who asked for it leaves: the next who asks finds the model.
            await asyncio.shield(self._loads[key])
        return found

    async def _load(self, installed: Installed) -> None:
        from pumice.room.fitting import NoRoom

        key = _key(installed)
        try:
            async with self._loading:
                while True:
                    while len(self._residents) >= self._settings.max_models:
                        await self._let_one_go()
                    try:
                        self._residents[key] = await self._made(installed)
                        break
                    except NoRoom:
                        if not self._residents:
                            raise
                        await self._let_one_go()
        finally:
            del self._loads[key]

    async def _made(self, installed: Installed) -> Loaded:
        settings = self._settings
        if embedders.embeds(installed):
            vectors, told = await self._in(self._loader, lambda: (_load_embedder(installed), listed(installed)))
            return Embedder(installed, told, vectors, settings.keep_alive_ns, asyncio.Semaphore(1))
        told = await self._in(self._loader, lambda: listed(installed))
        model, worker = await self._in(self._loader, lambda: _load(installed.title, settings))
        turn = asyncio.Semaphore(settings.parallel or ROWS)
        return Resident(installed, told, model, worker, settings.keep_alive_ns, turn, settings.context)

    async def _let_one_go(self) -> None:
        """The model that was asked longest ago and is idle; or wait until there is one."""
        if idle := self._idle():
            self.drop(idle)
        else:
            self._ended.clear()
            await self._ended.wait()

    def _idle(self) -> Loaded | None:
        free = [each for each in self._residents.values() if not each.users]
        return min(free, key=lambda each: each.ended_s, default=None)


def named(name: str) -> Installed:
    """The installed model of a name. Raises Refused in Ollama's words."""
    found = store.find(name)
    if found is None:
        raise Refused(404, f"model '{name}' not found")
    return found


@contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise Refused(503, "there is not enough memory for this request; send fewer or smaller images") from None


def _only_vectors(name: str, to: str) -> Refused:
    return Refused(400, f'"{name}" does not support {to}: it is an embedding model')


def _is_scarce() -> bool:
    with suppress(UserError):  # PUMICE_MEMORY is no number, which a load says
        found = host()
        return found is not None and found.available < LOW * found.total
    return False


def _key(installed: Installed) -> str:
    return installed.digest if isinstance(installed, Stored) else str(installed.path)


def _load(title: str, settings: Settings) -> tuple[Model, Worker]:
    # PyTorch comes with them, which takes seconds.
    from pumice.engine import Limits
    from pumice.model import load
    from pumice.server.worker import Worker

    model = load(title)
    if settings.parallel is not None:
        model.limit(Limits(rows=settings.parallel))
    return model, Worker(model, title)


def _load_embedder(installed: Installed) -> SentenceModel:
    from pumice.sentences import load_sentences

    if isinstance(installed, Stored):
        there = embedders.repository(installed.name)
        raise UserError(
            f"{installed.title} is a GGUF file of an embedding model, which pumice does not run",
            hint=f"pull {there or 'it from the Hub'}, and ask that",
        )
    return load_sentences(installed.path, installed.title)


def _let_go(resident: Loaded) -> None:
    import gc

    resident.close()
    gc.collect()
