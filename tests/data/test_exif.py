"""EXIF orientation: applied or ignored by option; damaged blocks are harmless."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from pictures_on_disk import encoded, write_folder, write_zip
from relay_diffusion.data.convert import Classes, ConvertOptions, Exif, Fit, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.decode import decode
from relay_diffusion.data.image_sets import open_image_set

WIDTH, HEIGHT = 48, 32
SAVED = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}


def photograph(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth, and different in each corner."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], -1).clip(0, 255).astype(np.uint8))


def exif_with(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block that holds this orientation alone."""
    value = struct.pack(f"{order}H2x" if kind == 3 else f"{order}I", orientation)
    header = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    return b"Exif\0\0" + header + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def photo(kind: str, orientation: int, image: Image.Image | None = None) -> bytes:
    return encoded(image or photograph(), kind, exif=exif_with(orientation), **SAVED[kind])


def upright(data: bytes) -> np.ndarray:
    """Decode with Pillow, its EXIF orientation applied."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_as_pillow_does(kind: str, orientation: int) -> None:
    data = photo(kind, orientation)
    found = decode(data, "a")
    assert (found.turned, found.exif_damaged) == (orientation > 1, False)
    np.testing.assert_array_equal(np.asarray(found.image), upright(data))
    assert "exif" not in found.image.info
    as_stored = decode(data, "a", apply_exif=False)
    assert (as_stored.turned, as_stored.image.size) == (False, (WIDTH, HEIGHT))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_both_byte_orders_and_integer_types(order: str, kind: int) -> None:
    assert decode(encoded(photograph(), "JPEG", exif=exif_with(6, order, kind)), "a").turned


def test_a_png_chunk_behind_the_pixels_counts() -> None:
    data = photo("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert decode(moved, "a").turned


def test_a_compressed_text_chunk_called_exif_is_not_a_block() -> None:
    text = PngInfo()
    text.add_text("exif", "a camera", zip=True)
    found = decode(encoded(photograph(), pnginfo=text), "a")
    assert (found.turned, found.exif_damaged) == (False, False)


@pytest.mark.parametrize("kind", SAVED)
def test_damaged_blocks_leave_the_pixels_as_stored(kind: str) -> None:
    """Each prefix, and each byte changed: an image of either orientation, and no exception or warning."""
    whole, plain = exif_with(6), np.asarray(decode(photo(kind, 1), "a").image)
    damaged = [whole[:length] for length in range(6, len(whole))]
    damaged += [
        whole[:at] + bytes([byte]) + whole[at + 1 :] for at in range(6, len(whole)) for byte in (0, 1, 0x7F, 0xFF)
    ]
    damaged += [b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 65535) + b"\xff" * 60, b"Exif\0\0" + b"\0" * 500]
    counted = 0
    for block in damaged:
        found = decode(encoded(photograph(), kind, exif=block, **SAVED[kind]), "a")
        counted += found.exif_damaged
        if not found.turned:
            np.testing.assert_array_equal(np.asarray(found.image), plain)
    assert counted > 20


def test_a_jpeg_without_resolution_and_with_a_damaged_block_is_read() -> None:
    """Pillow then reads the resolution from the block, and warns of damage."""
    data = photo("JPEG", 6)
    jfif = data.index(b"\xff\xe0")
    data = data[:jfif] + data[jfif + 2 + int.from_bytes(data[jfif + 2 : jfif + 4]) :]
    assert decode(data, "a").turned
    assert decode(data.replace(struct.pack("<IH", 8, 1), struct.pack("<IH", 8, 9)), "a").image.size == (HEIGHT, WIDTH)
    assert decode(data.replace(struct.pack("<IH", 8, 1), struct.pack("<IH", 99, 1)), "a").exif_damaged


@pytest.mark.parametrize("kind", SAVED)
def test_a_converted_set_is_upright_and_stays_so(tmp_path: Path, kind: str) -> None:
    files = {f"cat/{orientation}.{kind.lower()}": photo(kind, orientation) for orientation in range(1, 9)}
    if kind == "JPEG":
        files = {name.replace("jpeg", "jpg"): data for name, data in files.items()}
    source = write_zip(tmp_path / "in.zip", files)
    result = convert(ConvertOptions(str(source), str(tmp_path / "out.zip"), 32))
    assert (result.turned, result.exif_damaged) == (7, 0)
    ignored = convert(ConvertOptions(str(source), str(tmp_path / "ignored.zip"), 32, exif=Exif.ignore))
    assert ignored.turned == 0
    written, as_stored = ImageDataset(tmp_path / "out.zip", 32), ImageDataset(tmp_path / "ignored.zip", 32)
    for index, data in enumerate(files.values()):
        pixels = upright(data)
        top, left = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
        expected = pixels[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(written[index][0].permute(1, 2, 0).numpy(), expected)
        assert torch.equal(as_stored[index][0], as_stored[0][0])
    assert not written.turned
    assert not as_stored.turned


def test_the_number_of_turned_and_damaged_images_is_reported(tmp_path: Path) -> None:
    files = {"cat/a.jpg": photo("JPEG", 6), "cat/b.png": photo("PNG", 8), "dog/c.jpg": photo("JPEG", 1)}
    files["dog/d.jpg"] = encoded(photograph(), "JPEG", exif=b"Exif\0\0nothing")
    source = write_folder(tmp_path / "in", files)
    command = [sys.executable, "-m", "relay_diffusion.cli.convert_images", f"source={source}", "resolution=32"]
    done = subprocess.run([*command, f"destination={tmp_path / 'out.zip'}"], capture_output=True, text=True, check=True)
    assert "EXIF orientation applied to 2 images\n" in done.stdout
    assert done.stderr == "warning: 1 image with a damaged EXIF block; the pixels are kept as stored\n"
    more = [f"destination={tmp_path / 'ignored.zip'}", "exif=ignore"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    assert "EXIF" not in done.stdout + done.stderr


def test_crop_none_sees_the_upright_shape(tmp_path: Path) -> None:
    square = photograph(32, 32)
    source = write_zip(tmp_path / "in.zip", {"a.jpg": photo("JPEG", 6, square)})
    convert(ConvertOptions(str(source), str(tmp_path / "out.zip"), 32, Fit.none, Classes.none))
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        pixels = np.asarray(Image.open(io.BytesIO(archive.read("a.png"))))
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    np.testing.assert_array_equal(pixels, upright(photo("JPEG", 6, square)))


def test_folders_zips_and_image_sets_are_read_alike_and_hashed_by_their_pixels(tmp_path: Path) -> None:
    data = photo("PNG", 3, photograph(32, 32))
    folder = write_folder(tmp_path / "in", {"a.png": data})
    expected = torch.from_numpy(upright(data).copy()).permute(2, 0, 1)
    applied, ignored = ImageDataset(folder, 32), ImageDataset(folder, 32, exif="ignore")
    assert torch.equal(applied[0][0], expected)
    assert torch.equal(ignored[0][0], expected.flip(1, 2))
    assert (applied.turned, ignored.turned) == ({"a.png"}, set())
    assert applied.source_hash != ignored.source_hash
    assert torch.equal(next(open_image_set(folder, "images").batches(1))[0], expected)


def test_statistics_of_the_pixels_as_stored_are_not_taken_for_those_of_turned_images(tmp_path: Path) -> None:
    """Reference statistics are cached by this hash; before orientations were applied it was the second one."""
    data = photo("PNG", 3, photograph(32, 32))
    folder = write_folder(tmp_path / "in", {"a.png": data})
    former = hashlib.sha256(f"32x32\n\na.png\n{hashlib.sha256(data).hexdigest()}\n".encode()).hexdigest()
    assert open_image_set(folder, "reference").source_hash != former


def test_exif_must_be_apply_or_ignore(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^exif=no: use apply or ignore$"):
        ImageDataset(tmp_path, 8, exif="no")
