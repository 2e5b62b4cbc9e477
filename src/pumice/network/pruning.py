"""Fewer features of an image: which of them stay when it may take only so many tokens.

X features of an image, in the order of the prompt · K of them that stay · D width of the language model
Source: DivPrune, Alvar et al. 2025 (CVPR 2025, arXiv 2503.02175). It needs no training, nothing of the vision tower but
its features, and not the question, so that what stays depends on the image alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def most_diverse(x_XD: Tensor, count: int) -> Tensor:
    """Which features stay: `count` places, ascending, (K,). Expects 0 < count <= X.

    The paper's greedy answer to the max-min diversity problem: the distance of two features is 1 - their cosine; the
    first that stays is the one whose nearest neighbour is farthest, each further one lies farthest from the nearest
    that stays already. Of features that are equally far the first is taken.
    """
    unit_XD = F.normalize(x_XD.float(), dim=-1)
    distance_XX = (1 - unit_XD @ unit_XD.T).fill_diagonal_(torch.inf)
    nearest_X = distance_XX.amin(1)
    staying: list[int] = []
    while len(staying) < count:
        place = int(nearest_X.argmax())
        nearest_X = torch.minimum(nearest_X, distance_XX[place]) if staying else distance_XX[place].clone()
        nearest_X[place] = -torch.inf
        staying.append(place)
    return torch.tensor(sorted(staying), device=x_XD.device)
