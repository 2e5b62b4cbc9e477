"""Texts as vectors by a model that was made for it: a folder of sentence-transformers, run by sentence-transformers,
which the extra `embed` brings. Nothing of the folder is run: its parts are of the few kinds that are named here, its
weights are safetensors.

N texts · D width of a vector
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pumice.checkpoints.tensors import opened
from pumice.embedding import Embeddings
from pumice.errors import UserError, shortened
from pumice.picture import ImageLike
from pumice.room.fitting import Machine, NoRoom
from pumice.room.memory import shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WITH_WEIGHTS = ("Transformer", "Dense", "LayerNorm", "WeightedLayerPooling")
PARTS = (*WITH_WEIGHTS, "Pooling", "Normalize", "Dropout")
"""Kinds of a model's parts, as the last word of `type` in its modules.json."""
AT_ONCE = 32
"""Texts of one pass."""
AGAIN = "get the model again, or another one"
SAID = "an embedding model of sentence-transformers"


class SentenceModel:
    """What `load_sentences` gives. Any thread may ask; one is answered at a time."""

    def __init__(self, name: str, inner: SentenceTransformer) -> None:
        self.name = name
        self._inner = inner
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return torch.device(self._inner.device)

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(each.nbytes for each in self._inner.parameters())

    @property
    def positions(self) -> int:
        """Tokens of a text that count, those that the tokenizer adds among them."""
        return int(self._inner.get_max_seq_length() or self._inner.tokenizer.model_max_length)

    def embed(self, texts: Sequence[str], *, truncate: bool = False, normalise: bool = True) -> Embeddings:
        """A vector for each text, as `SentenceTransformer.encode` has it, with the prompt that the model puts in front.

        truncate: of a text that is longer than the model takes only the beginning counts. normalise: to length 1.
        Raises UserError for what is no text, or too long.
        """
        for each in texts:
            if not isinstance(each, str) or not _is_unicode(each):
                raise UserError(f"a text to be embedded is {each!r:.100}", hint="give texts")
        if not texts:
            return Embeddings(torch.empty(0, self._inner.get_embedding_dimension() or 0), ())
        with self._lock:
            counts = self._counts(texts)
            longest = max(range(len(texts)), key=counts.__getitem__)
            if counts[longest] > self.positions and not truncate:
                raise UserError(
                    f"the input length exceeds the context length: {shortened(texts[longest])} is {counts[longest]} "
                    f"tokens long; {self.name} has {self.positions} positions",
                    hint="send less at a time, or let it be cut: truncate",
                )
            found = self._inner.encode(list(texts), batch_size=AT_ONCE, convert_to_tensor=True, show_progress_bar=False)
        assert isinstance(found, torch.Tensor)
        vectors_ND = found.float().cpu()
        if not vectors_ND.isfinite().all():
            raise UserError(f"the vectors of {self.name} are not numbers", hint="its weights are damaged")
        tokens = tuple(min(each, self.positions) for each in counts)
        return Embeddings(F.normalize(vectors_ND, dim=-1) if normalise else vectors_ND, tokens)

    def embed_images(self, images: Sequence[ImageLike], *, normalise: bool = True) -> Embeddings:
        """Raises UserError: it sees nothing."""
        raise UserError(
            f"{self.name} is {SAID}, for texts alone", hint="ask a LLaVA for vectors of images; they are of its own"
        )

    def _counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, uncut."""
        prompt = self._inner.prompts.get(self._inner.default_prompt_name or "") or ""
        found = self._inner.tokenizer([prompt + each for each in texts], truncation=False, padding=False, verbose=False)
        return list(map(len, found["input_ids"]))


def load_sentences(folder: Path, name: str) -> SentenceModel:
    """A model of sentence-transformers, from its folder; on a GPU where there is one. Nothing is asked of the network.

    Raises UserError where the extra is missing, for parts that are not among PARTS, for weights that are not
    safetensors, and for what is damaged; NoRoom where it does not fit into memory.
    """
    _check(folder, name)
    from pumice.model import chosen_device

    device = chosen_device(None)
    needed = sum(each.stat().st_size for each in folder.rglob("*.safetensors"))
    memory = Machine().memory(device)
    if memory is not None and needed > memory.available + memory.swap:
        raise NoRoom(
            f"{name} needs {shown(needed)} of memory for its weights; {shown(memory.available)} is free",
            hint="close other programs, or take a smaller model",
        )
    # Its bars would stand between the lines of a server's log; this is read when the libraries are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"{name} is {SAID}, which is not installed", hint="pip install 'pumice[embed]', then ask again"
        ) from error
    try:
        inner = SentenceTransformer(
            str(folder), device=str(device), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError) as error:
        said = str(error).replace(str(folder), name).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be loaded: {said:.200}", hint=AGAIN) from error
    return SentenceModel(name, inner.eval())


def _check(folder: Path, name: str) -> None:
    """Its parts, before anything of it is loaded."""
    try:
        said = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        parts = [(str(each["type"]), str(each["path"])) for each in said]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f"{name} has no modules.json that can be read", hint=AGAIN) from error
    for kind, path in parts:
        package, _, last = kind.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers" or last not in PARTS:
            raise UserError(
                f"{name} has a part of the kind {shortened(kind)}", hint=f"pumice runs these: {', '.join(PARTS)}"
            )
        place = folder / path
        if path and not re.fullmatch(r"[A-Za-z0-9_-]+", path):
            raise UserError(f"{name} has a part that lies outside its folder: {shortened(path)}", hint=AGAIN)
        weights = sorted(place.glob("*.safetensors"))
        if last in WITH_WEIGHTS and not weights:
            raise UserError(
                f"{name} has no weights as safetensors in {shortened(path or '.')}",
                hint="pumice reads no pickles of embedding models; take a newer build of it",
            )
        for each in weights:
            try:
                opened(each.resolve())  # the Hub's cache is made of links
            except UserError as error:
                said = error.message.replace(str(each.resolve()), each.name)
                raise UserError(f"{name}: {said}", hint=error.hint) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
