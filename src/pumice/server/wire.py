"""JSON as Go's servers take and give it: what a request says, field by field, and what is answered.

Keys count in any case, unknown ones and nulls are passed over, and so is what stands behind the first value. Facts:
Go's encoding/json, and gin's ShouldBindJSON without its checks.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.responses import JSONResponse

from pumice.errors import UserError

NDJSON = "application/x-ndjson"

_KINDS = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
_LONE = re.compile("[\ud800-\udfff]")
_DATA_URL = re.compile(r"data:[^,]{0,200},")


class Refused(Exception):
    """A request that is answered with an error: its status, and what is said."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Fault(UserError):
    """What went wrong here, and not with what was asked."""


class Fields:
    """A JSON object, read field by field. `struct` is what Go calls it, for its errors."""

    def __init__(self, values: Mapping[str, Any], struct: str) -> None:
        # Of keys that differ in case alone the last counts, as of equal ones.
        self.values = {name.lower(): value for name, value in values.items() if value is not None}
        self._struct = struct
        self.size = 0
        """Bytes of the whole request, where this is all of it."""

    @classmethod
    def read(cls, body: bytes | bytearray, struct: str) -> Fields:
        """Raises Refused for no body, no JSON, and JSON that is no object."""
        text = body.decode("utf-8", errors="replace").lstrip()
        if not text:
            raise Refused(400, "missing request body")
        try:
            value, _ = _DECODER.raw_decode(text)
        except RecursionError:
            raise Refused(400, "invalid JSON: it is nested too deeply") from None
        except ValueError as error:
            raise Refused(400, f"invalid JSON: {str(error)[:200]}") from None
        if not isinstance(value, dict):
            raise Refused(400, f"json: cannot unmarshal {_kind(value)} into Go value of type api.{struct}")
        found = cls(_scrubbed(value) if "\\u" in text else value, struct)
        found.size = len(body)
        return found

    def has(self, name: str) -> bool:
        return name in self.values

    def text(self, *names: str) -> str:
        """The first of these fields that is there; empty where none is. Raises Refused for what is no text."""
        return next((self._of(name, str, "string") for name in names if self.has(name)), "")

    def flag(self, name: str, default: bool = False) -> bool:
        return self._of(name, bool, "bool") if self.has(name) else default

    def whole(self, name: str) -> int | None:
        """A whole number; None where none came. Raises Refused."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
            raise self._wrong(name, value, "int")
        return value

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise self._wrong(name, value, "float64")
        return float(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self._of(name, dict, "map[string]interface {}") if self.has(name) else {}

    def items(self, name: str, of: str = "interface {}") -> list[Any]:
        return self._of(name, list, f"[]{of}") if self.has(name) else []

    def objects(self, name: str, struct: str) -> list[Fields]:
        """A list of objects. Raises Refused."""
        found = self.items(name, f"api.{struct}")
        for each in found:
            if not isinstance(each, dict):
                raise self._wrong(name, each, f"api.{struct}")
        return [Fields(each, struct) for each in found]

    def texts(self, name: str) -> list[str]:
        found = self.items(name, "string")
        for each in found:
            if not isinstance(each, str):
                raise self._wrong(name, each, "string")
        return found

    def any(self, name: str) -> Any:
        """What came, as it came; None where nothing did."""
        return self.values.get(name)

    def _of(self, name: str, kind: type, called: str) -> Any:
        value = self.values[name]
        if not isinstance(value, kind):
            raise self._wrong(name, value, called)
        return value

    def _wrong(self, name: str, value: object, called: str) -> Refused:
        field = f"{self._struct}.{name}"
        return Refused(400, f"json: cannot unmarshal {_kind(value)} into Go struct field {field} of type {called}")


def image_bytes(text: str) -> bytes:
    """A picture in base64: standard or URL-safe, padded or not, also as a data: URL. Raises Refused in Go's words."""
    found = _DATA_URL.match(text)
    start = found.end() if found else 0
    plain = text[start:].translate(_TO_STANDARD)
    padded = plain + "=" * (-len(plain) % 4)
    try:
        if "=" in padded[:-2]:
            raise binascii.Error
        # Piece by piece: Python does nothing else while it decodes one.
        pieces = (padded[at : at + _PIECE] for at in range(0, len(padded), _PIECE))
        return b"".join(base64.b64decode(each, validate=True) for each in pieces)
    except (binascii.Error, ValueError):
        strange = re.search(r"[^A-Za-z0-9+/]", plain)
        place = start + (strange.start() if strange else len(plain))
        raise Refused(400, f"illegal base64 data at input byte {place}") from None


_PIECE = 4 * 2**18
_TO_STANDARD = {ord("-"): "+", ord("_"): "/", ord("\r"): None, ord("\n"): None}


class Json(JSONResponse):
    """An answer of Ollama's API: gin says the charset, which OpenAI's answers do without."""

    media_type = "application/json; charset=utf-8"


def is_openai(path: str) -> bool:
    """Is this a path of OpenAI's API, with its `/v1` or without?"""
    return path.startswith(("/v1/", "/models/")) or path in _OPENAI


_OPENAI = frozenset({"/v1", "/chat/completions", "/completions", "/embeddings", "/models"})


def line(value: Mapping[str, Any]) -> bytes:
    """One line of a stream. Escaped to ASCII: clients split at every line end that Unicode knows."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def timestamp(seconds: float) -> str:
    """A time since 1970 as RFC 3339 in UTC; at most six decimals, without trailing zeros."""
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return text.rstrip("0").rstrip(".") + "Z"


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def _scrubbed(value: Any) -> Any:
    """Halves of character pairs are no characters: as Go reads them."""
    if isinstance(value, str):
        return _LONE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_scrubbed(each) for each in value]
    if isinstance(value, dict):
        return {_scrubbed(name): _scrubbed(each) for name, each in value.items()}
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
