"""A new model in the own store, as `ollama create` makes one: from a model, from GGUF files, and from the safetensors
of LLaVA models too, which are converted.

Layers come first and the manifest last, so whoever is stopped leaves a whole store. PyTorch is imported when weights
are looked at. Facts: Ollama's server/create.go.
"""

from __future__ import annotations

from collections.abc import Generator

from pumice import store
from pumice.creating.layers import checked_template, config_layer, with_words
from pumice.creating.recipe import Recipe, asked, digest_of, no_adapter, of_modelfile
from pumice.creating.weights import Bench, Making, of_files, of_model, with_eyes
from pumice.errors import UserError
from pumice.store import pulling
from pumice.store.gguf_keys import FILE_TYPES
from pumice.store.layout import OwnStore
from pumice.store.link import Reach
from pumice.store.manifest import Manifest
from pumice.store.names import Name
from pumice.store.transfer import Progress

__all__ = ["Recipe", "asked", "create", "digest_of", "of_modelfile"]

PUBLIC = Reach()
"""Registries of the public internet, by https."""
_SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def create(name: Name, recipe: Recipe, own: OwnStore, reach: Reach = PUBLIC) -> Generator[Progress]:
    """Make a model and give it this name; one that has it goes. What is under way is told in Ollama's words and order.

    A `source` that is not on this machine is pulled first; `reach` says where from. Closing the iterator, or killing
    the process, leaves the store as it was, but for blobs that nothing names (`OwnStore.prune`).

    Raises UserError, in Ollama's words where it has some: nothing to make it from; files that are no model, damaged, or
    do not fit together; a template or parameters that are none; what is quantised already; a full disk.
    """
    if store.bundled(name):
        raise UserError(f"{name} is the name of a model inside the package", hint="give another one")
    if recipe.adapters:
        raise no_adapter()
    checked_template(recipe.template)
    mix = _mix(recipe.quantize)
    with own.blobs.workshop() as shop:
        before, begun_ns = {each.name for each in own.blobs.folder.iterdir()}, shop.stat().st_mtime_ns
        base = yield from _base(recipe, Bench(own.blobs, shop, name.model, mix, recipe.template is not None), reach)
        words = with_words(base, recipe, own.blobs)
        for status in words.said:
            yield Progress(status)
        config = config_layer(base.config, words.layers, own.blobs)
        for each in (*words.layers, config):
            path = own.blobs.path(each)
            # Known by its name, as the clocks of files are coarse; what is linked from another store, by its age.
            is_new = path.name not in before and path.stat().st_mtime_ns >= begun_ns
            yield Progress(f"{'creating new' if is_new else 'using existing'} layer {each.digest}")
        yield Progress("writing manifest")
        own.write(name, Manifest.of(config, words.layers))
    yield Progress("success")


def _base(recipe: Recipe, bench: Bench, reach: Reach) -> Making:
    if recipe.source is None:
        if not recipe.files:
            raise UserError("neither 'from' or 'files' was specified", hint="name a model, or send files")
        return (yield from of_files(recipe.files, bench))
    found = store.find(recipe.source)
    if found is None:
        for step in pulling.pull(recipe.source, reach):
            if step.status != "success":
                yield step
        found = store.find(recipe.source)
        assert found is not None, "what was pulled is here"
    base = yield from of_model(found, bench)
    return (yield from with_eyes(base, recipe.files, bench)) if recipe.files else base


def _mix(name: str | None) -> str | None:
    """Raises UserError for a quantisation that there is not, in Ollama's words."""
    if name is None:
        return None
    upper = _SHORT.get(name.upper(), name.upper())
    if upper not in FILE_TYPES.values():
        known = ", ".join(FILE_TYPES.values())
        raise UserError(f"unsupported quantization type {name} - supported types are {known}", hint="give one of them")
    return upper
