"""Keys and values in pages, and which pages a row has.

N pages · R rows · P pages of a row · K key/value heads · S positions of a page · E width of a head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class LayerPages:
    """Keys and values of one layer, (N, K, S, E) each, and the pages of each row."""

    keys: Tensor
    values: Tensor
    table_RP: Tensor


@dataclass(frozen=True)
class Pages:
    """Where a pass finds the keys and values of its rows, and puts new ones.

    keys, values: of each layer, (N, K, S, E). table_RP: the pages of each row in order, int64; shorter rows are filled
    up with any page. Position p of row r lies in page table_RP[r, p // S], at p % S.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    table_RP: Tensor

    def layers(self, part: range) -> Pages:
        """Those of some layers, one after the other."""
        return replace(self, keys=self.keys[part.start : part.stop], values=self.values[part.start : part.stop])

    def of(self, layer: int) -> LayerPages:
        return LayerPages(self.keys[layer], self.values[layer], self.table_RP)
