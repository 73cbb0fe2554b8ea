"""Relay sampler, from the upsampled image along the gains of the corruption."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from relay_diffusion.diffusion.corruption import GainCorruption
from relay_diffusion.diffusion.dct import block_filter
from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.schedule import karras_sigmas
from relay_diffusion.samplers.base import check_start, initial_state, second_order


class BlurringSampler:
    """Second-order sampler that restores detail and denoises (Teng et al. 2024, algorithm 1).

    With gamma = sqrt(1 - s_noise^2) sigma'/sigma, gains A(sigma) and F[g] = multiplication of block DCT
    coefficients by g:  x' = gamma x + F[A' - gamma A] x0^ + s_noise sigma' noise.
    Noise levels are those of Karras's grid below `truncation_sigma`, at which little more than the block means remains.
    Raises ValueError for an option out of range, and if fewer than two noise levels are left.
    """

    starts_from_noise = False

    def __init__(
        self,
        corruption: GainCorruption,
        steps: int = 40,
        sigma_min: float = 0.008,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        truncation_sigma: float = 0.9,
        s_noise: float = 0.2,
    ) -> None:
        if not 0 <= s_noise <= 1:
            raise ValueError(f"s_noise={s_noise}: must lie between 0 and 1")
        grid = karras_sigmas(steps, sigma_min, sigma_max, rho).tolist()
        self.sigmas = [sigma for sigma in grid if sigma < truncation_sigma]
        if len(self.sigmas) < 2:
            raise ValueError(
                f"truncation_sigma={truncation_sigma}: only {len(self.sigmas)} of {steps} noise levels lie below it "
                f"(sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}); raise steps or truncation_sigma"
            )
        check_start(f"truncation_sigma={truncation_sigma}", corruption.schedule, self.sigmas[0])
        self.corruption, self.s_noise = corruption, s_noise

    @property
    def evaluations(self) -> int:
        """Network evaluations per image (without guidance)."""
        return 2 * len(self.sigmas) - 1

    @torch.no_grad()
    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """Sample images [B,C,H,W] in the dtype of the state.

        start: upsampled images [B,C,H,W] in [-1, 1]; labels [B] or None.
        """
        x = initial_state(start, labels)
        x = self.corruption.at_level(x, self.sigmas[0], randn_like)
        ones = torch.ones(len(x), dtype=torch.float64, device="cpu")  # on the CPU, guidance intervals need no sync
        gains = self.corruption.gains(x.new_tensor(self.sigmas))[:, None]  # all levels: [levels,1,1,s,s]
        for level, (sigma, sigma_next) in enumerate(pairwise(self.sigmas)):
            gamma = math.sqrt(1 - self.s_noise**2) * sigma_next / sigma
            filter_gains = gains[level + 1] - gamma * gains[level]
            scales = gamma, filter_gains, self.s_noise * sigma_next
            denoised = denoise(x, sigma * ones, labels)
            proposal = self._step(x, denoised, *scales, randn_like)
            both = x + denoised  # before the next evaluation, which may reuse this memory
            residual = proposal - denoise(proposal, sigma_next * ones, labels)
            del proposal  # images may be large
            x = self._step(x, second_order(both, residual, sigma / sigma_next), *scales, randn_like)
        return denoise(x, self.sigmas[-1] * ones, labels).to(x.dtype)

    def _step(
        self, x: Tensor, denoised: Tensor, gamma: float, filter_gains: Tensor, noise: float, randn_like: RandnLike
    ) -> Tensor:
        moved = block_filter(denoised, filter_gains).add_(x, alpha=gamma)
        return moved.add_(self.corruption.draw_noise(x, randn_like), alpha=noise) if noise else moved
