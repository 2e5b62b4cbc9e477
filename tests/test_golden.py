"""The tiny models of the reference results: what Transformers and the authors' code gave, pumice gives."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pumice
from conftest import GOLDEN_MODELS, REFERENCE, reference
from pumice import Question, Sampling
from pumice.model import Model

ORIGINALS = ["llava-v1.5-tiny", "llava-v1.6-vicuna-tiny", "llava-v1.6-mistral-tiny"]
LOGITS = 1e-3
"""The references' own tolerance for logits in float32, absolute (they agree within 2e-5)."""


@cache
def golden() -> dict[str, Any]:
    return json.loads((reference("golden") / "generate.json").read_text(encoding="utf-8"))


def entry(name: str) -> dict[str, Any]:
    return next(each for each in golden()["models"] if each["name"] == name)


def drawn(spec: dict[str, Any]) -> Image.Image:
    """A picture by the formulas of pixels.json."""
    width, height, k = spec["w"], spec["h"], spec["k"]
    y, x = np.mgrid[0:height, 0:width].astype(np.uint64)
    match spec["kind"]:
        case "ramp":
            planes = [7 * x + 3 * y + k, 5 * x + 11 * y + 2 * k, 13 * x + 2 * y + (x * y) % 17 + 3 * k]
            planes = [plane % 256 for plane in planes]
        case "noise":
            mask = np.uint64(0xFFFFFFFF)
            v = (x * 73856093) ^ (y * 19349663) ^ np.uint64((k + 1) * 83492791)
            v = (v * 2654435761) & mask
            v = ((v ^ (v >> np.uint64(15))) * 2246822519) & mask
            v ^= v >> np.uint64(13)
            planes = [v % 256, (v >> np.uint64(8)) % 256, (v >> np.uint64(16)) % 256]
        case "blocks":
            c = (x // (8 + k % 5) + y // (8 + k % 5)) % 2
            planes = [255 * c, 255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1)]
        case _:
            t = ((x * x + y * y) // (37 + k)) % 256
            t = np.where(t > 127, 255 - t, t)
            planes = [2 * t, 255 * x // max(width - 1, 1), 255 - 255 * y // max(height - 1, 1)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def last_logits(model: Model, question: Question) -> torch.Tensor:
    seen = model.see(question)
    network = model.network
    with torch.inference_mode():
        pixels = [torch.from_numpy(each.pixels) for each in seen.images]
        features = network.encode(torch.cat(pixels), [each.grid for each in seen.images]) if pixels else []
        return network.logits(network(network.embed(torch.tensor([seen.encoded.ids]), features))[0, -1])


def check(model: Model, sample: dict[str, Any], expected: dict[str, Any], prompt: str, atol: float = LOGITS) -> None:
    images = [drawn(spec) for spec in sample["images"]]
    question = Question(prompt, images, sampling=Sampling(max_tokens=24), raw=True)
    assert model.see(question).encoded.ids.count(model.config.image_token_id) == sum(
        each.grid.tokens for each in model.see(question).images
    )
    assert torch.allclose(last_logits(model, question), torch.tensor(expected["logits"]), atol=atol, rtol=0)
    if expected["min_margin"] > atol:
        assert list(model.answer(question).tokens) == expected["greedy"]


@cache
def loaded(folder: str, beside: tuple[str, ...] = ()) -> Model:
    return pumice.load(
        REFERENCE / "golden" / folder, dtype="float32", beside=[REFERENCE / "golden" / each for each in beside]
    )


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_as_transformers(name: str) -> None:
    for sample in entry(name)["samples"]:
        model = loaded(f"models/{name}")
        images = [drawn(spec) for spec in sample["images"]]
        assert model.see(Question(sample["prompt"], images, raw=True)).encoded.ids == sample["input_ids"]
        check(model, sample, sample, sample["prompt"])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_the_folder_s_own_template(name: str) -> None:
    sample = entry(name)["samples"][0]
    model = loaded(f"models/{name}")
    images = [drawn(spec) for spec in sample["images"]]
    text = "What is shown in this image?"
    assert text in sample["prompt"]
    assert model.see(Question(text, images)).encoded.ids == sample["input_ids"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_as_the_authors(name: str) -> None:
    sources = entry(golden()["original_layout"][name]["same_weights_as"])
    model = loaded(f"models-original/{name}")
    for sample in sources["samples"]:
        original = sample["original"]
        expected = sample if "same_as_hf" in original else original
        images = [drawn(spec) for spec in sample["images"]]
        ids = model.see(Question(sample["prompt"], images, raw=True)).encoded.ids
        collapsed = [token for place, token in enumerate(ids) if token != -200 or place == 0 or ids[place - 1] != -200]
        if len(images) < 2:
            assert collapsed == original["input_ids"]
        check(model, sample, {**expected, "min_margin": original["min_margin"]}, sample["prompt"])


@pytest.mark.parametrize("name", ["llava-v1.5-tiny-lora"])
def test_adapters_are_merged(name: str) -> None:
    made = golden()["original_layout"][name]
    model = loaded(f"models-original/{name}", (f"models-original/{made['base']}",))
    for sample in made["samples"]:
        check(model, sample, sample, sample["prompt"])


def test_the_other_s_preprocessing_on_request() -> None:
    """A Hugging Face folder under the authors' rules gives the authors' logits, and the other way round."""
    for name in ("vicuna15-28", "vicuna16-28"):
        folder = reference("golden") / "models" / name
        model = pumice.load(folder, dtype="float32", preprocess="original")
        for sample in entry(name)["samples"]:
            original = sample["original"]
            expected = sample if "same_as_hf" in original else original
            question = Question(sample["prompt"], [drawn(spec) for spec in sample["images"]], raw=True)
            assert torch.allclose(last_logits(model, question), torch.tensor(expected["logits"]), atol=LOGITS, rtol=0)


def test_a_lone_projector_over_its_language_model(tmp_path: Path) -> None:
    made = golden()["original_layout"]["llava-v1.5-tiny/mm_projector.bin"]
    originals = reference("golden") / "models-original"
    for name in ("config.json", "mm_projector.bin"):
        shutil.copy(originals / "llava-v1.5-tiny" / name, tmp_path)
    model = pumice.load(
        tmp_path, dtype="float32", beside=[originals / made["base"], originals / "llava-v1.5-tiny-clip"]
    )
    for sample in made["samples"]:
        # The authors' loader rounds the projector to float16 first; pumice keeps what the file holds.
        check(model, sample, sample, sample["prompt"], atol=1e-2)
