"""picture.py: each decode rule by pixels, each bad input by its words."""

from __future__ import annotations

import base64
import os
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import pumice.picture
from pumice.errors import UserError
from pumice.picture import MAX_PIXELS, open_image

WHITE = (255, 255, 255)
FORMATS = ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF"]


def corners() -> Image.Image:
    """24 x 16, a colour in each quarter: no turn or flip of it equals another, and JPEG keeps flat blocks."""
    rgb = np.zeros((16, 24, 3), np.uint8)
    rgb[:8, :8], rgb[:8, 8:], rgb[8:, :8], rgb[8:, 8:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)
    return Image.fromarray(rgb)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def array(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def refused(source: object) -> UserError:
    with pytest.raises(UserError) as caught:
        open_image(source)
    error = caught.value
    assert error.message
    assert error.hint
    assert "\n" not in error.message + error.hint
    assert " 0x" not in str(error)
    assert "BytesIO" not in str(error)
    return error


def png(width: int, height: int, depth_and_colour: tuple[int, int], rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand; `rows` with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, *depth_and_colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


# --- formats and sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_opens_from_path_bytes_base64_data_url_and_pil(kind: str, tmp_path: Path) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    lossless = {"lossless": True} if kind == "WebP" else {"quality": 95} if kind in ("JPEG", "AVIF") else {}
    data = saved(corners(), kind, **lossless)
    path = tmp_path / "wrong-name.gif"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    sources = [path, str(path), data, text, wrapped, f"data:image/png;base64,{text}", Image.open(BytesIO(data))]
    expected = array(corners())
    for source in sources:
        difference = abs(array(open_image(source)) - expected)
        assert difference.mean() < (8 if kind in ("JPEG", "AVIF") else 1e-9)


def test_a_file_whose_name_is_base64_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = base64.b64encode(saved(Image.new("RGB", (1, 1), "red"), "GIF")).decode().replace("/", "A")
    Path(name).write_bytes(saved(corners(), "PNG"))
    assert open_image(name).size == (24, 16)


def turned(orientation: int) -> Image.Image:
    """What a camera stores so that a viewer shows `corners()`: each inverse written with numpy, not with Pillow."""
    a = np.asarray(corners())
    stored = {
        1: a,
        2: a[:, ::-1],
        3: a[::-1, ::-1],
        4: a[::-1],
        5: a.transpose(1, 0, 2),
        6: np.rot90(a, 1),  # shown turned clockwise, so stored turned the other way
        7: a[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(a, -1),
    }
    return Image.fromarray(np.ascontiguousarray(stored[orientation]))


def exif_of(orientation: object, kind: int = 3) -> Image.Exif | bytes:
    """An EXIF block with one entry by hand, where Pillow would not write such a value."""
    if isinstance(orientation, int) and 0 < orientation < 9:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return exif
    value = orientation if isinstance(orientation, bytes) else struct.pack("<HH", orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x0112, kind, 1) + value + b"\0\0\0\0"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF", "AVIF"])
def test_a_picture_comes_out_upright_once(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    quality = {"JPEG": {"quality": 98, "subsampling": 0}, "WebP": {"lossless": True}, "AVIF": {"quality": 98}}
    data = saved(turned(orientation), kind, exif=exif_of(orientation), **quality.get(kind, {}))
    expected = array(corners())
    for source in (data, Image.open(BytesIO(data))):
        upright = open_image(source)
        assert upright.size == (24, 16)
        assert abs(array(upright) - expected).mean() < 8
        assert np.array_equal(array(open_image(upright)), array(upright))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg"])
def test_a_compressed_tiff_is_turned_once(compression: str) -> None:
    data = saved(turned(6), "TIFF", exif=exif_of(6), compression=compression)
    assert abs(array(open_image(data)) - array(corners())).mean() < 12


@pytest.mark.parametrize(("value", "kind"), [(0, 3), (9, 3), (65535, 3), (b"6\0\0\0", 2), (b"\x06\0\0\0", 1)])
def test_an_orientation_that_does_not_exist_turns_nothing(value: object, kind: int) -> None:
    if kind == 1:
        value = b"\x09\0\0\0"
    data = saved(corners(), "PNG", exif=exif_of(value, kind))
    assert np.array_equal(array(open_image(data)), array(corners()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_a_damaged_exif_block_turns_nothing(exif: bytes) -> None:
    data = saved(corners(), "PNG", exif=exif)
    assert np.array_equal(array(open_image(data)), array(corners()))


def heic(picture: Image.Image, orientation: int = 1) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heic` is not installed")
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = BytesIO()
    pillow_heif.encode("RGB", picture.size, picture.tobytes(), out, quality=95, exif=exif.tobytes())
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_with_irot_and_exif_is_turned_once(orientation: int) -> None:
    """The writer turns the EXIF orientation into irot and imir; the EXIF block stands beside them, as in a phone's."""
    big = turned(orientation).resize([8 * n for n in turned(orientation).size], Image.Resampling.NEAREST)
    data = heic(big, orientation)
    assert (b"irot" in data or b"imir" in data) == (orientation != 1)
    upright = open_image(data)
    assert upright.size == (192, 128)
    expected = array(corners().resize((192, 128), Image.Resampling.NEAREST))
    assert abs(array(upright) - expected).mean() < 8


def test_heic_leaves_pillow_as_it_was_and_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(corners().resize((64, 64)))
    open_image(data)
    assert "HEIF" not in Image.OPEN
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pumice[heic]" in refused(data).hint


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_alpha_lies_over_white() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = (200, 100, 0), [[0, 128, 255], [64, 1, 254]]
    expected = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255) + 255 * (1 - rgba[..., 3:] / 255))
    for kind in ("PNG", "TIFF"):
        assert abs(array(open_image(saved(Image.fromarray(rgba), kind))) - expected).max() <= 1
    gray = Image.fromarray(rgba[..., [0, 3]].copy(), "LA")
    expected_gray = np.repeat(expected[..., :1], 3, -1)
    assert abs(array(open_image(saved(gray, "PNG"))) - expected_gray).max() <= 1
    assert abs(array(open_image(gray)) - expected_gray).max() <= 1
    pa = Image.new("PA", (1, 1))
    pa.putpalette([9, 8, 7])
    pa.putpixel((0, 0), (0, 0))
    assert open_image(pa).getpixel((0, 0)) == WHITE


def test_the_transparent_colour_of_a_png_is_white_at_every_depth() -> None:
    """tRNS is stored in the file's own levels; rows are written by hand: filter byte 0, then two pixels."""
    red, key = struct.pack(">HHH", 255, 0, 0), (b"tRNS", b"")
    cases: list[tuple[tuple[int, int], bytes, bytes, tuple[int, int, int]]] = [
        ((8, 2), bytes([0, 255, 0, 0, 0, 255, 0]), red, (0, 255, 0)),
        ((8, 0), bytes([0, 7, 9]), struct.pack(">H", 7), (9, 9, 9)),
        ((1, 0), bytes([0, 0b01000000]), struct.pack(">H", 0), WHITE),
        ((1, 0), bytes([0, 0b10000000]), struct.pack(">H", 1), (0, 0, 0)),
        ((2, 0), bytes([0, 0b01100000]), struct.pack(">H", 1), (170, 170, 170)),
        ((4, 0), bytes([0, 0x35]), struct.pack(">H", 3), (85, 85, 85)),
        ((16, 0), struct.pack(">BHH", 0, 300, 25700), struct.pack(">H", 300), (100, 100, 100)),
        (
            (16, 2),
            struct.pack(">BHHHHHH", 0, 0x1234, 0, 0, 0x5678, 0, 0),
            struct.pack(">HHH", 0x1234, 0, 0),
            (0x56, 0, 0),
        ),
    ]
    for shape, row, transparent, other in cases:
        picture = open_image(png(2, 1, shape, row, (key[0], transparent)))
        assert [picture.getpixel((0, 0)), picture.getpixel((1, 0))] == [WHITE, other], shape


def test_transparent_palette_entries_are_white() -> None:
    palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    row = bytes([0, 0, 1])
    one = open_image(png(2, 1, (8, 3), row, palette, (b"tRNS", bytes([0]))))
    assert [one.getpixel((0, 0)), one.getpixel((1, 0))] == [WHITE, (40, 50, 60)]
    half = open_image(png(2, 1, (8, 3), row, palette, (b"tRNS", bytes([255, 128]))))
    assert half.getpixel((0, 0)) == (10, 20, 30)
    assert np.abs(np.array(half.getpixel((1, 0))) - [147, 152, 157]).max() <= 1
    none = open_image(png(2, 1, (8, 3), row, palette))
    assert none.getpixel((1, 0)) == (40, 50, 60)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 300, 25700, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert array(open_image(saved(Image.fromarray(levels), kind)))[0, :, 0].tolist() == [0, 1, 1, 100, 255]
    big_endian = Image.frombytes("I;16B", (5, 1), levels.astype(">u2").tobytes())
    assert array(open_image(big_endian))[0, :, 1].tolist() == [0, 1, 1, 100, 255]


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_values_without_a_white_are_refused_in_words(mode: str) -> None:
    picture = Image.new(mode, (4, 4))
    assert repr(mode) in refused(picture).message
    assert repr(mode) in refused(saved(picture, "TIFF")).message


def test_one_bit_palette_and_gray() -> None:
    bits = Image.fromarray(np.array([[True, False]]))
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        assert array(open_image(saved(bits, kind))).tolist() == [[[255] * 3, [0] * 3]]
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        flat = corners().quantize(4)
        assert np.array_equal(array(open_image(saved(flat, kind))), array(corners()))
    assert open_image(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)


def test_cmyk_and_ycck() -> None:
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for data in (saved(inks, "TIFF"), saved(inks, "JPEG", quality=95)):
        assert np.abs(np.array(open_image(data).getpixel((8, 8))) - [255, 0, 0]).max() <= 4
    # YCCK as Adobe writes it (technical note 5116): the inks taken for R, G, B become Y, Cb, Cr; K is stored inverted.
    # Pillow's writer inverts all four channels, and the Adobe segment's transform flag is set to 2 by hand.
    ycc = np.array(Image.new("RGB", (16, 16), (0, 255, 255)).convert("YCbCr"))
    stored = np.concatenate([ycc, np.full((16, 16, 1), 255, np.uint8)], -1)
    plain = saved(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=95, subsampling=0)
    at = plain.index(b"Adobe") + 11
    ycck = plain[:at] + b"\x02" + plain[at + 1 :]
    assert np.abs(np.array(open_image(ycck).getpixel((8, 8))) - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WebP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_seen(kind: str) -> None:
    others = [Image.new("RGB", (24, 16), c) for c in ("black", "white", "black")]
    lossless = {"lossless": True} if kind == "WebP" else {}
    data = saved(corners(), kind, save_all=True, append_images=others, **lossless)
    with Image.open(BytesIO(data)) as file:
        assert file.n_frames == 4
    assert np.array_equal(array(open_image(data)), array(corners()))


def test_a_picture_given_is_left_as_it_was() -> None:
    given = corners()
    given.getexif()[0x0112] = 6
    result = open_image(given)
    assert result.size == (16, 24)
    assert given.size == (24, 16)
    plain = corners()
    copy = open_image(plain)
    copy.putpixel((0, 0), (1, 2, 3))
    assert plain.getpixel((0, 0)) == (250, 0, 0)


# --- bad input -------------------------------------------------------------------------------------------------------

FOREIGN = {
    "FITS": (b"SIMPLE  =                    T", "FITS"),
    "PSD": (b"8BPS\0\1" + b"\0" * 30, "Photoshop"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40, "JPEG 2000"),
    "codestream": (b"\xff\x4f\xff\x51\0\x2f" + b"\0" * 40, "JPEG 2000"),
    "ICNS": (b"icns\0\0\1\0" + b"\0" * 40, "ICNS"),
    "ICO": (b"\0\0\1\0\1\0" + b"\0" * 40, "icon"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    "SVG": (b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "HTML": (b"<!DOCTYPE html><html></html>", "HTML"),
    "MP4": (b"\0\0\0\x18ftypisom" + b"\0" * 40, "video"),
    "ZIP": (b"PK\3\4" + b"\0" * 40, "archive"),
    "text": ("# Grüße, a text file\n".encode(), "text"),
    "noise": (bytes(range(256)), "nothing that pumice knows"),
    "PPM": (b"P6 1 1 255 abc", "text"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_refused_by_name_and_no_decoder_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a decoder ran")

    monkeypatch.setattr(Image, "open", never)
    monkeypatch.setattr(pumice.picture, "_DECODERS", dict.fromkeys(FORMATS, never))
    data, what = FOREIGN[name]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert what in refused(path).message
    assert str(path) in refused(path).message
    assert "JPEG" in refused(data).hint


def test_missing_empty_folder_pipe_and_device(tmp_path: Path) -> None:
    (tmp_path / "Holiday-01.jpg").write_bytes(b"")
    assert "Holiday-01.jpg" in refused(tmp_path / "holiday-01.jpg").hint
    assert "folder" in refused(str(tmp_path / "nowhere" / "a.jpg")).hint
    assert "0 bytes" in refused(tmp_path / "Holiday-01.jpg").message
    assert "0 bytes" in refused(b"").message
    assert "folder" in refused(tmp_path).message
    assert "device" in refused("/dev/zero").message
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refused(tmp_path / "pipe").message
    for text in ("", "a\0b", "x" * 5000, "https://example.org/a.jpg", "file:///a.jpg", "no/such\nfile"):
        refused(text)
    assert "downloads no" in refused("https://example.org/a.jpg").message
    assert "NoneType" in refused(None).message
    assert "ndarray" in refused(np.zeros((3, 3))).message


@pytest.mark.parametrize(
    "url",
    ["data:", "data:image/png;base64", "data:image/png;base64,###", "data:text/html;base64,QUJD", "data:image/png,abc"],
)
def test_bad_data_urls(url: str) -> None:
    assert "data: URL" in refused(url).message


def test_base64_of_something_else_is_a_missing_file() -> None:
    assert "no image" in refused(base64.b64encode(b"hello, this is text and no picture").decode()).message


def test_a_file_over_the_limit_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pumice.picture, "MAX_FILE_BYTES", 2**20)
    path = tmp_path / "large.png"
    path.write_bytes(saved(corners(), "PNG") + b"\0" * 2**21)
    assert "larger than 1 MiB" in refused(path).message
    assert "larger than 1 MiB" in refused(path.read_bytes()).message


def bombs() -> dict[str, bytes]:
    side = 65_535
    bmp = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    jpeg = bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", side, side)
    tiff = bytearray(saved(Image.new("L", (8, 8)), "TIFF"))
    with Image.open(BytesIO(tiff)) as file:
        start = struct.unpack("<I", tiff[4:8])[0]
        assert file.tag_v2[256] == 8
    for index in range(struct.unpack("<H", tiff[start : start + 2])[0]):
        entry = start + 2 + 12 * index
        if struct.unpack("<H", tiff[entry : entry + 2])[0] in (256, 257):
            tiff[entry : entry + 12] = tiff[entry : entry + 2] + struct.pack("<HII", 4, 1, side)
    gif = b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0)
    webp = b"RIFF" + struct.pack("<I", 60) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xfe\xff\0\xfe\xff\0"
    return {
        "PNG": png(side, side, (8, 2), b"\0" * 100),
        "PNG of 30 000": png(30_000, 30_000, (8, 0), b"\0" * 100),
        "BMP": bmp + b"\0" * 46,
        "JPEG": bytes(jpeg),
        "TIFF": bytes(tiff),
        "GIF": gif + b"\x08" + b"\0" * 60,
        "WebP": webp + b"\0" * 60,
        "TIFF tile": tiff_of_a_tile(32752, 65520),
    }


def tiff_of_a_tile(width: int, height: int) -> bytes:
    """A deflated gray TIFF of 100 x 100 pixels in one tile of this size."""
    tags = ((256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, width), (323, height))
    tags += ((324, 300), (325, 100))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)).ljust(400, b"\0")


@pytest.mark.parametrize("name", ["PNG", "PNG of 30 000", "BMP", "JPEG", "TIFF", "GIF", "WebP", "TIFF tile"])
def test_a_bomb_is_refused_before_anything_is_decoded(name: str) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(bombs()[name])
    assert (str(MAX_PIXELS) if name != "TIFF tile" else "tiles of 32752 x 65520") in error.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50_000


def test_conversions_in_strips_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    deep_YX = rng.integers(0, 65536, (600, 40), dtype=np.uint16)
    expected_YX = ((deep_YX.astype(np.int64) + 128) // 257).astype(np.uint8)
    assert (array(open_image(saved(Image.fromarray(deep_YX), "PNG")))[..., 0] == expected_YX).all()
    rgba_YXC = rng.integers(0, 256, (600, 40, 4), dtype=np.uint8)
    over_white = Image.new("RGB", (40, 600), "white")
    over_white.paste(Image.fromarray(rgba_YXC), (0, 0), Image.fromarray(rgba_YXC))
    assert (array(open_image(saved(Image.fromarray(rgba_YXC), "PNG"))) == array(over_white)).all()


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_a_conversion_needs_little_beside_its_result(mode: str) -> None:
    """4000 x 4000: the result takes 64 MB; whole copies on the way would take two to four times as much again."""
    code = f"""import resource
from PIL import Image
from pumice.picture import _over_white
picture = Image.new({mode!r}, (4000, 4000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_over_white(picture)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 90_000, "KiB"


def test_bytes_come_in_three_types(tmp_path: Path) -> None:
    data = saved(corners(), "PNG")
    for form in (bytearray(data), memoryview(data)):
        assert (array(open_image(form)) == array(open_image(data))).all()


@pytest.mark.parametrize("chunk", [b"iCCP", b"zTXt"])
def test_inflating_metadata_stays_small(chunk: bytes) -> None:
    data = png(2, 1, (8, 0), bytes([0, 7, 9]), (chunk, b"name\0\0" + zlib.compress(b"\0" * 2**28, 9)))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "unpacks to more than 1 MiB" in refused(data).message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100_000


def large_files() -> dict[str, Callable[[Image.Image], bytes]]:
    return {
        "JPEG": lambda p: saved(p, "JPEG", quality=90),
        "progressive JPEG": lambda p: saved(p, "JPEG", quality=90, progressive=True),
        "PNG": lambda p: saved(p, "PNG"),
        "WebP": lambda p: saved(p, "WEBP", quality=80),
        "lossless WebP": lambda p: saved(p, "WEBP", lossless=True),
        "GIF": lambda p: saved(p, "GIF"),
        "BMP": lambda p: saved(p, "BMP"),
        "TIFF": lambda p: saved(p, "TIFF"),
        "LZW TIFF": lambda p: saved(p, "TIFF", compression="tiff_lzw"),
        "AVIF": lambda p: saved(p, "AVIF"),
        "HEIC": heic,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", large_files())
def test_a_file_cut_short_is_refused_or_whole(name: str) -> None:
    """At every tenth: never half a picture. (Where only a trailer is missing, the whole picture is.)"""
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    rng = np.random.default_rng(0)
    data = large_files()[name](Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)))
    whole = array(open_image(data))
    for tenth in range(1, 10):
        with suppress(UserError):
            part = open_image(data[: len(data) * tenth // 10])
            assert np.array_equal(array(part), whole), tenth
            assert tenth == 9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", large_files())
def test_broken_bytes_never_raise_anything_but_a_user_error(name: str) -> None:
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    rng = np.random.default_rng(1)
    data = large_files()[name](corners().resize((48, 32)))
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        with suppress(UserError):
            assert open_image(bytes(broken)).mode == "RGB"


def test_a_broken_pil_image_is_refused_too() -> None:
    data = saved(Image.effect_noise((64, 64), 50), "PNG")
    assert "cut short" in refused(Image.open(BytesIO(data[: len(data) // 2]))).message
    refused(Image.new("RGB", (0, 5)))


def test_importing_changes_nothing_in_pillow() -> None:
    from PIL import ImageFile

    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_large_picture_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(saved(Image.new("1", (10_000, 9_500)), "PNG")).size == (10_000, 9_500)
