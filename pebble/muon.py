"""Muon (Jordan et al. 2024) in float32: a momentum step whose matrix is first made near orthogonal.

PyTorch's own form iterates in bfloat16, which a CPU without 16-bit products does many times slower than the training.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial whose iteration pushes all singular values towards 1."""


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The matrix with its singular values pushed near 1 by Newton-Schulz rounds; same shape."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. The step has the size that AdamW's would have at the same rate (Liu et al. 2025)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["moment"] = torch.zeros_like(weight)
                moment = state["moment"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(moment, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * group["lr"] * max(weight.shape) ** 0.5)
