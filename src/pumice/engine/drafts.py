"""Tokens that may come next, read off what stands in the row already (prompt lookup), and how many are worth a try.

A draft passes the network behind the last token, in the same pass; what is drawn from the scores decides how much of it
stays, so that an answer is the same with drafts and without. Sources: Saxena 2023 ("prompt lookup decoding"), Yang et
al. 2023 (arXiv 2304.04487); how far a draft should go: Leviathan et al. 2022 (arXiv 2211.17192), section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens at a row's end that are looked for earlier in it; the longest that is found counts."""
TOKENS = 2**31
"""Names from here on are not tokens but features of images."""
LENGTHS = (1, 2, 4, 8, 16)
NEW_SHARE = 0.2
"""Of the newest measurement in a mean that follows them."""
FORGOTTEN = 500
"""After so many passes a measurement counts no more, so that what was slow once is tried again."""
STEP = 2
"""A pass so many times larger than all that were seen may be tried."""


class Lookup:
    """The draft of one row, and how well its drafts have done."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        """Where the row went on behind the latest of these tokens."""
        self._known = 0
        self._kept, self._tried = 2, 3  # as if some had been tried: without it the first would decide alone

    @property
    def acceptance(self) -> float:
        """The chance that the next token of a draft is kept, if those before it were."""
        return self._kept / self._tried

    def draft(self, names: Sequence[int], most: int) -> list[int]:
        """What followed the last time that the row stood as it stands now: `most` tokens at most, or none."""
        for end in range(max(self._known, SHORTEST), len(names)):
            if names[end - 1] < TOKENS and names[end] < TOKENS:
                for length in range(SHORTEST, min(LONGEST, end) + 1):
                    self._after[tuple(names[end - length : end])] = end
        self._known = len(names)
        for length in range(min(LONGEST, len(names)), SHORTEST - 1, -1):
            at = self._after.get(tuple(names[len(names) - length :]))
            if at is not None:
                return [*itertools.takewhile(lambda name: name < TOKENS, _copied(names, at, most))]
        return []

    def learn(self, kept: int, tried: int) -> None:
        """So many tokens of a draft stayed. Of those behind the first that did not, nothing is known."""
        self._kept += kept
        self._tried += min(kept + 1, tried)


def _copied(names: Sequence[int], start: int, count: int) -> list[int]:
    """What stands from `start` on, and behind the end the copy itself: what repeats goes on repeating."""
    copied = [*names[start : start + count]]
    for place in range(count - len(copied)):
        copied.append(copied[place])
    return copied


class Pace:
    """What a pass takes, by the number of its positions, as measured while passes come."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._passes = 0

    def learn(self, positions: int, seconds: float) -> None:
        """A pass of so many positions took so long."""
        self._passes += 1
        known = self._seconds.get(positions, seconds)
        self._seconds[positions], self._seen[positions] = known + NEW_SHARE * (seconds - known), self._passes
        for old in [each for each, seen in self._seen.items() if seen <= self._passes - FORGOTTEN]:
            del self._seconds[old], self._seen[old]

    def seconds(self, positions: int) -> float:
        """As the nearest smaller and larger passes have it; one that is somewhat larger than all that were seen is
        taken to be as fast as the largest, so that it is tried."""
        below = max((each for each in self._seconds if each <= positions), default=None)
        above = min((each for each in self._seconds if each >= positions), default=None)
        if above is None:
            return math.inf if below is None or positions > STEP * below else self._seconds[below]
        if below is None or below == above:
            return self._seconds[above]
        share = (positions - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def length(self, drafts: Sequence[tuple[int, float]]) -> int:
        """How many tokens of each draft are worth a try: that which promises most tokens a second. drafts: of each row
        the length of its draft, 0 if it has none, and the chance that a token of it is kept."""

        def promised(most: int) -> float:
            positions = sum(1 + min(most, length) for length, _ in drafts)
            tokens = sum(chance**place for length, chance in drafts for place in range(1 + min(most, length)))
            return tokens / self.seconds(positions)

        longest = max(length for length, _ in drafts)
        return max((0, *(each for each in LENGTHS if each <= longest), longest), key=promised)
