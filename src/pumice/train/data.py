"""From conversations to what a step of training reads.

B rows · T positions
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pumice.config import LlavaConfig
from pumice.errors import UserError
from pumice.image import Grid, ImageLike, prepare
from pumice.prompt import Message, messages_from_llava, render
from pumice.tokenizer import Tokenizer

IGNORED = -100
"""The label of a position whose token is not learned."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its images, in the order of the messages."""

    messages: tuple[Message, ...]
    images: tuple[ImageLike, ...] = ()
    name: str = ""


class Dataset(Protocol):
    """Samples by number, so that a run can go on where it stopped."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


class JsonDataset:
    """The authors' format: a list of {id, image?, conversations: [{from: human | gpt, value}]}.

    An image is a path below the folder `images`; one that leads out of it is refused. Source: LLaVA
    docs/Finetune_Custom_Data.md. Raises UserError when the file is not of that form, a sample's when it is drawn.
    """

    def __init__(self, path: Path, images: Path) -> None:
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is no readable JSON: {error}", hint="give a list of conversations") from error
        if not isinstance(self._rows, list) or not all(isinstance(row, dict) for row in self._rows) or not self._rows:
            raise UserError(f"{path} holds no list of samples", hint="give [{id, image, conversations}, …]")
        self._path, self._images = path, images

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        row = self._rows[index]
        name = f"{self._path.name}, sample {row.get('id', index)!r}"
        with _naming(name):
            turns = row.get("conversations")
            if not isinstance(turns, list):
                raise UserError("it has no conversations", hint="give [{from: human | gpt, value: text}, …]")
            images = (self._picture(row["image"]),) if "image" in row else ()
            return Sample(tuple(messages_from_llava(turns, has_image=bool(images))), images, name)

    def _picture(self, written: object) -> str:
        if not isinstance(written, str):
            raise UserError(f"its image is {written!r:.100}", hint="give the path of one picture, or leave the key out")
        if Path(written).anchor or ".." in Path(written).parts:
            raise UserError(
                f"its image {written!r:.100} leads out of the image folder", hint="give a path below the folder"
            )
        return str(self._images / written)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """A UserError from inside comes out with the name of the sample."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error.message}", hint=error.hint) from error


@dataclass(frozen=True)
class Row:
    """A sample, encoded."""

    ids: list[int]
    labels: list[int]
    pixels: list[np.ndarray]
    grids: list[Grid]

    @property
    def learned(self) -> int:
        """Tokens whose loss counts; nothing stands before the first, from which it could be predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class TrainBatch:
    """ids_BT and labels_BT are padded on the right, labels with IGNORED; pixels hold the tiles of all images."""

    ids_BT: Tensor
    labels_BT: Tensor
    pixels_N3YX: Tensor | None
    grids: list[Grid]


def encode(sample: Sample, config: LlavaConfig, tokenizer: Tokenizer, *, template: str, max_tokens: int) -> Row:
    """Ids and labels of one sample, cut at `max_tokens`, images counted, as the authors' train.py cuts them.

    Raises UserError, naming the sample, when it teaches nothing, or the cut would go through an image.
    """
    with _naming(sample.name or "a sample"):
        answered = any(message.role == "assistant" for message in sample.messages)
        row = _encoded(sample, config, tokenizer, template, max_tokens) if answered else None
        if row is None or not row.learned:
            raise UserError(
                f"it has nothing to learn: no answer in its first {max_tokens} tokens",
                hint="give it an answer, shorten what stands before it, or leave it out",
            )
        return row


def _encoded(sample: Sample, config: LlavaConfig, tokenizer: Tokenizer, template: str, max_tokens: int) -> Row:
    if sample.images and (config.image is None or config.vision is None):
        raise UserError("it has an image, the model is a text model", hint="train a LLaVA, or drop the image")
    prepared = [prepare(each, config.image, config.vision) for each in sample.images if config.image and config.vision]
    counts = [each.grid.tokens for each in prepared]
    encoded = tokenizer.encode(render(template, sample.messages), counts, image_id=config.image_token_id)
    strange = config.strange_id(encoded.ids)
    if strange is not None:
        raise UserError(
            f"it holds token {strange} ({tokenizer.token_of(strange)!r}); the model has {config.text.vocab}",
            hint="the tokenizer and the weights belong to different models; get them from one place",
        )
    if any(start + length > max_tokens for start, length in encoded.images):
        raise UserError(
            f"its images end beyond token {max_tokens}, where the recipe cuts", hint="raise max_tokens, or leave it out"
        )
    ids, learned = encoded.ids[:max_tokens], encoded.learned[:max_tokens]
    labels = [token if learns else IGNORED for token, learns in zip(ids, learned)]
    return Row(ids, labels, [each.pixels for each in prepared], [each.grid for each in prepared])


def collate(rows: Sequence[Row]) -> TrainBatch:
    """Rows of unequal length as one batch. Padding stands behind the text, where causal attention never looks."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row.ids)] = torch.tensor(row.ids)
        labels_BT[place, : len(row.ids)] = torch.tensor(row.labels)
    tiles = [pixels for row in rows for pixels in row.pixels]
    pixels_N3YX = torch.from_numpy(np.concatenate(tiles)) if tiles else None
    return TrainBatch(ids_BT, labels_BT, pixels_N3YX, [grid for row in rows for grid in row.grids])
