"""Where models lie on this machine. Each environment variable is read here and nowhere else.

PUMICE_HOME: pumice's own folder. OLLAMA_MODELS: Ollama's store. HF_HUB_CACHE, HF_HOME: the Hub's cache.
"""

from __future__ import annotations

import os
from pathlib import Path

from pumice.store.layout import OwnStore, Store


def own_store() -> OwnStore:
    """The store that pumice keeps; its folder is made when the first model comes."""
    return OwnStore(_folder("PUMICE_HOME", "~/.pumice") / "models")


def ollama_stores() -> list[Store]:
    """Ollama's stores, to be read: the one that is named, or those of this user and of the system's service."""
    if os.environ.get("OLLAMA_MODELS"):
        roots = [_folder("OLLAMA_MODELS", "")]
    else:
        roots = [_folder("", "~/.ollama/models"), Path("/usr/share/ollama/.ollama/models")]
    return [Store(each, "Ollama") for each in roots if os.access(each, os.R_OK | os.X_OK)]


def hub_folder() -> Path:
    """Where huggingface_hub keeps what it fetches."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return _folder("HF_HUB_CACHE", os.path.join(home, "hub"))


def _folder(variable: str, default: str) -> Path:
    return Path(os.path.expanduser(os.environ.get(variable) or default))
