"""What an answer must look like, as a user says it: a JSON schema, a list of choices, a regular expression, a grammar.

Nothing here knows tokens: `schema.py` compiles a form. Of JSON schemas only the words that the compiler
follows are let through, so that none is ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import unquote

from pumice.errors import UserError, nearest, shortened

MAX_CHARACTERS = 2**18
"""Of a schema, or of all choices together."""
MAX_GRAMMAR_CHARACTERS = 2**15
MAX_REGEX_CHARACTERS = 2**14
"""Of all patterns of a schema together, too: the compiler's time grows with the square."""
MAX_CHOICES = 10_000
MAX_SUBSCHEMAS = 1_000
"""The compiler's time grows with the square of a schema's properties."""
MAX_MULTIPLE = 10_000
"""`multipleOf`, as a whole number after its decimal point is gone: the compiler makes a state of each remainder, and of
several that meet in one number the product."""
MAX_EXACT = 2**53
"""Whole numbers beyond are not all doubles, and the compiler reads numbers as doubles."""

Kind = Literal["schema", "choices", "regex", "grammar"]

_WORDS_WITH_A_SCHEMA = ("items", "additionalProperties")
_WORDS_WITH_A_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_WORDS_WITH_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_WORDS_WITH_A_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
WORDS = frozenset(
    {
        *_WORDS_WITH_A_SCHEMA, *_WORDS_WITH_A_LIST, *_WORDS_WITH_NAMES, *_WORDS_WITH_A_NUMBER, "multipleOf", "$ref",
        "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties", "minLength",
        "maxLength", "pattern", "format",
    }
)  # fmt: skip
"""What a schema may say about a value. The rest is refused by name: a word that is ignored is a broken promise."""
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Formats of a string whose shape is followed; whether the day is in the calendar is not looked at."""
NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator"}
)
"""Words that say nothing about which values fit. OpenAPI's `discriminator` only repeats what `oneOf` says."""
_ROOT_NOTES = frozenset({"$schema", "$id"})


@runtime_checkable
class _PydanticModel(Protocol):
    """What is used of a pydantic model class, version 2. The names are pydantic's own."""

    def model_json_schema(self) -> dict[str, Any]: ...

    def model_validate_json(self, json_data: str) -> Any: ...


@dataclass(frozen=True)
class Form:
    """What an answer must look like; hashable, so that a compiled form can be kept. Made by `of`."""

    kind: Kind
    text: str
    """A schema or a list of choices as JSON; a regular expression or a grammar as it was given."""
    model: Any = None
    """The pydantic class whose schema it is."""

    @classmethod
    def of(
        cls, *, schema: Any = None, choices: Any = None, regex: Any = None, grammar: Any = None, closed: bool = False
    ) -> Form | None:
        """The form that one of four arguments describes; None where none is given.

        schema: a pydantic model class (version 2), a JSON schema as a dict or as JSON text, or a form, which is given
        back; choices: a list of texts; regex: in the syntax of Rust's `regex` crate, for the whole answer, a digit
        being 0 to 9; grammar: llguidance's Lark dialect with a rule `start`, or llama.cpp's GBNF with a rule `root`.
        closed: where a schema names properties and does not say `additionalProperties`, there are no others, as
        llama.cpp and so Ollama read one.

        Raises UserError for more than one argument, the wrong type, a JSON-schema word that is not followed (by its
        name), a recursion that no finite value ends, and what is too large.
        """
        given = {"schema": schema, "choices": choices, "regex": regex, "grammar": grammar}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UserError(f"an answer cannot have two forms: {' and '.join(named)}", hint="give one of them")
        match named:
            case ["schema"]:
                return schema if isinstance(schema, cls) else _of_schema(schema, closed)
            case ["choices"]:
                return _of_choices(choices)
            case ["regex"]:
                return cls("regex", _text("regex", regex, MAX_REGEX_CHARACTERS))
            case ["grammar"]:
                return cls("grammar", _text("grammar", grammar, MAX_GRAMMAR_CHARACTERS))
        return None

    def value(self, text: str) -> Any:
        """What a finished answer says: an instance of the pydantic model, the parsed JSON, or the text itself.

        Raises UserError for a text that does not have the form, as when it was cut short; and where the model's own
        validators refuse it.
        """
        try:
            if self.model is not None:
                return self.model.model_validate_json(text)
            if self.kind == "schema":
                return json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise UserError(
                f"the answer {shortened(text)} is not what the schema asks for: {problem}",
                hint="cut short, it needs more max_tokens; whole, a validator of the model refused it",
            ) from problem
        if self.kind == "choices" and text not in json.loads(self.text):
            raise UserError(
                f"the answer {shortened(text)} is none of the choices", hint="it was cut short: give more max_tokens"
            )
        return text


def _of_schema(schema: Any, closed: bool) -> Form:
    model = None
    if isinstance(schema, type) and isinstance(schema, _PydanticModel):
        model = schema
        try:
            schema = model.model_json_schema()
        except RuntimeError as problem:
            raise UserError(
                f"pydantic makes no JSON schema of {model.__name__}: {problem}", hint="use types that JSON has"
            ) from problem
    hint = "give a pydantic model class, a JSON schema as a dict, or its JSON text"
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        _text("schema", text, MAX_CHARACTERS)
        schema = json.loads(text, parse_constant=_no_number)
    except (TypeError, ValueError, RecursionError) as problem:
        raise UserError(f"the schema is not JSON: {problem}", hint=hint) from problem
    if not isinstance(schema, dict):
        raise UserError(f"the schema is {shortened(text)}, and not a JSON object", hint=hint)
    places = _places(schema)
    _check_ends(places)
    if model is not None or closed:
        _close([each for each in places.values() if isinstance(each, dict)])
    return Form("schema", json.dumps(schema), model)


def _of_choices(choices: Any) -> Form:
    hint = "give a list of texts, at least one: choices=['cat', 'dog']"
    if not isinstance(choices, Sequence) or isinstance(choices, str | bytes):
        raise UserError(f"choices is {choices!r:.100}, and not a list", hint=hint)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise UserError(f"there are {len(choices)} choices; 1 to {MAX_CHOICES} are possible", hint=hint)
    for choice in choices:
        if not isinstance(choice, str) or not choice or choice != choice.strip():
            raise UserError(
                f"the choice {choice!r:.100} is no text, or has nothing or white space at an end",
                hint="an answer is shown without white space around it: give texts without",
            )
    _text("choices", "".join(choices), MAX_CHARACTERS)
    return Form("choices", json.dumps(list(choices)))


def _text(name: str, text: Any, most: int) -> str:
    if not isinstance(text, str) or not text:
        raise UserError(f"{name} is {text!r:.100}", hint="give a text that is not empty")
    if len(text) > most:
        raise UserError(f"{name} has {len(text)} characters; {most} are possible", hint="give a smaller one")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise UserError(f"{name} holds half of a character pair (a lone surrogate)", hint="send UTF-8") from problem
    return text


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


_Places = dict[str, Any]
"""Every schema inside a schema, by its JSON pointer: `#/properties/name`."""


def _places(root: Mapping[str, Any]) -> _Places:
    """Raises UserError for what is not followed, with its place."""
    places: _Places = {}
    multiples: set[int] = set()
    patterns = 0
    waiting: list[tuple[str, Any]] = [("#", root)]
    while waiting:
        at, schema = waiting.pop()
        places[at] = schema
        if len(places) > MAX_SUBSCHEMAS:
            raise UserError(f"the schema has more than {MAX_SUBSCHEMAS} parts", hint="give a smaller one")
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise _wrong(at, f"is {shortened(repr(schema))}", "a schema is a JSON object, true or false")
        for word in schema.keys() - WORDS - NOTES - (_ROOT_NOTES if at == "#" else frozenset()):
            raise _wrong(at, f"says {shortened(word)}, which is not followed", nearest(word, WORDS))
        _check_values(at, schema)
        multiples |= {_whole(at, schema["multipleOf"])} if "multipleOf" in schema else set()
        waiting += _inside(at, schema)
        patterns += sum(map(len, (schema.get("pattern", ""), *schema.get("patternProperties", {}))))
    if patterns > MAX_REGEX_CHARACTERS:
        raise UserError(f"the schema's patterns have {patterns} characters", hint=f"keep to {MAX_REGEX_CHARACTERS}")
    if math.prod(multiples) > MAX_MULTIPLE:
        raise UserError(f"multipleOf: {sorted(multiples)} are too large together", hint=f"keep below {MAX_MULTIPLE}")
    return places


def _inside(at: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly in one."""
    for word in _WORDS_WITH_A_SCHEMA:
        if word in schema:
            yield f"{at}/{word}", schema[word]
    for word in _WORDS_WITH_A_LIST:
        if not isinstance(schema.get(word, []), list):
            raise _wrong(at, f"has a {word} that is no list", "give a list of schemas")
        yield from ((f"{at}/{word}/{index}", each) for index, each in enumerate(schema.get(word, [])))
    for word in _WORDS_WITH_NAMES:
        if not isinstance(schema.get(word, {}), dict):
            raise _wrong(at, f"has {word} that is no object", "give schemas by their names")
        for name, each in schema.get(word, {}).items():
            yield f"{at}/{word}/{_escaped(name)}", each


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check_values(at: str, schema: Mapping[str, Any]) -> None:
    required, least = schema.get("required", []), schema.get("minItems", 0)
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _wrong(at, f"has required {shortened(repr(required))}", "give a list of names")
    if not isinstance(least, int) or least < 0:
        raise _wrong(at, f"has minItems {least!r:.40}", "give a whole number")
    format, pattern = schema.get("format", "uri"), schema.get("pattern", "")
    if format not in FORMATS:
        raise _wrong(at, f"has the format {shortened(str(format))}", nearest(str(format), FORMATS))
    if not isinstance(pattern, str):
        raise _wrong(at, f"has the pattern {shortened(repr(pattern))}", "give a text")
    named = [schema[word] for word in _WORDS_WITH_A_NUMBER if word in schema]
    waiting = [*named, schema.get("const"), schema.get("enum")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | dict):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and abs(value) > MAX_EXACT:
            raise _wrong(at, f"has the number {value!r:.40}", f"numbers from -{MAX_EXACT} to {MAX_EXACT} are followed")


def _whole(at: str, multiple: Any) -> int:
    """A `multipleOf` without its decimal point: 25 for 0.25."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not 0 < multiple <= MAX_MULTIPLE:
        raise _wrong(at, f"has multipleOf {multiple!r:.40}", f"give a number above 0, at most {MAX_MULTIPLE}")
    digits = Decimal(str(multiple)).normalize().as_tuple()
    return int("".join(map(str, digits.digits))) * 10 ** max(0, int(digits.exponent))


def _check_ends(places: _Places) -> None:
    """Refuse a recursion without a way out: to begin such a value would be never to end it.

    A schema has a finite value when all that it demands have one: the least set of such schemas is grown until it
    stands still.
    """
    demands = {at: list(_demands(at, schema, places)) for at, schema in places.items()}
    finite: set[str] = set()
    while True:
        more = {
            at
            for at, groups in demands.items()
            if at not in finite and all(any(each in finite for each in group) for group in groups)
        }
        if not more:
            break
        finite |= more
    for at in demands.keys() - finite:
        raise _wrong(at, "needs itself without end", "make the recursive part optional, or let a list of it be empty")


def _demands(at: str, schema: Any, places: _Places) -> Iterator[list[str]]:
    """What a value of this schema holds at least: of each list one."""
    if isinstance(schema, bool):
        return
    if "$ref" in schema:
        target = unquote(str(schema["$ref"]))
        if target not in places:
            raise _wrong(at, f"has a $ref to {shortened(target)}", "only parts of the schema itself: #/$defs/NAME")
        yield [target]
    yield from ([f"{at}/allOf/{index}"] for index in range(len(schema.get("allOf", []))))
    for word in ("anyOf", "oneOf"):
        if schema.get(word):
            yield [f"{at}/{word}/{index}" for index in range(len(schema[word]))]
    if schema.get("type") == "object":
        for name in schema.get("required", []):
            own = f"{at}/properties/{_escaped(name)}"
            yield from [[each] for each in (own, f"{at}/additionalProperties") if each in places][:1]
    if schema.get("type") == "array":
        items = [f"{at}/prefixItems/{index}" for index in range(len(schema.get("prefixItems", [])))] + [f"{at}/items"]
        yield from ([each] for each in items[: schema.get("minItems", 0)] if each in places)


def _close(schemas: Sequence[dict[str, Any]]) -> None:
    """No fields are asked for beside those with a name. Left open: what must have more of them, and all of a schema
    that describes an object in several parts, which would exclude each other's names."""
    parts = ("properties", "$ref", "anyOf", "oneOf", "allOf")
    if any(len(each.get("allOf", [])) > 1 or sum(part in each for part in parts) > 1 for each in schemas):
        return
    for schema in schemas:
        names = schema.get("properties", {}).keys()
        if "properties" in schema and names >= set(schema.get("required", [])) and "minProperties" not in schema:
            schema.setdefault("additionalProperties", False)


def _wrong(at: str, what: str, hint: str) -> UserError:
    return UserError(f"the schema at {at if len(at) < 100 else at[:100] + '…'} {what}", hint=hint)
