"""Random crops of images of any size."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pictures_on_disk import encoded, pixels, write_zip
from relay_diffusion.data.crops import random_crop
from relay_diffusion.data.datamodule import InfiniteSampler
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.errors import UserError

SIZES = {"a.png": (20, 9), "b.png": (8, 8), "c.png": (11, 30)}  # width, height
LABELS = {"labels": [["a.png", 1], ["b.png", 0], ["c.png", 2]]}


def photograph(name: str) -> Image.Image:
    return Image.fromarray(pixels(SIZES[name][0], 32)).resize(SIZES[name])


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "photos.zip", {name: encoded(photograph(name)) for name in SIZES}, LABELS)


def test_crops_have_every_scale_and_position() -> None:
    ramps = np.zeros((96, 240, 3))  # red: column, green: row
    ramps[..., 0], ramps[..., 1] = np.arange(240), np.arange(96)[:, None]
    image = Image.fromarray(ramps.astype(np.uint8))
    scales, centers = [], []
    for seed in range(400):
        crop = np.asarray(random_crop(image, (16, 32), seed)).astype(float)
        assert crop.shape == (16, 32, 3)
        inside = crop[4:-4, 4:-4]  # the filter ends at the edges of the rectangle
        columns, rows = (np.diff(inside[..., 0], axis=1).mean(), np.diff(inside[..., 1], axis=0).mean())
        assert columns == pytest.approx(rows, abs=0.2)  # the aspect ratio is kept but for whole pixels
        scales.append(columns)
        centers.append(inside.mean((0, 1))[:2])
    assert 0.95 < min(scales) < 1.1
    assert 5.5 < max(scales) < 6.1  # 96 / 16
    assert np.log(scales).mean() == pytest.approx(math.log(6) / 2, rel=0.1)
    x, y = np.array(centers).T
    assert x.min() < 40 < 200 < x.max()
    assert y.min() < 20 < 76 < y.max()
    assert np.mean(centers, axis=0) == pytest.approx([119.5, 47.5], rel=0.1)


def test_reduced_crops_are_antialiased() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    found = [np.asarray(random_crop(Image.fromarray(stripes), (16, 16), seed)).std() for seed in range(100)]
    scales = [8 ** np.random.default_rng(seed).random() for seed in range(100)]
    assert max(std for std, scale in zip(found, scales, strict=True) if scale > 3) < 10  # 127 without a filter


@pytest.mark.parametrize("cache", [False, True])
def test_an_index_determines_its_crop(archive: Path, cache: bool) -> None:
    dataset = ImageDataset(archive, 8, x_flip=True, cache=cache, random_crops=5)
    assert len(dataset) == 2 * 5 * 3
    for number, name in enumerate(SIZES):
        for crop in range(5):
            expected = image_tensor(random_crop(photograph(name), (8, 8), (crop, number)))
            (image, label), (mirrored, same) = dataset[3 * crop + number], dataset[15 + 3 * crop + number]
            assert torch.equal(image, expected)
            assert torch.equal(mirrored, expected.flip(2))
            assert label == same == [1, 0, 2][number]
    assert not torch.equal(dataset[0][0], dataset[3][0])
    assert torch.equal(dataset[1][0], dataset[4][0])  # of an image of the resolution there is one crop


def test_a_loader_starts_workers_for_crops_of_cached_images(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = ImageDataset(archive, 8, cache=True, random_crops=5)
    assert not dataset.cache
    dataset.load()
    dataset.load()
    assert capsys.readouterr().out.count("decoding images: 3/3") == 1
    archive.unlink()
    images = torch.cat([images for images, _ in DataLoader(dataset, batch_size=4, num_workers=2)])
    assert torch.equal(images, torch.stack([image for image, _ in dataset]))


def test_a_resumed_stream_has_the_same_crops(archive: Path) -> None:
    def batches(start: int, count: int) -> torch.Tensor:
        dataset = ImageDataset(archive, 8, x_flip=True, random_crops=50)
        loader = DataLoader(dataset, batch_sampler=InfiniteSampler(len(dataset), 4, seed=2, start=start))
        return torch.stack([images for images, _ in islice(loader, count)])

    assert torch.equal(batches(0, 5)[3:], batches(12, 2))


def test_a_small_image_is_named(archive: Path) -> None:
    assert ImageDataset(archive, 8, random_crops=1).names == list(SIZES)
    with pytest.raises(UserError) as caught:
        ImageDataset(archive, 9, cache=True, random_crops=1).load()
    assert str(caught.value) == f"data.dataset.path: 'b.png' in {archive} is 8x8, smaller than 9x9; remove it"


@pytest.mark.parametrize("count", [-1, 1_000_001])
def test_impossible_counts_are_refused(archive: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"random_crops={count}: must be 0 to 1,000,000"):
        ImageDataset(archive, 8, random_crops=count)
