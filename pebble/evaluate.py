"""How often pebble is right, on pictures it never saw: greedy, exact match.

    python pebble/evaluate.py [--pictures 400] [--models pebble pebble:1.5] [--write]

Prints a table with 95 % Wilson intervals, and what always giving the commonest answer would score; --write puts it
into pebble/README.md between its marks. Test pictures have numbers of their own; words on their signs are held out, and
three in ten are set in a font that training has not.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from pathlib import Path

from draw import SIGN_WORDS, Scene, Sign, paint, scene
from shape import TILE_PX
from talk import Turn, turns

import pumice
from pumice import Question, Sampling

README = Path(__file__).resolve().parent / "README.md"
MARKS = ("<!-- table: evaluate.py -->", "<!-- end of table -->")
EDGE_PX = 4 * TILE_PX
"""Test pictures are larger than any view, so that the form at hand does its own resizing, as with a photo."""


def asked(pictures: int) -> list[tuple[Scene, Turn]]:
    """One question of each kind about each test picture, and signs with words that were in training."""
    found = []
    for index in range(pictures):
        shown = scene(index, split="test")
        kinds: dict[str, Turn] = {}
        for turn in turns(shown, random.Random(f"test-{index}")):
            kinds.setdefault(_named(turn, shown), turn)
        found += [(shown, Turn(name, turn.question, turn.answer)) for name, turn in kinds.items()]
    for index in range(pictures // 2):
        found.append(_known_word(index))
    return found


def _named(turn: Turn, shown: Scene) -> str:
    """The task's row in the table: tasks that differ in what must be seen are counted apart."""
    match turn.task:
        case "describe":
            return "describe a sign" if shown.sign else "describe shapes"
        case "word":
            return "word, held out"
        case "choice":
            return "a shape or a sign?" if shown.sign else "which of three shapes?"
        case "yes-no":
            return "is there a sign?" if turn.question == "Is there a sign?" else "is there a red circle?"
    return turn.task


def _known_word(index: int) -> tuple[Scene, Turn]:
    dice = random.Random(f"known-{index}")
    shown = scene(index, split="test", kind="sign")
    assert shown.sign is not None
    sign = Sign(dice.choice(SIGN_WORDS), shown.sign.colour, shown.sign.ink, shown.sign.font, shown.sign.box)
    return Scene(shown.ground, sign=sign), Turn("word, one of the 16 sign words", "What does the sign say?", sign.word)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, right / total
    middle, spread = share + z * z / (2 * total), z * ((share * (1 - share) + z * z / (4 * total)) / total) ** 0.5
    return (middle - spread) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)


def commonest(cases: list[tuple[Scene, Turn]], task: str) -> float:
    """What one is right with who always gives the answer that is right most often: no look at a picture needed."""
    answers = Counter(turn.answer for _, turn in cases if turn.task == task)
    return max(answers.values()) / answers.total()


def scores(name: str, cases: list[tuple[Scene, Turn]], image_tokens: int | None = None) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each task."""
    model, sampling = pumice.load(name), Sampling(max_tokens=32)
    questions = [
        Question(turn.question, paint(shown, EDGE_PX), sampling=sampling, image_tokens=image_tokens)
        for shown, turn in cases
    ]
    counted: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (_, turn), answer in zip(cases, model.ask_all(questions)):
        counted[turn.task][0] += answer.text == turn.answer
        counted[turn.task][1] += 1
    return {task: (right, total) for task, (right, total) in counted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--models", nargs="+", default=["pebble", "pebble:1.5"])
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    cases = asked(chosen.pictures)
    found = [scores(name, cases) for name in chosen.models]
    lines = [f"| task | {' | '.join(chosen.models)} | n | commonest |", "|---|" + "---|" * (len(chosen.models) + 2)]
    for task in sorted(found[0]):
        cells = []
        for each in found:
            low, high = wilson(*each[task])
            cells.append(f"{each[task][0] / each[task][1]:.2f} ({low:.2f}-{high:.2f})")
        lines.append(f"| {task} | {' | '.join(cells)} | {found[0][task][1]} | {commonest(cases, task):.2f} |")
    table = "\n".join(lines)
    print(table)
    if chosen.write:
        text = README.read_text(encoding="utf-8")
        start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
        README.write_text(f"{text[:start]}\n{table}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
