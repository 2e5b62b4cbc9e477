"""From conversations to what a step of training reads.

B rows · T positions
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

    Source: LLaVA docs/Finetune_Custom_Data.md.
    Raises UserError when the file is not of that form.
    """

    def __init__(self, path: Path, images: Path) -> None:
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is no readable JSON: {error}", hint="give a list of conversations") from error
        if not isinstance(self._rows, list) or not all(isinstance(row, dict) for row in self._rows) or not self._rows:
            raise UserError(f"{path} holds no list of samples", hint="give [{id, image, conversations}, …]")
        self._path, self._images = path, images

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        row = self._rows[index]
        name = f"{self._path.name}, sample {row.get('id', index)!r}"
        if not isinstance(row.get("conversations"), list):
            raise UserError(f"{name} has no conversations", hint="give [{from: human | gpt, value: text}, …]")
        images = (str(self._images / row["image"]),) if "image" in row else ()
        return Sample(tuple(messages_from_llava(row["conversations"], has_image=bool(images))), images, name)


@dataclass(frozen=True)
class Row:
    """A sample, encoded."""

    ids: list[int]
    labels: list[int]
    pixels: list[np.ndarray]
    grids: list[Grid]


@dataclass(frozen=True)
class TrainBatch:
    """ids_BT and labels_BT are padded on the right, labels with IGNORED; pixels hold the tiles of all images."""

    ids_BT: Tensor
    labels_BT: Tensor
    pixels_N3YX: Tensor | None
    grids: list[Grid]


def encode(sample: Sample, config: LlavaConfig, tokenizer: Tokenizer, *, template: str, max_tokens: int) -> Row:
    """Ids and labels of one sample. Raises UserError, naming the sample, when it teaches nothing or is too long."""
    if sample.images and (config.image is None or config.vision is None):
        raise UserError(
            f"{sample.name} has an image, the model is a text model", hint="train a LLaVA, or drop the image"
        )
    if not any(message.role == "assistant" for message in sample.messages):
        raise _nothing_to_learn(sample)
    prepared = [prepare(each, config.image, config.vision) for each in sample.images if config.image and config.vision]
    counts = [each.grid.tokens for each in prepared]
    encoded = tokenizer.encode(render(template, sample.messages), counts, image_id=config.image_token_id)
    if len(encoded.ids) > max_tokens:
        raise UserError(
            f"{sample.name} is {len(encoded.ids)} tokens long, the recipe allows {max_tokens}",
            hint="raise max_tokens, shorten the sample or leave it out",
        )
    if not any(encoded.learned):
        raise _nothing_to_learn(sample)
    labels = [token if learned else IGNORED for token, learned in zip(encoded.ids, encoded.learned)]
    return Row(encoded.ids, labels, [each.pixels for each in prepared], [each.grid for each in prepared])


def _nothing_to_learn(sample: Sample) -> UserError:
    return UserError(f"{sample.name} has nothing to learn: no answer in it", hint="give it an answer, or leave it out")


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
