"""From a name as a person writes it to where its model comes from or goes to: a registry, or the Hub."""

from __future__ import annotations

import os
from collections.abc import Generator

from pumice import store
from pumice.errors import UserError, nearest, shortened
from pumice.store import embedders, transfer
from pumice.store.hub_cache import HOSTS
from pumice.store.installed import Stored
from pumice.store.link import Reach
from pumice.store.names import HOST, NAMESPACE, TAG, Name
from pumice.store.places import ollama_stores, own_store
from pumice.store.registry import Missing
from pumice.store.transfer import Progress, Shelves

AUTHORS = ("llava-hf", "liuhaotian", "sentence-transformers")
"""Whose names mean the Hub first: they publish LLaVA or embedding models there, and anybody could take these names in a
registry."""


def pull(text: str, reach: Reach) -> Generator[Progress]:
    """Bring a model to this machine by its name.

    `llava:13b` and `HOST/USER/MODEL:TAG` come from a registry, `hf.co/USER/REPOSITORY:QUANT` too; `USER/REPOSITORY`
    comes from the Hub where the registry has none, and at once where it is one of AUTHORS; so does what Ollama calls an
    embedding model, whose files pumice does not run. What is bundled is here. Raises UserError, Missing where no place
    has it; see `transfer.pull`.
    """
    name = Name.parse(text)
    if store.bundled(name):
        yield Progress("success")
        return
    if there := embedders.repository(name):
        yield from _from_hub(Name.parse(there))
        return
    on_hub = name.host in HOSTS and name.namespace != NAMESPACE and name.tag == TAG
    if on_hub and name.namespace in AUTHORS:
        yield from _from_hub(name)
        return
    try:
        yield from transfer.pull(name, Shelves(own_store(), ollama_stores()), reach)
    except Missing:
        if not on_hub:
            raise
        yield from _from_hub(name)


def push(text: str, reach: Reach) -> Generator[Progress]:
    """Give a model of this machine to the registry that its name says. Raises UserError; see `transfer.push`."""
    found = store.find(text)
    if found is None:
        titles = [each.title for each in store.installed().models if isinstance(each, Stored)]
        raise UserError(f"there is no model named {shortened(text)} here", hint=nearest(text, titles))
    if not isinstance(found, Stored):
        raise UserError(f"{found.title} is a folder, and a registry takes GGUF files", hint="make a model of it first")
    name = Name.parse(text)
    if name.host == HOST:
        raise UserError(
            f"{HOST} takes models only from its own program", hint="name another registry: HOST/USER/MODEL:TAG"
        )
    yield from transfer.push(found, name, reach)


def _from_hub(name: Name) -> Generator[Progress]:
    # Nothing is told but what is asked for: no other requests, no list of what else is installed here.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Its import reads the environment and takes a while.
    from pumice.store import hub

    yield from hub.pull(f"{name.namespace}/{name.model}")
