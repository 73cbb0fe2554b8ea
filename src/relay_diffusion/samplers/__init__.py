"""Samplers: (denoise, start, randn_like, labels) -> images.

Guidance wraps `denoise`; noise is injected.
"""

from relay_diffusion.samplers.base import Sampler
from relay_diffusion.samplers.blurring import BlurringSampler
from relay_diffusion.samplers.edm import EDMSampler

__all__ = ["BlurringSampler", "EDMSampler", "Sampler"]
