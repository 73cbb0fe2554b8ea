"""Recording of a sampler's intermediate states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.samplers import Sampler

SIGMA_DATA = 0.5  # standard deviation of images, as in EDM


class Step(NamedTuple):
    """Noisy states and clean estimates at one noise level.

    Both uint8 [B,C,h,w] on the CPU.
    """

    sigma: float
    states: Tensor
    estimates: Tensor


def shown_state(x: Tensor, sigma: float) -> Tensor:
    """Scale a state at noise level sigma to the range of images.

    x sd / sqrt(sd^2 + sigma^2), sd = 0.5: two standard deviations of the noise fit into [-1, 1] at any level, and at
    level 0 the state is the image itself.
    """
    scale: float = SIGMA_DATA / (SIGMA_DATA**2 + sigma**2) ** 0.5
    return x * scale


class RecordingSampler:
    """Wrapper of a sampler that records its intermediate states.

    `steps`: the first `count` images of the latest call. If the sampler returns to a noise level (a second-order step
    looks ahead to the next one, churn raises it again), the last evaluation counts. The last step is sigma = 0, where
    states and estimates are the images. Recorded images are averaged down to at most `side` pixels.
    """

    def __init__(self, sampler: Sampler, count: int, side: int) -> None:
        self.sampler, self.count, self.side = sampler, count, side
        self.steps: list[Step] = []

    @property
    def evaluations(self) -> int:
        """Network evaluations per image (without guidance)."""
        return self.sampler.evaluations

    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """Sample images of `start` [B,C,H,W] and record the steps."""
        steps: list[Step] = []
        self.steps = steps

        def recording(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            estimates = denoise(x, sigma, labels)
            level = float(sigma[0])  # samplers pass it on the CPU, with the same value for all images
            while steps and steps[-1].sigma <= level:
                steps.pop()
            steps.append(Step(level, self._picture(shown_state(x[: self.count], level)), self._picture(estimates)))
            return estimates

        images = self.sampler(recording, start, randn_like, labels)
        result = self._picture(images)
        steps.append(Step(0.0, result, result))
        return images

    def _picture(self, images: Tensor) -> Tensor:
        images = images[: self.count].float()
        if images.shape[-1] > self.side:
            images = F.adaptive_avg_pool2d(images, self.side)
        return to_uint8(images).cpu()


def joined(first: list[Step], second: list[Step]) -> list[Step]:
    """Concatenate the steps of two calls along the batch."""
    return [
        Step(a.sigma, torch.cat([a.states, b.states]), torch.cat([a.estimates, b.estimates]))
        for a, b in zip(first, second, strict=True)
    ]
