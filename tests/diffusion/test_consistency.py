"""Estimates with the block means of the input."""

import pytest
import torch

from relay_diffusion.diffusion import BlurringCorruption, ConditionedCorruption, LinearCorruption, LogNormal
from relay_diffusion.diffusion import TruncatedLogNormal as Truncated
from relay_diffusion.diffusion.consistency import BlockConsistency
from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks
from relay_diffusion.diffusion.guidance import ClassifierFreeGuidance
from relay_diffusion.samplers import BlurringSampler, EDMSampler, MultistepSampler
from support import toy_denoiser

LABELS = torch.tensor([3, 7])
EXACT = {"atol": 1e-12, "rtol": 0}


def images(size=8):
    return torch.randn(2, 3, size, size, dtype=torch.float64)


def level(sigma):
    return torch.full((2,), sigma, dtype=torch.float64)


@pytest.mark.parametrize("block", [2, 4])
def test_block_means_are_those_of_the_input(block):
    small = images(8 // block)
    tied = BlockConsistency(toy_denoiser, small, block)(images(), level(0.4), LABELS)
    torch.testing.assert_close(block_mean(tied, block), small, **EXACT)


def test_a_constant_error_is_corrected_by_a_constant():
    x0 = images()
    tied = BlockConsistency(lambda *_: x0, block_mean(x0, 2) + 0.5, 2)(images(), level(0.4), None)
    torch.testing.assert_close(tied, x0 + 0.5, **EXACT)


def test_corrections_make_no_edges_between_blocks():
    """A ramp is nearly a ramp, where repeated pixels would change by 1/15 between blocks only."""
    ramp = torch.linspace(0, 1, 16, dtype=torch.float64).expand(1, 1, 16, 16)
    tied = BlockConsistency(lambda x, *_: torch.zeros_like(x), ramp, 4)(torch.empty(1, 1, 64, 64), level(0.4), None)
    steps = tied.double().diff(dim=-1)[..., 8:-8]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 60), rtol=0, atol=0.006)


def test_a_consistent_estimate_is_kept():
    x0 = images()
    tied = BlockConsistency(lambda *_: x0, block_mean(x0, 2), 2)(images(), level(0.4), None)
    torch.testing.assert_close(tied, x0, **EXACT)


def test_the_precision_is_that_of_the_estimate():
    estimate = images().float()
    tied = BlockConsistency(lambda *_: estimate, images(4), 2)(images(), level(0.4), None)
    assert tied.dtype == torch.float32


def test_guidance_cannot_move_the_block_means():
    small = images(2)
    tied = BlockConsistency(ClassifierFreeGuidance(toy_denoiser, 5.0), small, 4)(images(), level(0.4), LABELS)
    torch.testing.assert_close(block_mean(tied, 4), small, **EXACT)


@pytest.mark.parametrize(
    "sampler",
    [
        BlurringSampler(BlurringCorruption(Truncated()), steps=14),
        BlurringSampler(LinearCorruption(Truncated()), steps=14),
        MultistepSampler(BlurringCorruption(Truncated()), steps=3, sigma_max=0.6, s_noise=0.2),
        MultistepSampler(LinearCorruption(Truncated()), steps=3, sigma_max=0.6, s_noise=0.2),
        MultistepSampler(ConditionedCorruption(LogNormal()), steps=3),
        EDMSampler(steps=4, churn=1.0),
    ],
    ids=["blurring", "blurring, linear", "multistep", "multistep, linear", "multistep from noise", "edm"],
)
def test_the_images_of_every_sampler_have_the_block_means_of_the_input(sampler):
    small = images(2)
    made = sampler(BlockConsistency(toy_denoiser, small, 4), upsample_blocks(small, 4), torch.randn_like, LABELS)
    torch.testing.assert_close(block_mean(made, 4), small, **EXACT)
    free = sampler(toy_denoiser, upsample_blocks(small, 4), torch.randn_like, LABELS)
    assert (block_mean(free, 4) - small).abs().max() > 0.1
