"""What builds of a model are compared on: a few pictures, drawn here, and questions. Whole numbers only, so that they
are the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pumice.image import ImageLike, drawn, open_image

ANSWER_TOKENS = 32
"""The most that an answer counts."""
DESCRIBE = "Describe this image in detail."
TEXTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse, a storm and 3 sailors.",
    "Which of the numbers from 1 to 20 are prime? List them.",
)


@dataclass(frozen=True, eq=False)
class Probe:
    """A question, with a picture or without."""

    prompt: str
    picture: ImageLike | None = None
    digest: str = ""
    """SHA-256 of the picture as a person sees it; empty without one."""


def probes(images: Sequence[ImageLike] = (), *, eyes: bool) -> tuple[Probe, ...]:
    """The questions: about these images, or about the drawn ones when there are none, and some without a picture.
    Without eyes only the latter.

    Raises UserError for an image that cannot be read.
    """
    asked = [(DESCRIBE, each) for each in images] or [
        (DESCRIBE, drawn(scene())),
        ("What is written here?", drawn(page())),
        ("Which colours do you see, from top to bottom?", drawn(tower())),
    ]
    return (*(_seeing(*each) for each in asked if eyes or images), *(Probe(text) for text in TEXTS))


def _seeing(prompt: str, image: ImageLike) -> Probe:
    upright = open_image(image)
    digest = hashlib.sha256(repr(upright.size).encode() + upright.tobytes()).hexdigest()
    return Probe(prompt, upright, digest)


def scene() -> NDArray[np.uint8]:
    """640 x 480: a sky that fades into sand, a sun, a house with a striped wall. LLaVA 1.6 cuts it into 2 x 2."""
    y, x = np.mgrid[:480, :640]
    red, green, blue = 60 + y * 150 // 480, 120 + y * 60 // 480, 220 - y * 170 // 480
    picture = np.stack((red, green, blue), axis=-1)
    picture[(x - 500) ** 2 + (y - 110) ** 2 < 60**2] = 250, 220, 60
    wall = (x > 120) & (x < 330) & (y > 240) & (y < 420)
    picture[wall] = 190, 60, 50
    picture[wall & (y % 24 < 4)] = 235, 225, 215
    picture[(y <= 240) & (y > 150) & (abs(x - 225) < (y - 150) * 4 // 3)] = 70, 50, 60
    return picture.astype(np.uint8)


def page() -> NDArray[np.uint8]:
    """600 x 260: dark strokes on white in lines and words, like print too small to read."""
    y, x = np.mgrid[:260, :600]
    letter, line = x // 9, y // 20
    ink = (letter * 7919 + line * 104729) % 31
    stroke = (x % 9 * (ink % 4 + 1) + y % 20 * (ink % 3 + 1)) % 5 < 2
    inside = (x % 9 < 7) & (y % 20 > 4) & (y % 20 < 16) & (ink > 5) & (x > 30) & (x < 570)
    gray = np.where(stroke & inside, 20 + ink, 255)
    return np.stack((gray, gray, gray), axis=-1).astype(np.uint8)


def tower() -> NDArray[np.uint8]:
    """200 x 560: bands of colour one over the other, with noise. LLaVA 1.6 cuts it into 1 x 3."""
    y, x = np.mgrid[:560, :200]
    bands = np.array([(200, 40, 40), (230, 150, 30), (240, 230, 70), (60, 160, 70), (40, 90, 200), (110, 50, 150)])
    noise = (x * 12289 + y * 40961 + x * y * 257) % 41 - 20
    return np.clip(bands[y * 6 // 560] + noise[..., None], 0, 255).astype(np.uint8)
