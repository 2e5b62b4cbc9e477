"""The engine: requests join and leave between steps, and share what their prompts have in common.

B rows · T new positions · P pages of a row · D width · V vocabulary · N pages · K key/value heads · S positions of a
page · E width of a head
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pumice.engine.archive import Archive, model_digest
from pumice.engine.cache import Cache
from pumice.engine.disk import Disk
from pumice.engine.eyes import Eyes
from pumice.engine.generation import Generation, Reason, Request, Step
from pumice.engine.sampling import Drawn, Sampling, draw_all
from pumice.engine.scheduler import Part, Row, Scheduler
from pumice.errors import UserError
from pumice.image import Prepared
from pumice.network.llama import Batch
from pumice.network.llava import Llava
from pumice.ops import Pages

__all__ = ["Engine", "Generation", "Limits", "Request", "Sampling", "Step", "position_bytes"]

PAGE = 32
"""Positions of a page."""
MOST_WAIT_S = 0.05
"""Before it is looked again whether there are pages."""


@dataclass(frozen=True)
class Limits:
    """What an engine may take.

    cache_bytes: keys and values, of rows that run and of those that may be asked about again; one row of the model's
    whole length always fits. feature_bytes: features of images. rows: so many requests run at a time. chunk: so many
    positions of a prompt are read in a step, while other rows gain tokens; alone_chunk: while none does. tiles: so many
    tiles of images are encoded in a step, while other rows gain tokens. cache_dir: where what is known of images is
    written to, and found again by a later process; None writes nothing. disk_bytes: what that folder may take.
    """

    cache_bytes: int = 2 * 2**30
    feature_bytes: int = 2**28
    rows: int = 64
    chunk: int = 64
    alone_chunk: int = 1024
    tiles: int = 1
    alone_tiles: int = 8
    cache_dir: Path | None = None
    disk_bytes: int = 32 * 2**30

    def __post_init__(self) -> None:
        """Raises UserError for what is no such number."""
        for name, value in vars(self).items():
            if name == "cache_dir":
                continue
            least = 0 if name.endswith("bytes") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise UserError(f"{name} is {value!r:.100}", hint=f"give a whole number from {least}")
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", Path(self.cache_dir))


class Engine:
    """Runs the network for many requests at a time; each gets the tokens that it would get alone.

    A request ends with an end token (reason `stop`), or at its `max_tokens` or the model's last position (`length`).
    Any thread may call it; one step runs at a time.
    """

    def __init__(self, network: Llava, limits: Limits = Limits(), positions: int | None = None) -> None:
        """positions: what the cache holds, whatever its bytes are."""
        self._network, self._limits = network, limits
        self._device = network.like.device
        self._eyes = Eyes(network, limits.feature_bytes)
        config = network.config.text
        if positions is None:
            most = max(config.max_positions, limits.cache_bytes // position_bytes(network))
            positions = min(most, limits.rows * config.max_positions)
        count = -(-positions // PAGE)
        self._scheduler = Scheduler(Cache(count, PAGE), limits.rows)
        shape = (count, config.kv_heads, PAGE, config.head_width)
        # Memory that no page needs is never touched, so on most systems it is never taken.
        self._keys, self._values = (
            [torch.empty(shape, dtype=cache_type(network), device=self._device) for _ in range(config.layers)]
            for _ in range(2)
        )
        self._archive: Archive | None = None
        model = "" if limits.cache_dir is None else model_digest(network, cache_type(network), PAGE)
        # Rows that turn by other rotary divisors share nothing.
        self._short, self._long = (f"{kind} {model}".encode() for kind in ("short", "long"))
        if limits.cache_dir is not None:
            disk = Disk(limits.cache_dir, limits.disk_bytes)
            self._archive = Archive(disk, model, self._scheduler.cache, self._keys, self._values)
        self._generations: dict[Row, Generation] = {}
        self._lock = threading.RLock()
        self._released = threading.Condition(self._lock)
        self._stepping = False
        self._unwanted: list[Generation] = []
        """Cancelled while a step ran, as when a stream is dropped by the garbage collection."""

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """The request waits for its turn. Raises UserError for a prompt that the cache has no room for, and settings
        that name tokens which the model does not have."""
        request.sampling.check_vocabulary(self._network.config.text.vocab)
        if not self._scheduler.fits(len(request.ids) + 1):
            raise UserError(
                f"the prompt is {len(request.ids)} tokens long; the cache has room for {self._scheduler.positions}",
                hint="send fewer or smaller images, fewer turns or less text, or give the engine more memory",
            )
        root = self._root(len(request.ids))
        generation = Generation.of(request, self._network.config.image_token_id, root)
        with self._lock:
            self._generations[generation.row] = generation
            self._scheduler.add(generation.row)
        return generation

    @torch.inference_mode()
    def features(self, images: Sequence[Prepared]) -> list[Tensor]:
        """What the language model gets of each image: (tokens, D), row ends included."""
        with self._lock:
            found = []
            for image in images:
                while (features_XD := self._eyes.features(image)) is None:
                    self._eyes.look([image], self._limits.alone_tiles)
                found.append(features_XD)
            return found

    def wait(self) -> None:
        """Until what goes to the disk is there."""
        if self._archive is not None:
            self._archive.wait()

    def cancel(self, generation: Generation) -> None:
        """No more tokens for this request; its pages are free at once, or when the step ends that runs now."""
        with self._lock:
            if self._stepping:
                self._unwanted.append(generation)
            elif not generation.ended:
                self._end(generation)

    def follow(self, generation: Generation) -> Iterator[Step]:
        """The steps of a request as they come; runs the engine where nobody else does. Raises what it failed with.

        A request whose steps nobody follows to the end any more is cancelled.
        """
        try:
            while True:
                with self._lock:
                    if not generation.steps and not generation.ended:
                        self.step()
                    steps = [generation.steps.popleft() for _ in range(len(generation.steps))]
                yield from steps
                if generation.ended and not generation.steps:
                    if generation.error is not None:
                        raise generation.error
                    return
        finally:
            self.cancel(generation)

    @property
    def cache_bytes(self) -> int:
        """What keys and values take when all pages are used."""
        return sum(each.nbytes for each in (*self._keys, *self._values))

    @property
    def pages_held(self) -> int:
        """Pages of requests under way."""
        return self._scheduler.cache.held

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """One more token for every row that has one, and the next part of a prompt. False: there is nothing to do."""
        with self._lock:
            if self._scheduler.idle:
                return False
            self._stepping = True
            try:
                decoding = self._decode()
                if not self._read(decoding) and not decoding:
                    self._released.wait(MOST_WAIT_S)  # for pages that go to the disk
            finally:
                self._stepping = False
                self._scheduler.repair()
                while self._unwanted:
                    self.cancel(self._unwanted.pop())
            return True

    def _decode(self) -> bool:
        rows, stuck = self._scheduler.decoding()
        for row in stuck:
            self._fail(self._generations[row], UserError(
                f"with its prompt the answer is {len(row.names)} tokens long, and the cache has no room for more",
                hint="ask for a shorter answer, or give the engine more memory",
            ))  # fmt: skip
        if not rows:
            return False
        started = time.perf_counter()
        ids_B1 = torch.tensor([row.names[-1:] for row in rows], device=self._device)
        positions_B1 = torch.tensor([[row.done] for row in rows], device=self._device)
        batch = Batch(positions_B1, pages=self._pages(rows))
        try:
            hidden_B1D = self._network(self._network.language_model.embed_tokens(ids_B1), batch)
            logits_BV = self._network.logits(hidden_B1D[:, 0])
        except (MemoryError, RuntimeError) as error:
            self._fail(self._generations[rows[-1]], _out_of_memory(error))
            return True
        for row in rows:
            self._scheduler.advance(row, 1)
        self._draw(rows, logits_BV, started)
        return True

    def _read(self, decoding: bool) -> bool:
        """So much of prompts as a step may read. Whether anything was read."""
        most = budget = self._limits.chunk if decoding else self._limits.alone_chunk
        self._recall()
        while budget > 0 and (part := self._scheduler.reading(budget)):
            if part.copy is not None:
                for layer in (*self._keys, *self._values):
                    layer[part.copy[1]] = layer[part.copy[0]]
            generation = self._generations[part.row]
            try:
                if not self._looked(generation, part, decoding):
                    return True
                self._read_part(generation, part)
            except (MemoryError, RuntimeError) as error:
                self._fail(generation, _out_of_memory(error))
            self._recall()
            budget -= part.count
        return budget < most

    def _looked(self, generation: Generation, part: Part, decoding: bool) -> bool:
        """Whether the features are there that this part of the prompt needs; the next tiles are encoded if not."""
        shown = generation.shown(part.row.done, part.row.done + part.count)
        missing = [each for each in shown if each.digest not in generation.features]
        if missing:
            started = time.perf_counter()
            self._look(missing, self._limits.tiles if decoding else self._limits.alone_tiles)
            generation.encode_s += time.perf_counter() - started
        found = {each.digest: self._eyes.features(each) for each in missing}
        generation.features |= {digest: features for digest, features in found.items() if features is not None}
        return all(each.digest in generation.features for each in shown)

    def _look(self, images: Sequence[Prepared], most_tiles: int) -> None:
        if self._archive is None:
            self._eyes.look(images, most_tiles)
            return
        unknown = [each for each in images if self._eyes.features(each) is None]
        for image in unknown:
            if (features_XD := self._archive.features(image)) is not None:
                self._eyes.put(image, features_XD.to(self._device))
        self._eyes.look(unknown, most_tiles)
        for image in unknown:
            if (features_XD := self._eyes.features(image)) is not None:
                self._archive.write_features(image, features_XD)

    def _read_part(self, generation: Generation, part: Part) -> None:
        started = time.perf_counter()
        row, start, end = part.row, part.row.done, part.row.done + part.count
        last = end == len(row.names)
        positions_1T = torch.arange(start, end, device=self._device)[None]
        reach_1 = torch.tensor([len(row.names) - 1], device=self._device)
        batch = Batch(positions_1T, pages=self._pages([row]), kept=int(last), reach_B=reach_1)
        hidden_1KD = self._network(self._embedded(generation, start, end), batch)
        logits_1V = self._network.logits(hidden_1KD[:, -1]) if last else None
        self._scheduler.advance(row, part.count)
        if logits_1V is None:
            generation.reading_s += time.perf_counter() - started
            return
        generation.features.clear()
        self._write(generation)
        self._draw([row], logits_1V, started)

    def _embedded(self, generation: Generation, start: int, end: int) -> Tensor:
        """What enters the network for positions start to end: (1, T, D)."""
        ids, prompt = generation.request.ids, len(generation.request.ids)
        parts = []
        if start < prompt:
            features = generation.features_between(start, end)
            parts.append(self._network.embed(torch.tensor([ids[start:end]], device=self._device), features))
        if end > prompt:
            new = torch.tensor([generation.row.names[max(start, prompt) : end]], device=self._device)
            parts.append(self._network.language_model.embed_tokens(new))
        return torch.cat(parts, dim=1)

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor, started: float) -> None:
        """The next token of each row. One whose token cannot be drawn fails alone."""
        generations = [self._generations[row] for row in rows]
        drawn = draw_all([each.sampler for each in generations], logits_BV)
        seconds = time.perf_counter() - started
        for generation, each in zip(generations, drawn):
            if isinstance(each, UserError):
                self._fail(generation, each)
            else:
                self._push(generation, each, seconds)

    def _push(self, generation: Generation, drawn: Drawn, seconds: float) -> None:
        """A token that was drawn, and those that the form then forces."""
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
        row, sampling, config = generation.row, generation.request.sampling, self._network.config
        prefill = row.new == 0
        row.push(drawn.token)
        reason: Reason | None = None
        done = generation.guide is not None and generation.guide.ended
        if done or drawn.token in config.stop_ids or drawn.token in sampling.stop_ids:
            reason = "stop"
        elif row.new >= sampling.max_tokens or len(row.names) > config.text.max_positions:
            reason = "length"
        generation.steps.append(Step(drawn.token, reason, seconds, prefill, drawn.logprob, drawn.top))
        if reason is not None:
            self._end(generation)

    # --- the disk -----------------------------------------------------------------------------------------------------

    def _recall(self) -> None:
        """Of the row that is admitted next, what an earlier process has read, up to its last image or an earlier."""
        row = self._scheduler.next
        if self._archive is None or row is None or row.cached is not None or not self._scheduler.has_room(row):
            return
        generation = self._generations[row]
        while generation.image_ends:
            end = generation.image_ends.pop() // PAGE * PAGE
            if self._archive.recall(row.names[:end], row.root):
                generation.image_ends.clear()

    def _write(self, generation: Generation) -> None:
        """Pages up to the last image go to the disk."""
        count = (generation.places[-1] + 1) // PAGE if generation.places else 0
        keys, pages = generation.row.keys[:count], generation.row.pages[:count]
        if self._archive is None or not keys or self._archive.has(keys[-1]):
            return
        cache = self._scheduler.cache
        cache.hold(pages)

        def done() -> None:
            with self._lock:
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

    def _pages(self, rows: Sequence[Row]) -> Pages:
        most = max(len(row.pages) for row in rows)
        table = [row.pages + row.pages[-1:] * (most - len(row.pages)) for row in rows]
        return Pages(self._keys, self._values, torch.tensor(table, device=self._device))


def _out_of_memory(error: Exception) -> UserError:
    """What to say of a pass for which there was no memory. Another error is a bug, and is raised."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    return UserError(
        "there is not enough memory left for this request",
        hint="send fewer or smaller images or less text, or give the engine less: pumice.Limits(cache_bytes=...)",
    )


def position_bytes(network: Llava) -> int:
    """What the keys and values of one position take."""
    config = network.config.text
    return 2 * config.layers * config.kv_heads * config.head_width * cache_type(network).itemsize


def cache_type(network: Llava) -> torch.dtype:
    """The type of keys and values: that of the network; beside weights in blocks half precision, as llama.cpp has."""
    return torch.float16 if network.in_blocks else network.like.dtype
