"""Texts and images as vectors, by a model that was made to answer: what its language model knows of them, on average.

N texts or images · X features of an image · D width of the language model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.engine import Request, Sampling
from pumice.errors import UserError, shortened
from pumice.image import ImageLike, prepare
from pumice.prompt import Part

if TYPE_CHECKING:
    from pumice.model import Model

AT_ONCE = 8
"""So many images are in memory as pixels."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors of some texts or images, in their order."""

    vectors_ND: Tensor
    """float32, on the CPU."""
    tokens: tuple[int, ...]
    """That each one took."""


def of_texts(model: Model, texts: Sequence[str], *, truncate: bool, normalise: bool) -> Embeddings:
    """See `Model.embed`."""
    requests = [Request(_ids(model, text, truncate), [], Sampling(), pooled=True) for text in _listed("texts", texts)]
    return _embeddings(model, model.engine.means(requests), [len(each.ids) for each in requests], normalise)


def of_images(model: Model, images: Sequence[ImageLike], *, normalise: bool) -> Embeddings:
    """See `Model.embed_images`."""
    found: list[Tensor] = []
    tokens: list[int] = []
    for start in range(0, len(_listed("images", images)), AT_ONCE):
        seen = [prepare(each, *model.eyes()) for each in images[start : start + AT_ONCE]]
        found += [features_XD.mean(0, dtype=torch.float32).cpu() for features_XD in model.features(seen)]
        tokens += [each.grid.tokens for each in seen]
    return _embeddings(model, found, tokens, normalise)


def _embeddings(model: Model, means: Sequence[Tensor], tokens: Sequence[int], normalise: bool) -> Embeddings:
    vectors_ND = torch.stack(list(means)) if means else torch.empty(0, model.config.text.width)
    if not vectors_ND.isfinite().all():
        raise UserError(
            "the model's hidden states are not numbers",
            hint="its weights are damaged, or too large for their type: try --dtype float32",
        )
    return Embeddings(F.normalize(vectors_ND, dim=-1) if normalise else vectors_ND, tuple(tokens))


def _ids(model: Model, text: str, truncate: bool) -> list[int]:
    if not isinstance(text, str):
        raise UserError(f"a text to be embedded is {text!r:.100}", hint="give texts")
    ids = model.tokenizer.encode([Part("text", text)], [], image_id=model.config.image_token_id).ids
    most = model.config.text.max_positions
    if len(ids) > most and not truncate:
        raise UserError(
            f"the input length exceeds the context length: {shortened(text)} is {len(ids)} tokens long; {model.name} "
            f"has {most} positions",
            hint="send less at a time, or let it be cut: truncate",
        )
    if not ids:
        raise UserError("a text to be embedded has no token", hint="give at least one word")
    model._check_known("the text", ids := ids[:most])
    return ids


def _listed(name: str, given: object) -> Sequence:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UserError(f"{name} is {given!r:.100}, and not a list", hint=f"give a list of {name}")
    return given
