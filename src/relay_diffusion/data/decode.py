"""How image bytes become RGB pixels. Free of torch, so that the command line tools start quickly."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from relay_diffusion.errors import UserError

IMAGE_FORMATS = ("PNG", "WEBP", "JPEG")
OPENERS: dict[bytes, Callable[[BytesIO], ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"\xff\xd8\xff": JpegImageFile,
}


def decode_rgb(data: bytes, where: str) -> Image.Image:
    """Decode PNG, WebP or JPEG bytes to 8-bit RGB; `where` names the image in messages.

    The content tells the format, not the name. Transparency is composited on white, 16-bit samples keep their high
    byte, an animation gives its first frame, CMYK is converted without its profile, EXIF orientation is ignored (as in
    the field's data sets). Errors: UserError for anything else, damage, and more than Image.MAX_IMAGE_PIXELS pixels.
    """
    try:
        with _open(data, where) as image:
            if image.format == "PNG":
                _check_png(data, image)
            image.load()
            return _rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{where} is not a {', '.join(IMAGE_FORMATS)} image") from error
    except Exception as error:  # foreign bytes: decoders raise many types, and all mean this to the user
        raise UserError(f"{where} cannot be decoded: {' '.join(str(error).split())}") from error


def _open(data: bytes, where: str) -> ImageFile:
    """Read the header of an image. Raises UserError if it has more pixels than Pillow's limit.

    Image.open only warns between once and twice the limit, and filters of warnings belong to the whole process.
    """
    opener = next((opener for start, opener in OPENERS.items() if data.startswith(start)), None)
    try:
        image = opener(BytesIO(data)) if opener is not None else None
    except (SyntaxError, IndexError, TypeError, struct.error):  # how plugins say that it is not theirs
        image = None
    if image is None:
        raise UnidentifiedImageError
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise UserError(f"{where} claims more than {most:,} pixels: a decompression bomb, or too large")
    return image


def _check_png(data: bytes, image: Image.Image) -> None:
    """Raise ValueError for a PNG that Pillow would read otherwise than it was written."""
    if data[24] == 16 and "transparency" in image.info:  # Pillow compares the colour with 8-bit samples
        raise ValueError("a transparent colour of 16 bits is not read; save it with 8 bits or an alpha channel")
    content, at, kind = memoryview(data), 8, b""
    while kind != b"IEND":  # checksums: Pillow leaves out those of the pixels
        end = at + 8 + int.from_bytes(content[at : at + 4])
        kind = bytes(content[at + 4 : at + 8])
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4]) or end + 4 > len(data):
            raise ValueError("it is cut short, or a checksum is wrong")
        at = end + 4


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 on conversion, but takes the high byte of 16-bit colour: do that here too.
        high_byte = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def box_average(image: Image.Image, factor: int) -> Image.Image:
    """Mean of every factor x factor block, rounded to the nearest integer (halves up); sides divisible by factor."""
    if factor == 1:
        return image
    pixels = np.asarray(image)
    # Sums of strided slices, not Pillow's reduce: that is off by one for some factors that are no power of two.
    rows = pixels[::factor].astype(np.uint32)
    for start in range(1, factor):
        rows += pixels[start::factor]
    blocks = rows[:, ::factor].copy()
    for start in range(1, factor):
        blocks += rows[:, start::factor]
    area = factor * factor
    return Image.fromarray(((blocks + area // 2) // area).astype(np.uint8))
