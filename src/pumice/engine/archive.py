"""Pages and features of images, written to a disk and read again by a later process.

N pages · K key/value heads · S positions of a page · E width of a head · D width of the language model
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice import ops
from pumice.checkpoints.safetensors_writer import Weight
from pumice.engine.cache import Cache
from pumice.engine.disk import Disk
from pumice.image import Prepared
from pumice.network.llava import Llava
from pumice.quant import QTensor

STRETCH = 4096
"""Numbers of 64 bits that become one."""
AT_ONCE = 2**20
"""Numbers that are looked at together: more do not stay in a processor's caches."""


def model_digest(network: Llava, *others: object) -> str:
    """Of the config, of all weights, and of what else keys and values depend on, as the form that eyes take part in."""
    described = repr((network.config, ops.narrower_format().name, *others))
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for name, module in sorted(network.named_modules()):
        for field in ("weight", "bias", "image_newline"):
            values = vars(module).get(field, module._parameters.get(field))
            if isinstance(values, QTensor | Tensor):
                digest.update(f"{name}.{field} {tuple(values.shape)}".encode() + _told(values))
    return digest.hexdigest()


def _told(values: Tensor | QTensor) -> bytes:
    """Of each stretch of the bytes one number, the sum of its products with fixed odd ones modulo 2^64, made fast.
    Weights that differ by accident have other sums (a universal hash: Carter and Wegman 1979); it is no seal."""
    data = values.data_RB if isinstance(values, QTensor) else values.detach()
    flat_X = data.contiguous().flatten().view(torch.uint8)
    factors_S = torch.randint(-(2**62), 2**62, (STRETCH,), generator=torch.Generator().manual_seed(0)).to(data.device)
    sums = []
    for start in range(0, len(flat_X), 8 * AT_ONCE):
        part_X = flat_X[start : start + 8 * AT_ONCE]
        padded_X = F.pad(part_X, (0, -len(part_X) % (8 * STRETCH))) if len(part_X) % (8 * STRETCH) else part_X
        aligned_X = padded_X if padded_X.storage_offset() % 8 == 0 else padded_X.clone()
        sums.append((aligned_X.view(torch.int64).view(-1, STRETCH) * (2 * factors_S + 1)).sum(1))
    return bytes(torch.cat(sums).cpu().numpy().data) if sums else b""


class Archive:
    """The cache's images on a disk."""

    def __init__(self, disk: Disk, model: str, cache: Cache, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """model: its digest. keys, values: of each layer, (N, K, S, E)."""
        self._disk, self._model, self._cache = disk, model, cache
        self._layers = {f"{what}.{layer}": each for what, all in (("keys", keys), ("values", values))
                        for layer, each in enumerate(all)}  # fmt: skip

    def recall_longest(self, names: Sequence[int], ends: list[int], root: bytes) -> None:
        """The pages of a row's beginning come back, as long as they are there: it may end at each of these positions,
        which rise, and are asked for once."""
        while ends:
            if self.recall(names[: ends.pop() // self._cache.size * self._cache.size], root):
                ends.clear()

    def recall(self, names: Sequence[int], root: bytes) -> bool:
        """The pages of a row's beginning come back, if they were written and there is room. Whether they can be found
        now."""
        keys = self._cache.extend([], names, root)
        if not keys or self._cache.knows(keys[-1]):
            return bool(keys)
        if self._cache.available < len(keys):
            return False
        found = self._disk.load(keys[-1].hex())
        shapes = {name: (len(keys), *each.shape[1:]) for name, each in self._layers.items()}
        if found is None or {name: tuple(each.shape) for name, each in found.items()} != shapes:
            return False
        pages = [self._cache.take() for _ in keys]
        try:
            for name, layer in self._layers.items():
                layer[pages] = found[name].to(layer.device)
            for at, (page, parent) in enumerate(zip(pages, [root, *keys])):
                self._cache.keep(page, parent, names[at * self._cache.size : (at + 1) * self._cache.size])
        finally:
            self._cache.release(pages)
        return True

    def write(self, keys: Sequence[bytes], pages: Sequence[int], done: Callable[[], None]) -> None:
        """The pages, by the key of the last; they must stay as they are until `done` is called."""
        weights = {
            name: Weight((len(pages), *each.shape[1:]), each.dtype, functools.partial(_of_pages, each, pages))
            for name, each in self._layers.items()
        }
        self._disk.save(keys[-1].hex(), weights, done)

    def has(self, key: bytes) -> bool:
        """Whether pages that end with this one are there, or on their way."""
        return self._disk.has(key.hex())

    def features(self, image: Prepared) -> Tensor | None:
        """(image.grid.tokens, D), if they were written."""
        found = self._disk.load(self._name(image)) or {}
        features_XD = found.get("features")
        fits = features_XD is not None and len(features_XD) == image.grid.tokens
        return features_XD if fits else None

    def write_features(self, image: Prepared, features_XD: Tensor) -> None:
        if not self._disk.has(self._name(image)):
            weight = Weight(tuple(features_XD.shape), features_XD.dtype, lambda: features_XD)
            self._disk.save(self._name(image), {"features": weight}, lambda: None)

    def wait(self) -> None:
        """Until all is written."""
        self._disk.wait()

    def _name(self, image: Prepared) -> str:
        return hashlib.blake2b(f"{self._model} {image.digest}".encode(), digest_size=32).hexdigest()


def _of_pages(layer_NKSE: Tensor, pages: Sequence[int]) -> Tensor:
    return layer_NKSE[list(pages)]
