"""Answers in a form: random walks through compiled forms against json, jsonschema, pydantic and re; what is refused."""

from __future__ import annotations

import datetime
import enum
import functools
import ipaddress
import json
import random
import re
import threading
import time
import uuid
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from conftest import HERE
from pumice import UserError, store
from pumice.engine import form as forms
from pumice.engine import schema as schemas
from pumice.engine.schema import Form, Grammar, Guide, compile_form
from pumice.tokenizer import Tokenizer
from test_tokenizer import ENDS, TINY_JSON, TINY_MODEL, vocabulary

PATIENCE_S = 60.0
"""Many times what anything here takes, also on a busy machine."""


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    match name:
        case "json":
            return Tokenizer.from_json(TINY_JSON, config=ENDS)
        case "legacy" | "nonlegacy":
            return Tokenizer.from_sentencepiece(TINY_MODEL, config={"legacy": name == "legacy"})
        case "bytes" | "nfc":
            made: tokenizers.Tokenizer = tiny._tokenizer(tiny.LANGUAGE_MODELS["llama3"])
            if name == "nfc":
                made.normalizer = tokenizers.normalizers.NFC()
            return Tokenizer.from_json(made.to_str(), config={"eos_token": "<|eot_id|>", "pad_token": "<pad>"})
        case "pebble":
            return Tokenizer.from_folder(store.resolve("pebble"))
    return real(name)


def real(name: str) -> Tokenizer:
    """A vocabulary out of one of llama.cpp's GGUF files."""
    from pumice.checkpoints import gguf_vocab
    from pumice.checkpoints.fields import Fields

    return gguf_vocab.tokenizer(Fields(vocabulary(name)[2], name))


SMALL = ("json", "legacy", "nonlegacy", "bytes", "pebble")
REAL = ("llama-spm", "llama-bpe")


def stop_id(name: str) -> int:
    found = tokenizer(name).eos_id
    assert found is not None
    return found


@functools.cache
def closing(name: str) -> torch.Tensor:
    """A push towards the end: tokens that close something."""
    made = tokenizer(name)
    closes = [
        any(mark in made.bytes_of(id) for mark in (b'"', b"}", b"]")) or id == stop_id(name)
        for id in range(made.vocab_size)
    ]
    return torch.tensor(closes).float() * 3


def compiled(name: str, **said: Any) -> Grammar:
    form = Form.of(**said)
    assert form is not None
    return compile_form(form, tokenizer(name), (stop_id(name),))


def walk(grammar: Grammar, name: str, seed: int, most: int = 400) -> str | None:
    """Random allowed tokens until an end token: the text as it is shown, None where it grew too long.

    At some places the forced tokens are taken first, as the engine does.
    """
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    made, guide, ids = tokenizer(name), grammar.guide(), []
    while len(ids) < most:
        if rng.random() < 0.5:
            for token in guide.forced():
                guide.push(token)
                ids.append(token)
        scores_V = guide.mask(torch.randn(made.vocab_size, generator=noise) + closing(name) * rng.random())
        token = int(scores_V.argmax())
        assert scores_V[token].isfinite()
        if guide.ended:
            assert allowed(guide, made) == [stop_id(name)]
        guide.push(token)
        ids.append(token)
        if token == stop_id(name):
            assert all(made.bytes_of(each) for each in ids[:-1]), "a token without text came"
            return made.decode(ids).strip()
    return None


def allowed(guide: Guide, made: Tokenizer) -> list[int]:
    found: list[int] = guide.mask(torch.zeros(made.vocab_size)).isfinite().nonzero()[:, 0].tolist()
    return found


def accepts(grammar: Grammar, name: str, text: str) -> bool:
    """Whether every token of a text, as the vocabulary writes it, and then the end may come."""
    made, guide = tokenizer(name), grammar.guide()
    for token in [*made.continued(text), stop_id(name)]:
        if token not in allowed(guide, made):
            return False
        guide.push(token)
    return True


def texts(grammar: Grammar, name: str, walks: int = 12) -> list[str]:
    found = [text for seed in range(walks) if (text := walk(grammar, name, seed)) is not None]
    assert found, "no walk came to its end"
    return found


RECEIPT = {
    "type": "object",
    "properties": {
        "shop": {"type": "string", "minLength": 1, "maxLength": 12},
        "total": {"type": "number", "minimum": 0, "maximum": 1000},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 2},
        "paid": {"enum": ["cash", "card", None]},
        "naïve ключ": {"type": ["integer", "null"]},
    },
    "required": ["shop", "total", "items", "paid"],
    "additionalProperties": False,
    "$defs": {"item": {"type": "object", "properties": {"n": {"type": "integer", "exclusiveMinimum": 3}}}},
}


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_walks_keep_to_a_schema(name: str) -> None:
    grammar = compiled(name, schema=RECEIPT)
    for text in texts(grammar, name):
        value = json.loads(text)
        jsonschema.validate(value, RECEIPT)
        assert grammar.form.value(text) == value
        assert text == json.dumps(value, ensure_ascii=False) or any(each in text for each in ("\\", "e", "E", ".", "-"))


CHOICES = ["yes", "yes, both", "no", "étoile 星", '"quoted"', "a\nb"]


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_walks_end_in_choices(name: str) -> None:
    grammar = compiled(name, choices=CHOICES)
    found = texts(grammar, name, walks=60)
    assert set(found) <= set(CHOICES)
    assert len(set(found)) > 2
    assert [grammar.form.value(text) for text in found] == found
    assert all(accepts(grammar, name, choice) for choice in CHOICES)
    assert not accepts(grammar, name, "yes,")


REGEXES = [
    r"[A-Z][a-z]{2,8} \d{1,4}", r"(\+\d{1,3} )?(\d{3}-){1,2}\d{4}", r"\s*(cat|dog)s?[ .!]*", r"(?i)stop|go", r"(a|b)*c",
    r"[^\n]{0,10}", r"/x\\y/?", r"[^ -~]{1,3}", "two\nlines", r"^[a-zé]+(, [^\d,]+)*$", r'"[^"]*"', r"(a+)+b",
]  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("name", ["json", "legacy", "bytes"])
def test_walks_match_a_regex(name: str, regex: str) -> None:
    grammar = compiled(name, regex=regex)
    for text in texts(grammar, name):
        assert re.fullmatch(regex, text), text
        assert grammar.form.value(text) == text


@pytest.mark.parametrize("name", REAL)
def test_walks_match_a_regex_in_a_real_vocabulary(name: str) -> None:
    for regex in REGEXES[:3]:
        assert all(re.fullmatch(regex, text) for text in texts(compiled(name, regex=regex), name, walks=4))


SUMS = """
start: sum
sum: product | sum "+" product
product: atom | product "*" atom
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
SUMS_GBNF = """
root    ::= product ("+" product)*   # llama.cpp's way
product ::= atom ("*" atom)*
atom    ::= [1-9] [0-9]? | "(" root ")"
"""


@pytest.mark.parametrize("grammar", [SUMS, SUMS_GBNF], ids=["lark", "gbnf"])
@pytest.mark.parametrize("name", ["json", "bytes"])
def test_walks_keep_to_a_grammar(name: str, grammar: str) -> None:
    made = compiled(name, grammar=grammar)
    found = texts(made, name, walks=80)
    for text in found:
        assert re.fullmatch(r"[0-9+*()]+", text)
        assert isinstance(eval(text), int)  # Python reads sums as the grammar does
        assert made.form.value(text) == text
    assert any("(" in text for text in found)
    assert accepts(made, name, "(1+2)*34")
    assert not accepts(made, name, "(1+2")


@pytest.mark.parametrize("name", SMALL)
def test_a_space_in_front_is_allowed_and_not_shown(name: str) -> None:
    """Most models begin with one: `▁{`."""
    made = tokenizer(name)
    for said in ({"schema": {"type": "null"}}, {"choices": ["null"]}, {"regex": "null"}, {"grammar": 'start: "null"'}):
        grammar = compiled(name, **said)
        assert accepts(grammar, name, "null")
        assert accepts(grammar, name, " null")
        assert not accepts(grammar, name, "  null")
        assert made.decode(made.continued(" null")).strip() == "null"


@pytest.mark.parametrize("text", ["e\u0301te\u0301", "▁mark▁", "fin \ufb01"])
@pytest.mark.parametrize("name", ["json", "legacy", "nfc"])
def test_a_text_that_the_tokenizer_would_change_comes_unchanged(name: str, text: str) -> None:
    """A composed accent, a literal space mark."""
    for said in ({"choices": [text]}, {"schema": {"const": text}}):
        grammar = compiled(name, **said)
        assert {grammar.form.value(each) for each in texts(grammar, name)} == {text}


def test_specials_and_images_never_come() -> None:
    for name in SMALL:
        made, guide = tokenizer(name), compiled(name, regex=r"(?s:.*)").guide()
        free = set(allowed(guide, made))
        silent = {id for id in range(made.vocab_size) if not made.decode([id]).strip() and made.id_of("<image>") == id}
        words = ("<s>", "</s>", "<unk>", "<image>", "<pad>", "<|begin_of_text|>", "<|eot_id|>")
        specials = {id for word in words if (id := made.id_of(word)) is not None} - {stop_id(name)}
        assert specials | silent
        assert not free & (specials | silent)
        assert len(free) > 100
        with pytest.raises(AssertionError):
            guide.push(min(specials))


def test_words_of_templates_never_come_where_a_vocabulary_calls_them_ordinary() -> None:
    spec = json.loads(TINY_JSON.read_text(encoding="utf-8"))
    spec["added_tokens"] = [each | {"special": False} for each in spec["added_tokens"]]
    made = Tokenizer.from_json(json.dumps(spec))
    words = {word: made.id_of(word) for word in ("<unk>", "<s>", "</s>", "<image>")}
    assert all(made.decode([id]) for word, id in words.items() if word != "<image>")
    guide = compile_form(Form.of(regex="(?s:.*)"), made, [words["</s>"]]).guide()
    assert set(allowed(guide, made)) & set(words.values()) == {words["</s>"]}


def test_any_of_several_end_tokens_may_come() -> None:
    made = tokenizer("json")
    stops = (made.id_of("</s>"), made.id_of("<pad>"))
    guide = compile_form(Form.of(choices=["a", "ab"]), made, stops).guide()
    assert not set(stops) & set(allowed(guide, made))
    assert not guide.ended
    (a,) = made.continued("a")
    guide.push(a)
    assert {*stops} < set(allowed(guide, made))
    assert not guide.ended
    guide.push(made.continued("b")[0])
    assert guide.ended
    assert set(allowed(guide, made)) == set(stops)
    assert guide.forced() == []
    with pytest.raises(AssertionError):
        guide.push(a)
    guide.push(stops[1])


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(UserError, match="no end token"):
        compile_form(Form.of(choices=["a"]), tokenizer("json"), ())


@pytest.mark.parametrize("more", [-30, -1, 1, 7, 64, 1000])
def test_the_model_may_have_more_or_fewer_tokens(more: int) -> None:
    made = tokenizer("json")
    grammar = compiled("json", regex=r"[a-z]+")
    whole_V = grammar.guide().mask(torch.zeros(made.vocab_size))
    other_V = grammar.guide().mask(torch.zeros(made.vocab_size + more))
    shared = min(len(whole_V), len(other_V))
    assert torch.equal(whole_V[:shared], other_V[:shared])
    assert not other_V[shared:].isfinite().any()


def test_allowed_scores_stay_as_they_are() -> None:
    made = tokenizer("json")
    scores_V = torch.randn(made.vocab_size, generator=torch.Generator().manual_seed(3))
    kept = scores_V.clone()
    masked_V = compiled("json", regex=r"[a-z]+").guide().mask(scores_V)
    assert torch.equal(scores_V, kept)
    assert torch.equal(masked_V[masked_V.isfinite()], scores_V[masked_V.isfinite()])
    assert 0 < masked_V.isfinite().sum() < made.vocab_size


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_forced_tokens_are_those_of_the_vocabulary(name: str) -> None:
    """With one possible text, all tokens after the first are forced, and written as the tokenizer writes them."""
    made, text = tokenizer(name), "The sign says: stop, and go — 12 étoiles {red}"
    guide = compiled(name, choices=[text]).guide()
    assert guide.forced() == []  # a space may stand in front
    first, *rest = made.continued(text)
    guide.push(first)
    forced = []
    while found := guide.forced():
        forced += found
        for token in found:
            assert token in allowed(guide, made)
            guide.push(token)
        if guide.ended:
            break
    while not guide.ended:  # the last may be written in several ways
        (token,) = [each for each in rest[len(forced) :][:1] if each in allowed(guide, made)]
        forced.append(token)
        guide.push(token)
    assert forced == rest
    assert len(forced) > 3


def test_names_of_a_schema_are_forced() -> None:
    made, guide = tokenizer("bytes"), compiled("bytes", schema=RECEIPT).guide()
    guide.push(made.continued("{")[0])
    forced = guide.forced()
    assert b"".join(map(made.bytes_of, forced)).startswith(b'"shop":')


def test_compiled_once_followed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = compiled("json", choices=["abc", "abd"])
    monkeypatch.setattr(schemas, "LLMatcher", None)
    made, one, other = tokenizer("json"), grammar.guide(), grammar.guide()
    before = allowed(other, made)
    for token in made.continued("abc"):
        one.push(token)
    assert one.ended
    assert not other.ended
    assert allowed(other, made) == before


# Schemas: soundness against jsonschema, and completeness by values that fit.

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6)
NUMBERS = st.integers(-1000, 1000) | st.sampled_from([0.5, -2.25, 0.1, 99.99, 1e-3])
NAMES = st.sampled_from(["a", "b c", "é", "x/y", "q~", 'say "hi"', "naïve"])
VALUES = st.none() | st.booleans() | NUMBERS | TEXTS


def bounds(low: str, high: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(values, max_size=2, unique=True).map(lambda pair: dict(zip((low, high), sorted(pair))))


def typed(kind: str, *parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: functools.reduce(lambda a, b: a | b, found, {"type": kind}))


def maybe(**words: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=words)


LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"const": {"k": [1, None]}}, {"const": -0.5}]),
    typed("string", bounds("minLength", "maxLength", st.integers(0, 5))),
    typed("string", st.sampled_from([{"pattern": each} for each in ("^a+b?$", "[0-9]{2}", "x|y", r"^\d\w$", "é")])),
    typed(
        "integer", bounds("minimum", "maximum", st.integers(-300, 300)), maybe(multipleOf=st.sampled_from([1, 2, 7]))
    ),
    typed("number", bounds("exclusiveMinimum", "exclusiveMaximum", NUMBERS)),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    fields = st.dictionaries(NAMES, inner, max_size=3)
    objects = fields.flatmap(
        lambda found: typed(
            "object",
            st.just({"properties": found}),
            maybe(required=st.lists(st.sampled_from([*found, "more"]), unique=True)),
            st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}}]),
        )
    )
    arrays = typed(
        "array",
        maybe(items=inner, prefixItems=st.lists(inner, min_size=1, max_size=2)),
        bounds("minItems", "maxItems", st.integers(0, 3)),
    )
    several = st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found})
    both = st.tuples(inner, inner).map(lambda pair: {"allOf": list(pair)})
    return objects | arrays | several | both


SCHEMAS = st.recursive(LEAVES, nested, max_leaves=6)


@settings(max_examples=120, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 999))
def test_what_a_guide_allows_fits_the_schema(schema: dict[str, Any], seed: int) -> None:
    try:
        grammar = compiled("json", schema=schema)
    except UserError as refused:
        # What no value fits is found in several places; a word or a bug must not hide among them.
        if re.search("Unsatisfiable|no text has|unsatisfiable|Regex is empty", refused.message):
            return
        raise
    text = walk(grammar, "json", seed)
    if text is not None:
        jsonschema.Draft202012Validator(schema).validate(grammar.form.value(text))


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner), max_leaves=6)
)
def test_a_value_that_fits_is_allowed(value: Any) -> None:
    """As json.dumps writes it: any value by the schema that says nothing, and by its own constant."""
    text = json.dumps(value, ensure_ascii=False)
    if "\x7f" in text or re.search(r"[eE][+-]?\d", text):
        return
    assert accepts(compiled("json", schema={"$comment": "anything"}), "json", text)
    assert accepts(compiled("json", schema={"const": value}), "json", text)
    other = {"const": [value]}
    assert not accepts(compiled("json", schema=other), "json", text)


FORMATS = {
    "date": datetime.date.fromisoformat,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
}


@pytest.mark.parametrize("format", sorted(forms.FORMATS))
def test_formats(format: str) -> None:
    grammar = compiled("json", schema={"type": "string", "format": format})
    examples = {
        "date-time": "2024-02-29T12:30:00Z", "time": "12:30:00Z", "date": "2024-02-29", "duration": "P1DT2H",
        "email": "a.b@example.org", "hostname": "example.org", "ipv4": "127.0.0.1", "ipv6": "fe80::1",
        "uuid": "12345678-1234-5678-1234-567812345678", "uri": "https://example.org/a?b=c",
    }  # fmt: skip
    assert accepts(grammar, "json", json.dumps(examples[format]))
    assert not accepts(grammar, "json", '"no such thing!"')
    for text in texts(grammar, "json", walks=6):
        FORMATS.get(format, str)(json.loads(text))


# pydantic


class Colour(enum.Enum):
    RED, BLUE = "red", "blue"


class Circle(pydantic.BaseModel):
    kind: Literal["circle"]
    radius: float = pydantic.Field(gt=0, le=10)


class Square(pydantic.BaseModel):
    kind: Literal["square"]
    side_px: int = pydantic.Field(alias="side")


class Drawing(pydantic.BaseModel):
    colour: Colour
    shape: Circle | Square = pydantic.Field(discriminator="kind")
    day: datetime.date | None
    corners: list[tuple[int, int]] = pydantic.Field(max_length=2)
    notes: dict[str, bool] | None = None


class Tree(pydantic.BaseModel):
    name: Literal["leaf", "node"]
    children: list[Tree] = pydantic.Field(max_length=2)


class Even(pydantic.BaseModel):
    number: int

    @pydantic.field_validator("number")
    @classmethod
    def is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("not even")
        return value


@pytest.mark.parametrize("model", [Drawing, Tree, Circle])
@pytest.mark.parametrize("name", ["json", "bytes"])
def test_walks_make_pydantic_models(name: str, model: type[pydantic.BaseModel]) -> None:
    grammar = compiled(name, schema=model)
    for text in texts(grammar, name):
        value = grammar.form.value(text)
        assert isinstance(value, model)
        assert value == model.model_validate_json(text)
        # Fields that the model does not have are not asked for.
        assert json.loads(text).keys() <= {field.alias or name for name, field in model.model_fields.items()}


def test_what_a_validator_refuses_is_an_error_of_the_user() -> None:
    form = Form.of(schema=Even)
    assert form.value('{"number": 4}') == Even(number=4)
    with pytest.raises(UserError, match="not even"):
        form.value('{"number": 3}')


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"schema": {"type": "array"}}, "[1, 2"), ({"schema": Circle}, '{"kind": "cir'), ({"choices": ["cat"]}, "ca"),
        ({"schema": {"type": "integer"}}, "9" * 5000), ({"schema": {"type": "array"}}, "[" * 100_000),
    ],
    ids=["json", "model", "choice", "digits", "deep"],
)  # fmt: skip
def test_an_answer_cut_short_has_no_value(said: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=r"max_tokens|none of the choices"):
        Form.of(**said).value(text)


@pytest.mark.parametrize(("schema", "closed"), [
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, True),
    ({"type": "array", "items": {"type": "object", "properties": {"a": {}}, "required": ["a"]}}, True),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, False),
    ({"type": "object"}, False),
    ({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, False),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 2, "required": ["a"]}, False),
    ({"type": "object", "properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}, False),
    ({"allOf": [{"type": "object", "properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
])  # fmt: skip
def test_a_closed_schema_has_no_other_names(schema: dict[str, Any], closed: bool) -> None:
    """And is left open where closed no text would fit it, or where its parts would exclude each other's names."""
    value = '{"a": 1, "b": 2}' if schema.get("type") != "array" else '[{"a": 1, "b": 2}]'
    assert accepts(compiled("json", schema=schema), "json", value)
    assert accepts(compiled("json", schema=schema, closed=True), "json", value) != closed


def test_equal_forms_are_equal() -> None:
    """What a compiled form can be kept under."""
    assert Form.of(choices=["a", "b"]) == Form.of(choices=("a", "b"))
    assert len({Form.of(schema=Tree), Form.of(schema=Tree), Form.of(schema=Tree.model_json_schema())}) == 2
    assert Form.of() is None
    assert Form.of(schema=json.dumps(RECEIPT)) == Form.of(schema=RECEIPT)


# What is refused


def chain(length: int, link: str) -> dict[str, Any]:
    """Definitions each of which needs the next."""
    parts = {f"d{index}": json.loads(link % f"#/$defs/d{index + 1}") for index in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": parts | {f"d{length}": {"type": "null"}}}


UNFOLLOWED = [
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "$anchor",
    "additionalItems", "$dynamicRef", "$recursiveRef", "$vocabulary", "contentEncoding", "contentMediaType", "nullable",
    "minLenght", "x-guidance", "$id",
]  # fmt: skip


@pytest.mark.parametrize("word", UNFOLLOWED)
def test_words_that_are_not_followed_are_refused_by_name(word: str) -> None:
    with pytest.raises(UserError, match=rf"#/items/properties/p says '{re.escape(word)}'"):
        Form.of(schema={"type": "array", "items": {"type": "object", "properties": {"p": {word: {}}}}})


ENDLESS = [
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 2},
    {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]},
    {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}},
]
RECURSIVE = [
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 1, "items": False},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": 1}]},
]


@pytest.mark.parametrize("schema", ENDLESS, ids=json.dumps)
def test_a_recursion_without_a_way_out_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="without end"):
        Form.of(schema=schema)


@pytest.mark.parametrize("schema", RECURSIVE, ids=json.dumps)
def test_a_recursion_with_a_way_out_is_followed(schema: dict[str, Any]) -> None:
    grammar = compiled("json", schema=schema)
    for text in texts(grammar, "json"):
        jsonschema.validate(json.loads(text), schema)


def optional(parts: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": {} for index in range(parts)}}


def either(parts: int) -> dict[str, Any]:
    return {"allOf": [{"anyOf": [{"minLength": index}, {"maxLength": 99 + index}]} for index in range(parts)]}


def rules(count: int, form: str) -> str:
    """Rules each of which needs the next."""
    return "".join(f"r{index}{form % f'r{index + 1}'}\n" for index in range(count))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two forms": ({"regex": "a", "choices": ["a"]}, "choices and regex"),
    "schema of a number": ({"schema": 3}, "not a JSON object"),
    "schema of a class": ({"schema": int}, "not JSON"),
    "schema of broken text": ({"schema": '{"type": '}, "not JSON"),
    "schema with NaN": ({"schema": '{"const": NaN}'}, "NaN"),
    "schema that holds itself": ({"schema": (lambda made: made.update(a=made) or made)({})}, "not JSON"),
    "deep schema": ({"schema": '{"items":' * 100_000 + "{}" + "}" * 100_000}, "possible|not JSON"),
    "deeper than the compiler": ({"schema": '{"items":' * 200 + "{}" + "}" * 200}, "recursion"),
    "unknown type": ({"schema": {"type": "text"}}, "text"),
    "unknown format": ({"schema": {"type": "string", "format": "iban"}}, "iban"),
    "look-ahead in a pattern": ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
    "overlapping oneOf": ({"schema": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}}, "oneOf"),
    "far ref": ({"schema": {"$ref": "https://example.org/s.json"}}, "example.org"),
    "lost ref": ({"schema": {"$ref": "#/$defs/none"}}, "none"),
    "ref to no schema": ({"schema": {"type": "object", "required": ["a"], "$ref": "#/required"}}, "required"),
    "nothing fits": ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "greater"),
    "no choice fits": ({"schema": {"enum": []}}, "anyOf is empty|Unsatisfiable"),
    "a number that no double is": ({"schema": {"const": 2**53 + 1}}, "number"),
    "multipleOf of many states": ({"schema": {"type": "integer", "multipleOf": 99_999_989}}, "multipleOf"),
    "several multipleOf": ({"schema": {"allOf": [{"multipleOf": each} for each in (97, 89, 83)]}}, "large together"),
    "too many parts": ({"schema": optional(2000)}, "parts"),
    "too many optional parts": ({"schema": optional(900)}, "items"),
    "2**20 combinations": ({"schema": either(20)}, "large"),
    "a billion items": ({"schema": {"type": "array", "items": {"type": "null"}, "minItems": 10**9}}, "farther"),
    "long patterns": ({"schema": {"type": "string", "pattern": "(a?)" * 5000}}, "patterns"),
    "required of a number": ({"schema": {"type": "object", "required": 3}}, "required"),
    "items of a text": ({"schema": {"type": "array", "items": "string"}}, "#/items is"),
    "half a character pair": ({"schema": {"const": "\ud800"}}, "hex|surrogate"),
    "huge schema": ({"schema": {"enum": ["x" * 50] * 10_000}}, "characters"),
    "choices in one text": ({"choices": "abc"}, "not a list"),
    "no choices": ({"choices": []}, "0 choices"),
    "100000 choices": ({"choices": [str(each) for each in range(100_000)]}, "100000 choices"),
    "a choice with a space": ({"choices": ["cat", " dog"]}, "dog"),
    "an empty choice": ({"choices": ["cat", ""]}, "''"),
    "a choice that is no text": ({"choices": [3]}, "3"),
    "half a pair in a choice": ({"choices": ["\ud800"]}, "surrogate"),
    "empty regex": ({"regex": ""}, "regex is ''"),
    "regex that is no text": ({"regex": 5}, "regex is 5"),
    "regex of white space": ({"regex": r"\s+"}, "no text has the form"),
    "regex of nothing": ({"regex": r"[^\s\S]"}, "not followed|no text"),
    "open regex": ({"regex": "(a"}, "unclosed"),
    "regex with half an escape": ({"regex": "a\\"}, "half an escape"),
    "verbose regex": ({"regex": "(?x)a # one\nb"}, "several lines"),
    "back-reference": ({"regex": r"(a)\1"}, "backreferences"),
    "look-behind": ({"regex": r"(?<!a)b"}, "look-around"),
    "regex of a million states": ({"regex": "[a-z]{1000000}"}, "fuel|too"),
    "catastrophic regex": ({"regex": "((a{0,100}){0,100}){0,100}b{1000000}"}, "fuel|too"),
    "nested regex": ({"regex": "(" * 2000 + "a" + ")" * 2000}, "not followed"),
    "long regex": ({"regex": "a" * 100_000}, "characters"),
    "grammar of words": ({"grammar": "say yes"}, "not followed"),
    "lost rule": ({"grammar": "start: x"}, "unknown name"),
    "grammar without a way out": ({"grammar": 'start: start "a"'}, "no text"),
    "grammar that is forced without end": ({"grammar": 'start: "a" start'}, "farther"),
    "special token by name": ({"grammar": "start: <s>"}, "'<'"),
    "tokens by number": ({"grammar": 'start: "a" <[1-5]>'}, "'<'"),
    "temperature in a grammar": ({"grammar": "start: x\nx[temperature=0.5]: /a+/"}, "temperature"),
    "hidden stop in a grammar": ({"grammar": 'start: x "b"\nx[stop="b"]: /a+/'}, "stop"),
    "schema in a grammar": ({"grammar": 'start: %json {"type": "integer", "multipleOf": 99999989}'}, "%json"),
    "chain of rules": ({"grammar": "start: r0\n" + rules(2000, ": %s") + 'r2000: "a"'}, "rules"),
    "huge grammar": ({"grammar": 'start: "a"' * 10_000}, "characters"),
    "nested grammar": ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "nested"),
    "GBNF without root": ({"grammar": 'x ::= "a"'}, "root"),
    "lost GBNF rule": ({"grammar": "root ::= x"}, "'x' not found"),
    "open GBNF text": ({"grammar": 'root ::= "a'}, "end of input"),
    "GBNF that ends in a backslash": ({"grammar": 'root ::= "a\\'}, "GBNF"),
    "nested GBNF": ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "GBNF"),
    "chain of GBNF rules": ({"grammar": "root ::= r0\n" + rules(1500, " ::= %s")}, "rules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_bounded_time(case: str) -> None:
    said, words = REFUSED[case]
    started = time.process_time()
    with pytest.raises(UserError, match=words) as refused:
        compiled("json", **said)
    assert time.process_time() - started < PATIENCE_S
    assert len(refused.value.message) < 1000
    assert refused.value.hint


LARGE: dict[str, dict[str, Any]] = {
    "10000 choices": {"choices": [f"choice {each * 7919 % 10_000}" for each in range(10_000)]},
    "enum of 10000": {"schema": {"enum": [f"value {each * 7919 % 10_000}" for each in range(10_000)]}},
    "900 demanded parts": {
        "schema": optional(900) | {"required": list(optional(900)["properties"]), "additionalProperties": False}
    },
    "2**30 by reference": {
        "schema": chain(30, '{"type": "array", "prefixItems": [{"$ref": "%s"}, {"type": "null"}], "items": false}')
    },
    "900 references": {"schema": chain(900, '{"$ref": "%s"}')},
    "450 objects": {"schema": chain(450, '{"type": "object", "properties": {"a": {"$ref": "%s"}}}')},
    "490 rules": {"grammar": "start: r0\n" + rules(490, ': %s "b"?') + 'r490: "a"'},
    "regex of many states": {"regex": r"(.*a.{15}){15}"},
    "regex of nested repeats": {"regex": "((((a{0,50}b){0,50}c){0,50}d){0,50}e){0,50}f"},
    "regex of optional parts": {"regex": "".join(f"(w{n})?" for n in range(2000)) + "x"},
    "a string of any length": {"schema": {"type": "string", "minLength": 10**9}},
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_large_forms_take_bounded_time_on_a_small_stack(case: str) -> None:
    """The compiler calls itself along references; the caller's stack has no room for that."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            guide = compiled("json", **LARGE[case]).guide()
            for _ in range(30):
                scores_V = guide.mask(torch.arange(tokenizer("json").vocab_size, dtype=torch.float32))
                if guide.ended:
                    break
                guide.push(int(scores_V.argmax()))
        except BaseException as problem:
            failed.append(problem)

    started, before = time.process_time(), threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert not failed or isinstance(failed[0], UserError), failed
    assert time.process_time() - started < PATIENCE_S


def test_the_page_of_structured_answers_names_what_is_followed() -> None:
    page = (HERE.parent / "docs" / "structured.md").read_text(encoding="utf-8")
    for word in (forms.WORDS | forms.NOTES | forms.FORMATS) - {"$defs", "definitions", "$comment"}:
        assert f"`{word}`" in page, word
