"""EDM's second-order sampler with churn and the relay paper's SDE scale.

Karras et al. 2022, algorithm 2.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.schedule import karras_sigmas
from relay_diffusion.samplers.base import ROUNDING, initial_state, second_order, stopped_levels


class EDMSampler:
    """Second-order sampler from unit noise along Karras's grid (Karras et al. 2022).

    `churn`: each step first adds noise that raises sigma by a factor 1 + min(churn / steps, sqrt(2) - 1), where
    churn_min <= sigma <= churn_max; `churn_noise` scales that noise. `sde_scale` (eta): after each step
    x' = gamma x + (1 - gamma) x0^ + eta sigma' eps with gamma = sqrt(1 - eta^2) sigma'/sigma; 0 is the ODE.
    Raises ValueError for an option out of range.
    """

    starts_from_noise = True

    def __init__(
        self,
        steps: int = 18,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        sde_scale: float = 0.0,
    ) -> None:
        for name, value in (("churn", churn), ("churn_min", churn_min), ("churn_max", churn_max)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if not math.isfinite(churn_noise):
            raise ValueError(f"churn_noise={churn_noise}: must be a finite number")
        if not 0 <= sde_scale <= 1:
            raise ValueError(f"sde_scale={sde_scale}: must lie between 0 and 1")
        self.sigmas: list[float] = [*karras_sigmas(steps, sigma_min, sigma_max, rho).tolist(), 0.0]
        self.churn, self.churn_min, self.churn_max = churn / steps, churn_min, churn_max
        self.churn_noise, self.sde_scale = churn_noise, sde_scale

    @property
    def evaluations(self) -> int:
        """Network evaluations per image (without guidance)."""
        return 2 * (len(self.sigmas) - 1) - 1

    def stopping_at(self, sigma: float) -> EDMSampler:
        """Return a sampler that stops at `sigma` and returns its estimate.

        Raises ValueError unless sigma lies in [sigma_min, sigma_max).
        """
        stopped = copy.copy(self)
        stopped.sigmas = [*stopped_levels(self.sigmas[:-1], sigma), 0.0]
        stopped.churn_min = max(self.churn_min, sigma * ROUNDING)  # no churn before the last estimate
        return stopped

    def _gamma(self, sigma: float) -> float:
        inside = self.churn_min <= sigma <= self.churn_max
        return min(self.churn, math.sqrt(2) - 1) if inside else 0.0

    @torch.no_grad()
    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """Sample images [B,C,H,W] in the dtype of the state.

        start: unit-variance noise [B,C,H,W]; labels [B] or None.
        """
        x = initial_state(start, labels) * self.sigmas[0]
        ones = torch.ones(len(x), dtype=torch.float64, device="cpu")  # on the CPU, guidance intervals need no sync
        for sigma, sigma_next in zip(self.sigmas, self.sigmas[1:], strict=False):
            gamma = self._gamma(sigma)
            sigma_hat = sigma * (1 + gamma)
            if gamma > 0:
                x = torch.add(x, randn_like(x), alpha=math.sqrt(sigma_hat**2 - sigma**2) * self.churn_noise)
            denoised = denoise(x, sigma_hat * ones, labels)
            proposal = self._step(x, denoised, sigma_hat, sigma_next, randn_like)
            if sigma_next == 0:
                return proposal
            both = x + denoised  # before the next evaluation, which may reuse this memory
            residual = proposal - denoise(proposal, sigma_next * ones, labels)
            x = self._step(x, second_order(both, residual, sigma_hat / sigma_next), sigma_hat, sigma_next, randn_like)
        return x

    def _step(self, x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, randn_like: RandnLike) -> Tensor:
        gamma = math.sqrt(1 - self.sde_scale**2) * sigma_next / sigma
        moved = (gamma * x).add_(denoised, alpha=1 - gamma)
        if self.sde_scale == 0 or sigma_next == 0:
            return moved
        return moved.add_(randn_like(x), alpha=self.sde_scale * sigma_next)
