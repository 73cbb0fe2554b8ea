"""Samplers: (denoise, start, randn_like, labels) -> images.

Guidance wraps `denoise`; noise is injected.
"""

from relay_diffusion.samplers.base import Sampler
from relay_diffusion.samplers.blurring import BlurringSampler
from relay_diffusion.samplers.edm import EDMSampler
from relay_diffusion.samplers.multistep import MultistepSampler

__all__ = ["BlurringSampler", "EDMSampler", "MultistepSampler", "Sampler"]
