"""Exponential multistep sampler: second order with one network evaluation per step."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import torch
from torch import Tensor

from relay_diffusion.diffusion.corruption import GainCorruption
from relay_diffusion.diffusion.dct import block_filter
from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.diffusion.noise import RandnLike
from relay_diffusion.diffusion.schedule import karras_sigmas
from relay_diffusion.samplers.base import check_start, initial_state, stopped_levels

INTERVALS = 512  # Simpson's rule is exact to 1e-9 for a step over three decades of sigma


class MultistepSampler:
    """Second-order multistep sampler for any corruption with gains A(sigma).

    DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), with the integral of the linear term exact.
    The probability-flow ODE is d(x/sigma) = F[dr] x0^ with r = A/sigma, where F[g] multiplies block DCT coefficients
    by g. With lambda = -ln sigma and x0^ linear in lambda through this and the previous estimate, a step is
        x' = (s/sigma) x + F[A' - (s/sigma) A] x0^ + F[s I] (x0^ - x0^_before) / (lambda - lambda_before)
             + s_noise sigma' noise,    s = sqrt(1 - s_noise^2) sigma',
        I = integral of (t - lambda) dr(t) from lambda to lambda'.
    The first step has no third term; the last estimate is the result. The grid is Karras's: `steps` levels from
    sigma_max, where sampling starts (below 1 in a relay stage), to sigma_min; steps=1 evaluates at sigma_max only.
    """

    def __init__(
        self,
        corruption: GainCorruption,
        steps: int = 10,
        sigma_min: float = 0.008,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        s_noise: float = 0.0,
    ) -> None:
        if not 0 <= s_noise <= 1:
            raise ValueError(f"s_noise={s_noise}: must lie between 0 and 1")
        if not hasattr(corruption, "gains"):
            raise ValueError(f"corruption={type(corruption).__name__}: has no gains; use another sampler")
        self.corruption, self.s_noise = corruption, s_noise
        self._set_levels(karras_sigmas(steps, sigma_min, sigma_max, rho).tolist())
        check_start(f"sigma_max={sigma_max}", corruption.schedule, sigma_max)

    def _set_levels(self, sigmas: list[float]) -> None:
        self.sigmas = sigmas
        self._gains = [self._step_gains(i) for i in range(len(sigmas) - 1)]  # of each step, on the CPU

    def _step_gains(self, i: int) -> Tensor:
        """Compute the gains of both estimates in a step.

        From level i: those of the present and of the previous estimate, float64 [2,1,block,block].
        """
        sigma, sigma_next = self.sigmas[i : i + 2]
        kept = math.sqrt(1 - self.s_noise**2) * sigma_next
        ends = self.corruption.gains(torch.tensor([sigma, sigma_next], dtype=torch.float64, device="cpu"))
        direct = ends[1] - kept / sigma * ends[0]
        if i == 0:
            return torch.stack([direct, torch.zeros_like(direct)])
        slope = kept * self._first_moment(sigma, sigma_next) / math.log(self.sigmas[i - 1] / sigma)
        return torch.stack([direct + slope, -slope])

    def _first_moment(self, sigma: float, sigma_next: float) -> Tensor:
        """Integrate (t - lambda) dr by parts: float64 [1,block,block].

        (lambda' - lambda) r(lambda') minus the integral of r, by Simpson's rule.
        """
        length = math.log(sigma / sigma_next)
        levels = sigma * torch.exp(-torch.linspace(0, length, INTERVALS + 1, dtype=torch.float64, device="cpu"))
        ratios = self.corruption.gains(levels) / levels.view(-1, 1, 1, 1)
        weights = torch.ones_like(levels)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        integral = torch.tensordot(weights, ratios, dims=1) * (length / INTERVALS / 3)
        moment: Tensor = length * ratios[-1] - integral
        return moment

    @property
    def evaluations(self) -> int:
        """Network evaluations for one image (without guidance)."""
        return len(self.sigmas)

    def stopping_at(self, sigma: float) -> MultistepSampler:
        """Return a sampler whose result is its estimate at noise level `sigma`.

        Raises ValueError unless sigma lies in [sigma_min, sigma_max).
        """
        stopped = copy.copy(self)
        stopped._set_levels(stopped_levels(self.sigmas, sigma))
        return stopped

    @torch.no_grad()
    def __call__(self, denoise: Denoiser, start: Tensor, randn_like: RandnLike, labels: Tensor | None = None) -> Tensor:
        """Sample images [B,C,H,W] in the dtype of the state.

        start: from the corruption, [B,C,H,W]; labels [B] or None.
        """
        x = self.corruption.at_level(initial_state(start, labels), self.sigmas[0], randn_like)
        ones = torch.ones(len(x), dtype=torch.float64, device="cpu")  # CPU: no sync for guidance intervals
        before: Tensor | None = None
        for (sigma, sigma_next), gains in zip(pairwise(self.sigmas), self._gains, strict=True):
            present, previous = gains.to(x.device, x.dtype, non_blocking=True)
            denoised = denoise(x, sigma * ones, labels)
            moved = block_filter(denoised, present)
            if before is not None:
                moved += block_filter(before, previous)
            before = denoised.clone()  # a denoiser may write its next answer over this one
            x = moved.add_(x, alpha=math.sqrt(1 - self.s_noise**2) * sigma_next / sigma)
            if self.s_noise:
                x.add_(self.corruption.draw_noise(x, randn_like), alpha=self.s_noise * sigma_next)
        return denoise(x, self.sigmas[-1] * ones, labels).to(x.dtype)
