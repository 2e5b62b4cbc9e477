"""Sampling: against Transformers' own filters, and by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from transformers.generation import logits_process as theirs

from pumice import Sampling, UserError
from pumice.engine.sampling import Sampler, penalise, probabilities

SCORES = torch.randn(50, generator=torch.Generator().manual_seed(4)) * 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7), Sampling(temperature=1.0, top_k=5), Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1), Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
        Sampling(temperature=1.0, top_p=0.0), Sampling(temperature=1.0, top_k=1),
    ],
    ids=str,
)  # fmt: skip
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    row, ids = SCORES[None].clone(), torch.zeros(1, 0, dtype=torch.long)
    row = theirs.TemperatureLogitsWarper(sampling.temperature)(ids, row)
    if sampling.top_k:
        row = theirs.TopKLogitsWarper(sampling.top_k)(ids, row)
    if sampling.top_p < 1:
        row = theirs.TopPLogitsWarper(sampling.top_p)(ids, row)
    if sampling.min_p:
        row = theirs.MinPLogitsWarper(sampling.min_p)(ids, row)
    assert_close(probabilities(SCORES, sampling), row.softmax(-1)[0])


def test_repetition_penalty_is_that_of_transformers() -> None:
    seen = [3, 7, 7, 12]
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), SCORES[None].clone())[0]
    assert_close(penalise(SCORES, sorted(set(seen)), 1.3), expected)


def test_a_seed_repeats_and_another_differs() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.draw(SCORES) for _ in range(30)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_colder_the_surer() -> None:
    """Down to temperatures whose quotients float32 cannot hold: the best token, never an overflow."""
    for temperature in (1e-3, 1e-38, 1e-300):
        assert Sampler(Sampling(temperature, seed=3), []).draw(SCORES) == int(SCORES.argmax())


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [])
    counted = Counter(sampler.draw(torch.tensor([0.0, math.log(3.0)])) for _ in range(2000))
    assert counted[1] / 2000 == pytest.approx(0.75, abs=0.04)


def test_greedy_takes_the_best_and_remembers_for_the_penalty() -> None:
    assert Sampler(Sampling(), []).draw(SCORES) == int(SCORES.argmax())
    sampler = Sampler(Sampling(repetition_penalty=10.0), [-200, 10**6])
    scores = torch.tensor([1.0, 0.9, 0.5])
    assert [sampler.draw(scores) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan}, {"temperature": -1.0}, {"temperature": math.inf}, {"top_p": 1.5}, {"top_k": -1},
        {"top_k": 2.5}, {"min_p": -0.1}, {"max_tokens": 0}, {"max_tokens": 2**63}, {"max_tokens": "5"}, {"seed": 2**65},
        {"stop": ["x"] * 100_000}, {"stop": [""]}, {"stop": None}, {"stop": 5}, {"temperature": 10**400},
        {"top_k": 10**400}, {"repetition_penalty": 0}, {"temperature": True},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
