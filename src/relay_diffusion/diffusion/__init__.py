"""Mathematics of Relay Diffusion; imports torch only."""

from relay_diffusion.diffusion.corruption import BlurringCorruption, ConditionedCorruption, GaussianCorruption
from relay_diffusion.diffusion.linear import LinearCorruption
from relay_diffusion.diffusion.loss import DenoisingLoss
from relay_diffusion.diffusion.schedule import LogNormal, TruncatedLogNormal

__all__ = [  # classes that configs name
    "BlurringCorruption",
    "ConditionedCorruption",
    "DenoisingLoss",
    "GaussianCorruption",
    "LinearCorruption",
    "LogNormal",
    "TruncatedLogNormal",
]
