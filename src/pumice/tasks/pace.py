"""How fast a model will be on this machine: an estimate from a probe of about two seconds, without its weights.

A slice of the model, with the shapes and formats of a few of its blocks and numbers of no meaning, is laid out as
`model.load` lays out the whole and answers a question. Its times are multiplied up.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pumice.answer import Answer
from pumice.checkpoints import Checkpoint, Tensors, expected_tensors
from pumice.checkpoints.tensors import Entry
from pumice.config import LlavaConfig
from pumice.engine.sampling import Sampling
from pumice.model import Model, assembled
from pumice.network.placement import Placement
from pumice.quant import QTensor
from pumice.question import Question
from pumice.room.footprint import Footprint

SLICE_BYTES = 3 * 2**26
"""Weights that a slice holds at least, if the model has as many: more than any cache keeps between two tokens."""
READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""What is read to measure how fast memory is."""
PROMPT_S, DECODE_S = 0.5, 0.4
"""How long the probe may read its prompt, and decode."""
WARM_UP_TOKENS, MOST_TOKENS = 16, 512
_TURNED = ("q_proj.weight", "k_proj.weight")
TABLE, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Pace:
    """An estimate for one question at a time, on a machine that does nothing else."""

    read_bytes_per_s: float
    """Of memory."""
    decode_limit: float
    """Tokens a second, if weights were read as fast as memory allows and computing took no time."""
    decode: float
    """Tokens a second of an answer at its beginning, by the kernels themselves."""
    decode_last: float
    """The same at the end of the longest context, whose keys and values are all read for each token."""
    prefill: float
    """Tokens a second of a prompt."""
    tile_s: float | None
    """Seconds for a tile of a picture, through tower and projector; None without eyes."""
    probe_s: float
    """How long measuring took."""


def slice_bytes(found: Footprint) -> int:
    """About what the probe takes of memory."""
    layers = _layers(found)
    rest = found.text.total - sum(found.layers) + found.eyes.total
    return sum(found.layers[index] for index in layers) + rest + READ_BYTES["cpu"]


def measure(
    checkpoint: Checkpoint, found: Footprint, dtype: torch.dtype | None, device: torch.device, context: int
) -> Pace:
    """The pace of the model whose footprint is `found`; `context` is the longest conversation."""
    started = time.perf_counter()
    read = _read_bytes_per_s(device)
    layers = _layers(found)
    model = _slice(checkpoint, layers, dtype, device)
    with torch.inference_mode():
        tile_s = _tile_s(model, checkpoint.config)
    head = _head_bytes(checkpoint, found)
    whole, part = sum(found.layers) + head, sum(found.layers[index] for index in layers) + head
    prompt, answer = _asked(model)
    slice_s = 1 / answer.timings.tokens_per_s
    step_s = slice_s * whole / part
    head_s = slice_s * head / part
    last = _last_block(found, device)
    blocks = (len(found.layers) - 1 + last) / (len(layers) - 1 + last)
    prompt_s = max(0.0, prompt.timings.prefill_s - head_s) * blocks + head_s
    return Pace(
        read_bytes_per_s=read,
        decode_limit=read / whole,
        decode=1 / step_s,
        decode_last=1 / (step_s + context * found.position_bytes / read),
        prefill=prompt.prompt_tokens / prompt_s,
        tile_s=tile_s,
        probe_s=time.perf_counter() - started,
    )


def _layers(found: Footprint) -> list[int]:
    """Which blocks of the language model are probed: spread over all, for mixes give some of them more bits."""
    count, missing = len(found.layers), SLICE_BYTES - (found.text.total - sum(found.layers)) // 2
    some = max(min(2, count), min(count, -(-missing * count // max(1, sum(found.layers)))))
    return [(2 * place + 1) * count // (2 * some) for place in range(some)]


def _last_block(found: Footprint, device: torch.device) -> float:
    """How much of the last block a prompt computes: where all blocks are one call, keys and values and no more."""
    text = found.config.text
    if device.type != "cpu" or not found.in_blocks or found.dtype != torch.float32:
        return 1.0
    inner, shared = text.heads * text.head_width, text.kv_heads * text.head_width
    return 2 * shared / (2 * shared + 2 * inner + 3 * text.ffn_width)


def _head_bytes(checkpoint: Checkpoint, found: Footprint) -> int:
    """Of the matrix that is read for the scores of a token."""
    name = TABLE if found.config.text.tied_embeddings else HEAD
    blocks, (rows, columns) = checkpoint.tensors.blocks(name), checkpoint.tensors.shape(name)
    return rows * (blocks.row_bytes(columns) if blocks else columns * found.dtype.itemsize)


# --- what is measured -------------------------------------------------------------------------------------------------


def _best_s(work: Callable[[], object], device: torch.device, tries: int = 3) -> float:
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _read_bytes_per_s(device: torch.device) -> float:
    count = READ_BYTES.get(device.type, READ_BYTES["cpu"])
    numbers = torch.ones(count // 4, device=device)
    numbers.sum()  # the first touches what was just written
    return count / _best_s(lambda: numbers.sum(), device, tries=5)


def _asked(model: Model) -> tuple[Answer, Answer]:
    """What a prompt took, and what decoding took, each as long as there is time for."""
    _ask(model, WARM_UP_TOKENS, 2)
    short, few = _ask(model, 4 * WARM_UP_TOKENS, 1), _ask(model, WARM_UP_TOKENS, 5)
    room = model.config.text.max_positions // 2
    affordable = int(PROMPT_S / short.timings.prefill_s * short.prompt_tokens)
    prompt = _ask(model, max(1, min(MOST_TOKENS, room, affordable)), 1)
    steps = max(4, min(64, room, int(DECODE_S * few.timings.tokens_per_s)))
    return prompt, _ask(model, WARM_UP_TOKENS, steps + 1)


def _ask(model: Model, tokens: int, answer: int) -> Answer:
    """A prompt of about so many tokens that no prompt before began with."""
    text = "".join(random.choice("0123456789abcdef") for _ in range(tokens))
    return model.answer(Question(text, sampling=Sampling(max_tokens=answer), raw=True))


def _tile_s(model: Model, config: LlavaConfig) -> float | None:
    vision = config.vision
    if vision is None:
        return None
    network, like = model.network, model.network.eyes_like
    inside_1TD = like.new_ones(1, vision.positions, vision.width)
    features_1PD = like.new_ones(1, vision.tile_tokens, vision.feature_width)
    block = network.vision_tower.encoder.layers[0]
    block_s = _best_s(lambda: block(inside_1TD), like.device)
    return block_s * vision.blocks_needed + _best_s(lambda: network.multi_modal_projector(features_1PD), like.device)


# --- the slice --------------------------------------------------------------------------------------------------------


def _slice(checkpoint: Checkpoint, layers: list[int], dtype: torch.dtype | None, device: torch.device) -> Model:
    whole = checkpoint.config
    vision = whole.vision
    if vision is not None:
        vision = replace(vision, layers=1, feature_layers=(1,) * len(vision.feature_layers))
    # Without an end, for numbers of no meaning end an answer whenever they like.
    config = replace(whole, text=replace(whole.text, layers=len(layers)), vision=vision, stop_ids=())
    drawn = _Drawn(checkpoint)
    entries = {name: drawn.entry(name, _origin(name, layers)) for name in expected_tensors(config)}
    return Model("a slice", config, checkpoint.tokenizer, assembled(Tensors(entries), config, dtype, Placement(device)))


def _origin(name: str, layers: list[int]) -> str:
    """The tensor of the whole model that one of the slice stands for."""
    stem = "language_model.layers."
    if not name.startswith(stem):
        return name
    place, _, rest = name.removeprefix(stem).partition(".")
    return f"{stem}{layers[int(place)]}.{rest}"


class _Drawn:
    """Tensors of a checkpoint's shapes and formats, with numbers that are neither too large nor too small."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        # As the higher byte of a number in 16 or 32 bits these are 2⁻¹⁵ to 2.
        self._pool = torch.randint(56, 64, (2**20,), dtype=torch.uint8)

    def entry(self, name: str, origin: str) -> Entry:
        """The tensor `name` of the slice, like `origin` of the model."""
        tensors, text = self._checkpoint.tensors, self._checkpoint.config.text
        shape, dtype, blocks = tensors.shape(origin), tensors.dtype(origin), tensors.blocks(origin)
        # Of a table that is looked up few rows are read: all are the same.
        rows = 1 if name == TABLE and not text.tied_embeddings else shape[0]
        turned = self._checkpoint.format == "gguf" and name.startswith("language_model.") and name.endswith(_TURNED)

        def load() -> Tensor | QTensor:
            if len(shape) == 1:
                return torch.full(shape, 1e-4, dtype=dtype)
            if blocks is not None and len(shape) == 2:
                bytes_RB = self._bytes(rows, blocks.row_bytes(shape[1])).expand(shape[0], -1)
                return QTensor(bytes_RB, blocks, head_width=text.head_width if turned else 0)
            bytes_RB = self._bytes(rows, math.prod(shape[1:]) * dtype.itemsize)
            return bytes_RB.view(dtype).view(rows, *shape[1:]).expand(shape)

        return Entry(name, shape, dtype, load, blocks)

    def _bytes(self, rows: int, row_bytes: int) -> Tensor:
        count = rows * row_bytes
        return self._pool.repeat(-(-count // len(self._pool)))[:count].view(rows, row_bytes)
