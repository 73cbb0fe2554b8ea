"""Record a sampler's intermediate states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.samplers import Sampler

SIGMA_DATA = 0.5  # standard deviation of images, as EDM takes it


class Step(NamedTuple):
    """A noise level, the noisy states there and the estimates of the clean images, both uint8 [B,C,h,w] on the CPU."""

    sigma: float
    states: Tensor
    estimates: Tensor


def shown_state(x: Tensor, sigma: float) -> Tensor:
    """A state at noise level sigma, scaled to the spread of images: x sd / sqrt(sd^2 + sigma^2), sd = 0.5.

    So noise is seen as noise at any level (two standard deviations fit into [-1, 1]), and at level 0 the state is
    the image itself.
    """
    scale: float = SIGMA_DATA / (SIGMA_DATA**2 + sigma**2) ** 0.5
    return x * scale


class RecordingSampler:
    """A sampler that makes the same images and keeps the `steps` of the first `count` of its last call.

    A level that the sampler comes back to (a second-order step looks ahead to the next one, churn raises it again)
    is kept as it was left. The last step is sigma = 0, where states and estimates are the images. Kept pictures are
    at most `side` pixels wide: larger ones are averaged.
    """

    def __init__(self, sampler: Sampler, count: int, side: int) -> None:
        self.sampler, self.count, self.side = sampler, count, side
        self.steps: list[Step] = []

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image (without guidance)."""
        return self.sampler.evaluations

    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """The sampler's images of `start` [B,C,H,W]."""
        steps: list[Step] = []
        self.steps = steps

        def recording(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            estimates = denoise(x, sigma, labels)
            level = float(sigma[0])  # samplers give it on the CPU, and the same for all images
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
