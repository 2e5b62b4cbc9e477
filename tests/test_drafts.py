"""Prompt lookup: what is tried, how much of it, and that answers are the same with it and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import pumice
import tiny
from pumice import Sampling, UserError
from pumice.engine import Engine, Limits, Request
from pumice.engine.drafts import FORGOTTEN, Lookup, Pace
from pumice.network.llama import Batch

IMAGE = 2**40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pumice.Model:
    return pumice.load(tiny.hf_folder(tmp_path_factory.mktemp("drafts") / "hf", family="1.5", seed=11))


class Always(Pace):
    """Whatever can be tried is tried."""

    def length(self, drafts: Sequence[tuple[int, float]]) -> int:
        return max(length for length, _ in drafts)


def test_what_followed_the_last_time_is_tried() -> None:
    lookup = Lookup()
    assert lookup.draft([1, 2, 3, 4], 5) == []
    assert lookup.draft([1, 2, 3, 4, 1, 2], 4) == [3, 4, 1, 2]
    assert lookup.draft([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert lookup.draft([1, 2, 3, 4, 1, 2, 9, 1, 2], 3) == [9, 1, 2]  # the latest counts
    assert lookup.draft([1, 2, 3, 4, 1, 2, 9, 1, 2, 3], 1) == [4]


def test_what_repeats_goes_on_repeating() -> None:
    assert Lookup().draft([1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert Lookup().draft([9, 9, 9], 4) == [9, 9, 9, 9]


def test_the_longest_beginning_counts() -> None:
    names = [1, 2, 3, 4, 5, 8, 3, 4, 6, 2, 3, 4]
    assert Lookup().draft(names, 1) == [5]  # behind 2 3 4, though 3 4 was followed by 6 later


def test_images_are_not_tried() -> None:
    assert Lookup().draft([1, 2, IMAGE, IMAGE + 1, 3, 1, 2], 4) == []
    assert Lookup().draft([1, 2, 7, IMAGE, IMAGE + 1, 3, 1, 2], 4) == [7]
    assert Lookup().draft([IMAGE, 1, 2, 7, 1, 2], 9) == [7, 1, 2] * 3
    assert Lookup().draft([IMAGE, IMAGE + 1, 5, IMAGE, IMAGE + 1], 4) == []


def test_acceptance_follows_what_was_kept() -> None:
    lookup = Lookup()
    lookup.learn(4, 4)
    assert lookup.acceptance == pytest.approx(6 / 7)
    lookup.learn(1, 16)  # behind the first that was wrong nothing was tried
    assert lookup.acceptance == pytest.approx(7 / 9)


def test_so_many_are_tried_as_promise_most_tokens_a_second() -> None:
    pace = Pace()
    assert pace.length([(16, 0.9)]) == 0  # nothing is known yet
    pace.learn(1, 1.0)
    assert pace.length([(16, 0.9)]) == 1  # two positions may be as fast as one
    for positions, seconds in ((2, 1.5), (4, 2.5), (8, 4.5), (16, 8.5)):
        pace.learn(positions, seconds)
    assert pace.seconds(3) == 2.0
    assert pace.length([(16, 0.4)]) == 0  # 1.4 tokens in 1.5 s
    assert pace.length([(16, 0.9)]) == 4  # 4.1 tokens in 3 s, against 1.9 in 1.5 and 6.1 in 5
    assert pace.length([(2, 0.9), (0, 0.5)]) == 2
    for _ in range(FORGOTTEN):
        pace.learn(1, 1.0)
    assert pace.length([(16, 0.4)]) == 1  # tried again


def looping(tokens: int) -> list[int]:
    return [1, *([15, 16, 17, 18] * tokens)][:tokens]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=60),
        Sampling(0.7, seed=4, max_tokens=60),
        Sampling(0.7, seed=4, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=60),
        Sampling(max_tokens=60, logprobs=3),
    ],
)
def test_answers_are_the_same_and_take_fewer_passes(
    model: pumice.Model, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    whole = type(model.network).forward

    def counted(self: object, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return whole(self, x, batch)

    monkeypatch.setattr(type(model.network), "forward", counted)

    def told(drafts: int) -> tuple[list[tuple[object, ...]], int]:
        nonlocal passes
        passes, engine = 0, Engine(model.network, Limits(drafts=drafts))
        engine._pace = Always()
        generation = engine.submit(Request(looping(40), [], sampling))
        said = [(step.token, step.reason, step.top) for step in engine.follow(generation)]
        assert engine.pages_held == 0
        return said, passes

    (plain, slow), (drafted, fast) = told(0), told(16)
    assert [each[:2] for each in drafted] == [each[:2] for each in plain]
    for (_, _, one), (_, _, other) in zip(plain, drafted):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [chance for _, chance in one] == pytest.approx([chance for _, chance in other], abs=1e-4)
    assert fast < slow if sampling.temperature == 0 else fast <= slow


def test_a_draft_keeps_to_the_form(model: pumice.Model) -> None:
    form = pumice.Form.of(regex="(ab){4,40}c")
    assert form is not None
    answers = []
    for drafts in (0, 8):
        engine = Engine(model.network, Limits(drafts=drafts))
        engine._pace = Always()
        request = Request(looping(20), [], Sampling(max_tokens=90), model._grammar(form))
        answers.append([step.token for step in engine.follow(engine.submit(request))])
    assert answers[0] == answers[1]


def test_a_draft_ends_where_the_model_does(tmp_path: Path) -> None:
    network = pumice.load(tiny.hf_folder(tmp_path / "hf", family="1.5", seed=11)).network
    network.config = dataclasses.replace(
        network.config, stop_ids=(), text=dataclasses.replace(network.config.text, max_positions=64)
    )
    for at in range(50, 64):
        engine = Engine(network, Limits(drafts=16))
        engine._pace = Always()
        steps = list(engine.follow(engine.submit(Request(looping(at), [], Sampling(max_tokens=100)))))
        assert len(steps) == 64 - at + 1
        assert steps[-1].reason == "length"


def test_a_draft_whose_scores_are_no_numbers_fails_alone(model: pumice.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model.network)
    engine._pace = Always()
    whole = model.network.logits

    def damaged(hidden: torch.Tensor) -> torch.Tensor:
        logits = whole(hidden)
        return logits if len(logits) < 3 else logits.index_fill(0, torch.tensor([1, 2]), float("nan"))

    monkeypatch.setattr(model.network, "logits", damaged)
    with pytest.raises(UserError, match="scores are not numbers"):
        list(engine.follow(engine.submit(Request(looping(24), [], Sampling(max_tokens=40)))))
    monkeypatch.undo()
    assert engine.pages_held == 0
    assert len(list(engine.follow(engine.submit(Request(looping(24), [], Sampling(max_tokens=20)))))) == 20
