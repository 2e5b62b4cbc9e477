"""The vision tower: OpenAI's CLIP ViT, read out before its end.

N tiles · P patches · T positions (class token and patches) · D width · H heads · E width of a head · F width of the MLP
Source: Radford et al. 2021; semantics of Transformers' CLIPVisionModel (modeling_clip.py). Module names are those of
the published weights, `pre_layrnorm` included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice import ops
from pumice.config import VisionConfig
from pumice.network.layers import Embedding, Linear, Patches, together


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = Patches(3, config.width, config.patch_px, stride=config.patch_px, bias=False)
        self.position_embedding = Embedding(config.positions, config.width)

    def forward(self, pixels_N3YX: Tensor) -> Tensor:
        # The patches do not overlap, so the convolution is a matrix product: the same sums by the faster road.
        patch_px = self.patch_embedding.stride[0]
        patches_NCP = F.unfold(pixels_N3YX, patch_px, stride=patch_px)
        patches_NPD = ops.linear(patches_NCP.transpose(1, 2), self.patch_embedding.weight.flatten(1), None)
        first_N1D = self.class_embedding.expand(pixels_N3YX.shape[0], 1, -1)
        return torch.cat((first_N1D, patches_NPD), dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        heads_NTHE = (*x_NTD.shape[:2], self.heads, self.head_width)
        projected = together(x_NTD, self.q_proj, self.k_proj, self.v_proj)
        q_NHTE, k_NHTE, v_NHTE = (each_NTD.reshape(heads_NTHE).transpose(1, 2) for each_NTD in projected)
        mixed_NHTE = ops.attention(q_NHTE, k_NHTE, v_NHTE)
        return self.out_proj(mixed_NHTE.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ops.quick_gelu if config.activation == "quick_gelu" else F.gelu
        self.fc1 = Linear(config.width, config.ffn_width)
        self.fc2 = Linear(config.ffn_width, config.width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_NTD)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.self_attn(self.layer_norm1(x_NTD))
        return x_NTD + self.mlp(self.layer_norm2(x_NTD))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.encoder = Encoder(config)
        if config.post_norm:
            # Held so that a checkpoint keeps all it came with; the features are read before it.
            self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, pixels_N3YX: Tensor) -> Tensor:
        """Features of N tiles: (N, tile_tokens, feature_width), the class token first where it is kept.

        Hidden state 0 is the normed embedding, state k the output of block k; blocks past the last state that is
        asked for do not run.
        """
        wanted = [layer if layer >= 0 else self.config.layers + 1 + layer for layer in self.config.feature_layers]
        x_NTD = self.pre_layrnorm(self.embeddings(pixels_N3YX))
        states = {0: x_NTD}
        for number, block in enumerate(self.encoder.layers[: self.config.blocks_needed], 1):
            x_NTD = block(x_NTD)
            if number in wanted:
                states[number] = x_NTD
        chosen = [states[number] for number in wanted]
        features_NTD = torch.cat(chosen, dim=-1) if len(chosen) > 1 else chosen[0]
        return features_NTD if self.config.keep_class_token else features_NTD[:, 1:]
