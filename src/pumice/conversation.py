"""An answer in pieces, and a conversation of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pumice.answer import Answer, Answering
from pumice.question import Exchange, Images, Question, Seen, listed

if TYPE_CHECKING:
    from pumice.model import Model


class Stream:
    """An answer that is coming: iterate over its pieces; `answer` is the whole, finished first if it must be.

    `seen` is what `see` gave for the question, where that was asked before.
    """

    def __init__(self, model: Model, question: Question, seen: Seen | None = None) -> None:
        self._opened = model.open(question, seen)
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def encode_s(self) -> float:
        """What the vision tower took for the images: all of it as soon as there is a piece."""
        return self._opened.encode_s

    @property
    def answer(self) -> Answer:
        for _ in self._pieces:
            pass
        return self._opened.answer()

    def _run(self) -> Iterator[str]:
        return self._opened.pieces()


class Chat:
    """A conversation with one model. `history` is what has been said."""

    def __init__(self, model: Model, settings: Question) -> None:
        self._model, self._settings = model, settings
        self.history: tuple[Exchange, ...] = ()

    def ask(self, prompt: str, image: Images = None) -> Answer:
        """The answer to the next turn, which then belongs to the history."""
        turn = self.stream(prompt, image)
        for _ in turn:
            pass
        return turn.answer

    def stream(self, prompt: str, image: Images = None) -> ChatStream:
        """The next answer in pieces; the turn belongs to the history once it has been read to its end."""
        question = dataclasses.replace(self._settings, prompt=prompt, image=image, history=self.history)
        return ChatStream(self, self._model, question)

    def clear(self) -> None:
        """Forget all turns."""
        self.history = ()


class ChatStream(Stream):
    """A stream that adds its turn to the chat's history when it ends."""

    def __init__(self, chat: Chat, model: Model, question: Question) -> None:
        self._chat, self._question = chat, question
        super().__init__(model, question)

    def _run(self) -> Iterator[str]:
        return _remembered(self._chat, self._question, self._opened)


def _remembered(chat: Chat, question: Question, opened: Answering) -> Iterator[str]:
    """The pieces of a turn, which then belongs to the chat. Not a method: a stream that its own generator holds would
    not be freed when it is dropped."""
    yield from opened.pieces()
    new = len(listed(question.image))
    images = opened.seen.images[-new:] if new else []
    chat.history = (*chat.history, Exchange(question.prompt, opened.answer().text, tuple(images)))
