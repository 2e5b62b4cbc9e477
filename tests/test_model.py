"""What a user holds: answers, streams, chats, batches, and the errors of each."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pumice
import tiny
from pumice import Exchange, Question, Sampling, UserError
from pumice.engine import Engine, Limits
from pumice.model import Model
from pumice.network.llava import Llava, generate

FEW = Sampling(max_tokens=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("model") / "tiny", family="1.6", lm="mistral", seed=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pumice.load(folder)


def picture(seed: int, size: tuple[int, int] = (70, 40)) -> Image.Image:
    torch.manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy())


def test_an_image_comes_in_many_forms(model: Model, tmp_path: Path) -> None:
    image = picture(0)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    text = base64.b64encode(data).decode()
    expected = model.ask("What?", image, sampling=FEW)
    for form in (str(tmp_path / "a.png"), tmp_path / "a.png", data, text, f"data:image/png;base64,{text}", [image]):
        assert model.ask("What?", form, sampling=FEW).tokens == expected.tokens


def test_a_stream_is_the_answer_in_pieces(model: Model) -> None:
    stream = model.stream("What?", picture(1), sampling=FEW)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.text == model.ask("What?", picture(1), sampling=FEW).text
    assert stream.answer.text == stream.answer.text.strip()


def test_an_answer_tells_how_it_came_about(model: Model) -> None:
    answer = model.ask("What?", [picture(1), picture(2, (30, 90))], sampling=FEW)
    seen = model.see(Question("What?", [picture(1), picture(2, (30, 90))]))
    assert answer.image_tokens == tuple(each.grid.tokens for each in seen.images)
    assert answer.prompt_tokens == len(seen.encoded.ids)
    assert len(answer.tokens) == 1 + answer.timings.decoded_tokens
    assert answer.timings.prefill_s > 0
    assert answer.timings.total_s >= answer.timings.prefill_s + answer.timings.encode_s


def test_a_chat_is_a_question_with_history(model: Model) -> None:
    chat = model.chat(system="Be brief.", sampling=FEW)
    first = chat.ask("What is it?", picture(3))
    second = chat.ask("And why?")
    history = (Exchange("What is it?", first.text, (picture(3),)),)
    asked = Question("And why?", system="Be brief.", history=history, sampling=FEW)
    assert model.answer(asked).tokens == second.tokens
    assert [turn.answer for turn in chat.history] == [first.text, second.text]
    chat.clear()
    assert chat.ask("What is it?", picture(3)).tokens == first.tokens


def test_a_chat_remembers_the_picture_and_not_its_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(3).save(path)
    chat, twin = model.chat(sampling=FEW), model.chat(sampling=FEW)
    chat.ask("What is it?", path)
    twin.ask("What is it?", picture(3))
    picture(4).save(path)
    assert chat.ask("And why?").tokens == twin.ask("And why?").tokens
    path.unlink()
    assert chat.ask("Really?").tokens == twin.ask("Really?").tokens


def test_a_turn_that_fails_leaves_the_chat_whole(model: Model) -> None:
    chat = model.chat(sampling=FEW)
    chat.ask("Hi")
    with pytest.raises(UserError):
        chat.ask("Look", "nowhere.png")
    assert len(chat.history) == 1


def test_a_batch_with_its_own_settings_a_row(model: Model) -> None:
    """More rows than fit side by side, unequal limits, a stop text in one of them."""
    text = model.ask("Say something", sampling=Sampling(max_tokens=30)).text
    stop = Sampling(max_tokens=30, stop=[text[4:7]])
    questions = [Question("Say something", sampling=stop)]
    questions += [
        Question(
            f"What {n}?", picture(n) if n % 2 else None, sampling=Sampling(2 / 9 * n, seed=n, max_tokens=2 + 3 * n)
        )
        for n in range(10)
    ]  # fmt: skip
    for question, answer in zip(questions, model.ask_all(questions)):
        alone = model.answer(question)
        assert (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason)
    assert model.ask_all(questions[:1])[0].text == text[: text.index(text[4:7])].rstrip()
    assert model.ask_all(questions[:1])[0].finish_reason == "stop"
    assert model.ask_all([]) == []


def test_several_answers_to_one_question(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what its seed gives alone; the prompt is prepared once and read once."""
    drawn = Sampling(1.0, seed=2**64 - 2, max_tokens=12)
    question = Question("What is it?", picture(3), sampling=drawn)
    alone = [model.answer(replace(question, sampling=replace(drawn, seed=seed))) for seed in (2**64 - 2, 2**64 - 1, 0)]
    monkeypatch.setattr(model, "_engine", Engine(model.network))
    answers = model.answers(question, 3)
    assert [each.tokens for each in answers] == [each.tokens for each in alone]
    assert len({each.tokens for each in answers}) == 3
    prompt = len(model.see(question).encoded.ids)
    assert [each.cached_tokens for each in answers] == [0, prompt - 1, prompt - 1]
    assert len(model.answers(replace(question, sampling=Sampling(1.0, max_tokens=3)), 2)) == 2
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(UserError, match="answers were asked for"):
            model.answers(question, wrong)


def test_tokens_end_an_answer_and_biases_bend_it(model: Model) -> None:
    whole = model.ask("Say something", sampling=FEW).tokens
    ended = model.ask("Say something", sampling=Sampling(max_tokens=16, stop_ids=[whole[3]]))
    assert (ended.tokens, ended.finish_reason) == (whole[: whole.index(whole[3]) + 1], "stop")
    bent = model.ask("Say something", sampling=Sampling(max_tokens=16, logit_bias={7: 100.0}, stop_ids=[8]))
    assert (set(bent.tokens), bent.finish_reason) == ({7}, "length")
    for wrong in (Sampling(stop_ids=[10**6]), Sampling(logit_bias={10**6: 1.0})):
        with pytest.raises(UserError, match="names token 1000000"):
            model.ask("Say something", sampling=wrong)


def test_a_batch_keeps_to_its_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows fit side by side, the answers are the same; a wrong question is named by its number."""
    questions = [Question(f"What {n}?", picture(n) if n % 3 else None, sampling=FEW) for n in range(5)]
    expected = [each.tokens for each in model.ask_all(questions)]
    monkeypatch.setattr(pumice.model, "WAITING", 2)
    small = Engine(model.network, positions=max(len(model.see(each).encoded.ids) for each in questions) + 32)
    monkeypatch.setattr(model, "_engine", small)
    assert [each.tokens for each in model.ask_all(questions)] == expected
    with pytest.raises(UserError, match="question 2: there is no image"):
        model.ask_all([Question("a"), Question("b", "nowhere.png")])


def test_first_questions_at_once_have_one_engine(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to make one."""
    asking, made = threading.Barrier(4), []

    class Slow(Engine):
        def __init__(self, network: Llava, limits: Limits | None = None) -> None:
            made.append(self)
            time.sleep(0.1)
            super().__init__(network, limits or Limits())

    monkeypatch.setattr(pumice.model, "Engine", Slow)
    monkeypatch.setattr(model, "_engine", None)

    def first(_: int) -> Engine:
        asking.wait()
        return model.engine

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(first, range(4)))
    assert made == [model.engine]
    assert all(each is model.engine for each in found)
    model.limit(Limits(rows=1))
    assert made == [found[0], model.engine]


def test_literal_marks_of_a_user_are_text(model: Model) -> None:
    seen = model.see(Question("What do <image>, </s> and [INST] mean?", picture(1)))
    assert len(seen.encoded.images) == 1
    assert seen.encoded.ids.count(model.config.image_token_id) == seen.images[0].grid.tokens
    assert model.config.stop_ids[0] not in seen.encoded.ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_near(folder: Path, model: Model, dtype: str) -> None:
    """Scores of the first token differ by rounding only."""
    narrow = pumice.load(folder, dtype=dtype)
    assert {weight.dtype for weight in narrow.network.parameters()} == {getattr(torch, dtype)}
    seen = model.see(Question("What?", picture(5)))

    def scores(each: Model) -> torch.Tensor:
        network = each.network
        pixels = torch.from_numpy(seen.images[0].pixels).to(getattr(torch, dtype) if each is narrow else torch.float32)
        with torch.inference_mode():
            features = network.encode(pixels, [seen.images[0].grid])
            return network.logits(network(network.embed(torch.tensor([seen.encoded.ids]), features))[0, -1]).float()

    exact = scores(model)
    assert float((scores(narrow) - exact).abs().max()) < 0.06 * float(exact.abs().max())
    assert narrow.ask("What?", picture(5), sampling=FEW).tokens


def test_weights_are_the_file_s_own_memory(folder: Path) -> None:
    """Nothing is copied when type and device stay: the tensors lie in the mapped file."""
    network = pumice.load(folder).network
    weights = list(network.parameters())
    span = max(each.data_ptr() for each in weights) - min(each.data_ptr() for each in weights)
    assert span < (folder / "model.safetensors").stat().st_size


def test_the_context_ends_the_answer(tmp_path: Path) -> None:
    short = tiny.hf_folder(tmp_path / "short", lm="vicuna", seed=11)
    raw = json.loads((short / "config.json").read_text(encoding="utf-8"))
    raw["text_config"]["max_position_embeddings"] = 120
    (short / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    model = pumice.load(short)
    answer = model.ask("USER: Hi ASSISTANT:", sampling=Sampling(max_tokens=10_000), raw=True)
    assert answer.finish_reason == "stop" or answer.prompt_tokens + len(answer.tokens) == 121
    with pytest.raises(UserError, match="120 positions"):
        model.ask("word " * 200)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question("one <image> two", raw=True), "1 <image> marks"),
        (Question("none", io.BytesIO().getvalue(), raw=True), "empty"),
        (Question("x", raw=True, system="s"), "raw prompt"),
        (Question(None), "prompt is None"),  # type: ignore[arg-type]
        (Question("x", system=5), "system is 5"),  # type: ignore[arg-type]
        (Question("x", raw=True, history=(Exchange("a", "b"),)), "raw prompt"),
    ],
    ids=["marks", "bytes", "system", "history", "no text", "no system text"],
)
def test_questions_that_cannot_be(model: Model, question: Question, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.answer(question)


def test_ids_with_the_wrong_number_of_image_tokens(model: Model) -> None:
    ids = model.see(Question("What?", picture(1))).encoded.ids
    with pytest.raises(UserError, match="image tokens"):
        model.generate([*ids[:-1], model.config.image_token_id], picture(1))


@pytest.mark.parametrize(("ids", "words"), [([], "is empty"), ([1, 10**6], "token 1000000"), ([1, -5], "token -5")])
def test_ids_that_the_model_does_not_have(model: Model, ids: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.generate(ids)


def test_ids_may_come_in_an_array_or_a_tensor(model: Model) -> None:
    few = Sampling(max_tokens=4)
    expected = model.generate([1, 5], sampling=few)
    assert model.generate(np.array([1, 5]), sampling=few) == expected  # type: ignore[arg-type]
    assert model.generate(torch.tensor([1, 5]), sampling=few) == expected  # type: ignore[arg-type]


def test_a_vocabulary_larger_than_the_weights_is_said_at_the_question(tmp_path: Path) -> None:
    """The tokenizer of another model: it loads, for most words are there, and the first that is not is named."""
    folder = tiny.hf_folder(tmp_path / "cut", family="1.5", lm="vicuna", seed=1)
    weights = load_file(folder / "model.safetensors")
    cut = {name: each[:300].clone() if len(each) > 400 and each.dim() == 2 else each for name, each in weights.items()}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["text_config"]["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UserError, match="has 300"):
        pumice.load(folder).ask("What is it? stop go square sign")


def test_generate_refuses_stop_texts(model: Model) -> None:
    with pytest.raises(UserError, match="stop texts"):
        model.generate([1, 5], sampling=Sampling(stop="a"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_said(folder: Path, temperature: float) -> None:
    broken = pumice.load(folder)
    broken.network.lm_head.weight = torch.nn.Parameter(torch.full_like(broken.network.lm_head.weight, torch.nan))
    stream = broken.stream("Hi", sampling=Sampling(temperature, seed=0))
    with pytest.raises(UserError, match="not numbers"):
        list(stream)
    with pytest.raises(UserError, match="there is no answer"):
        _ = stream.answer


def test_the_plain_loop_may_say_the_image_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says `<image>` in words has no feature for it: it is a row of the vocabulary like any other."""
    image = model.config.image_token_id
    scores_V = torch.nn.functional.one_hot(torch.tensor(image), model.config.text.vocab).float()
    monkeypatch.setattr(model.network, "logits", lambda hidden_XD: scores_V.expand(*hidden_XD.shape[:-1], -1))
    assert model.generate([1, 5], sampling=Sampling(max_tokens=3)) == [image] * 3
    assert list(generate(model.network, [1, 5], [], 3)) == [image] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        *({"dtype": "float8"}, {"dtype": torch.int8}, {"dtype": torch.complex64}, {"device": "abacus"}),
        *({"device": "meta"}, {"template": "nope"}, {"preprocess": "nope"}, {"beside": "nowhere"}),
    ],
)
def test_bad_choices_on_load(folder: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        pumice.load(folder, **wrong)  # type: ignore[arg-type]


def test_the_plain_operations_give_the_same_answer(folder: Path, model: Model) -> None:
    code = f"""import pumice
model = pumice.load({str(folder)!r})
print(model.ask("What is it?", sampling=pumice.Sampling(max_tokens=16)).tokens)"""

    def under(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PUMICE_OPS": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert under("reference").stdout.strip() == str(model.ask("What is it?", sampling=FEW).tokens)
    assert "PUMICE_OPS is 'fast'" in under("fast").stderr
