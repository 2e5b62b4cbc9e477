"""Who runs next: rows wait, are admitted when their pages are free, read their prompt part by part, and then gain
tokens, all of them together. No tensors here.

A row is never starved once it has its first token, and none loses what it has: where pages run out, the youngest gives
its own away and waits to be read in again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pumice.engine.cache import Cache, Found

SHORT = 64
"""Parts of several prompts are read in one pass where none is longer."""
LOST = 8
"""So many positions may be read twice, by two rows of one pass that have them in common."""


@dataclass(eq=False)
class Row:
    """What stands at each position, and how much of it is in pages. See `cache` for names."""

    names: list[int]
    """Of the prompt, then the ids of new tokens."""
    root: bytes
    """The key of the empty row; rows of different roots share nothing."""
    tail: int = 1
    """So many positions at the end pass the network whatever is known of them."""
    new: int = 0
    """So many of the names are new tokens."""
    done: int = 0
    """Positions whose keys and values are in pages."""
    cached: int | None = None
    """Of these, what was found when the row was admitted first."""
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of its full pages, filled or to be filled, as far as they were asked for."""

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
        return None if any(each.reads for each in self._running) else self._first_waiting

    @property
    def waiting(self) -> Iterator[Row]:
        """Rows that hold no pages, in the order in which they come."""
        return iter(self._waiting)

    @property
    def _first_waiting(self) -> Row | None:
        return self._waiting[0] if self._waiting and len(self._running) < self._most_rows else None

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

    def decoding(self) -> list[Row]:
        """Rows that gain a token by one more position. Each row `fits`; every one that has pages has enough of them
        now."""
        for row in [each for each in self._running if each.pages]:
            while row in self._running and not self._has_pages(row):
                if self.cache.available:
                    row.pages.append(self.cache.take())
                elif len(self._running) > 1:
                    self._preempt()
                else:
                    return []  # what else holds pages gives them back
        return [each for each in self._running if not each.reads]

    def reading(self, most: int) -> list[Part]:
        """What is read in the next pass, `most` positions at most: a part of the row that reads or of the next that can
        be admitted, or the short rests of several.

        Rows read one after the other, so that the next may find what this one has read; together only where one would
        not find more than a few positions.
        """
        parts: list[Part] = []
        while most > 0:
            part = self._part(most, [each.row for each in parts])
            if part is None:
                break
            parts.append(part)
            most -= part.count
            if part.count > SHORT or part.count < part.row.left:
                break
        return parts

    def _part(self, most: int, beside: Sequence[Row]) -> Part | None:
        """What else is read beside these rows."""
        reading = [each for each in self._running if each.reads and each not in beside]
        row = next((each for each in reading if self._has_pages(each)), None)
        if row is not None:
            return Part(row, min(most, row.left)) if not beside or row.left <= min(most, SHORT) else None
        if any(each.pages for each in reading):
            return None  # it has grown, and `decoding` finds it a page
        row = reading[0] if reading else self._first_waiting
        return None if row is None else self._admit(row, most, beside)

    def advance(self, row: Row, count: int) -> None:
        """So many more positions of the row are in pages; those of full pages, and the whole prompt, can be found."""
        size, before = self.cache.size, row.done
        row.done += count
        for at in range(before // size, row.done // size):
            self.cache.keep(row.pages[at], self._parent(row, at), row.names[at * size : (at + 1) * size])
        if row.new == 0 and row.left == 0:
            self._keep_rest(row)

    def widen(self, row: Row, positions: int) -> int:
        """How many positions beyond its names a row has pages for, `positions` at most; a page is taken for them where
        no other row could need it."""
        while len(row.pages) * self.cache.size < len(row.names) + positions and self.cache.available > self.running:
            row.pages.append(self.cache.take())
        return min(positions, len(row.pages) * self.cache.size - len(row.names))

    def repair(self) -> None:
        """After a pass that broke off: a row whose token was not drawn is read again."""
        for row in self._running:
            if row.left == 0:
                self.read_again(row, row.root)

    def read_again(self, row: Row, root: bytes) -> None:
        """All of a running row is to be read anew, as one of this root."""
        self._release(row)
        row.root, row.keys = root, []

    def _admit(self, row: Row, most: int, beside: Sequence[Row]) -> Part | None:
        """Only if there are pages for all of it, and one more for each row that runs; beside others only if the rest of
        it is short, and not what they are about to read."""
        others = sum(each is not row for each in self._running)
        keys = self.cache.extend(row.keys, row.names, row.root)
        found = self.cache.find(row.names, keys, len(row.names) - row.tail, row.root)
        if beside and not self._joins(row, found, most, beside):
            self.cache.release(self.cache.without_partial(found).pages)
            return None
        wanted = self._pages_of(len(row.names)) - len(found.pages)
        if self.cache.available < wanted + others:
            found = self.cache.without_partial(found)
        if self.cache.available < wanted + others:
            self.cache.release(found.pages)
            return None
        row.pages = found.pages + [self.cache.take() for _ in range(wanted)]
        row.done = found.positions
        row.cached = found.positions if row.cached is None else row.cached
        if row not in self._running:
            self._waiting.remove(row)
            self._running.append(row)
        copy = None
        if found.partial is not None:
            copy = found.partial[0], row.pages[len(found.pages)]
            self.cache.without_partial(found)
        return Part(row, min(most, row.left), copy)

    def _joins(self, row: Row, found: Found, most: int, beside: Sequence[Row]) -> bool:
        if len(row.names) - found.positions > min(most, SHORT):
            return False
        end = found.positions + LOST
        same = [each for each in beside if each.root == row.root and each.names[:end] == row.names[:end]]
        return not same or end > len(row.names) - row.tail

    def _preempt(self) -> None:
        """The youngest row waits again, before all others."""
        row = self._running.pop()
        self._release(row)
        self._waiting.appendleft(row)

    def _release(self, row: Row) -> None:
        self._keep_rest(row)
        self.cache.release(row.pages)
        row.pages, row.done = [], 0

    def _keep_rest(self, row: Row) -> None:
        """What stands in its last page, which is not full, can be found too."""
        at = row.done // self.cache.size
        rest = row.names[at * self.cache.size : row.done]
        if rest:
            self.cache.keep(row.pages[at], self._parent(row, at), rest)

    def _parent(self, row: Row, page: int) -> bytes:
        return self.cache.extend(row.keys, row.names, row.root)[page - 1] if page else row.root

    def _has_pages(self, row: Row) -> bool:
        return len(row.pages) >= self._pages_of(len(row.names))

    def _pages_of(self, positions: int) -> int:
        return -(-positions // self.cache.size)
