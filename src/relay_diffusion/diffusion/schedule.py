"""Noise levels: their distribution in training and the grid for sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SIGMA = 100  # float32 overflows beyond exp(88)
MAX_STEPS = 100_000  # of a sampler: more would only fill the memory


class LogNormal:
    """ln sigma ~ N(p_mean, p_std): the level u in (0, 1) is the probability of a smaller sigma (Karras et al. 2022).

    sigma(u) = exp(p_mean + p_std Phi^-1(u)); level(sigma) is its inverse.
    """

    prob_length: float = 1.0
    level_floor: float = 0.0  # the smallest level in training

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        if not abs(p_mean) <= MAX_LOG_SIGMA:
            raise ValueError(f"p_mean={p_mean}: must lie between -{MAX_LOG_SIGMA} and {MAX_LOG_SIGMA}")
        if not 0 < p_std <= MAX_LOG_SIGMA:
            raise ValueError(f"p_std={p_std}: must be above 0 and at most {MAX_LOG_SIGMA}")
        self.p_mean, self.p_std = float(p_mean), float(p_std)

    def sigma(self, level: Tensor) -> Tensor:
        """Noise standard deviation at a level in (0, 1), any shape."""
        return self.from_normal(torch.special.ndtri(level * self.prob_length))

    def level(self, sigma: Tensor) -> Tensor:
        """Level of a noise standard deviation, any shape."""
        # Phi(z) = erfc(-z / sqrt(2)) / 2: fewer operations than ndtr, and exact digits far below the mean
        return torch.erfc((self.p_mean - sigma.log()) / (self.p_std * math.sqrt(2))) / (2 * self.prob_length)

    def draw(self, size: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Training noise levels sigma [size] from the global random state."""
        normal = torch.randn(size, device=device, dtype=dtype)
        return self.from_normal(normal)

    def from_normal(self, normal: Tensor) -> Tensor:
        """sigma of a standard normal draw: exp(p_mean + p_std normal), any shape."""
        return torch.exp(self.p_mean + self.p_std * normal)


class TruncatedLogNormal(LogNormal):
    """Log-normal truncated at its `prob_length` quantile: a relay stage starts at that noise level.

    sigma(u) = exp(p_mean + p_std Phi^-1(u m)), m = prob_length; level(sigma) = Phi((ln sigma - p_mean)/p_std)/m.
    `sigma_floor` bounds training levels from below by Phi((ln sigma_floor - p_mean)/p_std) * m, as published
    (one would expect a division; the published weights were trained with the product).
    """

    def __init__(
        self, p_mean: float = -1.2, p_std: float = 1.2, prob_length: float = 0.93, sigma_floor: float = 0.0075
    ) -> None:
        super().__init__(p_mean, p_std)
        if not 0 < prob_length < math.inf:
            raise ValueError(f"prob_length={prob_length}: must be positive and finite")
        if not 0 < sigma_floor < math.inf:
            raise ValueError(f"sigma_floor={sigma_floor}: must be positive and finite")
        self.prob_length = float(prob_length)
        below = 0.5 * (1 + math.erf((math.log(sigma_floor) - p_mean) / p_std / math.sqrt(2)))
        if below >= min(self.prob_length, 1.0):
            raise ValueError(
                f"sigma_floor={sigma_floor}: no noise level of p_mean={p_mean}, p_std={p_std} lies above it; lower it "
                "or raise prob_length"
            )
        self.level_floor = below * self.prob_length

    def draw(self, size: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Training noise levels sigma [size] from the global random state."""
        return self.from_uniform(torch.rand(size, device=device, dtype=dtype))

    def from_uniform(self, uniform: Tensor) -> Tensor:
        """sigma of a uniform draw, its level clamped from below, any shape.

        Raises ValueError if prob_length is above 1: sampling may use such a schedule, training has no such noise.
        """
        if self.prob_length > 1:
            raise ValueError(f"prob_length={self.prob_length}: a schedule for training needs at most 1")
        return self.sigma(uniform.clamp(min=self.level_floor))


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels [steps], float64, decreasing from sigma_max to sigma_min (Karras et al. 2022, eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(steps-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    Raises ValueError unless steps is whole and 1 to MAX_STEPS, rho > 0 and 0 < sigma_min < sigma_max, all finite.
    """
    if not isinstance(steps, int):
        raise ValueError(f"steps={steps!r}: must be a whole number")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps}: must lie between 1 and {MAX_STEPS:,}")
    for name, value in (("rho", rho), ("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be positive and finite")
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min={sigma_min}: must be below sigma_max={sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas: Tensor = (high + ramp * (low - high)) ** rho
    return sigmas
