"""Who runs next: rows wait, are admitted when their pages are free, read their prompt part by part, and then gain a
token a step, all of them together. No tensors here.

A row is never starved once it has its first token, and none loses what it has: where pages run out, the youngest gives
its own away and waits to be read in again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pumice.engine.cache import Cache


@dataclass(eq=False)
class Row:
    """What stands at each position, and how much of it is in pages. See `cache` for names."""

    names: list[int]
    """Of the prompt, then the ids of new tokens."""
    root: bytes
    """The key of the empty row; rows of different roots share nothing."""
    new: int = 0
    """So many of the names are new tokens."""
    done: int = 0
    """Positions whose keys and values are in pages."""
    cached: int | None = None
    """Of these, what was found when the row was admitted first."""
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of its full pages."""

    @property
    def left(self) -> int:
        """Positions that must pass the network before the next token."""
        return len(self.names) - self.done

    @property
    def reads(self) -> bool:
        """Whether it is still reading: its prompt, or all of it again."""
        return self.left > 1 or self.new == 0

    def push(self, token: int) -> None:
        self.names.append(token)
        self.new += 1


@dataclass(frozen=True)
class Part:
    """What one row reads now: its next `count` positions, after a page was copied to another."""

    row: Row
    count: int
    copy: tuple[int, int] | None = None
    """From, to."""


class Scheduler:
    """Rows and the pages they hold."""

    def __init__(self, cache: Cache, most_rows: int) -> None:
        """most_rows: so many rows run at a time."""
        self.cache, self._most_rows = cache, most_rows
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    @property
    def running(self) -> int:
        """Rows that hold pages."""
        return len(self._running)

    @property
    def next(self) -> Row | None:
        """The row that will be admitted next, if there is a place for it."""
        reads = any(each.reads for each in self._running)
        return self._waiting[0] if self._waiting and not reads and len(self._running) < self._most_rows else None

    @property
    def positions(self) -> int:
        """What all pages hold together."""
        return self.cache.count * self.cache.size

    def has_room(self, row: Row) -> bool:
        """Whether there are pages now for all of a row, whatever can be found of it."""
        return self.cache.available >= self._pages_of(len(row.names))

    def fits(self, positions: int) -> bool:
        """Whether a row so long can run, if it must alone."""
        return self._pages_of(positions) <= self.cache.count

    def add(self, row: Row) -> None:
        """The row waits for its turn."""
        self._waiting.append(row)

    def stop(self, row: Row) -> None:
        """The row has ended, or is not wanted any more; its pages can be found until they are needed."""
        if row in self._running:
            self._running.remove(row)
            self._release(row)
        else:
            self._waiting.remove(row)

    def decoding(self) -> tuple[list[Row], list[Row]]:
        """Rows that gain a token by one more position, and those for which there is no page, though no other row could
        give one: these still run. Every row that has pages has enough of them now."""
        stuck = []
        for row in [each for each in self._running if each.pages]:
            while row in self._running and row not in stuck and not self._has_pages(row):
                if self.cache.available:
                    row.pages.append(self.cache.take())
                elif len(self._running) > 1:
                    self._preempt()
                elif self.cache.held == len(row.pages):
                    stuck.append(row)
                else:
                    return [], []  # what else holds pages gives them back
        return [each for each in self._running if not each.reads and each not in stuck], stuck

    def reading(self, most: int) -> Part | None:
        """The row that reads, or the next that can be admitted, and how much of it: `most` positions at most.

        One row reads at a time, so that the next may find what this one has read.
        """
        reading = [each for each in self._running if each.reads]
        row = next((each for each in reading if self._has_pages(each)), None)
        if row is not None:
            return Part(row, min(most, row.left))
        if any(each.pages for each in reading):
            return None  # it has grown, and `decoding` finds it a page
        row = reading[0] if reading else self.next
        return None if row is None else self._admit(row, most)

    def advance(self, row: Row, count: int) -> None:
        """So many more positions of the row are in pages; those of full pages, and the whole prompt, can be found."""
        row.done += count
        size = self.cache.size
        while (len(row.keys) + 1) * size <= row.done:
            at = len(row.keys)
            key = self.cache.keep(row.pages[at], self._parent(row), row.names[at * size : (at + 1) * size])
            row.keys.append(key)
        if row.new == 0 and row.left == 0:
            self._keep_rest(row)

    def repair(self) -> None:
        """After a pass that broke off: a row whose token was not drawn is read again."""
        for row in self._running:
            if row.left == 0:
                self.read_again(row, row.root)

    def read_again(self, row: Row, root: bytes) -> None:
        """All of a running row is to be read anew, as one of this root."""
        self._release(row)
        row.root = root

    def _admit(self, row: Row, most: int) -> Part | None:
        """Only if there are pages for all of it, and one more for each row that runs."""
        others = sum(each is not row for each in self._running)
        found = self.cache.find(row.names, len(row.names) - 1, row.root)
        wanted = self._pages_of(len(row.names)) - len(found.pages)
        if self.cache.available < wanted + others:
            found = self.cache.without_partial(found)
        if self.cache.available < wanted + others:
            self.cache.release(found.pages)
            return None
        row.pages = found.pages + [self.cache.take() for _ in range(wanted)]
        row.keys, row.done = found.keys, found.positions
        row.cached = found.positions if row.cached is None else row.cached
        if row not in self._running:
            self._waiting.remove(row)
            self._running.append(row)
        copy = None
        if found.partial is not None:
            copy = found.partial[0], row.pages[len(found.pages)]
            self.cache.without_partial(found)
        return Part(row, min(most, row.left), copy)

    def _preempt(self) -> None:
        """The youngest row waits again, before all others."""
        row = self._running.pop()
        self._release(row)
        self._waiting.appendleft(row)

    def _release(self, row: Row) -> None:
        self._keep_rest(row)
        self.cache.release(row.pages)
        row.pages, row.keys, row.done = [], [], 0

    def _keep_rest(self, row: Row) -> None:
        """What stands in its last page, which is not full, can be found too."""
        rest = row.names[len(row.keys) * self.cache.size : row.done]
        if rest:
            self.cache.keep(row.pages[len(row.keys)], self._parent(row), rest)

    def _parent(self, row: Row) -> bytes:
        return row.keys[-1] if row.keys else row.root

    def _has_pages(self, row: Row) -> bool:
        return len(row.pages) >= self._pages_of(len(row.names))

    def _pages_of(self, positions: int) -> int:
        return -(-positions // self.cache.size)
