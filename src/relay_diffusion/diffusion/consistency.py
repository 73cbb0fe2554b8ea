"""Consistency with the input, as a wrapper of a denoiser."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks
from relay_diffusion.diffusion.guidance import Denoiser

ROUNDS = 4  # leave 3 % of an error without correlation between blocks


class BlockConsistency:
    """Denoiser with the block means of a small image.

    The error of the block means is enlarged bicubically and added, several times (iterative back-projection, Irani and
    Peleg 1991, doi 10.1016/1049-9652(91)90045-L), so that blocks get no visible edges. The rest, constant in each
    block, makes the block means exact.

    small: block means [B,C,H/block,W/block].
    """

    def __init__(self, denoise: Denoiser, small: Tensor, block: int) -> None:
        self.denoise, self.small, self.block = denoise, small, block

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the consistent estimate [B,C,H,W].

        x [B,C,H,W], sigma [B], labels [B] or None.
        """
        estimate = self.denoise(x, sigma, labels)
        for _ in range(ROUNDS):
            error = self._error(estimate)
            estimate = estimate + F.interpolate(error, size=estimate.shape[-2:], mode="bicubic", align_corners=False)
        return estimate + upsample_blocks(self._error(estimate), self.block)

    def _error(self, estimate: Tensor) -> Tensor:
        return self.small.to(estimate) - block_mean(estimate, self.block)
