"""The engine: pages without tensors against a shadow of their memory, then random mixtures of requests against the
plain loop, token by token."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import pumice
import tiny
from pretended import Pretended
from pumice import Sampling, UserError
from pumice.engine import Engine, Generation, Limits, Request, archive
from pumice.engine.cache import Cache, Found, image_names
from pumice.engine.drafts import Pace
from pumice.engine.scheduler import Part, Row, Scheduler
from pumice.image import Prepared, prepare
from pumice.network import llava

ROOT = b"root"


# --- pages, without tensors -------------------------------------------------------------------------------------------


class Shadow:
    """What a scheduler's pages would hold: each pass writes names, and each row finds those it needs."""

    def __init__(self, pages: int, size: int, rows: int) -> None:
        self.scheduler = Scheduler(Cache(pages, size), rows)
        self.size, self.together = size, 0
        self.memory = [[None] * size for _ in range(pages)]

    def write(self, row: Row, count: int) -> None:
        for place in range(row.done, row.done + count):
            self.memory[row.pages[place // self.size]][place % self.size] = row.names[place]
        self.scheduler.advance(row, count)
        held = [self.memory[row.pages[place // self.size]][place % self.size] for place in range(row.done)]
        assert held == row.names[: row.done]

    def step(self, budget: int, wanted: dict[Row, list[int]], ended: list[Row]) -> None:
        """wanted: the tokens that each row is to say, its last one ends it."""
        for row in self.scheduler.decoding():
            self.write(row, 1)
            self.say(row, wanted, ended)
        while budget > 0 and (parts := self.scheduler.reading(budget)):
            self.together += len(parts) > 1
            for part in parts:
                if part.copy is not None:
                    self.memory[part.copy[1]] = list(self.memory[part.copy[0]])
            for part in parts:
                self.write(part.row, part.count)
                budget -= part.count
            for part in parts:
                if part.row.left == 0:
                    self.say(part.row, wanted, ended)

    def say(self, row: Row, wanted: dict[Row, list[int]], ended: list[Row]) -> None:
        row.push(wanted[row][row.new])
        if row.new == len(wanted[row]):
            self.scheduler.stop(row)
            ended.append(row)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 2, 4, 7]), pages=st.integers(12, 40))
def test_no_row_finds_what_another_wrote(seed: int, size: int, pages: int) -> None:
    """Rows come, share beginnings, are cancelled and preempted; each finds its own names at each position, ends with
    all its tokens, and leaves no page held."""
    draw = random.Random(seed)
    shadow = Shadow(pages, size, rows=draw.randint(1, 6))
    beginnings = [[draw.randint(0, 3) for _ in range(draw.randint(0, 3 * size))] for _ in range(3)]
    wanted: dict[Row, list[int]] = {}
    alive: list[Row] = []
    ended: list[Row] = []
    cancelled = 0
    for turn in range(400):
        if turn < 60 and draw.random() < 0.5:
            names = draw.choice(beginnings) + [draw.randint(0, 3) for _ in range(draw.randint(1, 2 * size))]
            said = [draw.randint(0, 3) for _ in range(draw.randint(1, 6))]
            if shadow.scheduler.fits(len(names) + len(said)):
                row = Row(list(names), ROOT)
                wanted[row] = said
                alive.append(row)
                shadow.scheduler.add(row)
        if alive and draw.random() < 0.05:
            row = draw.choice(alive)
            if row not in ended:
                shadow.scheduler.stop(row)
                alive.remove(row)
                cancelled += 1
        shadow.step(draw.choice([1, 2, 5, 50]), wanted, ended)
        assert shadow.scheduler.cache.held + shadow.scheduler.cache.available == pages
    assert shadow.scheduler.idle
    assert len(ended) + cancelled == len(wanted)
    assert all(row.names[len(row.names) - row.new :] == wanted[row] for row in ended)
    assert shadow.scheduler.cache.held == 0


def test_short_rests_are_read_together_and_what_others_read_is_waited_for() -> None:
    scheduler = Scheduler(Cache(100, 4), 9)
    first = Row([5] * 30, ROOT)
    alike = [Row([5] * 29 + [last], ROOT) for last in (6, 7, 8)]
    other, long = Row([3] * 10, ROOT), Row([4] * 80, ROOT)
    for row in (first, *alike, other, long):
        scheduler.add(row)
    assert scheduler.reading(1000) == [Part(first, 30)]  # the next is to find what it has read
    scheduler.advance(first, 30)
    first.push(1)
    parts = scheduler.reading(1000)
    assert [(part.row, part.count) for part in parts] == [*((row, 1) for row in alike), (other, 10)]
    for part in parts:
        scheduler.advance(part.row, part.count)
        part.row.push(1)
    assert scheduler.reading(1000) == [Part(long, 80)]


def test_tokens_with_scores_asked_for_are_read_whatever_is_known() -> None:
    scheduler = Scheduler(Cache(100, 4), 9)
    for tail, count in ((1, 20), (6, 6), (6, 6)):
        row = Row([5] * 20, ROOT, tail=tail)
        scheduler.add(row)
        assert [part.count for part in scheduler.reading(100)] == [count]
        scheduler.advance(row, count)
        scheduler.stop(row)


def filled(cache: Cache, names: list[int]) -> list[int]:
    """Pages with these names in them, still held."""
    pages, parent = [], ROOT
    for at in range(0, len(names), cache.size):
        pages.append(cache.take())
        parent = cache.keep(pages[-1], parent, names[at : at + cache.size])
    return pages


def found_in(cache: Cache, names: list[int], most: int, root: bytes = ROOT) -> Found:
    return cache.find(names, cache.extend([], names, root), most, root)


def test_a_row_finds_the_longest_beginning() -> None:
    cache = Cache(10, 4)
    pages = filled(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    cache.release(pages)
    found = found_in(cache, [1, 2, 3, 4, 5, 6, 0, 0, 0], 8)
    assert (found.pages, found.partial, found.positions) == (pages[:1], (pages[1], 2), 6)
    found = found_in(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], 10)
    assert (found.pages, found.partial, found.positions) == (pages[:2], (pages[2], 2), 10)
    assert found_in(cache, [1, 2, 3, 4], 3).positions == 3
    assert found_in(cache, [2, 2, 3, 4, 5], 4).positions == 0
    assert found_in(cache, [1, 2, 3, 4, 5], 4, b"another").positions == 0


def test_what_was_not_used_for_the_longest_goes_first_and_ends_before_beginnings() -> None:
    cache = Cache(4, 2)
    old, new = filled(cache, [1, 1, 2, 2]), filled(cache, [3, 3, 4, 4])
    cache.release(old)
    cache.release(new)
    assert [cache.take(), cache.take()] == old[::-1]
    assert found_in(cache, [1, 1, 5], 2).positions == 0
    found = found_in(cache, [3, 3, 4, 4, 5], 4)
    assert found.pages == new
    assert cache.available == 0
    with pytest.raises(AssertionError, match="all pages are held"):
        cache.take()


def test_names_of_images_meet_no_other() -> None:
    one, other = image_names("00" * 32, 3000), image_names("00" * 31 + "01", 3000)
    assert not set(one) & set(other)
    assert min(one) > 2**40
    assert list(one) == list(image_names("00" * 32, 3000))


def test_a_row_as_long_as_the_cache_does_not_wait_for_its_own_beginning() -> None:
    """Whose last page would be copied from one for which there is no room beside it."""
    scheduler = Scheduler(Cache(4, 4), 2)
    for last in (1, 2):
        row = Row([7] * 14 + [last], ROOT)
        scheduler.add(row)
        (part,) = scheduler.reading(100)
        scheduler.advance(row, part.count)
        scheduler.stop(row)
    assert row.cached == 12


def test_equal_pages_among_many_siblings_are_one() -> None:
    cache = Cache(200, 2)
    first = filled(cache, [0, 0])
    others = [filled(cache, [1, number])[0] for number in range(100)]
    again = filled(cache, [0, 0])
    for pages in (first, others, again):
        cache.release(pages)
    assert cache.idle == 101
    assert len({cache.take() for _ in range(200)}) == 200


def test_a_row_that_reads_again_does_not_stop_one_that_reads() -> None:
    scheduler = Scheduler(Cache(7, 4), 3)
    long, other = Row([1] * 10, ROOT), Row([2] * 9, ROOT)
    scheduler.add(long)
    assert scheduler.reading(100) == [Part(long, 10)]
    scheduler.advance(long, 10)
    long.push(3)
    scheduler.add(other)
    assert scheduler.reading(2) == [Part(other, 2)]
    scheduler.advance(other, 2)
    long.names += [1] * 6  # it has grown past what is free
    scheduler.read_again(long, b"long")
    assert scheduler.reading(100) == [Part(other, 7)]


# --- the whole engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pumice.Model:
    return pumice.load(tiny.hf_folder(tmp_path_factory.mktemp("engine") / "hf", family="1.6", seed=11))


@pytest.fixture(scope="module")
def images(model: pumice.Model) -> list[Prepared]:
    random_numbers = np.random.default_rng(0)
    sizes = [(28, 28), (40, 90), (90, 40), (60, 60), (60, 60)]
    pictures = [Image.fromarray(random_numbers.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return [prepare(each, *model.eyes()) for each in pictures]


def prompt_ids(model: pumice.Model, shown: list[Prepared], words: list[int]) -> list[int]:
    ids = [1]
    for image in shown:
        ids += [model.config.image_token_id] * image.grid.tokens + words[:1]
    return ids + words


def plain(model: pumice.Model, ids: list[int], shown: list[Prepared], tokens: int) -> list[int]:
    with torch.inference_mode():
        features = [model.network.encode(torch.from_numpy(each.pixels), [each.grid])[0] for each in shown]
    return list(llava.generate(model.network, ids, features, tokens))


def taken(generation: Generation) -> list[int]:
    return [step.token for step in generation.steps]


def test_random_mixtures_say_what_the_plain_loop_says(model: pumice.Model, images: list[Prepared]) -> None:
    """Lengths, images, arrivals, cancellations, preemptions, sizes of parts and states of the cache."""

    tried = []

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32))
    def holds(seed: int) -> None:
        tried.append(mixture(model, images, random.Random(seed)))

    holds()
    assert sum(tried) > 10  # drafts


class Bold(Pace):
    """Tries drafts of any length, whatever they cost, and keeps count."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self._draw, self.tried = draw, 0

    def length(self, drafts: Sequence[tuple[int, float]]) -> int:
        self.tried += any(length for length, _ in drafts)
        return self._draw.choice([0, 1, 3, 16])


def mixture(model: pumice.Model, images: list[Prepared], draw: random.Random) -> int:
    limits = Limits(
        rows=draw.randint(1, 5),
        chunk=draw.choice([1, 3, 16]),
        alone_chunk=draw.choice([1, 5, 64]),
        tiles=draw.randint(1, 3),
    )
    engine = Engine(model.network, limits, positions=draw.choice([160, 224, 480, 4096]))
    if draw.random() < 0.5:
        Pretended(draw.choice([0, 3, 20])).eyes_of(engine._eyes)
    pace = engine._pace = Bold(draw)
    beginnings = [draw.choices(images, k=draw.randint(0, 2)) for _ in range(3)]
    waiting = deque()
    for _ in range(draw.randint(2, 9)):
        shown = draw.choice(beginnings)
        ids = prompt_ids(model, shown, [draw.randint(10, 60) for _ in range(draw.randint(1, 40))])
        targets = tuple(ids[-draw.randint(1, 6) :]) if draw.random() < 0.3 else ()
        waiting.append(Request(ids, shown, Sampling(max_tokens=draw.randint(1, 30)), targets=targets))
    under_way: list[Generation] = []
    cancelled: set[Generation] = set()
    while waiting or not all(each.ended for each in under_way):
        if waiting and draw.random() < 0.4:
            under_way.append(engine.submit(waiting.popleft()))
        if under_way and draw.random() < 0.02:
            generation = draw.choice(under_way)
            if not generation.ended:
                engine.cancel(generation)
                cancelled.add(generation)
        engine.step()
    for generation in under_way:
        request, said = generation.request, taken(generation)
        expected = [] if request.targets else plain(model, request.ids, request.images, request.sampling.max_tokens)
        assert said == (expected[: len(said)] if generation in cancelled else expected)
        if generation not in cancelled:
            assert [generation.told[place] for place in range(len(request.targets))] == pytest.approx(
                likelihoods(model, request), abs=2e-4
            )
    assert engine.pages_held == 0
    return pace.tried


def likelihoods(model: pumice.Model, request: Request) -> list[float]:
    """By the plain flow, in one pass over all ids."""
    count = len(request.targets)
    if count == 0:
        return []
    scores_TV = model.logits(request.ids, model.features(request.images), count).log_softmax(-1)
    return scores_TV[range(count), list(request.targets)].tolist()


def test_two_images_share_nothing_and_one_asked_twice_does(model: pumice.Model, images: list[Prepared]) -> None:
    engine = Engine(model.network)
    one, other = images[3], images[4]
    assert one.grid == other.grid

    def cached(image: Prepared, words: list[int]) -> int:
        generation = engine.submit(Request(prompt_ids(model, [image], words), [image], Sampling(max_tokens=2)))
        list(engine.follow(generation))
        return generation.cached_tokens

    assert cached(one, [5, 6, 7]) == 0
    assert cached(other, [5, 6, 7]) == 1  # the token before it
    assert cached(one, [8, 9]) == 1 + one.grid.tokens
    assert cached(other, [5, 6, 8]) == 1 + other.grid.tokens + 3


def test_equal_questions_that_come_together_are_read_once(model: pumice.Model, images: list[Prepared]) -> None:
    engine = Engine(model.network, Limits(alone_chunk=4096))
    ids = prompt_ids(model, images[:1], [5, 6, 7, 8])
    under_way = [engine.submit(Request(ids, images[:1], Sampling(max_tokens=3))) for _ in range(3)]
    engine.step()
    assert [each.cached_tokens for each in under_way] == [0, len(ids) - 1, len(ids) - 1]
    while engine.step():
        pass
    assert len({tuple(taken(each)) for each in under_way}) == 1


def test_images_of_waiting_requests_are_encoded_ahead(
    model: pumice.Model, images: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: tiles of several requests in one pass; with room for one image's features no request starves."""
    passes: list[int] = []
    whole = type(model.network).look

    def counted(self: object, pixels: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels))
        return whole(self, pixels)

    monkeypatch.setattr(type(model.network), "look", counted)
    for feature_bytes, most in ((2**28, 2), (0, 9)):
        passes.clear()
        engine = Engine(model.network, Limits(alone_chunk=16, alone_tiles=8, tiles=8, feature_bytes=feature_bytes))
        Pretended(0).eyes_of(engine._eyes)
        requests = [
            Request(prompt_ids(model, [image], [15]), [image], Sampling(max_tokens=3))
            for image in (*images[:3], images[4])
        ]
        under_way = [engine.submit(each) for each in requests]
        while engine.step():
            pass
        assert len(passes) <= most
        for generation, request in zip(under_way, requests):
            assert taken(generation) == plain(model, request.ids, request.images, 3)


@pytest.mark.parametrize("queries", [5, 6, 7, math.inf])
def test_rows_gain_tokens_while_tiles_are_encoded(model: pumice.Model, images: list[Prepared], queries: float) -> None:
    """On a second stream: each step has its token, one look is under way at a time, and its features are taken when
    they are there, or when nobody would wait for them. There is room for one image's."""
    limits = Limits(drafts=0, alone_tiles=4, feature_bytes=0)
    engine, side = Engine(model.network, limits), Pretended(queries)
    side.eyes_of(engine._eyes)
    short = engine.submit(Request([5] * 4, [], Sampling(max_tokens=12)))
    engine.step()
    under_way = [short] + [
        engine.submit(Request(prompt_ids(model, [image], [15]), [image], Sampling(max_tokens=3)))
        for image in images[1:3]
    ]
    steps = 0
    while not side.handed_over:
        steps += 1
        engine.step()
        assert side.looks == 1 or side.handed_over
        assert len(short.steps) == min(12, 1 + steps)
    assert steps == 12 if queries == math.inf else 1 < steps < 8
    while engine.step():
        pass
    for generation in under_way:
        request = generation.request
        assert generation.error is None
        assert taken(generation) == plain(model, request.ids, request.images, request.sampling.max_tokens)


@pytest.mark.parametrize("ahead", [True, False])
def test_what_a_look_that_broke_off_has_made_is_not_lost(
    model: pumice.Model, images: list[Prepared], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Features, which must still be waited for, or tiles."""
    engine = Engine(model.network, Limits(rows=1 if ahead else 2, alone_tiles=64))
    Pretended(math.inf).eyes_of(engine._eyes)
    whole = type(model.network).merge

    def fails(self: object, tiles: torch.Tensor, grid: object) -> torch.Tensor:
        if grid == images[1].grid:
            raise MemoryError
        return whole(self, tiles, grid)

    monkeypatch.setattr(type(model.network), "merge", fails)
    shown = images[1:3] if ahead else [images[2], images[1]]
    under_way = [
        engine.submit(Request(prompt_ids(model, [image], [15]), [image], Sampling(max_tokens=3))) for image in shown
    ]
    for _ in range(20):
        engine.step()
    monkeypatch.undo()
    lost, kept = under_way if ahead else under_way[::-1]
    assert isinstance(lost.error, UserError)
    assert kept.error is None
    assert taken(kept) == plain(model, kept.request.ids, kept.request.images, 3)


def test_a_cancelled_request_frees_its_pages_at_once(model: pumice.Model, images: list[Prepared]) -> None:
    engine = Engine(model.network, Limits(alone_chunk=8))
    ids = prompt_ids(model, images[:2], [5] * 40)
    generation = engine.submit(Request(ids, images[:2], Sampling(max_tokens=50)))
    engine.step()
    engine.step()
    assert engine.pages_held > 0
    engine.cancel(generation)
    assert engine.pages_held == 0
    assert not engine.step()
    assert list(engine.follow(generation)) == []


def test_a_request_without_room_fails_and_the_others_go_on(model: pumice.Model) -> None:
    engine = Engine(model.network, positions=64)
    with pytest.raises(UserError, match="80 tokens long; the cache has room for 64"):
        engine.submit(Request([5] * 80, [], Sampling()))
    long = engine.submit(Request([5] * 40, [], Sampling(max_tokens=60)))
    short = engine.submit(Request([6] * 10, [], Sampling(max_tokens=5)))
    assert len(list(engine.follow(short))) == 5
    with pytest.raises(UserError, match="the cache has no room for more"):
        list(engine.follow(long))
    again = engine.submit(Request([6] * 10, [], Sampling(max_tokens=5)))
    assert len(list(engine.follow(again))) == 5
    assert engine.pages_held == 0


def test_a_row_whose_scores_are_no_numbers_fails_alone(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model.network)
    whole = model.network.logits
    good, bad = (engine.submit(Request([id] * 5, [], Sampling(max_tokens=6))) for id in (5, 6))
    engine.step()
    monkeypatch.setattr(
        model.network, "logits", lambda hidden: whole(hidden).index_fill(0, torch.tensor([1]), float("nan"))
    )
    engine.step()
    monkeypatch.undo()
    assert len(list(engine.follow(good))) == 6
    with pytest.raises(UserError, match="scores are not numbers"):
        list(engine.follow(bad))


def test_pages_of_a_preempted_row_are_found_again(model: pumice.Model) -> None:
    """Two rows that together need more than there is: the younger waits, and loses none of its tokens."""
    engine = Engine(model.network, Limits(drafts=0), positions=160)
    requests = [Request([first] * 50, [], Sampling(max_tokens=40)) for first in (15, 16)]
    expected = [plain(model, each.ids, [], 40) for each in requests]
    assert [len(each) for each in expected] == [40, 40]
    under_way = [engine.submit(each) for each in requests]
    waited = 0
    while engine.step():
        waited += under_way[1].row.new > 0 and not under_way[1].row.pages and not under_way[0].ended
    assert waited > 10
    assert [taken(each) for each in under_way] == expected


@pytest.mark.usefixtures("small_pages")
def test_forced_tokens_find_room_in_new_pages(model: pumice.Model) -> None:
    names = ["the name of the shop", "the sum of all that was bought"]
    schema = {"type": "object", "properties": {each: {"type": "boolean"} for each in names}, "required": names}
    engine = Engine(model.network, positions=220)
    form = pumice.Form.of(schema=schema)
    assert form is not None
    requests = [
        Request(prompt_ids(model, [], [10 + at] * 9), [], Sampling(max_tokens=120), model._grammar(form))
        for at in range(3)
    ]
    under_way = [engine.submit(each) for each in requests]
    while engine.step():
        pass
    for generation in under_way:
        assert generation.error is None
        text = b"".join(model.tokenizer.bytes_of(token) for token in taken(generation)).decode()
        assert set(form.value(text)) == set(names)
    assert engine.pages_held == 0


def test_forced_tokens_past_the_cache_fail_their_request_alone(model: pumice.Model) -> None:
    """Whoever runs beside it: a row that can never be admitted again would be waited for without end."""
    form = pumice.Form.of(regex=f"[ab]{'xyz ' * 30}z[a-z]{{9}}")
    assert form is not None
    engine = Engine(model.network, Limits(drafts=0), positions=96)
    goes_on = dict.fromkeys(model.config.stop_ids, -100.0)
    beside = engine.submit(Request([20] * 10, [], Sampling(max_tokens=80, logit_bias=goes_on)))
    engine.step()
    long = engine.submit(Request([21] * 10, [], Sampling(max_tokens=500), model._grammar(form)))
    for _ in range(300):
        engine.step()
    assert beside.ended
    assert long.ended
    assert len(taken(beside)) == 80
    with pytest.raises(UserError, match="the cache has no room for more"):
        list(engine.follow(long))
    assert engine.pages_held == 0


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("forward", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ("forward", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("look", "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_request_without_memory_fails_alone(
    model: pumice.Model, images: list[Prepared], monkeypatch: pytest.MonkeyPatch, where: str, words: str
) -> None:
    engine = Engine(model.network)
    short = engine.submit(Request([5] * 4, [], Sampling(max_tokens=8)))
    engine.step()
    large = engine.submit(Request(prompt_ids(model, images[:1], [15]), images[:1], Sampling(max_tokens=3)))
    whole = getattr(type(model.network), where)

    def fails(self: object, x: torch.Tensor, *others: object) -> torch.Tensor:
        if where == "look" or x.shape[1] > 4:
            raise RuntimeError(words)
        return whole(self, x, *others)

    monkeypatch.setattr(type(model.network), where, fails)
    for _ in range(5):
        engine.step()
    with pytest.raises(UserError, match="not enough memory"):
        list(engine.follow(large))
    assert len(list(engine.follow(short))) == 8
    assert engine.pages_held == 0


def test_a_step_that_breaks_off_leaves_whole_rows(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model.network)
    requests = [Request([id] * 9, [], Sampling(max_tokens=9)) for id in (15, 16)]
    under_way = [engine.submit(each) for each in requests]
    for _ in range(3):
        engine.step()
    monkeypatch.setattr("pumice.engine.draw_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    while engine.step():
        pass
    for generation, request in zip(under_way, requests):
        assert taken(generation) == plain(model, request.ids, [], 9)


def test_a_stream_that_is_dropped_frees_its_pages(model: pumice.Model) -> None:
    for begin in (model.stream, model.chat().stream):
        stream = begin("Say it")
        piece = next(iter(stream))
        assert piece
        assert model.engine.pages_held > 0
        del stream
        assert model.engine.pages_held == 0


def test_a_cancel_within_a_step_waits_for_its_end(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the garbage collection drops a stream while the network runs."""
    engine = Engine(model.network)
    dropped, kept = (engine.submit(Request([id] * 5, [], Sampling(max_tokens=6))) for id in (15, 16))
    engine.step()
    whole = type(model.network).forward

    def forward(self: object, *inputs: object) -> torch.Tensor:
        engine.cancel(dropped)
        return whole(self, *inputs)

    monkeypatch.setattr(type(model.network), "forward", forward)
    engine.step()
    monkeypatch.undo()
    assert dropped.ended
    assert len(list(engine.follow(kept))) == 6
    assert engine.pages_held == 0


def test_nobody_waits_for_a_step_to_come_or_to_go(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model.network)
    kept, dropped = (engine.submit(Request([id] * 5, [], Sampling(max_tokens=6))) for id in (15, 16))
    engine.step()
    whole, inside, goes_on = type(model.network).forward, threading.Event(), threading.Event()

    def forward(self: object, *inputs: object) -> torch.Tensor:
        inside.set()
        assert goes_on.wait(30)
        return whole(self, *inputs)

    monkeypatch.setattr(type(model.network), "forward", forward)
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    try:
        assert inside.wait(30)
        late, fleeting = (engine.submit(Request([id] * 5, [], Sampling(max_tokens=6))) for id in (17, 18))
        engine.cancel(dropped)
        engine.cancel(fleeting)
        assert not dropped.ended
    finally:
        goes_on.set()
    stepping.join(30)
    monkeypatch.undo()
    assert dropped.ended
    assert fleeting.ended
    for generation, id in ((kept, 15), (late, 17)):
        assert [step.token for step in engine.follow(generation)] == plain(model, [id] * 5, [], 6)
    assert engine.pages_held == 0
    assert not engine._generations


def test_many_threads_come_and_go(model: pumice.Model) -> None:
    """While one runs the engine: nothing is lost, nothing stays."""
    engine, over = Engine(model.network, Limits(rows=3), positions=200), threading.Event()
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            generation = engine.submit(Request([draw.randint(10, 14)] * draw.randint(1, 9), [], Sampling(max_tokens=4)))
            if draw.random() < 0.5:
                time.sleep(draw.random() / 500)
                engine.cancel(generation)
            late = time.perf_counter() + 60
            while not generation.ended and time.perf_counter() < late:
                time.sleep(0.0005)
            if not generation.ended:
                wrong.append("a request never ended")

    def run() -> None:
        while not over.is_set():
            if not engine.step():
                time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    running = threading.Thread(target=run)
    for each in (running, *threads):
        each.start()
    for each in threads:
        each.join()
    over.set()
    running.join()
    assert wrong == []
    assert (engine.pages_held, len(engine._generations), engine.step()) == (0, 0, False)


def test_another_engine_while_questions_are_under_way(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """`limit` in the middle: what was begun goes on where it began."""
    questions = [pumice.Question(f"Say {word}.", sampling=Sampling(max_tokens=5)) for word in ("this", "that")]
    expected = [each.tokens for each in model.ask_all(questions)]
    begun = pumice.answer.Answering.take

    def take(self: pumice.answer.Answering) -> str:
        model.limit(Limits())
        return begun(self)

    monkeypatch.setattr(pumice.answer.Answering, "take", take)
    found: list[list[tuple[int, ...]]] = []
    asking = threading.Thread(
        target=lambda: found.append([each.tokens for each in model.ask_all(questions)]), daemon=True
    )
    asking.start()
    asking.join(30)
    assert found == [expected]


def test_features_without_memory_say_so(
    model: pumice.Model, images: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.network), "look", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(UserError, match="not enough memory"):
        Engine(model.network).features(images[:1])


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"chunk": -1}, {"tiles": 1.5}, {"cache_bytes": True}, {"rows": 2**63}])
def test_limits_are_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Limits(**wrong)


# --- the disk ---------------------------------------------------------------------------------------------------------


def asked(model: pumice.Model, limits: Limits, image: Prepared, words: list[int]) -> tuple[list[int], int]:
    """The tokens of an answer, by an engine of its own, and how much of the prompt it found."""
    engine = Engine(model.network, limits)
    generation = engine.submit(Request(prompt_ids(model, [image], words), [image], Sampling(max_tokens=4)))
    tokens = [step.token for step in engine.follow(generation)]
    engine.wait()
    assert engine.pages_held == 0
    return tokens, generation.cached_tokens


@pytest.fixture
def large(model: pumice.Model) -> Prepared:
    pixels = np.random.default_rng(3).integers(0, 256, (28, 84, 3), dtype=np.uint8)
    prepared = prepare(Image.fromarray(np.tile(pixels, (10, 10, 1))), *model.eyes())
    assert prepared.grid.tokens < 32
    return prepared


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an image of the tiny model has some."""
    monkeypatch.setattr("pumice.engine.PAGE", 4)


@pytest.mark.usefixtures("small_pages")
def test_a_later_process_finds_what_was_read_of_an_image(
    model: pumice.Model, large: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(cache_dir=tmp_path / "cache")
    first = asked(model, limits, large, [15, 16, 17])
    monkeypatch.setattr(type(model.network), "look", None)  # from here on no image can be encoded
    whole = (1 + large.grid.tokens) // 4 * 4
    assert first[1] == 0
    assert asked(model, limits, large, [15, 16, 17]) == (first[0], whole)
    # In another place the image is read again, from features that are known.
    engine = Engine(model.network, limits)
    ids = [15, 16, *prompt_ids(model, [large], [17, 18])]
    generation = engine.submit(Request(ids, [large], Sampling(max_tokens=4)))
    tokens = [step.token for step in engine.follow(generation)]
    assert generation.cached_tokens == 0
    monkeypatch.undo()
    assert tokens == plain(model, ids, [large], 4)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "empty"])
def test_a_damaged_file_is_no_file(model: pumice.Model, large: Prepared, tmp_path: Path, damage: str) -> None:
    limits = Limits(cache_dir=tmp_path)
    expected, _ = asked(model, limits, large, [15, 16])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for path in files:
        held = bytearray(path.read_bytes())
        if damage == "bit":
            held[-9] ^= 4
        path.write_bytes({"cut": held[:-30], "bit": held, "empty": b""}.get(damage, files[0].read_bytes()))
        if damage == "foreign":
            save_file({"keys.0": torch.zeros(3, 2)}, path)
    assert asked(model, limits, large, [15, 16]) == (expected, 0)
    assert [each.stat().st_size > 100 for each in tmp_path.iterdir()] == [True, True]
    assert asked(model, limits, large, [15, 16])[1] > 0


@pytest.mark.usefixtures("small_pages")
def test_another_model_finds_nothing(model: pumice.Model, large: Prepared, tmp_path: Path) -> None:
    other = pumice.load(tiny.hf_folder(tmp_path / "hf", family="1.6", seed=12))
    limits = Limits(cache_dir=tmp_path / "cache")
    asked(model, limits, large, [15, 16])
    answer, cached = asked(other, limits, large, [15, 16])
    assert cached == 0
    assert answer == plain(other, prompt_ids(other, [large], [15, 16]), [large], 4)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", ["language_model.layers.1.mlp.up_proj.weight", "language_model.norm.weight"])
def test_one_other_weight_is_another_model(model: pumice.Model, large: Prepared, tmp_path: Path, name: str) -> None:
    """As of two fine-tunes of one model: any number counts, also the last."""
    limits = Limits(cache_dir=tmp_path)
    asked(model, limits, large, [15, 16])
    weight = model.network.get_parameter(name)
    known = archive.model_digest(model.network)
    for place in (0, 77, weight.numel() // 2 + 1, weight.numel() - 1):
        before = weight.view(-1)[place % weight.numel()].clone()
        weight.view(-1)[place % weight.numel()] = torch.nextafter(before, before + 1)
        try:
            assert archive.model_digest(model.network) != known
            assert asked(model, limits, large, [15, 16])[1] == 0
        finally:
            weight.view(-1)[place % weight.numel()] = before
    assert archive.model_digest(model.network) == known
    assert asked(model, limits, large, [15, 16])[1] > 0


def test_a_digest_is_of_the_bytes_wherever_they_lie() -> None:
    numbers = torch.randn(3, 70_001)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        values = numbers.to(dtype)
        room = torch.zeros(values.nbytes + 9, dtype=torch.uint8)
        if dtype == torch.uint8:
            room[3 : 3 + values.nbytes] = values.flatten()
            moved = room[3 : 3 + values.nbytes].view(values.shape)
            assert archive._told(moved) == archive._told(values)
        assert archive._told(values.clone()) == archive._told(values)
        assert archive._told(values[:, :-1]) != archive._told(values)
        assert archive._told(values.flip(1)) != archive._told(values)
    assert archive._told(torch.empty(0)) == b""


@pytest.mark.usefixtures("small_pages")
def test_pages_that_could_not_be_read_back_are_given_back(
    model: pumice.Model, large: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(cache_dir=tmp_path)
    asked(model, limits, large, [15, 16])
    engine = Engine(model.network, limits)
    engine.submit(Request(prompt_ids(model, [large], [15, 16]), [large], Sampling(max_tokens=4)))
    monkeypatch.setattr(Cache, "keep", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        engine.step()
    monkeypatch.undo()
    assert engine.pages_held == 0


@pytest.mark.usefixtures("small_pages")
def test_the_folder_keeps_to_its_size(model: pumice.Model, images: list[Prepared], tmp_path: Path) -> None:
    limits = Limits(cache_dir=tmp_path)
    asked(model, limits, images[1], [15])
    one = sum(each.stat().st_size for each in tmp_path.iterdir())
    limits = Limits(cache_dir=tmp_path, disk_bytes=2 * one)
    for image in images[1:]:
        asked(model, limits, image, [15])
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= 2 * one
    assert asked(model, limits, images[4], [15])[1] > 0
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / ".left.999999999.part").write_bytes(b"by a process that was killed")
    asked(model, Limits(cache_dir=tmp_path / "none", disk_bytes=0), images[4], [15])
    assert list((tmp_path / "none").iterdir()) == []


def test_a_cache_folder_that_cannot_be(model: pumice.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Engine(model.network, Limits(cache_dir=tmp_path / "file" / "cache"))


# --- answers in a form ------------------------------------------------------------------------------------------------

RECEIPT = {
    "type": "object",
    "properties": {"shop": {"type": "string", "maxLength": 4}, "total": {"type": "integer", "maximum": 99}},
    "required": ["shop", "total"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_have_their_form_alone_batched_and_streamed(model: pumice.Model, temperature: float) -> None:
    drawn = Sampling(temperature, seed=3, max_tokens=200)
    form = pumice.Form.of(schema=RECEIPT)
    questions = [pumice.Question(f"Read it {n}.", None, sampling=drawn, form=form if n % 2 else None) for n in range(6)]
    answers = model.ask_all(questions)
    for question, answer in zip(questions, answers):
        assert answer.text == model.answer(question).text
        if question.form is not None:
            assert answer.finish_reason == "stop"
            assert set(answer.value) == {"shop", "total"}
            assert len(answer.value["shop"]) <= 4
            assert -(10**15) < answer.value["total"] <= 99
        else:
            with pytest.raises(UserError, match="has no form"):
                _ = answer.value
    stream = model.stream("Read it 1.", sampling=drawn, schema=RECEIPT)
    assert "".join(stream) == answers[1].text == stream.answer.text


def test_a_seed_says_the_same_in_a_form_whatever_runs_beside_it(model: pumice.Model) -> None:
    """Forced tokens are read at once where few rows run, and drawn one by one where many do."""
    form = pumice.Form.of(schema=RECEIPT)
    asked = [
        pumice.Question(f"Read it {n}.", sampling=Sampling(1.2, seed=n, max_tokens=100), form=form) for n in range(20)
    ]
    assert [each.tokens for each in model.ask_all(asked)] == [model.answer(each).tokens for each in asked]


def test_forced_tokens_are_read_at_once(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    whole = type(model.network).forward

    def counted(self: object, x: torch.Tensor, batch: object = None) -> torch.Tensor:
        passes.append(x.shape[1])
        return whole(self, x, batch)

    monkeypatch.setattr(type(model.network), "forward", counted)
    monkeypatch.setattr(model, "_engine", Engine(model.network, Limits(drafts=0)))
    answer = model.ask("Read it.", sampling=Sampling(max_tokens=300), schema=RECEIPT)
    assert len(passes) < len(answer.tokens) - 5
    assert max(passes[1:]) > 5
    passes.clear()
    with_chances = model.ask("Read it.", sampling=Sampling(max_tokens=300, logprobs=0), schema=RECEIPT)
    assert len(passes) == len(with_chances.tokens)


def test_an_answer_in_a_form_that_is_cut_short_says_so(model: pumice.Model) -> None:
    answer = model.ask("Read it.", sampling=Sampling(max_tokens=5), schema=RECEIPT)
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 5)
    with pytest.raises(UserError, match="cut short"):
        _ = answer.value
    assert model.engine.pages_held == 0


@pytest.mark.parametrize("stops", [Sampling(stop=["}"]), Sampling(stop_ids=[9])])
def test_what_would_cut_a_form_short_is_refused(model: pumice.Model, stops: Sampling) -> None:
    with pytest.raises(UserError, match="came with a form"):
        model.ask("Read it.", sampling=stops, schema=RECEIPT)
