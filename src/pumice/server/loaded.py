"""A model in memory, as the server holds it: one that answers, or one that only gives vectors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pumice.durations import SECOND_NS
from pumice.server.asked import Contexts, window_of
from pumice.server.wire import timestamp
from pumice.store import Installed, facts

if TYPE_CHECKING:
    import torch

    from pumice.model import Model
    from pumice.sentences import SentenceModel
    from pumice.server.worker import Worker


@dataclass(eq=False)
class Resident:
    """A model that answers, and the thread that runs its engine."""

    installed: Installed
    told: Mapping[str, Any]
    """As `listed` has it, of when it was loaded."""
    model: Model
    worker: Worker
    keep_ns: int
    turn: asyncio.Semaphore
    """So many requests are read and answered at a time; the others wait with their bytes alone."""
    context: int | None = None
    """`Settings.context`."""
    users: int = 0
    ended_s: float = field(default_factory=time.time)
    """When its last answer ended, in seconds since 1970."""
    contexts: Contexts = field(default_factory=Contexts)

    @property
    def expires_s(self) -> float:
        """When it goes if nobody asks, in seconds since 1970."""
        return _expires_s(self)

    @property
    def bytes(self) -> int:
        """Weights, and the cache for keys and values."""
        return int(self.told["size"]) + self.model.engine.cache_bytes

    @property
    def device(self) -> torch.device:
        return self.model.network.like.device

    @property
    def window(self) -> int:
        """Tokens of context."""
        return window_of(self.model.config, self.context)

    @property
    def alive(self) -> bool:
        return self.worker.alive

    @property
    def silent_s(self) -> float:
        return self.worker.silent_s

    @property
    def at_work(self) -> int:
        """Answers under way."""
        return self.worker.waiting

    @property
    def cache_share(self) -> float:
        return self.model.cache_share

    def close(self) -> None:
        self.worker.close()
        if not self.users:  # who still has it is told that it is gone
            del self.model, self.worker


@dataclass(eq=False)
class Embedder:
    """A model that gives vectors and no answers."""

    alive: ClassVar[bool] = True
    silent_s: ClassVar[float] = 0.0
    cache_share: ClassVar[float] = 0.0

    installed: Installed
    told: Mapping[str, Any]
    """As `Resident.told`."""
    model: SentenceModel
    keep_ns: int
    turn: asyncio.Semaphore
    users: int = 0
    ended_s: float = field(default_factory=time.time)

    @property
    def expires_s(self) -> float:
        """When it goes if nobody asks, in seconds since 1970."""
        return _expires_s(self)

    @property
    def bytes(self) -> int:
        return self.model.bytes

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def window(self) -> int:
        """Tokens of a text that count."""
        return self.model.positions

    @property
    def at_work(self) -> int:
        """Requests whose vectors are computed."""
        return int(self.turn.locked())

    def close(self) -> None:
        if not self.users:
            del self.model


Loaded = Resident | Embedder


def listed(model: Installed) -> dict[str, Any]:
    """A model as Ollama's lists have it. Reads files, and where a folder has no commit all of its weights."""
    return {
        "name": model.title,
        "model": model.title,
        "modified_at": timestamp(model.modified_s),
        "size": model.size,
        "digest": model.digest,
        "details": asdict(facts.details(model)),
        "capabilities": list(facts.capabilities(model)),
    }


def _expires_s(loaded: Loaded) -> float:
    since = time.time() if loaded.users else loaded.ended_s
    return since + loaded.keep_ns / SECOND_NS
