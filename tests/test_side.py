"""The eyes' own CUDA stream: in which order things are launched and waited for. How the engine uses it is in
test_engine.py, over a pretended one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from pumice import Question, Sampling
from pumice.engine.side import InOrder, Stream, side_of
from pumice.model import load_from
from pumice.source import Source


def test_results_are_behind_the_event_and_their_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own names, stood for by what writes down how they are called."""
    told: list[tuple[Any, ...]] = []
    passes = SimpleNamespace(wait_event=lambda event: told.append(("passes wait", event)))

    class Second:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: object) -> None:
            told.append(("second waits", other))

        def record_event(self) -> object:
            told.append(("event",))
            return event

    @contextlib.contextmanager
    def chosen(stream: object) -> Iterator[None]:
        assert isinstance(stream, Second)
        told.append(("second",))
        yield
        told.append(("first",))

    event = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Stream", Second)
    monkeypatch.setattr(torch.cuda, "stream", chosen)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: passes)
    side = side_of(torch.device("cuda", 0))
    assert isinstance(side, Stream)
    with side.working():
        told.append(("look",))
        mark = side.mark()
    assert told == [("second waits", passes), ("second",), ("look",), ("event",), ("first",)]
    assert not mark.query()
    mark.hand_over(SimpleNamespace(record_stream=lambda stream: told.append(("memory", stream))))  # type: ignore[arg-type]
    assert told[5:] == [("passes wait", event), ("memory", passes)]


def test_elsewhere_nothing_waits() -> None:
    side = side_of(torch.device("cpu"))
    assert isinstance(side, InOrder)
    with side.working():
        mark = side.mark()
    assert mark.query()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_answers_about_images_on_a_gpu(tmp_path: Path) -> None:
    """Images that are encoded beside rows which gain tokens."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.6", lm="mistral")
    pictures = [Image.effect_noise((40 + 9 * number, 60), 90).convert("RGB") for number in range(6)]
    asked = [Question("Tell me all.", sampling=Sampling(max_tokens=40))]
    asked += [Question("What is it?", each, sampling=Sampling(max_tokens=8)) for each in pictures]
    expected = [each.tokens for each in load_from(Source(folder), device="cpu").ask_all(asked)]
    model = load_from(Source(folder), device="cuda")
    assert isinstance(model.engine._eyes._side, Stream)
    assert [each.tokens for each in model.ask_all(asked)] == expected
