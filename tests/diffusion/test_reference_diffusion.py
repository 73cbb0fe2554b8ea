"""The mathematics against the numbers recorded from the published implementation."""

import pytest
import torch

from relay_diffusion.diffusion import (
    BlurringCorruption,
    DenoisingLoss,
    GaussianCorruption,
    LogNormal,
    TruncatedLogNormal,
)
from relay_diffusion.diffusion.dct import block_dct, block_filter, block_idct
from relay_diffusion.diffusion.noise import block_noise
from relay_diffusion.diffusion.tensors import expand
from support import class_indices, toy_denoiser

BLUR = {"atol": 2e-5, "rtol": 0.0}  # the reference computes its gains in float32
EXACT = {"atol": 1e-9, "rtol": 1e-6}


def corruption_of(v, block_strength=0.15):
    schedule = TruncatedLogNormal(prob_length=float(v["prob_length"]))
    return BlurringCorruption(
        schedule, int(v["block"]), float(v["blur_sigma_max"]), float(v["min_scale"]), block_strength
    )


@pytest.mark.parametrize("name", ["blur_0", "blur_1", "blur_2"])
def test_dct_and_blur(reference, name):
    v = reference(name)
    block = int(v["block"])
    torch.testing.assert_close(block_dct(v["x"], block), v["dct"], **EXACT)
    torch.testing.assert_close(block_idct(v["dct"], block), v["x"], **EXACT)
    w = torch.arange(block, dtype=torch.float64) * torch.pi / block
    tau = v["blur_sigma"].double() ** 2 / 2
    low = float(v["min_scale"])
    gains = (1 - low) * torch.exp(-(w[:, None] ** 2 + w[None, :] ** 2) * tau) + low
    torch.testing.assert_close(block_filter(v["x"], gains), v["blurred"], **BLUR)


@pytest.mark.parametrize("name", ["block_noise_0", "block_noise_1", "block_noise_2"])
def test_block_noise(reference, name):
    v = reference(name)
    torch.testing.assert_close(block_noise(v["white"], int(v["block"])), v["block_noise"], **EXACT)


@pytest.mark.parametrize("name", ["alpha_0", "alpha_1", "alpha_2"])
def test_gains(reference, name):
    v = reference(name)
    gains = corruption_of(v).gains(v["sigma"].double())
    torch.testing.assert_close(gains[:, 0], v["alpha"].double(), **BLUR)


def test_edm_loss(reference):
    v = reference("edm_loss_0")
    sigma = LogNormal().from_normal(v["randn_0"].flatten())
    torch.testing.assert_close(expand(sigma, sigma), v["sigma"], **EXACT)
    noisy = GaussianCorruption(LogNormal()).corrupt(v["images"], sigma, v["randn_1"])
    torch.testing.assert_close(noisy, v["noisy"], **EXACT)
    denoised = toy_denoiser(noisy, sigma, class_indices(v["labels"]))
    torch.testing.assert_close(DenoisingLoss()(denoised, v["images"], sigma), v["loss"], **EXACT)


@pytest.mark.parametrize("name", ["blur_loss_0", "blur_loss_1", "blur_loss_2"])
def test_blurring_loss(reference, name):
    v = reference(name)
    corruption = corruption_of(v, float(v["block_scale"]))
    sigma = corruption.schedule.from_uniform(v["rand_0"].flatten().double())
    torch.testing.assert_close(expand(sigma, sigma), v["sigma"], **EXACT)
    draws = iter([v["randn_0"]] if float(v["block_scale"]) == 0 else [v["randn_1"], v["randn_2"]])
    noise = corruption.draw_noise(v["images"], lambda _: next(draws))
    assert next(draws, None) is None
    noisy = corruption.corrupt(v["images"], sigma, noise)
    torch.testing.assert_close(noisy, v["noisy"], **BLUR)
    # the loss divides by small sigmas: compare it on the recorded noisy images, where the blur plays no part
    denoised = toy_denoiser(v["noisy"], sigma, class_indices(v["labels"]))
    loss = DenoisingLoss(max_weight=1e5)
    torch.testing.assert_close(loss(denoised, v["images"], sigma), v["loss"], **EXACT)
    own = loss(toy_denoiser(noisy, sigma, class_indices(v["labels"])), v["images"], sigma)
    torch.testing.assert_close(own, v["loss"], **BLUR)
