"""Bytes of pictures from the list of attacks, F, beside those of test_picture.py."""

from __future__ import annotations

import resource
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from pumice.config import ImageConfig, VisionConfig
from pumice.image import prepare
from pumice.picture import open_image

RED = (255, 0, 0)


def saved(kind: str) -> bytes:
    out = BytesIO()
    Image.new("RGB", (4, 2), RED).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def gif(frames: int) -> bytes:
    whole = saved("GIF")
    at = whole.index(b"\x2c")
    return whole[:at] + whole[at:-1] * frames + whole[-1:]


def apng(frames: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(b"\0" + bytes(RED) * 4 + b"\0" + bytes(RED) * 4)
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 8, 2, 0, 0, 0)),
        chunk(b"acTL", struct.pack(">II", frames, 0)),
    ]
    for number in range(frames):
        control = struct.pack(">IIIIIHHBB", max(2 * number - 1, 0), 4, 2, 0, 0, 1, 10, 0, 0)
        parts.append(chunk(b"fcTL", control))
        parts.append(chunk(b"fdAT", struct.pack(">I", 2 * number) + pixels) if number else chunk(b"IDAT", pixels))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def webp(frames: int) -> bytes:
    still = saved("WEBP")[12:]
    frame = b"\0" * 6 + b"\x03\0\0" + b"\x01\0\0" + b"\x0a\0\0\0" + still
    parts = b"VP8X" + struct.pack("<IB9s", 10, 2, b"\0\0\0\x03\0\0\x01\0\0")
    parts += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + (b"ANMF" + struct.pack("<I", len(frame)) + frame) * frames
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts


def tiff(pages: int) -> bytes:
    tags = ((256, 4), (257, 2), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 8))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    size = 2 + len(entries) + 4
    body = b"".join(
        struct.pack("<H", len(tags)) + entries + struct.pack("<I", 16 + (page + 1) * size if page + 1 < pages else 0)
        for page in range(pages)
    )
    return b"II*\0" + struct.pack("<I", 16) + b"\x80" * 8 + body


@pytest.mark.parametrize(("make", "count"), [(gif, 100_000), (apng, 100_000), (webp, 100_000), (tiff, 10_000)])
def test_f_many_frames_and_pages(make: object, count: int) -> None:
    """F: of 10^5 frames and 10^4 pages the first is seen, and the others cost nothing."""
    assert callable(make)
    few, many = make(3), make(count)
    with Image.open(BytesIO(few)) as file:
        assert file.n_frames == 3  # the files are what they should be
    before_kib, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    picture = open_image(many)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100_000
    assert picture.size == (4, 2)
    assert picture.tobytes() == open_image(few).tobytes()


def test_f_one_pixel() -> None:
    """F, CVE-2026-22773: 1 x 1 is a picture like any other."""
    vision = VisionConfig(image_px=336, patch_px=14, width=64, layers=2, heads=4, ffn_width=128)
    half = (0.5, 0.5, 0.5)
    prepared = prepare(Image.new("RGB", (1, 1), RED), ImageConfig("pad", 336, 336, half, half), vision)
    assert prepared.pixels.shape[2:] == (336, 336)
    assert prepared.grid.tokens == 576


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "BMP"])
def test_f_a_name_that_lies(kind: str, tmp_path: Path) -> None:
    """F: what a file is, its first bytes say."""
    (tmp_path / "photo.jpg").write_bytes(saved(kind))
    assert open_image(tmp_path / "photo.jpg").getpixel((0, 0)) == RED


def test_f_jpeg_and_html_in_one() -> None:
    """F: it is the picture, and nothing of the page is kept."""
    picture = open_image(saved("JPEG") + b"<script>alert(1)</script>")
    assert picture.size == (4, 2)
    assert not picture.info
