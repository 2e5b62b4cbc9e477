"""The engine: requests join and leave between steps, and share what their prompts have in common.

X positions whose scores are wanted · D width · V vocabulary
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pumice.engine.archive import Archive, model_digest
from pumice.engine.cache import Cache
from pumice.engine.disk import Disk
from pumice.engine.drafts import Pace
from pumice.engine.eyes import Eyes
from pumice.engine.generation import Generation, Request, Step
from pumice.engine.limits import Limits
from pumice.engine.passes import Passes, Stretch, cache_type, out_of_memory, position_bytes
from pumice.engine.sampling import Drawn, Sampling, draw_all, no_numbers
from pumice.engine.scheduler import Part, Row, Scheduler
from pumice.errors import UserError
from pumice.image import Prepared
from pumice.network.llava import Llava

__all__ = ["PAGE", "Engine", "Generation", "Limits", "Request", "Sampling", "Step", "position_bytes"]

PAGE = 32
"""Positions of a page."""
STEADY_ROWS = 8
"""Positions of a pass where all are to be of one size: a step of one row takes as long as one of so many, and a prompt
is read so many at a time."""
MOST_WAIT_S = 0.05
"""Before it is looked again whether there are pages."""


class Engine:
    """Runs the network for many requests at a time; each gets the tokens that it would get alone.

    A request ends with an end token (reason `stop`), or at its `max_tokens` or the model's last position (`length`).
    Any thread may call it; one step runs at a time.
    """

    def __init__(self, network: Llava, limits: Limits | None = None, positions: int | None = None) -> None:
        """positions: what the cache holds, whatever its bytes are."""
        self._network, self._limits = network, (limits := limits or Limits())
        places = (network.like.device, network.language_model.norm.weight.device)
        elsewhere = [each.type for each in places if each.type != "cpu"]
        if limits.deterministic and elsewhere:
            raise UserError(
                f"deterministic answers were asked for on {elsewhere[0]}, where there are none",
                hint="load the model with device='cpu', or leave deterministic out",
            )
        config = network.config.text
        if positions is None:
            most = max(config.max_positions, limits.cache_bytes // position_bytes(network))
            positions = min(most, limits.rows * config.max_positions)
        count = -(-positions // PAGE)
        self._scheduler = Scheduler(Cache(count, PAGE), limits.rows)
        self._pace = Pace()
        self._passes = Passes(network, count, PAGE, STEADY_ROWS if limits.deterministic else None)
        self._archive: Archive | None = None
        kept_as = (cache_type(network), PAGE, *(["deterministic"] if limits.deterministic else []))
        model = "" if limits.cache_dir is None else model_digest(network, *kept_as)
        # Rows that turn by other rotary divisors share nothing.
        self._short, self._long = (f"{kind} {model}".encode() for kind in ("short", "long"))
        if limits.cache_dir is not None:
            disk = Disk(limits.cache_dir, limits.disk_bytes)
            self._archive = Archive(disk, model, self._scheduler.cache, self._passes.keys, self._passes.values)
        self._eyes = Eyes(network, limits.feature_bytes, self._archive)
        self._generations: dict[Row, Generation] = {}
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._arrived: deque[Generation] = deque()
        self._unwanted: deque[Generation] = deque()
        """Submitted and cancelled since rows were changed last: neither waits for the step that runs."""

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """The request waits for its turn, and the caller for nothing. Raises UserError for a prompt that the cache has
        no room for, and settings that name tokens which the model does not have."""
        request.sampling.check_vocabulary(self._network.config.text.vocab)
        if not self._scheduler.fits(len(request.ids) + request.draws):
            raise UserError(
                f"the prompt is {len(request.ids)} tokens long; the cache has room for {self._scheduler.positions}",
                hint="send fewer or smaller images, fewer turns or less text, or give the engine more memory",
            )
        root = self._root(len(request.ids))
        generation = Generation.of(request, self._network.config.image_token_id, root)
        self._arrived.append(generation)
        return generation

    def likelihoods(self, requests: Iterable[Request]) -> list[list[float]]:
        """The log-probabilities of the targets of each request. Raises what a request failed with."""
        return [[each.told[place] for place in sorted(each.told)] for each in self._followed(requests)]

    def means(self, requests: Iterable[Request]) -> list[Tensor]:
        """The mean hidden states of pooled requests. Raises what a request failed with."""
        return [each.mean for each in self._followed(requests)]

    def _followed(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """The requests in their order, each when it has ended; as many as run at a time are under way."""
        coming = iter(requests)
        under_way = deque(map(self.submit, itertools.islice(coming, self._limits.rows)))
        try:
            while under_way:
                for _ in self.follow(under_way[0]):
                    pass
                yield under_way.popleft()
                under_way.extend(map(self.submit, itertools.islice(coming, 1)))
        finally:
            for each in under_way:
                self.cancel(each)

    @torch.inference_mode()
    def features(self, images: Sequence[Prepared]) -> list[Tensor]:
        """What the language model gets of each image: (tokens, D), row ends included. Between passes others may have
        their step. Raises UserError where memory lacks."""
        found: list[Tensor] = []
        while len(found) < len(images):
            next_ = images[len(found) :] if self._eyes.apart else images[len(found) : len(found) + 1]
            with self._alone():
                if self._eyes.features(next_[0]) is None:
                    try:
                        self._eyes.look(next_, self._limits.tiles_of(decoding=False))
                    except (MemoryError, RuntimeError) as error:
                        raise out_of_memory(error) from error
                if (features_XD := self._eyes.features(next_[0])) is not None:
                    found.append(features_XD)
        return found

    def wait(self) -> None:
        """Until what goes to the disk is there."""
        if self._archive is not None:
            self._archive.wait()

    def cancel(self, generation: Generation) -> None:
        """No more tokens for this request; its pages are free at once, or when the step ends that runs now, for which
        the caller does not wait."""
        self._unwanted.append(generation)
        self._end_unwanted()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Rows, pages and images are changed by one thread at a time."""
        try:
            with self._lock:
                yield
        finally:
            self._end_unwanted()

    def _end_unwanted(self) -> None:
        """Unless somebody is at work, who then comes here afterwards. That may be this thread: the garbage collection
        drops streams in the middle of a step."""
        while self._unwanted and self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """What came since rows were changed last."""
        # Cancelled first: of a request that came and went meanwhile, the arrival is then seen too.
        unwanted = [self._unwanted.popleft() for _ in range(len(self._unwanted))]
        while self._arrived:
            generation = self._arrived.popleft()
            self._generations[generation.row] = generation
            self._scheduler.add(generation.row)
        for generation in unwanted:
            if not generation.ended:
                self._end(generation)

    def follow(self, generation: Generation) -> Iterator[Step]:
        """The steps of a request as they come; runs the engine where nobody else does. Raises what it failed with.

        A request whose steps nobody follows to the end any more is cancelled.
        """
        try:
            while True:
                if not generation.ended and not generation.steps:
                    self.step()
                while generation.steps:
                    yield generation.steps.popleft()
                if generation.ended and not generation.steps:
                    if generation.error is not None:
                        raise generation.error
                    return
        finally:
            self.cancel(generation)

    @property
    def cache_bytes(self) -> int:
        """What keys and values take when all pages are used."""
        return self._passes.bytes

    @property
    def pages_held(self) -> int:
        """Pages of requests under way."""
        return self._scheduler.cache.held

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """One more token for every row that has one, and the next part of a prompt. False: there is nothing to do."""
        with self._alone():
            self._settle()
            if self._scheduler.idle:
                return False
            try:
                decoding = self._decode()
                if not self._read(decoding) and not decoding:
                    self._released.wait(MOST_WAIT_S)  # for pages that go to the disk
            finally:
                self._scheduler.repair()
            return True

    def _decode(self) -> bool:
        rows = self._scheduler.decoding()
        if not rows:
            return False
        started = time.perf_counter()
        stretches = self._drafted([self._generations[row] for row in rows])
        try:
            logits_XV = self._passes.run(stretches)
        except (MemoryError, RuntimeError) as error:
            self._fail(stretches[-1].generation, out_of_memory(error))
            return True
        for row in rows:
            self._scheduler.advance(row, 1)
        self._take(stretches, logits_XV, started)
        self._pace.learn(len(logits_XV), time.perf_counter() - started)
        return True

    def _drafted(self, generations: Sequence[Generation]) -> list[Stretch]:
        """The last token of each row, and what is tried behind it."""
        drafts = [self._draft(each) for each in generations]
        most = self._pace.length([(len(draft), each.lookup.acceptance) for each, draft in zip(generations, drafts)])
        stretches = []
        for generation, draft in zip(generations, drafts):
            tried = draft[: self._scheduler.widen(generation.row, min(most, len(draft)))]
            stretches.append(Stretch(generation, 1 + len(tried), 1 + len(tried), tuple(tried)))
        return stretches

    def _draft(self, generation: Generation) -> list[int]:
        """What may be tried: no more than the answer may have, and than its form lets through."""
        row, left = generation.row, generation.request.sampling.max_tokens - generation.row.new - 1
        most = min(self._limits.drafts, left, self._network.config.text.max_positions - len(row.names))
        if most < 1 or self._root(len(row.names) + most) != row.root:
            return []
        draft = generation.lookup.draft(row.names, most)
        try:
            return draft if generation.guide is None else draft[: generation.guide.allowed(draft)]
        except UserError:
            return []  # and what is wrong with the form is said when the next token is drawn

    def _read(self, decoding: bool) -> bool:
        """So much of prompts as a step may read. Whether anything was read."""
        most = budget = self._limits.chunk if decoding else self._limits.alone_chunk
        self._recall()
        while budget > 0 and (parts := self._scheduler.reading(budget)):
            for part in parts:
                if part.copy is not None:
                    self._passes.copy(*part.copy)
            seen = self._seen(parts, decoding)
            if seen:
                self._read_parts(seen)
            if len(seen) < len(parts):
                return True
            self._recall()
            budget -= sum(part.count for part in parts)
        return budget < most

    def _seen(self, parts: Sequence[Part], decoding: bool) -> list[Part]:
        """Those parts of prompts whose images were looked at. If some were not, the next tiles of all parts are encoded
        together; where they are `apart`, with those of waiting requests, and no row that decodes waits for them."""
        spans = [(self._generations[part.row], part.row.done, part.row.done + part.count) for part in parts]
        looking = [(generation, unseen) for generation, *span in spans if (unseen := generation.unseen(*span))]
        if looking:
            started = time.perf_counter()
            images = [image for _, unseen in looking for image in unseen]
            if self._eyes.apart:
                images += [each for row in self._scheduler.waiting for each in self._generations[row].request.images]
            free = not decoding or not self._eyes.busy  # before what is ready is taken, so that it does not go
            self._show(looking, decoding)
            try:
                if free:
                    self._eyes.look(images, self._limits.tiles_of(decoding and not self._eyes.apart))
            except (MemoryError, RuntimeError) as error:
                self._fail(looking[-1][0], out_of_memory(error))
                return []
            self._show(looking, decoding)
            for generation, _ in looking:
                generation.encode_s += time.perf_counter() - started
        return [part for part, (generation, *span) in zip(parts, spans) if not generation.unseen(*span)]

    def _show(self, looking: Sequence[tuple[Generation, list[Prepared]]], decoding: bool) -> None:
        for generation, unseen in looking:
            generation.see({image.digest: self._eyes.features(image, waits=not decoding) for image in unseen})

    def _read_parts(self, parts: Sequence[Part]) -> None:
        started = time.perf_counter()
        stretches = []
        for part in parts:
            wanted = part.row.tail - (part.row.left - part.count)
            stretches.append(Stretch(self._generations[part.row], part.count, min(part.count, max(0, wanted))))
        try:
            logits_XV = self._passes.run(stretches)
        except (MemoryError, RuntimeError) as error:
            self._fail(stretches[-1].generation, out_of_memory(error))
            return
        for part in parts:
            self._scheduler.advance(part.row, part.count)
            generation = self._generations[part.row]
            if part.row.left:
                generation.reading_s += time.perf_counter() - started
            else:
                generation.features.clear()
                self._write(generation)
        self._take(stretches, logits_XV, started)

    # --- what the scores say ------------------------------------------------------------------------------------------

    def _take(self, stretches: Sequence[Stretch], logits_XV: Tensor, started: float) -> None:
        """The next token of each row, and those of its draft that come next as well; or how likely its targets are. A
        row whose token cannot be drawn fails alone."""
        scored = list(zip(stretches, torch.split(logits_XV, [each.scored for each in stretches])))
        drawing = [(each, logits_KV) for each, logits_KV in scored if each.scored and each.generation.request.draws]
        if drawing:
            one_each = len(drawing) == len(logits_XV)
            logits_BV = logits_XV if one_each else torch.stack([logits_KV[0] for _, logits_KV in drawing])
            drawn = draw_all([each.generation.sampler for each, _ in drawing], logits_BV)
            seconds = time.perf_counter() - started
            for (stretch, logits_KV), token in zip(drawing, drawn):
                self._push(stretch.generation, token, seconds)
                self._try(stretch, logits_KV)
        for stretch, logits_KV in scored:
            generation = stretch.generation
            if stretch.scored and generation.request.targets:
                self._tell(generation, logits_KV)
            if generation.request.pooled and generation.row.left == 0:
                self._end(generation)

    def _try(self, stretch: Stretch, logits_KV: Tensor) -> None:
        """As long as the row's next name is that of the draft, the network has read it: the scores behind it count."""
        generation, row, kept = stretch.generation, stretch.generation.row, 0
        while row.pages and row.left and kept < len(stretch.draft) and row.names[-row.left] == stretch.draft[kept]:
            kept += 1
            self._scheduler.advance(row, 1)
            if row.left == 0:
                (token,) = draw_all([generation.sampler], logits_KV[kept : kept + 1])
                self._push(generation, token, 0.0)
        if stretch.draft:
            generation.lookup.learn(kept, len(stretch.draft))

    def _tell(self, generation: Generation, logits_KV: Tensor) -> None:
        """How likely the targets are that stand behind the positions just read."""
        if not all(map(math.isfinite, generation.tell(logits_KV))):
            self._fail(generation, no_numbers())
        elif generation.row.left == 0:
            self._end(generation)

    def _push(self, generation: Generation, drawn: Drawn | UserError, seconds: float) -> None:
        """A token that was drawn, and those that the form then forces."""
        if isinstance(drawn, UserError):
            self._fail(generation, drawn)
            return
        row, guide = generation.row, generation.guide
        self._add(generation, drawn, seconds + generation.reading_s)
        generation.reading_s = 0.0
        if guide is not None and not generation.ended and generation.request.sampling.logprobs is None:
            try:
                # Read in one pass of its own, which pays where it saves more steps than other rows wait for it.
                forced = guide.forced()
                for token in forced if len(forced) >= self._scheduler.running else ():
                    if not generation.ended:
                        generation.sampler.take(token)
                        self._add(generation, Drawn(token), 0.0)
            except UserError as error:
                self._fail(generation, error)
        if not generation.ended and self._root(len(row.names)) != row.root:
            self._scheduler.read_again(row, self._root(len(row.names)))

    def _add(self, generation: Generation, drawn: Drawn, seconds: float) -> None:
        """A new token of the request, which may be its last."""
        row, prefill = generation.row, generation.row.new == 0
        row.push(drawn.token)
        reason = generation.reason(self._network.config)
        generation.steps.append(Step(drawn.token, reason, seconds, prefill, drawn.logprob, drawn.top))
        if reason is not None:
            self._end(generation)
        elif not self._scheduler.fits(len(row.names)):
            self._fail(generation, UserError(
                f"with its prompt the answer is {len(row.names)} tokens long, and the cache has no room for more",
                hint="ask for a shorter answer, or give the engine more memory",
            ))  # fmt: skip

    # --- the disk -----------------------------------------------------------------------------------------------------

    def _recall(self) -> None:
        """Of the row that is admitted next, what an earlier process has read, up to its last image or an earlier."""
        row = self._scheduler.next
        if self._archive is None or row is None or row.cached is not None or not self._scheduler.has_room(row):
            return
        self._archive.recall_longest(row.names, self._generations[row].image_ends, row.root)

    def _write(self, generation: Generation) -> None:
        """Pages up to the last image go to the disk."""
        count = (generation.places[-1] + 1) // PAGE if generation.places else 0
        keys, pages = generation.row.keys[:count], generation.row.pages[:count]
        if self._archive is None or not keys or self._archive.has(keys[-1]):
            return
        cache = self._scheduler.cache
        cache.hold(pages)

        def done() -> None:
            with self._alone():
                cache.release(pages)
                self._released.notify_all()

        self._archive.write(keys, pages, done)

    # --- ends and places ----------------------------------------------------------------------------------------------

    def _end(self, generation: Generation) -> None:
        self._scheduler.stop(generation.row)
        del self._generations[generation.row]
        generation.ended = True
        generation.features.clear()
        for image in generation.request.images:
            if self._eyes.begun(image) and not any(each.asks_about(image) for each in self._generations.values()):
                self._eyes.forget(image)

    def _fail(self, generation: Generation, error: UserError) -> None:
        if not generation.ended:
            generation.error = error
            self._end(generation)

    def _root(self, length: int) -> bytes:
        """The key that a row of this length begins with."""
        switch = self._network.config.text.rotary.switch
        return self._long if switch is not None and length > switch else self._short
