"""16-bit images: the high byte, or the highest of the bits that they use."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures_on_disk import encoded, write_folder
from relay_diffusion.data.convert import ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.errors import UserError

SIDE = 8
COLORS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels: PNG color type


def png(samples: np.ndarray) -> bytes:
    """uint16 [H,W,C] as a 16-bit PNG."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, COLORS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def samples(channels: int, bits: int, seed: int = 0) -> np.ndarray:
    """All of the range is used."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (SIDE, SIDE, channels), dtype=np.uint16)
    values[0, 0] = 2**bits - 1
    return values


def converted(tmp_path: Path, files: dict[str, bytes], **others: object) -> list[np.ndarray]:
    source = write_folder(tmp_path / "in", files)
    convert(ConvertOptions(str(source), str(tmp_path / "out.zip"), SIDE, overwrite=True, **others))  # type: ignore[arg-type]
    return [image.permute(1, 2, 0).numpy() for image, _ in ImageDataset(tmp_path / "out.zip", SIDE)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 10, 12, 15])
def test_bit_depth_keeps_the_highest_of_the_used_bits(tmp_path: Path, channels: int, bits: int) -> None:
    values = samples(channels, bits)
    (pixels,) = converted(tmp_path, {"cat/a.png": png(values)}, bit_depth=bits)
    np.testing.assert_array_equal(pixels, np.broadcast_to(values >> (bits - 8), (SIDE, SIDE, 3)))
    assert pixels.max() == 255


def test_eight_bit_images_beside_them_stay_as_they_are(tmp_path: Path) -> None:
    plain = np.full((SIDE, SIDE, 3), 200, np.uint8)
    pixels = converted(tmp_path, {"cat/a.png": png(samples(1, 12)), "cat/b.png": encoded(plain)}, bit_depth=12)
    np.testing.assert_array_equal(pixels[1], plain)


@pytest.mark.parametrize(
    ("content", "depth", "message"),
    [
        (png(samples(1, 13)), 12, r"'cat/a\.png' in .* holds the value 8191, but bit_depth=12 allows 4095 at most"),
        (png(samples(3, 13)), 12, r"'cat/a\.png' in .* holds the value 8191, but bit_depth=12 allows 4095 at most"),
        (png(samples(4, 12)), 12, r"'cat/a\.png' in .* has 16 bits and an alpha channel"),
        (png(samples(2, 12)), 12, r"'cat/a\.png' in .* has 16 bits and an alpha channel"),
        (encoded(Image.new("RGB", (SIDE, SIDE))), 12, "bit_depth=12: no image has 16 bits"),
        (png(samples(1, 12)), 7, "bit_depth=7: must be 8 to 16"),
        (png(samples(1, 12)), 17, "bit_depth=17: must be 8 to 16"),
    ],
    ids=["gray", "color", "color and alpha", "gray and alpha", "8 bits", "too few", "too many"],
)
def test_an_unsuitable_bit_depth_is_refused(tmp_path: Path, content: bytes, depth: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        converted(tmp_path, {"cat/a.png": content}, bit_depth=depth)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    ("channels", "bits", "warned"),
    [(1, 12, True), (3, 12, True), (1, 14, True), (3, 14, True), (1, 15, False), (3, 15, False), (1, 16, False)],
)
def test_a_set_that_uses_less_than_a_quarter_of_its_range_is_warned_about(
    tmp_path: Path, channels: int, bits: int, warned: bool
) -> None:
    source = write_folder(tmp_path / "in", {"cat/a.png": png(samples(channels, bits)), "dog/b.png": png(samples(1, 9))})
    command = [sys.executable, "-m", "relay_diffusion.cli.convert_images", f"source={source}", f"resolution={SIDE}"]
    done = subprocess.run([*command, f"destination={tmp_path / 'out.zip'}"], capture_output=True, text=True, check=True)
    expected = (
        f"warning: 2 16-bit images with values below {2**bits:,} of 65,536 become dark; bit_depth={bits} "
        "rescales them\n"
    )
    assert done.stderr == (expected if warned else "")


def test_an_alpha_channel_does_not_count_as_brightness(tmp_path: Path) -> None:
    values = samples(4, 12)
    values[..., 3] = 65535
    source = write_folder(tmp_path / "in", {"cat/a.png": png(values)})
    result = convert(ConvertOptions(str(source), str(tmp_path / "out.zip"), SIDE))
    assert (result.deep_images, result.bits) == (1, 12)


@pytest.mark.parametrize("bits", [12, 15])
@pytest.mark.parametrize("option", ["data.dataset.path", "relay.start", "images", "reference"])
def test_sets_read_directly_are_warned_about_too(
    tmp_path: Path, option: str, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "in", {f"{k:02d}.png": png(samples(1, bits if k == 21 else 9)) for k in range(40)})
    if option in ("images", "reference"):
        open_image_set(folder, option)
    else:
        ImageDataset(folder, SIDE, option=option)
    said = capsys.readouterr().err
    if bits == 12:
        assert said == (
            f"warning: {option}={folder}: 16-bit images with values below 4,096 of 65,536 become dark; "
            "`python -m relay_diffusion.cli.convert_images` with bit_depth=12 rescales them\n"
        )
    else:
        assert said == ""
