"""An answer: while it comes, and when it has come."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pumice.decoding import StopText
from pumice.engine import Engine, Generation, Request, Step
from pumice.engine.form import Form
from pumice.errors import UserError
from pumice.question import Seen
from pumice.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; OpenAI's number."""


@dataclass(frozen=True)
class Timings:
    """Seconds of each phase, and the rate of the decode steps."""

    encode_s: float
    """Reading the images and running the vision tower."""
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    """New tokens after the first, which the prefill gave."""

    @property
    def tokens_per_s(self) -> float:
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def total_s(self) -> float:
        return self.encode_s + self.prefill_s + self.decode_s


@dataclass(frozen=True)
class Likely:
    """A token, as text and bytes, and the natural logarithm of its probability (`sampling.Drawn`); `top` are the most
    likely tokens of its place, from the best down."""

    id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The text, and how it came about. `str(answer)` is the text."""

    text: str
    tokens: tuple[int, ...]
    """New token ids, the end token included when it came."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    """Length of the prompt, image tokens included."""
    cached_tokens: int
    """Of these, what was in the cache from earlier questions and was not read again."""
    image_tokens: tuple[int, ...]
    """Tokens of each image."""
    timings: Timings
    form: Form | None = None
    """What the answer had to look like."""
    logprobs: tuple[Likely, ...] = ()
    """Of each token, where `Sampling.logprobs` asks for it."""

    @property
    def value(self) -> Any:
        """What an answer in a form says: see `Form.value`. Raises UserError for one that was cut short."""
        if self.form is None:
            raise UserError("the answer has no form, so it has no value", hint="ask with schema=, or use answer.text")
        if self.finish_reason == "length":
            raise UserError("the answer was cut short before its form was complete", hint="give more max_tokens")
        return self.form.value(self.text)

    def __str__(self) -> str:
        return self.text


class Answering:
    """One question under way: its generation, and its answer as far as it has come."""

    def __init__(
        self, engine: Engine, request: Request, seen: Seen, tokenizer: Tokenizer, stops: Sequence[str], prepare_s: float
    ) -> None:
        """stops: texts that end the answer. prepare_s: what it took to read the images."""
        self.request, self.seen, self._engine, self._prepare_s = request, seen, engine, prepare_s
        self._tokenizer, self._text, self._stops = tokenizer, tokenizer.stream(), StopText(stops)
        self._generation: Generation | None = None
        self.steps: list[Step] = []
        self._pieces: list[str] = []
        self._held = ""
        self.stopped = False

    def start(self) -> None:
        """From now on the engine works on it."""
        if self._generation is None:
            self._generation = self._engine.submit(self.request)

    @property
    def encode_s(self) -> float:
        """What the vision tower has taken for its images, as far as they were looked at."""
        return 0.0 if self._generation is None else self._generation.encode_s

    def work(self) -> None:
        """A step of its engine, which serves all that it has."""
        self._engine.step()

    def cancel(self) -> None:
        if self._generation is not None:
            self._engine.cancel(self._generation)

    @property
    def ended(self) -> bool:
        """Whether its last token was taken. Raises what it failed with."""
        if self.stopped:
            return True
        generation = self._generation
        if generation is None or not generation.ended or generation.steps:
            return False
        if generation.error is not None:
            raise generation.error
        return True

    def pieces(self) -> Iterator[str]:
        """The answer's text as it comes; begins it where that was not done. One that is not read on is cancelled."""
        self.start()
        try:
            while not self.ended:
                piece = self.take()
                if piece:
                    yield piece
                else:
                    self.work()
        finally:
            self.cancel()

    def take(self) -> str:
        """The text that has come since."""
        assert self._generation is not None, "the question was not started"
        text = ""
        while self._generation.steps and not self.stopped:
            text += self._push(self._generation.steps.popleft())
        if self.stopped:
            self.cancel()
            self._generation.steps.clear()
        return text

    def _push(self, step: Step) -> str:
        """The text that this token completes; often a word, sometimes nothing yet."""
        self.steps.append(step)
        text = self._text.push(step.token)
        if step.reason is not None:
            text += self._text.finish()
        emitted, self.stopped = self._stops.push(text)
        if step.reason is not None and not self.stopped:
            emitted += self._stops.finish()
        return self._trimmed(emitted)

    def _trimmed(self, text: str) -> str:
        """Text without the answer's outer white space: at the end it is held back until something follows it. Where the
        answer had begun, its text stays as it is."""
        if self.seen.continues:
            self._pieces += [text] if text else []
            return text
        text = self._held + text
        if not self._pieces:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :] if kept or self._pieces else ""
        if kept:
            self._pieces.append(kept)
        return kept

    def likely(self, start: int = 0) -> tuple[Likely, ...]:
        """Log-probabilities of the tokens from this one on, where they were asked for."""
        return tuple(
            self._told(step.token, step.logprob, tuple(itertools.starmap(self._told, step.top)))
            for step in self.steps[start:]
            if step.logprob is not None
        )

    def _told(self, token: int, logprob: float, top: tuple[Likely, ...] = ()) -> Likely:
        data = self._tokenizer.bytes_of(token)
        return Likely(token, data.decode(errors="replace"), tuple(data), max(logprob, LEAST_LOGPROB), top)

    def answer(self) -> Answer:
        if not self.steps or self._generation is None:
            raise UserError("there is no answer: its first token never came", hint="the error before says why")
        prefill_s = sum(step.seconds for step in self.steps if step.prefill)
        decode_s = sum(step.seconds for step in self.steps if not step.prefill)
        return Answer(
            text="".join(self._pieces),
            tokens=tuple(step.token for step in self.steps),
            finish_reason="stop" if self.stopped or self.steps[-1].reason == "stop" else "length",
            prompt_tokens=len(self.request.ids),
            cached_tokens=self._generation.cached_tokens,
            image_tokens=tuple(each.grid.tokens for each in self.seen.images),
            timings=Timings(
                self._prepare_s + self.encode_s,
                prefill_s,
                decode_s,
                sum(not step.prefill for step in self.steps),
            ),
            form=None if self.request.grammar is None else self.request.grammar.form,
            logprobs=self.likely(),
        )


def taken(under_way: deque[Answering | UserError]) -> Answer | UserError:
    """What the first of several comes to, while the others go on; it is taken out of them."""
    first = under_way[0]
    ended = _ended(first, under_way) if isinstance(first, Answering) else first
    under_way.popleft()
    return ended


def _ended(one: Answering, under_way: Iterable[Answering | UserError]) -> Answer | UserError:
    try:
        while not one.ended:
            one.work()
            for each in under_way:
                if isinstance(each, Answering):
                    each.take()
        return one.answer()
    except UserError as error:
        return error


def cancel(under_way: Iterable[Answering | UserError]) -> None:
    """Ends all that are still under way; what they hold is free with the engine's next step."""
    for each in under_way:
        if isinstance(each, Answering):
            each.cancel()
