"""Models that come and go: clients that leave while one loads, an engine that breaks, no room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from pumice.errors import UserError
from pumice.ollama_prompt import Turn
from pumice.room.memory import Memory
from pumice.server import residents as module
from pumice.server.asked import Asked, ready
from pumice.server.loaded import Resident
from pumice.server.residents import Residents, named
from pumice.server.settings import Settings
from pumice.server.worker import Worker

load = module._load


def engines() -> int:
    return sum(each.name.startswith("engine of") for each in threading.enumerate())


def run(work: Callable[[Residents], Awaitable[None]], **settings: Any) -> None:
    """With models of its own, none of which is there when it is over."""

    async def whole() -> None:
        residents = Residents(Settings(port=0, **settings))
        try:
            async with asyncio.timeout(60):
                await work(residents)
        finally:
            await residents.close()

    before = engines()
    asyncio.run(whole())
    assert engines() == before


async def said(resident: Resident, words: str = "Hi") -> str:
    found = ready(Asked((Turn("user", words),)), resident.model, resident.contexts)
    chunks = [each async for each in resident.worker.answer(resident.model.open(found.question, found.seen))]
    return "".join(each.text for each in chunks)


@dataclass
class Held:
    """Loading waits until it may go on; `begun` says that it has begun."""

    begun: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)

    def load(self, title: str, settings: Settings) -> Any:
        self.begun.set()
        assert self.goes_on.wait(60)
        return load(title, settings)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    one = Held()
    monkeypatch.setattr(module, "_load", one.load)
    return one


async def use(residents: Residents, name: str = "pebble", keep_ns: int | None = None) -> Resident:
    async with residents.use(name, named(name), keep_ns) as resident:
        return resident


def test_a_load_goes_on_when_who_asked_for_it_leaves(held: Held) -> None:
    async def work(residents: Residents) -> None:
        before = engines()
        asking = asyncio.create_task(use(residents))
        assert await asyncio.to_thread(held.begun.wait, 60)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        held.goes_on.set()
        resident = await use(residents)
        assert residents.all == [resident]
        assert engines() == before + 1

    run(work)


def test_who_lets_a_model_go_does_not_wait_for_another_to_load(held: Held) -> None:
    async def work(residents: Residents) -> None:
        held.goes_on.set()
        await use(residents)
        held.goes_on.clear()
        held.begun.clear()
        other = asyncio.create_task(use(residents, "pebble:1.5"))
        assert await asyncio.to_thread(held.begun.wait, 60)
        await asyncio.wait_for(use(residents, keep_ns=0), 30)
        assert not residents.all
        held.goes_on.set()
        await other
        assert [each.installed.title for each in residents.all] == ["pebble:1.5"]

    run(work)


def test_two_who_ask_at_once_get_one_model() -> None:
    async def work(residents: Residents) -> None:
        first, second = await asyncio.gather(use(residents), use(residents))
        assert first is second

    run(work)


def test_a_load_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(title: str, settings: Settings) -> Any:
        raise KeyError(title)

    async def work(residents: Residents) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_load", broken)
            with pytest.raises(KeyError):
                await use(residents)
        assert (residents.all, residents.pending) == ([], 0)
        assert await said(await use(residents))

    run(work)


def test_a_model_waits_for_room_until_another_is_idle() -> None:
    async def work(residents: Residents) -> None:
        async with residents.use("pebble", named("pebble")) as first:
            second = asyncio.create_task(use(residents, "pebble:1.5"))
            await asyncio.sleep(0.3)
            assert residents.all == [first]
        last = await second
        assert residents.all == [last]

    run(work, max_models=1)


def test_what_was_let_go_before_takes_no_other_with_it() -> None:
    async def work(residents: Residents) -> None:
        old = await use(residents)
        residents.drop(old)
        new = await use(residents)
        residents.drop(old)
        assert residents.all == [new]

    run(work)


@pytest.mark.parametrize("where", ["pumice.model.Model.step", "pumice.answer.Answering.start"])
def test_an_engine_that_breaks_ends_its_answers_and_is_made_afresh(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(self: object) -> bool:
        raise KeyError("a bug")

    async def work(residents: Residents) -> None:
        first = await use(residents)
        wanted = await said(first)
        with monkeypatch.context() as patch:
            patch.setattr(where, bug)
            found = await asyncio.gather(said(first), said(first, "Ho"), return_exceptions=True)
            assert all(isinstance(each, UserError) for each in found), found
        second = await use(residents)
        assert second is not first
        assert await said(second) == wanted

    run(work)
    assert "the engine failed" in caplog.text


def test_what_takes_long_keeps_no_question_from_being_read() -> None:
    async def work(residents: Residents) -> None:
        over = threading.Event()
        long = [asyncio.create_task(residents.read(lambda: over.wait(10), slow=True)) for _ in range(8)]
        assert await asyncio.wait_for(residents.read(lambda: "read"), 5) == "read"
        over.set()
        assert all(await asyncio.gather(*long))

    run(work)


def test_an_idle_model_goes_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(residents: Residents) -> None:
        watching = asyncio.create_task(residents.watch())
        await use(residents, "pebble:1.5")
        async with residents.use("pebble", named("pebble")) as busy:
            with monkeypatch.context() as patch:
                patch.setattr(module, "host", lambda: Memory(total=100, available=2))
                await asyncio.sleep(1.3)
            assert residents.all == [busy]
        await asyncio.sleep(0.7)
        assert residents.all == [busy]
        watching.cancel()

    run(work)


def test_nobody_waits_where_one_request_has_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(residents: Residents) -> None:
        async with residents.use("pebble", named("pebble")):
            with monkeypatch.context() as patch:
                patch.setattr(Worker, "waiting", 3)
                assert [(each.running, each.waiting) for each in residents._standings()] == [(3, 0)]

    run(work)
