"""Straight line from an image to its block means."""

from __future__ import annotations

from torch import Tensor

from relay_diffusion.diffusion.corruption import BlockCorruption


class LinearCorruption(BlockCorruption):
    """Interpolation between image and block means, with noise (CogView3, arXiv 2403.05121).

    x_u = (1 - u) x0 + u up(mean(x0)) + sigma(u) noise: the gain of the mean is 1, all others are A_kl(u) = 1 - u.
    """

    def level_gains(self, level: Tensor) -> Tensor:
        """Compute the gains at level u: [B] -> [B,1,block,block]."""
        gains = (1 - level).view(-1, 1, 1, 1).repeat(1, 1, self.block, self.block)
        gains[..., 0, 0] = 1
        return gains
