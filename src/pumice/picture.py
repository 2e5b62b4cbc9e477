"""A picture from anywhere to upright 8-bit RGB, as a person sees it; everything else is refused in words.

What a file is, its first bytes say; how large it is, its header; both are asked before a decoder touches the pixels.
"""

from __future__ import annotations

import base64
import difflib
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pumice.config import Size
from pumice.errors import UserError, shortened

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image
"""A path, the bytes of a file, a Pillow image, or text: a `data:image/...;base64,` URL, or bare base64 where no file
has that name and the bytes begin like a picture."""

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 178_956_970
"""Of a picture as its file declares it, and of every picture on the way to the tiles. Above this number Pillow, too,
calls a file a bomb; a picture of this size takes 0.7 GB in memory, and as much again while it is decoded."""
MAX_TIFF_TILE_PIXELS = 2**22
"""Of a TIFF's tile that is larger than its picture: libtiff makes room for a tile of any declared size."""
STRIP_ROWS = 256
"""Rows that are converted at once, so that what a conversion needs beside its result stays small."""

_DECODERS: dict[str, Callable[[BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
"""The only decoders that can run, called by name: Image.open would try those that other packages register."""

_READ = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM....\0\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb"....ftyp(avi[fs]|m[is]f1.{4,60}?avif)",
    "HEIC": rb"....ftyp(he[iv][cxms]|mif1|msf1)",
}
_REFUSED = {
    "a FITS file": rb"SIMPLE  =",
    "a Photoshop document": rb"8BPS",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "a PDF document": rb"%PDF",
    "a JPEG 2000 picture": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "a JPEG XL picture": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "an ICNS icon": rb"icns",
    "a Windows icon": rb"\0\0[\1\2]\0",
    "a video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
    "an archive": rb"PK\x03\x04|\x1f\x8b|BZh|7z\xbc\xaf|\xfd7zXZ",
    "an SVG drawing": rb"\s*(<\?xml.*?)?(<!.*?)?<svg",
    "an HTML page": rb"(?i)\s*(<!doctype html|<html)",
    "text": rb"[^\x00-\x08\x0e-\x1f]+\Z",
}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the picture upright (EXIF 2.32, tag 0x0112). Any other value leaves it as it is."""
_ORIENTATION_TAG = 0x0112

# What Pillow's and libheif's decoders raise on broken files: each of these was seen or stands in their source.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError),
    *(AttributeError, AssertionError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Warning),
)


def open_image(source: ImageLike) -> Image.Image:
    """The picture as a person sees it: first frame, upright by EXIF, transparency over white, 8-bit RGB.

    Colour profiles are not applied, as in the references. Raises UserError for what is missing, is no picture, is
    damaged, or exceeds MAX_FILE_BYTES or MAX_PIXELS; the latter before anything is decoded.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, "the image", source.format or "Pillow")
    data, name = _read(source)
    kind = _kind(data, name)
    try:
        picture = _heic(data) if kind == "HEIC" else _DECODERS[kind](BytesIO(data))
        if isinstance(picture, PngImagePlugin.PngImageFile):
            _rescale_colour_key(picture)
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            _check_tiff_tile(picture, name)
    except _DECODER_ERRORS as error:
        raise _damaged(name, kind, error) from error
    return _decoded(picture, name, kind)


def _decoded(picture: Image.Image, name: str, kind: str) -> Image.Image:
    _check_size((picture.height, picture.width), name)
    try:
        picture.load()
        turn = _turn(picture)
        flat = _over_white(picture)
        upright = flat if turn is None else flat.transpose(turn)
    except _DECODER_ERRORS as error:
        raise _damaged(name, kind, error) from error
    upright.info = {}  # Pillow copies the EXIF block along: given to us again, the picture would be turned again
    return upright


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What makes a loaded picture upright. Asked after loading: Pillow turns a TIFF while it loads it, and says so."""
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG)
    except _DECODER_ERRORS:  # viewers show a picture whose EXIF block is damaged, as it lies
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _over_white(picture: Image.Image) -> Image.Image:
    """8-bit RGB from any mode that says what black and white are; what is transparent becomes white."""
    if picture.mode in ("I", "F", "LAB"):
        raise UserError(
            f"the picture has values of the kind {picture.mode!r} (32-bit or CIELAB), which do not say what is white",
            hint="convert it to 8 or 16 bits a channel first",
        )
    deep = picture.mode.startswith("I;16")
    if not deep and not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    for top in range(0, picture.height, STRIP_ROWS):
        strip = picture.crop((0, top, picture.width, min(top + STRIP_ROWS, picture.height)))
        if deep:
            white.paste(_eight_bits(strip, picture.info.get("transparency")), (0, top))
        else:
            rgba = strip.convert("RGBA")
            white.paste(rgba, (0, top), rgba)
    return white


def _eight_bits(gray: Image.Image, transparent: int | None) -> Image.Image:
    """8-bit gray from 16-bit gray, the transparent level white."""
    levels_YX = np.asarray(gray).astype(np.uint32)
    gray_YX = ((levels_YX + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257
    if transparent is not None:
        gray_YX[levels_YX == transparent] = 255
    return Image.fromarray(gray_YX)


def _rescale_colour_key(picture: PngImagePlugin.PngImageFile) -> None:
    """Pillow widens 2- and 4-bit gray to 8 bits and cuts 16-bit RGB to 8, but leaves the transparent colour (tRNS, PNG
    specification 11.3.1.1) in the file's own levels, where it would match nothing or something else."""
    key = picture.info.get("transparency")
    raw_mode = picture.tile[0].args if picture.tile else None
    if raw_mode == "RGB;16B" and key is not None:
        picture.info["transparency"] = tuple(level >> 8 for level in key)
    elif raw_mode in ("L;2", "L;4") and key is not None:
        picture.info["transparency"] = key * (85 if raw_mode == "L;2" else 17)


def _check_tiff_tile(picture: TiffImagePlugin.TiffImageFile, name: str) -> None:
    """TIFF 6.0, section 15: TileWidth and TileLength, which may exceed the picture."""
    width, height = (picture.tag_v2.get(tag) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    if not isinstance(width, int) or not isinstance(height, int):
        return
    if width * height > max(2 * picture.width * picture.height, MAX_TIFF_TILE_PIXELS):
        raise UserError(
            f"{name} says that it is {picture.width} x {picture.height} pixels in tiles of {width} x {height}",
            hint="the file is damaged; export it anew",
        )


def _heic(data: bytes) -> Image.Image:
    """Decoded by libheif, which turns the picture as its `irot` and `imir` boxes say; the EXIF orientation that phones
    write beside them repeats it and is left behind (HEIF, ISO/IEC 23008-12, 6.5.10)."""
    try:
        import pillow_heif
    except ImportError:
        raise UserError(
            "the image is a HEIC picture, and the package that decodes those is not installed",
            hint="pip install 'pumice[heic]'",
        ) from None
    file = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
    _check_size((file.size[1], file.size[0]), "the image")
    pixels: bytes = file.data
    return Image.frombytes(file.mode, file.size, pixels, "raw", file.mode, file.stride)


# --- where the bytes come from, and what they are -------------------------------------------------------------------


def _read(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> tuple[bytes, str]:
    """The bytes of the file, and what to call it in an error."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _checked(bytes(source), "the image"), "the image"
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"an image cannot be a {type(source).__name__}",
            hint="give a path, the bytes of a file, a PIL image, base64 or a data: URL",
        )
    text = os.fsdecode(source)
    if text.startswith("data:"):
        return _checked(_from_data_url(text), "the image in the data: URL"), "the image in the data: URL"
    status = _status(text)
    if status is None:
        data = _from_base64(text)
        if data is None:
            raise _missing(text)
        return data, "the image in the base64 text"
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise UserError(f"{text} is {what}; an image is a file", hint="name a file in it, or save the picture to one")
    try:
        with open(text, "rb") as file:
            return _checked(file.read(MAX_FILE_BYTES + 1), text), text
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error.strerror}", hint="check who may read the file") from error


def _status(path: str) -> os.stat_result | None:
    """None where no file can have this name."""
    try:
        return os.stat(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be reached: {error.strerror}", hint="check who may enter its folder") from error
    except (OSError, ValueError):
        return None


def _from_data_url(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if re.fullmatch(r"data:image/[\w.+-]+(;[\w=.-]+)*;base64", head) and comma:
        data = _base64(body)
        if data is not None:
            return data
    raise UserError(
        f"{shortened(head)} is not a data: URL with a picture in base64",
        hint="it must read data:image/png;base64, or the like, and then only base64",
    )


def _from_base64(text: str) -> bytes | None:
    """The bytes behind bare base64, if they begin like something that pumice reads."""
    data = _base64(text)
    return data if data is not None and _matching(data, _READ) else None


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def _checked(data: bytes, name: str) -> bytes:
    if not data:
        raise UserError(f"{name} is empty: 0 bytes", hint="copy or download it again")
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB", hint="shrink the picture first")
    return data


def _kind(data: bytes, name: str) -> str:
    """The format by its first bytes, never by its name. Only these decoders exist for us (see _DECODERS)."""
    kind = _matching(data, _READ)
    if kind is not None:
        return kind
    found = _matching(data, _REFUSED) or "nothing that pumice knows"
    raise UserError(
        f"{name} is not a picture that pumice reads: by its first bytes it is {found}",
        hint=f"pumice reads {', '.join(_READ)}; export or convert it to one of these",
    )


def _matching(data: bytes, patterns: dict[str, bytes]) -> str | None:
    head = data[:512]
    return next((kind for kind, pattern in patterns.items() if re.match(pattern, head, re.DOTALL)), None)


def _check_size(size: Size, name: str) -> None:
    height, width = size
    if not 0 < height * width <= MAX_PIXELS:
        raise UserError(
            f"{name} says that it is {width} x {height} pixels; pumice takes 1 to {MAX_PIXELS} pixels",
            hint="shrink the picture first",
        )


def _damaged(name: str, kind: str, error: BaseException) -> UserError:
    """In our words: Pillow's may hold memory addresses (CVE-2026-22778)."""
    if isinstance(error, MemoryError):
        return UserError(f"there is not enough memory to decode {name}", hint="shrink the picture first")
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name} says that it has more than {MAX_PIXELS} pixels", hint="shrink the picture first")
    if "data too large" in str(error):
        return UserError(
            f"{name} unpacks to more than 1 MiB of notes or colour profile", hint="save it without metadata"
        )
    what = "is cut short" if "truncated" in str(error) else "is damaged, or uses a variant that cannot be decoded"
    return UserError(f"{name} begins as {kind} but {what}", hint="copy or download it again, or export it anew")


def _missing(text: str) -> UserError:
    if re.match(r"\w+://", text):
        return UserError(
            f"{shortened(text)} is a URL, and pumice downloads no images", hint="save it, then give its path"
        )
    path = Path(text)
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except (OSError, ValueError):
        return UserError(
            f"there is no image {shortened(text)}", hint="its folder does not exist either; check the path"
        )
    hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path and the folder you are in"
    return UserError(f"there is no image {shortened(text)}", hint=hint)
