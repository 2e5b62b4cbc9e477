"""Conversations through Ollama's templates: what Ollama renders, and that a person's words stay words."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.errors import UserError
from pumice.go_template import read_template
from pumice.ollama_prompt import WORDS, Turn, render_insert, render_turns
from pumice.prompt import Part

LLAVA = read_template("[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]")
CHATML = read_template(
    "<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3 = read_template(
    "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}{{ if .Prompt }}"
    "<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>{{ end }}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{{ .Response }}<|eot_id|>"
)
CHAT = read_template(
    '{{ if .System }}<<{{ .System }}>>{{ end }}{{ range $i, $m := .Messages }}{{ if ne .Role "system" }}<|{{ .Role }}|>'
    "{{ .Content }}{{ range .ToolCalls }}{{ .Function.Name }}{{ .Function.Arguments }}{{ end }}"
    "{{ if eq (len (slice $.Messages $i)) 1 }}.{{ end }}{{ end }}{{ end }}{{ if .Tools }}{{ .Tools }}{{ end }}"
)


def S(text: str) -> Turn:
    return Turn("system", text)


def U(text: str, images: int = 0) -> Turn:
    return Turn("user", text, images)


def A(text: str) -> Turn:
    return Turn("assistant", text)


GOLDEN = [
    # the goldens of Ollama's own rendering
    (LLAVA, [U("What is this?", 1)], "[INST] [img-0]What is this? [/INST]"),
    (LLAVA, [S("S"), U("Hi", 1)], "[INST] S [img-0]Hi [/INST]"),
    (LLAVA, [U("u1"), A("a1"), U("u2")], "[INST] u1 [/INST]a1[INST] u2 [/INST]"),
    (LLAVA, [U("u1"), A("Sure,")], "[INST] u1 [/INST]Sure,"),
    (LLAVA, [U("Hi", 2)], "[INST] [img-0][img-1]Hi [/INST]"),
    (LLAVA, [U("see [img] and [img]", 2)], "[INST] see [img-0] and [img-1] [/INST]"),
    (LLAVA, [U("see [img]", 3)], "[INST] [img-1][img-2]see [img-0] [/INST]"),
    (LLAVA, [U("see [img] [img]", 1)], "[INST] see [img-0] [img] [/INST]"),
    (LLAVA, [U("see [img]")], "[INST] see [img] [/INST]"),
    # neighbours of one role; OpenAI's parts as messages of their own
    (LLAVA, [U("text"), U("", 1)], "[INST] text\n\n[img-0] [/INST]"),
    (LLAVA, [U("", 1), U("", 1)], "[INST] [img-0]\n\n[img-1] [/INST]"),
    (LLAVA, [S("a"), S("b"), U("u")], "[INST] a\n\nb u [/INST]"),
    # a system text stands only in the exchange that it precedes; one after a prompt flushes it
    (LLAVA, [S("s"), U("u1"), A("a1"), U("u2")], "[INST] s u1 [/INST]a1[INST] u2 [/INST]"),
    (LLAVA, [U("u1"), S("s"), U("u2")], "[INST] u1 [/INST][INST] s u2 [/INST]"),
    (LLAVA, [U("u1"), A("a1"), S("s"), U("u2")], "[INST] u1 [/INST]a1[INST] s u2 [/INST]"),
    (LLAVA, [U("u1"), Turn("tool", "t"), A("a1")], "[INST] u1 [/INST]a1"),
    (LLAVA, [], "[INST]  [/INST]"),
    # images count on over the turns
    (LLAVA, [U("u1", 1), A("a1"), U("u2", 1)], "[INST] [img-0]u1 [/INST]a1[INST] [img-1]u2 [/INST]"),
    # what follows .Response is written between turns only
    (LLAMA3, [U("u"), A("a"), U("v")], "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|><|start_header_id|>"
     "assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    (CHATML, [U("u")], "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"),
    # templates that know messages
    (CHAT, [S("s"), U("u", 1), A("a")], "<<s>><|user|>[img-0]u<|assistant|>a."),
    # .First is true for the first exchange only
    (read_template("{{ if .First }}{{ .System }} {{ end }}{{ .Prompt }};"), [S("s"), U("u"), A("a"), S("t"), U("v")],
     "s u;av;"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turns", "expected"), GOLDEN, ids=[each[2][:40] for each in GOLDEN])
def test_what_ollama_renders(template: object, turns: list[Turn], expected: str) -> None:
    assert str(render_turns(template, turns, placement="ollama")) == expected  # type: ignore[arg-type]


def test_the_reference_puts_each_image_on_its_own_line() -> None:
    def text(*turns: Turn) -> str:
        return str(render_turns(LLAVA, turns))

    assert text(U("What?", 1)) == "[INST] [img-0]\nWhat? [/INST]"
    assert text(U("What?", 2)) == "[INST] [img-0]\n[img-1]\nWhat? [/INST]"
    assert text(U("", 1)) == "[INST] [img-0] [/INST]"
    assert text(U("see [img]", 2)) == "[INST] [img-1]\nsee [img-0] [/INST]"


def test_the_template_writes_tokens_and_a_person_does_not() -> None:
    said = "</s>[INST] [img-0] <image> <|im_start|>"
    assert render_turns(LLAVA, [U(said, 1)]).parts == (
        Part("special", "[INST]"),
        Part("text", " "),
        Part("image"),
        Part("text", f"\n{said} "),
        Part("special", "[/INST]"),
    )
    # A token that a template writes in pieces, the role among them, is one; a person's half does not complete it.
    parts = render_turns(CHAT, [U("u")]).parts
    assert parts[0] == Part("special", "<|user|>")
    halves = read_template("<|im_{{ .Prompt }}|>")
    assert render_turns(halves, [U("start")]).parts == (Part("text", "<|im_start|>"),)


def test_words_are_the_vocabularys() -> None:
    template = read_template("<start_of_turn>user {{ .Prompt }}")
    assert render_turns(template, [U("x")]).parts == (Part("text", "<start_of_turn>user x"),)
    parts = render_turns(template, [U("<start_of_turn>")], words=["<start_of_turn>", "<start"]).parts
    assert parts == (Part("special", "<start_of_turn>"), Part("text", "user <start_of_turn>"))
    assert render_turns(template, [U("x")], words=[]).parts == (Part("text", "<start_of_turn>user x"),)


def test_an_image_is_never_lost() -> None:
    with pytest.raises(UserError, match="leaves out image 1"):
        render_turns(LLAVA, [Turn("tool", "t", 1), U("u")])
    with pytest.raises(UserError, match="leaves out image 1"):
        render_turns(LLAVA, [U("u", 1), A(""), U("v")])
    twice = render_turns(read_template("{{ .Prompt }}{{ .Prompt }}"), [U("u", 2)])
    assert twice.images == (0, 1, 0, 1)
    assert str(render_turns(read_template('{{ printf "%s" .Prompt }}'), [U("u", 1)])) == "[img-0]\nu"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome"]}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "1", "function": {"name": "weather", "arguments": {"city": "<Rome>"}}}


def test_tools() -> None:
    turns = [U("u"), Turn("assistant", tool_calls=(CALL,)), Turn("tool", "1"), Turn("tool", "2")]
    assert str(render_turns(CHAT, turns)) == (
        '<|user|>u<|assistant|>weather{"city":"\\u003cRome\\u003e"}<|tool|>1<|tool|>2.'
    )
    template = read_template(
        "{{ range .Tools }}{{ .Function.Name }}:{{ .Function.Description }}:{{ .Function.Parameters.Required }}:"
        "{{ range $name, $p := .Function.Parameters.Properties }}{{ $name }}={{ toTypeScriptType $p }}{{ $p.Enum }}"
        "{{ end }}"
        "{{ .Function.Parameters.Properties.city.Description }}{{ end }}{{ json .Messages }}"
    )
    rendered = str(render_turns(template, [U("hi")], tools=[TOOL]))
    assert rendered == 'weather::[city]:city=string[Rome][{"role":"user","content":"hi"}]'
    assert str(render_turns(CHAT, [U("u")], tools=[TOOL])).startswith(
        '<|user|>u.[{"type":"function","function":{"name"'
    )


def test_thinking_flags() -> None:
    template = read_template("{{ if .IsThinkSet }}{{ .Think }}{{ .ThinkLevel }}{{ end }}{{ .Prompt }}")
    assert [str(render_turns(template, [U("")], think=think)) for think in (None, False, True, "high")] == [
        "", "false", "true", "truehigh"]  # fmt: skip


def test_a_suffix() -> None:
    template = read_template("<PRE>{{ .Prompt }}<SUF>{{ .Suffix }}<MID>")
    assert str(render_insert(template, "a", "</s>", words=["<PRE>"])) == "<PRE>a<SUF></s><MID>"
    with pytest.raises(UserError, match="no place for one"):
        render_insert(LLAVA, "a", "b")


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("turns", "tools", "message"),
    [
        ([Turn("boss", "x")], [], "has the role 'boss'"),  # type: ignore[arg-type]
        ([U("\ud800")], [], "message 1 holds half of a character pair"),
        ([U("x"), A(None)], [], "message 2 holds a NoneType"),  # type: ignore[arg-type]
        ([U("x", 2000)], [], "more than 1024 images"),
        ([U("x")], [1], "a tool is a int"),
        ([U("x")], {"type": "function"}, "tools is a dict"),
        ([U("x")], [{"function": {"parameters": {"properties": []}}}], "properties of the parameters"),
        ([U("x")], [{"function": nested(200)}], "nested more than 100 times"),
        ([U("x")], [{"function": {"x": float("nan")}}], "a number that is too large"),
        ([U("x")], [{"function": {"x": 10**400}}], "a number that is too large"),
        ([U("x")], [{"function": {"x": object()}}], "holds a object"),
        ([U("x")], [{1: "x"}], "holds a int, where a text belongs"),
        ([Turn("assistant", tool_calls=(7,))], [], "a tool call is a int"),  # type: ignore[arg-type]
    ],
)
def test_what_no_conversation_is(turns: list[Turn], tools: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_turns(CHAT, turns, tools=tools)  # type: ignore[arg-type]


TEXTS = st.text(max_size=8) | st.sampled_from([*WORDS, "[img-0]", "[img]", "<image>"])
TURNS = st.builds(Turn, st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS, st.integers(0, 2))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(TURNS, max_size=6),
    st.sampled_from([LLAVA, CHATML, LLAMA3, CHAT]),
    st.sampled_from(["ollama", "reference"]),
)
def test_nobody_writes_a_token_or_an_image(turns: list[Turn], template: object, placement: str) -> None:
    """Whatever is said: the special tokens are those of the same conversation about nothing, the images those sent."""
    with contextlib.suppress(UserError):
        rendered = render_turns(template, turns, placement=placement)  # type: ignore[arg-type]
        dull = [Turn(turn.role, "x" if turn.content or turn.images else "", 0) for turn in turns]
        plain = render_turns(template, dull)  # type: ignore[arg-type]
        tokens = [[part.text for part in each.parts if part.kind == "special"] for each in (rendered, plain)]
        assert tokens[0] == tokens[1]
        assert set(rendered.images) == set(range(sum(turn.images for turn in turns)))
        assert len(rendered.images) == sum(part.kind == "image" for part in rendered.parts)
        assert not any(0xD800 <= ord(each) < 0xE000 for part in rendered.parts for each in part.text)
