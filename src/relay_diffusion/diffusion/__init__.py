"""Mathematics of Relay Diffusion; imports torch only."""

from relay_diffusion.diffusion.corruption import (
    BlurringCorruption,
    ConditionedCorruption,
    Corruption,
    GaussianCorruption,
)
from relay_diffusion.diffusion.dct import block_dct, block_filter, block_idct
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    Denoiser,
    GuidanceInterval,
    check_guidance,
    drop_labels,
    guided,
)
from relay_diffusion.diffusion.loss import DenoisingLoss
from relay_diffusion.diffusion.noise import RandnLike, block_noise
from relay_diffusion.diffusion.schedule import LogNormal, TruncatedLogNormal, karras_sigmas

__all__ = [
    "AutoGuidance",
    "BlurringCorruption",
    "ClassifierFreeGuidance",
    "ConditionedCorruption",
    "Corruption",
    "Denoiser",
    "DenoisingLoss",
    "GaussianCorruption",
    "GuidanceInterval",
    "LogNormal",
    "PerImageGenerator",
    "RandnLike",
    "TruncatedLogNormal",
    "block_dct",
    "block_filter",
    "block_idct",
    "block_noise",
    "check_guidance",
    "drop_labels",
    "guided",
    "karras_sigmas",
]
