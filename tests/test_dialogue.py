"""Conversations of any turns to prompts, and what a model of a store brings for them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

import ollama_store
import pumice
import tiny
from ollama_store import LLAVA, PARAMS, TEMPLATE
from pumice import UserError, prompt
from pumice.dialogue import Dialogue, Dressing, rendered
from pumice.go_template import read_template
from pumice.ollama_prompt import Turn
from pumice.prompt import TEMPLATES, Message, prompt_text
from pumice.question import Question

NAMES = [name for name, row in TEMPLATES.items() if not row.captions]


@pytest.mark.parametrize("name", NAMES)
def test_turns_in_order_are_what_the_template_makes_of_them(name: str) -> None:
    turns = (Turn("system", "Be brief."), Turn("user", "What is it?", 2), Turn("assistant", "A cat."))
    messages = [Message("system", "Be brief."), Message("user", "What is it?", 2), Message("assistant", "A cat.")]
    found = rendered(Dialogue((*turns, Turn("user", "Sure?"))), Dressing(), name)
    assert list(found.parts) == prompt.render(name, [*messages, Message("user", "Sure?")])
    assert found.images == (0, 1)


def text(*turns: Turn, dressing: Dressing | None = None) -> str:
    found = rendered(Dialogue(turns), dressing or Dressing(), "vicuna_v1")
    return prompt_text(found.parts).removeprefix(TEMPLATES["vicuna_v1"].system or "").strip()


def test_neighbours_of_one_side_are_one_turn() -> None:
    assert text(Turn("user", "a", 1), Turn("user", "b", 1), Turn("assistant", "c"), Turn("tool", "d")) == (
        "USER: <image>\n<image>\na\n\nb ASSISTANT: c</s>USER: d ASSISTANT:"
    )


def test_the_beginning_of_an_answer_is_continued() -> None:
    assert text(Turn("user", "a"), Turn("assistant", "Sure, it")) == "USER: a ASSISTANT: Sure, it"
    found = rendered(Dialogue((Turn("user", "a"), Turn("assistant", "</s>"))), Dressing(), "vicuna_v1")
    assert found.parts[-1] == prompt.Part("text", " </s>")


def test_marks_of_images_are_no_words() -> None:
    assert text(Turn("user", "[img]What is [img]?", 1)) == "USER: <image>\nWhat is [img]? ASSISTANT:"
    assert text(Turn("user", "What is [img]?")) == "USER: What is [img]? ASSISTANT:"


def test_system_texts_stand_first_wherever_they_came() -> None:
    parts = rendered(Dialogue((Turn("user", "a"), Turn("system", "x"), Turn("system", "y"))), Dressing(), "vicuna_v1")
    assert prompt_text(parts.parts) == "x\n\ny USER: a ASSISTANT:"


def test_what_a_dressing_brings_stands_first() -> None:
    dressing = Dressing(None, "Own.", {}, (Turn("user", "Hi"), Turn("assistant", "Ho")))
    own = rendered(Dialogue((Turn("user", "a"),)), dressing, "vicuna_v1")
    assert prompt_text(own.parts) == "Own. USER: Hi ASSISTANT: Ho</s>USER: a ASSISTANT:"
    asked = rendered(Dialogue((Turn("system", "Mine."), Turn("user", "a"))), dressing, "vicuna_v1")
    assert prompt_text(asked.parts).startswith("Mine. USER: Hi")


def test_tools_need_a_place() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(UserError, match="no place"):
        rendered(Dialogue((Turn("user", "a"),), None, tools), Dressing(), "vicuna_v1")
    template = read_template("{{ .Tools }} {{ range .Messages }}{{ .Content }}{{ end }}")
    found = rendered(Dialogue((Turn("user", "a"),), template, tools), Dressing(), "vicuna_v1")
    assert '"name":"f"' in prompt_text(found.parts)


def test_an_image_of_the_system_is_refused() -> None:
    with pytest.raises(UserError, match="system message came with an image"):
        rendered(Dialogue((Turn("system", "a", 1), Turn("user", "b"))), Dressing(), "vicuna_v1")


# --- a model of a store -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    pumice.convert(tiny.hf_folder(folder / "hf", family="1.5", seed=3), folder / "tiny.gguf")
    return folder


def installed(places: Path, pair: Path, *layers: tuple[str, bytes]) -> pumice.Model:
    weights = [("model", (pair / "tiny.gguf").read_bytes()), ("projector", (pair / "mmproj-tiny.gguf").read_bytes())]
    ollama_store.install(places / "ollama", LLAVA, [*weights, *layers])
    return pumice.load("llava:7b")


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(data, "PNG")
    return data.getvalue()


def test_a_model_of_a_store_is_asked_with_what_is_its_own(places: Path, pair: Path) -> None:
    own = (("template", TEMPLATE), ("system", b"Be brief."), ("params", PARAMS))
    model = installed(places, pair, *own, ("messages", b'[{"role":"user","content":"Hi"}]'))
    seen = model.see(Question("What is it?", picture()))
    assert prompt_text(seen.parts) == "[INST] Be brief. Hi\n\n<image>\nWhat is it? [/INST]"
    assert len(seen.images) == 1
    seen = model.see(Question("What is it?", system="Mine."))
    assert prompt_text(seen.parts) == "[INST] Hi [/INST][INST] Mine. What is it? [/INST]"
    plain = pumice.load("llava:7b", template="vicuna_v1")
    assert prompt_text(plain.see(Question("a")).parts) == "Be brief. USER: Hi\n\na ASSISTANT:"


def test_parameters_of_the_store_are_the_defaults(places: Path, pair: Path) -> None:
    model = installed(places, pair, ("params", b'{"temperature":0.25,"num_predict":3,"stop":["x"],"top_k":7}'))
    assert model.sampling == pumice.Sampling(temperature=0.25, max_tokens=3, stop=("x",), top_k=7)
    assert len(model.ask("a").tokens) <= 3
    assert len(model.ask("a", sampling=pumice.Sampling(max_tokens=5)).tokens) > 0


def test_images_stand_where_the_template_puts_them(places: Path, pair: Path) -> None:
    model = installed(places, pair, ("template", b"{{ range .Messages }}{{ .Content }}{{ end }}"))
    one, two = Image.new("RGB", (30, 30), "red"), Image.new("RGB", (30, 30), "blue")
    template = read_template("{{ (index .Messages 1).Content }}{{ (index .Messages 0).Content }}")
    turns = (Turn("user", "a", 1), Turn("assistant", "b", 1))
    seen = model.see(Question("", (one, two), dialogue=Dialogue(turns, template)))
    expected = [model.see(Question("", each)).images[0].digest for each in (two, one)]
    assert [each.digest for each in seen.images] == expected


def test_a_continued_answer_keeps_its_white_space(places: Path, pair: Path) -> None:
    model = installed(places, pair)
    dialogue = Dialogue((Turn("user", "a"), Turn("assistant", "b")))
    tokens = range(model.config.text.vocab)
    space = next(each for each in tokens if model.tokenizer.decode([each, each, each]).isspace())
    sampling = pumice.Sampling(max_tokens=3, logit_bias={space: 100})
    assert model.answer(Question("", sampling=sampling, dialogue=dialogue)).text.isspace()
    assert not model.answer(Question("a", sampling=sampling)).text
