"""Layers that both transformers share: PyTorch's modules, computed by `ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pumice import ops
from pumice.quant import QTensor


class Linear(nn.Linear):
    """y = x Wᵀ + b, run by whatever the hardware does best."""

    plain_until_used: Callable[[], None] | None = None
    """Set where the matrix, one of plain numbers, turns into one of fewer bits (`ops.narrower`) when it is first used:
    what is done then, when the plain ones have served."""

    def reset_parameters(self) -> None:
        # Drawing on the meta device draws nothing, and imports PyTorch's compiler to do so.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.matrix(), self.bias)

    def matrix(self) -> Tensor | QTensor:
        if (served := self.plain_until_used) is not None:
            self.plain_until_used = None
            plain = self.weight
            put_matrix(self, narrow := ops.narrower(plain))
            if isinstance(narrow, QTensor) or narrow.dtype != plain.dtype:
                served()
        return self.weight


def put_matrix(layer: Linear | Embedding, values: Tensor | QTensor) -> None:
    """In blocks it is no parameter: it does not learn, and PyTorch has no type for it."""
    del layer.weight
    matrix = values if isinstance(values, QTensor) else nn.Parameter(values, requires_grad=False)
    setattr(layer, "weight", matrix)  # noqa: B010  mypy knows it as a parameter


def together(x_TD: Tensor, *layers: Linear) -> Sequence[Tensor]:
    """Each layer's output from one input, which is prepared once."""
    return ops.linears(x_TD, [each.matrix() for each in layers], [each.bias for each in layers])


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
