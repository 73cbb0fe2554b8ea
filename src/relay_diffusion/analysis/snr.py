"""What noise leaves of images, by frequency, at two resolutions (Teng et al. 2024, sections 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from relay_diffusion.analysis.power import block_power, mixed_power, ring_means, white_power


@dataclass(frozen=True)
class Settings:
    """Options that were checked: two resolutions, their ratio, the noise."""

    small: int
    large: int
    sigmas: tuple[float, ...]
    block: int
    block_strength: float

    @property
    def factor(self) -> int:
        """Large over small resolution."""
        return self.large // self.small


@dataclass(frozen=True)
class Curve:
    """Signal-to-noise ratio by ring; `noise` is "white", "block" or "white+block"."""

    resolution: int
    noise: str
    sigma: float
    snr: Tensor


def snr_curves(powers: dict[int, Tensor], settings: Settings, sigma: float) -> list[Curve]:
    """What noise of one sigma leaves of the images: SNR = E[X^2] of images / E[X^2] of noise, ring by ring.

    White noise at both resolutions; at the large one also white noise of factor * sigma, block noise, and the noise of
    a relay stage. The mean of factor x factor pixels divides sigma by factor, so at low frequencies factor * sigma at
    the large resolution is sigma at the small one. Block noise has factor^2 of the power of white noise there, and
    needs no other sigma.
    """
    small, large, block = settings.small, settings.large, settings.block
    noises = [
        (small, "white", sigma, white_power(small)),
        (large, "white", sigma, white_power(large)),
        (large, "white", sigma * settings.factor, white_power(large)),
        (large, "block", sigma, block_power(large, block)),
        (large, "white+block", sigma, mixed_power(large, block, settings.block_strength)),
    ]
    return [
        Curve(side, name, level, ring_means(powers[side]) / (level**2 * ring_means(power)))
        for side, name, level, power in noises
    ]


def matching_factors(small: Tensor, large: Tensor) -> Tensor:
    """By how much white sigma must grow for the same SNR at the large resolution: sqrt(P_large / P_small), by ring."""
    return (large[: len(small)] / small).sqrt()
