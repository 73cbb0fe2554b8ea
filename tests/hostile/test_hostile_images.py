"""Unusual and damaged images, handled alike by every reader (docs/robustness.md)."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures_on_disk import encoded, write_folder, write_tar, write_zip
from relay_diffusion.data.convert import Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.decode import decode_rgb
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.errors import UserError

SIDE = 8
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(color: int, samples: list[int], depth: int = 16, side: int = SIDE, *extra: bytes) -> bytes:
    """Build a PNG of one color with this color type and depth in its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0))
    row = b"\0" + np.array(samples * SIDE, ">u2" if depth == 16 else "u1").tobytes()
    return b"".join([SIGNATURE, header, *extra, chunk(b"IDAT", zlib.compress(row * SIDE)), chunk(b"IEND", b"")])


def plain(color: tuple[int, ...] | int, mode: str = "RGB", kind: str = "PNG", **options: object) -> bytes:
    return encoded(Image.new(mode, (SIDE, SIDE), color), kind, **options)


def frames(kind: str) -> bytes:
    pictures = [Image.new("RGB", (SIDE, SIDE), (value, 0, 0)) for value in (200, 100)]
    return encoded(
        pictures[0], kind, save_all=True, append_images=pictures[1:], **({} if kind == "GIF" else {"lossless": True})
    )


def palette(**options: object) -> bytes:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return encoded(image, **options)


def rotated(kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise brings it upright: the bottom left comes to the top left
    image = Image.new("RGB", (SIDE, SIDE))
    image.putpixel((0, SIDE - 1), (255, 255, 255))
    return encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


READ = {  # what is given: the color of its first pixel
    "gray": (plain(77, "L"), (77, 77, 77)),
    "1-bit": (plain(1, "1"), (255, 255, 255)),
    "gray and alpha": (plain((0, 51), "LA"), (204, 204, 204)),
    "RGBA": (plain((255, 0, 0, 51), "RGBA"), (255, 204, 204)),
    "RGBA WebP": (plain((255, 0, 0, 51), "RGBA", "WEBP", lossless=True), (255, 204, 204)),
    "palette": (palette(), (40, 50, 60)),
    "palette with transparency": (palette(transparency=b"\xff\x00"), (255, 255, 255)),
    "transparent color": (plain((1, 2, 3), transparency=(1, 2, 3)), (255, 255, 255)),
    "16-bit gray": (png(0, [0x4D12]), (0x4D, 0x4D, 0x4D)),
    "16-bit RGB": (png(2, [0x4D12, 0x10FF, 0x00FF]), (0x4D, 0x10, 0x00)),
    "16-bit gray and alpha": (png(4, [0x4D12, 0xFFFF]), (0x4D, 0x4D, 0x4D)),
    "16-bit RGBA": (png(6, [0x4D12, 0x10FF, 0x00FF, 0xFFFF]), (0x4D, 0x10, 0x00)),
    "PNG with EXIF rotation": (rotated(), (255, 255, 255)),
    "WebP with EXIF rotation": (rotated("WEBP"), (255, 255, 255)),
}
REFUSED = {
    "no bytes": (b"", "is not a PNG"),
    "text": (b"hello, I am no image\n" * 9, "is not a PNG"),
    "animated GIF": (frames("GIF"), "is not a PNG"),
    "animated PNG": (frames("PNG"), "is an animation; save the wanted frame as PNG"),
    "animated WebP": (frames("WEBP"), "is an animation; save the wanted frame as PNG"),
    "no pixels": (png(2, [0, 0, 0], 8, 0), "is not a PNG"),
    "16-bit transparent color": (
        png(2, [0x1234] * 3, 16, SIDE, chunk(b"tRNS", struct.pack(">HHH", *[0x1234] * 3))),
        "transparent color of 16 bits",
    ),
    "bomb of 50,000 x 50,000": (png(2, [0, 0, 0], 8, 50_000), "claims more than 89,478,485 pixels"),
    "bomb of 10,000 x 10,000": (png(2, [0, 0, 0], 8, 10_000), "claims more than 89,478,485 pixels"),
}


def converted(path: Path) -> Path:
    """Return the converted images of `path`."""
    destination = path.parent / "converted.zip"
    convert(ConvertOptions(str(path), str(destination), SIDE, classes=Classes.none))
    return destination


PLACES = {  # where images are read: how, and the file or folder that holds them
    "data.dataset.path zip": (lambda path: ImageDataset(path, SIDE)[0], "zip"),
    "data.dataset.path folder": (lambda path: ImageDataset(path, SIDE)[0], "folder"),
    "relay.start": (lambda path: ImageDataset(path, SIDE, option="relay.start")[0], "folder"),
    "relay.start of any size": (lambda path: StartImages(path)[0], "zip"),
    "images": (lambda path: next(open_image_set(path, "images").batches(1)), "folder"),
    "reference": (lambda path: next(open_image_set(path, "reference", (SIDE, SIDE)).batches(1)), "zip"),
    "convert folder": (lambda path: ImageDataset(converted(path), SIDE)[0], "folder"),
    "convert tar": (lambda path: ImageDataset(converted(path), SIDE)[0], "tar"),
}


def stored(tmp_path: Path, kind: str, content: bytes) -> Path:
    files = {"odd.png": content}
    if kind == "folder":
        return write_folder(tmp_path / "images", files)
    return (write_zip if kind == "zip" else write_tar)(tmp_path / f"images.{kind}", files)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", READ)
def test_odd_images_are_read_alike_everywhere(tmp_path: Path, place: str, case: str) -> None:
    (content, color), (read, kind) = READ[case], PLACES[place]
    item = read(stored(tmp_path, kind, content))
    pixels = item[0]  # of an (image, label), or of a batch
    assert tuple(pixels.shape) == (3, SIDE, SIDE)
    assert tuple(pixels[:, 0, 0].tolist()) == color


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_an_image_is_reported_everywhere(tmp_path: Path, place: str, case: str) -> None:
    (content, reason), (read, kind) = REFUSED[case], PLACES[place]
    path = stored(tmp_path, kind, content)
    with pytest.raises(UserError, match=reason) as caught:
        read(path)
    message, option = str(caught.value), "source" if "convert" in place else place.split()[0]
    assert message.startswith(f"{option}: 'odd.png' in {path}")
    remedies = {"remove it": "convert" not in place, "skip_bad=true": "any size" not in place}
    assert {remedy: message.count(remedy) for remedy in remedies} == remedies
    assert "\n" not in message
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # the converter leaves nothing half-written


def textured() -> Image.Image:
    values = np.random.default_rng(0).normal(0, 6, (32, 32, 3)) + np.indices((32, 32)).sum(0)[..., None] * 3
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_a_truncated_image_is_refused(kind: str, options: dict[str, bool]) -> None:
    content = encoded(textured(), kind, **options)
    for length in range(0, len(content), 7):
        with pytest.raises(UserError, match=r"^odd\.png (is not a PNG|cannot be decoded)"):
            decode_rgb(content[:length], "odd.png")
    with pytest.raises(UserError, match=r"^odd\.png cannot be decoded"):
        decode_rgb(content[:-1], "odd.png")
    decode_rgb(content, "odd.png")


def test_a_png_with_any_bit_changed_is_refused() -> None:
    content = encoded(textured())
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(UserError, match=r"^odd\.png (is not a PNG|cannot be decoded)"):
            decode_rgb(bytes(damaged), "odd.png")


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_other_damage_is_refused_or_gives_pixels(kind: str, options: dict[str, bool]) -> None:
    """JPEG and WebP have no checksum: a changed byte may show as changed pixels, but never as another exception."""
    content, read = encoded(textured(), kind, **options), 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        try:
            read += decode_rgb(bytes(damaged), "odd.png").mode == "RGB"
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert read > 0


def test_the_content_determines_the_format(tmp_path: Path) -> None:
    for name, kind in (("a.png", "JPEG"), ("a.jpg", "WEBP"), ("a.webp", "PNG")):
        path = write_zip(tmp_path / f"{kind}.zip", {name: plain((200, 200, 200), kind=kind)})
        assert abs(int(ImageDataset(path, SIDE)[0][0][0, 0, 0]) - 200) < 3


def test_cmyk_is_converted_without_a_profile() -> None:
    red, green, blue = decode_rgb(plain((0, 255, 255, 0), "CMYK", "JPEG", quality=100), "a.jpg").getpixel((0, 0))
    assert red > 240
    assert max(green, blue) < 15


def test_a_decompression_bomb_is_refused_without_warnings_as_errors(tmp_path: Path) -> None:
    """As in a user's process, and before allocating memory: the pixels would be 300 MB."""
    (tmp_path / "bomb.png").write_bytes(png(2, [0, 0, 0], 8, 10_000))
    program = (
        "import resource, sys; from relay_diffusion.data.decode import decode_rgb\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_rgb(open(sys.argv[1], 'rb').read(), 'bomb.png')\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bomb.png")], capture_output=True, text=True, check=True
    )
    said, thrifty = result.stdout.splitlines()
    assert "bomb.png claims more than 89,478,485 pixels" in said
    assert thrifty == "True"
    assert result.stderr == ""
