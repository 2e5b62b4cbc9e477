"""Layers that both transformers share: PyTorch's modules, computed by `ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pumice import ops


class Linear(nn.Linear):
    """y = x Wᵀ + b, run by whatever the hardware does best."""

    def reset_parameters(self) -> None:
        # Drawing on the meta device draws nothing, and imports PyTorch's compiler to do so.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


def together(x_TD: Tensor, *layers: Linear) -> Sequence[Tensor]:
    """Each layer's output from one input, which is prepared once."""
    return ops.linears(x_TD, [each.weight for each in layers], [each.bias for each in layers])


class Embedding(nn.Embedding):
    """A row of the table for each id."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return ops.embed(input, self.weight)


class Patches(nn.Conv2d):
    """The weights that a picture's patches are multiplied with."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_D: Tensor) -> Tensor:
        return ops.rms_norm(x_D, self.weight, self.eps)
