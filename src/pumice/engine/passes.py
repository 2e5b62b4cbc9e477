"""One pass of the network over positions of one or more requests, with their keys and values in pages.

M positions of a pass · R those that pass at a time · X positions whose scores are wanted · T positions of one row ·
P pages of a row · D width · V vocabulary · N pages · K key/value heads · S positions of a page · E width of a head
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pumice import ops
from pumice.engine.generation import Generation
from pumice.engine.graphs import Graphs
from pumice.errors import UserError
from pumice.network.llama import Batch
from pumice.network.llava import Llava
from pumice.ops import Pages
from pumice.ops.heap import Heap

NO_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
"""How PyTorch says it on a CPU, on Windows, of cuBLAS's own memory, and on a Mac's GPU, without a class for it."""


@dataclass(frozen=True)
class Stretch:
    """The next `count` positions of a request, those of `draft` behind its names included. kept: of so many of the last
    the hidden states are wanted, and the scores, unless the request is `pooled`."""

    generation: Generation
    count: int
    kept: int
    draft: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        return self.generation.row.done

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def scored(self) -> int:
        """Of so many of the last positions the scores are wanted."""
        return 0 if self.generation.request.pooled else self.kept

    @property
    def new(self) -> list[int]:
        """The tokens at its positions behind the prompt."""
        row, first = self.generation.row, max(self.start, len(self.generation.request.ids))
        return [*row.names[first:], *self.draft][: max(0, self.end - first)]


class Passes:
    """The network, and the memory in which it keeps keys and values."""

    def __init__(self, network: Llava, pages: int, size: int, rows: int | None = None) -> None:
        """pages: of `size` positions each. Memory that no page needs is never touched, so on most systems it is never
        taken. rows: exactly so many positions pass at a time, each as a row of its own, so that no sum is rounded
        otherwise in other company; None passes all at once."""
        self._network, self._rows, self._device = network, rows, network.like.device
        config = network.config.text
        shape = (pages, config.kv_heads, size, config.head_width)
        self.keys, self.values = (
            [torch.empty(shape, dtype=cache_type(network), device=place) for place in network.language_model.devices]
            for _ in range(2)
        )
        graphs = ops.captures(network.like) and not network.language_model.border
        self._heap = Heap()
        self._forward = Graphs(network, self.keys, self.values) if graphs else network

    @property
    def bytes(self) -> int:
        """What keys and values take when all pages are used."""
        return sum(each.nbytes for each in (*self.keys, *self.values))

    def copy(self, page: int, to: int) -> None:
        for layer in (*self.keys, *self.values):
            layer[to] = layer[page]

    def run(self, stretches: Sequence[Stretch]) -> Tensor:
        """The scores that are wanted, (X, V), one stretch after the other. Pooled requests have their states then.

        Keys and values of all positions are in pages then. One stretch passes as a row; of several each position is a
        row of its own, which sees what stands in the pages of its request up to itself, so that no length is filled up.
        """
        self._heap.tidy()
        hidden_XD = self._hidden(stretches)
        if any(each.scored < each.kept for each in stretches):
            states = list(zip(stretches, torch.split(hidden_XD, [each.kept for each in stretches])))
            for each, hidden_TD in states:
                if each.generation.request.pooled:
                    each.generation.add_states(each.start, hidden_TD)
            hidden_XD = torch.cat([hidden_TD[: each.scored] for each, hidden_TD in states])
        if len(hidden_XD) == 0:
            return hidden_XD
        return self._in_rows(self._network.logits, hidden_XD)

    def _hidden(self, stretches: Sequence[Stretch]) -> Tensor:
        """The hidden states behind the final norm that are wanted, (X, D)."""
        x_1MD = self._embedded(stretches)
        places = [place for each in stretches for place in range(each.start, each.end)]
        positions_1M = torch.tensor([places], device=self._device)
        reach = [len(each.generation.row.names) + len(each.draft) - 1 for each in stretches]
        reach_B = torch.tensor(reach, device=self._device)
        pages = Pages(self.keys, self.values, self._table([each.generation.row.pages for each in stretches]))
        if len(stretches) == 1 and self._rows is None:
            batch = Batch(positions_1M, pages=pages, kept=stretches[0].kept, reach_B=reach_B)
            return self._forward(x_1MD, batch)[0]
        counts = torch.tensor([each.count for each in stretches], device=self._device)
        table_MP, reach_M = pages.table_RP.repeat_interleave(counts, 0), reach_B.repeat_interleave(counts)

        def read(x_RD: Tensor, positions_R: Tensor, table_RP: Tensor, reach_R: Tensor) -> Tensor:
            batch = Batch(positions_R[:, None], pages=replace(pages, table_RP=table_RP), reach_B=reach_R)
            return self._forward(x_RD[:, None], batch)[:, 0]

        hidden_MD = self._in_rows(read, x_1MD[0], positions_1M[0], table_MP, reach_M)
        ends = counts.cumsum(0).tolist()
        wanted = [place for each, end in zip(stretches, ends) for place in range(end - each.kept, end)]
        return hidden_MD if len(wanted) == len(hidden_MD) else hidden_MD[wanted]

    def _in_rows(self, values: Callable[..., Tensor], *of: Tensor) -> Tensor:
        """The values of tensors of M rows, one at least. Where so many pass at a time, the last few are filled up with
        the last, which is then computed again."""
        if self._rows is None:
            return values(*of)
        count, step = len(of[0]), self._rows
        parts = [torch.arange(at, at + step, device=self._device).clamp(max=count - 1) for at in range(0, count, step)]
        return torch.cat([values(*(each[at_R] for each in of)) for at_R in parts])[:count]

    def _embedded(self, stretches: Sequence[Stretch]) -> Tensor:
        """What enters the network: (1, M, D)."""
        # New tokens apart, for one of them may be the one that stands for an image's features.
        new = [each.new for each in stretches]
        new_1M = torch.tensor([[*itertools.chain(*new)]], dtype=torch.long, device=self._device)
        new_1MD = self._network.language_model.embed_tokens(new_1M)
        parts = []
        for each, new_1TD in zip(stretches, new_1MD.split([len(each) for each in new], dim=1)):
            generation = each.generation
            if ids := generation.request.ids[each.start : each.end]:
                features = generation.features_between(each.start, each.end)
                parts.append(self._network.embed(torch.tensor([ids], device=self._device), features))
            parts.append(new_1TD)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The pages of each row, (rows, P); shorter ones are filled up."""
        most = max(len(pages) for pages in rows)
        filled = [[*pages, *itertools.repeat(pages[-1], most - len(pages))] for pages in rows]
        return torch.tensor(filled, device=self._device)


def out_of_memory(error: Exception) -> UserError:
    """What to say of a pass for which there was no memory. Another error is a bug, and is raised."""
    said = any(words in str(error) for words in NO_MEMORY)
    if not said and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        raise error
    return UserError(
        "there is not enough memory left for this request",
        hint="send fewer or smaller images or less text, or give the engine less: pumice.Limits(cache_bytes=...)",
    )


def position_bytes(network: Llava) -> int:
    """What the keys and values of one position take."""
    config = network.config.text
    return 2 * config.layers * config.kv_heads * config.head_width * cache_type(network).itemsize


def cache_type(network: Llava) -> torch.dtype:
    """The type of keys and values: that of the network; beside weights in blocks half precision, as llama.cpp has."""
    return torch.float16 if network.in_blocks else network.like.dtype
