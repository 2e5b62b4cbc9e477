"""What a model takes in memory, from its config and the headers of its files: how `model.load` will lay it out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from pumice import ops
from pumice.checkpoints import Checkpoint, Tensors
from pumice.checkpoints.gguf_eyes_writer import eyes_formats
from pumice.checkpoints.gguf_writer import EYES, lm_formats
from pumice.checkpoints.mixes import Mix
from pumice.checkpoints.tensors import Entry
from pumice.config import LlavaConfig, TextConfig
from pumice.image import Grid, grid_for
from pumice.network.placement import Placement
from pumice.quant import FORMATS

NEW_POSITIONS = 256
"""Of a short question and its answer, beside the picture."""
PASS_POSITIONS = 1024
"""So many positions of a prompt pass the blocks of a quantised model at once; all of any other's."""


@dataclass(frozen=True)
class Share:
    """Bytes of a part of the weights."""

    mapped: int = 0
    """Pages of files, used where they lie. The kernel may drop them and read them again."""
    own: int = 0
    """Memory that the process takes for itself, or the GPU's."""

    @property
    def total(self) -> int:
        return self.mapped + self.own

    def __add__(self, other: Share) -> Share:
        return Share(self.mapped + other.mapped, self.own + other.own)


@dataclass(frozen=True)
class Footprint:
    """A model as it will lie in memory. `text` and `eyes` are its weights: the language model's; the vision tower's,
    the projector's and the newline vector's."""

    config: LlavaConfig
    text: Share
    eyes: Share
    layers: tuple[int, ...]
    """Bytes of each block of the language model, which are in `text` too."""
    position_bytes: int
    """Keys and values of one position."""
    dtype: torch.dtype
    """The type that is computed with."""
    in_blocks: bool
    widest: int
    """Bytes of the largest matrix as numbers, which a product makes of one in blocks on a GPU, and of one in 16 bits on
    a CPU that does not multiply these."""

    @property
    def weights(self) -> Share:
        return self.text + self.eyes

    def work(self, positions: int, tiles: int) -> int:
        """About what is taken besides while a prompt of so many positions, and pictures of so many tiles, are read:
        inputs and outputs of a block's products in float32; of the tower three times that, for what the allocator
        keeps, and the states that are its features."""
        text, vision = self.config.text, self.config.vision
        at_once = min(positions, PASS_POSITIONS) if self.in_blocks else positions
        inner, shared = text.heads * text.head_width, text.kv_heads * text.head_width
        numbers = at_once * (4 * text.width + 2 * inner + 2 * shared + 3 * text.ffn_width) + text.vocab
        if vision is not None:
            block = 8 * vision.width + 4 * vision.ffn_width
            numbers = max(numbers, tiles * vision.positions * (vision.feature_width + 3 * block))
        return 4 * numbers + self.widest

    def needs(self, positions: int, tiles: int) -> Share:
        """Everything, with one conversation of so many positions."""
        return self.weights + Share(own=positions * self.position_bytes + self.work(positions, tiles))


def footprint(
    tensors: Tensors,
    config: LlavaConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    place: Placement | None = None,
) -> Footprint:
    """Of the model that `model.load` makes of these tensors; `dtype` None keeps theirs. place: only what lies on the
    device by it; None is all."""
    text = config.text
    in_blocks = _in_blocks(tensors)
    on_cpu = device.type == "cpu"
    chosen = dtype or tensors.computed_in(device)
    narrower = in_blocks and dtype is None and on_cpu
    rules = _Rules(chosen, on_cpu, config.vision.blocks_needed if narrower and config.vision else None)
    lies = {name: rules.share(tensors, name) for name in tensors.names() if place is None or place.of(name) == device}
    # On a CPU to float32 what is in 16 bits, on a GPU to the type that is computed with what is in blocks.
    if on_cpu:
        widened = 4 if chosen in (torch.bfloat16, torch.float16) else 0
    else:
        widened = chosen.itemsize if in_blocks else 0
    return Footprint(
        config,
        sum((each for name, each in lies.items() if not name.startswith(EYES)), Share()),
        sum((each for name, each in lies.items() if name.startswith(EYES)), Share()),
        layers := _layers(lies, text.layers),
        position_bytes(tensors, config, dtype) // text.layers * sum(size > 0 for size in layers),
        chosen,
        in_blocks,
        _widest(text, head=not on_cpu) * widened,
    )


def position_bytes(tensors: Tensors, config: LlavaConfig, dtype: torch.dtype | None) -> int:
    """Of the keys and values of one position: two vectors of each layer, in half precision beside weights in blocks,
    otherwise in the type that is computed with."""
    text, chosen = config.text, dtype or tensors.dtype("language_model.embed_tokens.weight")
    kept = torch.float16 if _in_blocks(tensors) else chosen
    return 2 * text.layers * text.kv_heads * text.head_width * kept.itemsize


def _in_blocks(tensors: Tensors) -> bool:
    return tensors.blocks("language_model.layers.0.self_attn.q_proj.weight") is not None


def _layers(lies: Mapping[str, Share], count: int) -> tuple[int, ...]:
    sizes = [0] * count
    for name, each in lies.items():
        if name.startswith("language_model.layers."):
            sizes[int(name.split(".")[2])] += each.total
    return tuple(sizes)


def _widest(text: TextConfig, *, head: bool) -> int:
    """Numbers of the largest matrix; on a CPU the head meets one row only, for which nothing is widened."""
    return text.width * max(text.ffn_width, text.vocab if head else 0)


@dataclass(frozen=True)
class _Rules:
    """How tensors are laid out (`model.assembled`): computed with in `dtype`. The eyes take part in fewer bits
    (`ops.narrower`) where `eyes_run` says how many blocks of the tower run; the others' matrices stay as they are."""

    dtype: torch.dtype
    on_cpu: bool
    eyes_run: int | None

    def share(self, tensors: Tensors, name: str) -> Share:
        shape, blocks, computed = tensors.shape(name), tensors.blocks(name), tensors.computed(name)
        if blocks is not None and len(shape) == 2:
            count, viewed = shape[0] * blocks.row_bytes(shape[1]), self.on_cpu and not computed
        elif self.eyes_run is not None and _fits_narrower(name, shape):
            block = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
            if block is not None and int(block[1]) >= self.eyes_run:
                return Share(mapped=math.prod(shape) * tensors.dtype(name).itemsize)
            format = ops.narrower_format()
            count, viewed = shape[0] * format.row_bytes(shape[1]), format.dtype == tensors.dtype(name) and not computed
        else:
            count = math.prod(shape) * self.dtype.itemsize
            viewed = self.on_cpu and not computed and blocks is None and tensors.dtype(name) == self.dtype
        return Share(mapped=count) if viewed else Share(own=count)


def _fits_narrower(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a matrix that the eyes multiply with, in whole blocks."""
    is_matrix = len(shape) == 2 and not name.endswith("position_embedding.weight")
    return is_matrix and name.startswith(EYES) and shape[1] % FORMATS["Q8_0"].block_weights == 0


def as_mix(checkpoint: Checkpoint, mix: Mix) -> Tensors:
    """The tensors that `pumice convert --quant` would write, without values."""
    tensors = checkpoint.tensors
    eyes_in_blocks = any(tensors.blocks(name) for name in tensors.names() if name.startswith(EYES))
    formats = lm_formats(checkpoint, mix) | eyes_formats(tensors, None if eyes_in_blocks else FORMATS["F16"])

    def unread() -> NoReturn:
        raise AssertionError("a build that nobody has made yet has no values")

    return Tensors(
        {
            name: Entry(
                name,
                tensors.shape(name),
                format.dtype or torch.float32,
                unread,
                format if format.dtype is None else None,
            )
            for name, format in formats.items()
        }
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def grids(config: LlavaConfig) -> dict[str, Grid]:
    """The grid of a picture that fills each canvas, by its width x height; of LLaVA 1.5 the one there is. Empty without
    eyes. A picture of another shape than its canvas takes less, for its padding is cut off."""
    if config.image is None or config.vision is None:
        return {}
    edge = config.vision.image_px
    canvases = config.image.pinpoints or ((edge, edge),)
    return {f"{width}x{height}": grid_for((height, width), config.image, config.vision) for height, width in canvases}


def least(config: LlavaConfig) -> tuple[int, int]:
    """Positions and tiles of a short question without a picture, and its answer."""
    return _question(config, None)


def smallest(config: LlavaConfig) -> tuple[int, int]:
    """The same about the smallest picture, where the model has eyes."""
    return _question(config, min(grids(config).values(), key=lambda each: each.tokens, default=None))


def largest(config: LlavaConfig) -> tuple[int, int]:
    """The same about the largest picture."""
    return _question(config, max(grids(config).values(), key=lambda each: each.tokens, default=None))


def _question(config: LlavaConfig, grid: Grid | None) -> tuple[int, int]:
    tokens, tiles = (grid.tokens, grid.tiles) if grid else (0, 0)
    return min(tokens + NEW_POSITIONS, config.text.max_positions), tiles
