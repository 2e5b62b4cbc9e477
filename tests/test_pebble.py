"""The bundled model: what it says of fresh pictures, who else can load it, and that its questions are true."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import pumice
from pumice import Question, Sampling
from pumice.model import Model

ROOT = Path(__file__).resolve().parent.parent
FORMS = ["pebble", "pebble:1.5"]


@pytest.fixture(scope="module")
def drawing() -> Path:
    """pebble/'s own modules, where the fonts and the word list that they need are installed."""
    fonts, words = Path("/usr/share/fonts/truetype/liberation"), Path("/usr/share/dict/american-english")
    if not (fonts.is_dir() and words.exists()):
        pytest.skip("drawing needs fonts-liberation, fonts-dejavu-core and wamerican")
    sys.path.insert(0, str(ROOT / "pebble"))
    return ROOT / "pebble"


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest) -> Model:
    return pumice.load(request.param)


def disc(colour: str) -> Image.Image:
    picture = Image.new("RGB", (300, 300), (236, 224, 204))
    ImageDraw.Draw(picture).ellipse((70, 60, 230, 220), fill=colour)
    return picture


@pytest.mark.parametrize(
    "colour", [("Red.", "#d62828"), ("Blue.", "#2854d6"), ("Green.", "#26943c")], ids=lambda each: each[0]
)
def test_it_names_colours_it_sees(model: Model, colour: tuple[str, str]) -> None:
    assert model.ask("What colour is it?", disc(colour[1])).text == colour[0]


def test_it_looks_at_the_picture(model: Model) -> None:
    asked = [Question("Describe the picture.", disc(each)) for each in ("#d62828", "#2854d6")]
    first, second = model.ask_all(asked)
    assert first.text != second.text


@pytest.mark.parametrize("name", FORMS)
def test_transformers_gives_the_same_answer(name: str) -> None:
    """The bundled folders are ordinary checkpoints: the oracle reads them and agrees, token by token."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from pumice import store

    folder = store.resolve(name)
    oracle = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    model = pumice.load(name, dtype="float32")
    picture = disc("#d62828")
    text = "<|im_start|>user\n<image>\nWhat colour is it?<|im_end|><|im_start|>assistant\n"
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    made = oracle.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    ours = model.answer(Question(text, picture, sampling=Sampling(max_tokens=12), raw=True))
    assert list(ours.tokens) == made


def test_size() -> None:
    for folder in (ROOT / "src" / "pumice" / "pebble").iterdir():
        assert sum(each.stat().st_size for each in folder.iterdir()) < 12.5e6


def test_scenes_are_the_same_for_the_same_number(drawing: Path) -> None:
    from draw import paint, scene, words

    assert [scene(index) for index in range(30)] == [scene(index) for index in range(30)]
    assert paint(scene(7), 96).tobytes() == paint(scene(7), 96).tobytes()
    assert not set(words(True)) & set(words(False))
    assert scene(3) != scene(3, split="test")


def test_answers_are_true_of_the_picture(drawing: Path) -> None:
    """Counted again from the pixels: the named colour is what most painted pixels have."""
    from draw import COLOURS, paint, scene
    from talk import turns

    for index in range(40):
        shown = scene(index, kind="shapes")
        picture = paint(shown, 192)
        said = {turn.task: turn for turn in turns(shown, random.Random(index))}
        if "colour" in said:
            name = said["colour"].answer.rstrip(".").lower()
            painted = [pixel for _, pixel in picture.getcolors(192**2) or [] if pixel == COLOURS[name]]
            assert painted, (index, name)
        total = next((turn for turn in turns(shown, random.Random(index)) if "shapes" in turn.question), None)
        assert total is not None


def test_no_training_sign_shows_a_held_out_word(drawing: Path) -> None:
    from draw import scene, words

    held_out = set(words(True))
    shown = (scene(index, kind="sign").sign for index in range(4000))
    assert not held_out & {sign.word for sign in shown if sign is not None}


def test_patch_labels_lie_on_what_they_name(drawing: Path) -> None:
    """Each thing's own patch is labelled as that thing, and where a square is named, the pixels show it."""
    from draw import COLOURS, SHAPE_COLOURS, SHAPES, UNKNOWN, patches, scene

    shows = []
    for index in range(40):
        shown = scene(index, kind="shapes")
        picture, labels = patches(shown, 96, 12)
        for thing in shown.things:
            kind = 1 + SHAPES.index(thing.shape) * len(SHAPE_COLOURS) + SHAPE_COLOURS.index(thing.colour)
            assert labels[int(thing.y * 8), int(thing.x * 8), 0] == kind
        for row, column in np.argwhere(labels[..., 0] > 0):
            shape, colour = divmod(int(labels[row, column, 0]) - 1, len(SHAPE_COLOURS))
            assert labels[row, column, 2] == 3 + len(shown.things)
            if SHAPES[shape] == "square":
                middle = picture.getpixel((12 * int(column) + 6, 12 * int(row) + 6))
                shows.append(middle == COLOURS[SHAPE_COLOURS[colour]])
        assert (labels[..., 1:][labels[..., 0] == 0] == UNKNOWN).all()
    assert len(shows) > 20
    assert sum(shows) > 0.85 * len(shows), "the rest are the softened edge"


def test_letters_are_labelled_from_left_to_right(drawing: Path) -> None:
    from draw import CLASSES, LETTERS, patches, scene

    for index in range(20):
        shown = scene(index, kind="sign")
        assert shown.sign is not None
        _, labels = patches(shown, 192, 12)
        kind, place, total = labels[labels[..., 0] >= CLASSES - len(LETTERS)].T
        read = {int(at): LETTERS[int(letter) - CLASSES + len(LETTERS)] for letter, at in zip(kind, place)}
        assert "".join(read[at] for at in sorted(read)) == shown.sign.word
        assert (total == len(shown.sign.word) - 1).all()
