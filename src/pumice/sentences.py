"""Texts as vectors by a model that was made for it: a folder of sentence-transformers, run by sentence-transformers,
which the extra `embed` brings. Nothing of the folder is run: its parts are of the few kinds that are named here, its
weights are safetensors.

N texts · D width of a vector
"""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pumice.checkpoints.tensors import WRONG_FILE, opened
from pumice.embedding import Embeddings
from pumice.errors import UserError, shortened
from pumice.picture import ImageLike
from pumice.room.fitting import Machine, NoRoom
from pumice.room.memory import shown
from pumice.store.installed import PART, weights
from pumice.store.installed import PARTS as MODULES
from pumice.tokenizer_json import LibraryErrors, checked, content

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WITH_WEIGHTS = ("Transformer", "Dense", "LayerNorm", "WeightedLayerPooling")
PARTS = (*WITH_WEIGHTS, "Pooling", "Normalize", "Dropout")
"""Kinds of a model's parts, as the last word of `type` in its modules.json."""
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
_OF_MODELS = frozenset({"dtype", "torch_dtype"})
_OF_TOKENIZERS = frozenset({"do_lower_case", "model_max_length", "padding_side", "truncation_side", "use_fast"})
HANDED_ON = MappingProxyType({
    "model_kwargs": _OF_MODELS, "model_args": _OF_MODELS,
    "processor_kwargs": _OF_TOKENIZERS, "tokenizer_args": _OF_TOKENIZERS,
    "config_kwargs": frozenset[str](), "config_args": frozenset[str](),
})  # fmt: skip
"""Of a sentence_*_config.json: what may stand in the objects that transformers is given, by their new and old names."""
MOST_POSITIONS = 1 << 17
"""Where neither the tokenizer nor the network has a limit."""
AT_ONCE = 32
"""Texts of one pass."""
AGAIN = "get the model again, or another one"
KIND = "an embedding model of sentence-transformers"


class SentenceModel:
    """What `load_sentences` gives. Any thread may ask; one is answered at a time."""

    def __init__(self, name: str, inner: SentenceTransformer, positions: int) -> None:
        """positions: tokens of a text that count, those that the tokenizer adds among them."""
        self.name = name
        self.positions = positions
        self._inner = inner
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return torch.device(self._inner.device)

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(each.nbytes for each in self._inner.parameters())

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
            with _in_words(f"{self.name} cannot read these texts"):
                counts = self._counts(texts)
            longest = max(range(len(texts)), key=counts.__getitem__)
            if counts[longest] > self.positions and not truncate:
                raise UserError(
                    f"the input length exceeds the context length: {shortened(texts[longest])} is {counts[longest]} "
                    f"tokens long; {self.name} has {self.positions} positions",
                    hint="send less at a time, or let it be cut: truncate",
                )
            with _in_words(f"{self.name} gives no vectors"):
                found = self._inner.encode(
                    list(texts), batch_size=AT_ONCE, convert_to_tensor=True, show_progress_bar=False
                )
                vectors_ND = torch.as_tensor(found).float().cpu()
        if not vectors_ND.isfinite().all():
            raise UserError(f"the vectors of {self.name} are not numbers", hint="its weights are damaged")
        tokens = tuple(min(each, self.positions) for each in counts)
        return Embeddings(F.normalize(vectors_ND, dim=-1) if normalise else vectors_ND, tokens)

    def embed_images(self, images: Sequence[ImageLike], *, normalise: bool = True) -> Embeddings:
        """Raises UserError: it sees nothing."""
        raise UserError(
            f"{self.name} is {KIND}, for texts alone", hint="ask a LLaVA for vectors of images; they are of its own"
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
    needed = sum(each.stat().st_size for each in weights(folder))
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
            f"{name} is {KIND}, which is not installed", hint="pip install 'pumice[embed]', then ask again"
        ) from error
    with _in_words(f"{name} cannot be loaded", (str(folder), name)):
        inner = SentenceTransformer(
            str(folder), device=str(device), local_files_only=True, model_kwargs={"use_safetensors": True}
        ).eval()
        inner.max_seq_length = positions = _positions(inner)
        return SentenceModel(name, inner, positions)


def _positions(inner: SentenceTransformer) -> int:
    """What the tokenizer cuts texts to, and no more than the network has places for: some of RoBERTa's are none's."""
    tables = (
        each.num_embeddings - (0 if each.padding_idx is None else each.padding_idx + 1)
        for name, each in inner.named_modules()
        if name.endswith("position_embeddings") and isinstance(each, torch.nn.Embedding)
    )
    said = inner[0].auto_model.config.get_text_config().to_dict().get("max_position_embeddings")
    found = (inner.get_max_seq_length(), said, *tables, MOST_POSITIONS)
    return min(each for each in found if isinstance(each, int) and each > 0)


@contextmanager
def _in_words(what: str, private: tuple[str, str] = ("", "")) -> Iterator[None]:
    """Turns what the libraries raise for a damaged model into a UserError. private: a path, and what stands for it."""
    from pumice.store.hub import WRONG_CONFIG

    damaged = (
        OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError,
        ArithmeticError, pickle.UnpicklingError, WRONG_FILE, WRONG_CONFIG,
    )  # fmt: skip
    try:
        with LibraryErrors(AGAIN):
            yield
    except UserError as error:
        raise UserError(f"{what}: {error.message}", hint=error.hint) from error
    except torch.OutOfMemoryError as error:
        raise NoRoom(f"{what}: the GPU's memory is full", hint="send less at a time, or free some of it") from error
    except damaged as error:
        said = str(error).replace(*private).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what}: {said:.200}", hint=AGAIN) from error


def _check(folder: Path, name: str) -> None:
    """Its parts, before anything of it is loaded."""
    try:
        said = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        parts = [(str(each["type"]), str(each["path"])) for each in said]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f"{name} has no {MODULES} that can be read", hint=AGAIN) from error
    for kind, path in parts:
        package, _, last = kind.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers" or last not in PARTS:
            raise UserError(
                f"{name} has a part of the kind {shortened(kind)}", hint=f"pumice runs these: {', '.join(PARTS)}"
            )
        if path and not re.fullmatch(PART, f"{path}/"):
            raise UserError(f"{name} has a part that lies outside its folder: {shortened(path)}", hint=AGAIN)
        try:
            _check_part(folder / path, last)
        except UserError as error:
            said = error.message.replace(f"{(folder / path).resolve()}/", "").replace(f"{folder / path}/", "")
            raise UserError(f"{name}: {said} in {shortened(path or '.')}", hint=error.hint) from error
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}", hint=AGAIN) from error


def _check_part(place: Path, kind: str) -> None:
    if (place / "adapter_config.json").exists():
        raise UserError("an adapter, which pumice does not apply,", hint="merge it into its model, or take another one")
    for each in sorted(place.glob("sentence_*_config.json")):
        _check_settings(each)
    if kind not in WITH_WEIGHTS:
        return
    index = place / f"{WEIGHTS}.index.json"
    if not ((place / WEIGHTS).is_file() or (kind == "Transformer" and index.is_file())):
        raise UserError(
            "no weights as safetensors", hint="pumice reads no pickles of embedding models; take a newer build of it"
        )
    if index.is_file():
        files = _object(index).get("weight_map")
        names = set(files.values()) if isinstance(files, dict) and all(map(_is_text, files.values())) else {""}
        if not all(re.fullmatch(r"[^/\\]+\.safetensors", each) and (place / each).is_file() for each in names):
            raise UserError(f"{index.name} names files that are not safetensors here", hint=AGAIN)
    if (place / TOKENIZER).is_file():
        text = (place / TOKENIZER).read_text(encoding="utf-8", errors="replace")
        checked(text, content(text))  # transformers hides what the library says, and the library may end the process
    for each in sorted(place.glob("*.safetensors")):
        try:
            opened(each.resolve())  # the Hub's cache is made of links
        except UserError as error:
            raise UserError(error.message.replace(str(each.resolve()), each.name), hint=error.hint) from error


def _check_settings(path: Path) -> None:
    """What it hands on to transformers: other code, files from elsewhere and pickles can be asked for there."""
    said = _object(path)
    if "tokenizer_name_or_path" in said:
        raise UserError(f"{path.name} names a tokenizer from elsewhere", hint=AGAIN)
    for key, allowed in HANDED_ON.items():
        given = said.get(key) or {}
        if not isinstance(given, dict) or not given.keys() <= allowed or any(map(_is_nested, given.values())):
            raise UserError(
                f"{path.name} has settings in {key} that pumice does not know",
                hint=f"these are known: {', '.join(sorted(allowed)) or 'none'}",
            )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read", hint=AGAIN) from error
    if not isinstance(found, dict):
        raise UserError(f"{path.name} is no object", hint=AGAIN)
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
