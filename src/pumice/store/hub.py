"""Models from the Hugging Face Hub, by huggingface_hub into its own cache, where every program of its family looks.

What is fetched is what pumice reads: weights, JSON files and tokenizer.model; a pickle only where no safetensors file
says the same. Progress is told as a registry's is, with a file's name where that has a digest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from httpx2 import TransportError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, tqdm

from pumice.errors import UserError, shortened
from pumice.store.download import TOLD_EVERY_S, on_disk
from pumice.store.hub_cache import PICKLES, WORDS, wanted
from pumice.store.installed import PARTS
from pumice.store.link import Unreachable
from pumice.store.registry import Missing
from pumice.store.transfer import Progress

WRONG_CONFIG = StrictDataclassError
"""What the library raises for a config.json whose values are of another kind; transformers reads with it."""


class _Stopped(Exception):
    """Nobody waits for this file any more."""


def pull(repository: str) -> Iterator[Progress]:
    """Bring a repository, as `llava-hf/llava-1.5-7b-hf`, into the Hub's cache.

    Closing the iterator, or killing the process, leaves the files that have come for the next pull; the one that was
    under way begins anew there, as huggingface_hub does it. With no Hub in reach a model that is there whole is a
    success too. Raises UserError, Missing where the Hub has no such repository.
    """
    yield Progress("pulling manifest")
    with on_disk(), _in_our_words(repository):  # the Hub's errors are OSErrors too
        try:
            info = huggingface_hub.HfApi().model_info(repository, files_metadata=True)
        except (TransportError, OfflineModeIsEnabled):
            _refuse_incomplete(repository)
            yield Progress("success")
            return
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        names = wanted(list(sizes))
        if not any(Path(each).suffix in (".safetensors", ".bin") for each in names):
            raise UserError(
                f"{shortened(repository)} has no weights that pumice reads",
                hint="for GGUF files name it hf.co/USER/REPOSITORY:QUANT",
            )
        for name in names:
            yield from _file(repository, str(info.sha), name, sizes[name])
        # All is here: this only writes down that this commit is what the branch is, and what it consists of.
        disable_progress_bars()
        huggingface_hub.snapshot_download(repository, allow_patterns=names)
    yield Progress("success")


def _file(repository: str, commit: str, name: str, size: int) -> Iterator[Progress]:
    """Bring one file, in a thread of its own."""
    status, came, stop, problems = f"pulling {name}", [0], threading.Event(), list[Exception]()

    def told(bytes_there: int) -> None:
        if stop.is_set():
            raise _Stopped
        came[0] = max(came[0], bytes_there)

    def bring() -> None:
        try:
            huggingface_hub.hf_hub_download(repository, name, revision=commit, tqdm_class=_bar(told))
        except _Stopped:
            return
        except (OSError, ValueError, RuntimeError, TransportError) as error:
            problems.append(error)

    yield Progress(status, name, size)
    thread = threading.Thread(target=bring, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(TOLD_EVERY_S)
            yield Progress(status, name, size, min(came[0], size))
    finally:
        stop.set()
        thread.join(timeout=2.0)
    if problems:
        raise problems[0]
    yield Progress(status, name, size, size)


def _bar(told: Callable[[int], None]) -> type[tqdm]:
    """A progress bar that draws nothing and tells how many bytes are there."""
    disable_progress_bars()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            told(int(self.n))

    return Bar


def _refuse_incomplete(repository: str) -> None:
    """Raises LocalEntryNotFoundError unless the cache has all files that `pull` would bring."""
    words = [f"*{each}" for each in WORDS]
    parts = huggingface_hub.try_to_load_from_cache(repository, PARTS)
    if isinstance(parts, str):
        texts = ["*vocab.txt", "*merges.txt", "*.model"]
        huggingface_hub.snapshot_download(
            repository,
            local_files_only=True,
            allow_patterns=["*.safetensors", *words, *texts],
            ignore_patterns=["[!0-9]*/*", "*/*/*"],
        )
        return
    folder = huggingface_hub.snapshot_download(
        repository,
        local_files_only=True,
        allow_patterns=["*.safetensors", *words],
        ignore_patterns=["*/*", "*.bin.index.json"],
    )
    if not any(Path(folder).glob("*.safetensors")):
        pickles = [f"{each}*" for each in PICKLES]
        huggingface_hub.snapshot_download(repository, local_files_only=True, allow_patterns=[*words, *pickles])


@contextmanager
def _in_our_words(repository: str) -> Iterator[None]:
    name = shortened(repository)
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{name} is only for those whom its owners let in", hint="ask on its page, then set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise Missing(f"the Hub has no model {name}, or not for you", hint="check the name; set HF_TOKEN") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, TransportError) as error:
        raise Unreachable(
            f"the Hub cannot be reached, and {name} is not here whole", hint="check the network, then try again"
        ) from error
    except HfHubHTTPError as error:
        raise Unreachable(f"the Hub answers with an error for {name}", hint="try again later") from error
