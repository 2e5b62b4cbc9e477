"""What a model is to be made of: as POST /api/create says it, or a Modelfile.

Facts: Ollama's api/types.go (CreateRequest), server/create.go, parser/parser.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from pumice.errors import UserError, shortened
from pumice.go_template.values import check, check_text
from pumice.modelfile import Modelfile, Role, read_modelfile
from pumice.store.layout import OwnStore

MAX_FILES = 10_000
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Recipe:
    """`files`: by the names that they have beside each other, where they lie on this disk. What is None or empty is as
    the model `source` has it."""

    source: str | None = None
    """The name of a model, never a path."""
    files: Mapping[str, Path] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    template: str | None = None
    system: str | None = None
    licenses: tuple[str, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    quantize: str | None = None


def digest_of(text: str) -> str:
    """`sha256:` and 64 small digits, from what a client wrote. Raises UserError in Ollama's words."""
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise UserError("invalid digest format", hint="give sha256: and 64 hexadecimal digits")
    return f"sha256:{found[1].lower()}"


def asked(said: Mapping[str, object], own: OwnStore) -> Recipe:
    """The recipe in the body of POST /api/create, whose files were sent before by their digests.

    Keys must be in lower case; those that are none of ours are passed over, and a null is as if it were not there. An
    old client's `modelfile` counts too. Raises UserError: a value of another kind, a file that was not sent.
    """
    recipe = Recipe()
    if text := _text(said, "modelfile"):
        recipe = of_modelfile(read_modelfile(text))
    files, adapters = (_sent(said, key, own) for key in ("files", "adapters"))
    return replace(
        recipe,
        source=_text(said, "from") or recipe.source,
        files=files or recipe.files,
        adapters=adapters,
        template=_text(said, "template") or recipe.template,
        system=_text(said, "system") or recipe.system,
        licenses=_licenses(said.get("license")) or recipe.licenses,
        parameters={**recipe.parameters, **_mapping(said, "parameters")},
        messages=_messages(said.get("messages")) or recipe.messages,
        quantize=_text(said, "quantize") or _text(said, "quantization"),
    )


def of_modelfile(said: Modelfile) -> Recipe:
    """What a Modelfile says beside the paths in it: its FROM is the name of a model. Raises UserError for what pumice
    has no place for."""
    for what, value in (("DRAFT", said.draft), ("RENDERER", said.renderer), ("PARSER", said.parser)):
        if value is not None:
            raise UserError(f"{what} came, which pumice does not have", hint="leave the line out")
    if said.adapters:
        raise no_adapter()
    if len(said.sources) > 1:
        raise UserError("several FROM lines came, which cannot all be models", hint="name one model, or files")
    return Recipe(
        said.sources[0],
        template=said.template,
        system=said.system,
        licenses=said.licenses,
        parameters=said.parameters,
        messages=said.messages,
    )


def no_adapter() -> UserError:
    """What is said of LoRA layers."""
    return UserError("an adapter came, which pumice cannot put into a store", hint="merge it, or name the model alone")


def checked(name: str) -> str:
    """A file's name, relative and inside. Raises UserError in Ollama's words."""
    parts = name.split("/")
    if "\\" in name or "\0" in name or ":" in name or any(each in ("", ".", "..") for each in parts):
        raise UserError("file path must be relative", hint="name files by their place below the model's folder")
    return name


def _sent(said: Mapping[str, object], key: str, own: OwnStore) -> dict[str, Path]:
    found = {}
    for name, digest in _mapping(said, key).items():
        if not isinstance(digest, str):
            raise _wrong(key, "digests")
        layer = own.blobs.held(digest_of(digest))
        if layer is None:
            raise UserError(f"the blob {digest_of(digest)} was not sent", hint="send it to /api/blobs/DIGEST before")
        found[checked(name)] = own.blobs.path(layer)
    if len(found) > MAX_FILES:
        raise UserError(f"{key} names {len(found)} files", hint=f"send up to {MAX_FILES}")
    return found


def _text(said: Mapping[str, object], key: str) -> str | None:
    value = said.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(key, "a text")
    check_text(value, key)
    return value or None


def _mapping(said: Mapping[str, object], key: str) -> dict[str, object]:
    value = said.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(key, "an object")
    return value


def _licenses(value: object) -> tuple[str, ...]:
    texts: Sequence[object] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in texts):
        raise _wrong("license", "a text or a list of texts")
    check(texts, "license")
    return tuple(str(each) for each in texts if each)


def _messages(value: object) -> tuple[tuple[str, str], ...]:
    found = []
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        role, text = (each.get("role"), each.get("content", "")) if isinstance(each, dict) else (None, None)
        if role not in get_args(Role) or not isinstance(text, str):
            raise _wrong("messages", 'objects with content and a role: "system", "user", or "assistant"')
        found.append((str(role), text))
    return tuple(found)


def _wrong(key: str, expected: str) -> UserError:
    return UserError(f"{shortened(key)} is not {expected}", hint="see Ollama's API, POST /api/create")
