"""How the next token is drawn from the scores. Filters stand in the order of Transformers' generate: repetition
penalty, temperature, top-k, top-p, min-p.

V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.errors import UserError

MAX_STOPS = 64
COLDEST = 1e-6
"""A temperature below draws the same token as this one: the best."""


@dataclass(frozen=True)
class Sampling:
    """What may vary from answer to answer. The defaults are deterministic.

    temperature: 0 takes the best token; top_k: 0 is off; top_p: keep the smallest set with this much probability;
    min_p: drop tokens below this share of the best one's probability; repetition_penalty: 1 is off (Keskar et al.
    2019: scores of tokens already in the row, prompt included, are divided by it, negative ones multiplied);
    seed: same seed, same answer; stop: texts that end the answer and are not part of it; max_tokens: new tokens.

    Raises UserError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    max_tokens: int = 512

    def __post_init__(self) -> None:
        # One text or a list is what people write; a frozen value wants a tuple.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence):
            raise UserError(f"stop is {stop!r}", hint="give a text, or a list of texts")
        object.__setattr__(self, "stop", tuple(stop))
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 2**31)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("max_tokens", self.max_tokens, 1, 2**31)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.stop) > MAX_STOPS or not all(isinstance(each, str) and each for each in self.stop):
            raise UserError(
                f"stop has {len(self.stop)} entries, of which some may be empty or no text",
                hint=f"give at most {MAX_STOPS} texts, none of them empty",
            )


def _check(name: str, value: float, low: float, high: float) -> None:
    whole = isinstance(low, int)
    fits = isinstance(value, int) if whole else isinstance(value, int | float)
    if not fits or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {value!r}", hint=f"give {kind} from {low} to {high}")


class Sampler:
    """Draws the tokens of one row: the settings, the row's own random state, and which tokens it has seen."""

    def __init__(self, sampling: Sampling, prompt_ids: list[int]) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)
        self._seen = {token for token in prompt_ids if token >= 0} if sampling.repetition_penalty != 1.0 else None

    def draw(self, logits_V: Tensor) -> int:
        """The next token id, from scores of one position; remembers it. Raises UserError for scores that are no
        numbers."""
        settings = self.sampling
        best = int(logits_V.argmax())
        if not logits_V[best].isfinite():  # a score that is no number counts as the largest
            raise UserError(
                "the model's scores are not numbers",
                hint="its weights are damaged, or too large for their type: try --dtype float32",
            )
        if settings.temperature == 0 and self._seen is None:
            return best
        scores_V = logits_V.detach().float().cpu()
        if self._seen is not None:
            scores_V = penalise(scores_V, sorted(self._seen), settings.repetition_penalty)
        if settings.temperature == 0:
            token = int(scores_V.argmax())
        else:
            token = int(torch.multinomial(probabilities(scores_V, settings), 1, generator=self._generator))
        if self._seen is not None:
            self._seen.add(token)
        return token


def penalise(scores_V: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Scores with the repetition penalty on the tokens in `seen`; ids past the vocabulary are left out."""
    index = torch.tensor([token for token in seen if token < len(scores_V)], dtype=torch.long)
    known = scores_V[index]
    return scores_V.index_copy(0, index, torch.where(known < 0, known * penalty, known / penalty))


def probabilities(scores_V: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from: softmax after temperature, top-k, top-p and min-p; at least one token stays."""
    # From the best score down: however cold, the best keeps its share and no quotient leaves float32.
    scores_V = (scores_V - scores_V.max()) / max(sampling.temperature, COLDEST)
    if 0 < sampling.top_k < len(scores_V):
        floor = scores_V.topk(sampling.top_k).values[-1]
        scores_V = scores_V.masked_fill(scores_V < floor, float("-inf"))
    if sampling.top_p < 1:
        ordered_V, order_V = scores_V.sort()
        below_V = ordered_V.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below_V[-1] = False
        scores_V = scores_V.masked_fill(torch.zeros_like(below_V).scatter(0, order_V, below_V), float("-inf"))
    if sampling.min_p > 0:
        chances_V = scores_V.softmax(-1)
        scores_V = scores_V.masked_fill(chances_V < sampling.min_p * chances_V.max(), float("-inf"))
    return scores_V.softmax(-1)
