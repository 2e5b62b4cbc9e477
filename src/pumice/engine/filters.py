"""What is done to the scores of one position before a token is drawn, and the draw. Plain functions of tensors on the
CPU; tests/test_sampling.py holds each against Transformers.

V vocabulary · N tokens that are still in, by rising id · M some of their places
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pumice.engine.sampling import Sampling

COLDEST = 1e-6
"""A temperature below draws the same token as this one: the best."""
SHELVES, SHELVES_A_NAT = 512, 8


def penalised(scores_V: Tensor, ids_M: Tensor, counts_M: Tensor, sampling: Sampling) -> Tensor:
    """Scores with the penalties on the tokens of a row, of which `counts_M` were generated; ids past the vocabulary are
    left out.

    Repetition: Keskar et al. 2019, in Transformers' form, which multiplies negative scores. Frequency and
    presence: OpenAI's, score - count * frequency - (count > 0) * presence.
    """
    within = ids_M < len(scores_V)
    ids_M, counts_M = ids_M[within], counts_M[within]
    known_M, factor = scores_V[ids_M], sampling.repetition_penalty
    known_M = torch.where(known_M < 0, known_M * factor, known_M / factor)
    known_M = known_M - counts_M * sampling.frequency_penalty - (counts_M > 0) * sampling.presence_penalty
    return scores_V.index_copy(0, ids_M, known_M)


def candidates(scores_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What is drawn from, after temperature, top-k, top-p, min-p and typical-p: the ids_N that stay, rising, and their
    chances_N, which sum to 1. At least one stays. The best score must be finite, others may be -inf."""
    # From the best score down: however cold, the best keeps its share and no quotient leaves float32.
    scores_N = (scores_V - scores_V.max()) / max(sampling.temperature, COLDEST)
    ids_N = torch.arange(len(scores_V))
    filters = (
        (0 < sampling.top_k < len(scores_V), top_k, sampling.top_k),
        (sampling.top_p < 1, top_p, sampling.top_p),
        (sampling.min_p > 0, min_p, sampling.min_p),
        (sampling.typical_p < 1, typical_p, sampling.typical_p),
    )
    for wanted, kept_by, setting in filters:
        if wanted:
            places_M = kept_by(scores_N, setting)
            ids_N, scores_N = ids_N[places_M], scores_N[places_M]
    return ids_N, scores_N.softmax(-1)


def top_k(scores_N: Tensor, k: float) -> Tensor:
    """Places of the k best, and of what equals the last of them."""
    return _where(scores_N >= scores_N.topk(int(k)).values[-1])


def top_p(scores_N: Tensor, mass: float) -> Tensor:
    """Places of the smallest set of best tokens with this much probability (Holtzman et al. 2020); of equal tokens that
    not all are needed, those with the smallest ids. The best score is 0."""
    return _where(_reaching(scores_N, scores_N.softmax(-1), mass))


def min_p(scores_N: Tensor, share: float) -> Tensor:
    """Places of the tokens with at least this share of the best one's probability (Nguyen et al. 2024). The best score
    is 0."""
    return _where(scores_N >= math.log(share))


def typical_p(scores_N: Tensor, mass: float) -> Tensor:
    """Places of the tokens whose surprise is nearest to the expected one, the entropy, until they have this much
    probability, and of what is as near as the last of them (Meister et al. 2022).

    Both are log(sum(exp(scores))) less a score, or less the expected score: the first part cancels.
    """
    chances_N = scores_N.softmax(-1)
    nearness_N = -(scores_N - (chances_N * scores_N).nansum()).abs()
    return _where(nearness_N >= nearness_N[_reaching(nearness_N, chances_N, mass)].min())


def _reaching(order_N: Tensor, chances_N: Tensor, mass: float) -> Tensor:
    """True for the largest of `order_N`, which is nowhere above 0: as few as have this much probability together, one
    at least.

    Nothing but the shelf on which the last of them lies is sorted: a full sort takes longer than all the rest.
    """
    shelf_N = (order_N * -SHELVES_A_NAT).clamp(max=SHELVES - 1).int()
    sums = torch.bincount(shelf_N, chances_N.double()).cumsum(0)
    last = min(int(((sums < mass) | (sums == 0)).sum()), len(sums) - 1)
    lacking = mass - float(sums[last - 1]) if last else mass
    places_M = _where(shelf_N == last)
    places_M = places_M[order_N[places_M].argsort(descending=True, stable=True)]
    needed = int((chances_N[places_M].cumsum(0, dtype=torch.float64) < lacking).sum()) + 1
    kept_N = shelf_N < last
    kept_N[places_M[:needed]] = True
    return kept_N


def _where(kept_N: Tensor) -> Tensor:
    return kept_N.nonzero().flatten()


def pick(chances_N: Tensor, uniform: float) -> int:
    """The place that a number from 0 up to 1, without 1, falls on when the chances lie side by side.

    A multiple of 2^-53 below 1 times the sum stays below the sum, so the place exists and has a chance above 0.
    """
    sums_N = chances_N.cumsum(0, dtype=torch.float64)
    return int(torch.searchsorted(sums_N, uniform * sums_N[-1], right=True))


def log_probabilities(scores_V: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The token's log-probability, and the `count` most likely tokens with theirs, from the best down; of equal ones
    the smallest id first."""
    logs_V = scores_V.log_softmax(-1)
    count = min(count, len(logs_V))
    if count == 0:
        return float(logs_V[token]), ()
    ids_M = top_k(scores_V, count)
    ids_M = ids_M[scores_V[ids_M].argsort(descending=True, stable=True)][:count]
    return float(logs_V[token]), tuple(zip(ids_M.tolist(), logs_V[ids_M].tolist()))
