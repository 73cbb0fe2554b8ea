"""Denoising loss and its weight."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.tensors import expand


class DenoisingLoss:
    """Weighted denoising loss: weight(sigma) (D(x) - x0)^2.

    weight = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1/sigma^2 + 1/sigma_data^2, at most max_weight. It undoes
    the preconditioner's c_out^2, so every noise level has the same weight (Karras et al. 2022, table 1).
    The relay stage limits it to 1e5, as published. Raises ValueError for an option out of range.
    """

    def __init__(self, sigma_data: float = 0.5, max_weight: float = math.inf) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data={sigma_data}: must be positive and finite")
        if not max_weight >= 0:
            raise ValueError(f"max_weight={max_weight}: must be at least 0")
        self.sigma_data, self.max_weight = sigma_data, max_weight

    def weight(self, sigma: Tensor) -> Tensor:
        """Compute the loss weight of noise level sigma, any shape."""
        return (sigma**-2 + self.sigma_data**-2).clamp(max=self.max_weight)

    def __call__(self, denoised: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Compute the loss of each element.

        denoised and x0 [B,C,H,W], sigma [B] -> [B,C,H,W].
        """
        return F.mse_loss(denoised, x0, reduction="none").mul_(expand(self.weight(sigma), denoised))
