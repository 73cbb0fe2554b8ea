"""Recording of a sampler's intermediate states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.utils.resolution import Size

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


class TrajectoryRecorder:
    """Observer of a sampler that records its intermediate states.

    `steps`: the first `count` images of one batch. If the sampler returns to a noise level (a second-order step
    looks ahead to the next one, churn raises it again), the last evaluation counts. Recorded images are averaged down
    to at most `size`, (height, width).
    """

    def __init__(self, count: int, size: Size) -> None:
        self.count, self.size = count, size
        self.steps: list[Step] = []

    def __call__(self, x: Tensor, sigma: Tensor, estimates: Tensor) -> None:
        """Record an evaluation: x and estimates [B,C,H,W], sigma [B]."""
        level = float(sigma[0])  # samplers pass it on the CPU, with the same value for all images
        while self.steps and self.steps[-1].sigma <= level:
            self.steps.pop()
        state = shown_state(x[: self.count], level)
        self.steps.append(Step(level, self._picture(state), self._picture(estimates)))

    def finish(self, images: Tensor) -> list[Step]:
        """Return the steps, with the images [B,C,H,W] as the last one.

        Its sigma is 0. The next batch starts anew.
        """
        result = self._picture(images)
        steps, self.steps = [*self.steps, Step(0.0, result, result)], []
        return steps

    def _picture(self, images: Tensor) -> Tensor:
        images = images[: self.count].float()
        if images.shape[-1] > self.size[-1]:
            images = F.adaptive_avg_pool2d(images, self.size)
        return to_uint8(images).cpu()


def joined(first: list[Step], second: list[Step]) -> list[Step]:
    """Concatenate the steps of two calls along the batch."""
    return [
        Step(a.sigma, torch.cat([a.states, b.states]), torch.cat([a.estimates, b.estimates]))
        for a, b in zip(first, second, strict=True)
    ]
