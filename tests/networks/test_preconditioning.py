"""EDM preconditioning of a fake network against its closed form."""

import pytest
import torch
from torch import nn

from relay_diffusion.diffusion.guidance import ClassifierFreeGuidance
from relay_diffusion.networks import Condition, Conditioned, EDMPreconditioner


class Fake(nn.Module):
    """Fake UNet that records its inputs and returns a constant."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x, noise, labels, augment_labels, condition_level=None, text=None):
        self.given = x, noise, labels, augment_labels, condition_level, text
        return torch.full_like(x[:, :3], self.value)


SIGMA = torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=torch.float64)


def image_like(value):
    """Expand values [B] to constant images [B,3,2,2], float32."""
    return value.float()[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_output_is_skip_and_scaled_network(sigma_data):
    x, total = torch.randn(4, dtype=torch.float64), SIGMA**2 + sigma_data**2
    denoised = EDMPreconditioner(Fake(3.0), sigma_data)(image_like(x), SIGMA)
    expected = sigma_data**2 / total * x + SIGMA * sigma_data / total.sqrt() * 3.0
    torch.testing.assert_close(denoised, image_like(expected))


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_network_sees_scaled_images_and_a_quarter_of_the_log_noise(sigma_data):
    x, network = torch.randn(4, dtype=torch.float64), Fake()
    EDMPreconditioner(network, sigma_data)(image_like(x), SIGMA)
    scaled, noise = network.given[:2]
    torch.testing.assert_close(scaled, image_like(x / (SIGMA**2 + sigma_data**2).sqrt()))
    torch.testing.assert_close(noise, (SIGMA.log() / 4).float())


def test_labels_reach_the_network():
    network, labels, augment = Fake(), torch.tensor([1, -1, 0, 2]), torch.randn(4, 9)
    EDMPreconditioner(network)(torch.zeros(4, 3, 2, 2), SIGMA, labels, augment)
    assert network.given[2] is labels
    assert network.given[3] is augment


def test_a_condition_is_scaled_by_its_own_noise_level():
    x, images, level = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.1, 0.5, 2.0])
    network = Fake()
    EDMPreconditioner(network)(x, SIGMA, condition=Condition(images, level))
    seen = network.given[0]
    EDMPreconditioner(network)(x, SIGMA)
    torch.testing.assert_close(seen[:, :3], network.given[0], rtol=0, atol=0)  # the noisy image is as without
    torch.testing.assert_close(seen[:, 3:], images / (level**2 + 0.25).sqrt()[:, None, None, None])
    EDMPreconditioner(network)(x, SIGMA, condition=Condition(images, level))
    assert torch.equal(network.given[4], level)


def test_one_condition_serves_a_batch_that_guidance_has_doubled():
    def forward(x, sigma, labels, augment_labels, condition, text=None):
        assert augment_labels is text is None
        return x + 10 * condition.images + (condition.level + sigma + labels)[:, None, None, None]

    condition = Condition(torch.randn(2, 3, 2, 2), torch.tensor([0.1, 0.3]))
    x, sigma, labels = torch.randn(2, 3, 2, 2), torch.tensor([1.0, 2.0]), torch.tensor([4, 5])
    guided = ClassifierFreeGuidance(Conditioned(forward, condition), 2.0)(x, sigma, labels)
    with_class, without = (forward(x, sigma, given, None, condition) for given in (labels, torch.tensor([-1, -1])))
    torch.testing.assert_close(guided, without + 2 * (with_class - without))


def test_double_precision_images_are_estimated_in_single_precision():
    denoised = EDMPreconditioner(Fake())(torch.ones(4, 3, 2, 2, dtype=torch.float64), SIGMA)
    assert denoised.dtype == torch.float32
