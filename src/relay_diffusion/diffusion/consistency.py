"""Consistency with the input, as a wrapper of a denoiser."""

from __future__ import annotations

from torch import Tensor

from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks
from relay_diffusion.diffusion.guidance import Denoiser


class BlockConsistency:
    """Denoiser with the block means of a small image.

    D - up(mean(D)) + up(z) is the image nearest to the estimate D that has the block means z.

    small: z [B,C,H/block,W/block].
    """

    def __init__(self, denoise: Denoiser, small: Tensor, block: int) -> None:
        self.denoise, self.small, self.block = denoise, small, block

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the consistent estimate [B,C,H,W].

        x [B,C,H,W], sigma [B], labels [B] or None.
        """
        estimate = self.denoise(x, sigma, labels)
        difference = self.small.to(estimate) - block_mean(estimate, self.block)
        return estimate + upsample_blocks(difference, self.block)
