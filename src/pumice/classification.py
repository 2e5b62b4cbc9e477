"""Which of some labels fits a picture: how likely the model is to answer with each, and what is made of that.

A `Labelling` says what is asked and which answers are scored, and turns their log-probabilities into a
`Classification`; `classified` asks a model for them. Sources:
- the answers of a label: verbalisers, Schick and Schuetze 2021 (arXiv 2001.07676);
- the prior: domain conditional PMI, Holtzman et al. 2021 (arXiv 2104.08315), with an input without content in the place
  of their premise, as Zhao et al. 2021 (arXiv 2102.09690) have it, which here is a picture of one colour;
- the temperature: Guo et al. 2017 (arXiv 1706.04599).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pumice.checkpoints.fields import is_number
from pumice.errors import UserError, shortened
from pumice.image import blank, open_image
from pumice.question import Images, Question, listed

if TYPE_CHECKING:
    from pumice.model import Model

MAX_LABELS = 10_000
MAX_CHARACTERS = 2**18
"""Of all answers together."""
NAMED = 20
"""So many labels are named in a question that was not given."""

Labels = Sequence[str] | Mapping[str, str | Sequence[str]]
"""Texts, of which each is scored as it stands and with a capital in front, as answers begin; or what stands for each
label: the one answer, or the several answers, that mean it, scored as they stand."""
Scores = Sequence[Sequence[float]]
"""For each answer the log-probabilities of its tokens."""


def classified(model: Model, image: Images, labelling: Labelling) -> Classification:
    """What a model makes of an image. Raises UserError for what is wrong with the labels, the prompt or the image."""
    started = time.perf_counter()
    pictures = [open_image(each) for each in listed(image)]
    if labelling.prior and not pictures:
        raise UserError("the prior of a question without a picture was asked for", hint="leave prior out")
    found, prior = model.log_likelihoods(labelling.question(pictures), labelling.answers), None
    if labelling.prior:
        empty = [blank(each.size, model.eyes()[0]) for each in pictures]
        prior = model.log_likelihoods(labelling.question(empty), labelling.answers)
    return labelling.classification(found, prior, time.perf_counter() - started)


@dataclass(frozen=True)
class Labelling:
    """What labels there are, how they are asked for, and how their likelihoods become probabilities.

    labels: see `Labels`; kept as a dict of tuples. prompt: what is asked; without it, which of the labels is shown.
    system, image_tokens: as of a `Question`. normalise: what a label's log-likelihood is divided by: nothing, the
    number of its tokens, or that of its bytes in UTF-8. prior: subtract the log-likelihood that the label has where
    the picture is painted over in the mean colour. temperature: scores are divided by it; below 1 the probabilities
    become more extreme. abstain_below: no label is chosen if the best has a smaller probability.

    Raises UserError for labels or settings that cannot be.
    """

    labels: Labels
    prompt: str | None = None
    system: str | None = None
    image_tokens: int | None = None
    normalise: Literal["none", "tokens", "bytes"] = "none"
    prior: bool = False
    temperature: float = 1.0
    abstain_below: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _answers(self.labels))
        if self.normalise not in ("none", "tokens", "bytes"):
            raise UserError(f"normalise is {self.normalise!r:.100}", hint="give none, tokens or bytes")
        if not isinstance(self.prior, bool):
            raise UserError(f"prior is {self.prior!r:.100}", hint="give true or false")
        if not is_number(self.temperature) or self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature!r:.100}", hint="give a number above 0; 1 changes nothing"
            )
        if not is_number(self.abstain_below) or not 0 <= self.abstain_below <= 1:
            raise UserError(
                f"abstain_below is {self.abstain_below!r:.100}",
                hint="give a probability from 0 to 1: below it no label is chosen",
            )

    @classmethod
    def of(cls, labels: Labels | Labelling, prompt: str | None = None) -> Labelling:
        """A labelling as it stands, or one of these labels."""
        if not isinstance(labels, Labelling):
            return cls(labels, prompt)
        if prompt is not None:
            raise UserError(
                f"the prompt {shortened(prompt)} came with a labelling, which has its own",
                hint="give the labelling that prompt: dataclasses.replace(labelling, prompt=...)",
            )
        return labels

    @property
    def names(self) -> list[str]:
        """The labels."""
        return list(self.labels)

    @property
    def answers(self) -> list[str]:
        """All that is scored: the answers of the first label, of the second…"""
        return [answer for answers in self._of_each.values() for answer in answers]

    @property
    def _of_each(self) -> dict[str, tuple[str, ...]]:
        assert isinstance(self.labels, dict)
        return self.labels

    def question(self, image: Images) -> Question:
        """What is asked about an image."""
        return Question(self._asked(), image, self.system, image_tokens=self.image_tokens)

    def _asked(self) -> str:
        if self.prompt is not None:
            return self.prompt
        *others, last = self.names
        if len(others) >= NAMED:
            return "What is shown in this image?"
        return f"What is shown in this image: {', '.join(others)} or {last}?"

    def classification(self, found: Scores, prior: Scores | None, seconds: float) -> Classification:
        """What comes of the log-probabilities of the tokens of `answers`; `prior`: of the same where the picture shows
        nothing.

        Raises UserError for log-probabilities that are no numbers.
        """
        rows: list[Scored] = []
        start = 0
        for name, answers in self._of_each.items():
            here = slice(start, start := start + len(answers))
            rows.append(self._scored(name, answers, found[here], None if prior is None else prior[here]))
        best = max(each.score for each in rows)
        if any(math.isnan(each.score) for each in rows) or not math.isfinite(best):
            raise UserError(
                "the model's scores are no numbers, so no label can be chosen",
                hint="its weights are damaged, or need a wider type: load it with dtype float32",
            )
        exponents = [(each.score - best) / self.temperature for each in rows]  # no larger than 0, and one is 0
        total = _log_sum(exponents)
        rows = [
            dataclasses.replace(each, probability=math.exp(exponent - total)) for each, exponent in zip(rows, exponents)
        ]
        rows.sort(key=lambda each: -each.score)
        chosen = rows[0].label if rows[0].probability >= self.abstain_below else None
        return Classification(tuple(rows), chosen, seconds)

    def _scored(self, name: str, answers: Sequence[str], found: Scores, prior: Scores | None) -> Scored:
        likelihoods = [math.fsum(each) for each in found]
        likelihood = _log_sum(likelihoods)
        empty = None if prior is None else _log_sum([math.fsum(each) for each in prior])
        best = max(range(len(answers)), key=likelihoods.__getitem__)
        tokens = len(found[best])
        length = {"none": 1, "tokens": tokens, "bytes": len(answers[best].encode())}[self.normalise]
        return Scored(name, math.nan, (likelihood - (empty or 0.0)) / length, likelihood, empty, tokens)


@dataclass(frozen=True)
class Scored:
    """One label of a classification."""

    label: str
    probability: float
    """Among the labels: they sum to 1, whatever else the model would rather say."""
    score: float
    """What probabilities are made of: the log-likelihood, less the prior, over the length, as the labelling says."""
    log_likelihood: float
    """Natural logarithm of the probability that the model's answer begins with one of the label's answers."""
    prior: float | None
    """The same where the picture shows nothing."""
    tokens: int
    """Of the likeliest of its answers."""


@dataclass(frozen=True, eq=False)
class Classification(Mapping[str, float]):
    """A mapping from each label to its probability, the likeliest first."""

    scored: tuple[Scored, ...]
    label: str | None
    """The likeliest; None where its probability is below the labelling's `abstain_below`."""
    seconds: float
    """That the likelihoods took."""

    @functools.cached_property
    def _probabilities(self) -> dict[str, float]:
        return {each.label: each.probability for each in self.scored}

    def __getitem__(self, label: str) -> float:
        return self._probabilities[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._probabilities)

    def __len__(self) -> int:
        return len(self.scored)


def _log_sum(logs: Sequence[float]) -> float:
    """The logarithm of the sum of what these are logarithms of."""
    largest = max(logs)
    if not math.isfinite(largest):
        return largest
    return largest + math.log(math.fsum(math.exp(each - largest) for each in logs))


# --- labels from outside ----------------------------------------------------------------------------------------------


def _answers(labels: object) -> dict[str, tuple[str, ...]]:
    """Each label and its answers. Raises UserError for what cannot tell pictures apart."""
    hint = "give at least two texts: ['cat', 'dog']; or the answers that stand for each: {'cat': ['A cat', 'Cat']}"
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence | Mapping):
        raise UserError(f"labels is {labels!r:.100}, and neither a list nor a mapping", hint=hint)
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UserError(f"the number of labels is {len(labels)}; 2 to {MAX_LABELS} are possible", hint=hint)
    found: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    for label in labels:
        _check_text("the label", label)
        if label in found:
            raise UserError(f"the label {shortened(label)} came twice", hint="give each label once")
        found[label] = _given(label, labels[label]) if isinstance(labels, Mapping) else _spellings(label)
        for answer in found[label]:
            if owners.setdefault(answer, label) != label:
                raise UserError(
                    f"the labels {shortened(owners[answer])} and {shortened(label)} have the same answer "
                    f"{shortened(answer)}",
                    hint="give answers by which the labels differ",
                )
    if (characters := sum(map(len, owners))) > MAX_CHARACTERS:
        raise UserError(
            f"the labels' answers have {characters} characters; {MAX_CHARACTERS} are possible",
            hint="give fewer or shorter ones",
        )
    return found


def _spellings(label: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((label, label[0].upper() + label[1:])))


def _given(label: str, answers: object) -> tuple[str, ...]:
    """The answers that were named for a label. One that begins with another is part of it already, and refused."""
    texts = [answers] if isinstance(answers, str) else answers
    if not isinstance(texts, Sequence) or isinstance(texts, bytes) or not texts:
        raise UserError(
            f"the label {shortened(label)} has the answers {answers!r:.100}", hint="give a text, or a list of texts"
        )
    for text in texts:
        _check_text(f"an answer of the label {shortened(label)}", text)
        longer = [each for each in texts if isinstance(each, str) and each.startswith(text)]
        if len(longer) > 1:
            raise UserError(
                f"two answers of the label {shortened(label)} begin with {shortened(text)}",
                hint="give the shorter one alone: how the answer goes on does not matter",
            )
    return tuple(texts)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str) or not text or text != text.strip():
        raise UserError(
            f"{what} is {text!r:.100}: no text, an empty one, or one with white space at an end",
            hint="give texts without white space around them",
        )
