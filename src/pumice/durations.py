"""Lengths of time as Go writes and reads them, in nanoseconds, and how long a model stays loaded (`keep_alive`)."""

from __future__ import annotations

import re

from pumice.errors import UserError
from pumice.go_template import quoted

SECOND_NS = 1_000_000_000
FOREVER_NS = 2**63 - 1
"""What Ollama makes of every negative time: 292 years."""

_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,  # the micro sign
    "\u03bcs": 1_000,  # the Greek letter
    "ms": 1_000_000,
    "s": SECOND_NS,
    "m": 60 * SECOND_NS,
    "h": 3600 * SECOND_NS,
}
_PART = re.compile(r"([0-9]*)(\.[0-9]*)?([^0-9.]*)")
_HINT = "write numbers with units: 300ms, 90s, 5m, 1h30m"
_LONGEST = 1000
"""Characters of a duration that are looked at."""


def read_duration(text: str) -> int:
    """Nanoseconds of a Go duration: `1h30m`, `-1.5s`, `0`. Raises UserError in Go's words (time.ParseDuration)."""
    shown = quoted(text[:_LONGEST])
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return 0
    total, at = 0, 0
    while at < len(rest) or not rest:
        found = _PART.match(rest, at)
        assert found is not None
        whole, fraction, unit = found[1], (found[2] or "")[1:], found[3]
        if len(rest) > _LONGEST or not (whole or fraction) or int(whole or 0) > FOREVER_NS + 1:
            raise UserError(f"time: invalid duration {shown}", hint=_HINT)
        if not unit:
            raise UserError(f"time: missing unit in duration {shown}", hint=_HINT)
        if unit not in _UNITS_NS:
            raise UserError(f"time: unknown unit {quoted(unit)} in duration {shown}", hint=_HINT)
        total += int(whole or 0) * _UNITS_NS[unit] + _part_ns(fraction, _UNITS_NS[unit])
        at = found.end()
    if total > FOREVER_NS + (text[0] == "-"):
        raise UserError(f"time: invalid duration {shown}", hint=_HINT)
    return -total if text[0] == "-" else total


def _part_ns(fraction: str, unit_ns: int) -> int:
    """Nanoseconds of the digits after a point. As there: in float64, of the digits that an int64 holds."""
    digits = fraction[:19] if int(fraction[:19] or 0) < FOREVER_NS else fraction[:18]
    return int(float(digits or 0) * (unit_ns / 10 ** len(digits)))


def duration_text(nanoseconds: int) -> str:
    """As Go's Duration.String: `5m0s`, `1.5s`, `300ms`, `0s`."""
    sign, left = "-" * (nanoseconds < 0), abs(nanoseconds)
    if left < SECOND_NS:
        if not left:
            return "0s"
        unit, size = ("ms", 1_000_000) if left >= 1_000_000 else ("\u00b5s", 1_000) if left >= 1_000 else ("ns", 1)
        return f"{sign}{_decimal(left, size)}{unit}"
    minutes, left = divmod(left, 60 * SECOND_NS)
    hours, minutes = divmod(minutes, 60)
    front = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{front}{_decimal(left, SECOND_NS)}s"


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    return f"{whole}.{rest:0{len(str(size)) - 1}d}".rstrip("0") if rest else str(whole)


def keep_alive(value: object) -> int | None:
    """Nanoseconds that a request asks a model to stay for; `FOREVER_NS` for a negative time, None where it says
    nothing. A number is seconds; a text is a Go duration. Raises UserError in Ollama's words."""
    if value is None:
        return None
    if isinstance(value, str):
        nanoseconds = read_duration(value)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value:  # NaN is no length
        # Beyond 292 years is forever too.
        nanoseconds = int(value * SECOND_NS) if 0 <= value < FOREVER_NS // SECOND_NS else -1
    else:
        kinds: dict[type, str] = {dict: "map[string]interface {}", list: "[]interface {}", float: "float64"}
        kind = type(value)
        raise UserError(
            f"Unsupported type: '{kinds.get(kind, kind.__name__)}'", hint="keep_alive is seconds, or a text such as 5m"
        )
    return FOREVER_NS if nanoseconds < 0 else nanoseconds


def keep_alive_setting(text: str) -> int:
    """Nanoseconds of the environment variable OLLAMA_KEEP_ALIVE, where a bare whole number is seconds."""
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        nanoseconds = keep_alive(int(text))
        assert nanoseconds is not None
        return nanoseconds
    nanoseconds = read_duration(text)
    return FOREVER_NS if nanoseconds < 0 else nanoseconds
