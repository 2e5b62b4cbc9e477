"""The layers of a new model beside its weights, and its config: what Ollama would write, byte for byte.

Facts: Ollama's server/create.go (setTemplate, setParameters, createConfigLayer), server/images.go (ConfigV2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pumice.creating.recipe import Recipe
from pumice.errors import UserError, shortened
from pumice.go_template import read_template
from pumice.go_template.values import check, to_json
from pumice.ollama_prompt import worded
from pumice.options import Options
from pumice.store.blobs import Blobs
from pumice.store.facts import human
from pumice.store.gguf_keys import Said
from pumice.store.installed import Stored
from pumice.store.manifest import CONFIG_TYPE, ROLE_TYPE, Layer

_ORDER = ("model_format", "model_family", "model_families", "model_type", "file_type")
"""How a config begins; what else it says stands between these and the system that it is for."""


@dataclass(frozen=True)
class Base:
    """What a new model builds on: weights, and for one that is made from another the texts of that."""

    layers: tuple[Layer, ...]
    config: Mapping[str, object]
    stored: Stored | None = None
    template: str | None = None
    """The name of pumice's own template for these weights; looked for where there is no template layer."""

    def role(self, role: str) -> list[Layer]:
        return [each for each in self.layers if each.role == role]


@dataclass(frozen=True)
class Words:
    """Layers in the manifest's order, and what is said of each that is new."""

    layers: tuple[Layer, ...]
    said: tuple[str, ...]


def with_words(base: Base, recipe: Recipe, blobs: Blobs) -> Words:
    """The base's layers, but for those that the recipe replaces; behind them what came instead.

    A model whose template nobody gave has pumice's own for it in Ollama's words, where there is one, with the system
    text and the stops that belong to it. Raises UserError for parameters that cannot be, and for a full disk.
    """
    said: list[str] = []
    made: list[tuple[str, bytes]] = []
    parameters = _known(base.stored.parameters()) if base.stored else {}
    found = None if recipe.template or base.role("template") or base.template is None else worded(base.template)
    if found:
        said.append(f"using autodetected template {base.template}")
        parameters = {"stop": found.stops} | parameters
    if template := recipe.template or (found.template if found else None):
        made.append(("template", template.encode()))
    if system := recipe.system or (found.system if found and not base.role("system") else None):
        made.append(("system", system.encode()))
    made += [("license", each.encode()) for each in recipe.licenses]
    parameters |= _known(recipe.parameters)
    if parameters:
        made.append(("params", _line(dict(sorted(parameters.items())))))
    if recipe.messages:
        made.append(("messages", _line([{"role": role, "content": text} for role, text in recipe.messages])))
    roles = {role for role, _ in made}
    layers = [each for each in base.layers if each.role not in roles]
    for role, data in made:
        layer = blobs.put([data], ROLE_TYPE + role)
        layers.append(layer)
    return Words(tuple(layers), tuple(said))


def checked_template(text: str | None) -> None:
    """Raises UserError in Ollama's words for what is no template."""
    try:
        read_template(text or "")
    except UserError as error:
        raise UserError(f"template error: {error.message}", hint=error.hint) from error


def config_layer(config: Mapping[str, object], layers: Sequence[Layer], blobs: Blobs) -> Layer:
    """Write the config of a model of these layers. Raises UserError for a full disk."""
    return blobs.put([config_bytes(config, [each.digest for each in layers])], CONFIG_TYPE)


def config_bytes(config: Mapping[str, object], digests: Sequence[str]) -> bytes:
    """What Ollama's encoder makes of a config: its order of keys, and a newline."""
    first = {key: config[key] for key in _ORDER if key in config}
    last = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(digests)}}
    more = {key: value for key, value in config.items() if key not in first and key not in last}
    return _line(first | more | last)


def config_of(weights: Said, *, sees: bool) -> dict[str, object]:
    """What a config says of a language model's file, with or without eyes."""
    return {
        "model_format": "gguf",
        "model_family": weights.architecture,
        "model_families": [weights.architecture, *(["clip"] if sees else [])],
        "model_type": human(weights.parameters),
        "file_type": weights.file_type,
    }


def _known(parameters: Mapping[str, object]) -> dict[str, Any]:
    """Those with a value. Raises UserError in Ollama's words for a value that its option cannot have."""
    given = {name: value for name, value in parameters.items() if value is not None}
    for name, value in given.items():
        plain = all(
            isinstance(each, str | int | float) for each in (value if isinstance(value, list | tuple) else [value])
        )
        if not plain:
            raise UserError(f"parameter {shortened(name)} is an object", hint="give a number, a text or a list of them")
    Options().updated(given)
    return given


def _line(value: Any) -> bytes:
    check(value, "the recipe")
    return f"{to_json(value)}\n".encode()
