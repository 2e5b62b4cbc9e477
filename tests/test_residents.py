"""Models that come and go: clients that leave while one loads, an engine that breaks, no room."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import ANY

import pytest
from starlette.requests import ClientDisconnect, Request

from pumice.errors import UserError
from pumice.ollama_prompt import Turn
from pumice.room.memory import Memory
from pumice.server import residents as module
from pumice.server.asked import Asked, ready
from pumice.server.library import _resident
from pumice.server.loaded import Embedder, Resident
from pumice.server.residents import Residents, named
from pumice.server.settings import Settings
from pumice.server.streams import unless_gone
from pumice.server.vectors import Wanted, _found
from pumice.server.wire import Fields, Refused
from pumice.server.worker import LESS_URGENT, Worker
from pumice.store import Folder

load = module._load
TASKS = Path("/proc/self/task")


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_an_engine_is_less_urgent_than_who_takes_its_pieces() -> None:
    """Its thread, and those of OpenMP that this one starts; nobody else's."""

    def nice() -> dict[int, int]:
        found = {}
        for task in (int(each.name) for each in TASKS.iterdir()):
            with contextlib.suppress(ProcessLookupError):  # a thread of another test, which has ended meanwhile
                found[task] = os.getpriority(os.PRIO_PROCESS, task)
        return found

    async def work(residents: Residents) -> None:
        before = nice()
        await said(await use(residents))
        after = nice()
        lasting = before.keys() & after.keys()
        assert {each: after[each] for each in lasting} == {each: before[each] for each in lasting}
        (engine,) = [each.native_id for each in threading.enumerate() if each.name.startswith("engine of")]
        assert after[cast(int, engine)] == os.getpriority(os.PRIO_PROCESS, 0) + LESS_URGENT

    run(work)


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


class Slow(Wanted):
    """Vectors that take until they may come."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def of(self, model: object) -> tuple[list[str], list[int]]:
        self.begun.set()
        assert self.over.wait(30)
        return [], []


def test_a_model_is_held_while_vectors_are_made_for_who_has_left() -> None:
    async def work(residents: Residents) -> None:
        slow, gone = Slow(), asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        fields = Fields.read(bytearray(b'{"model": "pebble"}'), "EmbedRequest")
        asking = asyncio.create_task(_found(residents, Request({"type": "http"}, receive), fields, slow))
        assert await asyncio.to_thread(slow.begun.wait, 30)
        (resident,) = residents.all
        for leave in (gone.set, asking.cancel):
            leave()
            await asyncio.sleep(0.05)
            assert (resident.users, residents.pending) == (1, 1)
        slow.over.set()
        with suppress(ClientDisconnect, asyncio.CancelledError):
            await asking
        while residents.pending:
            await asyncio.sleep(0.01)
        assert resident.users == 0

    run(work)


def test_work_that_fails_leaves_no_task() -> None:
    async def whole() -> None:
        async def receive() -> dict[str, str]:
            await asyncio.Event().wait()
            return {}

        async def fail() -> None:
            raise KeyError("a bug")

        with pytest.raises(KeyError):
            await unless_gone(Request({"type": "http"}, receive), fail())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


def test_the_list_of_what_is_loaded_reads_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may be gone, or take long to read."""
    folder = shutil.copytree(named("pebble").path, tmp_path / "m")
    monkeypatch.setattr(module, "_load", lambda title, settings: load("pebble", settings))

    async def work(residents: Residents) -> None:
        installed = Folder("m", folder, "disk")
        async with residents.use("m", installed) as resident:
            before = _resident(resident)
        shutil.rmtree(folder)
        assert _resident(resident) == {**before, "expires_at": ANY}
        assert len(before["digest"]) == 64

    run(work)


def test_a_model_that_was_loaded_for_vectors_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(residents: Residents) -> None:
        held = Embedder(named("pebble"), {}, cast(Any, None), 0, asyncio.Semaphore(1))
        monkeypatch.setitem(residents._residents, module._key(held.installed), held)
        with pytest.raises(Refused, match='"pebble" does not support generate'):
            await use(residents)
        assert "alive" not in vars(held)

    run(work)
