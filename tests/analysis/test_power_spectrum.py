"""Power by frequency: exact values for the DCT, white noise, block noise and box averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from relay_diffusion.analysis.spectrum import (
    block_power,
    matching_factors,
    mixed_power,
    ring_means,
    rings,
    summed_power,
)
from relay_diffusion.diffusion import BlurringCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.dct import block_idct
from relay_diffusion.diffusion.noise import block_noise

EXACT = {"rtol": 0, "atol": 1e-12}


def impulses(side: int) -> Tensor:
    """All unit images [side^2, 1, side, side].

    Sent through a linear map L, they give the power of L(white noise)
    exactly: E[(M L w)_i^2] is the sum of (M L)_ij^2 over j, so summed over these images."""
    return torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)


def test_mean_power_is_the_mean_squared_pixel() -> None:
    images = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    power = summed_power(images) / 15
    torch.testing.assert_close(power.mean(), images.square().mean(), **EXACT)
    coefficients = torch.bincount(rings(12).flatten())
    torch.testing.assert_close((ring_means(power) * coefficients).sum(), images.square().mean() * 144, **EXACT)


def test_a_wave_is_one_coefficient_at_its_frequency() -> None:
    position = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    wave = torch.cos(2 * math.pi * 3 * position).expand(1, 1, 16, 16)  # three cycles in the image
    power = summed_power(wave)
    assert power.argmax() == 6
    torch.testing.assert_close(power[0, 6], torch.tensor(16 * 16 / 2, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(ring_means(power)[6] * (rings(16) == 6).sum(), power.sum(), **EXACT)


def test_rings_are_distances_and_none_is_empty() -> None:
    for side in range(1, 40):
        ring = rings(side)
        assert torch.equal(ring[0], torch.arange(side))
        assert torch.equal(ring, ring.T)
        assert torch.bincount(ring.flatten()).min() > 0
    assert (rings(8)[3, 4], rings(8)[4, 4], rings(8)[1, 1]) == (5, 6, 1)  # 5, 5.66, 1.41


def test_white_noise_is_flat() -> None:
    torch.testing.assert_close(summed_power(impulses(9)), torch.ones(9, 9, dtype=torch.float64), **EXACT)
    drawn = summed_power(2 * torch.randn(4000, 1, 8, 8)) / 4000
    assert (drawn / 4 - 1).abs().max() < 5 * math.sqrt(2 / 4000)  # chi-squared of 4000 degrees of freedom


@pytest.mark.parametrize(("side", "block"), [(8, 1), (8, 2), (8, 4), (12, 3), (9, 5), (10, 10)])
def test_block_noise_equals_that_of_the_diffusion(side: int, block: int) -> None:
    torch.testing.assert_close(summed_power(block_noise(impulses(side), block)), block_power(side, block), **EXACT)


def test_mixed_noise_is_that_of_a_relay_stage() -> None:
    corruption = BlurringCorruption(TruncatedLogNormal(), block=4, block_strength=0.15)
    units, nothing = impulses(8), torch.zeros(64, 1, 8, 8, dtype=torch.float64)
    draws = iter([torch.cat([units, nothing]), torch.cat([nothing, units])])  # of two independent white noises
    noise = corruption.draw_noise(torch.cat([nothing, nothing]), lambda _: next(draws))
    torch.testing.assert_close(summed_power(noise), mixed_power(8, 4, 0.15), **EXACT)
    torch.testing.assert_close(mixed_power(8, 4, 0.15).mean().item(), 1 + 0.15**2)


@pytest.mark.parametrize(("side", "block"), [(16, 2), (16, 4), (15, 3), (12, 5), (12, 12)])
def test_block_noise_in_closed_form(side: int, block: int) -> None:
    """Even k follow the box's Dirichlet kernel; odd k are not periodic."""

    def even(k: int) -> float:
        x = math.pi * k / (2 * side)
        return (math.sin(block * x) / math.sin(x)) ** 2 / block

    def odd(k: int) -> float:
        w = math.pi * k / side
        correlation = [
            ((side - 2 * d) * math.cos(w * d) - 2 * math.sin(w * d) / math.sin(w)) / side for d in range(block)
        ]
        return 1 + 2 * sum((block - d) / block * correlation[d] for d in range(1, block))

    along = [float(block), *((odd if k % 2 else even)(k) for k in range(1, side))]
    expected = torch.tensor(along, dtype=torch.float64)
    power = block_power(side, block)
    torch.testing.assert_close(power, expected[:, None] * expected[None, :], **EXACT)
    torch.testing.assert_close(power.mean().item(), 1.0)  # unit variance


@pytest.mark.parametrize("block", [0, 9])
def test_block_must_fit(block: int) -> None:
    with pytest.raises(ValueError, match=f"block={block}: must be 1 to 8"):
        block_power(8, block)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_box_average_divides_white_sigma_by_its_factor(factor: int) -> None:
    averaged = summed_power(block_mean(impulses(12), factor))
    torch.testing.assert_close(averaged, torch.full_like(averaged, 1 / factor**2), **EXACT)


@pytest.mark.parametrize("factor", [2, 4])
def test_matching_factor_is_the_ratio_of_resolutions_at_low_frequencies(factor: int) -> None:
    """The factor for waves along one axis is factor / g_k.

    g_k: gain of the box average at wave k; g_0 = 1.
    """
    side = 16 * factor
    coefficients = torch.zeros(1, 1, side, side, dtype=torch.float64)
    coefficients[0, 0, 0, :16] = torch.rand(16, dtype=torch.float64) + 1
    waves = block_idct(coefficients, side)
    small, large = summed_power(block_mean(waves, factor)), summed_power(waves)
    angle = torch.arange(1, 16, dtype=torch.float64) * math.pi / (2 * side)
    gain = torch.cat([torch.ones(1, dtype=torch.float64), (factor * angle).sin() / (factor * angle.sin())])
    factors = matching_factors(ring_means(small), ring_means(large))[:16]
    torch.testing.assert_close(factors, factor / gain, rtol=1e-10, atol=0)
    assert (factors[:4] / factor - 1).abs().max() < 0.02
