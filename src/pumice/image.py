"""An upright picture to pixels: which tiles, the float32 that the vision tower reads, and how many tokens they become.

`Grid` is the only place that counts image tokens. Sizes are (height, width) in pixels; Pillow's are (width, height).
Sources: LLaVA mm_utils.py (process_images, process_anyres_image) and llava_arch.py (unpad_image); Transformers
image_processing_pil_clip.py, image_processing_pil_llava_next.py. Pixels are equal to theirs, byte for byte.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pumice.config import ImageConfig, Size, VisionConfig
from pumice.errors import UserError
from pumice.picture import MAX_PIXELS, ImageLike, open_image

__all__ = ["Grid", "ImageLike", "Prepared", "blank", "drawn", "grid_for", "open_image", "prepare", "tile_pictures"]

MAX_STRIP_PIXELS = 4 * MAX_PIXELS
"""Of the part of a padded square that holds the picture. It is never in memory at once, but its time is spent."""


@dataclass(frozen=True)
class Grid:
    """How the features of an image's tiles become its part of the prompt.

    The base view comes first, `tile_side`² features in raster order (its class token before them when `class_token`).
    The other tiles, `rows` × `columns` of them, form a map of (rows · tile_side, columns · tile_side) features; of this
    map `[top : top + kept_rows, left : left + kept_columns]` is kept, the rest shows only padding. When `newline`, one
    learned vector ends each kept row. LLaVA 1.5 has the base view alone: no rows, no columns.
    """

    tile_side: int
    """Patches along one edge of a tile."""
    class_token: bool = False
    rows: int = 0
    columns: int = 0
    top: int = 0
    """Map rows cut at the top, and as many at the bottom."""
    left: int = 0
    """Map columns cut on the left, and as many on the right."""
    newline: bool = False
    most: int | None = None
    """Tokens that stay, by choice, of more; None: all. `network.pruning` says which."""

    @property
    def tiles(self) -> int:
        """Pictures that the vision tower sees, the base view included."""
        return 1 + self.rows * self.columns

    @property
    def kept_rows(self) -> int:
        return self.rows * self.tile_side - 2 * self.top

    @property
    def kept_columns(self) -> int:
        return self.columns * self.tile_side - 2 * self.left

    @property
    def whole(self) -> int:
        """Tokens before any are dropped by choice."""
        base = self.tile_side**2 + int(self.class_token)
        return base + self.kept_rows * (self.kept_columns + int(self.newline))

    @property
    def tokens(self) -> int:
        """Places that the image takes in the prompt."""
        return self.whole if self.most is None else min(self.most, self.whole)

    def sources(self) -> NDArray[np.intp]:
        """For each of the `whole` tokens the tile it comes from: 0 is the base view, -1 the vector that ends a row."""
        base = np.zeros(self.tile_side**2 + int(self.class_token), np.intp)
        y = (self.top + np.arange(self.kept_rows)) // self.tile_side
        x = (self.left + np.arange(self.kept_columns)) // self.tile_side
        tiles_YX = 1 + y[:, None] * self.columns + x
        ends_YX = np.full((self.kept_rows, int(self.newline)), -1, np.intp)
        return np.concatenate((base, np.concatenate((tiles_YX, ends_YX), axis=1).ravel()))


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image, ready for the network."""

    pixels: NDArray[np.float32]
    """(tiles, 3, px, px), normalised; the base view first, then the tiles row by row."""
    grid: Grid
    size: Size
    """Of the upright picture."""
    digest: str
    """SHA-256 over grid and pixels, in hex: equal for equal input to the network, and for nothing else."""


def prepare(source: ImageLike, image: ImageConfig, vision: VisionConfig, most: int | None = None) -> Prepared:
    """Pixels, grid and digest of an image, which may take `most` tokens, at least one; None: all that it has.

    Raises UserError for what cannot be read or is too large.
    """
    upright = open_image(source)
    size = (upright.height, upright.width)
    grid = grid_for(size, image, vision, most)
    pixels = _normalised(_tiles(upright, image, vision, grid), image)
    digest = hashlib.sha256(repr((grid, pixels.shape)).encode() + pixels.tobytes()).hexdigest()
    return Prepared(pixels, grid, size, digest)


def drawn(bytes_YXC: NDArray[np.uint8]) -> Image.Image:
    """A picture from its 8-bit RGB values, (height, width, 3)."""
    return Image.fromarray(np.ascontiguousarray(bytes_YXC))


def blank(size: tuple[int, int], image: ImageConfig) -> Image.Image:
    """A picture, so many pixels wide and high, that shows nothing: all of it in the colour that LLaVA 1.5 pads with,
    near zero for the tower."""
    return Image.new("RGB", size, _mean_colour(image))


def tile_pictures(
    source: ImageLike, image: ImageConfig, vision: VisionConfig, most: int | None = None
) -> list[Image.Image]:
    """The 8-bit pictures behind `Prepared.pixels`: what the model sees, base view first."""
    upright = open_image(source)
    return _tiles(upright, image, vision, grid_for((upright.height, upright.width), image, vision, most))


# --- which tiles, how many tokens -----------------------------------------------------------------------------------


def grid_for(size: Size, image: ImageConfig, vision: VisionConfig, most: int | None = None) -> Grid:
    """The grid of a picture of this (height, width). LLaVA llava_arch.py, prepare_inputs_labels_for_multimodal.

    With `most` (at least 1), of the grids that take no more tokens the one in which most of the picture's pixels
    survive, and of equal ones the smallest. Where not even the base view alone fits, it is that view with `most` of
    its features. A map of tiles is kept whole, with the vectors that end its rows, or not at all.
    """
    base = Grid(vision.side, vision.keep_class_token)
    chosen = base
    if image.mode == "anyres":
        chosen = _tiled(size, choose_canvas(size, image.pinpoints), image, vision)
    if most is None or chosen.tokens <= most:
        return chosen
    if most < base.tokens:
        return replace(base, most=most)
    height, width = size
    # The base view fills its square, whatever the picture's form.
    survive = [(min(height, vision.image_px) * min(width, vision.image_px), base)]
    survive += [(used_px(size, each), _tiled(size, each, image, vision)) for each in image.pinpoints]
    fitting = [(pixels, -grid.tokens, grid) for pixels, grid in survive if grid.tokens <= most]
    return max(fitting, key=lambda each: each[:2])[2]


def _tiled(size: Size, canvas: Size, image: ImageConfig, vision: VisionConfig) -> Grid:
    """The grid of a picture on this canvas."""
    rows, columns = canvas[0] // vision.image_px, canvas[1] // vision.image_px
    top, left = _unpad(size, (rows * vision.side, columns * vision.side), image.rounds_unpad)
    return Grid(vision.side, vision.keep_class_token, rows, columns, top, left, newline=True)


def choose_canvas(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The canvas on which most of the picture's pixels survive, and of those the smallest; the first wins a tie.

    LLaVA mm_utils.py, select_best_resolution.
    """
    return max(pinpoints, key=lambda canvas: (used_px(size, canvas), -canvas[0] * canvas[1]))


def used_px(size: Size, canvas: Size) -> int:
    """How many of the picture's pixels survive on the canvas. LLaVA mm_utils.py, select_best_resolution."""
    height, width = size
    scale = min(canvas[1] / width, canvas[0] / height)
    return min(int(width * scale) * int(height * scale), width * height)


def fit_inside(size: Size, canvas: Size) -> Size:
    """The picture's size once it is scaled to touch two edges of the canvas.

    LLaVA mm_utils.py, resize_and_pad_image.
    """
    (height, width), (canvas_height, canvas_width) = size, canvas
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return min(math.ceil(height * across), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * down), canvas_width)


def _unpad(size: Size, map_size: Size, rounds: bool) -> tuple[int, int]:
    """Rows to cut at the top and columns to cut on the left of a feature map. LLaVA llava_arch.py, unpad_image.

    The scale is computed first and then multiplied, as there: 205x656 keeps 14 columns by the authors' int() and 16
    by Transformers' int(round(x, 7)), because the product lands just below a whole number. That a picture's content
    was rounded up when it was resized (`fit_inside`) is ignored here, also as there.
    """
    (height, width), (map_height, map_width) = size, map_size
    if width / height > map_width / map_height:
        content = height * (map_width / width)
        return (map_height - int(round(content, 7) if rounds else content)) // 2, 0
    content = width * (map_height / height)
    return 0, (map_width - int(round(content, 7) if rounds else content)) // 2


# --- an upright picture to tiles, tiles to numbers -------------------------------------------------------------------


def _tiles(upright: Image.Image, image: ImageConfig, vision: VisionConfig, grid: Grid) -> list[Image.Image]:
    px = image.resize_px
    match image.mode:
        case "pad":
            pictures = [_squared(upright, (px, px) if isinstance(px, int) else px, image)]
        case "crop":
            pictures = [upright]
        case "anyres":
            base = _resized(upright, (px, px) if isinstance(px, int) else px, image.resample)
            pictures = [base, *_cut(upright, image, vision.image_px, grid)]
    return [_cropped(each, image) for each in pictures]


def _cropped(picture: Image.Image, image: ImageConfig) -> Image.Image:
    """Transformers' CLIP steps: the shortest edge (or both edges) to `resize_px`, then the centre, black outside.

    A tile that has its size already passes unchanged.
    """
    size = image.resize_px
    if isinstance(size, int):
        long = int(size * max(picture.size) / min(picture.size))
        size = (long, size) if picture.height > picture.width else (size, long)
    resized = _resized(picture, size, image.resample)
    top, left = (resized.height - image.crop_px) // 2, (resized.width - image.crop_px) // 2
    return resized.crop((left, top, left + image.crop_px, top + image.crop_px))


def _cut(upright: Image.Image, image: ImageConfig, edge_px: int, grid: Grid) -> list[Image.Image]:
    """The picture on its canvas, centred on black, cut into tiles row by row; nothing where the base view is alone."""
    if grid.tiles == 1:
        return []
    canvas_height, canvas_width = canvas = grid.rows * edge_px, grid.columns * edge_px
    content = _resized(upright, fit_inside((upright.height, upright.width), canvas), image.resample)
    sheet = Image.new("RGB", (canvas_width, canvas_height))
    sheet.paste(content, ((canvas_width - content.width) // 2, (canvas_height - content.height) // 2))
    corners = [(x, y) for y in range(0, canvas_height, edge_px) for x in range(0, canvas_width, edge_px)]
    return [sheet.crop((x, y, x + edge_px, y + edge_px)) for x, y in corners]


def _squared(upright: Image.Image, size: Size, image: ImageConfig) -> Image.Image:
    """The picture in the middle of a square of the mean colour, resized. LLaVA mm_utils.py, expand2square.

    Pillow resizes along the rows first and each row by itself, so the square is built a strip at a time: the same
    bytes, without a square of 20 000 x 20 000 for a picture of 1 x 20 000.
    """
    side, height = max(upright.size), upright.height
    if side * height > MAX_STRIP_PIXELS or side * size[1] > MAX_PIXELS:
        raise _too_long(upright, side * max(height, size[1]))
    colour = _mean_colour(image)
    left, top = (side - upright.width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (size[1], side), colour)
    step = max(1, 2**22 // side)
    for y in range(0, height, step):
        rows = min(step, height - y)
        strip = Image.new("RGB", (side, rows), colour)
        strip.paste(upright.crop((0, y, upright.width, y + rows)), (left, 0))
        narrow.paste(_resized(strip, (rows, size[1]), image.resample), (0, top + y))
    return _resized(narrow, size, image.resample)


def _mean_colour(image: ImageConfig) -> tuple[int, int, int]:
    red, green, blue = (int(mean * 255) for mean in image.mean)
    return red, green, blue


def _resized(picture: Image.Image, size: Size, resample: int) -> Image.Image:
    """Pillow's resize, unless the result or the picture between its two passes would be a bomb."""
    height, width = size
    if width * max(height, picture.height) > MAX_PIXELS:
        raise _too_long(picture, width * max(height, picture.height))
    return picture.resize((width, height), Image.Resampling(resample))


def _too_long(picture: Image.Image, pixels: int) -> UserError:
    return UserError(
        f"a picture of {picture.width} x {picture.height} is too long and narrow: "
        f"on the way to the model's size it would grow to {pixels} pixels",
        hint="cut out the part that matters, or shrink the longer edge",
    )


def _normalised(pictures: list[Image.Image], image: ImageConfig) -> NDArray[np.float32]:
    """(tiles, 3, px, px). As in the references, bytes are scaled in float64, and then float32 takes over.

    A byte has 256 values, so a table per channel holds every result.
    """
    scaled_L = (np.arange(256) * image.rescale).astype(np.float32)
    mean, std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
    bytes_NYXC = np.stack([np.asarray(each) for each in pictures])
    channels = [((scaled_L - mean[c]) / std[c])[bytes_NYXC[..., c]] for c in range(3)]
    return np.stack(channels, axis=1)
