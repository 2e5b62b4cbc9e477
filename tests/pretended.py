"""A pretended second stream: what was computed on it holds no numbers until it is handed over."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from torch import Tensor

from pumice.engine.eyes import Eyes


class Pretended:
    """In place of CUDA's, on a CPU. Whatever is read of it without waiting is NaN, which no answer survives."""

    def __init__(self, queries: float) -> None:
        """queries: so many times marks say that they are not reached yet; infinite: always."""
        self.queries, self._asked = queries, 0
        self._eyes: Eyes | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        """What is not handed over, and its numbers."""
        self.looks = self.handed_over = 0

    def eyes_of(self, eyes: Eyes) -> Eyes:
        """The same eyes, on this side from now on."""
        self._eyes, eyes._side, eyes._newest = eyes, self, self.mark()
        return eyes

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self.looks += 1
        before = {id(each) for each in self._held()}
        hidden = {id(values) for values, _ in self._hidden}
        for values, numbers in self._hidden:
            values.copy_(numbers)
        try:
            yield
        finally:
            new = [each for each in self._held() if id(each) not in before or id(each) in hidden]
            self._hidden = [(each, each.clone()) for each in new]
            for each in new:
                each.fill_(math.nan)

    def _held(self) -> list[Tensor]:
        assert self._eyes is not None
        return [*self._eyes._features.values(), *(each for tiles in self._eyes._tiles.values() for each in tiles)]

    def mark(self) -> Pretended.Mark:
        """Reached at once where nothing was launched before."""
        return self.Mark(self, self._asked + self.queries if self.looks else -1)

    class Mark:
        def __init__(self, side: Pretended, due: float) -> None:
            self._side, self._due = side, due

        def query(self) -> bool:
            self._side._asked += 1
            return self._side._asked > self._due

        def hand_over(self, values: Tensor) -> None:
            (numbers,) = [numbers for each, numbers in self._side._hidden if each is values]
            values.copy_(numbers)
            self._side._hidden = [pair for pair in self._side._hidden if pair[0] is not values]
            self._side.handed_over += 1
