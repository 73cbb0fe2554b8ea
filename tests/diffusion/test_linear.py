"""The straight line from an image to its block means."""

import math

import pytest
import torch

from relay_diffusion.diffusion import LinearCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks

SCHEDULE = TruncatedLogNormal()


def images(batch=2, height=12, width=24):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("block", [2, 3, 4, 12])
def test_the_state_lies_on_the_line_from_the_image_to_its_block_means(block):
    corruption, x0, u = LinearCorruption(SCHEDULE, block), images(3), levels(0.1, 0.6, 0.95)
    state = corruption.corrupt(x0, SCHEDULE.sigma(u), torch.zeros_like(x0))
    means = upsample_blocks(block_mean(x0, block), block)
    torch.testing.assert_close(state, torch.lerp(x0, means, u.view(3, 1, 1, 1)), atol=1e-12, rtol=0)


def test_gains_by_hand_at_half_the_level():
    schedule = TruncatedLogNormal(-1.2, 1.2, prob_length=1.0)  # the median exp(p_mean) has level 1/2
    gains = LinearCorruption(schedule, block=3).gains(levels(math.exp(-1.2), 1e-9))
    half = torch.full((3, 3), 0.5, dtype=torch.float64)
    half[0, 0] = 1
    assert gains.shape == (2, 1, 3, 3)
    torch.testing.assert_close(gains[0, 0], half, atol=1e-12, rtol=0)
    torch.testing.assert_close(gains[1, 0], torch.ones_like(half), atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", [2, 4])
def test_the_end_state_is_the_upsampled_image_plus_noise(block):
    corruption, x0, end = LinearCorruption(SCHEDULE, block), images(), SCHEDULE.sigma(levels(1.0))
    noise = corruption.draw_noise(x0, torch.randn_like)
    start = corruption.start(x0, block_mean(x0, block), torch.randn_like)
    expected = start + end * noise
    torch.testing.assert_close(corruption.corrupt(x0, end.expand(2), noise), expected, atol=1e-12, rtol=0)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"^block=1: "):
        LinearCorruption(SCHEDULE, 1)
    with pytest.raises(ValueError, match=r"^block_strength=-0\.1: "):
        LinearCorruption(SCHEDULE, block_strength=-0.1)
