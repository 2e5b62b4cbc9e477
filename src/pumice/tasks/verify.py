"""How far is a build of a model from another? Pixels, tower, language model, and the whole, each apart."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pumice import store
from pumice.checkpoints.card import check_room, write_card
from pumice.errors import UserError
from pumice.image import ImageLike
from pumice.model import Model, load_from
from pumice.source import Source
from pumice.tasks.card import Card
from pumice.tasks.figures import FeatureTally, LogitTally, PixelTally
from pumice.tasks.probes import Probe, probes
from pumice.tasks.values import (
    SUFFIX,
    Subject,
    Values,
    forced,
    marked,
    measured,
    plain,
    question,
    read_values,
    seen_features,
)

VALUES_NAME = f"pumice-values{SUFFIX}"
"""A file of reference values in the model's own folder, which is taken where no reference is named."""


Progress = Callable[[str, int, int], None]
"""Called with which build is under way, how many questions are done, and how many there are."""


def _silent(what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class How:
    """The choices of `verify`, and who hears how far it is."""

    images: Sequence[ImageLike] = ()
    keep: bool = False
    dtype: str | None = None
    device: str | None = None
    progress: Progress = _silent


def verify(
    model: str | Path | Source,
    against: str | Path | Source | None = None,
    *,
    images: Sequence[ImageLike] = (),
    keep: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> Card:
    """Compare a build of a model with a reference: another build, or a file of values that `save_values` wrote.

    against: None takes `pumice-values.safetensors` from the model's folder. images: asked about instead of the drawn
    ones; for a file of values those it was made with. keep: write the card into the model's GGUF file, which must have
    room for it. dtype and device are those of `load`, for both.

    The reference is computed and dropped before the model is loaded, so the peak of memory is that of the larger one.
    Raises UserError: what `load` raises; builds of different models; values of other probes; no room for the card.
    """
    return compare(model, against, How(images, keep, dtype, device))


def compare(model: str | Path | Source, against: str | Path | Source | None, how: How) -> Card:
    """`verify`, which is told how far it is."""
    source = _source(model)
    reference = _source(against) if against is not None else Source(_values_beside(source))
    if how.keep:
        _check_keeps(source)
    subject = Subject.of(source)
    asked = probes(how.images, eyes=subject.tile_px > 0)
    values = _values(reference, subject, asked, how)
    told = functools.partial(_told, how, "model", len(asked))
    told(0)
    card = _compared(load_from(source, dtype=how.dtype, device=how.device), subject, values, asked, told)
    if how.keep:
        write_card(store.resolve(source.name), card.to_json())
    return card


def _check_keeps(source: Source) -> None:
    """Raises UserError for a model that cannot keep a card."""
    found = store.files(source.name)
    if found.stored is not None:
        raise UserError(
            f"{found.title} lies in a store, whose files have the names of their bytes",
            hint="print the card with --json and keep that",
        )
    check_room(found.path)


def _told(how: How, what: str, total: int, done: int) -> None:
    how.progress(what, done, total)


def save_values(
    model: str | Path | Source,
    path: str | Path,
    *,
    images: Sequence[ImageLike] = (),
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Write what a build computes as reference values, which `verify` takes in its place.

    path: a new file that ends in `.safetensors`. The other arguments are those of `verify`.

    Raises UserError: what `load` raises, and a file that is there already or cannot be written.
    """
    save(model, Path(path), How(images, dtype=dtype, device=device))


def save(model: str | Path | Source, path: Path, how: How) -> None:
    """`save_values`, which is told how far it is."""
    source = _source(model)
    if path.suffix != SUFFIX:
        raise UserError(f"{path} does not end in {SUFFIX}", hint=f"name the file values{SUFFIX}")
    if path.exists():
        raise UserError(f"{path} is there already", hint="name a new file, or remove that one")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", hint="make it first")
    asked = probes(how.images, eyes=Subject.of(source).tile_px > 0)
    told = functools.partial(_told, how, "reference", len(asked))
    measured(source, asked, dtype=how.dtype, device=how.device, told=told).save(path)


def _source(model: str | Path | Source) -> Source:
    return model if isinstance(model, Source) else Source(model)


def _values_beside(source: Source) -> Path:
    path = store.resolve(source.name)
    beside = (path if path.is_dir() else path.parent) / VALUES_NAME
    if not beside.is_file():
        raise UserError(
            f"there is nothing to compare {store.files(source.name).title} with, and no {VALUES_NAME} beside it",
            hint="name another build or a file of values with --against",
        )
    return beside


def _values(reference: Source, subject: Subject, asked: Sequence[Probe], how: How) -> Values:
    path = Path(os.path.expanduser(reference.name))
    if path.suffix != SUFFIX or not os.path.isfile(path):
        subject.check(Subject.of(reference))
        told = functools.partial(_told, how, "reference", len(asked))
        return measured(reference, asked, dtype=how.dtype, device=how.device, told=told)
    values = read_values(path)
    subject.check(values.subject)
    if values.probes != tuple((each.prompt, each.digest) for each in asked):
        raise UserError(
            f"{path} was made with other pictures or questions",
            hint="give the same pictures with --image, or make it again with --save",
        )
    return values


def _compared(
    model: Model, subject: Subject, values: Values, asked: Sequence[Probe], told: Callable[[int], None]
) -> Card:
    pixels, features, language_model, whole = PixelTally(), FeatureTally(), LogitTally(), LogitTally()
    same_prompts = 0
    for done, (probe, reference) in enumerate(zip(asked, values.results, strict=True), 1):
        seen = model.see(question(probe))
        own = seen_features(model, seen.images)
        same = plain(model, seen.encoded.ids) == reference.ids
        same_prompts += same
        if reference.image is not None and reference.features_ID is not None:
            twin = pixels.add(reference.image, seen.images[0])
            (found_ID,) = own if twin else seen_features(model, [reference.image])
            features.add(reference.features_ID, found_ID, reference.image.grid)
            same = same and twin and torch.equal(found_ID.float(), reference.features_ID.float())
        answer_A = torch.tensor(reference.answer)
        logits_AV = forced(model, marked(model, reference.ids), reference.answer, reference.features)
        language_model.add(reference.logits_AV, logits_AV, answer_A)
        if not same:
            logits_AV = forced(model, seen.encoded.ids, reference.answer, own)
        whole.add(reference.logits_AV, logits_AV, answer_A)
        told(done)
    pictures = sum(each.image is not None for each in values.results)
    return Card(
        model=subject.build,
        reference=values.subject.build,
        pumice=importlib.metadata.version("pumice"),
        questions=len(asked),
        pictures=pictures,
        places=language_model.places,
        same_prompts=same_prompts,
        pixels=pixels.figures() if pictures else None,
        features=features.figures() if pictures else None,
        language_model=language_model.figures(),
        whole=whole.figures(),
    )
