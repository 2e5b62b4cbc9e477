"""The one error a user sees, and how it is shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside pumice is wrong: a file, an argument, a request.

    `message` says what came and what was expected; `hint` says what to do. The command line prints both as two
    lines and exits with 2; a server puts both into its error body.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"


def shortened(text: str) -> str:
    """A text from outside, quoted, never longer than a line."""
    return repr(text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)")


def nearest(name: str, known: Iterable[str]) -> str:
    """A `did you mean` sentence for a name that is not in a list, or the list itself when nothing is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(each) for each in near)}?"
    return f"known: {', '.join(names)}" if names else "none are known"
