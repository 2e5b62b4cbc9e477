"""Two builds' numbers to the figures of a card. Sums are float64; of equal numbers every figure is exactly its best.

N tiles · Y, X pixels · T tokens of an image · D width · A places of an answer · V vocabulary
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pumice.image import Grid, Prepared
from pumice.tasks.card import Features, Logits, Pixels

MOST_NATS = 600.0
"""Keeps the ratio of two perplexities a number."""


class PixelTally:
    """Pictures, one after the other."""

    def __init__(self) -> None:
        self._equal = 0
        self._differences: list[float | None] = []

    def add(self, reference: Prepared, found: Prepared) -> bool:
        """Are the two bit for bit the same, their tiles included?"""
        same_tiles = reference.grid == found.grid and reference.pixels.shape == found.pixels.shape
        self._differences.append(float(abs(found.pixels - reference.pixels).max()) if same_tiles else None)
        same = same_tiles and reference.pixels.tobytes() == found.pixels.tobytes()
        self._equal += same
        return same

    def figures(self) -> Pixels:
        numbers = [each for each in self._differences if each is not None]
        return Pixels(self._equal, max(numbers) if len(numbers) == len(self._differences) else None)


class FeatureTally:
    """The features of images, one after the other."""

    def __init__(self) -> None:
        self._largest = 0.0
        self._cosines: list[Tensor] = []
        self._squares: dict[int, tuple[float, float]] = {}
        """By place: of the differences, of the reference."""

    def add(self, reference_TD: Tensor, found_TD: Tensor, grid: Grid) -> None:
        reference_TD, found_TD = reference_TD.double(), found_TD.double()
        off_TD = found_TD - reference_TD
        self._largest = max(self._largest, float(off_TD.abs().max()))
        self._cosines.append(_cosines(reference_TD, found_TD))
        off_T, reference_T = (each.square().sum(-1) for each in (off_TD, reference_TD))
        place_T = torch.from_numpy(grid.sources())
        for place in sorted(set(place_T.tolist())):
            off, of = self._squares.get(place, (0.0, 0.0))
            here = place_T == place
            self._squares[place] = off + float(off_T[here].sum()), of + float(reference_T[here].sum())

    def figures(self) -> Features:
        cosines = torch.cat(self._cosines)
        off, of = (sum(each) for each in zip(*self._squares.values(), strict=True))
        places = sorted(place for place in self._squares if place >= 0)
        return Features(
            largest=self._largest,
            relative_l2=_relative(off, of),
            cosine_mean=float(cosines.mean()),
            cosine_min=float(cosines.min()),
            by_tile=tuple(_relative(*self._squares[place]) for place in places),
        )


def _relative(off_squared: float, of_squared: float) -> float:
    """Against nothing, any difference is whole."""
    return math.sqrt(off_squared / of_squared) if of_squared else float(off_squared > 0)


def _cosines(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """Of each row. Exactly 1 of equal rows, rows of zeros included; 0 where only one of them is zero."""
    lengths_T = a_TD.norm(dim=-1) * b_TD.norm(dim=-1)
    cosine_T = (a_TD * b_TD).sum(-1) / lengths_T.where(lengths_T > 0, 1.0)
    return cosine_T.clamp(-1, 1).where((a_TD != b_TD).any(-1), 1.0)


class LogitTally:
    """Answers, one after the other."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._worse: list[Tensor] = []
        self._largest = 0.0

    @property
    def places(self) -> int:
        return sum(len(each) for each in self._kl)

    def add(self, reference_AV: Tensor, found_AV: Tensor, answer_A: Tensor) -> None:
        """Where one vocabulary has more rows, padding behind the other's, the rows of both count."""
        rows = min(reference_AV.shape[1], found_AV.shape[1])
        reference_AV, found_AV = reference_AV[:, :rows].double(), found_AV[:, :rows].double()
        self._largest = max(self._largest, float((found_AV - reference_AV).abs().max()))
        self._same.append(reference_AV.argmax(-1) == found_AV.argmax(-1))
        p_AV, q_AV = reference_AV.log_softmax(-1), found_AV.log_softmax(-1)
        # Below zero by rounding only.
        self._kl.append((p_AV.exp() * (p_AV - q_AV)).sum(-1).clamp(min=0))
        self._worse.append((p_AV - q_AV).gather(1, answer_A[:, None])[:, 0])

    def figures(self) -> Logits:
        kl = torch.cat(self._kl)
        worse = float(torch.cat(self._worse).mean())
        return Logits(
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            agreement=float(torch.cat(self._same).double().mean()),
            perplexity_ratio=math.exp(min(worse, MOST_NATS)),
            largest=self._largest,
        )
