"""The language model: Llama, and Vicuna, Mistral, Yi and Qwen 1.5, which are the same function with other numbers.

B rows · T new positions · S all positions so far · D width · H heads · K key/value heads · E width of a head
Source: Touvron et al. 2023; semantics of Transformers' LlamaModel (modeling_llama.py). Module names are those of the
published weights; rotary channels are in Transformers' half-split order.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pumice import ops
from pumice.config import TextConfig
from pumice.network.layers import Embedding, Linear, RmsNorm, together
from pumice.ops import Blocks, BlocksShape, BlockWeights, Pages
from pumice.quant import QTensor


@dataclass(frozen=True)
class Batch:
    """What one forward pass must know besides its inputs.

    positions_BT: position of each new token in its own row. pages: where keys and values are kept; a query then sees
    all of its row up to its own position. None when nothing is kept (training, plain generation): a query sees the
    tokens before it in this pass (`causal`), or what mask_BTS allows. kept: of a single row, hidden states of so many
    of the last positions are asked for. reach_B: the last position that a row is known to have, if it is not of this
    pass.
    """

    positions_BT: Tensor
    mask_BTS: Tensor | None = None
    causal: bool = True
    pages: Pages | None = None
    kept: int | None = None
    reach_B: Tensor | None = None

    def on(self, device: torch.device) -> Batch:
        """The same for blocks on another device; keys and values stay where they are, each with its block."""
        if self.positions_BT.device == device:
            return self
        mask, reach = (None if each is None else each.to(device) for each in (self.mask_BTS, self.reach_B))
        pages = None if self.pages is None else replace(self.pages, table_RP=self.pages.table_RP.to(device))
        return replace(self, positions_BT=self.positions_BT.to(device), mask_BTS=mask, pages=pages, reach_B=reach)


def windowed(batch: Batch, window: int | None) -> Batch:
    """The batch with a mask that hides what lies `window` positions or more before a query, once any row is that long.

    The key of position s stands at place s.
    """
    longest = 0 if window is None else int(batch.positions_BT.max()) + 1
    if window is None or longest <= window:
        return batch
    distance_BTS = batch.positions_BT[..., None] - torch.arange(longest, device=batch.positions_BT.device)
    near_BTS = (distance_BTS >= 0) & (distance_BTS < window)
    mask_BTS = near_BTS if batch.mask_BTS is None else near_BTS & batch.mask_BTS
    return replace(batch, mask_BTS=mask_BTS, causal=False)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width, self.window = layer, config.head_width, config.window
        inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = Linear(config.width, inner, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, shared, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, shared, bias=config.qkv_bias)
        self.o_proj = Linear(inner, config.width, bias=False)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        projected = together(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BHTE, k_BKTE, v_BKTE = (self._heads(each_BTX) for each_BTX in projected)
        q_BHTE, k_BKTE = ops.rotate(q_BHTE, *turn), ops.rotate(k_BKTE, *turn)
        if batch.pages is None:
            mixed_BHTE = ops.attention(q_BHTE, k_BKTE, v_BKTE, batch.mask_BTS, causal=batch.causal)
        else:
            kept = batch.pages.of(self.layer)
            mixed_BHTE = ops.attention_in_pages(q_BHTE, k_BKTE, v_BKTE, kept, batch.positions_BT, self.window)
        return self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: Tensor) -> Tensor:
        rows, tokens, _ = x_BTX.shape
        return x_BTX.view(rows, tokens, -1, self.head_width).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(ops.gated_mlp(*together(x_BTD, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RmsNorm(config.width, config.norm_eps)

    def weights(self) -> BlockWeights | None:
        """What `ops.Blocks` takes; None where a matrix is not in blocks."""
        attention, mlp = self.self_attn, self.mlp
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        matrices: list[object] = [each.weight for each in (*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        norms = (self.input_layernorm.weight, self.post_attention_layernorm.weight)
        in_blocks = [each for each in matrices if isinstance(each, QTensor)]
        if len(in_blocks) < len(matrices) or any(each.dtype != torch.float32 for each in norms):
            return None
        return BlockWeights(in_blocks, [each.bias for each in layers[:3]], norms)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), turn, batch)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RmsNorm(config.width, config.norm_eps)
        self.border = 0
        """Blocks from this one on, and the norm, lie elsewhere than those before it."""

    @property
    def devices(self) -> list[torch.device]:
        """Where each block lies, with its keys and values."""
        return [each.device for each in self._likes]

    @property
    def _likes(self) -> list[Tensor]:
        """A tensor of the type and on the device that each block computes with."""
        return [block.input_layernorm.weight for block in self.layers if isinstance(block, Block)]

    def forward(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """Hidden states after the final norm, (B, T, D), from embeddings of the same shape; (1, kept, D) where the
        batch says so."""
        cos_BTE, sin_BTE = ops.rotary(batch.positions_BT, self.config.head_width, self.config.rotary, batch.reach_B)
        if batch.pages is None:
            batch = windowed(batch, self.config.window)
        for part in self._parts:
            if part.start:
                x_BTD, batch = x_BTD.to(self._likes[part.start]), batch.on(self.devices[part.start])
            turn = (cos_BTE.to(x_BTD), sin_BTE.to(x_BTD))
            x_BTD = self._through(part, x_BTD, turn, batch)
        if self.border:
            x_BTD = x_BTD.to(self.norm.weight)
        return self.norm(x_BTD if batch.kept is None else x_BTD[:, x_BTD.shape[1] - batch.kept :])

    @property
    def _parts(self) -> list[range]:
        """Blocks that lie together."""
        ends = (0, self.border, self.config.layers)
        return [range(start, end) for start, end in itertools.pairwise(ends) if start < end]

    def _through(self, part: range, x_BTD: Tensor, turn: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """The hidden states behind these blocks; behind the last perhaps only those that are asked for."""
        if batch.pages is not None and ops.takes_blocks(x_BTD) and (at_once := self._at_once[part]) is not None:
            kept = batch.kept if part.stop == self.config.layers else None
            return at_once.run(x_BTD, turn, batch.positions_BT, batch.pages.layers(part), kept)
        for layer in part:
            x_BTD = self.layers[layer](x_BTD, turn, batch)
        return x_BTD

    @functools.cached_property
    def _at_once(self) -> dict[range, Blocks | None]:
        return {part: self._joined(part) for part in self._parts if self.devices[part.start].type == "cpu"}

    def _joined(self, part: range) -> Blocks | None:
        """The twin of the loop over blocks: one call for all of them, if all their matrices are in blocks."""
        config = self.config
        found = [block.weights() for block in self.layers[part.start : part.stop] if isinstance(block, Block)]
        weights = [each for each in found if each is not None]
        if len(weights) < len(found) or config.head_width % 16:
            return None
        numbers = (config.heads, config.kv_heads, config.head_width, config.ffn_width)
        return Blocks(weights, BlocksShape(*numbers, config.window or 0, config.norm_eps))
