"""Features of images: each image is looked at once, a few tiles at a time, and remembered as long as there is room.

P tokens of a tile · D width of the language model
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from pumice.engine.archive import Archive
from pumice.image import Prepared
from pumice.network.llava import Llava


class Eyes:
    """The vision tower and what it has seen, by the digests of images."""

    def __init__(self, network: Llava, memory_bytes: int, archive: Archive | None = None) -> None:
        """memory_bytes: what remembered features may take; those of one image are always kept until the next. archive:
        where features are looked for first, and written to."""
        self._network, self._memory_bytes, self._archive = network, memory_bytes, archive
        self._tiles: dict[str, list[Tensor]] = {}
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def features(self, image: Prepared) -> Tensor | None:
        """(tokens, D) of an image that was looked at to its end."""
        if image.digest in self._features:
            self._features.move_to_end(image.digest)
        return self._features.get(image.digest)

    def _put(self, image: Prepared, features_XD: Tensor) -> None:
        self._features[image.digest] = features_XD
        taken = sum(each.nbytes for each in self._features.values())
        while taken > self._memory_bytes and len(self._features) > 1:
            taken -= self._features.popitem(last=False)[1].nbytes

    def look(self, images: Sequence[Prepared], most_tiles: int) -> None:
        """Encode the next tiles of these images, in order and in one pass."""
        self._recall(images)
        chosen: list[tuple[Prepared, int]] = []
        for image in images:
            if image.digest in self._features:
                continue
            seen = len(self._tiles.setdefault(image.digest, []))
            seen += sum(each.digest == image.digest for each, _ in chosen)
            room = most_tiles - len(chosen)
            chosen += [(image, tile) for tile in range(seen, min(image.grid.tiles, seen + room))]
        if not chosen:
            return
        like = self._network.eyes_like
        pixels = torch.stack([torch.from_numpy(image.pixels[tile]) for image, tile in chosen])
        for (image, _), tile_PD in zip(chosen, self._network.look(pixels.to(like.device, like.dtype))):
            self._tiles[image.digest].append(tile_PD)
        # The first last, so that it is not what goes where there is no room for all.
        for image in reversed({each.digest: each for each, _ in chosen}.values()):
            tiles = self._tiles[image.digest]
            if len(tiles) == image.grid.tiles:
                del self._tiles[image.digest]
                self._put(image, self._network.merge(torch.stack(tiles), image.grid))
                if self._archive is not None:
                    self._archive.write_features(image, self._features[image.digest])

    def _recall(self, images: Sequence[Prepared]) -> None:
        """What an earlier process has seen."""
        if self._archive is None:
            return
        for image in images:
            known = image.digest in self._features or self.begun(image)
            if not known and (features_XD := self._archive.features(image)) is not None:
                self._put(image, features_XD.to(self._network.like.device))

    def begun(self, image: Prepared) -> bool:
        """Whether some of its tiles, and not all, are encoded."""
        return image.digest in self._tiles

    def forget(self, image: Prepared) -> None:
        """Drop what was begun of an image that nobody asks about any more."""
        self._tiles.pop(image.digest, None)
