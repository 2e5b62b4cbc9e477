"""Embedding models: what Ollama's users call them, and where the Hub has them in the form of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from pumice.store.installed import Folder, Installed
from pumice.store.names import HOST, NAMESPACE, Name

REPOSITORIES = MappingProxyType({
    "all-minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:22m": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:33m": "sentence-transformers/all-MiniLM-L12-v2",
    "all-minilm:l12-v2": "sentence-transformers/all-MiniLM-L12-v2",
    "paraphrase-multilingual": "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    "mxbai-embed-large": "mixedbread-ai/mxbai-embed-large-v1",
    "bge-large": "BAAI/bge-large-en-v1.5",
    "snowflake-arctic-embed": "Snowflake/snowflake-arctic-embed-l",
    "qwen3-embedding:0.6b": "Qwen/Qwen3-Embedding-0.6B",
})  # fmt: skip
"""Names in Ollama's library, and the repositories that its files were made from."""

FAMILIES = frozenset({"bert", "nomic-bert", "nomic-bert-moe", "xlm-roberta", "jina-bert-v2", "gemma-embedding"})
"""Of GGUF files that give vectors and no answers."""


def repository(name: Name) -> str | None:
    """Where the Hub has a model of Ollama's library; None for a name that is no embedding model's."""
    if (name.host.lower(), name.namespace.lower()) != (HOST, NAMESPACE):
        return None
    return next((there for ours, there in REPOSITORIES.items() if Name.parse(ours).matches(name)), None)


def embeds(model: Installed) -> bool:
    """Does it give vectors, and no answers?"""
    if isinstance(model, Folder):
        return model.embeds
    family = model.config.get("model_family")
    return isinstance(family, str) and family in FAMILIES


def at(text: str) -> Folder | None:
    """The embedding model in a folder of this disk, by its whole path; None where there is none."""
    path = Path(text)
    try:
        found = Folder(text, path, "disk") if path.is_absolute() else None
        return found if found is not None and found.embeds else None
    except (OSError, ValueError):  # a name that no file can have
        return None
