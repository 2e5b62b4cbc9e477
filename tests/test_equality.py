"""pumice gives what Transformers gives: the same pixels, counts, logits and greedy tokens, alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import pumice
import tiny
from pumice import Question, Sampling
from pumice.network import llava

SIZES = [(1, 1000), (1000, 1), (50, 50), (28, 56), (84, 28), (100, 200), (333, 97), (1920, 1080)]
"""(width, height): strips, ties between canvases, canvases themselves, both orientations, a screen."""
CASES = [(family, lm) for family in ("1.5", "1.6") for lm in tiny.LANGUAGE_MODELS]
QUESTIONS = ["What is shown in this image?", "How many colours?", "Describe the sign briefly, and say what it says."]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colour with noise on it, so that resizing and cropping show."""
    width, height = size
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    wave = 127 + 90 * np.sin(x / 17 + seed)[..., None] * np.cos(y[..., None] / 11 + np.arange(3))
    return Image.fromarray(np.clip(wave + random.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8))


class Pair:
    """One checkpoint in both systems."""

    def __init__(self, folder: Path, lm: str) -> None:
        self.kind = tiny.LANGUAGE_MODELS[lm]
        self.processor = AutoProcessor.from_pretrained(folder)
        self.oracle = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model = pumice.load(folder)

    def inputs(self, images: list[Image.Image], text: str) -> dict[str, torch.Tensor]:
        prompt = self.kind.prompt(len(images), text)
        return dict(self.processor(images=images or None, text=prompt, return_tensors="pt"))

    def oracle_tokens(self, inputs: dict[str, torch.Tensor], tokens: int) -> list[int]:
        with torch.inference_mode():
            made = self.oracle.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return made[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, lm = request.param
    folder = tmp_path_factory.mktemp("equal") / f"{family}-{lm}"
    return Pair(tiny.hf_folder(folder, family=family, lm=lm, seed=len(family) + len(lm)), lm)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_one_image(pair: Pair, size: tuple[int, int]) -> None:
    image, text = picture(size, 3), QUESTIONS[0]
    theirs = pair.inputs([image], text)
    question = Question(pair.kind.prompt(1, text), image, raw=True)
    seen = pair.model.see(question)

    pixels = theirs["pixel_values"][0] if theirs["pixel_values"].dim() == 5 else theirs["pixel_values"]
    assert seen.images[0].pixels.shape == pixels.shape
    assert np.array_equal(seen.images[0].pixels, pixels.numpy()), "pixels are not bit-equal"
    assert seen.encoded.ids == theirs["input_ids"][0].tolist()

    network = pair.model.network
    with torch.inference_mode():
        features = network.encode(torch.from_numpy(seen.images[0].pixels), [seen.images[0].grid])
        ours = network.logits(network(network.embed(torch.tensor([seen.encoded.ids]), features)))
        assert close(ours, pair.oracle(**theirs).logits)

    expected = pair.oracle_tokens(theirs, 48)
    answer = pair.model.answer(Question(question.prompt, image, sampling=Sampling(max_tokens=48), raw=True))
    assert list(answer.tokens) == expected
    assert list(llava.generate(network, seen.encoded.ids, features, 12)) == expected[:12]


def test_a_batch_of_seven_gives_each_row_its_own_answer(pair: Pair) -> None:
    sampling = Sampling(max_tokens=48)
    cases = [([picture(size, seed)], QUESTIONS[seed % 3]) for seed, size in enumerate(SIZES[2:7])]
    cases += [([], QUESTIONS[1]), ([picture((60, 45), 8), picture((31, 77), 9)], QUESTIONS[2])]
    questions = [
        Question(pair.kind.prompt(len(images), text), images, sampling=sampling, raw=True) for images, text in cases
    ]
    answers = pair.model.ask_all(questions)
    for (images, text), answer in zip(cases, answers):
        assert list(answer.tokens) == pair.oracle_tokens(pair.inputs(images, text), 48)


def test_generate_takes_ids(pair: Pair) -> None:
    image = picture((45, 60), 5)
    inputs = pair.inputs([image], QUESTIONS[1])
    ours = pair.model.generate(inputs["input_ids"][0].tolist(), image, sampling=Sampling(max_tokens=20))
    assert ours == pair.oracle_tokens(inputs, 20)


@pytest.mark.parametrize("size", [(1, 1000), (50, 50), (640, 480)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_tiles_of_336_pixels(family: str, size: tuple[int, int], tmp_path: Path) -> None:
    pair = Pair(tiny.hf_folder(tmp_path / "m", family=family, lm="vicuna", tile_px=336), "vicuna")
    image = picture(size, 1)
    inputs = pair.inputs([image], QUESTIONS[0])
    question = Question(pair.kind.prompt(1, QUESTIONS[0]), image, sampling=Sampling(max_tokens=4), raw=True)
    assert list(pair.model.answer(question).tokens) == pair.oracle_tokens(inputs, 4)
