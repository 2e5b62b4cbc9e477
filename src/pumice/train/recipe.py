"""A recipe: everything a training run depends on besides its data, as one frozen dataclass, read from one TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pumice.errors import UserError, nearest
from pumice.prompt import TEMPLATES

PARTS = ("projector", "language_model", "vision_tower")
Part = Literal["projector", "language_model", "vision_tower"]

MAX_NUMBER = 1e300
"""TOML has integers that no float can hold."""

_BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("steps", "batch", "save_every"), lambda value: value >= 1, "a whole number of at least 1"),
    (("micro_batch",), lambda value: value >= 0, "how many samples are in memory at a time, or 0 for the whole batch"),
    (("max_tokens",), lambda value: value >= 2, "a whole number of at least 2"),
    (("rate",), lambda value: 0 < value < 1, "a learning rate between 0 and 1"),
    (("tower_rate",), lambda value: 0 <= value < 1, "a learning rate between 0 and 1, or 0 to take `rate`"),
    (("final",), lambda value: 0 <= value <= 1, "the share of the rate that is left at the end, 0 to 1"),
    (("warmup",), lambda value: 0 <= value <= 1, "the share of the steps that warms up, 0 to 1"),
    (("weight_decay",), lambda value: value >= 0, "a number of at least 0"),
    (("clip_norm",), lambda value: value > 0, "the largest norm of a gradient, above 0; a huge one never clips"),
)
"""Names of numbers, what holds for each, and how to say it. None may be infinite or no number."""


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    model: the checkpoint to start from. data, images: the authors' JSON file and the folder its pictures are in; both
    empty when the data set is given as an object. parts: what learns; the rest stays as it is (LLaVA stage 1 is
    `["projector"]`, with the newline vector of 1.6; stage 2 of 1.5 adds the language model, of 1.6 the tower too).
    Optimiser: AdamW, linear warm-up over `warmup` of the steps, then half a cosine down to `final` of the rate
    (LLaVA scripts/v1_5). tower_rate: the tower's own learning rate, 0 takes `rate`.
    template, preprocess (`hf` or `original`): the prompt's and the images' rules, empty takes the checkpoint's own; the
    trained checkpoint says the latter. batch: samples a step; micro_batch: of them, how many are in memory at a time, 0
    is all; the step is the same. max_tokens: a longer sample is cut there, as the authors' train.py does.

    Raises UserError for a value that no training can have.
    """

    model: str
    data: str = ""
    images: str = ""
    template: str = ""
    preprocess: Literal["", "hf", "original"] = ""
    parts: tuple[Part, ...] = ("projector",)
    steps: int = 1000
    batch: int = 16
    micro_batch: int = 0
    rate: float = 1e-3
    tower_rate: float = 0.0
    final: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_tokens: int = 2048
    seed: int = 42
    save_every: int = 500

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise UserError(f"a recipe trains the parts {list(self.parts)}", hint=f"known: {', '.join(PARTS)}")
        if self.template and self.template not in TEMPLATES:
            raise UserError(f"a recipe has template = {self.template!r}", hint=nearest(self.template, TEMPLATES))
        if self.preprocess not in ("", "hf", "original"):
            raise UserError(
                f"a recipe has preprocess = {self.preprocess!r}", hint="give hf or original, or leave it out"
            )
        for names, holds, wanted in _BOUNDS:
            for name in names:
                value = getattr(self, name)
                if not (-MAX_NUMBER < value < MAX_NUMBER and holds(value)):
                    raise UserError(f"a recipe has {name} = {value}", hint=f"give {wanted}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises UserError for a key that no recipe has, or a value of the wrong kind."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable recipe: {error}", hint="give a TOML file; recipes/ has some") from error
    fields = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for key, value in raw.items():
        if key not in fields:
            raise UserError(f"{path} has the key {key!r}, which no recipe has", hint=nearest(key, fields))
        if not _fits(value, str(fields[key])):
            raise UserError(f"{path}: {key} is {value!r}", hint=f"give a value of the kind {fields[key]}")
    if "model" not in raw:
        raise UserError(f"{path} names no model", hint="add the key `model`: a checkpoint to start from")
    checked: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Recipe(**checked)


def _fits(value: Any, kind: str) -> bool:
    match kind:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "tuple[Part, ...]":
            return isinstance(value, list) and all(isinstance(each, str) for each in value)
        case _:
            return isinstance(value, str)
