"""A quality card: how far one build of a model is from another, in figures, and the plain word for each of them."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from pumice.checkpoints.card import CARD_BYTES
from pumice.checkpoints.fields import is_number, is_whole, shown
from pumice.errors import UserError

WORDS = ("equal", "rounding", "very close", "close", "changed", "different")
"""What a figure means, from the best. `equal`: no difference at all, also before the figure was rounded."""
_STEPS = {
    "largest pixel": (1e-5, 0.02, 0.1, 0.5),
    "largest feature": (1e-4, 0.05, 0.2, 1.0),
    "relative L2": (1e-5, 0.03, 0.1, 0.3),
    "cosine": (1e-9, 5e-4, 5e-3, 5e-2),
    "largest logit": (1e-3, 0.25, 1.0, 4.0),
    "KL": (1e-6, 0.01, 0.1, 0.5),
    "agreement": (1e-9, 0.01, 0.05, 0.15),
    "perplexity": (1e-5, 0.01, 0.05, 0.25),
}
"""How far from equal a figure may be for the second word, the third…; beyond the last it is the last word. Those of KL
stand between llama.cpp's mixes, mean KLD in nats from F16 on a text corpus, Llama 3 8B and Llama 2 7B: Q8_0 0.0014 and
0.0004, Q6_K 0.0055 and 0.0021, Q4_K_M 0.031 and 0.013, Q2_K 0.45 and 0.11. Source: its perplexity README, "LLaMA 2
vs. LLaMA 3 Quantization comparison"."""


class Row(NamedTuple):
    """A line of a card as people read it."""

    part: str
    figure: str
    value: str
    word: str


@dataclass(frozen=True)
class Build:
    """One build of a model."""

    name: str
    """The last part of its path."""
    format: str
    tower: str
    """Types of the weights of tower and projector, and how many tensors of each; empty for a text model."""
    language_model: str
    nbytes: int
    """Of all weights, as stored."""

    def __str__(self) -> str:
        tower = f"tower {self.tower}; " if self.tower else ""
        size = f"{self.nbytes / 1e9:.2f} GB" if self.nbytes >= 1e9 else f"{self.nbytes / 1e6:.2f} MB"
        return f"{self.name} ({self.format}; {tower}language model {self.language_model}; {size})"


@dataclass(frozen=True)
class Pixels:
    """Each build's own preprocessing of the same pictures."""

    equal: int
    """Pictures whose pixels are bit for bit the same."""
    largest: float | None
    """The largest difference of two normalised pixels; None where a picture is cut into other tiles."""

    def rows(self, pictures: int) -> list[Row]:
        if self.largest is None:
            return [_count("pixels", self.equal, pictures), Row("pixels", "largest difference", "-", "other tiles")]
        return [
            _count("pixels", self.equal, pictures),
            _row("pixels", "largest difference", self.largest, "largest pixel"),
        ]


@dataclass(frozen=True)
class Features:
    """What the two towers, projectors included, make of the reference's pixels."""

    largest: float
    relative_l2: float
    """Length of the difference over the reference's length, of all pictures together."""
    cosine_mean: float
    """Of the two vectors of a token."""
    cosine_min: float
    by_tile: tuple[float, ...]
    """Relative L2 by place: the base view, then the first tile of each picture, the second…"""

    def rows(self) -> list[Row]:
        worst = max(range(len(self.by_tile)), key=self.by_tile.__getitem__)
        place = f"tile {worst}" if worst else "base view"
        return [
            _row("tower", "relative L2", self.relative_l2, "relative L2"),
            _row("tower", f"relative L2, worst: {place}", self.by_tile[worst], "relative L2"),
            _row("tower", "cosine, mean", self.cosine_mean, "cosine", best=1, exact=self.relative_l2),
            _row("tower", "cosine, least", self.cosine_min, "cosine", best=1, exact=self.relative_l2),
            _row("tower", "largest difference", self.largest, "largest feature"),
        ]


@dataclass(frozen=True)
class Logits:
    """Two language models at each place of the answers that the reference gives by itself."""

    kl_mean: float
    """Kullback-Leibler divergence of the build from the reference, in nats: mean, 99th percentile, largest."""
    kl_p99: float
    kl_max: float
    agreement: float
    """Share of the places where both have the same best token."""
    perplexity_ratio: float
    """Perplexity of the reference's answers under the build, over that under the reference."""
    largest: float

    def rows(self, part: str) -> list[Row]:
        return [
            _row(part, "KL divergence, mean", self.kl_mean, "KL", exact=self.largest),
            _row(part, "KL divergence, 99th percentile", self.kl_p99, "KL", exact=self.largest),
            _row(part, "KL divergence, largest", self.kl_max, "KL", exact=self.largest),
            _row(part, "same best token", self.agreement, "agreement", best=1),
            _row(part, "perplexity ratio", self.perplexity_ratio, "perplexity", best=1, exact=self.largest),
            _row(part, "largest difference", self.largest, "largest logit"),
        ]


@dataclass(frozen=True)
class Card:
    """A comparison of two builds. `language_model` has the reference's prompts and image features, so that only it
    differs; `whole` has the build's own."""

    model: Build
    reference: Build
    pumice: str
    """The version that compared them."""
    questions: int
    pictures: int
    places: int
    """Tokens of all answers."""
    same_prompts: int
    """Questions that both builds turn into the same ids."""
    pixels: Pixels | None
    """None, as `features`, for a text model."""
    features: Features | None
    language_model: Logits
    whole: Logits

    def rows(self) -> list[Row]:
        """The card line by line, the parts in the order of the flow."""
        eyes = self.pixels.rows(self.pictures) if self.pixels else []
        tower = self.features.rows() if self.features else []
        prompts = _count("prompts", self.same_prompts, self.questions)
        return [prompts, *eyes, *tower, *self.language_model.rows("language model"), *self.whole.rows("whole")]

    @property
    def summary(self) -> str:
        """The whole in one line."""
        whole = self.whole
        return (
            f"against {self.reference.name} ({self.reference.language_model}): KL divergence {whole.kl_mean:.4g}, "
            f"{whole.agreement:.2%} same best tokens at {self.places} places"
        )

    def to_json(self) -> str:
        """One line of ASCII, shorter than CARD_BYTES."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UserError for a text that is no card."""
        try:
            if len(text) > CARD_BYTES:
                raise ValueError(f"it has {len(text)} characters")
            return read_as(cls, json.loads(text), "card")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the card cannot be read: {error}",
                hint="make it again: pumice verify MODEL --against REFERENCE --keep",
            ) from error


@dataclass(frozen=True)
class Bounds:
    """How far from its reference a build may be; None asks for nothing.

    max_kl: the mean KL divergence of the whole, in nats. min_agreement: the share of same best tokens of the whole.
    min_cosine: the least cosine of the image features, which a text model has none of.
    """

    max_kl: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, most = self.__dict__[field.name], math.inf if field.name == "max_kl" else 1
            if value is not None and not 0 <= value <= most:
                raise UserError(f"{field.name} is {value}", hint=f"give a number from 0 {'up' if most > 1 else 'to 1'}")

    def broken(self, card: Card) -> list[str]:
        """Which bounds the card does not meet, in words."""
        found = []
        whole = card.whole
        if self.max_kl is not None and whole.kl_mean > self.max_kl:
            found.append(f"the mean KL divergence is {whole.kl_mean:.4g}, more than {self.max_kl:g}")
        if self.min_agreement is not None and whole.agreement < self.min_agreement:
            found.append(f"the share of same best tokens is {whole.agreement:.4g}, less than {self.min_agreement:g}")
        if self.min_cosine is not None and card.features and card.features.cosine_min < self.min_cosine:
            found.append(f"the least cosine is {card.features.cosine_min:.6g}, less than {self.min_cosine:g}")
        return found


def _row(part: str, figure: str, value: float, steps: str, *, best: float = 0, exact: float | None = None) -> Row:
    """`exact` is 0 when all numbers are equal, where `value` itself may only be rounded to its best."""
    off = abs(value - best)
    if off == 0 and not exact:
        return Row(part, figure, f"{value:g}", WORDS[0])
    # Six digits beyond a leading 0.99999, so that a figure never looks better than it is.
    text = f"{value:.8f}".rstrip("0").rstrip(".") if best else f"{value:.4g}"
    return Row(part, figure, text, WORDS[1 + bisect_left(_STEPS[steps], round(off, 12))])


def _count(part: str, equal: int, total: int) -> Row:
    return Row(part, "equal", f"{equal} of {total}", WORDS[0] if equal == total else WORDS[-1])


def read_as(kind: Any, value: object, name: str) -> Any:
    """A value from outside as what an annotation asks for: a dataclass, a number, a text, or a tuple of one kind.
    Raises ValueError, which names what is different."""
    kind, *others = typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)
    if value is None and type(None) in others:
        return None
    if isinstance(value, dict) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        make: Any = kind
        hints = typing.get_type_hints(kind)
        if value.keys() != hints.keys():
            raise ValueError(f"{name} has the fields {shown(sorted(value))}")
        return make(**{field: read_as(hint, value[field], field) for field, hint in hints.items()})
    if typing.get_origin(kind) is tuple and isinstance(value, list) and value:
        inner, _ = typing.get_args(kind)
        return tuple(read_as(inner, each, name) for each in value)
    if kind is str and isinstance(value, str) and value.isprintable():
        return value
    if kind is int and is_whole(value) and abs(value) < 2**63:
        return value
    if kind is float and is_number(value):
        return float(value)
    raise ValueError(f"{name} is {shown(value)}")
