"""Images that are named inside a prompt, as Ollama's users write them."""

from __future__ import annotations

import re
from pathlib import Path

_ENDING = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif)"
_QUOTED = re.compile(rf"""(?P<quote>['"])(?P<path>[^'"\n]+?{_ENDING})(?P=quote)""", re.IGNORECASE)
# Escaped white space belongs to a path, as a shell or a terminal's drag and drop writes it.
_BARE = re.compile(rf"(?<!\S)(?P<path>(?:[^\s\\'\"]|\\.)+?{_ENDING})(?=[\s,;:!?)]|\.?\s|\.?$)", re.IGNORECASE)


def images_in(prompt: str) -> tuple[str, list[str]]:
    """The prompt without the paths of images that exist, and those paths; a path that leads nowhere stays text."""
    found: list[str] = []

    def take(match: re.Match[str]) -> str:
        path = re.sub(r"\\(.)", r"\1", match["path"])
        if not Path(path).expanduser().is_file():
            return match[0]
        found.append(str(Path(path).expanduser()))
        return ""

    text = _BARE.sub(take, _QUOTED.sub(take, prompt))
    return (re.sub(r"[ \t]{2,}", " ", text).strip() if found else prompt), found
