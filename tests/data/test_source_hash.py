"""What identifies a set of images, so that statistics of it can be kept."""

from __future__ import annotations

from pathlib import Path

from pictures_on_disk import encoded, pixels, pngs, write_folder, write_zip
from relay_diffusion.data.dataset import ImageDataset

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
