"""A conditioned cascade: noise alone is added, and the network sees the small image (Ho et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.corruption import GaussianCorruption, block_mean, check_images, expand
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.schedule import LogNormal


class ConditionedCorruption(GaussianCorruption):
    """White noise, x_sigma = x0 + sigma eps; beside it a condition, the small image with noise of its own, enlarged.

    y = bicubic(block_mean(x0) + level eps'), level ~ U(0, condition_noise_max) for each training image, and
    condition_noise in sampling: conditioning augmentation (Ho et al. 2021, arXiv 2106.15282, section 4), which hides
    from the network that small images are samples and not block means. Levels are standard deviations, like sigma.
    """

    def __init__(
        self, schedule: LogNormal, block: int = 4, condition_noise_max: float = 0.5, condition_noise: float = 0.1
    ) -> None:
        super().__init__(schedule)
        if block < 2:
            raise ValueError(f"block is {block}: a cascade's later stage enlarges its input at least twice")
        if not 0 <= condition_noise <= condition_noise_max:
            raise ValueError(
                f"condition_noise={condition_noise} must lie between 0 and condition_noise_max={condition_noise_max}, "
                "the most that is seen in training"
            )
        self.block = block
        self.condition_noise_max, self.condition_noise = condition_noise_max, condition_noise

    def start(self, like: Tensor, previous: Tensor | None, randn_like: RandnLike) -> Tensor:
        """Where sampling starts: unit noise like `like` [B,C,H,W], as in a first stage.

        Raises ValueError if `previous` [B,C,H/block,W/block], which becomes the condition, is missing or does not fit.
        """
        if previous is None:
            raise ValueError("a conditioned stage sees the images of the stage before: give `previous`")
        check_images("previous", previous)
        height, width = (size * self.block for size in previous.shape[2:])
        if (*previous.shape[:2], height, width) != tuple(like.shape):
            raise ValueError(
                f"images of {tuple(previous.shape)} enlarged {self.block} times are not of {tuple(like.shape)}"
            )
        return randn_like(like)

    def draw_condition_levels(self, size: int) -> Tensor:
        """Training noise levels of the condition [size] from the global random state, on the CPU."""
        return torch.rand(size, device="cpu") * self.condition_noise_max

    def small(self, x0: Tensor) -> Tensor:
        """What a perfect stage before would hand over: x0 [B,C,H,W] -> block means [B,C,H/block,W/block]."""
        return block_mean(x0, self.block)

    def condition(self, small: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """small and unit noise [B,C,h,w], level [B] (may lie on the CPU) -> noisy and enlarged [B,C,h*block,w*block].

        Bicubic with a = -0.75 and half-pixel centres, as torch.nn.functional.interpolate computes it.
        """
        noisy = torch.addcmul(small, expand(level, small), noise)
        return F.interpolate(noisy, scale_factor=self.block, mode="bicubic", align_corners=False)
