"""Samplers: (denoise, start, randn_like, labels) -> images. Guidance wraps `denoise`; noise is injected."""

from typing import Protocol

from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.samplers.blurring import BlurringSampler
from relay_diffusion.samplers.edm import EDMSampler

__all__ = ["BlurringSampler", "EDMSampler", "Sampler"]


class Sampler(Protocol):
    """What every sampler is: from a start [B,C,H,W] to images [B,C,H,W], with noise from `randn_like` only."""

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image."""

    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """Images of the labels [B] (-1 or None: no class)."""
