"""Features of images: each image is looked at once, a few tiles at a time, and remembered as long as there is room.

P tokens of a tile · D width of the language model
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pumice.engine.archive import Archive
from pumice.engine.side import InOrder, Mark, Side, side_of
from pumice.image import Prepared
from pumice.network.llava import Llava


class Eyes:
    """The vision tower and what it has seen, by the digests of images."""

    def __init__(
        self, network: Llava, memory_bytes: int, archive: Archive | None = None, side: Side | None = None
    ) -> None:
        """memory_bytes: what remembered features may take; those of one image are always kept until the next. archive:
        where features are looked for first, and written to. side: where tiles are encoded; None is what the tower's
        device has."""
        self._network, self._memory_bytes, self._archive = network, memory_bytes, archive
        device = torch.device("cpu") if network.config.vision is None else network.eyes_like.device
        self._side = side or side_of(device)
        self._newest = self._side.mark()
        self._tiles: dict[str, list[Tensor]] = {}
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._marks: dict[str, Mark] = {}
        """Behind those features that were not handed over yet."""

    @property
    def apart(self) -> bool:
        """Whether tiles are encoded beside the passes, which need not wait. Elsewhere several of them at a time take as
        long as one after the other."""
        return not isinstance(self._side, InOrder)

    @property
    def busy(self) -> bool:
        """Whether tiles are still being encoded."""
        return not self._newest.query()

    def features(self, image: Prepared, *, waits: bool = True) -> Tensor | None:
        """(tokens, D) of an image that was looked at to its end. waits: passes do so for what is still being encoded;
        otherwise that is None too."""
        features_XD = self._features.get(image.digest)
        if features_XD is None:
            return None
        self._features.move_to_end(image.digest)
        mark = self._marks.get(image.digest)
        if mark is not None:
            if not waits and not mark.query():
                return None
            mark.hand_over(features_XD)
            del self._marks[image.digest]
            if self._archive is not None:
                self._archive.write_features(image, features_XD)
        return features_XD

    def _put(self, image: Prepared, features_XD: Tensor) -> None:
        self._features[image.digest] = features_XD
        taken = sum(each.nbytes for each in self._features.values())
        while taken > self._memory_bytes and len(self._features) > 1:
            digest, oldest_XD = self._features.popitem(last=False)
            self._marks.pop(digest, None)
            taken -= oldest_XD.nbytes

    def look(self, images: Sequence[Prepared], most_tiles: int) -> None:
        """Encode the next tiles of these images, in order and in one pass."""
        self._recall(images)
        wanted = {image.digest: image for image in images if image.digest not in self._features}
        if not wanted:
            return
        with self._side.working():
            self._encode(wanted.values(), most_tiles)
            # The first last, so that it is not what goes where there is no room for all.
            for image in reversed(wanted.values()):
                self._finish(image)
        self._newest = self._side.mark()

    def _encode(self, images: Iterable[Prepared], most_tiles: int) -> None:
        chosen: list[tuple[Prepared, int]] = []
        for image in images:
            seen = len(self._tiles.setdefault(image.digest, []))
            room = most_tiles - len(chosen)
            chosen += [(image, tile) for tile in range(seen, min(image.grid.tiles, seen + room))]
        if chosen:  # an earlier look may have broken off when all tiles were there
            like = self._network.eyes_like
            pixels = torch.stack([torch.from_numpy(image.pixels[tile]) for image, tile in chosen])
            for (image, _), tile_PD in zip(chosen, self._network.look(pixels.to(like.device, like.dtype))):
                self._tiles[image.digest].append(tile_PD)

    def _finish(self, image: Prepared) -> None:
        """The features of an image whose tiles are all there."""
        if len(self._tiles[image.digest]) == image.grid.tiles:
            tiles = self._tiles.pop(image.digest)
            features_XD = self._network.merge(torch.stack(tiles), image.grid)
            self._marks[image.digest] = self._side.mark()
            self._put(image, features_XD)

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
