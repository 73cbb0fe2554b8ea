"""Noise levels: their distribution in training and the grid for sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SIGMA = 100  # float32 overflows beyond exp(88)
MAX_STEPS = 100_000  # of a sampler; more would exhaust the memory


class LogNormal:
    """Log-normal noise levels: ln sigma ~ N(p_mean, p_std) (Karras et al. 2022).

    The level u in (0, 1) is the probability of a smaller sigma: sigma(u) = exp(p_mean + p_std Phi^-1(u)), and
    level(sigma) is its inverse. Raises ValueError for an option out of range.
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
        """Compute the noise standard deviation at a level in (0, 1).

        Any shape.
        """
        return self.from_normal(torch.special.ndtri(level * self.prob_length))

    def level(self, sigma: Tensor) -> Tensor:
        """Compute the level of a noise standard deviation, any shape."""
        # Phi(z) = erfc(-z / sqrt(2)) / 2: fewer operations than ndtr, and accurate far below the mean
        return torch.erfc((self.p_mean - sigma.log()) / (self.p_std * math.sqrt(2))) / (2 * self.prob_length)

    def draw(self, size: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw training noise levels sigma [size] from the global random state."""
        normal = torch.randn(size, device=device, dtype=dtype)
        return self.from_normal(normal)

    def from_normal(self, normal: Tensor) -> Tensor:
        """Convert a standard normal draw to sigma, any shape.

        exp(p_mean + p_std normal).
        """
        return torch.exp(self.p_mean + self.p_std * normal)


class TruncatedLogNormal(LogNormal):
    """Log-normal noise levels, truncated at the `prob_length` quantile.

    A relay stage starts at that noise level.
    sigma(u) = exp(p_mean + p_std Phi^-1(u m)), m = prob_length; level(sigma) = Phi((ln sigma - p_mean)/p_std)/m.
    `sigma_floor` bounds training levels from below by Phi((ln sigma_floor - p_mean)/p_std) * m, as published
    (one would expect a division; the published weights were trained with the product).
    Raises ValueError for an option out of range.
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
        """Draw training noise levels sigma [size] from the global random state."""
        return self.from_uniform(torch.rand(size, device=device, dtype=dtype))

    def from_uniform(self, uniform: Tensor) -> Tensor:
        """Convert a uniform draw to sigma, any shape.

        The level is clamped from below. Raises ValueError if prob_length is above 1, which only sampling can use.
        """
        if self.prob_length > 1:
            raise ValueError(f"prob_length={self.prob_length}: a schedule for training needs at most 1")
        return self.sigma(uniform.clamp(min=self.level_floor))


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Compute decreasing noise levels from sigma_max to sigma_min.

    [steps], float64 (Karras et al. 2022, eq. 5):
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
