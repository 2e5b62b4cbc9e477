"""How often labels are right, and how far their probabilities can be trusted, on pictures that pebble/ draws.

    python bench/classify.py [--models pebble:1.5] [--pictures 300] [--threads 2] [--write]

Prints two tables; --write puts them into docs/classify.md between their marks. Each picture is asked about once, and
once more painted over in one colour; what the choices make of that is computed. A third of the pictures are those that
the temperature is fitted to, the others those that all figures are of.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import pumice
from pumice import Labelling, UserError
from pumice.classification import Scores
from pumice.image import blank
from pumice.model import Model, use_threads
from pumice.tasks.calibration import Fit, fitted

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "classify.md"
END = "<!-- end of table -->"
sys.path.insert(0, str(ROOT / "pebble"))

from draw import COUNTS, SHAPE_COLOURS, SHAPES, SIGN_WORDS, Scene, Thing, paint, scene, words  # noqa: E402
from evaluate import EDGE_PX, wilson  # noqa: E402

UNKNOWN_WORDS = 12
"""Of the words that training held out."""
CHOICES = {
    "as it is": {},
    "a token": {"normalise": "tokens"},
    "a byte": {"normalise": "bytes"},
    "less the prior": {"prior": True},
    "less the prior, a token": {"prior": True, "normalise": "tokens"},
}
TRUSTED = ("as it is", "a token", "less the prior")
"""Those whose temperature is shown."""


@dataclass(frozen=True)
class Task:
    """Pictures that one labelling is for, each with its true label."""

    name: str
    labelling: Labelling
    pictures: list[tuple[Scene, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pebble:1.5"])
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    right, trust = [], []
    for name in chosen.models:
        model = pumice.load(name, dtype="float32")
        for task in tasks(chosen.pictures):
            scores = {choice: torch.tensor(each) for choice, each in by_choice(model, task).items()}
            truth_N = torch.tensor([task.labelling.names.index(label) for _, label in task.pictures])
            right.append([name, *accuracy(task, scores, truth_N)])
            trust += [[name, *calibrated(task.name, choice, scores[choice], truth_N)] for choice in TRUSTED]
            print(name, task.name, file=sys.stderr)
    fitted_to = chosen.pictures // 3
    shown = {
        "right": [
            f"Shares of right labels, {chosen.pictures - fitted_to} pictures a task.",
            "",
            *_table(["model", "task", "labels", *CHOICES, "95 % of the first"], right),
        ],
        "trust": [
            f"The same pictures; the temperature fitted to {fitted_to} others.",
            "",
            *_table(["model", "task", "score", "temperature", "NLL before", "after", "ECE before", "after"], trust),
        ],
    }
    for part, lines in shown.items():
        print("\n".join(lines), end="\n\n")
        if chosen.write:
            before, mark, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- table: {part} -->\n")
            PAGE.write_text(f"{before}{mark}{chr(10).join(lines)}\n{rest[rest.index(END) :]}", encoding="utf-8")


def tasks(pictures: int) -> Iterator[Task]:
    shapes = list(_alike("shape", pictures))
    yield Task("shape, no prompt given", Labelling(SHAPES), shapes)
    colours = list(_alike("colour", pictures))
    yield Task("colour", Labelling(SHAPE_COLOURS, "What colour is it?"), colours)
    counted = [(each, COUNTS[len(each.things)]) for each in _scenes("shapes", pictures)]
    yield Task("count", Labelling(COUNTS[1:], "How many shapes are there?"), counted)
    yield Task("is it a red circle?", Labelling(["yes", "no"], "Is there a red circle?"), list(_red_circles(pictures)))
    for name, known in (("word, one of the 16", SIGN_WORDS), ("word, held out", _unknown_words())):
        yield Task(name, Labelling(known, "What does the sign say?"), list(_signs(known, pictures)))


def _scenes(kind: str, pictures: int) -> Iterator[Scene]:
    yield from (scene(number, split="test", kind=kind) for number in range(pictures))


def _alike(field: str, pictures: int) -> Iterator[tuple[Scene, str]]:
    """Scenes whose things all have the same shape or colour."""
    number = 0
    while pictures:
        shown = scene(number, split="test", kind="shapes")
        values = {vars(thing)[field] for thing in shown.things}
        if len(values) == 1:
            pictures -= 1
            yield shown, values.pop()
        number += 1


def _red_circles(pictures: int) -> Iterator[tuple[Scene, str]]:
    """One thing, every second time a red circle; else it is another thing."""
    for number, shown in enumerate(_scenes("shapes", pictures)):
        first = shown.things[0]
        there = number % 2 == 0
        other = first if (first.shape, first.colour) != ("circle", "red") else replace(first, colour="blue")
        thing = Thing("circle", "red", first.x, first.y, first.reach) if there else other
        yield Scene(shown.ground, (thing,)), "yes" if there else "no"


def _unknown_words() -> list[str]:
    return random.Random("bench-classify").sample(words(True), UNKNOWN_WORDS)


def _signs(known: Sequence[str], pictures: int) -> Iterator[tuple[Scene, str]]:
    for number, shown in enumerate(_scenes("sign", pictures)):
        assert shown.sign is not None
        word = random.Random(f"word-{number}").choice(list(known))
        yield Scene(shown.ground, sign=replace(shown.sign, word=word)), word


def by_choice(model: Model, task: Task) -> dict[str, list[list[float]]]:
    """For each choice the scores of each picture's labels, in the order of the labels."""
    picture = Image.new("RGB", (EDGE_PX, EDGE_PX))
    prior = _likelihoods(model, task, blank(picture, model.eyes()[0]))  # of all pictures: they have one size
    found: dict[str, list[list[float]]] = {name: [] for name in CHOICES}
    for shown, _ in task.pictures:
        likelihoods = _likelihoods(model, task, paint(shown, EDGE_PX))
        for name, choice in CHOICES.items():
            labelling = replace(task.labelling, **choice)
            made = labelling.classification(likelihoods, prior if labelling.prior else None, 0.0)
            score = {each.label: each.score for each in made.scored}
            found[name].append([score[label] for label in labelling.names])
    return found


def _likelihoods(model: Model, task: Task, picture: Image.Image) -> Scores:
    return model.log_likelihoods(task.labelling.question(picture), task.labelling.answers)


def accuracy(task: Task, scores: dict[str, torch.Tensor], truth_N: torch.Tensor) -> list[str]:
    """Shares of right labels, of the pictures that no temperature is fitted to."""
    start = len(truth_N) // 3
    right = [int((each[start:].argmax(-1) == truth_N[start:]).sum()) for each in scores.values()]
    total = len(truth_N) - start
    low, high = wilson(right[0], total)
    shares = [f"{each / total:.2f}" for each in right]
    return [task.name, f"{len(task.labelling.names)}", *shares, f"{low:.2f}-{high:.2f}"]


def calibrated(task: str, name: str, scores_NL: torch.Tensor, truth_N: torch.Tensor) -> list[str]:
    """What a temperature changes, on pictures that it was not fitted to."""
    start = len(truth_N) // 3
    before = Fit.of(scores_NL[start:], truth_N[start:], 1.0)
    try:
        temperature = fitted(scores_NL[:start], truth_N[:start])
    except UserError:
        return [task, name, "none fits", f"{before.nll:.3f}", "", f"{before.ece:.3f}", ""]
    after = Fit.of(scores_NL[start:], truth_N[start:], temperature)
    figures = [before.nll, after.nll, before.ece, after.ece]
    return [task, name, f"{temperature:.2f}", *(f"{each:.3f}" for each in figures)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
