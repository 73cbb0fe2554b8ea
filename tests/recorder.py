"""A denoiser that keeps what the sampler asked it."""

from __future__ import annotations

from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser


class Recorder:
    """Passes on to a denoiser and keeps the states, noise levels, labels and estimates of all calls."""

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise
        self.states: list[Tensor] = []
        self.sigmas: list[Tensor] = []
        self.labels: list[Tensor | None] = []
        self.estimates: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        self.states.append(x)
        self.sigmas.append(sigma)
        self.labels.append(labels)
        self.estimates.append(self.denoise(x, sigma, labels))
        return self.estimates[-1]
