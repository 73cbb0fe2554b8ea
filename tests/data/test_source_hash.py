"""Hashes that identify image sets, for cached statistics."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest

from pictures_on_disk import encoded, pixels, pngs, write_folder, write_zip
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.start_images import StartImages

NAMES = ["heldout/d.png", "train/a.png", "train/b.png", "train/c.png"]


def test_source_hash_follows_content_subset_and_resolution(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "images.zip", pngs(NAMES))
    base = ImageDataset(archive, 8).source_hash
    assert ImageDataset(archive, 8, x_flip=True, labels=False, cache=True).source_hash == base
    copy = write_zip(tmp_path / "copy.zip", pngs(NAMES))
    assert ImageDataset(copy, 8).source_hash == base
    other_pixels = write_zip(tmp_path / "other.zip", pngs(NAMES) | {"train/c.png": encoded(pixels(99))})
    different = {
        ImageDataset(archive, 4).source_hash,
        ImageDataset(archive, 8, subset="train").source_hash,
        ImageDataset(other_pixels, 8).source_hash,
    }
    assert len(different | {base}) == 4


def test_source_hash_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", pngs(NAMES))
    before = ImageDataset(folder, 8).source_hash
    assert ImageDataset(folder, 8).source_hash == before
    (folder / "train/c.png").write_bytes(encoded(pixels(99)))
    assert ImageDataset(folder, 8).source_hash != before


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("subset", ["", "train"])
def test_the_hashes_of_earlier_versions_stay(tmp_path: Path, kind: str, subset: str) -> None:
    """Resumed runs, metrics.json and the cached statistics of references compare them."""
    files = pngs(NAMES)
    path = write_zip(tmp_path / "a.zip", files) if kind == "zip" else write_folder(tmp_path / "a", files)
    contents = "".join(
        f"{name}\n{f'{zlib.crc32(data):08x} {len(data)}' if kind == 'zip' else hashlib.sha256(data).hexdigest()}\n"
        for name, data in files.items()
        if name.startswith(subset)
    )
    expected = {
        f"{subset}\n4\nexif\n{contents}": ImageDataset(path, 4, subset).source_hash,
        f"{subset}\n4\n{contents}": ImageDataset(path, [4, 4], f"{subset}/", exif="ignore").source_hash,
        f"8x8\n{subset}\nexif\n{contents}": open_image_set(path, "images", subset=subset).source_hash,
        f"4x4\n{subset}\nexif\n{contents}": open_image_set(path, "images", (4, 4), subset).source_hash,
    }
    assert [hashlib.sha256(text.encode()).hexdigest() for text in expected] == list(expected.values())


def test_the_hash_of_adm_samples_stays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 6, 3), np.uint8))
    with np.load(tmp_path / "a.npz") as stored:
        array = stored.zip.read("arr_0.npy")
    expected = hashlib.sha256(f"4x6\narr_0 {zlib.crc32(array):08x} {len(array)}".encode()).hexdigest()
    assert open_image_set(tmp_path / "a.npz", "images").source_hash == expected


@pytest.mark.parametrize(("channels", "text"), [(1, "channels 1"), (4, "channels 4 premultiplied")])
def test_hashes_of_other_channels(tmp_path: Path, channels: int, text: str) -> None:
    """Outputs and cached statistics of straight RGBA colors are not continued."""
    data = encoded(pixels(0))
    path = write_folder(tmp_path / "a", {"a.png": data})
    contents = f"a.png\n{hashlib.sha256(data).hexdigest()}\n"
    expected = {
        f"\n4\nexif\n{text}\n{contents}": ImageDataset(path, 4, channels=channels).source_hash,
        f"\nTrue\n{text.removeprefix('channels ')}\n{contents}": StartImages(path, channels=channels).source_hash,
    }
    assert [hashlib.sha256(text.encode()).hexdigest() for text in expected] == list(expected.values())
