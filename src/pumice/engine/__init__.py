"""From prompts to tokens with keys and values kept: a prefill for each row, then one step a token for all rows.

B rows · T new positions · S positions so far · K key/value heads · E width of a head · V vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pumice.engine.sampling import Sampler, Sampling
from pumice.network.llama import Batch
from pumice.network.llava import Llava
from pumice.ops import Pages

__all__ = ["Request", "Run", "Sampling", "Step", "position_bytes"]

GROW_POSITIONS = 256
"""Room is added in blocks, so that a high limit on new tokens costs no memory before they come."""

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One row: the prompt's ids with image tokens expanded, the features that stand there, how to draw."""

    ids: list[int]
    features: list[Tensor]
    sampling: Sampling


@dataclass(frozen=True)
class Step:
    """One new token of the request `row`. `reason` comes with the row's last token; `seconds` is the time of the pass
    that made it, which a decode step shares among its rows."""

    row: int
    token: int
    reason: Reason | None
    seconds: float
    prefill: bool


@dataclass
class _Row:
    index: int
    request: Request
    sampler: Sampler
    new_ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def length(self) -> int:
        """Positions in the cache: the prompt, and each new token but the last."""
        return len(self.request.ids) + max(0, len(self.new_ids) - 1)


class RowCache:
    """Keys and values of several rows, left-aligned, each row of its own length; `network.llama.KeysValues`."""

    def __init__(self, model: Llava, rows: int) -> None:
        config = model.config.text
        empty_BKSE = model.like.new_empty(rows, config.kv_heads, 0, config.head_width, dtype=cache_type(model))
        self.keys, self.values = [empty_BKSE] * config.layers, [empty_BKSE] * config.layers
        self._rows = slice(0)
        self._positions_BT = torch.empty(0, 0, dtype=torch.long)
        self._length = 0

    def aim(self, rows: slice, positions_BT: Tensor, length: int) -> None:
        """The next pass writes the positions of these rows and reads the first `length` positions. A single row writes
        the last of these."""
        self._rows, self._positions_BT, self._length = rows, positions_BT, length
        self.widen(length)

    def widen(self, length: int) -> None:
        """Make room for so many positions. Layer after layer, so that one layer at a time is in memory twice."""
        if length > self.keys[0].shape[2]:
            room = -(-length // GROW_POSITIONS) * GROW_POSITIONS
            for cached in (self.keys, self.values):
                for layer, each in enumerate(cached):
                    cached[layer] = _widened(each, room)

    def extend(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        k_BKSE, v_BKSE = self.keys[layer][self._rows], self.values[layer][self._rows]
        for cached_BKSE, new_BKTE in ((k_BKSE, k_BKTE), (v_BKSE, v_BKTE)):
            if len(cached_BKSE) == 1:
                cached_BKSE[:, :, self._length - new_BKTE.shape[2] : self._length] = new_BKTE
            else:
                every_B1 = torch.arange(len(cached_BKSE), device=cached_BKSE.device)[:, None]
                cached_BKSE[every_B1, :, self._positions_BT] = new_BKTE.transpose(1, 2).to(cached_BKSE.dtype)
        return k_BKSE[:, :, : self._length], v_BKSE[:, :, : self._length]

    def pages(self) -> Pages:
        """Each row is one page."""
        keys, values = ([each[self._rows] for each in layers] for layers in (self.keys, self.values))
        return Pages(keys, values, torch.arange(len(keys[0]))[:, None])

    def keep(self, places: list[int]) -> None:
        """Drop all other rows; the kept ones close up."""
        self.keys = [each[places] for each in self.keys]
        self.values = [each[places] for each in self.values]


def position_bytes(model: Llava) -> int:
    """What the keys and values of one position take."""
    config = model.config.text
    return 2 * config.layers * config.kv_heads * config.head_width * cache_type(model).itemsize


def cache_type(model: Llava) -> torch.dtype:
    """The type of keys and values: that of the network; beside weights in blocks half precision, as llama.cpp has."""
    return torch.float16 if model.in_blocks else model.like.dtype


def _widened(cached_BKSE: Tensor, room: int) -> Tensor:
    rows, heads, length, width = cached_BKSE.shape
    wider_BKSE = cached_BKSE.new_zeros(rows, heads, room, width)
    wider_BKSE[:, :, :length] = cached_BKSE
    return wider_BKSE


class Run:
    """Several requests answered together; each gets the tokens that it would get alone.

    A row ends with an end token (reason `stop`), or at its `max_tokens` or the model's last position (`length`).
    Raises UserError for settings that name tokens which the model does not have.
    """

    def __init__(self, model: Llava, requests: Sequence[Request]) -> None:
        self._model = model
        self._device = model.like.device
        for each in requests:
            each.sampling.check_vocabulary(model.config.text.vocab)
        self._cache = RowCache(model, len(requests))
        self._cache.widen(max((len(each.ids) for each in requests), default=0))
        self._rows = [
            _Row(index, request, Sampler(request.sampling, request.ids)) for index, request in enumerate(requests)
        ]

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """One pass: the prefill of the next waiting row, or one more token for every row. Empty when all have ended.

        A row that outgrows the rotary switch is read in again: from there on all its keys turn otherwise.
        """
        started = time.perf_counter()
        for place, row in enumerate(self._rows):
            outgrows = row.length == self._model.config.text.rotary.switch
            if not row.ended and (outgrows or not row.new_ids):
                return [self._advance(row, self._prefill(place, row), started, prefill=not row.new_ids)]
        self._retire()
        if not self._rows:
            return []
        logits_BV = self._decode()
        return [self._advance(row, logits_V, started, prefill=False) for row, logits_V in zip(self._rows, logits_BV)]

    def cancel(self, index: int) -> None:
        """No more tokens for this request, as when a stop text has come."""
        for row in self._rows:
            if row.index == index:
                row.ended = True

    def _retire(self) -> None:
        alive = [place for place, row in enumerate(self._rows) if not row.ended]
        if len(alive) < len(self._rows):
            self._cache.keep(alive)
            self._rows = [self._rows[place] for place in alive]

    def _prefill(self, place: int, row: _Row) -> Tensor:
        embedded_1TD = self._model.embed(torch.tensor([row.request.ids], device=self._device), row.request.features)
        if row.new_ids:
            new_1TD = self._model.language_model.embed_tokens(torch.tensor([row.new_ids], device=self._device))
            embedded_1TD = torch.cat((embedded_1TD, new_1TD), dim=1)
        positions_1T = torch.arange(embedded_1TD.shape[1], device=self._device)[None]
        self._cache.aim(slice(place, place + 1), positions_1T, embedded_1TD.shape[1])
        hidden_11D = self._model(embedded_1TD, Batch(positions_1T, cache=self._cache, last_only=True))
        return self._model.logits(hidden_11D[0, 0])

    def _decode(self) -> Tensor:
        lengths = [row.length for row in self._rows]
        ids_B1 = torch.tensor([row.new_ids[-1:] for row in self._rows], device=self._device)
        positions_B1 = torch.tensor(lengths, device=self._device)[:, None]
        longest = max(lengths) + 1
        self._cache.aim(slice(None), positions_B1, longest)
        mask_B1S = None
        if min(lengths) != max(lengths):
            mask_B1S = torch.arange(longest, device=self._device) <= positions_B1[..., None]
        batch = Batch(positions_B1, mask_B1S, causal=False, cache=self._cache)
        hidden_B1D = self._model(self._model.language_model.embed_tokens(ids_B1), batch)
        return self._model.logits(hidden_B1D[:, 0])

    def _advance(self, row: _Row, logits_V: Tensor, started: float, *, prefill: bool) -> Step:
        token = row.sampler.draw(logits_V).token
        row.new_ids.append(token)
        reason: Reason | None = None
        if token in self._model.config.stop_ids or token in row.request.sampling.stop_ids:
            reason = "stop"
        elif len(row.new_ids) >= row.request.sampling.max_tokens or row.length >= self._model.config.text.max_positions:
            reason = "length"
        row.ended = reason is not None
        return Step(row.index, token, reason, time.perf_counter() - started, prefill)
