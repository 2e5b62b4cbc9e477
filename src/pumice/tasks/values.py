"""What one build of a model computes on the probes, kept in memory or in a file, so that a large reference is loaded
once.

T tokens of a prompt · I tokens of its image · D width · A places of the answer · V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pumice import store
from pumice.checkpoints.fields import reading
from pumice.checkpoints.tensors import Entry, open_file, save_file
from pumice.conversation import Stream
from pumice.engine.sampling import Sampling
from pumice.errors import UserError, shortened
from pumice.image import Grid, Prepared
from pumice.model import Model, load_from
from pumice.prompt import Part
from pumice.question import Question
from pumice.source import Source
from pumice.tasks.card import Build, read_as
from pumice.tasks.probes import ANSWER_TOKENS, Probe

IMAGE = -1
"""Stands in stored prompts where an image token stands, whose own id differs between formats."""
SUFFIX = ".safetensors"
GRID_NUMBERS = 7
"""Of a grid those that the picture's size decides: builds are compared with all tokens of an image."""
MAX_PROBES = 1000
MAX_FACTS_BYTES = 2**20
SAMPLE = "The 7 quick brown foxes (and 1 lazy dog) jump over: naïve café, 3.14 x 2 = 6.28!\nIsn't it?"
"""Two builds of one model read this as the same ids."""


@dataclass(frozen=True)
class Subject:
    """A build, and what it must share with another build of the same model to be compared with it."""

    build: Build
    words: tuple[int, ...]
    """The ids of SAMPLE."""
    family: str
    width: int
    """Channels of the language model, and of a feature."""
    tile_px: int
    """0, as the next two, for a text model."""
    side: int
    """Features along one edge of a tile."""
    tile_tokens: int
    """Their number, the class token included where it is kept."""

    @classmethod
    def of(cls, source: Source) -> Subject:
        """From the headers of its files."""
        found = source.checkpoint()
        kinds, vision, words = found.tensors.kinds, found.config.vision, found.tokenizer
        build = Build(
            name="".join(each for each in _last_part(source) if each.isprintable())[:100],
            format=found.format,
            tower=kinds("vision_tower.", "multi_modal_projector.", "image_newline"),
            language_model=kinds("language_model.", "lm_head."),
            nbytes=found.tensors.nbytes,
        )
        ids = words.encode([Part("text", SAMPLE)], [], image_id=IMAGE).ids[int(words.adds_bos) :]
        tile = (vision.image_px, vision.side, vision.tile_tokens) if vision else (0, 0, 0)
        return cls(build, tuple(ids), found.config.family, found.config.text.width, *tile)

    def check(self, reference: Subject) -> None:
        """Raises UserError unless both are builds of one model, as far as their numbers must fit."""
        names = f"{self.build.name} and {reference.build.name}"
        hint = "give another build of the same model"
        if self.words != reference.words:
            raise UserError(f"{names} read the same text as other tokens: they have different vocabularies", hint=hint)
        if self.family != reference.family:
            raise UserError(
                f"{names} are of different families, {self.family} and {reference.family}",
                hint="where one lacks its eyes, name them: --with for the model, --against-with for the reference",
            )
        for what in ("width", "tile_px", "side", "tile_tokens"):
            mine, other = self.__dict__[what], reference.__dict__[what]
            if mine != other:
                raise UserError(f"{names} are different models: {what} is {mine} and {other}", hint=hint)


def _last_part(source: Source) -> str:
    """A card travels with its file: it names no folders of whoever made it."""
    return store.files(source.name).title


@dataclass(frozen=True, eq=False)
class Result:
    """What a build computes of one probe. Features and logits are those of its own prompt and answer."""

    ids: list[int]
    answer: list[int]
    logits_AV: Tensor
    image: Prepared | None = None
    features_ID: Tensor | None = None

    @property
    def features(self) -> list[Tensor]:
        return [] if self.features_ID is None else [self.features_ID]


@dataclass(frozen=True, eq=False)
class Values:
    """The results of one build on all probes."""

    subject: Subject
    probes: tuple[tuple[str, str], ...]
    """Prompt and digest of each."""
    results: tuple[Result, ...]

    def save(self, path: Path) -> None:
        """Raises UserError when the file cannot be written."""
        facts = {
            "pumice": importlib.metadata.version("pumice"),
            "subject": dataclasses.asdict(self.subject),
            "probes": self.probes,
        }
        tensors = {"facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}
        for number, each in enumerate(self.results):
            tensors |= {f"{number}.{name}": values for name, values in _stored(each).items()}
        save_file(path, tensors)


def _silent(done: int) -> None: ...


def measured(
    source: Source,
    asked: Sequence[Probe],
    *,
    dtype: str | None,
    device: str | None,
    told: Callable[[int], None] = _silent,
) -> Values:
    """Load a build, ask it, drop it. `told` hears how many probes are done."""
    told(0)
    model, subject = load_from(source, dtype=dtype, device=device), Subject.of(source)
    results = tuple(_result(model, probe, functools.partial(told, done)) for done, probe in enumerate(asked, 1))
    return Values(subject, tuple((each.prompt, each.digest) for each in asked), results)


def question(probe: Probe) -> Question:
    return Question(probe.prompt, probe.picture, sampling=Sampling(max_tokens=ANSWER_TOKENS))


def _result(model: Model, probe: Probe, done: Callable[[], None]) -> Result:
    asked = question(probe)
    seen, mark = model.see(asked), model.config.image_token_id
    stream = Stream(model, asked, seen)
    tokens = list(stream.answer.tokens)
    # An image token that is answered ends what can be read again: there it would ask for an image.
    answer = tokens[: tokens.index(mark) + 1] if mark in tokens else tokens
    features = seen_features(model, seen.images)
    logits_AV = forced(model, seen.encoded.ids, answer, features)
    done()
    return Result(
        plain(model, seen.encoded.ids),
        answer,
        logits_AV,
        seen.images[0] if seen.images else None,
        features[0] if features else None,
    )


def plain(model: Model, ids: Sequence[int]) -> list[int]:
    """Ids with IMAGE for the model's own image token."""
    return [IMAGE if id == model.config.image_token_id else id for id in ids]


def marked(model: Model, ids: Sequence[int]) -> list[int]:
    """The way back."""
    return [model.config.image_token_id if id == IMAGE else id for id in ids]


def seen_features(model: Model, images: Sequence[Prepared]) -> list[Tensor]:
    """Raises UserError for what is no number."""
    return _kept(model, model.features(images))


def _kept(model: Model, features: Sequence[Tensor]) -> list[Tensor]:
    return [_finite(model, "image features", each.cpu().clone()) for each in features]


def forced(model: Model, ids: Sequence[int], answer: Sequence[int], features: Sequence[Tensor]) -> Tensor:
    """The scores of each token of an answer, (A, V), after the tokens before it, whatever the model would say itself.

    Raises UserError for an answer with tokens that the model cannot read, and for scores that are no numbers.
    """
    strange = next((id for id in answer if not 0 <= id < model.config.text.vocab), None)
    if strange is not None or model.config.image_token_id in answer[:-1]:
        raise UserError(
            f"the reference answers with the token {strange or model.config.image_token_id}, which {model.name} cannot "
            "read as a word",
            hint="give another build of the same model",
        )
    device = model.network.like.device
    rows = [each.to(device) for each in features]
    return _finite(model, "logits", model.logits([*ids, *answer[:-1]], rows, len(answer)).cpu())


def _finite(model: Model, what: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise UserError(
            f"{model.name} computes {what} that are no numbers",
            hint="a weight is damaged, or 16 bits are too few: try --dtype float32",
        )
    return values


# --- the file ---------------------------------------------------------------------------------------------------------


def _stored(result: Result) -> dict[str, Tensor]:
    found = {
        "ids": torch.tensor(result.ids),
        "answer": torch.tensor(result.answer),
        "logits": result.logits_AV.contiguous(),
    }
    if result.image is not None and result.features_ID is not None:
        found["pixels"] = torch.from_numpy(result.image.pixels)
        found["grid"] = torch.tensor([int(each) for each in dataclasses.astuple(result.image.grid)[:GRID_NUMBERS]])
        found["features"] = result.features_ID.contiguous()
    return found


def read_values(path: Path) -> Values:
    """Values that `save` wrote: mapped, and read when they are used.

    Raises UserError for a file that is damaged, or whose numbers contradict each other.
    """
    with reading(path):
        entries = open_file(path)
    try:
        facts = json.loads(bytes(_tensor(entries, "facts", torch.uint8, (MAX_FACTS_BYTES,)).numpy()))
        if not isinstance(facts, dict) or not isinstance(facts.get("probes"), list):
            raise ValueError("its facts are none")
        subject = read_as(Subject, facts.get("subject"), "subject")
        probes = tuple(read_as(tuple[str, ...], each, "a probe") for each in facts["probes"])
        if not 0 < len(probes) <= MAX_PROBES or any(len(each) != 2 for each in probes):
            raise ValueError(f"it has {len(probes)} probes")
        results = tuple(_restored(entries, str(number), subject, bool(each[1])) for number, each in enumerate(probes))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} holds no reference values that can be read: {shortened(str(error))[1:-1]}",
            hint=f"make it again: pumice verify REFERENCE --save {path.name}",
        ) from error
    return Values(subject, probes, results)


def _restored(entries: Mapping[str, Entry], number: str, subject: Subject, seeing: bool) -> Result:
    """Raises ValueError for what `_stored` would not have written."""
    ids, answer = (_tensor(entries, f"{number}.{name}", torch.int64, (2**20,)).tolist() for name in ("ids", "answer"))
    logits_AV = _tensor(entries, f"{number}.logits", torch.float32, (len(answer), 2**20), exact=1)
    places = ids.count(IMAGE)
    if min(ids) < IMAGE or min(answer) < 0 or max(answer) >= logits_AV.shape[1] or bool(places) != seeing:
        raise ValueError(f"the prompt or the answer of probe {number} holds other tokens than words and images")
    if not seeing:
        return Result(ids, answer, logits_AV)
    grid = _grid(_tensor(entries, f"{number}.grid", torch.int64, (GRID_NUMBERS,), exact=1).tolist(), subject)
    if grid.tokens != places:
        raise ValueError(f"probe {number} has {places} image tokens and {grid.tokens} features")
    edges = (grid.tiles, 3, subject.tile_px, subject.tile_px)
    pixels = _tensor(entries, f"{number}.pixels", torch.float32, edges, exact=4).numpy().astype(np.float32)
    features_ID = _tensor(entries, f"{number}.features", None, (places, subject.width), exact=2)
    return Result(ids, answer, logits_AV, Prepared(pixels, grid, (0, 0), ""), features_ID)


def _grid(numbers: Sequence[int], subject: Subject) -> Grid:
    """Raises ValueError unless a model of this kind can cut a picture so."""
    side, class_token, rows, columns, top, left, newline = numbers
    grid = Grid(side, bool(class_token), rows, columns, top, left, bool(newline))
    whole = all(0 <= each <= 4096 for each in numbers) and grid.tiles <= 4096
    tiled = subject.family == "llava-1.6"
    fits = side == subject.side > 0 and side**2 + class_token == subject.tile_tokens and newline == tiled
    if not whole or not fits or (grid.tiles > 1) != tiled or min(grid.kept_rows, grid.kept_columns) < 0:
        raise ValueError(f"its picture of the tiles {numbers} is none of this model")
    return grid


def _tensor(
    entries: Mapping[str, Entry], name: str, dtype: torch.dtype | None, most: tuple[int, ...], *, exact: int = 0
) -> Tensor:
    """A tensor of this type (None: any of floating point) and at most these sizes, of which the first `exact` must be
    met; of numbers only. Raises ValueError."""
    if name not in entries:
        raise ValueError(f"it has no {name}")
    shape, found = entries[name].shape, entries[name].dtype
    fits = len(shape) == len(most) and all(0 < each <= limit for each, limit in zip(shape, most))
    if not fits or shape[:exact] != most[:exact]:
        raise ValueError(f"{name} is of shape {list(shape)}")
    if found != dtype and (dtype is not None or not found.is_floating_point):
        raise ValueError(f"{name} is of type {found}")
    values = entries[name].dense()
    if not values.isfinite().all():
        raise ValueError(f"{name} holds what is no number")
    return values
