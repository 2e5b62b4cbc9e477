"""Scenes and questions as a data set that `pumice.train` reads."""

from __future__ import annotations

import random
from dataclasses import dataclass

from draw import Scene, paint, scene
from PIL import Image
from shape import TILE_PX
from talk import turns

from pumice.prompt import Message
from pumice.train import Sample

TURNS = 5
"""Questions about one picture in one conversation, at most; two or three on average, for what was said before can be
said again without a look at the picture."""


@dataclass(frozen=True)
class Scenes:
    """`form` 1.5 is drawn at the size of one tile, 1.6 at two by two; `text_only` leaves the pictures out, so that the
    language model learns the words before it sees."""

    form: str
    first: int = 0
    text_only: bool = False

    def __len__(self) -> int:
        return 1 << 24

    def sample(self, index: int) -> Sample:
        number = self.first + index
        shown = scene(number)
        dice = random.Random(f"turns-{number}")
        picked = turns(shown, dice)[: dice.randint(1, TURNS)]
        messages: list[Message] = []
        for place, turn in enumerate(picked):
            images = 1 if place == 0 and not self.text_only else 0
            messages += [Message("user", turn.question, images), Message("assistant", turn.answer)]
        return Sample(tuple(messages), () if self.text_only else (picture(shown, self.form),), f"scene {number}")


def picture(shown: Scene, form: str) -> Image.Image:
    """The scene at the size that the form sees without resizing."""
    return paint(shown, TILE_PX * (2 if form == "1.6" else 1))
