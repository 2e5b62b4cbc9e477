"""One temperature for a model's label probabilities, from pictures whose labels are known: temperature scaling, Guo et
al. 2017 (arXiv 1706.04599).

N pictures · L labels
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pumice.classification import Labelling
from pumice.errors import UserError, nearest, shortened
from pumice.model import Model
from pumice.tasks.card import read_as

BINS = 15
"""Of the expected calibration error; Guo et al. take so many."""
LEAST, MOST = 1e-3, 1e3
"""Temperatures that are looked at."""
ROUNDS = 60
"""Of the searches: each leaves 0.618 or a half of the interval."""
MAX_FILE_BYTES = 2**24
FIELDS = ("image", "label")
MADE_BY = "pumice classify MODEL --labels ... --calibrate LABELLED.csv --save FILE"


@dataclass(frozen=True)
class Fit:
    """How well probabilities tell how often they are right."""

    nll: float
    """Mean negative log-likelihood of the true label, in nats."""
    ece: float
    """Expected calibration error: by how much the likeliest label's probability and the share of pictures where it is
    the true one differ, on average over 15 bins of equal width (Naeini et al. 2015, Guo et al. 2017)."""

    @classmethod
    def of(cls, scores_NL: Tensor, truth_N: Tensor, temperature: float) -> Self:
        probabilities_NL = (scores_NL.double() / temperature).softmax(-1)
        confidence_N, chosen_N = probabilities_NL.max(-1)
        right_N = (chosen_N == truth_N).double()
        bin_N = (confidence_N * BINS).ceil().clamp(min=1)
        gaps = [(confidence_N - right_N)[bin_N == each].sum().abs() for each in range(1, BINS + 1)]
        return cls(nll(scores_NL, truth_N, temperature), float(sum(gaps)) / len(truth_N))


@dataclass(frozen=True)
class Calibration:
    """A labelling with the temperature that was fitted, and what that changed on the pictures it was fitted to."""

    labelling: Labelling
    model: str
    """The name of the model that it was fitted with, and is good for."""
    pictures: int
    accuracy: float
    """Share of the pictures whose likeliest label is the true one. No temperature changes it."""
    before: Fit
    after: Fit

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a file of that name is replaced. Raises UserError where that cannot be."""
        try:
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}", hint="name another place") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote. Raises UserError for anything else."""
        try:
            found = _exactly(json.loads(_read(Path(path))), cls)
            found["labelling"] = Labelling(**_exactly(found["labelling"], Labelling))
            kinds = {name: kind for name, kind in typing.get_type_hints(cls).items() if kind is not Labelling}
            return cls(**found | {name: read_as(kind, found[name], name) for name, kind in kinds.items()})
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{path} is no calibration: {problem}", hint=f"make one: {MADE_BY}") from problem

    def under(self, given: Mapping[str, Any], model: str) -> Labelling:
        """The labelling, for the model of that name, of which some choices are also given here. Only `abstain_below`
        may be another. Raises UserError for any other that is, and for another model: the temperature would not be good
        for it. Of paths the last names are compared, for a file may lie elsewhere."""
        if Path(model).name != Path(self.model).name:
            raise UserError(
                f"the model is {model}, and the calibration was made with {self.model}",
                hint=f"ask that one, or calibrate anew: {MADE_BY}",
            )
        chosen = dataclasses.replace(self.labelling, **given)
        for name, own in vars(self.labelling).items():
            if name != "abstain_below" and vars(chosen)[name] != own:
                raise UserError(
                    f"{name} is {given[name]!r:.100}, and the calibration was made with {own!r:.100}",
                    hint=f"leave it out, or calibrate anew: {MADE_BY}",
                )
        return dataclasses.replace(self.labelling, abstain_below=chosen.abstain_below)


def _exactly(values: object, kind: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"a {kind.__name__.lower()} has the fields {', '.join(sorted(names))}")
    return values


def calibrate(
    model: Model,
    labelling: Labelling,
    labelled: str | Path,
    *,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Calibration:
    """The labelling with the temperature under which the true labels are likeliest (`fitted`), whatever it had.

    labelled: a CSV file whose first line is `image,label`, or lines of JSON {"image": …, "label": …}; paths are seen
    from the file's folder. told: hears how far it is.

    Raises UserError: the file cannot be read, is empty, names a picture that is not there or a label that the
    labelling does not have; and where the model's scores have nothing to do with the labels.
    """
    examples = list(read_labelled(Path(labelled), labelling.names))
    plain = dataclasses.replace(labelling, temperature=1.0, abstain_below=0.0)
    scores: list[list[float]] = []
    for done, (image, _) in enumerate(examples):
        told("classifying", done, len(examples))
        score_of = {each.label: each.score for each in model.classify(image, plain).scored}
        scores.append([score_of[name] for name in labelling.names])
    scores_NL = torch.tensor(scores, dtype=torch.float64)
    places = {name: place for place, name in enumerate(labelling.names)}
    truth_N = torch.tensor([places[label] for _, label in examples])
    temperature = fitted(scores_NL, truth_N)
    return Calibration(
        labelling=dataclasses.replace(labelling, temperature=temperature),
        model=model.name,
        pictures=len(examples),
        accuracy=float((scores_NL.argmax(-1) == truth_N).double().mean()),
        before=Fit.of(scores_NL, truth_N, 1.0),
        after=Fit.of(scores_NL, truth_N, temperature),
    )


def nll(scores_NL: Tensor, truth_N: Tensor, temperature: float) -> float:
    """Mean negative log-likelihood of the true labels, in nats."""
    return float(torch.nn.functional.cross_entropy(scores_NL.double() / temperature, truth_N))


def fitted(scores_NL: Tensor, truth_N: Tensor) -> float:
    """The temperature with the least `nll`, by golden section over its logarithm: the loss is convex in the inverse
    temperature, so it has one valley.

    Where the best label is the true one in all N pictures there is none: the lower the temperature, the less the loss.
    Then it is the one at which the best label's probability is (N + 1) / (N + 2) on average, which is what N right
    ones of N say about the next (Laplace's rule of succession).

    Raises UserError where the scores have nothing to do with the labels: the higher, the better.
    """
    if bool((scores_NL.argmax(-1) == truth_N).all()):
        return _at_confidence(scores_NL, (len(truth_N) + 1) / (len(truth_N) + 2))
    low, high = math.log(LEAST), math.log(MOST)
    share = (math.sqrt(5) - 1) / 2
    for _ in range(ROUNDS):
        left, right = high - share * (high - low), low + share * (high - low)
        if nll(scores_NL, truth_N, math.exp(left)) < nll(scores_NL, truth_N, math.exp(right)):
            high = right
        else:
            low = left
    temperature = math.exp((low + high) / 2)
    if temperature > MOST / 1.01:
        raise UserError(
            f"no temperature fits: on the {len(truth_N)} pictures the model's scores say nothing about the labels",
            hint="check the labels in the file, or ask in other words: --prompt",
        )
    return temperature


def _at_confidence(scores_NL: Tensor, share: float) -> float:
    """The temperature at which the best label's probability is this on average: the higher, the smaller it is."""
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if float((scores_NL.double() / math.exp(middle)).softmax(-1).amax(-1).mean()) > share:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def read_labelled(path: Path, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Pictures and their labels, which are all in `names`. Raises UserError, with the line, for anything else."""
    known, count = set(names), 0
    for line, image, label in _rows(path):
        where = f"line {line} of {path.name}"
        if label not in known:
            raise UserError(f"{where} has the label {shortened(label)}", hint=nearest(label, names[:100]))
        if not os.path.isfile(path.parent / image):
            raise UserError(
                f"{where} names the picture {shortened(image)}, which is not there",
                hint="give its path as seen from the file's folder",
            )
        count += 1
        yield path.parent / image, label
    if not count:
        raise UserError(f"{path} has no labelled pictures", hint="name at least one: image,label and a line for each")


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """The number of each line, its picture and its label."""
    text = _read(path)
    if text.lstrip().startswith("{"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, *_checked(number, path, _json(line))
        return
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if not set(FIELDS) <= set(rows.fieldnames or ()):
            raise UserError(
                f"{path} begins with {shortened(text.split(chr(10))[0])}",
                hint='give CSV with a first line of "image,label", or lines of JSON {"image": …, "label": …}',
            )
        for row in rows:
            yield rows.line_num, *_checked(rows.line_num, path, row)
    except csv.Error as problem:
        raise UserError(f"{path} is no CSV file: {problem}", hint="write a line for each picture") from problem


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _checked(number: int, path: Path, row: object) -> tuple[str, str]:
    image, label = (row.get(name) for name in FIELDS) if isinstance(row, dict) else (None, None)
    if not isinstance(image, str) or not isinstance(label, str) or not image:
        raise UserError(f"line {number} of {path.name} has no image and label", hint="give both, as text, in each line")
    return image, label.strip()


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} has more than {MAX_FILE_BYTES} bytes", hint="give a smaller file")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="check its name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: it is not UTF-8", hint="save it as UTF-8") from error
