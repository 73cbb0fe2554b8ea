"""Bundled weights remove noise and add detail on held-out images."""

import pytest
import torch

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.diffusion.pixels import to_float
from support import PROJECT


@pytest.fixture(scope="module")
def heldout():
    """Read every eightieth held-out emoji, float [5,3,64,64]."""
    images = ImageDataset(PROJECT / "demo/emoji-64.zip", 64, subset="heldout")
    return to_float(images.batch(range(0, len(images), 80))[0])


@torch.no_grad()
@pytest.mark.parametrize(("sigma", "error"), [(0.1, 0.021), (0.5, 0.046), (2.0, 0.11)])
def test_the_first_stage_removes_noise(heldout, sigma, error):
    """Measured without a prompt: 0.018, 0.040, 0.094. The best multiple of the noisy image has 0.099, 0.43, 0.77."""
    stage = load_stage(PROJECT / "demo/emoji_text_64").eval()
    noise = torch.randn(heldout.shape, generator=torch.Generator().manual_seed(0))
    estimate = stage.denoiser(heldout + sigma * noise, torch.full((len(heldout),), sigma))
    assert (estimate - heldout).square().mean().sqrt() < error


@torch.no_grad()
def test_the_second_stage_adds_detail_to_its_start(heldout):
    """Block means are kept, and detail is added within blocks."""
    stage = load_stage(PROJECT / "demo/emoji_text_256", changes={"sampler": {"steps": 8}}).eval()
    small = heldout[:1]
    large = stage.sample((1, 3, 256, 256), [0], previous=small)
    means = torch.nn.functional.avg_pool2d(large, 4)
    assert (means - small).square().mean().sqrt() < 0.04
    assert (large - means.repeat_interleave(4, -1).repeat_interleave(4, -2)).square().mean().sqrt() > 0.05
