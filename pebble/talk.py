"""What pebble is asked: questions about a scene, each with the one answer that is true of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from draw import COUNTS, SHAPE_COLOURS, SHAPES, Scene, Sign, Thing


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the task it counts for in the evaluation."""

    task: str
    question: str
    answer: str


def turns(scene: Scene, dice: random.Random) -> list[Turn]:
    """All that is asked about a scene, in a random order."""
    found = _about_sign(scene.sign, dice) if scene.sign is not None else _about_things(scene.things, dice)
    found.append(Turn("describe", dice.choice(DESCRIBE), describe(scene)))
    dice.shuffle(found)
    return found


DESCRIBE = ("Describe the picture.", "Describe the image.", "What is shown in this image?", "What do you see?")
SAYS = ("What does the sign say?", "Read the sign.", "What is written on the sign?", "Which word is on the sign?")


def describe(scene: Scene) -> str:
    """One true sentence about the whole picture."""
    if scene.sign is not None:
        article = "An" if scene.sign.colour == "orange" else "A"
        return f"{article} {scene.sign.colour} sign that says {scene.sign.word}."
    groups = Counter((thing.colour, thing.shape) for thing in scene.things)
    said = [f"{COUNTS[count]} {colour} {plural(shape, count)}" for (colour, shape), count in sorted(groups.items())]
    return f"{' and '.join(said).capitalize()}."


def plural(shape: str, count: int) -> str:
    """`cross` has its own plural; the others take an s."""
    return shape if count == 1 else shape + ("es" if shape == "cross" else "s")


def _about_sign(sign: Sign, dice: random.Random) -> list[Turn]:
    return [
        Turn("word", dice.choice(SAYS), f"{sign.word}"),
        Turn(
            "colour",
            dice.choice(("What colour is the sign?", "Which colour does the sign have?")),
            f"{sign.colour.capitalize()}.",
        ),
        _choice("choice", ["sign", dice.choice(SHAPES)], "sign", dice),
        Turn("yes-no", "Is there a sign?", "Yes."),
    ]


def _about_things(things: tuple[Thing, ...], dice: random.Random) -> list[Turn]:
    shapes, colours = {thing.shape for thing in things}, {thing.colour for thing in things}
    found = [
        Turn(
            "count",
            dice.choice(("How many shapes are there?", "How many shapes do you see?", "Count the shapes.")),
            f"{COUNTS[len(things)].capitalize()}.",
        )
    ]
    if len(shapes) == 1:
        (shape,) = shapes
        found.append(
            Turn(
                "shape",
                dice.choice(("What shape is it?", "Which shape is shown?", "Name the shape.")),
                f"{shape.capitalize()}.",
            )
        )
        found.append(
            _choice("choice", [shape, *dice.sample([each for each in SHAPES if each != shape], 2)], shape, dice)
        )
    if len(colours) == 1:
        (colour,) = colours
        found.append(
            Turn(
                "colour",
                dice.choice(("What colour is it?", "Which colour is the shape?", "Name the colour.")),
                f"{colour.capitalize()}.",
            )
        )
    wanted = dice.choice(things) if dice.random() < 0.5 else None
    colour, shape = (wanted.colour, wanted.shape) if wanted else (dice.choice(SHAPE_COLOURS), dice.choice(SHAPES))
    there = any((thing.colour, thing.shape) == (colour, shape) for thing in things)
    found.append(Turn("yes-no", f"Is there a {colour} {shape}?", "Yes." if there else "No."))
    if len(shapes) == 2:
        shape = dice.choice(sorted(shapes))
        count = sum(thing.shape == shape for thing in things)
        found.append(Turn("count", f"How many {plural(shape, 2)} are there?", f"{COUNTS[count].capitalize()}."))
    if dice.random() < 0.15:
        found.append(Turn("yes-no", "Is there a sign?", "No."))
    return found


def _choice(task: str, options: list[str], answer: str, dice: random.Random) -> Turn:
    dice.shuffle(options)
    listed = ", ".join(f"a {each}" for each in options[:-1]) + f" or a {options[-1]}"
    return Turn(task, f"Is it {listed}?", f"{answer.capitalize()}.")
