"""Tiles: positions, weights, blending and padding."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from relay_diffusion.diffusion.corruption import BlurringCorruption
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.schedule import TruncatedLogNormal
from relay_diffusion.diffusion.tiling import TiledDenoiser, Tiling, mirrored
from relay_diffusion.samplers import BlurringSampler, MultistepSampler

GRAY_LEVEL = 2 / 255


def local_denoiser(x, sigma, labels):
    """A denoiser that sees the pixels at a distance of at most 2."""
    kernel = torch.tensor([1.0, -2.0, 5.0, -2.0, 1.0]) / 3
    smooth = F.conv2d(x.float(), (kernel[:, None] * kernel).expand(3, 1, 5, 5), padding=2, groups=3)
    shift = 0.0 if labels is None else 0.1 * labels[:, None, None, None]
    return torch.tanh(smooth / (1 + sigma.float()[:, None, None, None] ** 2)) + shift


@pytest.mark.parametrize(("side", "tile", "overlap", "step"), [(96, 32, 16, 4), (128, 32, 8, 8), (36, 32, 24, 4)])
def test_tiles_cover_every_pixel_with_weights_of_sum_one(side, tile, overlap, step):
    tiling = Tiling((tile, tile), overlap, step)
    positions, weights = tiling.positions(side, tile), tiling.weights(side, tile)
    assert (positions[0], positions[-1]) == (0, side - tile)
    assert all(position % step == 0 for position in positions)
    assert all(later - earlier <= tile - overlap for earlier, later in itertools.pairwise(positions))
    total = torch.zeros(side)
    for position, weight in zip(positions, weights, strict=True):
        total[position : position + tile] += weight
    torch.testing.assert_close(total, torch.ones(side))
    inner_edge = overlap // 8
    assert not weights[1:, :inner_edge].any()  # the network's zero padding is visible there
    assert weights[0, 0] == weights[-1, -1] == 1  # at the image's edge there is no other tile
    largest = 4 / overlap  # steepest rise: pi / 2 / (3/4 overlap)
    assert float(weights.diff(dim=1).abs().max()) <= largest


def test_an_image_of_one_tile_is_evaluated_whole():
    seen = []
    tiled = TiledDenoiser(lambda x, *_: seen.append(x) or x, Tiling((32, 64), 16, 4))
    x = torch.randn(2, 3, 32, 48)
    assert tiled(x, torch.ones(2), None) is x
    assert seen[0] is x


@pytest.mark.parametrize("size", [(88, 64), (32, 100), (132, 68)])
@pytest.mark.parametrize("labels", [None, torch.tensor([1, 3])])
def test_tiles_of_a_local_denoiser_make_its_whole_estimate(size, labels):
    x, sigma = torch.randn(2, 3, *size), torch.tensor([0.3, 0.7], dtype=torch.float64)
    tiled = TiledDenoiser(local_denoiser, Tiling((32, 32), 16, 4, batch=6))
    torch.testing.assert_close(tiled(x, sigma, labels), local_denoiser(x, sigma, labels), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [BlurringSampler, MultistepSampler])
def test_tiled_and_whole_samples_agree(kind):
    """Within a gray level after all steps of both samplers, which add noise at every step."""
    corruption = BlurringCorruption(TruncatedLogNormal())
    sampler = kind(corruption, steps=8, sigma_max=0.85, s_noise=0.2)
    start = torch.rand(1, 3, 72, 104).mul(2).sub(1)
    whole, tiled = (
        sampler(denoise, start, PerImageGenerator([5]).randn_like)
        for denoise in (local_denoiser, TiledDenoiser(local_denoiser, Tiling((32, 32), 16, 4)))
    )
    assert float((whole - tiled).abs().max()) < GRAY_LEVEL / 100


def test_tiles_of_different_brightness_leave_no_seam():
    """Normalization shifts the estimates of tiles by 10 gray levels: neighbors of 64 rows differ by less than one."""
    shifts = itertools.cycle([10, -10, 5, -7, 10])

    def shifted(x, *_):
        return torch.stack([torch.full_like(image, next(shifts) * GRAY_LEVEL) for image in x])

    blended = TiledDenoiser(shifted, Tiling((256, 256), 64, 8))(torch.zeros(1, 3, 640, 448), torch.ones(1), None)
    assert float(blended.amax() - blended.amin()) > 10 * GRAY_LEVEL
    for dim in (2, 3):
        assert float(blended.diff(dim=dim).abs().max()) < GRAY_LEVEL


def test_the_noise_of_a_tile_is_a_crop_of_one_noise_field():
    seen = {}

    def denoise(x, *_):
        seen.setdefault("tiles", []).extend(zip((0, 20, 40), x, strict=True))
        return torch.zeros_like(x)

    tiling = Tiling((40, 40), 20, 4, batch=3)
    field = PerImageGenerator([3]).randn_like(torch.empty(1, 3, 80, 40))
    TiledDenoiser(denoise, tiling)(field, torch.ones(1), None)
    for top, tile in seen["tiles"]:
        torch.testing.assert_close(tile, field[0, :, top : top + 40], rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_largest_batch_of_the_network_is_that_of_the_tiling(batch):
    shapes = []
    tiling = Tiling((32, 32), 8, 4, batch)
    denoise = TiledDenoiser(lambda x, *_: shapes.append(tuple(x.shape)) or x, tiling)
    denoise(torch.zeros(1, 3, 320, 200), torch.ones(1), None)
    assert {shape[1:] for shape in shapes} == {(3, 32, 32)}
    assert max(shape[0] for shape in shapes) == batch
    assert sum(shape[0] for shape in shapes) == tiling.count((320, 200)) == 13 * 8


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        ((24, 24), 8, "tile=24: is smaller than the network needs; use at least 32"),
        ((64, 36), 8, "tile=[64, 36]: must be divisible by 8; use 32"),
        ((64, 64), 12, "overlap=12: must be divisible by 8; use 16"),
        ((64, 64), 64, "overlap=64: must be above 0 and below the tile, 64; use 16"),
        ((64, 64), 0, "overlap=0: must be above 0 and below the tile, 64; use 16"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Tiling(tile, overlap, 8)


def test_sides_that_the_step_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^a side of 66 pixels: must be divisible by 4"):
        Tiling((32, 32), 8, 4).positions(66, 32)


def test_images_are_continued_by_mirroring():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    continued = mirrored(image, (7, 4))
    assert continued[0, 0].tolist() == [
        [0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [0, 1, 2, 2], [0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5],
    ]  # fmt: skip
    assert mirrored(image, (2, 3)) is image
