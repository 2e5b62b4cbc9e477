"""Which pages hold what: pages shared by prefix, kept when nobody needs them, given away when they are needed.

No tensors here: a page is a number, and what stands at a position is a name, an int. The name of a token is its id;
that of an image's feature is made of the image's digest and the feature's place (`image_names`). Two images never have
a name in common, so they never share a page, and one image asked about twice always does.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

LOOKED_AT = 64
"""So many pages with one parent are compared for the longest beginning."""


def image_names(digest: str, tokens: int) -> range:
    """A name for each feature of an image. digest: hex, equal for equal input to the network and for nothing else."""
    first = (1 << 4 * len(digest) | int(digest, 16)) << 32
    return range(first, first + tokens)


def page_key(parent: bytes, names: Sequence[int]) -> bytes:
    """What a page is found by: what it holds and all that comes before it."""
    return hashlib.blake2b(repr(tuple(names)).encode(), digest_size=32, key=parent).digest()


@dataclass(frozen=True)
class Found:
    """The beginning of a row that is in pages already."""

    pages: list[int]
    """Full ones, held by whoever asked."""
    partial: tuple[int, int] | None
    """A page, also held, whose first so many positions fit on; they are to be copied."""
    positions: int


@dataclass(frozen=True)
class _Node:
    """What a page holds that can be found."""

    parent: bytes
    names: tuple[int, ...]
    key: bytes | None
    """None while the page is not full."""


class Cache:
    """`count` pages of `size` positions each. A page is free, held by rows, or idle: held by none, and findable."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._touched = 0  # memory of pages that were never needed is never touched
        self._free: list[int] = []
        self._holders: dict[int, int] = {}
        self._nodes: dict[int, _Node] = {}
        self._by_key: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, None]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return self.count - len(self._holders)

    @property
    def held(self) -> int:
        """Pages that rows hold."""
        return len(self._holders)

    @property
    def idle(self) -> int:
        """Pages that no row holds and that can be found."""
        return len(self._idle)

    def take(self) -> int:
        """A page that may be written, held once. Of the idle ones, that which was not used for the longest goes."""
        assert self.available > 0, "all pages are held"
        if self._free:
            page = self._free.pop()
        elif self._touched < self.count:
            page, self._touched = self._touched, self._touched + 1
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, names: Sequence[int], keys: Sequence[bytes], most: int, root: bytes) -> Found:
        """The longest beginning of a row, of `most` positions at most, that is in pages. They are held. keys: of the
        row's full pages, as `extend` gives them; root: the key of the empty row."""
        pages: list[int] = []
        for key in keys[: most // self.size]:
            if key not in self._by_key:
                break
            pages.append(self._by_key[key])
        self.hold(pages)
        at = len(pages) * self.size
        partial = self._longest(keys[len(pages) - 1] if pages else root, names[at : min(most, at + self.size)])
        if partial is not None:
            self._hold(partial[0])
            at += partial[1]
        return Found(pages, partial, at)

    def _longest(self, parent: bytes, names: Sequence[int]) -> tuple[int, int] | None:
        best: tuple[int, int] | None = None
        for page in itertools.islice(reversed(self._children.get(parent, {})), LOOKED_AT):
            same = _same(self._nodes[page].names, names)
            if same > (best[1] if best else 0):
                best = page, same
        return best

    def extend(self, keys: list[bytes], names: Sequence[int], root: bytes) -> list[bytes]:
        """The keys of a row's full pages: those that are known already, and behind them those that came. root: the key
        of the empty row; rows of different roots share nothing."""
        for at in range(len(keys) * self.size, len(names) - self.size + 1, self.size):
            keys.append(page_key(keys[-1] if keys else root, names[at : at + self.size]))
        return keys

    def knows(self, key: bytes) -> bool:
        """Whether a full page has this key."""
        return key in self._by_key

    def keep(self, page: int, parent: bytes, names: Sequence[int]) -> bytes:
        """From now on a held page can be found by these names, which must stay; what follows them may be written yet.
        Given is its key, by which a full page is the parent of the next. Where another page holds the same, that one
        is found."""
        full = len(names) == self.size
        key = page_key(parent, names)
        same = self._longest(parent, names)
        if (full and key in self._by_key) or (same is not None and same[1] == len(names)):
            return key
        if page in self._nodes:
            self._forget(page)
        self._nodes[page] = _Node(parent, tuple(names), key if full else None)
        self._children.setdefault(parent, {})[page] = None
        if full:
            self._by_key[key] = page
        return key

    def without_partial(self, found: Found) -> Found:
        """What was found, with the page let go that fits only in part."""
        if found.partial is not None:
            self.release([found.partial[0]])
        return Found(found.pages, None, len(found.pages) * self.size)

    def hold(self, pages: Sequence[int]) -> None:
        """One more holds these pages, which are held already."""
        for page in pages:
            self._hold(page)

    def release(self, pages: Sequence[int]) -> None:
        """A row no longer holds these pages, given in the row's order. Its end is given away before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._nodes:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _hold(self, page: int) -> None:
        self._holders[page] = self._holders.get(page, 0) + 1
        self._idle.pop(page, None)

    def _forget(self, page: int) -> None:
        node = self._nodes.pop(page)
        if node.key is not None:
            del self._by_key[node.key]
        siblings = self._children[node.parent]
        del siblings[page]
        if not siblings:
            del self._children[node.parent]


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How long the beginning is that both have."""
    differing = (at for at, (here, there) in enumerate(zip(one, other)) if here != there)
    return next(differing, min(len(one), len(other)))
