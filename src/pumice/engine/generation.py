"""A request under way: what was asked, which images its prompt needs next, and what has come of it.

T positions of a row · K of them · D width · V vocabulary
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pumice.config import LlavaConfig
from pumice.engine.cache import image_names
from pumice.engine.drafts import Lookup
from pumice.engine.sampling import Sampler, Sampling, log_likelihoods
from pumice.engine.scheduler import Row
from pumice.errors import UserError
from pumice.image import Prepared

if TYPE_CHECKING:
    from pumice.engine.schema import Grammar, Guide

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """The prompt's ids with image tokens expanded, the images whose features stand there, how to draw, and what the
    answer must look like.

    targets: nothing is drawn; asked is how likely each of these tokens was behind the ids before it: the last of them
    behind all ids, the first behind all but `len(targets) - 1`. pooled: nothing is drawn; asked is the mean of the
    hidden states (`Generation.mean`).
    """

    ids: list[int]
    images: list[Prepared]
    sampling: Sampling
    grammar: Grammar | None = None
    targets: tuple[int, ...] = ()
    pooled: bool = False

    @property
    def draws(self) -> bool:
        """Whether new tokens are asked for."""
        return not self.targets and not self.pooled


@dataclass(frozen=True)
class Step:
    """One new token. `reason` comes with the last; `seconds` is the time of the pass that made it, which a decode step
    shares among its rows."""

    token: int
    reason: Reason | None
    seconds: float
    prefill: bool
    logprob: float | None = None
    """Where `Sampling.logprobs` asks for it, and what else was likely: see `sampling.Drawn`."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Generation:
    """A request under way, and what has come of it."""

    request: Request
    row: Row
    sampler: Sampler
    places: list[int]
    """Where image tokens stand, in order."""
    image_ends: list[int]
    """Lengths of the prompt up to the end of each image, which the disk may have."""
    guide: Guide | None
    lookup: Lookup = field(default_factory=Lookup)
    told: dict[int, float] = field(default_factory=dict)
    """Log-probabilities of the request's targets, by their places among them."""
    summed: dict[int, Tensor] = field(default_factory=dict)
    """Sums of a pooled request's hidden states, by the first position of each."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """Of images that the prompt's next part needs, by digest."""
    steps: deque[Step] = field(default_factory=deque)
    """Those that nobody has taken yet."""
    ended: bool = False
    error: UserError | None = None
    encode_s: float = 0.0
    reading_s: float = 0.0
    """Of passes that read parts of the prompt, but the last."""

    @classmethod
    def of(cls, request: Request, image_id: int, root: bytes) -> Generation:
        """image_id: the token that stands for a feature. root: the key of the empty row."""
        places = [place for place, id in enumerate(request.ids) if id == image_id]
        names, sizes = list(request.ids), [each.grid.tokens for each in request.images]
        seen = itertools.chain.from_iterable(image_names(each.digest, each.grid.tokens) for each in request.images)
        for place, name in zip(places, seen, strict=True):
            names[place] = name
        ends = [places[size - 1] + 1 for size in itertools.accumulate(sizes)]
        guide = None if request.grammar is None else request.grammar.guide()
        sampler = Sampler(request.sampling, request.ids, guide)
        row = Row(names, root, tail=len(names) if request.pooled else max(1, len(request.targets)))
        return cls(request, row, sampler, places, ends, guide)

    def tell(self, logits_KV: Tensor) -> list[float]:
        """How likely the targets are that stand behind the positions just read."""
        end = len(self.request.targets) - self.row.left
        told = log_likelihoods(logits_KV, self.request.targets[end - len(logits_KV) : end])
        self.told.update(enumerate(told, end - len(logits_KV)))
        return told

    def add_states(self, start: int, hidden_TD: Tensor) -> None:
        """The hidden states of a pooled request's positions from `start` on, which may have been read before."""
        self.summed = {at: sum_D for at, sum_D in self.summed.items() if at < start}
        self.summed[start] = hidden_TD.detach().sum(0, dtype=torch.float32).cpu()

    @property
    def mean(self) -> Tensor:
        """(D,) in float32 on the CPU: of the hidden states behind the final norm, over all positions."""
        return torch.stack([*self.summed.values()]).sum(0) / len(self.request.ids)

    @property
    def cached_tokens(self) -> int:
        """Positions of the prompt that were found in the cache."""
        return min(self.row.cached or 0, len(self.request.ids))

    def reason(self, config: LlavaConfig) -> Reason | None:
        """Why the answer ends with its newest token; None where it goes on."""
        token, sampling = self.row.names[-1], self.request.sampling
        done = self.guide is not None and self.guide.ended
        if done or token in config.stop_ids or token in sampling.stop_ids:
            return "stop"
        full = self.row.new >= sampling.max_tokens or len(self.row.names) > config.text.max_positions
        return "length" if full else None

    def asks_about(self, image: Prepared) -> bool:
        return any(each.digest == image.digest for each in self.request.images)

    def unseen(self, start: int, end: int) -> list[Prepared]:
        """Images of which features stand at positions start to end, and are not there."""
        first, last = (bisect.bisect_left(self.places, each) for each in (start, end))
        shown = [image for image, at, tokens in self._images() if at < last and at + tokens > first]
        return [image for image in shown if image.digest not in self.features]

    def see(self, found: Mapping[str, Tensor | None]) -> None:
        """The features of images, by digest, of those that were looked at to their end."""
        self.features.update((digest, features) for digest, features in found.items() if features is not None)

    def features_between(self, start: int, end: int) -> list[Tensor]:
        """Those features."""
        first, last = (bisect.bisect_left(self.places, each) for each in (start, end))
        return [
            self.features[image.digest][max(0, first - at) : last - at]
            for image, at, tokens in self._images()
            if at < last and at + tokens > first
        ]

    def _images(self) -> Iterator[tuple[Prepared, int, int]]:
        """Each image, which image token is its first, and how many it has."""
        at = 0
        for image in self.request.images:
            yield image, at, image.grid.tokens
            at += image.grid.tokens
