"""Forward processes from clean to noisy images, each with its noise schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from relay_diffusion.diffusion.dct import filter_and_add
from relay_diffusion.diffusion.noise import RandnLike, add_block_noise
from relay_diffusion.diffusion.schedule import LogNormal, TruncatedLogNormal
from relay_diffusion.diffusion.tensors import check_images, expand, noise_levels


class Corruption(Protocol):
    """Interface of a corruption: forward process, noise schedule and start of sampling."""

    schedule: LogNormal
    block: int  # upsampling factor of the stage; 1: it starts from noise

    def start(self, like: Tensor, previous: Tensor | None, randn_like: RandnLike) -> Tensor:
        """Compute the start of sampling, like `like` [B,C,H,W].

        previous: images [B,C,H/block,W/block] of the previous stage, or None.
        """

    def draw_noise(self, like: Tensor, randn_like: RandnLike) -> Tensor:
        """Draw noise of the forward process at sigma 1, like `like` [B,C,H,W]."""

    def corrupt(self, x0: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """Apply the forward process to clean images.

        x0 [B,C,H,W], sigma [B] (may be on the CPU) or a number, noise from `draw_noise` -> noisy images [B,C,H,W].
        """


class GainCorruption(Corruption, Protocol):
    """Corruption x_sigma = F[A(sigma)] x0 + sigma noise with gains A.

    F[A] multiplies the block DCT coefficients by A.
    """

    starts_from_noise: bool  # else from the images of the previous stage

    def gains(self, sigma: Tensor) -> Tensor:
        """Compute the gains at sigma [B]: [B,1,n,n] for blocks of n x n."""

    def at_level(self, start: Tensor, sigma: float, randn_like: RandnLike) -> Tensor:
        """Compute the state [B,C,H,W] at sigma from `start` [B,C,H,W]."""


def _check_corrupted(x0: Tensor, noise: Tensor) -> None:
    check_images("x0", x0)
    check_images("noise", noise)
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: must be that of x0, {tuple(x0.shape)}")


def upsample_blocks(images: Tensor, block: int) -> Tensor:
    """Repeat every pixel block x block times: [B,C,H,W] -> [B,C,H*block,W*block].

    The end state of blurring.
    """
    return images.repeat_interleave(block, dim=-2).repeat_interleave(block, dim=-1)


def block_mean(images: Tensor, block: int) -> Tensor:
    """Average every block x block piece: [B,C,H,W] -> [B,C,H/block,W/block]."""
    return F.avg_pool2d(images, block)


class GaussianCorruption:
    """White noise: x_sigma = x0 + sigma eps. Used by the first stage of every relay."""

    block = 1  # a first stage has no upsampling factor
    starts_from_noise = True

    def __init__(self, schedule: LogNormal) -> None:
        self.schedule = schedule

    def start(self, like: Tensor, previous: Tensor | None, randn_like: RandnLike) -> Tensor:
        """Draw the start of sampling: unit noise like `like` [B,C,H,W].

        Raises ValueError if `previous` is given.
        """
        if previous is not None:
            raise ValueError("previous: a first stage starts from noise; remove `previous`")
        return randn_like(like)

    def gains(self, sigma: Tensor) -> Tensor:
        """Return gains of 1: sigma [B] -> [B,1,1,1]."""
        return torch.ones_like(sigma).view(-1, 1, 1, 1)

    def at_level(self, start: Tensor, sigma: float, randn_like: RandnLike) -> Tensor:  # noqa: ARG002
        """Scale the start, unit noise [B,C,H,W], to noise level sigma."""
        return start * sigma

    def draw_noise(self, like: Tensor, randn_like: RandnLike) -> Tensor:
        """Draw noise of the forward process at sigma 1, like `like` [B,C,H,W]."""
        return randn_like(like)

    def corrupt(self, x0: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """Add noise to clean images.

        x0 [B,C,H,W], sigma [B] (may be on the CPU) or a number, noise from `draw_noise` -> noisy images [B,C,H,W].
        """
        _check_corrupted(x0, noise)
        return torch.addcmul(x0, expand(noise_levels(sigma, len(x0)), x0), noise)


class BlockCorruption(ABC):
    """Gains on block DCT coefficients, and noise; ends at the block means.

    x_u = DCT^-1[A(u) DCT[x0]] + sigma(u) (eps + block_strength block(eps')), per block x block piece, with the gain 1
    for the mean. A subclass computes the gains A. The noise is not divided by sqrt(1 + block_strength^2) as in the
    paper (Teng et al. 2024, section 3): the published weights were trained without the division.
    Raises ValueError for an option out of range.
    """

    starts_from_noise = False

    def __init__(self, schedule: TruncatedLogNormal, block: int = 4, block_strength: float = 0.15) -> None:
        if block < 2:
            raise ValueError(f"block={block}: must be at least 2; a relay stage enlarges its input")
        if not 0 <= block_strength < math.inf:
            raise ValueError(f"block_strength={block_strength}: must be at least 0 and finite")
        self.schedule, self.block, self.block_strength = schedule, block, block_strength

    @abstractmethod
    def level_gains(self, level: Tensor) -> Tensor:
        """Compute the gains at level u: [B] -> [B,1,block,block]."""

    def gains(self, sigma: Tensor | float) -> Tensor:
        """Compute the gain of each DCT coefficient at noise level sigma.

        [B] -> [B,1,block,block]; sigma may be one number. The gain of the mean is 1.
        """
        sigma = noise_levels(sigma, len(sigma) if isinstance(sigma, Tensor) and sigma.ndim else 1)
        return self.level_gains(self.schedule.level(sigma))

    def start(self, like: Tensor, previous: Tensor | None, randn_like: RandnLike) -> Tensor:  # noqa: ARG002
        """Upsample the previous stage's images to start sampling from.

        `previous` [B,C,H/block,W/block], each pixel repeated -> [B,C,H,W].
        Raises ValueError if `previous` is missing or does not fit `like`.
        """
        if previous is None:
            raise ValueError("previous=None: a relay stage starts from the previous stage's images; give `previous`")
        check_images("previous", previous)
        upsampled = upsample_blocks(previous.to(like), self.block)
        if upsampled.shape != like.shape:
            raise ValueError(
                f"previous has shape {tuple(previous.shape)}: its images enlarged {self.block} times are not of "
                f"{tuple(like.shape)}"
            )
        return upsampled

    def at_level(self, start: Tensor, sigma: float, randn_like: RandnLike) -> Tensor:
        """Add noise of level sigma to the start, the upsampled image [B,C,H,W]."""
        return torch.add(start, self.draw_noise(start, randn_like), alpha=sigma)

    def draw_noise(self, like: Tensor, randn_like: RandnLike) -> Tensor:
        """Draw white plus block noise at sigma 1, like `like` [B,C,H,W].

        With block_strength=0 only the white noise is drawn.
        """
        white = randn_like(like)
        if self.block_strength == 0:
            return white
        return add_block_noise(white, randn_like(like), self.block, self.block_strength)

    def corrupt(self, x0: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """Filter clean images and add noise.

        x0 [B,C,H,W], sigma [B] (may be on the CPU) or a number, noise from `draw_noise` -> noisy images [B,C,H,W].
        """
        _check_corrupted(x0, noise)
        sigma = noise_levels(sigma, len(x0))
        return filter_and_add(x0, self.gains(sigma), sigma, noise)


@lru_cache(maxsize=64)
def _widest_exponents(block: int, blur_sigma_max: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the exponents of the strongest blur, [block, block].

    -(w_k^2 + w_l^2) blur_sigma_max^2 / 2 with w_k = pi k / block.
    """
    with torch.inference_mode(False):  # cached, and used in training too
        frequency = torch.arange(block, dtype=torch.float64, device="cpu") * (math.pi / block)
        squared = frequency[:, None] ** 2 + frequency[None, :] ** 2
        return (squared * (-(blur_sigma_max**2) / 2)).to(device=device, dtype=dtype)


class BlurringCorruption(BlockCorruption):
    """Block blur with noise (Teng et al. 2024, section 3).

    A_kl(u) = (1 - min_gain) exp(-(w_k^2 + w_l^2) b(u)^2 / 2) + min_gain, w_k = pi k / block,
    b(u) = blur_sigma_max sin^2(pi u / 2).
    Raises ValueError for an option out of range.
    """

    def __init__(
        self,
        schedule: TruncatedLogNormal,
        block: int = 4,
        blur_sigma_max: float = 3.0,
        min_gain: float = 0.001,
        block_strength: float = 0.15,
    ) -> None:
        super().__init__(schedule, block, block_strength)
        if not 0 <= blur_sigma_max < math.inf:
            raise ValueError(f"blur_sigma_max={blur_sigma_max}: must be at least 0 and finite")
        if not 0 <= min_gain <= 1:
            raise ValueError(f"min_gain={min_gain}: must lie between 0 and 1")
        self.blur_sigma_max, self.min_gain = blur_sigma_max, min_gain

    def level_gains(self, level: Tensor) -> Tensor:
        """Compute the gains at level u: [B] -> [B,1,block,block]."""
        widest = _widest_exponents(self.block, self.blur_sigma_max, level.dtype, level.device)
        share = torch.sin(level * (math.pi / 2)) ** 4  # of the exponents: (b(u) / b_max)^2
        decay = torch.exp(share.view(-1, 1, 1, 1) * widest)
        return (1 - self.min_gain) * decay + self.min_gain


class ConditionedCorruption(GaussianCorruption):
    """Gaussian corruption conditioned on the noisy, upsampled small image.

    y = bicubic(block_mean(x0) + level eps'), level ~ U(0, condition_noise_max) for each training image, and
    condition_noise in sampling: conditioning augmentation (Ho et al. 2021, arXiv 2106.15282, section 4), which hides
    the difference between samples of the previous stage and block means. Levels are standard deviations, like sigma.
    Raises ValueError for an option out of range.
    """

    def __init__(
        self, schedule: LogNormal, block: int = 4, condition_noise_max: float = 0.5, condition_noise: float = 0.1
    ) -> None:
        super().__init__(schedule)
        if block < 2:
            raise ValueError(f"block={block}: must be at least 2; a later stage of a cascade enlarges its input")
        if not 0 <= condition_noise_max < math.inf:
            raise ValueError(f"condition_noise_max={condition_noise_max}: must be at least 0 and finite")
        if not 0 <= condition_noise <= condition_noise_max:
            raise ValueError(
                f"condition_noise={condition_noise}: must lie between 0 and condition_noise_max={condition_noise_max}, "
                "the highest level in training"
            )
        self.block = block
        self.condition_noise_max, self.condition_noise = condition_noise_max, condition_noise

    def start(self, like: Tensor, previous: Tensor | None, randn_like: RandnLike) -> Tensor:
        """Draw the start of sampling: unit noise like `like` [B,C,H,W].

        `previous` [B,C,H/block,W/block] becomes the condition. Raises ValueError if it is missing or does not fit.
        """
        if previous is None:
            raise ValueError("previous=None: a conditioned stage needs the previous stage's images; give `previous`")
        check_images("previous", previous)
        height, width = (size * self.block for size in previous.shape[2:])
        if (*previous.shape[:2], height, width) != tuple(like.shape):
            raise ValueError(
                f"previous has shape {tuple(previous.shape)}: its images enlarged {self.block} times are not of "
                f"{tuple(like.shape)}"
            )
        return randn_like(like)

    def draw_condition_levels(self, size: int) -> Tensor:
        """Draw training noise levels of the condition, [size], on the CPU.

        Random numbers come from the global generator.
        """
        return torch.rand(size, device="cpu") * self.condition_noise_max

    def small(self, x0: Tensor) -> Tensor:
        """Average blocks: the ideal output of the previous stage.

        x0 [B,C,H,W] -> [B,C,H/block,W/block].
        """
        return block_mean(x0, self.block)

    def condition(self, small: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Add noise to small images and upsample them.

        small and unit noise [B,C,h,w], level [B] (may be on the CPU) -> [B,C,h*block,w*block].
        Bicubic with a = -0.75 and half-pixel centers, as in torch.nn.functional.interpolate.
        """
        noisy = torch.addcmul(small, expand(level, small), noise)
        return F.interpolate(noisy, scale_factor=self.block, mode="bicubic", align_corners=False)
