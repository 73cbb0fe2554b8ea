"""Grayscale, RGB and RGBA files, and arrays of any number of channels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.decode import ALPHA, GRAY, decode
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.errors import UserError

GENERATOR = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape).astype(np.uint8)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


IMAGES = {mode: Image.fromarray(random_pixels(4, 6, bands)) for mode, bands in (("RGB", 3), ("RGBA", 4))}
IMAGES["L"] = Image.fromarray(random_pixels(4, 6))
IMAGES["LA"] = Image.merge("LA", [IMAGES["L"], Image.fromarray(random_pixels(4, 6))])
IMAGES["P"] = IMAGES["RGB"].quantize(8)
IMAGES["1"] = IMAGES["L"].convert("1")
IMAGES["I;16"] = Image.fromarray(np.asarray(IMAGES["L"]).astype(np.uint16) * 256 + 7)


@pytest.mark.parametrize(
    ("channels", "mode", "conversions"),
    [
        (1, "L", set()), (1, "RGB", set()), (1, "RGBA", {ALPHA}), (1, "LA", {ALPHA}), (1, "P", set()), (1, "1", set()),
        (1, "I;16", set()), (3, "L", {GRAY}), (3, "LA", {GRAY, ALPHA}), (3, "RGB", set()), (3, "RGBA", {ALPHA}),
        (3, "I;16", {GRAY}), (4, "L", {GRAY}), (4, "LA", {GRAY}), (4, "RGB", set()), (4, "RGBA", set()),
        (4, "P", set()),
    ],
)  # fmt: skip
def test_files_are_converted_to_the_channels(channels: int, mode: str, conversions: set[str]) -> None:
    image = IMAGES[mode]
    decoded = decode(encoded(image), "image", channels=channels)
    assert decoded.conversions == conversions
    if mode == "I;16":
        image = IMAGES["L"]  # the high byte
    if ALPHA in conversions:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    expected = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    assert decoded.image.mode == expected.mode
    assert decoded.image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_a_dataset_of_files(tmp_path: Path, channels: int, mode: str) -> None:
    for index in range(3):
        image = Image.fromarray(random_pixels(4, 8, channels).squeeze())
        assert image.mode == mode
        image.save(tmp_path / f"{index}.png")
    stored = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")).reshape(4, 8, channels) for i in range(3)])
    if channels == 4:  # premultiplied
        stored[..., :3] = np.floor(stored[..., :3] * (stored[..., 3:] / 255) + 0.5)
    for cache in (False, True):
        dataset = ImageDataset(tmp_path, [4, 8], x_flip=True, cache=cache, channels=channels)
        images, labels = dataset.batch(range(6))
        assert (images.dtype, images.shape, labels.tolist()) == (torch.uint8, (6, channels, 4, 8), [-1] * 6)
        np.testing.assert_array_equal(images[:3].permute(0, 2, 3, 1).numpy(), stored)
        assert torch.equal(images[3:], images[:3].flip(-1))
    halved = ImageDataset(tmp_path, [2, 4], channels=channels)[1][0].permute(1, 2, 0)
    blocks = stored[1].reshape(2, 2, 4, 2, channels).astype(float)
    np.testing.assert_array_equal(halved.numpy(), np.floor(blocks.mean((1, 3)) + 0.5))
    assert dataset.source_hash != ImageDataset(tmp_path, [4, 8]).source_hash


def test_files_of_other_channels_do_not_exist(tmp_path: Path) -> None:
    IMAGES["RGB"].save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"^data\.dataset\.path=.*: channels=2: image files have 1 .*; use an \.npz$"):
        ImageDataset(tmp_path, [4, 6], channels=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_dataset_of_arrays(tmp_path: Path, channels: int, dtype: type) -> None:
    stored = random_pixels(4, 2, 6, channels)
    if dtype is not np.uint8:
        stored = (stored / 127.5 - 1).astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", stored, np.array([2, 0, 1, 1]))
    dataset = ImageDataset(tmp_path / "a.npz", [2, 6], x_flip=True, channels=channels)
    assert (len(dataset), dataset.cache, dataset.num_classes, dataset.class_names) == (8, True, 3, ["0", "1", "2"])
    images, labels = dataset.batch([3, 0, 7])
    assert labels.tolist() == [1, 2, 1]
    assert images.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    expected = torch.from_numpy(stored[[3, 0]].astype(images.numpy().dtype)).permute(0, 3, 1, 2)
    assert torch.equal(images[:2], expected)
    assert torch.equal(images[2], expected[0].flip(-1))
    halved = ImageDataset(tmp_path / "a.npz", [1, 3], channels=channels, labels=False)
    means = torch.nn.functional.avg_pool2d(expected.double(), 2)[0]
    assert (halved[3][0].double() - means).abs().max() <= (0.5 if dtype is np.uint8 else 1e-6)
    assert (halved.num_classes, halved[3][1]) == (0, -1)
    assert len({dataset.source_hash, halved.source_hash}) == 2


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([np.zeros((2, 4, 4, 5), np.uint8)], {}, r"its images have 5 channels, not 3; .*data\.dataset\.channels=5$"),
        ([np.zeros((2, 4, 4, 3), np.uint8)], {"channels": 5}, "its images have 3 channels, not 5"),
        ([np.zeros((2, 4, 4, 3), np.int16)], {}, r"must hold images \[N,H,W,C\] as uint8 or as floats .* not int16"),
        ([np.zeros((2, 4, 4, 1025), np.uint8)], {"channels": 1025}, "are 4x4 with 1,025 channels, .* 1,024 channels"),
        ([np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int)], {}, "class index from 0 for each of 2 images"),
        ([np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1])], {}, "'arr_1' must hold a class index"),
        ([np.zeros((2, 4, 4, 3), np.uint8), np.array([0.0, 1.0])], {}, "'arr_1' must hold a class index"),
        ([np.zeros((2, 4, 4, 3), np.uint8)], {"subset": "train"}, r"an \.npz has no folders"),
        ([np.zeros((2, 4, 4, 3), np.uint8)], {"random_crops": 2}, "an .npz have one size; use random_crops=0"),
        ([np.zeros((2, 6, 6, 3), np.uint8)], {}, "its images are 6x6; they must be 4x4 or a whole multiple; crop"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays, options, message) -> None:
    np.savez(tmp_path / "a.npz", *arrays)
    with pytest.raises(UserError, match=message) as caught:
        ImageDataset(tmp_path / "a.npz", 4, **options)
    assert str(caught.value).startswith(f"data.dataset.path={tmp_path / 'a.npz'}: ")


@pytest.mark.parametrize("value", [1.01, -2.0, np.nan, np.inf])
def test_floats_outside_the_range_are_refused(tmp_path: Path, value: float) -> None:
    images = np.zeros((3, 4, 4, 3), np.float32)
    images[1, 2, 3, 0] = value
    np.savez(tmp_path / "a.npz", images)
    with pytest.raises(UserError, match=r"^data\.dataset\.path=.*: arr_0\[1\] holds values outside \[-1, 1\]"):
        ImageDataset(tmp_path / "a.npz", 4).load()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("stored", "channels"), [(1, 3), (4, 3), (3, 1), (3, 4), (1, 4), (4, 1)])
def test_arrays_are_converted_as_files_are(tmp_path: Path, stored: int, channels: int, dtype: type) -> None:
    pixels = random_pixels(2, 4, 6, stored)
    (tmp_path / "files").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(tmp_path / f"files/{index}.png")
    np.savez(tmp_path / "a.npz", pixels if dtype is np.uint8 else (pixels / 127.5 - 1).astype(dtype))
    sets = [open_image_set(path, "images", channels=channels) for path in (tmp_path / "files", tmp_path / "a.npz")]
    files, arrays = (torch.cat(list(one.batches(2))) for one in sets)
    assert torch.equal(files, arrays)
    assert files.shape == (2, channels, 4, 6)
    assert sets[0].conversions == sets[1].conversions


def test_transparent_pixels_have_no_weight_in_averages(tmp_path: Path) -> None:
    pixels = random_pixels(6, 6, 9, 4)
    pixels[0, :3, :3] = [[[9, 8, 7, 255]] * 3] + [[[200, 100, 50, 0]] * 3] * 2
    pixels[0, 3:, :3, 3] = 0
    pixels[1, ..., 3] = 255
    (tmp_path / "files").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"files/{index}.png")
    np.savez(tmp_path / "bytes.npz", pixels)
    np.savez(tmp_path / "floats.npz", (pixels / 127.5 - 1).astype(np.float32))
    files, integers, floats = (
        ImageDataset(tmp_path / name, [2, 3], channels=4).batch(range(6))[0]
        for name in ("files", "bytes.npz", "floats.npz")
    )
    assert torch.equal(files, integers)
    assert (to_uint8(floats).int() - files.int()).abs().max() <= 1
    assert files[0, :, 0, 0].tolist() == [3, 3, 2, 85]  # premultiplied, without the color of the transparent pixels
    assert files[0, :, 1, 0].tolist() == [0, 0, 0, 0]
    opaque = pixels[1].reshape(2, 3, 3, 3, 4).mean((1, 3))
    np.testing.assert_array_equal(files[1].permute(1, 2, 0).numpy(), np.floor(opaque + 0.5))
    composited = ImageDataset(tmp_path / "files", [2, 3]).batch(range(6))[0]
    for name in ("bytes.npz", "floats.npz"):
        for batch in open_image_set(tmp_path / name, "images", (2, 3)).batches(6):
            assert (batch.int() - composited.int()).abs().max() <= 1


def test_floats_are_batches_of_8_bits(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "a.npz", images)
    found = torch.cat(list(open_image_set(tmp_path / "a.npz", "images").batches(2)))
    assert torch.equal(found, to_uint8(torch.from_numpy(images)).permute(0, 3, 1, 2))
