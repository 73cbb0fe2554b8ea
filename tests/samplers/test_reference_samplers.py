"""Samplers against images of the published implementation from the same noise."""

import pytest
import torch

from relay_diffusion.diffusion import BlurringCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.guidance import ClassifierFreeGuidance
from relay_diffusion.samplers import BlurringSampler, EDMSampler
from support import Replay, class_indices, toy_denoiser


def churn_draws(sampler, draws):
    """Keep the used churn noise: the reference draws it also where it is multiplied by zero."""
    return [d for d, sigma in zip(draws, sampler.sigmas, strict=False) if sampler._gamma(sigma) > 0]


@pytest.mark.parametrize("name", ["edm_sampler_0", "edm_sampler_1", "edm_sampler_2"])
def test_edm_sampler(reference, name):
    v = reference(name)
    sampler = EDMSampler(
        steps=int(v["num_steps"]),
        churn=float(v["S_churn"]),
        churn_min=float(v["S_min"]),
        churn_max=float(v["S_max"]),
        churn_noise=float(v["S_noise"]),
    )
    noise = Replay(churn_draws(sampler, v["draws"]))
    denoise = ClassifierFreeGuidance(toy_denoiser, float(v["cfg_scale"]))
    images = sampler(denoise, v["latents"], noise.randn_like, class_indices(v["labels"]))
    torch.testing.assert_close(images, v["images"], atol=1e-6, rtol=1e-6)
    assert noise.left == 0


def test_celebahq_edm_sampler(reference):
    v = reference("celebahq_edm_sampler_0")
    steps = int(v["num_steps"])
    sampler = EDMSampler(steps=steps, sde_scale=float(v["sde_scale"]))
    # recorded per step: churn (times zero), Euler noise, and before the last step the correction's noise
    used = [i for step in range(steps - 1) for i in (3 * step + 1, 3 * step + 2)]
    noise = Replay(v["draws"][used])
    images = sampler(toy_denoiser, v["latents"], noise.randn_like, class_indices(v["labels"]))
    torch.testing.assert_close(images, v["images"], atol=1e-6, rtol=1e-6)
    assert noise.left == 0


def blurring_sampler(v):
    schedule = TruncatedLogNormal(prob_length=float(v["truncation_t"]))
    corruption = BlurringCorruption(
        schedule, int(v["up_scale"]), float(v["blur_sigma_max"]), block_strength=float(v["s_block"])
    )
    return BlurringSampler(
        corruption,
        steps=int(v["num_steps"]),
        rho=float(v["rho"]),
        truncation_sigma=float(v["truncation_sigma"]),
        s_noise=float(v["s_noise"]),
    )


@pytest.mark.parametrize("name", ["blur_sampler_0", "blur_sampler_1", "blur_sampler_2"])
def test_blurring_sampler(reference, name):
    v = reference(name)
    draws = v["draws"]
    if float(v["s_block"]) == 0 and float(v["s_noise"]) == 0:
        draws = draws[:1]  # the rest is multiplied by zero
    noise = Replay(draws)
    denoise = ClassifierFreeGuidance(toy_denoiser, float(v["cfg_scale"]))
    images = blurring_sampler(v)(denoise, v["upsampled"], noise.randn_like, class_indices(v["labels"]))
    torch.testing.assert_close(images, v["images"], atol=2e-5, rtol=0)
    assert noise.left == 0


def test_celebahq_blurring_sampler(reference):
    v = reference("celebahq_blur_sampler_0")
    sampler = blurring_sampler(v)
    start, rest = list(v["draws"][:2]), list(v["draws"][2:])
    # each step: churn (times zero), then white and block noise of the Euler step and of the correction
    used = [draw for i, draw in enumerate(rest[: 5 * (len(sampler.sigmas) - 1)]) if i % 5]
    noise = Replay(start + used)
    images = sampler(toy_denoiser, v["upsampled"], noise.randn_like, class_indices(v["labels"]))
    torch.testing.assert_close(images, v["images"], atol=2e-5, rtol=0)
    assert noise.left == 0
