"""Image bytes to square RGB pixels, or the reason why not. The same function serves preparation and prediction."""

import functools
import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from cifar.config import Resize

MAX_PIXELS = 89_478_485
"""Larger images are refused before their pixels are decoded: Pillow's default limit, here an error."""
MAX_BYTES = 256 << 20
"""Larger files are refused before they are read."""

EMPTY = "empty file"
NOT_AN_IMAGE = "not an image"
DAMAGED = "truncated or damaged"
TOO_LARGE = "decompression bomb"
FILE_TOO_LARGE = "file too large"

MOST_SCANS = 100
"""Of a progressive JPEG; encoders write about 10. Each is a pass over all pixels for a few bytes of the file."""

_BACKGROUND = "white"
_COMMON = ("PNG", "JPEG", "GIF", "BMP", "PPM")
_OTHER = ("TIFF", "WEBP", "AVIF", "JPEG2000")
_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF and a value."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_SIGNATURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|P[1-6]\s|II\*\0|MM\0\*"
    rb"|RIFF.{4}WEBP|\0\0\0\x0cjP  |.{4}ftypavif",
    re.DOTALL,
)


class BadImage(ValueError):
    """Bytes that are no usable image; the message is one of a few stable reasons."""


class Decoded(NamedTuple):
    pixels: bytes
    """S*S*3 bytes, row-major RGB."""
    size: tuple[int, int]
    """Width and height as stored, before orientation."""
    mode: str
    """Pillow's name of the pixel format as stored, such as RGB, L or I;16."""


def decode(data: bytes, image_size: int, resize: Resize) -> np.ndarray:
    """uint8 (S,S,3) RGB of an encoded image; BadImage with the reason if there is none.

    EXIF orientation is applied. Transparency is composited on white. 16-bit grey is scaled by the range of its format,
    v / 257 rounded, whatever of it an image uses. Of an animation the first frame is taken. Other shapes are resized
    bicubically with antialiasing: `crop` scales the short side and keeps the centre, `pad` scales the long side and
    centres the image on black, `stretch` ignores the aspect.
    """
    return (
        np.frombuffer(decode_row(data, image_size, resize).pixels, np.uint8).reshape(image_size, image_size, 3).copy()
    )


def fit_square(pixels: np.ndarray, image_size: int, resize: Resize) -> np.ndarray:
    """uint8 (S,S,3) of decoded RGB pixels, uint8 (H,W,3), resized as `decode` does."""
    return np.asarray(_to_square(Image.fromarray(pixels, "RGB"), image_size, resize))


def decode_whole(data: bytes) -> np.ndarray:
    """uint8 (H,W,3) RGB as `decode` gives it, but of the whole image in its own size."""
    image = _open(data)
    with _damage():
        image.load()
        return np.asarray(_to_rgb(_upright(image)))


def pixels_to_decode(data: bytes, image_size: int) -> int:
    """Pixels that `decode` will hold, from the header alone; 0 for what it will refuse at once.

    Fewer than the image has for a JPEG that is decoded at a fraction of its size; all of them if its scans have to be
    put together first. Memory is up to 20 bytes for each, time on a core up to 50 ns.
    """
    # The header of a PNG by hand takes a twentieth of the time. Of two headers Pillow would take the last.
    if data.startswith(_PNG) and 24 <= len(data) < 1 << 16 and data.count(b"IHDR") == 1:
        width, height = struct.unpack(">II", data[16:24])
        return max(width, 2) * max(height, 2) if width * height <= MAX_PIXELS else 0
    try:
        image = _open(data)
    except BadImage:
        return 0
    width, height = image.size
    if image.format in ("JPEG", "MPO") and not _needs_all(image, data):
        image.draft(image.mode, (2 * image_size, 2 * image_size))
        width, height = image.size
    # The filter of a resize has weights for the long side, however short the other is.
    return max(width, 2) * max(height, 2)


def decode_row(data: bytes, image_size: int, resize: Resize) -> Decoded:
    """`decode` with what the data report says about the original."""
    image = _open(data)
    size, mode = image.size, image.mode
    # JPEG can decode at 1/2, 1/4 or 1/8 for a fraction of the time; twice the target keeps the resize honest.
    with _damage():
        image.draft(mode, (2 * image_size, 2 * image_size))
        image.load()
        pixels = _to_square(_to_rgb(_upright(image)), image_size, resize).tobytes()
    return Decoded(pixels, size, mode)


@contextmanager
def _damage() -> Iterator[None]:
    """What goes wrong with pixels, as a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage(TOO_LARGE) from error
    except Exception as error:  # a damaged file can raise anything from a codec
        raise BadImage(DAMAGED) from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage(EMPTY)
    if len(data) > MAX_BYTES:
        raise BadImage(FILE_TOO_LARGE)
    image = _identify(data, _COMMON) or _identify(data, _other_formats())
    if image is None:
        raise BadImage(DAMAGED if _SIGNATURE.match(data) else NOT_AN_IMAGE)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(TOO_LARGE)
    if "progressive" in image.info and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadImage(TOO_LARGE)
    return image


def _needs_all(image: Any, data: bytes) -> bool:
    """Does a JPEG come in several scans, of which each has a part of every pixel?"""
    if image.format == "MPO":  # several JPEGs one after the other, of which the first is read
        image = JpegImageFile(io.BytesIO(data))
    # Pillow stops behind the header of the first scan, which names the components in it.
    count, end = image.layers, image.fp.tell()
    first = bytes([0, 6 + 2 * count, count])
    return "progressive" in image.info or data[end - 6 - 2 * count : end - 3 - 2 * count] != first


def _identify(data: bytes, formats: tuple[str, ...]) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage(TOO_LARGE) from error
    except Exception:  # UnidentifiedImageError, or a header that a plug-in chokes on
        return None


@functools.cache
def _other_formats() -> tuple[str, ...]:
    """Formats behind Image.init(), which costs 60 ms. The rest of Pillow's formats stay shut: EPS runs Ghostscript."""
    Image.init()
    return tuple(name for name in _OTHER if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Not by ImageOps.exif_transpose, which writes all tags anew and fails on odd ones."""
    # Reading EXIF costs a third of decoding a small PNG, so not for files without any metadata. Pillow turns TIFF.
    if not image.info:
        return image
    try:
        tag: Any = image.getexif().get(_ORIENTATION)
        turn = _TURNS.get(tag)
    except Exception:  # metadata that cannot be read spoils no pixels
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, _BACKGROUND)
            return Image.alpha_composite(background, image).convert("RGB")
        if image.mode != "F":
            return image.convert("RGB")
    except ValueError:
        pass
    raise BadImage(f"unsupported pixel format {image.mode}")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255. Mode I holds 16-bit values too when they come from PGM; those of a TIFF are
    as they are stored, be they 12 bits or count from white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("unsupported pixel format, 32-bit integers")
    tags = getattr(image, "tag_v2", {})
    most = 4095 if tags.get(_BITS) == (12,) else 65535
    grey = ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):  # the value that is transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _to_square(image: Image.Image, side: int, resize: Resize) -> Image.Image:
    width, height = image.size
    if (width, height) == (side, side):
        return image
    if resize == "stretch":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    if resize == "crop":
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        return image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + short, top + short))
    scale = side / max(width, height)
    fitted = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return square
