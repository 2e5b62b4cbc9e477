"""Sampling: against Transformers' own processors in its own order, twins in plain Python, and by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessor, LogitsProcessorList

from pumice import Sampling, UserError
from pumice.engine.filters import candidates, log_probabilities, pick
from pumice.engine.sampling import MAX_BIASES, MAX_STOPS, Drawn, Sampler, draw_all

SCORES = torch.randn(50, generator=torch.Generator().manual_seed(4)) * 3
FEW = settings(deadline=None, max_examples=80)


# --- oracles ---------------------------------------------------------------------------------------------------------


class Subtracted(LogitsProcessor):
    """OpenAI's frequency and presence penalty, which Transformers lacks, in plain Python. generate puts processors that
    are given to it behind its own penalties and before the temperature."""

    def __init__(self, sampling: Sampling, new_ids: Sequence[int]) -> None:
        self.sampling, self.new_ids = sampling, new_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        changed = scores[0].tolist()
        for token, count in Counter(self.new_ids).items():
            changed[token] -= count * self.sampling.frequency_penalty
            changed[token] -= self.sampling.presence_penalty
        return torch.tensor([changed], dtype=scores.dtype)


def theirs(scores: Tensor, sampling: Sampling, prompt: Sequence[int] = (), new: Sequence[int] = ()) -> Tensor:
    """The scores that Transformers' generate draws from, in float64."""
    chosen = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=float(sampling.temperature) or None,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        typical_p=sampling.typical_p,
        repetition_penalty=float(sampling.repetition_penalty),
        sequence_bias={(token,): float(bias) for token, bias in sampling.logit_bias} or None,
    )
    mixin = GenerationMixin()
    mixin.config = SimpleNamespace(is_encoder_decoder=False)
    ours = LogitsProcessorList([Subtracted(sampling, new)])
    ids, row = torch.tensor([[*prompt, *new]], dtype=torch.long), scores.double()[None].clone()
    for processor in mixin._get_logits_processor(chosen, input_ids_seq_length=1, logits_processor=ours):
        row = processor(ids, row)
    return row[0]


def spread(scores: Tensor, sampling: Sampling) -> Tensor:
    """Chances of the candidates, one for each token of the vocabulary."""
    ids, chances = candidates(scores, sampling)
    assert (ids.diff() > 0).all()
    return torch.zeros(len(scores)).index_copy(0, ids, chances)


def assume_no_cut_is_close(scores: Tensor, sampling: Sampling) -> None:
    """Leave out what rounding decides: cuts that another limit, or scores a little off, would place elsewhere."""
    kept = theirs(scores, sampling).isfinite()
    for sign in (-1, 1):
        moved = {
            name: min(max(value + sign * 1e-5, 1e-9), 1.0)
            for name in ("top_p", "min_p", "typical_p")
            if 0 < (value := getattr(sampling, name)) < 1
        }
        assume(torch.equal(theirs(scores, dataclasses.replace(sampling, **moved)).isfinite(), kept))
        ramp = sign * 1e-5 * torch.arange(len(scores)) / len(scores)
        assume(torch.equal(theirs(scores.double() + ramp, sampling).isfinite(), kept))


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Scores of one position: flat and steep, with equal ones, with forbidden ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.randn(draw(st.integers(2, 300)), generator=generator)
    scores *= draw(st.sampled_from([0.01, 1.0, 3.0, 10.0, 100.0]))
    if draw(st.integers(0, 3)) == 0:
        scores = (scores * 2).round() / 2
    if draw(st.integers(0, 3)) == 0:
        scores[torch.rand(len(scores), generator=generator) < 0.5] = -math.inf
        scores[draw(st.integers(0, len(scores) - 1))] = 1.0
    return scores


SHARES = st.floats(0.01, 0.99)
FILTERS = st.fixed_dictionaries(
    {"temperature": st.floats(0.05, 5.0)},
    optional={"top_k": st.integers(1, 60), "top_p": SHARES, "min_p": SHARES, "typical_p": SHARES},
)


# --- filters ---------------------------------------------------------------------------------------------------------


@FEW
@given(rows(), FILTERS)
def test_filters_are_those_of_transformers(scores: Tensor, chosen: dict[str, float]) -> None:
    sampling = Sampling(**chosen)
    if chosen.keys() != {"temperature"}:
        assume_no_cut_is_close(scores, sampling)
    assert_close(spread(scores, sampling), theirs(scores, sampling).softmax(-1).float(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("steepness", [0.0, 1e-3, 0.5, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize(
    "chosen", [{"top_p": 0.9}, {"top_p": 0.9999}, {"typical_p": 0.2}, {"typical_p": 0.95}], ids=str
)
def test_a_vocabulary_of_full_size(steepness: float, chosen: dict[str, float]) -> None:
    """From all tokens on one shelf to all but a few below the last one. float32 adds 32 000 chances otherwise than
    float64: a few tokens at the cut may differ; among equal scores Transformers cuts anywhere."""
    scores = torch.randn(32_000, generator=torch.Generator().manual_seed(0)) * steepness
    sampling = Sampling(1.0, **chosen)
    ours, expected = spread(scores, sampling) > 0, theirs(scores, sampling).softmax(-1) > 0
    assert int(ours.sum()) == pytest.approx(int(expected.sum()), rel=3e-3)
    if steepness:
        assert int((ours != expected).sum()) <= 3e-3 * int(expected.sum())


def test_equal_scores() -> None:
    """All that equal the last of top-k stay, as do all as typical as the last; top-p takes no more than it needs."""
    scores = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    assert candidates(scores, Sampling(1.0, top_k=3))[0].tolist() == [0, 1, 2, 3, 4]
    assert candidates(scores, Sampling(1.0, top_k=2))[0].tolist() == [1, 3]
    assert candidates(torch.zeros(8), Sampling(1.0, top_p=0.5))[0].tolist() == [0, 1, 2, 3]
    assert candidates(torch.zeros(8), Sampling(1.0, top_p=0.51))[0].tolist() == [0, 1, 2, 3, 4]
    assert candidates(torch.zeros(8), Sampling(1.0, typical_p=0.1))[0].tolist() == list(range(8))
    assert candidates(scores, Sampling(1.0, min_p=math.exp(-1) * 0.999))[0].tolist() == [1, 3]


@pytest.mark.parametrize("chosen", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_the_strictest_filter_leaves_the_best(chosen: dict[str, float]) -> None:
    ids, chances = candidates(SCORES, Sampling(1.0, **chosen))
    assert (ids.tolist(), chances.tolist()) == ([int(SCORES.argmax())], [1.0])


def test_typical_by_hand() -> None:
    """Chances 1/2, 1/4, 1/8, 1/8 have an entropy of 1.75 bits and surprises of 1, 2, 3, 3: the second is nearest."""
    scores = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log()
    for mass, kept in ((0.0, [1]), (0.2, [1]), (0.3, [0, 1]), (0.74, [0, 1]), (0.76, [0, 1, 2, 3])):
        assert candidates(scores, Sampling(1.0, typical_p=mass))[0].tolist() == kept


def test_the_colder_the_surer() -> None:
    """Down to temperatures whose quotients float32 cannot hold: the best token, never an overflow."""
    for temperature in (1e-3, 1e-38, 1e-300):
        for chosen in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}):
            sampler = Sampler(Sampling(temperature, seed=3, **chosen), [])
            assert sampler.draw(SCORES) == Drawn(int(SCORES.argmax()))


# --- penalties, bias -------------------------------------------------------------------------------------------------

PENALTIES = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 29), st.floats(-5, 5), max_size=5),
    },
)


@FEW
@given(st.integers(0, 2**32), PENALTIES, st.lists(st.integers(0, 29), max_size=20), st.lists(st.integers(0, 29)))
def test_penalties_and_bias(seed: int, chosen: dict, prompt: list[int], new: list[int]) -> None:
    """What temperature and filters get is what Transformers has there, whatever was drawn or taken before."""
    scores = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 2
    sampling = Sampling(**chosen)
    sampler = Sampler(sampling, prompt)
    for token in new:
        sampler.take(token)
    expected = theirs(scores, sampling, prompt, new)
    assert_close(sampler._adjusted(scores), expected.float(), rtol=1e-4, atol=1e-5)


@FEW
@given(st.integers(0, 2**32), PENALTIES, st.lists(st.integers(0, 29), max_size=20))
def test_greedy_answers_under_penalties(seed: int, chosen: dict, prompt: list[int]) -> None:
    """Token after token, what was drawn counts: the best of Transformers' scores each time."""
    steps = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed)) * 2
    sampling = Sampling(**chosen)
    sampler, new = Sampler(sampling, prompt), []
    for scores in steps:
        expected = theirs(scores, sampling, prompt, new)
        best, second = expected.topk(2).values.tolist()
        assume(best - second > 1e-4)
        new.append(sampler.draw(scores).token)
        assert new[-1] == int(expected.argmax())


def test_penalties_by_hand() -> None:
    """A token of the prompt that was said twice since: 3 / 1.5, less twice 0.25, less 1. One that was not: as it is."""
    sampler = Sampler(Sampling(repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=1.0), [1, 2, 2])
    sampler.take(1)
    sampler.take(1)
    assert sampler._adjusted(torch.tensor([3.0, 3.0, -3.0, 0.0])).tolist() == [3.0, 0.5, -4.5, 0.0]
    biased = Sampler(Sampling(repetition_penalty=2.0, logit_bias={1: 100.0}), [1])
    assert biased._adjusted(torch.tensor([3.0, 2.0])).tolist() == [3.0, 51.0]


def test_the_penalty_leaves_out_what_is_no_token() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), [-200, 10**6])
    scores = torch.tensor([1.0, 0.9, 0.5])
    assert [sampler.draw(scores).token for _ in range(3)] == [0, 1, 2]


def test_the_scores_stay_as_they_are() -> None:
    """Drawing changes nothing in the caller's tensor."""
    scores = SCORES.clone()
    sampler = Sampler(Sampling(0.7, 5, 0.9, 0.1, 1.3, 1, frequency_penalty=1.0, logit_bias={3: 1.0}, logprobs=3), [1])
    for _ in range(3):
        sampler.draw(scores)
    assert torch.equal(scores, SCORES)


# --- the draw --------------------------------------------------------------------------------------------------------


@FEW
@given(rows(), st.integers(0, 2**53 - 1))
def test_a_number_picks_the_token_that_it_falls_on(scores: Tensor, numerator: int) -> None:
    """In exact arithmetic: the first token at which the chances so far exceed the number."""
    chances, uniform = scores.softmax(-1), numerator / 2**53
    sums = list(itertools.accumulate(map(Fraction, chances.tolist())))
    target = Fraction(uniform) * sums[-1]
    assume(all(abs(each - target) > 1e-12 for each in sums))
    assert pick(chances, uniform) == next(place for place, each in enumerate(sums) if each > target)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_without_a_chance_is_never_picked(uniform: float) -> None:
    for scale in (1.0, 0.1, 1 / 3, 7e-20):
        chances = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.7, 0.0, 0.0]) * scale
        assert pick(chances, uniform) == (2 if uniform == 0 else 4)


@FEW
@given(st.integers(-(2**63), 2**64 - 1), FILTERS, PENALTIES)
def test_draws_follow_transformers_distribution(seed: int, chosen: dict, more: dict) -> None:
    """Token after token: each is where the seed's next number falls in the distribution that generate draws from."""
    steps = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed % 2**63)) * 3
    sampling = Sampling(**chosen, **more, seed=seed)
    sampler, numbers, new = Sampler(sampling, [1, 2]), Random(seed % 2**64), []
    for scores in steps:
        bare = Sampling(**more)
        assume_no_cut_is_close(theirs(scores, bare, [1, 2], new), Sampling(**chosen))
        sums = theirs(scores, sampling, [1, 2], new).softmax(-1).cumsum(0)
        target = numbers.random()
        assume((sums - target).abs().min() > 1e-5)
        new.append(sampler.draw(scores).token)
        assert new[-1] == int((sums <= target).sum())


def test_a_seed_repeats_and_another_differs() -> None:
    def drawn(seed: int | None) -> list[Drawn]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [])
        return [sampler.draw(SCORES) for _ in range(30)]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in (1, 2, -1, 2**63, 2**64 - 2, None, None)}) == 7


# --- many rows -------------------------------------------------------------------------------------------------------

KINDS = (
    Sampling(), Sampling(), Sampling(logprobs=2), Sampling(1.0, seed=1), Sampling(1.0, seed=2),
    Sampling(0.8, 7, seed=1), Sampling(1.2, top_p=0.8, seed=4), Sampling(frequency_penalty=2.0),
    Sampling(1.0, repetition_penalty=1.5, seed=3),
    Sampling(logit_bias={4: 100.0}), Sampling(1.0, typical_p=0.5, seed=5, logprobs=0),
)  # fmt: skip


@FEW
@given(st.permutations(range(len(KINDS))), st.integers(1, len(KINDS)), st.sampled_from(["float32", "bfloat16"]))
def test_rows_draw_as_they_would_alone(order: list[int], count: int, dtype: str) -> None:
    steps = torch.randn(5, len(KINDS), 40, generator=torch.Generator().manual_seed(0)).mul(3).to(getattr(torch, dtype))
    alone = [Sampler(sampling, [4, 5]) for sampling in KINDS]
    expected = [[sampler.draw(scores[row]) for scores in steps] for row, sampler in enumerate(alone)]
    chosen = order[:count]
    samplers = [Sampler(KINDS[row], [4, 5]) for row in chosen]
    drawn = [draw_all(samplers, scores[chosen]) for scores in steps]
    assert [list(each) for each in zip(*drawn)] == [expected[row] for row in chosen]


def test_plain_rows_stay_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: moved.append(tuple(self.shape)) or cpu(self))
    samplers = [Sampler(Sampling(), []) for _ in range(4)]
    assert all(sampler.plain for sampler in samplers)
    scores = torch.randn(4, 9)
    assert draw_all(samplers, scores) == [Drawn(int(each.argmax())) for each in scores]
    assert moved == []
    draw_all([*samplers[:3], Sampler(Sampling(1.0), [])], scores)
    assert moved == [(1, 9)]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1)], ids=["greedy", "drawn"])
def test_scores_that_are_no_numbers(wrong: float, sampling: Sampling) -> None:
    """The row whose scores are wrong is told so; the others draw as if nothing had been."""
    scores = torch.stack((SCORES, SCORES))
    sampler, twin = Sampler(sampling, []), Sampler(sampling, [])
    scores[1, 7] = wrong
    drawn, error = draw_all([sampler, Sampler(sampling, [])], scores)
    assert drawn == twin.draw(SCORES)
    assert isinstance(error, UserError)
    assert "not numbers" in error.message
    with pytest.raises(UserError, match="not numbers"):
        sampler.draw(torch.full((5,), -math.inf))
    assert [sampler.draw(SCORES) for _ in range(5)] == [twin.draw(SCORES) for _ in range(5)]
    with pytest.raises(UserError, match="not numbers"):
        Sampler(Sampling(1.0, repetition_penalty=0.01), [0]).draw(torch.tensor([3e38, 0.0]))


# --- log-probabilities -----------------------------------------------------------------------------------------------


@FEW
@given(rows(), st.integers(0, 20), st.integers(0, 2**32))
def test_log_probabilities(scores: Tensor, count: int, seed: int) -> None:
    """Against Python's sort of float64's values; equal ones by rising id."""
    token = seed % len(scores)
    logprob, top = log_probabilities(scores, token, count)
    expected = scores.double().log_softmax(-1).tolist()
    ids = sorted(range(len(scores)), key=lambda each: (-float(scores[each]), each))[:count]
    logs = dict(top)
    assert [*logs] == ids
    assert [logprob, *logs.values()] == pytest.approx([expected[each] for each in (token, *ids)], rel=1e-5, abs=1e-5)


def test_log_probabilities_are_the_models_own() -> None:
    """Whatever changes the draw changes nothing in them."""
    raw = SCORES.log_softmax(-1)
    ways = Sampling(2.0, 3, repetition_penalty=1.9, logit_bias={6: 100.0}, frequency_penalty=1.0)
    for way in (Sampling(), Sampling(0.3, seed=1), ways):
        sampler = Sampler(dataclasses.replace(way, logprobs=3), [1, 2, 3])
        for _ in range(3):
            drawn = sampler.draw(SCORES)
            assert drawn.logprob == pytest.approx(float(raw[drawn.token]))
            assert drawn.top == tuple((each, pytest.approx(float(raw[each]))) for each in raw.topk(3).indices.tolist())
    assert Sampler(Sampling(), []).draw(SCORES) == Drawn(int(SCORES.argmax()), None, ())
    assert Sampler(Sampling(logprobs=0), []).draw(SCORES).top == ()


# --- a guide ---------------------------------------------------------------------------------------------------------


class Spelled:
    """Allows the tokens of each place in turn; notes what it is given."""

    def __init__(self, *places: set[int]) -> None:
        self.places, self.seen, self.pushed = places, [], []

    def mask(self, scores_V: Tensor) -> Tensor:
        self.seen.append(scores_V)
        allowed = torch.zeros(len(scores_V), dtype=torch.bool)
        allowed[list(self.places[len(self.pushed)])] = True
        return scores_V.masked_fill(~allowed, -math.inf)

    def push(self, token: int) -> None:
        self.pushed.append(token)


@pytest.mark.parametrize(
    "chosen",
    [
        {}, {"temperature": 5.0, "seed": 1}, {"logit_bias": {9: 100.0}}, {"repetition_penalty": 2.0},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.1, "top_k": 30, "typical_p": 0.9, "seed": 2}, {"logprobs": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_guide_allows_and_is_told(chosen: dict) -> None:
    """Nothing brings a forbidden token back, neither a bias nor a temperature; forced tokens are told as well."""
    guide = Spelled({1, 2}, {3}, {4, 5}, {6, 7, 8})
    sampler = Sampler(Sampling(**chosen), [1], guide)
    assert not sampler.plain
    first = sampler.draw(SCORES.bfloat16())
    sampler.take(3)
    rest = [sampler.draw(SCORES) for _ in range(2)]
    assert guide.pushed == [first.token, 3, *(each.token for each in rest)]
    assert all(token in allowed for token, allowed in zip(guide.pushed, guide.places, strict=True))
    assert guide.seen[0].dtype == torch.float32
    assert torch.equal(guide.seen[0], SCORES.bfloat16().float())
    if "logprobs" in chosen:
        assert rest[0].top == ((int(SCORES.argmax()), pytest.approx(float(SCORES.log_softmax(-1).max()))),)


def test_a_guide_that_allows_nothing() -> None:
    """An error, and no row has drawn."""
    guide = Spelled({1}, set())
    samplers = [Sampler(Sampling(1.0, seed=1), []), Sampler(Sampling(), [], guide)]
    twin = Sampler(Sampling(1.0, seed=1), [])
    scores = torch.stack((SCORES, SCORES))
    assert draw_all(samplers, scores) == [twin.draw(SCORES), Drawn(1)]
    drawn, error = draw_all(samplers, scores)
    assert drawn == twin.draw(SCORES)
    assert isinstance(error, UserError)
    assert "allows no token" in error.message
    assert guide.pushed == [1]
    assert samplers[0].draw(SCORES) == twin.draw(SCORES)


# --- what is refused -------------------------------------------------------------------------------------------------


class Endless(Sequence):
    """A list that says it is short and never ends; as a dict too."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: object) -> object:
        return "x"


class EndlessPairs(Mapping):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: object) -> float:
        return 0.0

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


MANY = dict.fromkeys(range(1_000_000), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan}, {"temperature": -1.0}, {"temperature": math.inf}, {"top_p": 1.5}, {"top_k": -1},
        {"top_k": 2.5}, {"min_p": -0.1}, {"max_tokens": 0}, {"max_tokens": 2**63}, {"max_tokens": "5"}, {"seed": 2**65},
        {"stop": ["x"] * 100_000}, {"stop": [""]}, {"stop": None}, {"stop": 5}, {"temperature": 10**400},
        {"top_k": 10**400}, {"repetition_penalty": 0}, {"temperature": True}, {"top_k": 10**10_000},
        {"temperature": "x" * 10**6}, {"top_p": MANY}, {"seed": itertools.count()}, {"seed": 1.0},
        {"stop": b"ab"}, {"stop": {"a"}}, {"stop": Endless()}, {"stop": range(2**62)}, {"stop": iter(["a"])},
        {"stop": itertools.repeat("x")}, {"stop": MANY}, {"stop": ["x", 3]},
        {"typical_p": math.nan}, {"typical_p": 1.01}, {"typical_p": False}, {"typical_p": None},
        {"presence_penalty": 2.1}, {"presence_penalty": -math.inf}, {"frequency_penalty": math.nan},
        {"frequency_penalty": "1"}, {"frequency_penalty": True},
        {"logprobs": 21}, {"logprobs": -1}, {"logprobs": True}, {"logprobs": 2.0}, {"logprobs": 2**63},
        {"stop_ids": 5}, {"stop_ids": [-1]}, {"stop_ids": [2**63]}, {"stop_ids": [True]}, {"stop_ids": ["5"]},
        {"stop_ids": "5"}, {"stop_ids": [1.0]}, {"stop_ids": range(2**62)}, {"stop_ids": itertools.count()},
        {"stop_ids": None}, {"stop_ids": list(range(MAX_STOPS + 1))}, {"stop_ids": MANY}, {"stop_ids": Endless()},
        {"logit_bias": {1: 101.0}}, {"logit_bias": {1: math.nan}}, {"logit_bias": {1: -math.inf}},
        {"logit_bias": {"1": 1.0}}, {"logit_bias": {1.5: 1.0}}, {"logit_bias": {True: 1.0}}, {"logit_bias": {-1: 1.0}},
        {"logit_bias": {2**63: 1.0}}, {"logit_bias": {1: "1"}}, {"logit_bias": {1: True}}, {"logit_bias": {1: None}},
        {"logit_bias": MANY}, {"logit_bias": EndlessPairs()}, {"logit_bias": Endless()}, {"logit_bias": None},
        {"logit_bias": 5}, {"logit_bias": "ab"}, {"logit_bias": [5]}, {"logit_bias": [(1, 2, 3)]},
        {"logit_bias": [(1, 2.0), (1, 3.0)]}, {"logit_bias": itertools.count()}, {"logit_bias": [([], 1.0)]},
        {"logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 0.0)}, {"stop_ids": ""}, {"logit_bias": ""}, {"stop": b""},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """In two short lines, of which the first names the setting; what never ends is not read to its end."""
    with pytest.raises(UserError, match=next(iter(wrong))) as caught:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=8,
)


@FEW
@given(st.sampled_from([each.name for each in dataclasses.fields(Sampling)]), ANYTHING)
def test_anything_is_taken_or_refused(name: str, value: object) -> None:
    """What is taken can draw."""
    try:
        sampling = Sampling(**{name: value})  # type: ignore[arg-type]
        sampling.check_vocabulary(len(SCORES))
    except UserError:
        return
    assert 0 <= Sampler(sampling, []).draw(SCORES).token < len(SCORES)


def test_settings_are_frozen_values() -> None:
    biases = {7: 1.0, 3: -2}
    sampling = Sampling(0.5, stop="END", stop_ids=[5, 4], logit_bias=biases, logprobs=3)
    biases[7] = 9.0
    assert (sampling.stop, sampling.stop_ids, sampling.logit_bias) == (("END",), (5, 4), ((3, -2), (7, 1.0)))
    assert sampling == Sampling(0.5, stop=("END",), stop_ids=(5, 4), logit_bias={3: -2, 7: 1.0}, logprobs=3)
    assert len({sampling, dataclasses.replace(sampling), pickle.loads(pickle.dumps(sampling))}) == 1
    assert dataclasses.replace(sampling, seed=1).logit_bias == sampling.logit_bias
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.seed = 1  # type: ignore[misc]


def test_tokens_that_the_model_lacks() -> None:
    Sampling(stop_ids=[9], logit_bias={9: 1.0}).check_vocabulary(10)
    for wrong in ({"stop_ids": [3, 10]}, {"logit_bias": {3: 1.0, 10: 1.0}}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} names token 10\n.* 0 to 9"):
            Sampling(**wrong).check_vocabulary(10)
