"""Transparent images: what the stages of a relay see, and the files that are written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from pictures_on_disk import encoded, write_folder, write_zip
from relay_diffusion.data.convert import Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import image_tensor, open_image_set
from relay_diffusion.data.npz import write_adm_samples
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.diffusion.corruption import (
    BlockCorruption,
    BlurringCorruption,
    ConditionedCorruption,
    block_mean,
    upsample_blocks,
)
from relay_diffusion.diffusion.linear import LinearCorruption
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.diffusion.schedule import LogNormal, TruncatedLogNormal
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.agreement import block_mean_error
from relay_diffusion.sampling.plan import plan_from_images
from relay_diffusion.utils.pictures import pil_image
from support import tiny_stage

LEVEL = 1 / 127.5


def drawing(hidden: tuple[int, int, int], size: int = 32) -> Image.Image:
    """A red disc with a soft edge, on transparent pixels of the color `hidden`."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    alpha = np.clip((size / 3 - np.hypot(x, y)) / 3 + 0.5, 0, 1)
    pixels = np.empty((size, size, 4), np.uint8)
    pixels[..., :3] = np.where(alpha[..., None] > 0, (230, 20, 10), hidden)
    pixels[..., 3] = np.round(255 * alpha)
    return Image.fromarray(pixels)


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """Folder of three images of 32x32 with random colors, hidden ones too."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 4)).astype(np.uint8)
    pixels[:, :16, :, 3] = np.where(pixels[:, :16, :, 3] < 128, 0, 255)
    return write_folder(tmp_path / "noisy", {f"{i}.png": encoded(image) for i, image in enumerate(pixels)})


def read(path: Path, resolution: int, **options: object) -> torch.Tensor:
    return ImageDataset(path, resolution, channels=4, **options).batch(range(3))[0]


@pytest.mark.parametrize("kind", ["files", "bytes", "floats"])
def test_the_stages_of_a_relay_are_trained_on_the_same_small_images(tmp_path: Path, noisy: Path, kind: str) -> None:
    if kind != "files":
        pixels = np.stack([np.asarray(Image.open(noisy / f"{index}.png")) for index in range(3)])
        np.savez(tmp_path / "a.npz", pixels if kind == "bytes" else (pixels / 127.5 - 1).astype(np.float32))
        noisy = tmp_path / "a.npz"
    small, large = read(noisy, 8), read(noisy, 32)
    error = block_mean(to_float(large), 4) - to_float(small)
    assert error.abs().max() <= 0.5001 * LEVEL


@pytest.mark.parametrize("corruption", [partial(BlurringCorruption, blur_sigma_max=99, min_gain=0), LinearCorruption])
def test_the_forward_process_ends_at_the_images_of_the_first_stage(
    noisy: Path, corruption: Callable[..., BlockCorruption]
) -> None:
    process = corruption(TruncatedLogNormal(), block=4)
    small, large = to_float(read(noisy, 8)), to_float(read(noisy, 32))
    last = process.schedule.sigma(torch.ones(3))
    end = process.corrupt(large, last, torch.zeros_like(large))
    assert (end - upsample_blocks(small, 4)).abs().max() <= 0.5001 * LEVEL


def test_a_converted_file_equals_the_average_of_training(tmp_path: Path, noisy: Path) -> None:
    source = write_zip(tmp_path / "in.zip", {path.name: path.read_bytes() for path in sorted(noisy.iterdir())})
    convert(ConvertOptions(str(source), str(tmp_path / "out.zip"), resolution=8, channels=4, classes=Classes.none))
    assert torch.equal(read(tmp_path / "out.zip", 8), read(source, 8))
    with ZipFile(tmp_path / "out.zip") as archive, archive.open("0.png") as file:
        written = np.asarray(Image.open(file))
    original = np.asarray(Image.open(noisy / "0.png")).astype(float)
    color, alpha = (part.reshape(8, 4, 8, 4, -1) for part in (original[..., :3], original[..., 3:]))
    expected = (color * alpha).sum((1, 3)) / alpha.sum((1, 3))  # straight colors, weighted by alpha
    solid = written[..., 3] >= 128
    assert solid.any()
    assert abs(written[..., :3] - expected)[solid].max() <= 2


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"random_crops": 1}, {"random_crops": 1, "cache": True}])
def test_hidden_colors_are_not_seen(tmp_path: Path, options: dict[str, object]) -> None:
    found = []
    for name, hidden in (("green", (0, 255, 0)), ("black", (0, 0, 0))):
        folder = write_folder(tmp_path / name, {f"{i}.png": encoded(drawing(hidden)) for i in range(3)})
        found.append(read(folder, 16, **options))
        assert (found[-1][:, :3] <= found[-1][:, 3:]).all()
    assert torch.equal(*found)


def test_opaque_images_stay(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    colors = write_folder(tmp_path / "rgb", {f"{i}.png": encoded(image[..., :3]) for i, image in enumerate(pixels)})
    for resolution in (16, 4):
        expected = ImageDataset(colors, resolution).batch(range(3))[0]
        folder = write_folder(tmp_path / "a", {f"{i}.png": encoded(image) for i, image in enumerate(pixels)})
        found = read(folder, resolution)
        assert torch.equal(found[:, :3], expected)
        assert (found[:, 3] == 255).all()
    for stored in (pixels, (pixels / 127.5 - 1).astype(np.float32)):
        np.savez(tmp_path / "a.npz", stored)
        assert torch.equal(read(tmp_path / "a.npz", 16), torch.from_numpy(stored).permute(0, 3, 1, 2))


def test_written_files_have_straight_colors(tmp_path: Path) -> None:
    image = drawing((0, 255, 0))
    original, tensor = np.asarray(image), image_tensor(image)
    write_adm_samples(tmp_path / "a.npz", [tensor[None]], 1, (32, 32), channels=4)
    with np.load(tmp_path / "a.npz") as arrays:
        written = arrays["arr_0"][0]
    np.testing.assert_array_equal(np.asarray(pil_image(tensor)), written)
    solid, hidden = original[..., 3] >= 128, original[..., 3] == 0
    assert abs(written[solid].astype(int) - original[solid]).max() <= 1
    assert (written[hidden] == 0).all()
    assert torch.equal(open_image_set(tmp_path / "a.npz", "images", channels=4).tensor(0), tensor)


def test_hidden_colors_do_not_bleed_into_edges() -> None:
    small = to_float(image_tensor(drawing((0, 255, 0), 16)))[None]
    enlarged = ConditionedCorruption(LogNormal(), block=4).condition(small, torch.zeros(1), torch.zeros_like(small))
    pixels = np.asarray(pil_image(to_uint8(enlarged)[0])).astype(int)
    visible = pixels[..., 3] >= 128
    assert visible.sum() > 700
    assert abs(pixels[visible][:, 1] - 20).max() <= 3  # green; red overshoots, as bicubic interpolation does


def test_an_enlarged_image_does_not_depend_on_hidden_colors(tmp_path: Path) -> None:
    relay = Relay({"relay": tiny_stage(32, 2, image_channels=4)})
    found = []
    for name, hidden in (("green", (0, 255, 0)), ("black", (0, 0, 0))):
        folder = write_folder(tmp_path / name, {"a.png": encoded(drawing(hidden, 16))})
        start, _ = StartImages(folder, channels=4)[0]
        found.append(relay.sample([0], start=start[None]))
    assert torch.equal(*found)
    (image,) = relay.to_pil(found[0])
    pixels = np.asarray(image)
    assert torch.equal(relay.finish(found[0])[0, 3], torch.from_numpy(pixels[..., 3].copy()))
    assert (pixels[pixels[..., 3] == 0] == 0).all()


def test_the_block_mean_error_of_an_exact_enlargement_is_rounding(tmp_path: Path, noisy: Path) -> None:
    small = read(noisy, 8)
    folder = write_folder(tmp_path / "small", {f"{i}.png": encoded(pil_image(image)) for i, image in enumerate(small)})
    plan = plan_from_images(StartImages(folder, channels=4), None, None)
    assert block_mean_error(plan, open_image_set(noisy, "images", channels=4)) < 0.5
