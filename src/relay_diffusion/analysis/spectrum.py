"""Power of images and noise by frequency (orthonormal DCT-II).

X = M x M^T of an R x R image x; the power of a coefficient is E[X_kl^2]. M is orthonormal, so the mean power over the
coefficients is the mean squared pixel (Parseval), and white noise has the power sigma^2 everywhere. Index k is k/2
cycles per image, at every resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from relay_diffusion.diffusion.dct import block_dct, dct_matrix


def summed_power(images: Tensor) -> Tensor:
    """Sum squared DCT coefficients over images and channels: [B,C,R,R] -> [R,R]."""
    return block_dct(images, images.shape[-1]).square().sum((0, 1))


def block_power(resolution: int, block: int) -> Tensor:
    """Power E[X_kl^2] of block noise at sigma 1: float64 [R,R].

    Block noise is B w B^T of white noise w, where B is the circular sum of `block` neighbors over sqrt(block), so
    E[X_kl^2] = p_k p_l, p_k = (M B B^T M^T)_kk: the squared length of row k of M B. The DCT does not diagonalize B:
    its coefficients of block noise correlate, but their power is still p_k p_l. For even k it is
    p_k = sin^2(pi k s / 2R) / (s sin^2(pi k / 2R)), s = block, so p_0 = s.
    Raises ValueError unless 1 <= block <= resolution.
    """
    if not 1 <= block <= resolution:
        raise ValueError(f"block={block}: must be 1 to {resolution}, the resolution")
    identity = torch.eye(resolution, dtype=torch.float64)
    box = sum((identity.roll(shift, 0) for shift in range(block)), torch.zeros_like(identity)) / block**0.5
    power = (dct_matrix(resolution, torch.float64, torch.device("cpu")) @ box).square().sum(1)
    return power[:, None] * power[None, :]


def mixed_power(resolution: int, block: int, strength: float) -> Tensor:
    """Power E[X_kl^2] of relay-stage noise at sigma 1: float64 [R,R].

    The noise is eps + strength block(eps'). The two terms are independent: 1 + strength^2 p_k p_l. As in
    `BlurringCorruption`, nothing is divided by sqrt(1 + strength^2), so its variance is 1 + strength^2.
    """
    return 1 + strength**2 * block_power(resolution, block)


@lru_cache(maxsize=8)
def rings(resolution: int) -> Tensor:
    """Ring of each coefficient, round(sqrt(k^2 + l^2)): int64 [R,R].

    Ring r is r/2 cycles per image.
    Rings from R on are incomplete: only the corners of the square reach them.
    """
    squared = torch.arange(resolution, dtype=torch.float64) ** 2
    return (squared[:, None] + squared[None, :]).sqrt().round().long()


def ring_means(power: Tensor) -> Tensor:
    """Mean power of each ring: [R,R] -> float64 [rings]."""
    ring = rings(len(power)).flatten()
    return torch.bincount(ring, power.double().flatten()) / torch.bincount(ring)


@dataclass(frozen=True)
class Settings:
    """Checked options: two resolutions and the noise."""

    small: int
    large: int
    sigmas: tuple[float, ...]
    block: int
    block_strength: float


@dataclass(frozen=True)
class Curve:
    """Signal-to-noise ratio by ring; `noise` is "white", "block" or "white+block"."""

    resolution: int
    noise: str
    sigma: float
    snr: Tensor


def snr_curves(powers: dict[int, Tensor], settings: Settings, sigma: float) -> list[Curve]:
    """Compute signal-to-noise ratios by ring for one sigma.

    SNR = E[X^2] of images / E[X^2] of noise. White noise at both resolutions; at the large one also white noise of
    factor * sigma, block noise, and the noise of a relay stage. The mean of factor x factor pixels divides sigma by
    factor, so at low frequencies factor * sigma at the large resolution corresponds to sigma at the small one. Block
    noise has factor^2 of the power of white noise at low frequencies, so its sigma is the same at both resolutions.
    """
    small, large, block = settings.small, settings.large, settings.block
    white = torch.ones((), dtype=torch.float64)
    noises = [
        (small, "white", sigma, white),
        (large, "white", sigma, white),
        (large, "white", sigma * (large // small), white),
        (large, "block", sigma, ring_means(block_power(large, block))),
        (large, "white+block", sigma, ring_means(mixed_power(large, block, settings.block_strength))),
    ]
    return [
        Curve(side, name, level, ring_means(powers[side]) / (level**2 * power)) for side, name, level, power in noises
    ]


def matching_factors(small: Tensor, large: Tensor) -> Tensor:
    """Compute the factor of white sigma that keeps the SNR.

    sqrt(P_large / P_small), by ring.
    """
    return (large[: len(small)] / small).sqrt()
