"""image.py against the golden tables, Transformers' own processors, and numbers worked by hand."""

from __future__ import annotations

import hashlib
import json
import resource
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import reference
from pumice.config import ImageConfig, VisionConfig
from pumice.errors import UserError
from pumice.image import Grid, choose_canvas, fit_inside, grid_for, prepare, tile_pictures

GOLDEN = Path(__file__).parent / "golden"
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VISION = VisionConfig(image_px=336, patch_px=14, width=64, layers=2, heads=4, ffn_width=128)

HF_CROP = ImageConfig("crop", 336, 336, MEAN, STD)
HF_ANYRES = ImageConfig("anyres", 336, 336, MEAN, STD, pinpoints=PINPOINTS)
ORIGINAL_PAD, ORIGINAL_ANYRES = HF_CROP.under("original"), HF_ANYRES.under("original")
MODES = {
    "original_pad": ORIGINAL_PAD,
    "original_anyres": ORIGINAL_ANYRES,
    "hf_crop": HF_CROP,
    "hf_pad": ORIGINAL_PAD,
    "hf_anyres": HF_ANYRES,
}


def draw(kind: str, k: int, width: int, height: int) -> Image.Image:
    """The synthetic pictures, by the formulas of golden/pixels.json."""
    x, y = np.arange(width, dtype=np.int64)[None, :], np.arange(height, dtype=np.int64)[:, None]
    whole = np.zeros((height, width), np.int64)
    across, down = whole + (255 * x) // max(width - 1, 1), whole + (255 * y) // max(height - 1, 1)
    if kind == "ramp":
        rgb = (7 * x + 3 * y + k, 5 * x + 11 * y + 2 * k, 13 * x + 2 * y + (x * y) % 17 + 3 * k)
    elif kind == "noise":
        v = (x * 73856093) ^ (y * 19349663) ^ ((k + 1) * 83492791)
        v = (v * 2654435761) % 2**32
        v = v ^ (v >> 15)
        v = (v.astype(np.uint64) * np.uint64(2246822519)) % np.uint64(2**32)
        v = v.astype(np.int64) ^ (v.astype(np.int64) >> 13)
        rgb = (v, v >> 8, v >> 16)
    elif kind == "blocks":
        side = 8 + k % 5
        rgb = (255 * (((x // side) + (y // side)) % 2), across, down)
    else:
        t = ((x * x + y * y) // (37 + k)) % 256
        rgb = (2 * np.where(t > 127, 255 - t, t), across, 255 - down)
    return Image.fromarray(np.stack([whole + each for each in rgb], -1).__mod__(256).astype(np.uint8))


def photo_of(entry: dict) -> Image.Image:
    if entry["source"] == "photo":
        return Image.open(reference("data/photos") / entry["file"]).convert("RGB")
    return draw(entry["kind"], entry["k"], *entry["size"])


def order_of(grid: Grid) -> str:
    """The packed sequence by feature number, as golden/README.md defines it, from the Grid's fields alone."""
    side = grid.tile_side
    numbers = np.arange(grid.tiles * side * side, dtype="<i4").reshape(grid.tiles, side, side)
    columns = [np.concatenate(list(numbers[1 + r * grid.columns :][: grid.columns]), axis=1) for r in range(grid.rows)]
    kept = np.concatenate(columns)[grid.top :, grid.left :][: grid.kept_rows, : grid.kept_columns]
    ended = np.concatenate([kept, np.full((len(kept), 1), -1, "<i4")], axis=1)
    sequence = np.concatenate([numbers[0].ravel(), ended.ravel()]).astype("<i4")
    assert len(sequence) == grid.tokens
    return hashlib.sha256(sequence.tobytes()).hexdigest()[:16]


def check_anyres(path: Path) -> int:
    entries = json.loads(path.read_text())["entries"]
    wrong = []
    for entry in entries:
        width, height = entry["size"]
        for name, config in (("original", ORIGINAL_ANYRES), ("hf", HF_ANYRES)):
            expected = entry["original"] if entry[name] == "same" else entry[name]
            grid = grid_for((height, width), config, VISION)
            canvas = choose_canvas((height, width), config.pinpoints)
            content = fit_inside((height, width), canvas)
            got = {
                "canvas": [canvas[1], canvas[0]],
                "content": [content[1], content[0]],
                "offset": [(canvas[1] - content[1]) // 2, (canvas[0] - content[0]) // 2],
                "grid": [grid.columns, grid.rows],
                "tiles": grid.tiles,
                "kept": [grid.kept_rows, grid.kept_columns],
                "tokens": grid.tokens,
                "order": order_of(grid),
            }
            if got != expected:
                wrong.append((entry["size"], name, got, expected))
    assert not wrong
    return len(entries)


def check_pixels(entry: dict) -> None:
    picture = photo_of(entry)
    if hashlib.sha256(picture.tobytes()).hexdigest() != entry["rgb_sha256"]:
        assert entry["source"] == "photo", "the drawing is wrong"
        pytest.skip("this JPEG decoder gives other bytes than the one that made the reference")
    for mode, config in MODES.items():
        expected = entry.get(mode, {})
        expected = entry[expected["same_as"]] if "same_as" in expected else expected
        if "sha256" not in expected:
            continue
        prepared = prepare(picture, config, VISION)
        pixels = prepared.pixels if config.mode == "anyres" else prepared.pixels[0]
        assert list(pixels.shape) == expected["shape"], mode
        assert hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest() == expected["sha256"], mode
        seen = b"".join(each.tobytes() for each in tile_pictures(picture, config, VISION))
        assert hashlib.sha256(seen).hexdigest() == expected["u8_sha256"], mode


def test_grids_and_orders_of_the_trimmed_table() -> None:
    assert check_anyres(GOLDEN / "image_anyres.json") > 100


def test_grids_and_orders_of_the_whole_table() -> None:
    assert check_anyres(reference("golden/anyres.json")) == 430


def entries_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["entries"]


@pytest.mark.parametrize("entry", entries_of(GOLDEN / "image_pixels.json"), ids=lambda e: f"{e['kind']}-{e['size']}")
def test_pixels_of_drawn_pictures(entry: dict) -> None:
    check_pixels(entry)


@pytest.mark.parametrize("file", ["extreme_ironing.jpg", "llava_v1_5_radar.jpg", "waterview.jpg"])
def test_pixels_of_photos(file: str) -> None:
    entries = [e for e in entries_of(reference("golden/pixels.json")) if e.get("file") == file]
    assert len(entries) == 1
    check_pixels(entries[0])


# --- Transformers itself ---------------------------------------------------------------------------------------------

SIZES = [
    (1, 1000),
    (120, 1),
    (50, 50),
    (336, 336),
    (100, 200),
    (84, 284),
    (205, 656),
    (640, 480),
    (1920, 1080),
    (3, 5),
]


@cache
def oracle(kind: str) -> object:
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    match kind:
        case "crop":
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            return CLIPImageProcessorPil(**size)
        case "pad":
            from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

            return LlavaImageProcessorPil(**size, do_pad=True)
        case "anyres":
            from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

            return LlavaNextImageProcessorPil(**size, image_grid_pinpoints=[list(each) for each in PINPOINTS])
    processor = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
    processor.image_processor = oracle("anyres")
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    return processor


@pytest.mark.parametrize("mode", ["crop", "pad", "anyres"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_transformers(mode: str, size: tuple[int, int]) -> None:
    picture = draw("noise", 4, *size)
    config = {"crop": HF_CROP, "pad": ORIGINAL_PAD, "anyres": HF_ANYRES}[mode]
    expected = np.asarray(oracle(mode)(picture)["pixel_values"][0])
    got = prepare(picture, config, VISION).pixels
    assert got.dtype == np.float32
    assert np.array_equal(got if mode == "anyres" else got[0], expected)


@pytest.mark.parametrize("resize_px", [200, (300, 500), (400, 350)])
def test_a_resize_that_is_not_the_crop_is_done_as_transformers_does(resize_px: int | tuple[int, int]) -> None:
    picture = draw("smooth", 4, 431, 277)
    size = {"shortest_edge": 200} if resize_px == 200 else {"height": resize_px[0], "width": resize_px[1]}
    expected = np.asarray(oracle("crop")(picture, size=size)["pixel_values"][0])
    assert np.array_equal(prepare(picture, ImageConfig("crop", resize_px, 336, MEAN, STD), VISION).pixels[0], expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4200), st.integers(1, 4200))
def test_token_counts_are_those_of_transformers(height: int, width: int) -> None:
    expected = oracle("count")._get_number_of_features(height, width, 336, 336) - 1
    assert grid_for((height, width), HF_ANYRES, VISION).tokens == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from([ORIGINAL_ANYRES, HF_ANYRES]))
def test_a_grid_never_keeps_more_than_it_has(height: int, width: int, config: ImageConfig) -> None:
    grid = grid_for((height, width), config, VISION)
    assert 0 <= grid.kept_rows <= grid.rows * 24
    assert 0 <= grid.kept_columns <= grid.columns * 24
    assert 576 <= grid.tokens <= 2928


def test_one_tile_counts_its_patches_and_the_class_token_when_kept() -> None:
    assert grid_for((480, 640), ORIGINAL_PAD, VISION) == Grid(24)
    assert Grid(24).tokens == 576
    assert Grid(24, class_token=True).tokens == 577
    assert Grid(24).tiles == 1


def test_the_table_of_the_papers_sizes() -> None:
    tokens = {(480, 640): 2340, (640, 480): 2352, (1080, 1920): 1948, (333, 500): 1464, (1000, 1): 648, (1, 1000): 576}
    assert {size: grid_for(size, ORIGINAL_ANYRES, VISION).tokens for size in tokens} == tokens


def test_a_small_picture_stands_upright_for_the_authors_and_lies_for_transformers() -> None:
    assert choose_canvas((200, 100), ORIGINAL_ANYRES.pinpoints) == (672, 336)
    assert choose_canvas((200, 100), HF_ANYRES.pinpoints) == (336, 672)


# --- identity, limits ------------------------------------------------------------------------------------------------


def test_equal_pixels_have_equal_digests_and_others_have_others() -> None:
    picture = draw("ramp", 0, 40, 30)
    one, again = prepare(picture, ORIGINAL_PAD, VISION), prepare(picture.copy(), ORIGINAL_PAD, VISION)
    assert one.digest == again.digest
    assert one.size == (30, 40)
    other = picture.copy()
    other.putpixel((20, 15), (255, 255, 255))
    assert prepare(other, ORIGINAL_PAD, VISION).digest != one.digest


def test_equal_bytes_in_another_shape_have_another_digest() -> None:
    """One black tile of 336 and four of 168 are the same bytes when all channels are scaled alike (CVE-2025-46722)."""
    black, gray = Image.new("RGB", (10, 10)), (0.5, 0.5, 0.5)
    one = prepare(black, ImageConfig("crop", 336, 336, gray, gray), VISION)
    small = VisionConfig(image_px=168, patch_px=14, width=64, layers=2, heads=4, ffn_width=128)
    four = prepare(black, ImageConfig("anyres", 168, 168, gray, gray, pinpoints=((168, 504),)), small)
    assert one.pixels.tobytes() == four.pixels.tobytes()
    assert one.digest != four.digest


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("pad", (1, 5_000)),
        ("pad", (52_800, 44)),
        ("anyres", (1, 20_000)),
        ("anyres", (20_000, 1)),
        ("anyres", (52_800, 44)),
        ("anyres", (44, 52_800)),
        ("anyres", (1_000_000, 1)),
    ],
    ids=str,
)
def test_extreme_shapes_cost_little(mode: str, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "red")
    config = {"pad": ORIGINAL_PAD, "anyres": HF_ANYRES}[mode]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert prepare(picture, config, VISION).pixels.shape[2:] == (336, 336)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 150_000


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("pad", (44, 52_800)),
        ("pad", (1_000_000, 1)),
        ("pad", (1, 1_000_000)),
        ("crop", (1, 20_000)),
        ("crop", (20_000, 1)),
        ("anyres", (1, 1_000_000)),
    ],
    ids=str,
)
def test_a_shape_that_would_be_a_bomb_on_the_way_is_refused_first(mode: str, size: tuple[int, int]) -> None:
    config = {"crop": HF_CROP, "pad": ORIGINAL_PAD, "anyres": HF_ANYRES}[mode]
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="too long and narrow"):
        prepare(Image.new("RGB", size, "red"), config, VISION)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50_000


def test_a_strip_of_an_elongated_square_is_the_whole_square() -> None:
    """The square is built in strips: compare with a square built at once, where several strips are needed."""
    picture = draw("noise", 6, 900, 6001)
    square = Image.new("RGB", (6001, 6001), (122, 116, 104))
    square.paste(picture, ((6001 - 900) // 2, 0))
    expected = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(tile_pictures(picture, ORIGINAL_PAD, VISION)[0]), expected)
