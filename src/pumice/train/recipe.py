"""A recipe: everything a training run depends on besides its data, as one frozen dataclass, read from one TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pumice.errors import UserError, nearest

PARTS = ("projector", "language_model", "vision_tower")
Part = Literal["projector", "language_model", "vision_tower"]


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    model: the checkpoint to start from. data, images: the authors' JSON file and the folder its pictures are in; both
    empty when the data set is given as an object. parts: what learns; the rest stays as it is (LLaVA stage 1 is
    `["projector"]`, with the newline vector of 1.6; stage 2 of 1.5 adds the language model, of 1.6 the tower too).
    Optimiser: AdamW, linear warm-up over `warmup` of the steps, then half a cosine down to `final` of the rate
    (LLaVA scripts/v1_5). tower_rate: the tower's own learning rate, 0 takes `rate`.
    """

    model: str
    data: str = ""
    images: str = ""
    template: str = ""
    parts: tuple[Part, ...] = ("projector",)
    steps: int = 1000
    batch: int = 16
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
        for name, low in (("steps", 1), ("batch", 1), ("max_tokens", 2), ("save_every", 1)):
            value = getattr(self, name)
            if value < low:
                raise UserError(f"a recipe has {name} = {value}", hint=f"give a whole number of at least {low}")
        if not 0 < self.rate < 1 or not 0 <= self.warmup <= 1:
            raise UserError(
                f"a recipe has rate = {self.rate} and warmup = {self.warmup}",
                hint="give a learning rate between 0 and 1, and the share of the steps that warms up",
            )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises UserError for a key that no recipe has, or a value of the wrong kind."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
        case "str":
            return isinstance(value, str)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case _:
            return isinstance(value, list) and all(isinstance(each, str) for each in value)
