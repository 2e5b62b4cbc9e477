"""Prompts against the strings and the trained spans that the references computed."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import HERE, reference
from pumice.chat_template import template_for
from pumice.errors import UserError
from pumice.prompt import (
    SPECIAL_WORDS,
    TEMPLATES,
    Message,
    Part,
    messages_from_llava,
    prompt_text,
    render,
    split_raw,
)

STRINGS = json.loads((HERE / "golden" / "prompt_strings.json").read_text(encoding="utf-8"))
LEARNED = json.loads((HERE / "golden" / "prompt_learned.json").read_text(encoding="utf-8"))
LLAMA3_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def messages(conversation: dict[str, Any]) -> list[Message]:
    """A golden conversation as messages; an answer of null is the model's turn."""
    system = conversation["system"]
    found = [] if system is None else [Message("system", system)]
    for turn in conversation["turns"]:
        found.append(Message("user", turn["user"], turn["images"]))
        if turn["assistant"] is not None:
            found.append(Message("assistant", turn["assistant"]))
    return found


def check_strings(golden: dict[str, Any]) -> int:
    conversations = {each["id"]: messages(each) for each in golden["conversations"]}
    compared = 0
    for name, template in golden["templates"].items():
        for conversation, expected in template["prompts"].items():
            asked = conversations[conversation]
            if not isinstance(expected, str):
                continue  # `plain` fails in the original as soon as there is an answer: see test_plain
            if name == "llava_llama_3" and asked[-1].role == "assistant":
                # The original asks for an answer after an answer. A conversation that ends in one is for training here.
                expected = expected.removesuffix(LLAMA3_HEADER)
            assert prompt_text(render(name, asked)) == expected, (name, conversation)
            compared += 1
    return compared


def test_prompts_equal_the_references() -> None:
    assert check_strings(STRINGS) > 100


def test_every_prompt_of_the_whole_reference() -> None:
    golden = json.loads(reference("golden/prompts.json").read_text(encoding="utf-8"))
    assert check_strings(golden) > 290


def test_names_aliases_and_ends() -> None:
    for name, golden in STRINGS["templates"].items():
        template = TEMPLATES[name]
        assert template.name == name
        assert all(TEMPLATES[alias] is template for alias in golden.get("aliases", []))
        if golden.get("stop_server"):
            assert golden["stop_server"] in (template.end, *template.stop)
    assert TEMPLATES["llama_3"].end == "<|eot_id|>"  # 128009, the stop_token_ids of LLaVA-NeXT


def test_unknown_template_names_the_near_ones() -> None:
    with pytest.raises(UserError) as caught:
        render("vicuna_v2", [Message("user", "Hi")])
    assert "vicuna_v2" in caught.value.message
    assert "'vicuna_v1'" in caught.value.hint


def test_what_training_learns_is_what_the_original_trains() -> None:
    samples = {each["id"]: each for each in LEARNED["samples"]}
    for entry in LEARNED["entries"]:
        sample = samples[entry["sample"]]
        parts = render(entry["template"], messages_from_llava(sample["conversations"], has_image=sample["image"]))
        groups = itertools.groupby(parts, key=lambda part: part.learned)
        learned = ["".join(part.text for part in run) for is_learned, run in groups if is_learned]
        # The first token after a picture carries a space mark of its own.
        assert [each.lstrip(" ") for each in learned] == [each.lstrip(" ") for each in entry["learned"]], entry
        if entry["template"] != "plain":
            assert learned == entry["learned"], entry


@pytest.mark.parametrize("template", ["chatml_direct", "hf_chatml", "hf_llama3"])
def test_an_answer_is_learned_with_its_end_token(template: str) -> None:
    """chatml_direct masks every sample in the original, for want of one id; this is the repair of its NeXT fork."""
    parts = render(template, [Message("user", "What?"), Message("assistant", "A kettle.")])
    learned = "".join(part.text for part in parts if part.learned).strip("\n")
    assert learned == f"A kettle.{TEMPLATES[template].end}"


def test_llama3_learns_the_marks_of_all_turns() -> None:
    """NeXT's preprocess_llama3: special tokens and blank lines everywhere, and the assistant's whole turn."""
    parts = render("llama_3", [Message("user", "What?\n\nNow.", 1), Message("assistant", "A kettle.")])
    plain = "".join(part.text for part in parts if part.kind != "image" and not part.learned)
    assert plain == f"system{TEMPLATES['llama_3'].system}user\nWhat?\n\nNow."
    assert all(part.learned for part in parts if part.kind == "special")
    tail = parts[-6:]
    assert [part.text for part in tail] == [
        "<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\nA kettle.", "<|eot_id|>",
    ]  # fmt: skip


def test_a_picture_without_words() -> None:
    """The authors strip the turn (labels.json, `empty-question`); a chat template writes its line end all the same."""
    asked = [Message("user", "", 1)]
    assert prompt_text(render("v1", asked)).endswith("questions. USER: <image> ASSISTANT:")
    assert prompt_text(render("hf_vicuna", asked)) == "USER: <image>\n ASSISTANT:"


def test_plain() -> None:
    pair = [Message("user", "Give a summary.", 1), Message("assistant", "a dog on a mat")]
    assert render("plain", pair) == [Part("image"), Part("text", "a dog on a mat\n", learned=True)]
    with pytest.raises(UserError, match="no turns"):
        render("plain", [*pair, Message("user", "And?")])


ATTACKS = [*SPECIAL_WORDS, "<image>", "{text}", "{images}", "{system}", "[INST]", "###", "\n", " ", "a"]


@settings(deadline=None)
@given(
    template=st.sampled_from(sorted(set(TEMPLATES) - {"plain", "v0_plain"})),
    words=st.lists(st.sampled_from(ATTACKS), min_size=1, max_size=6),
    images=st.integers(0, 2),
)
def test_what_a_person_writes_stays_text(template: str, words: list[str], images: int) -> None:
    """Special tokens and pictures of a prompt are the same whatever the messages say."""

    def asked(text: str) -> list[Part]:
        turns = [Message("system", text), Message("user", text, images), Message("assistant", text)]
        return render(template, [*turns, Message("user", text)])

    attack = "x" + "".join(words) + "x"
    parts = asked(attack)
    marks = [(part.kind, part.text) for part in parts if part.kind != "text"]
    assert marks == [(part.kind, part.text) for part in asked("harmless") if part.kind != "text"]
    assert sum(part.text.count(attack) for part in parts if part.kind == "text") == 4


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "without a user's message"),
        ([Message("system", "Be brief.")], "without a user's message"),
        ([Message("user", "Hi"), Message("system", "Be brief.")], "after another message"),
        ([Message("user", "Hi"), Message("assistant", "Ho", 1)], "not the user's"),
    ],
)
def test_what_is_no_conversation_is_refused(turns: list[Message], words: str) -> None:
    with pytest.raises(UserError, match=words):
        render("vicuna_v1", turns)


def test_raw_prompts_hold_pictures_where_they_are_marked() -> None:
    assert split_raw("<image>\nTwo</s><image>") == [Part("image"), Part("text", "\nTwo</s>"), Part("image")]
    assert split_raw("") == []


# Chat templates are recognised, never run.

KNOWN = {"hf_vicuna": "hf_vicuna", "hf_mistral": "mistral_instruct", "hf_llama3": "hf_llama3", "hf_chatml": "hf_chatml"}


def jinja_of(name: str) -> str:
    return STRINGS["templates"][name]["jinja"]


def spread(jinja: str) -> str:
    """The same template on many lines, with comments, as newer folders have it."""
    text = re.sub(r"\{#.*?#\}", "", jinja)
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    text = text.replace("'role'", '"role"').replace("{% endif %}", "{%-   endif   -%}\n\n  ")
    return "{# a comment #}\n" + text.replace("{% for ", "{# another\n #}{%- for ") + "\n"


@pytest.mark.parametrize("name", KNOWN)
def test_known_chat_templates_are_recognised(name: str) -> None:
    jinja = jinja_of(name)
    assert template_for(jinja) == KNOWN[name]
    assert template_for(jinja.replace("\n", "\\n")) == KNOWN[name]
    assert template_for(spread(jinja)) == KNOWN[name]


@pytest.mark.parametrize("name", ["hf_mistral", "hf_llama3", "hf_vicuna", "hf_chatml"])
def test_what_recognition_overlooks_changes_nothing(name: str) -> None:
    """Jinja itself, set up as Transformers does, renders the spread template to the same prompt."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content[1:]}]
    plain = re.sub(r"\{% (end)?generation %\}", "", jinja_of(name))
    made = [environment.from_string(each).render(messages=turns) for each in (plain, spread(jinja_of(name)))]
    assert made[0] == made[1]
    assert "What?" in made[0]


@pytest.mark.parametrize(
    "jinja",
    [
        "",
        "{{ messages }}",
        jinja_of("hf_vicuna").replace("ASSISTANT:", "ASSISTANT: "),
        jinja_of("hf_vicuna").replace("{% endfor %}{% if add", "{% endfor %} {% if add"),
        jinja_of("hf_chatml").replace("<|im_end|>", "<|im_end|> "),
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + jinja_of("hf_vicuna"),
    ],
)
def test_other_chat_templates_are_not(jinja: str) -> None:
    assert template_for(jinja) is None


@pytest.mark.parametrize("piece", ["{#", "{%", " ", "{{-", "'", "{# #}"])
def test_a_hostile_chat_template_takes_no_time(piece: str) -> None:
    start = time.process_time()
    assert template_for(piece * 3000) is None
    assert template_for(piece * 3_000_000) is None
    assert time.process_time() - start < 2


# The authors' training files.


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


def test_training_conversations() -> None:
    """preprocess_multimodal: a turn's marks become one picture in front; the first turn is the human's."""
    rows = said(("gpt", "Hello"), ("human", "Look <image> at <image>"), ("gpt", "It says <image>"), ("human", "And?"))
    assert messages_from_llava(rows, has_image=True) == [
        Message("user", "Look  at", 1),
        Message("assistant", "It says <image>"),
    ]
    assert messages_from_llava(rows, has_image=False)[0] == Message("user", "Look <image> at <image>")


def test_training_turns_must_alternate() -> None:
    with pytest.raises(UserError, match="turn 2"):
        messages_from_llava(said(("human", "One"), ("human", "Two"), ("gpt", "a"), ("gpt", "b")), has_image=True)
    with pytest.raises(UserError, match="turn 3"):
        messages_from_llava(said(("gpt", "Hello"), ("human", "One"), ("human", "Two")), has_image=True)


@pytest.mark.parametrize(
    "turn", [{"value": "x"}, {"from": "human"}, {"from": "human", "value": None}, {"from": 3, "value": "x"}, "x", 1, []]
)
def test_training_turns_are_two_texts(turn: object) -> None:
    """The last turn too, though a trailing question is dropped."""
    with pytest.raises(UserError, match="turn 3 of a conversation is"):
        messages_from_llava([*said(("human", "One"), ("gpt", "a")), turn], has_image=False)
