"""The quality card inside a GGUF file: a text in its metadata, written into room that the file was made with.

Room is a string of spaces under CARD_KEY; a card is ASCII, padded with spaces to the same length, so that nothing else
in the file moves. What a card says is `tasks/card.py`'s.
"""

from __future__ import annotations

import os
from pathlib import Path

from pumice.checkpoints.fields import reading
from pumice.checkpoints.gguf_file import is_gguf, metadata
from pumice.errors import UserError

CARD_KEY = "pumice.card"
CARD_BYTES = 4096
NO_CARD = " " * CARD_BYTES
"""What a file that is to get a card later holds under CARD_KEY."""


def read_card(path: Path) -> str | None:
    """The text of a file's card. None where there is none: no room for it, room not yet used, a write that was cut
    short. Of a split model the first file has it.

    Raises UserError for a file that is damaged.
    """
    room = _room(path)
    text = "" if room is None else room[1]
    return text.rstrip(" ") if text.startswith("{") else None


def check_room(path: Path) -> None:
    """Would `write_card` find room in this file? Raises UserError when not."""
    with reading(path):
        kept_by_file = is_gguf(path)
    if not kept_by_file:
        raise UserError(
            f"{path} is no GGUF file, so it cannot keep a card", hint="print the card with --json and keep that"
        )
    if not os.access(path, os.W_OK):
        raise UserError(f"{path} may not be written", hint="check who may write it")
    room = _room(path)
    if room is None or len(room[1]) < CARD_BYTES:
        raise UserError(
            f"{path} has no room for a card: its metadata has no {CARD_KEY} of {CARD_BYTES} bytes",
            hint="files that pumice itself writes have it; of a split model the first; else print it with --json",
        )


def write_card(path: Path, text: str) -> None:
    """Put a card, one JSON object, into the room that a file has for it.

    The first byte is the switch: it is a space while the others are written, and `{` is written last. Whoever is
    stopped in between leaves ASCII that begins with a space, which reads as no card.

    Raises UserError: no room, a text that does not fit, a file that may not be written.
    """
    check_room(path)
    data = text.encode("ascii")
    assert data.startswith(b"{"), "a card is a JSON object"
    room = _room(path)
    assert room is not None
    start, old = room
    if len(data) > len(old):
        raise UserError(f"the card has {len(data)} bytes, {path} has room for {len(old)}", hint="shorten the names")
    try:
        with path.open("r+b") as file:
            for at, part in ((0, b" "), (1, data[1:].ljust(len(old) - 1)), (0, b"{")):
                file.seek(start + at)
                file.write(part)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", hint="check who may write it") from error


def _room(path: Path) -> tuple[int, str] | None:
    """Where the card's text begins, and the text as it stands; None without the key. It is ASCII: bytes are
    characters."""
    with reading(path):
        if not is_gguf(path) or path.stat().st_size < 24:
            return None
        for key, value, end in metadata(path):
            if key == CARD_KEY and value.kind == "string" and not value.is_array and value.value.isascii():
                return end - len(value.value), value.value
    return None
