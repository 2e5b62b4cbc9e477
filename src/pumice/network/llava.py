"""LLaVA: a vision tower, a projector and a language model; features stand where the prompt has image tokens.

N tiles · P tokens of a tile · R, C tile rows and columns · Y, X rows and columns of the feature map · D width of the
language model · B rows of a batch · T positions
Sources: Liu et al. 2023 (arXiv 2304.08485, 2310.03744); tile merge: LLaVA llava_arch.py,
prepare_inputs_labels_for_multimodal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice import ops
from pumice.config import LlavaConfig, ProjectorConfig
from pumice.image import Grid
from pumice.network.clip import VisionTower
from pumice.network.layers import Linear
from pumice.network.llama import Batch, Block, LanguageModel
from pumice.network.pruning import most_diverse
from pumice.quant import QTensor


class Projector(nn.Module):
    """`linear_1 … linear_N` with an exact GELU between them."""

    def __init__(self, config: ProjectorConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        self.layers = config.layers
        for index in range(1, config.layers + 1):
            layer = Linear(width_in if index == 1 else width_out, width_out, bias=config.bias)
            self.add_module(f"linear_{index}", layer)

    def forward(self, x_NPV: Tensor) -> Tensor:
        x_NPD = self.get_submodule("linear_1")(x_NPV)
        for index in range(2, self.layers + 1):
            x_NPD = self.get_submodule(f"linear_{index}")(F.gelu(x_NPD))
        return x_NPD


class Llava(nn.Module):
    """The whole network. Without eyes (`config.vision is None`) it is its language model."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        if config.vision is not None and config.projector is not None:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = Projector(config.projector, config.vision.feature_width, config.text.width)
        if config.has_newline:
            self.image_newline = nn.Parameter(torch.empty(config.text.width))
        self.language_model = LanguageModel(config.text)
        if not config.text.tied_embeddings:
            self.lm_head = Linear(config.text.width, config.text.vocab, bias=False)

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device with which the language model begins."""
        block = self.language_model.layers[0]
        assert isinstance(block, Block)
        return block.input_layernorm.weight

    @property
    def eyes_like(self) -> Tensor:
        """The same of the vision tower."""
        return self.vision_tower.pre_layrnorm.weight

    @property
    def in_blocks(self) -> bool:
        """Whether the language model's weights are quantised."""
        return any(
            isinstance(each.weight, QTensor) for each in self.language_model.modules() if isinstance(each, Linear)
        )

    def encode(self, pixels_N3YX: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Features of several images, (grid.tokens, D) each, from all their tiles in one pass.

        pixels_N3YX: the tiles of the images one after the other, base view first; N = sum of `grid.tiles`.
        """
        per_image = torch.split(self.look(pixels_N3YX), [grid.tiles for grid in grids])
        return [self.merge(tiles_NPD, grid) for tiles_NPD, grid in zip(per_image, grids)]

    def look(self, pixels_N3YX: Tensor) -> Tensor:
        """What the language model gets of each tile: (N, P, D)."""
        tiles_NPD: Tensor = self.multi_modal_projector(self.vision_tower(pixels_N3YX))
        return tiles_NPD

    def merge(self, tiles_NPD: Tensor, grid: Grid) -> Tensor:
        """One image's features, (grid.tokens, D), from those of its tiles."""
        return merge(tiles_NPD, grid, self.image_newline if grid.newline else None)

    def embed(self, ids_BT: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Text embeddings, (B, T, D), with the features of the images, in order, where the ids are the image token."""
        is_image_BT = ids_BT == self.config.image_token_id
        x_BTD: Tensor = self.language_model.embed_tokens(ids_BT.masked_fill(is_image_BT, 0))
        given = sum(len(each) for each in features)
        places = int(is_image_BT.sum())
        assert places == given, f"the prompt has {places} image tokens, the images have {given} features"
        if not features:
            return x_BTD
        rows_XD = torch.cat(list(features)).to(x_BTD)
        return x_BTD.masked_scatter(is_image_BT[..., None], rows_XD)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Scores over the vocabulary, from hidden states of any leading shape."""
        head = self.language_model.embed_tokens.weight if self.config.text.tied_embeddings else self.lm_head.weight
        return ops.linear(hidden_D.to(head.device, head.dtype), head, None)

    def forward(self, x_BTD: Tensor, batch: Batch | None = None) -> Tensor:
        """Hidden states as `LanguageModel` has them; without a batch: whole rows from position 0, nothing kept."""
        if batch is None:
            positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[0], -1)
            batch = Batch(positions_BT)
        hidden_BTD: Tensor = self.language_model(x_BTD, batch)
        return hidden_BTD


def merge(tiles_NPD: Tensor, grid: Grid, newline_D: Tensor | None) -> Tensor:
    """One image's tile features as one sequence, (grid.tokens, D): the base view, then the map of the other tiles, cut
    to the picture, with the newline vector at the end of each row (1.6; 1.5 has the base view alone). Where the grid
    says so, only the most different of them stay."""
    base_PD = tiles_NPD[0]
    if grid.tiles == 1:
        merged_XD = base_PD
    else:
        side, width = grid.tile_side, tiles_NPD.shape[-1]
        tiles_RCYXD = tiles_NPD[1:].view(grid.rows, grid.columns, side, side, width)
        map_YXD = tiles_RCYXD.transpose(1, 2).reshape(grid.rows * side, grid.columns * side, width)
        kept_YXD = map_YXD[grid.top : grid.top + grid.kept_rows, grid.left : grid.left + grid.kept_columns]
        if newline_D is not None:
            ends_Y1D = newline_D.to(kept_YXD.dtype).expand(grid.kept_rows, 1, width)
            kept_YXD = torch.cat((kept_YXD, ends_Y1D), dim=1)
        merged_XD = torch.cat((base_PD, kept_YXD.flatten(0, 1)))
    if grid.tokens < len(merged_XD):
        merged_XD = merged_XD[most_diverse(merged_XD, grid.tokens)]
    assert len(merged_XD) == grid.tokens, f"{len(merged_XD)} features for a grid of {grid.tokens} tokens"
    return merged_XD


@torch.inference_mode()
def generate(model: Llava, ids: Sequence[int], features: Sequence[Tensor], max_tokens: int) -> Iterator[int]:
    """Greedy, one sequence, no cache: the whole row again for each token. Every faster loop must agree with it."""
    x_1TD = model.embed(torch.tensor([list(ids)]), features)
    for _ in range(max_tokens):
        token = model.logits(model(x_1TD)[0, -1]).argmax()
        yield int(token)
        if int(token) in model.config.stop_ids:
            return
        x_1TD = torch.cat((x_1TD, model.language_model.embed_tokens(token.view(1, 1))), dim=1)
