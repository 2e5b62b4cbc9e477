"""Names of models as Ollama writes them: `[scheme://][host/][namespace/]model[:tag]`.

Grammar and limits: Ollama's types/model/name.go. Every part that a Name has passed them, so none can lead out of a
folder, and a Name is safe to make a path of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pumice.errors import UserError, shortened

HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
SCHEMES = ("https", "http")

_PARTS = {
    "host": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"), "up to 350 letters, digits and _ - . :"),
    "namespace": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"), "up to 80 letters, digits and _ -"),
    "model": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"), "up to 80 letters, digits and _ - ."),
    "tag": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"), "up to 80 letters, digits and _ - ."),
}
"""The grammar of each part, and the same in words; the first is always a letter, a digit or _."""
_DIGEST = re.compile(r"@sha256:[0-9A-Fa-f]+\Z")


@dataclass(frozen=True)
class Name:
    """The whole name of a model. Two that differ in case are different here, and `matches` says whether they mean the
    same model."""

    host: str
    namespace: str
    model: str
    tag: str
    scheme: str = SCHEMES[0]
    """http asks a registry without encryption; it is no part of what a model is called."""

    def __post_init__(self) -> None:
        """Raises UserError for a part that is none."""
        for part, (grammar, words) in _PARTS.items():
            value = getattr(self, part)
            if not grammar.fullmatch(value):
                raise UserError(
                    f"{shortened(value)} is no {part} of a model's name",
                    hint=f"expected {words}, beginning with a letter, a digit or _, as in llava:7b",
                )
        if self.scheme not in SCHEMES:
            raise UserError(f"{shortened(self.scheme)}:// came before a model's name", hint="give https:// or nothing")

    @classmethod
    def parse(cls, text: str) -> Name:
        """A name as people write it, with what it leaves out filled in: `llava` is the tag `latest` of
        registry.ollama.ai/library/llava.

        A digest at the end (`@sha256:…`) is passed over, as in Ollama, and so is `:local` behind a tag. Raises
        UserError for what is no name, and for `:cloud`, whose models are on no disk.
        """
        scheme, mark, rest = text.partition("://")
        if not mark:
            scheme, rest = SCHEMES[0], text
        rest = _DIGEST.sub("", rest)
        place, _, last = rest.rpartition("/")
        if last.count(":") == 2 and last.lower().endswith(":local"):
            last = last[: -len(":local")]
        model, colon, tag = last.rpartition(":") if ":" in last else (last, "", TAG)
        if colon and tag.lower() == "cloud":
            raise UserError(f"{shortened(text)} runs on its vendor's computers", hint="name a model without :cloud")
        host, slash, namespace = place.rpartition("/")
        if not slash:
            host = HOST
        if not place and "/" not in rest:
            namespace = NAMESPACE
        return cls(host, namespace, model, tag, scheme.lower())

    def __str__(self) -> str:
        """The shortest text that `parse` reads as this name: without the default host and namespace, with the tag."""
        place = f"{self.namespace}/"
        if self.host != HOST:
            place = f"{self.host}/{place}"
        elif self.namespace == NAMESPACE:
            place = ""
        before = "" if self.scheme == SCHEMES[0] else f"{self.scheme}://"
        return f"{before}{place}{self.model}:{self.tag}"

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model, tag: the folders of a manifest's path, and its file."""
        return self.host, self.namespace, self.model, self.tag

    @property
    def full(self) -> str:
        """With nothing left out, as Ollama's own errors have it: `registry.ollama.ai/library/llava:latest`."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def matches(self, other: Name) -> bool:
        """Do both mean the same model? Case counts nowhere in a name, nor does the scheme."""
        return self.full.lower() == other.full.lower()
