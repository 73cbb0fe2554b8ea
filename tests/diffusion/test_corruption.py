"""Corruptions: blur, noise and start of sampling."""

import math

import pytest
import torch

from relay_diffusion.diffusion import (
    BlurringCorruption,
    GaussianCorruption,
    LinearCorruption,
    LogNormal,
    TruncatedLogNormal,
)
from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks
from relay_diffusion.diffusion.dct import block_dct, block_idct
from relay_diffusion.diffusion.noise import block_noise
from support import Replay

SCHEDULE = TruncatedLogNormal()
SIGMAS = torch.tensor([0.01, 0.1, 0.5, 1.0, 1.7], dtype=torch.float64)  # level 1 is at 1.76
START = SCHEDULE.sigma(torch.ones(1, dtype=torch.float64))


def images(batch=2, height=8, width=12):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def test_upsampling_repeats_and_block_mean_undoes_it():
    small = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    expected = [[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert upsample_blocks(small, 2)[0, 0].tolist() == expected
    assert torch.equal(block_mean(upsample_blocks(small, 2), 2), small)


def test_block_mean_averages_each_block():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert block_mean(x, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_gain_by_hand_at_half_the_level():
    schedule = TruncatedLogNormal(-1.2, 1.2, prob_length=1.0)  # the median exp(p_mean) has level 1/2
    corruption = BlurringCorruption(schedule, block=4, blur_sigma_max=3.0, min_gain=0.01)
    gains = corruption.gains(torch.tensor([math.exp(-1.2)], dtype=torch.float64))
    width = 3.0 / 2  # sin^2(pi / 4) = 1/2
    for k in range(4):
        for m in range(4):
            squared = (math.pi * k / 4) ** 2 + (math.pi * m / 4) ** 2
            expected = 0.99 * math.exp(-squared * width**2 / 2) + 0.01
            assert gains[0, 0, k, m].item() == pytest.approx(expected, rel=1e-9)


def test_blur_width_follows_the_squared_sine_of_the_level():
    corruption = BlurringCorruption(SCHEDULE, block=2, blur_sigma_max=2.0, min_gain=0.0)
    level = torch.tensor([1 / 3, 1.0], dtype=torch.float64)  # sin^2(pi / 6) = 1/4
    gains = corruption.gains(SCHEDULE.sigma(level))[:, 0, 0, 1]
    width = (-2 * gains.log()).sqrt() / (math.pi / 2)
    torch.testing.assert_close(width, torch.tensor([0.5, 2.0], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("min_gain", [0.0, 0.001, 0.3])
def test_the_gain_of_the_mean_is_one(min_gain):
    gains = BlurringCorruption(SCHEDULE, min_gain=min_gain).gains(SIGMAS)
    assert gains.shape == (5, 1, 4, 4)
    torch.testing.assert_close(gains[:, 0, 0, 0], torch.ones(5, dtype=torch.float64), atol=1e-15, rtol=0)


def test_gains_fall_with_frequency():
    gains = BlurringCorruption(SCHEDULE, blur_sigma_max=2.0).gains(SIGMAS)
    assert (gains.diff(dim=-1) < 0).all()
    assert (gains.diff(dim=-2) < 0).all()


def test_gains_fall_with_noise():
    gains = BlurringCorruption(SCHEDULE, blur_sigma_max=2.0).gains(SIGMAS).flatten(1)
    assert (gains.diff(dim=0)[:, 1:] < 0).all()


def test_gains_are_alike_in_both_directions():
    gains = BlurringCorruption(SCHEDULE, block=5).gains(SIGMAS)
    torch.testing.assert_close(gains, gains.mT, atol=1e-15, rtol=0)


def test_nothing_is_blurred_without_noise():
    gains = BlurringCorruption(SCHEDULE).gains(torch.tensor([1e-8], dtype=torch.float64))
    torch.testing.assert_close(gains, torch.ones_like(gains), atol=1e-12, rtol=0)


@pytest.mark.parametrize("min_gain", [0.0, 0.001, 0.3])
def test_a_strong_blur_leaves_min_gain(min_gain):
    gains = BlurringCorruption(SCHEDULE, blur_sigma_max=30.0, min_gain=min_gain).gains(START)[0, 0]
    expected = torch.full_like(gains, min_gain)
    expected[0, 0] = 1
    torch.testing.assert_close(gains, expected, atol=1e-15, rtol=0)


def corruptions():
    return [GaussianCorruption(LogNormal()), BlurringCorruption(SCHEDULE), LinearCorruption(SCHEDULE)]


@pytest.mark.parametrize("corruption", corruptions(), ids=["gaussian", "blurring", "linear"])
def test_corruption_is_linear_in_image_and_noise(corruption):
    x, y, n, m = images(), images(), images(), images()
    sigma = torch.tensor([0.3, 1.1], dtype=torch.float64)
    together = corruption.corrupt(2 * x - 3 * y, sigma, 2 * n - 3 * m)
    apart = 2 * corruption.corrupt(x, sigma, n) - 3 * corruption.corrupt(y, sigma, m)
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)


@pytest.mark.parametrize("corruption", corruptions(), ids=["gaussian", "blurring", "linear"])
def test_noise_is_added_times_sigma(corruption):
    x, noise, sigma = images(), images(), torch.tensor([0.3, 1.1], dtype=torch.float64)
    added = corruption.corrupt(x, sigma, noise) - corruption.corrupt(x, sigma, torch.zeros_like(x))
    torch.testing.assert_close(added[0], 0.3 * noise[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(added[1], 1.1 * noise[1], atol=1e-12, rtol=0)


def test_gaussian_corruption_keeps_the_image():
    x = images()
    assert torch.equal(GaussianCorruption(LogNormal()).corrupt(x, SIGMAS[:2], torch.zeros_like(x)), x)


def test_without_blur_it_is_gaussian_corruption():
    x, noise, sigma = images(), images(), torch.tensor([0.3, 1.7], dtype=torch.float64)
    blurring = BlurringCorruption(SCHEDULE, blur_sigma_max=0.0)
    expected = GaussianCorruption(LogNormal()).corrupt(x, sigma, noise)
    torch.testing.assert_close(blurring.corrupt(x, sigma, noise), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("min_gain", [0.0, 0.001])
@pytest.mark.parametrize("block", [2, 4])
def test_end_state_is_the_upsampled_block_mean(block, min_gain):
    x = images()
    corruption = BlurringCorruption(SCHEDULE, block, blur_sigma_max=30.0, min_gain=min_gain)
    blurred = corruption.corrupt(x, START.expand(2), torch.zeros_like(x))
    low = upsample_blocks(block_mean(x, block), block)
    torch.testing.assert_close(blurred, low + min_gain * (x - low), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [2, 4, 16])
def test_corruption_by_the_plain_formula(block, dtype):
    """DCT^-1[A(u) DCT[x0]] + sigma (eps + strength block(eps')), computed in float64."""
    corruption = BlurringCorruption(SCHEDULE, block, blur_sigma_max=2.5, min_gain=0.01, block_strength=0.3)
    x, white, other = (images(2, 32, 48).to(dtype) for _ in range(3))
    sigma = torch.tensor([0.05, 1.2], dtype=dtype)
    noisy = corruption.corrupt(x, sigma, corruption.draw_noise(x, Replay([white, other]).randn_like))
    level = torch.special.ndtr((sigma.double().log() + 1.2) / 1.2) / SCHEDULE.prob_length
    blur = 2.5 * torch.sin(math.pi / 2 * level) ** 2
    w = torch.arange(block, dtype=torch.float64) * math.pi / block
    gains = 0.99 * torch.exp(-(w[:, None] ** 2 + w**2) * blur[:, None, None, None] ** 2 / 2) + 0.01
    spectrum = block_dct(x.double(), block) * gains.repeat(1, 1, 32 // block, 48 // block)
    shifted = sum(other.double().roll((i, j), (-2, -1)) for i in range(block) for j in range(block)) / block
    expected = block_idct(spectrum, block) + sigma.double()[:, None, None, None] * (white.double() + 0.3 * shifted)
    assert noisy.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(noisy.double(), expected, atol=tolerance, rtol=0)


def noise_covariance(strength, block, size=8):
    """Compute the covariance of `draw_noise` [size^2, size^2] from impulses in its first and second draw."""
    corruption = BlurringCorruption(SCHEDULE, block, block_strength=strength)
    impulses = torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size)
    zeros = torch.zeros_like(impulses)
    white = corruption.draw_noise(impulses, Replay([impulses, zeros]).randn_like).flatten(1)
    blocks = corruption.draw_noise(impulses, Replay([zeros, impulses]).randn_like).flatten(1)
    return white.T @ white + blocks.T @ blocks


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("strength", [0.0, 0.15, 2.0])
def test_noise_variance_is_one_plus_squared_strength(strength, block):
    variance = noise_covariance(strength, block).diag()
    torch.testing.assert_close(variance, torch.full_like(variance, 1 + strength**2), atol=1e-12, rtol=0)


def test_neighbors_correlate_through_the_block_noise_only():
    covariance = noise_covariance(0.5, 4)
    assert covariance[0, 1].item() == pytest.approx(0.25 * 3 / 4, rel=1e-12)


def test_noise_is_the_first_draw_plus_block_noise_of_the_second():
    white, other = images(), images()
    noise = BlurringCorruption(SCHEDULE, 4, block_strength=0.3).draw_noise(white, Replay([white, other]).randn_like)
    torch.testing.assert_close(noise, white + 0.3 * block_noise(other, 4), atol=1e-14, rtol=0)


def test_noise_draws_are_two_or_one_without_block_noise():
    like = images()
    for corruption, draws in [
        (GaussianCorruption(LogNormal()), 1),
        (BlurringCorruption(SCHEDULE, block_strength=0.0), 1),
        (BlurringCorruption(SCHEDULE, block_strength=0.15), 2),
    ]:
        noise = Replay([images(), images(), images()])
        corruption.draw_noise(like, noise.randn_like)
        assert noise.left == 3 - draws


def test_gaussian_start_is_the_noise_itself():
    noise = images()
    start = GaussianCorruption(LogNormal()).start(torch.zeros_like(noise), None, Replay([noise]).randn_like)
    assert torch.equal(start, noise)


def test_gaussian_start_takes_no_image():
    with pytest.raises(ValueError, match="starts from noise; remove `previous`"):
        GaussianCorruption(LogNormal()).start(images(), images(), torch.randn_like)


def test_blurring_start_is_the_upsampled_image_in_the_precision_of_the_stage():
    small = torch.randn(2, 3, 2, 3)
    start = BlurringCorruption(SCHEDULE, block=4).start(images(), small, Replay([]).randn_like)
    torch.testing.assert_close(start, upsample_blocks(small.double(), 4), atol=0, rtol=0)


def test_blurring_start_needs_an_image():
    with pytest.raises(ValueError, match="give `previous`"):
        BlurringCorruption(SCHEDULE).start(images(), None, torch.randn_like)


def test_blurring_start_refuses_an_image_that_does_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 2\): its images enlarged 4 times are not of \(2, 3, 8, 12\)"):
        BlurringCorruption(SCHEDULE, block=4).start(images(), torch.zeros(2, 3, 2, 2), torch.randn_like)


def test_published_defaults():
    corruption = BlurringCorruption(SCHEDULE)
    assert (corruption.block, corruption.blur_sigma_max, corruption.min_gain) == (4, 3.0, 0.001)
    assert corruption.block_strength == 0.15


def test_a_first_stage_has_block_one():
    assert GaussianCorruption(LogNormal()).block == 1


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_below_two_is_refused(block):
    with pytest.raises(ValueError, match=f"^block={block}: "):
        BlurringCorruption(SCHEDULE, block)


@pytest.mark.parametrize(
    "settings", [{"blur_sigma_max": -1.0}, {"min_gain": -0.1}, {"min_gain": 1.1}, {"block_strength": -0.1}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}="):
        BlurringCorruption(SCHEDULE, **settings)
