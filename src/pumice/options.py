"""The `options` of Ollama: what a request, a model's params layer and a Modelfile's PARAMETER may set.

One table, the fields of `Options`: name, type, default. Facts: Ollama's api/types.go, Options and Runner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from pumice.errors import UserError, nearest, shortened
from pumice.go_template import float_text, quoted


@dataclass(frozen=True)
class Options:
    """How an answer is drawn, and (from `num_ctx` on) how a model is loaded. None: whoever loads the model decides.

    num_predict: -1 and -2 are as much as fits. repeat_penalty: 1.0, as Ollama has it since 0.32; before it was 1.1.
    """

    num_keep: int = 4
    seed: int = -1
    num_predict: int = -1
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    temperature: float = 0.8
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    num_ctx: int | None = None
    num_batch: int = 512
    num_gpu: int = -1
    main_gpu: int = 0
    use_mmap: bool | None = None
    num_thread: int = 0
    draft_num_predict: int | None = None

    def updated(self, given: Mapping[str, object]) -> tuple[Options, tuple[str, ...]]:
        """With what a params layer or a request gives, and the names in it that are none of ours, which are ignored.

        A null is as if it were not there; a whole number may come as 40.0 and is cut; `stop` replaces the list that
        was there. Raises UserError in Ollama's words for a value of another type.
        """
        known: dict[str, Any] = {
            name: _valued(name, value) for name, value in given.items() if name in KINDS and value is not None
        }
        return replace(self, **known), tuple(name for name in given if name not in KINDS)


KINDS: Mapping[str, str] = MappingProxyType(
    {each.name: str(each.type).removesuffix(" | None") for each in fields(Options)}
)
"""What each option is: int, float, bool or tuple[str, ...]."""

DEPRECATED = (
    "penalize_newline",
    "low_vram",
    "f16_kv",
    "logits_all",
    "vocab_only",
    "use_mlock",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
)
"""Parameters that a Modelfile may name, and that do nothing any more."""

_WORDS = {"int": "integer", "float": "float32", "bool": "boolean", "tuple[str, ...]": "array"}
_INT64 = 2**63
_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")


def _valued(name: str, value: object) -> object:
    """A value out of JSON as the option's type."""
    kind = KINDS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool) and -_INT64 <= value < _INT64
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number:
        return int(value)  # type: ignore[call-overload]
    if kind == "float" and number:
        return float(value)  # type: ignore[arg-type]
    if kind == "tuple[str, ...]" and isinstance(value, list | tuple):
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        raise UserError(f"option {quoted(name)} must be of an array of strings", hint="give a list of texts")
    given = shortened(value) if isinstance(value, str) else f"a {type(value).__name__}"
    hint = f"{given} came; the default is {_default(name)}"
    raise UserError(f"option {quoted(name)} must be of type {_WORDS[kind]}", hint=hint)


def _default(name: str) -> object:
    return next(each.default for each in fields(Options) if each.name == name)


def parameter_value(name: str, text: str) -> object:
    """The value of a Modelfile's PARAMETER, a list of one for `stop`. Raises UserError in Ollama's words."""
    if name not in KINDS:
        raise UserError(f"unknown parameter '{name}'", hint=nearest(name, KINDS))
    kind = KINDS[name]
    if kind == "bool" and text in (*_TRUE, *_FALSE):
        return text in _TRUE
    if kind == "int" and re.fullmatch(r"[+-]?[0-9]{1,19}", text) and -_INT64 <= int(text) < _INT64:
        return int(text)
    if kind == "float" and re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?", text[:100]):
        number = float(text[:100])
        if math.isfinite(number) and len(text) <= 100:
            return number
    if kind == "tuple[str, ...]":
        return (text,)
    raise UserError(f"invalid {kind} value [{text[:100]}]", hint=f"{name} is, for example, {_default(name)}")


def parameter_texts(value: object) -> Iterable[str]:
    """The texts that `parameter_value` reads a value from: one, or one for each element of a list."""
    if isinstance(value, bool):
        return ("true" if value else "false",)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(str(each) for each in value)
    return (float_text(value) if isinstance(value, float) else str(value),)


def parameters_text(parameters: Mapping[str, object]) -> str:
    """What /api/show says of a model's own options: a line for each value, names in a column, texts quoted."""
    lines = []
    for name, value in parameters.items():
        for text in parameter_texts(value):
            shown = quoted(text) if isinstance(value, str | list | tuple) else text
            lines.append(f"{name:<30} {shown}")
    return "\n".join(lines)
