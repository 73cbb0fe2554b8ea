"""Decoding of images to grayscale, RGB or RGBA, with their EXIF orientation.

Imports no torch, so that command line tools start quickly.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from relay_diffusion.data.color import to_srgb
from relay_diffusion.errors import UserError
from relay_diffusion.utils.alpha import premultiplied, straight
from relay_diffusion.utils.messages import one_line
from relay_diffusion.utils.resolution import MAX_PIXELS

IMAGE_FORMATS = ("PNG", "WEBP", "JPEG")
OPENERS: dict[bytes, Callable[[BytesIO], ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"\xff\xd8\xff": JpegImageFile,
}
GRAY, ALPHA = "grayscale repeated to RGB", "alpha composited on white"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode of an 8-bit image by its channels
EXIF_APPLIED = "exif\n"  # part of the hash if EXIF is applied: pixels may then differ from those in the files
FULL_DEPTH = 16  # default bits of a 16-bit sample
UNUSED_BITS = 2  # 16-bit images with so many unused bits use a quarter of their range or less
ORIENTATION = 0x0112
SHORT, LONG = 3, 4  # TIFF types
APP1 = 0xE1  # JPEG marker of the segment that holds EXIF
END_OF_HEADERS = (b"", b"\xff", b"\xd9", b"\xda")  # after a 0xff: nothing, padding, end of image, start of scan
PREFIX = b"Exif\0\0"
TURNS = {  # orientation: operation that turns the pixels upright (EXIF 2.32, table 6)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = {TURNS[orientation] for orientation in (5, 6, 7, 8)}  # operations that swap height and width


WHITE = (255, 255, 255)


class UnusableImageError(UserError):
    """Image that cannot be used.

    reason: the same few words for all images of this kind, without their names.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Decoded(NamedTuple):
    """Decoded image and facts about its samples."""

    image: Image.Image  # 8-bit, without metadata
    turned: bool  # the EXIF orientation was applied
    exif_damaged: bool  # the EXIF block is damaged; the pixels are as stored
    bits: int  # bits of the brightest 16-bit sample, at least 8; 0 for an 8-bit image
    conversions: frozenset[str]  # of GRAY and ALPHA, made for the wanted channels
    profile_damaged: bool = False  # the ICC profile is unusable; the colors are as stored


def decode(
    data: bytes,
    where: str,
    apply_exif: bool = True,
    bit_depth: int = FULL_DEPTH,
    background: tuple[int, int, int] = WHITE,
    channels: int = 3,
    apply_profile: bool = False,
) -> Decoded:
    """Decode PNG, WebP or JPEG bytes to 8 bits.

    where: names the image in messages. The format is detected from the content. apply_exif: apply the EXIF orientation;
    a damaged block counts as none. bit_depth: bits that 16-bit samples use; their highest 8 are kept. channels: 1
    (grayscale; the luma of colors), 3 (RGB) or 4 (RGBA); without alpha channel, transparency is composited on
    `background` (RGB). apply_profile: convert colors to sRGB by the ICC profile, those of CMYK too; a damaged profile
    counts as none, and without this option no profile is used.
    Raises UnusableImageError for other formats, damage, animations, more than MAX_PIXELS pixels, and 16-bit
    samples above 2^bit_depth - 1.
    """
    data, exif = _hide_jpeg_exif(data)
    with _decoder_errors(where), _open(data, where) as image:
        deep = image.format == "PNG" and data[24] == FULL_DEPTH
        if image.format == "PNG":
            _check_png(data, image)
        image.load()
        block = exif or image.info.get("exif")
        profile = image.info.get("icc_profile") if apply_profile else None
        bits = _bits(image) if deep else 0
        pixels = _rescaled(data, image, bit_depth, where) if deep and bit_depth < FULL_DEPTH else image
        pixels, profile_damaged = _in_srgb(pixels, profile) if profile else (pixels, False)
        converted, conversions = with_channels(pixels, channels, background)
    converted.info.clear()  # a copy that is written must not repeat the applied orientation
    turn, damaged = _turn(block) if apply_exif else (None, False)
    upright = converted if turn is None else converted.transpose(turn)
    return Decoded(upright, turn is not None, damaged, bits, conversions, profile_damaged)


def header_size(data: bytes, where: str, apply_exif: bool = True) -> tuple[int, int]:
    """Read height and width of an image from its header.

    No pixel is decoded. apply_exif: of the upright image. An orientation behind the pixels of a PNG is not read. Raises
    UnusableImageError for other formats, animations, and more than MAX_PIXELS pixels.
    """
    data, exif = _hide_jpeg_exif(data)
    with _decoder_errors(where), _open(data, where) as image:
        turn, _ = _turn(exif or image.info.get("exif")) if apply_exif else (None, False)
        return (image.width, image.height) if turn in SWAPPING else (image.height, image.width)


@contextmanager
def _decoder_errors(where: str) -> Iterator[None]:
    """Turn errors of decoders into UnusableImageError naming the image."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        kind = "not a PNG, WebP or JPEG image"
        raise UnusableImageError(f"{where} is {kind}; save it as PNG or replace it", kind) from error
    except Exception as error:  # untrusted bytes: decoders raise many exception types
        raise UnusableImageError(f"{where} cannot be decoded: {one_line(error)}; replace it", "damaged") from error


def dark_warning(what: str, bits: int, bit_depth: int, where: str = "") -> str:
    """Return the warning that 16-bit images use few of their bits.

    where: the command that has the option bit_depth.
    """
    return (
        f"warning: {what} with values below {2**bits:,} of {2**bit_depth:,} become dark; {where}bit_depth={bits} "
        "rescales them"
    )


def decode_rgb(data: bytes, where: str) -> Image.Image:
    """Decode an image with the default options of `decode`."""
    return decode(data, where).image


def _turn(exif: object) -> tuple[Image.Transpose | None, bool]:
    """Return the transposition to upright pixels, and whether the EXIF is damaged."""
    try:
        # a compressed text chunk of a PNG may have the key exif too
        return TURNS.get(_orientation(exif)) if exif and isinstance(exif, bytes) else None, False
    except ValueError:
        return None, True


def _orientation(block: bytes) -> int:
    """Read the orientation 1..8 of an EXIF block; 1 if missing.

    Raises ValueError for a damaged block. Pillow's reader warns of damaged blocks through process-wide filters, which
    are not thread-safe.
    """
    tiff = block.removeprefix(PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError("no TIFF header")
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == ORIENTATION:
                if kind not in (SHORT, LONG) or count != 1:
                    raise ValueError("the orientation is not a number")
                (value,) = struct.unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", tiff, at + 8)
                return value if value in TURNS else 1
    except struct.error as error:
        raise ValueError("cut short") from error
    return 1


def _hide_jpeg_exif(data: bytes) -> tuple[bytes, bytes]:
    """Rename a JPEG's EXIF segments; return the first EXIF block too.

    Other bytes are returned unchanged.
    """
    renamed, block, at = bytearray(), b"", 2
    while data.startswith(b"\xff\xd8") and data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in END_OF_HEADERS:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == APP1 and data.startswith(PREFIX, at + 4, end):
            block, renamed = block or data[at + 4 : end], renamed or bytearray(data)
            renamed[at + 4 : at + 8] = b"none"  # Pillow would read the block, and warn of damage
        at = end
    return bytes(renamed or data), block


def _bits(image: Image.Image) -> int:
    """Return the bits that a 16-bit PNG's brightest sample needs.

    At least 8; alpha is ignored.
    """
    if image.mode.startswith("I"):
        return max(8, int(np.asarray(image).max()).bit_length())
    return 8 + int(np.asarray(image.convert("RGB")).max()).bit_length()  # Pillow keeps the high bytes of color


def _rescaled(data: bytes, image: Image.Image, bit_depth: int, where: str) -> Image.Image:
    """Keep the highest 8 of `bit_depth` bits of a 16-bit PNG.

    Raises UserError for an alpha channel and for larger samples.
    """
    if image.mode == "RGB":
        with Image.open(BytesIO(data), formats=("PNG",)) as low:
            # In mode "RGB;16B" Pillow keeps the first byte of each sample; read as little-endian, the second.
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            samples = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    elif image.mode.startswith("I"):
        samples = np.asarray(image)
    else:
        kind = f"16 bits and an alpha channel, which bit_depth={bit_depth} does not rescale"
        raise UnusableImageError(f"{where} has {kind}", kind)
    most = 2**bit_depth - 1
    if samples.max() > most:
        raise UnusableImageError(
            f"{where} holds the value {samples.max()}, but bit_depth={bit_depth} allows {most} at most",
            f"values above {most}, the largest of bit_depth={bit_depth}",
        )
    return Image.fromarray((samples >> (bit_depth - 8)).astype(np.uint8))


def _open(data: bytes, where: str) -> ImageFile:
    """Read the header of an image.

    Raises UnusableImageError for an animation, and for more than MAX_PIXELS pixels. Image.open only warns between once
    and twice the limit, and warning filters are process-wide.
    """
    opener = next((opener for start, opener in OPENERS.items() if data.startswith(start)), None)
    try:
        image = opener(BytesIO(data)) if opener is not None else None
    except (SyntaxError, IndexError, TypeError, struct.error):  # Pillow's plugins raise these for other formats
        image = None
    if image is None:
        raise UnidentifiedImageError
    if image.width * image.height > MAX_PIXELS:
        kind = f"more than {MAX_PIXELS:,} pixels"
        raise UnusableImageError(f"{where} claims {kind}, too large or a decompression bomb; crop or shrink it", kind)
    if getattr(image, "is_animated", False):
        raise UnusableImageError(f"{where} is an animation; save the wanted frame as PNG", "animated")
    return image


def _check_png(data: bytes, image: Image.Image) -> None:
    """Raise ValueError for a PNG that Pillow would misread."""
    if data[24] == 16 and "transparency" in image.info:  # Pillow would compare the color with 8-bit samples
        raise ValueError("a transparent color of 16 bits is not supported; save it with 8 bits or an alpha channel")
    content, at, kind = memoryview(data), 8, b""
    while kind != b"IEND":  # Pillow does not verify the checksums of pixel data
        end = at + 8 + int.from_bytes(content[at : at + 4])
        kind = bytes(content[at + 4 : at + 8])
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4]) or end + 4 > len(data):
            raise ValueError("it is cut short, or a checksum is wrong")
        at = end + 4


def _in_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """Convert an image to sRGB, if its profile fits.

    Returns the image, and whether the profile does not fit.
    """
    try:
        return to_srgb(_eight_bits(image), profile), False
    except ValueError:
        return image, True


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit gray.

    Pillow does so for 16-bit colors, but clips gray to 255.
    """
    if not image.mode.startswith("I"):
        return image
    high_byte = np.asarray(image).astype(np.uint32) >> 8
    return Image.fromarray(high_byte.astype(np.uint8))


def with_channels(
    image: Image.Image, channels: int, background: tuple[int, int, int] = WHITE
) -> tuple[Image.Image, frozenset[str]]:
    """Convert an image to 8 bits and the given channels.

    channels: 1 (grayscale; the luma of colors), 3 (RGB) or 4 (RGBA). Without alpha channel, transparency is composited
    on `background` (RGB). Returns the image, and which of the conversions GRAY and ALPHA were made.
    """
    conversions = {GRAY} if channels > 1 and image.mode.startswith(("1", "L", "I")) else set()
    image = _eight_bits(image)
    if image.has_transparency_data and channels != 4:
        opaque = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
        conversions.add(ALPHA)
    return image.convert(MODES[channels]), frozenset(conversions)


def box_average(image: Image.Image, factor: int) -> Image.Image:
    """Average every factor x factor block, as `block_means`.

    Of premultiplied colors, so that transparent pixels have no weight; the result has straight colors again.
    """
    if factor == 1:
        return image
    return Image.fromarray(straight(block_means(premultiplied(np.asarray(image)), factor)))


def block_means(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Average every factor x factor block of pixels [H,W] or [H,W,C].

    Colors of RGBA must be premultiplied. uint8 is rounded to the nearest integer (halves up); floats lie in [-1, 1].
    H and W must be divisible by factor.
    """
    if factor == 1:
        return pixels
    if pixels.dtype != np.uint8:
        height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
        blocks = pixels.reshape(height, factor, width, factor, *pixels.shape[2:])
        means: np.ndarray = blocks.mean((1, 3)).clip(-1, 1)
        return means
    sums, area = _block_sums(pixels, factor), factor * factor
    return ((sums + area // 2) // area).astype(np.uint8)


def _block_sums(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Sum every factor x factor block of uint8.

    By strided slices, because Pillow's reduce is off by one for some factors that are not powers of two.
    """
    rows: np.ndarray = pixels[::factor].astype(np.uint32)
    for start in range(1, factor):
        rows += pixels[start::factor]
    blocks = rows[:, ::factor].copy()
    for start in range(1, factor):
        blocks += rows[:, start::factor]
    return blocks
