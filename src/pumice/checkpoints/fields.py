"""The JSON files of a checkpoint, read strictly: a value of the wrong kind or an absurd number is an error that names
file and key. What is not asked for is never looked at, so `auto_map` and its like have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard, TypeVar

import numpy as np

from pumice.errors import UserError

MAX_JSON_BYTES = 32 * 2**20
"""Several times the largest index of a published checkpoint."""
MAX_SIZE = 2**20
"""Above every width, vocabulary or length of a checkpoint that exists."""
MAX_NUMBER = 1e300
"""JSON has integers that no float can hold."""

_T = TypeVar("_T")


class Fields:
    """A JSON object and where it came from. A key that is null counts as absent, as Transformers has it."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values, self.source = values, source

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str) -> object:
        """The value as it stands, None when absent."""
        return self._values.get(key)

    @property
    def names(self) -> list[str]:
        """All keys, those with null included."""
        return list(self._values)

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer within bounds; absent without a default is an error."""
        value = self._value(key, default)
        if not is_whole(value) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; absent without a default is an error."""
        value = self._value(key, default)
        if not is_number(value) or value <= 0:
            raise self.wrong(key, "a number above zero")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def inner(self, key: str) -> Fields:
        """The object under a key; an empty one when absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value or {}, f"{self.source}, {key}")

    def wholes(self, key: str, *, least: int, most: int) -> tuple[int, ...]:
        """One integer or a list of up to 64; nothing when absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        found = value if isinstance(value, list) else [value]
        if not 1 <= len(found) <= 64 or not all(is_whole(each) and least <= each <= most for each in found):
            raise self.wrong(key, f"a whole number from {least} to {most}, or a list of them")
        return tuple(found)

    def one_of(self, key: str, default: _T | None, known: Sequence[_T]) -> _T:
        """A value from a closed list; absent without a default is an error."""
        value = self._value(key, default)
        for each in known:
            if type(value) is type(each) and value == each:
                return each
        raise self.wrong(key, " or ".join(repr(each) for each in known))

    def wrong(self, key: str, expected: str) -> UserError:
        return UserError(
            f"{self.source}: {key} is {shown(self._values.get(key))}; pumice reads {expected}",
            hint="the file is damaged, or describes a model that pumice does not have",
        )

    def _value(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is None and default is None:
            raise UserError(f"{self.source} has no {key}", hint="the file is damaged or incomplete; get it again")
        return default if value is None else value


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def shown(value: object) -> str:
    """A value from a file inside an error: never longer than a line."""
    if isinstance(value, list | dict) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says about a file that cannot be read into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"there is no file {error.filename or path}", hint="the checkpoint is incomplete; get it again"
        ) from error
    except OSError as error:
        name = error.filename or path
        raise UserError(f"{name} cannot be read: {error.strerror}", hint="check who may read it") from error


def read_json(path: Path) -> Fields:
    """The object in a JSON file. Raises UserError when it cannot be read, is no JSON or no object."""
    with reading(path), path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB", hint="no checkpoint needs such a file")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON", hint="the file is damaged or half-written; get it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not an object", hint="get the file again")
    return Fields(values, str(path))


def json_if_there(path: Path) -> Fields:
    """The object in a JSON file; an empty one when there is no such file."""
    return read_json(path) if path.is_file() else Fields({}, str(path))


def decimal(number: float) -> float:
    """The shortest number that is the same float32: 1e-05, not 9.99999974e-06. What a person wrote, mostly."""
    return float(str(np.float32(number)))
