"""Bundled weights remove noise and add detail on held-out images."""

import pytest
import torch

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.diffusion.pixels import to_float
from support import PROJECT


@pytest.fixture(scope="module")
def heldout():
    """Read every eightieth held-out emoji, float [5,3,64,64], and classes."""
    images = ImageDataset(PROJECT / "demo/emoji-64.zip", 64, subset="heldout")
    chosen, labels = images.batch(range(0, len(images), 80))
    return to_float(chosen), labels


@torch.no_grad()
@pytest.mark.parametrize(("sigma", "error"), [(0.1, 0.023), (0.5, 0.056), (2.0, 0.115)])
def test_the_first_stage_removes_noise(heldout, sigma, error):
    """Measured: 0.020, 0.049 and 0.098. The best multiple of the noisy image has 0.099, 0.43 and 0.77."""
    stage = load_stage(PROJECT / "demo/emoji_64").eval()
    images, labels = heldout
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    estimate = stage.denoiser(images + sigma * noise, torch.full((len(images),), sigma), labels)
    assert (estimate - images).square().mean().sqrt() < error


@torch.no_grad()
def test_the_second_stage_adds_detail_to_its_start(heldout):
    """Block means are kept, and detail is added within blocks."""
    stage = load_stage(PROJECT / "demo/emoji_256", changes={"sampler": {"steps": 8}}).eval()
    small, labels = (part[:1] for part in heldout)
    large = stage.sample((1, 3, 256, 256), [0], labels, small)
    means = torch.nn.functional.avg_pool2d(large, 4)
    assert (means - small).square().mean().sqrt() < 0.04
    assert (large - means.repeat_interleave(4, -1).repeat_interleave(4, -2)).square().mean().sqrt() > 0.05
