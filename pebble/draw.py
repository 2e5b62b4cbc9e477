"""What pebble is shown: shapes and signs, drawn by number, so that picture 4711 is the same picture everywhere.

A picture is a `Scene`: what is in it (the truth that questions are made from), its pixels, and for the tower's own
training what each patch shows. Needs the fonts of Debian's fonts-dejavu-core and fonts-liberation.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 40, 40), "green": (38, 148, 60), "blue": (40, 84, 214), "yellow": (240, 206, 40),
    "purple": (138, 54, 170), "orange": (242, 128, 28), "black": (24, 24, 24), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COUNTS = ("zero", "one", "two", "three", "four", "five")
GROUNDS = ((255, 255, 255), (228, 228, 228), (206, 226, 240), (236, 224, 204), (214, 236, 214), (186, 186, 196))
"""Pale, so that every colour of a shape stands out but white, which only signs have."""
SHAPE_COLOURS = tuple(name for name in COLOURS if name != "white")

FONTS = Path("/usr/share/fonts/truetype")
TRAINED_FONTS = (
    "dejavu/DejaVuSans-Bold.ttf", "dejavu/DejaVuSans.ttf", "liberation/LiberationSans-Bold.ttf",
    "liberation/LiberationSans-Regular.ttf", "dejavu/DejaVuSansMono-Bold.ttf",
)  # fmt: skip
HELD_OUT_FONT = "dejavu/DejaVuSansCondensed-Bold.ttf"
DARK = ("red", "green", "blue", "purple", "black")

CLASSES = 1 + len(SHAPES) * len(SHAPE_COLOURS) + len(COLOURS) + len(LETTERS)
"""What a patch can show: nothing, a shape of a colour, a sign's board of a colour, a letter."""
MOST_LETTERS, MOST_THINGS = 4, 5
PLACES = MOST_LETTERS + MOST_THINGS
"""A letter's place in its word, or how many things there are of a thing's kind."""
TOTALS = MOST_LETTERS + MOST_THINGS
"""How many letters the word has, or how many things the picture shows."""
UNKNOWN = -100
"""The label of a patch about which nothing is asked; PyTorch's losses pass over it."""
SMOOTH = 2
"""Pictures are drawn this much larger and reduced."""


@dataclass(frozen=True)
class Thing:
    """One shape: where its middle is and how far it reaches, in shares of the picture's edge."""

    shape: str
    colour: str
    x: float
    y: float
    reach: float


@dataclass(frozen=True)
class Sign:
    """A board with a word on it; box in shares of the picture's edge: left, top, right, bottom."""

    word: str
    colour: str
    ink: str
    font: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    ground: tuple[int, int, int]
    things: tuple[Thing, ...] = ()
    sign: Sign | None = None


def scene(index: int, *, split: str = "train", kind: str | None = None) -> Scene:
    """The scene of a number. `split` is `train` or `test`: test scenes have words and a font of their own."""
    dice = random.Random(f"pebble-{split}-{index}")
    kind = kind or dice.choice(("shapes", "sign"))
    ground = dice.choice(GROUNDS)
    if kind == "sign":
        return Scene(ground, sign=_sign(dice, split))
    return Scene(ground, things=_things(dice))


def _things(dice: random.Random) -> tuple[Thing, ...]:
    """One to five shapes that do not touch: all alike, or of two kinds."""
    kinds = [(dice.choice(SHAPES), dice.choice(SHAPE_COLOURS))]
    total = dice.randint(1, 5)
    if total > 1 and dice.random() < 0.4:
        other = (dice.choice(SHAPES), dice.choice(SHAPE_COLOURS))
        kinds += [other] if other != kinds[0] else []
    placed: list[Thing] = []
    reach = dice.uniform(0.1, 0.3 if total == 1 else 0.19 if total < 4 else 0.15)
    while len(placed) < total:
        for _ in range(60):
            x, y = dice.uniform(reach, 1 - reach), dice.uniform(reach, 1 - reach)
            if all(math.hypot(x - each.x, y - each.y) > 2.1 * reach for each in placed):
                placed.append(Thing(*kinds[len(placed) % len(kinds)], x, y, reach))
                break
        else:
            placed, reach = [], reach * 0.85
    return tuple(placed)


def _sign(dice: random.Random, split: str) -> Sign:
    colour = dice.choice(tuple(COLOURS))
    ink = dice.choice(("white", "yellow")) if colour in DARK else "black"
    font = HELD_OUT_FONT if split == "test" and dice.random() < 0.3 else dice.choice(TRAINED_FONTS)
    width, height = dice.uniform(0.72, 0.94), dice.uniform(0.34, 0.6)
    left, top = dice.uniform(0.02, 0.98 - width), dice.uniform(0.04, 0.92 - height)
    return Sign(_word(dice, split), colour, ink, font, (left, top, left + width, top + height))


SIGN_WORDS = (
    "STOP",
    "OPEN",
    "EXIT",
    "TAXI",
    "CAFE",
    "SLOW",
    "HELP",
    "SALE",
    "FREE",
    "PARK",
    "PUSH",
    "PULL",
    "GO",
    "BUS",
    "BAR",
    "WC",
)


@functools.cache
def words(held_out: bool) -> tuple[str, ...]:
    """Words of three and four letters, capitals; one in eight is held out, but none of SIGN_WORDS. Needs Debian's
    wamerican."""
    lines = Path("/usr/share/dict/american-english").read_text(encoding="utf-8").split()
    fit = sorted(
        {line.upper() for line in lines if line.isalpha() and line.isascii() and line.islower() and 3 <= len(line) <= 4}
    )
    apart = {word for word in fit if random.Random(word).random() < 0.125}.difference(SIGN_WORDS)
    return tuple(word for word in fit if (word in apart) == held_out)


def _word(dice: random.Random, split: str) -> str:
    if split == "test":
        return dice.choice(words(True))
    luck = dice.random()
    if luck < 0.25:
        return dice.choice(SIGN_WORDS)
    if luck < 0.6:
        return dice.choice(words(False))
    while (letters := "".join(dice.choice(LETTERS) for _ in range(dice.randint(2, 4)))) in words(True):
        pass
    return letters


def paint(scene: Scene, edge_px: int) -> Image.Image:
    """The picture of a scene, square, RGB."""
    return _painted(scene, edge_px)[0]


def patches(scene: Scene, edge_px: int, patch_px: int) -> tuple[Image.Image, np.ndarray]:
    """The picture, and what covers the middle of each patch: (rows, columns, 3), a class of
    CLASSES, PLACES and TOTALS."""
    picture, boxes = _painted(scene, edge_px)
    side = edge_px // patch_px
    labels = np.full((side, side, 3), UNKNOWN)
    labels[..., 0] = 0
    for box in boxes:
        # The patches whose middle lies inside: middle = (place + 0.5) * patch_px.
        across, down = (
            slice(max(0, math.ceil(low / patch_px - 0.5)), max(0, math.floor(high / patch_px - 0.5) + 1))
            for low, high in ((box.left, box.right), (box.top, box.bottom))
        )
        labels[down, across] = box.label
    return picture, labels


@dataclass(frozen=True)
class Box:
    """Where something is, in pixels, and its label: a class of CLASSES, PLACES and TOTALS."""

    left: float
    top: float
    right: float
    bottom: float
    label: tuple[int, int, int]


def _painted(scene: Scene, edge_px: int) -> tuple[Image.Image, list[Box]]:
    large = edge_px * SMOOTH
    picture = Image.new("RGB", (large, large), scene.ground)
    pen = ImageDraw.Draw(picture)
    boxes: list[Box] = []
    alike = Counter((thing.shape, thing.colour) for thing in scene.things)
    for thing in scene.things:
        _shape(pen, thing, large, scene.ground)
        x, y, reach = thing.x * edge_px, thing.y * edge_px, thing.reach * edge_px * 0.9
        kind = 1 + SHAPES.index(thing.shape) * len(SHAPE_COLOURS) + SHAPE_COLOURS.index(thing.colour)
        label = (kind, MOST_LETTERS - 1 + alike[thing.shape, thing.colour], MOST_LETTERS - 1 + len(scene.things))
        boxes.append(Box(x - reach, y - reach, x + reach, y + reach, label))
    if scene.sign is not None:
        boxes += _board(pen, scene.sign, large)
    return picture.reduce(SMOOTH), boxes


def _shape(pen: ImageDraw.ImageDraw, thing: Thing, edge: int, ground: tuple[int, int, int]) -> None:
    x, y, r, ink = thing.x * edge, thing.y * edge, thing.reach * edge, COLOURS[thing.colour]

    def corners(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
        turns = [2 * math.pi * k / count - math.pi / 2 for k in range(count)]
        return [
            (x + radii[k % len(radii)] * math.cos(a), y + radii[k % len(radii)] * math.sin(a))
            for k, a in enumerate(turns)
        ]

    match thing.shape:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        case "square":
            s = r * 0.85
            pen.rectangle((x - s, y - s, x + s, y + s), fill=ink)
        case "triangle":
            pen.polygon(corners(3, (r,)), fill=ink)
        case "star":
            pen.polygon(corners(10, (r, r * 0.42)), fill=ink)
        case "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=ink)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=ink)
        case "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
            pen.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=ground)


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / name), size)


def _board(pen: ImageDraw.ImageDraw, sign: Sign, edge: int) -> list[Box]:
    """The board, and its letters as large as fit; boxes of the board and of each letter, in pixels of the
    reduced picture."""
    left, top, right, bottom = (share * edge for share in sign.box)
    pen.rounded_rectangle(
        (left, top, right, bottom), radius=edge // 24, fill=COLOURS[sign.colour], outline=(60, 60, 60), width=SMOOTH
    )
    size = int(min((bottom - top) * 0.8, 0.5 * edge))
    while _font(sign.font, size).getlength(sign.word) > (right - left) * 0.9:
        size = int(size * 0.94)
    font = _font(sign.font, size)
    x = (left + right - font.getlength(sign.word)) / 2
    middle = (top + bottom) / 2
    board = 1 + len(SHAPES) * len(SHAPE_COLOURS) + list(COLOURS).index(sign.colour)
    boxes = [Box(left / SMOOTH, top / SMOOTH, right / SMOOTH, bottom / SMOOTH, (board, UNKNOWN, UNKNOWN))]
    low, high = (middle - size * 0.42) / SMOOTH, (middle + size * 0.42) / SMOOTH
    for place, letter in enumerate(sign.word):
        width = font.getlength(letter)
        pen.text((x, middle), letter, font=font, fill=COLOURS[sign.ink], anchor="lm")
        label = (CLASSES - len(LETTERS) + LETTERS.index(letter), place, len(sign.word) - 1)
        boxes.append(Box(x / SMOOTH, low, (x + width) / SMOOTH, high, label))
        x += width
    return boxes
