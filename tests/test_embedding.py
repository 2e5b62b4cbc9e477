"""Vectors of texts and images against Transformers' hidden states, alone and beside answers."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import pumice
import tiny
from pumice import Limits, Sampling, UserError, embedding
from pumice.engine import Request
from pumice.model import Model

TEXTS = [
    "red", "a red circle beside the green square", "", "two\nlines", "ünder 3", "long " * 90
]  # fmt: skip


@pytest.fixture(scope="module", params=[*tiny.LANGUAGE_MODELS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("embed") / "hf", lm=request.param, seed=5)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pumice.load(folder)


def oracle(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def means(folder: Path, texts: list[str]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Of Transformers' hidden states behind the final norm, and how many there were."""
    language_model, tokenizer = oracle(folder).model.language_model, AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        inputs = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        found = [language_model(input_ids=each).last_hidden_state[0].mean(0) for each in inputs]
    return torch.stack(found), tuple(each.shape[1] for each in inputs)


@pytest.mark.parametrize("limits", [Limits(), Limits(alone_chunk=5, rows=3), Limits(deterministic=True)])
def test_transformers_hidden_states_on_average(folder: Path, model: Model, limits: Limits) -> None:
    model.limit(limits)
    texts = TEXTS if model.tokenizer.adds_bos else [each for each in TEXTS if each]
    found = model.embed(texts, normalise=False)
    assert found.vectors_ND.dtype == torch.float32
    vectors_ND, tokens = means(folder, texts)
    torch.testing.assert_close(found.vectors_ND, vectors_ND, atol=2e-4, rtol=2e-4)
    assert found.tokens == tokens
    again = model.embed(texts)
    torch.testing.assert_close(again.vectors_ND.norm(dim=1), torch.ones(len(texts)))
    torch.testing.assert_close(again.vectors_ND, torch.nn.functional.normalize(found.vectors_ND), atol=1e-5, rtol=1e-5)
    assert model.engine.pages_held == 0


@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_an_image_is_the_mean_of_what_transformers_gives_its_language_model(tmp_path: Path, family: str) -> None:
    folder = tiny.hf_folder(tmp_path / "hf", family=family, seed=6)
    images = [Image.linear_gradient("L").convert("RGB").resize(size) for size in ((90, 40), (28, 28), (50, 120))]
    whole, processor = oracle(folder), AutoProcessor.from_pretrained(folder)
    entered: list[torch.Tensor] = []
    whole.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    found = pumice.load(folder).embed_images(images, normalise=False)
    for image, vector_D, tokens in zip(images, found.vectors_ND, found.tokens):
        inputs = processor(images=[image], text="<image>", return_tensors="pt")
        with torch.inference_mode():
            whole(**inputs)
        shown = inputs["input_ids"][0] == whole.config.image_token_id
        features_XD = entered.pop()[0, shown]
        assert tokens == len(features_XD)
        torch.testing.assert_close(vector_D, features_XD.mean(0), atol=1e-5, rtol=1e-4)


def test_a_text_that_is_too_long(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, max_positions=40))
    monkeypatch.setattr(model, "config", config)
    monkeypatch.setattr(model.network, "config", config)
    model.limit(Limits())
    words = "abcdefgh" * 20
    with pytest.raises(UserError, match=r"the input length exceeds the context length: .* has 40 positions"):
        model.embed(["short", words])
    cut = model.embed([words], truncate=True)
    assert cut.tokens == (40,)
    ids = model.tokenizer.encode([pumice.prompt.Part("text", words)], [], image_id=-1).ids[:40]
    (mean_D,) = model.engine.means([Request(ids, [], Sampling(), pooled=True)])
    torch.testing.assert_close(cut.vectors_ND[0], torch.nn.functional.normalize(mean_D, dim=0))
    monkeypatch.undo()
    model.limit(Limits())


def test_no_word_of_a_text_is_special(model: Model) -> None:
    (ids,) = [embedding._ids(model, f"no <image> here, {model.tokenizer.token_of(stop)}", truncate=False)
              for stop in model.config.stop_ids[:1]]  # fmt: skip
    assert not {model.config.image_token_id, *model.config.stop_ids} & set(ids)


@pytest.mark.parametrize("texts", ["one", b"one", [3], [None], ["\ud800"], None])
def test_what_is_no_list_of_texts(model: Model, texts: Any) -> None:
    with pytest.raises(UserError):
        model.embed(texts)


def test_none_are_none_and_bad_images_are_refused(model: Model) -> None:
    assert model.embed([]).vectors_ND.shape == (0, model.config.text.width)
    assert model.embed_images([]).tokens == ()
    for images in ("picture.png", [b"no image"]):
        with pytest.raises(UserError):
            model.embed_images(images)  # type: ignore[arg-type]


def test_states_that_are_no_numbers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.network), "forward", lambda self, x, batch: x * float("nan"))
    with pytest.raises(UserError, match="hidden states are not numbers"):
        model.embed(["red"])


def test_answers_go_on_beside_it(model: Model) -> None:
    """One thread runs the engine, another asks for vectors; both get what they would get alone."""
    model.limit(Limits(chunk=3))
    sampling = Sampling(max_tokens=60, logit_bias=dict.fromkeys(model.config.stop_ids, -100.0))
    texts = [each for each in TEXTS if each]
    answer, vectors = model.ask("Say it.", sampling=sampling).tokens, model.embed(texts).vectors_ND
    model.limit(Limits(chunk=3, rows=4))
    found: list[torch.Tensor] = []
    asked = threading.Thread(target=lambda: found.append(model.embed(texts).vectors_ND))
    generation = model.engine.submit(Request(model.see(pumice.Question("Say it.")).encoded.ids, [], sampling))
    asked.start()
    while not generation.ended:
        model.engine.step()
    asked.join()
    assert tuple(step.token for step in generation.steps) == answer
    torch.testing.assert_close(found[0], vectors, atol=1e-4, rtol=1e-4)


def test_rows_that_lose_their_pages_count_each_position_once(model: Model) -> None:
    engine = pumice.engine.Engine(model.network, Limits(alone_chunk=30, chunk=30), positions=128)
    ids = [[*range(10, 60)], [*range(60, 10, -1)]]
    alone = [engine.means([Request(each, [], Sampling(), pooled=True)])[0] for each in ids]
    grows = engine.submit(
        Request([9] * 30, [], Sampling(max_tokens=90, logit_bias=dict.fromkeys(model.config.stop_ids, -100.0)))
    )
    engine.step()
    together = engine.means([Request(each, [], Sampling(), pooled=True) for each in ids])
    engine.cancel(grows)
    for ours, theirs in zip(together, alone):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    generation = engine.submit(Request(ids[0], [], Sampling(), pooled=True))
    engine.step()
    engine._scheduler._preempt()
    engine._limits = Limits(alone_chunk=7)  # its parts end elsewhere then
    for _ in engine.follow(generation):
        pass
    torch.testing.assert_close(generation.mean, alone[0], atol=1e-5, rtol=1e-5)
    assert engine.pages_held == 0
