"""Images that are named inside a prompt, as Ollama's users write them."""

from __future__ import annotations

import os
import re

from pumice.errors import UserError

_ENDING = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif)"
_AFTER = r"(?=[\s,;:!?)]|\.?\s|\.?$)"
_PATHS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"""(?P<quote>['"])(?P<path>[^'"\n]{{1,1000}}?{_ENDING})(?P=quote)""",
        # Like Ollama: a path from the root or from here may hold spaces.
        rf"""(?<!\S)(?P<path>(?:~?/|\.{{1,2}}/)[^'"\n]{{0,1000}}?{_ENDING}){_AFTER}""",
        # Escaped white space belongs to a path, as a shell or a terminal's drag and drop writes it.
        rf"""(?<!\S)(?P<path>(?:[^\s\\'"]|\\.){{1,1000}}?{_ENDING}){_AFTER}""",
    )
)


def images_in(prompt: str) -> tuple[str, list[str]]:
    """The prompt without the paths of images that exist, and those paths; a path that leads nowhere stays text."""
    found: dict[int, tuple[int, str]] = {}
    for pattern in _PATHS:
        at = 0
        while match := pattern.search(prompt, at):
            start, end = match.span()
            free = all(end <= begin or start >= stop for begin, (stop, _) in found.items())
            path = real_path(match["path"])
            if free and os.path.isfile(path):
                found[start] = (end, path)
            at = start + 1
    text, at = "", 0
    for start, (end, _) in sorted(found.items()):
        text += prompt[at:start]
        # One of the two spaces around a path goes with it.
        at = end + (text[-1:] in ("", " ") and prompt[end : end + 1] == " ")
    return ((text + prompt[at:]).strip() if found else prompt), [path for _, (_, path) in sorted(found.items())]


def real_path(typed: str) -> str:
    """The path that a person means: without quotes and backslashes, `~` being home."""
    bare = typed.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        return os.path.expanduser(bare[1:-1])
    return os.path.expanduser(re.sub(r"\\(.)", r"\1", bare))


def refuse_mark(text: str, hint: str) -> None:
    """Raises UserError for a literal `<image>`, which the authors' scripts used and which here would only be text."""
    if "<image>" in text:
        raise UserError("the prompt holds the mark <image>, which is plain text here", hint=hint)
