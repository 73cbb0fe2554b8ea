"""Time the relay corruption and the loss arithmetic.

python benchmarks/corruption.py [key=value ...]

Without a network: uint8 images to [-1, 1], noise levels, white and block noise, block blur, sum, and the weighted loss
of a given estimate. The ratio is to a plain implementation: block DCT by FFTs in float64, block noise as a sum of
block x block rolls. The results are compared before timing.

  device      auto | cpu | cuda   (auto)
  batch       images per batch    (32 on a GPU, 8 on a CPU)
  resolution  pixels              (256)
  block       enlargement factor  (4)
  repeats     timed runs          (15)
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import environment, launches, line, pick_device, seconds, seconds_on_device
from torch import Tensor

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.diffusion import BlurringCorruption, DenoisingLoss, TruncatedLogNormal
from relay_diffusion.diffusion.pixels import to_float

# milliseconds of the authors' code: one H200, batch 32; two CPU cores, batch 8
AUTHORS = {("cuda", 32, 256, 4): 5.1, ("cpu", 8, 256, 4): 74.0}


@dataclass
class Options:
    """Options of this command; see above."""

    device: str = "auto"
    batch: int = 0
    resolution: int = 256
    block: int = 4
    repeats: int = 15


def fft_dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II along the last axis by an FFT (Makhoul 1980)."""
    length = x.shape[-1]
    order = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    k = torch.arange(length, dtype=x.dtype, device=x.device)
    spectrum = torch.fft.fft(order) * torch.exp(-0.5j * math.pi * k / length)
    scale = torch.full_like(k, math.sqrt(2 / length))
    scale[0] = math.sqrt(1 / length)
    return spectrum.real * scale


def fft_idct(coefficients: Tensor) -> Tensor:
    """Inverse of `fft_dct`."""
    length = coefficients.shape[-1]
    k = torch.arange(length, dtype=coefficients.dtype, device=coefficients.device)
    scale = torch.full_like(k, math.sqrt(length / 2))
    scale[0] = math.sqrt(length)
    plain = coefficients * scale
    mirrored = torch.cat([torch.zeros_like(plain[..., :1]), plain[..., 1:].flip(-1)], dim=-1)
    order = torch.fft.ifft((plain - 1j * mirrored) * torch.exp(0.5j * math.pi * k / length)).real
    x = torch.empty_like(order)
    half = (length + 1) // 2
    x[..., ::2], x[..., 1::2] = order[..., :half], order[..., half:].flip(-1)
    return x


def plain_blur(x: Tensor, gains: Tensor) -> Tensor:
    """Blur each block along one axis after the other, in float64."""
    s = gains.shape[-1]
    batch, channels, height, width = x.shape
    patches = x.double().view(batch, channels, height // s, s, width // s, s).transpose(3, 4)
    spectrum = fft_dct(fft_dct(patches).mT).mT * gains.double()[:, :, None, None]
    patches = fft_idct(fft_idct(spectrum).mT).mT
    return patches.transpose(3, 4).reshape(x.shape).to(x.dtype)


def plain_noise(white: Tensor, other: Tensor, corruption: BlurringCorruption) -> Tensor:
    """Return white plus block noise by rolls."""
    total = torch.zeros_like(other)
    for i in range(corruption.block):
        for j in range(corruption.block):
            total += other.roll((i, j), (-2, -1))
    return white + corruption.block_strength * total / corruption.block


def ours(corruption: BlurringCorruption, loss: DenoisingLoss, images: Tensor, denoised: Tensor) -> tuple[Tensor, ...]:
    """Compute noisy images and the mean loss as `DiffusionStage.training_step`."""
    x0 = to_float(images)
    sigma = corruption.schedule.draw(len(x0), "cpu")
    noisy = corruption.corrupt(x0, sigma, corruption.draw_noise(x0, torch.randn_like))
    return noisy, loss(denoised, x0, sigma).mean()


def plain(corruption: BlurringCorruption, loss: DenoisingLoss, images: Tensor, denoised: Tensor) -> tuple[Tensor, ...]:
    """Compute the same from the formulas."""
    x0 = images.float() / 127.5 - 1
    sigma = corruption.schedule.draw(len(x0), "cpu").to(x0.device)
    noise = plain_noise(torch.randn_like(x0), torch.randn_like(x0), corruption)
    noisy = plain_blur(x0, corruption.gains(sigma)) + sigma[:, None, None, None] * noise
    squared = (denoised - x0) ** 2
    return noisy, (loss.weight(sigma)[:, None, None, None] * squared).mean()


def run(options: Options) -> None:
    """Check agreement, then print one row for each version."""
    device = pick_device(options.device)
    batch = options.batch or (32 if device.type == "cuda" else 8)
    shape = (batch, 3, options.resolution, options.resolution)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    denoised = torch.rand(shape, device=device) * 2 - 1
    corruption, loss = BlurringCorruption(TruncatedLogNormal(), options.block), DenoisingLoss(max_weight=1e5)

    def version(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: function(corruption, loss, images, denoised)

    results = []
    for function in (ours, plain):
        torch.manual_seed(0)
        results.append(version(function)())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    print(environment())
    print(f"corruption and loss, {list(shape)}, block {options.block}; {launches(version(ours))} launches")
    slow = seconds(version(plain), options.repeats)
    fast = seconds(version(ours), options.repeats)
    print(line("plain: FFTs in float64, rolls", slow, batch))
    print(line("relay_diffusion", fast, batch, batch / statistics.median(slow)))
    if device.type == "cuda":
        alone = seconds_on_device(version(ours)) * 1e3
        print(f"of which the kernels take {alone:.2f} ms: the rest is the host launching them, which training hides")
    authors = AUTHORS.get((device.type, batch, options.resolution, options.block))
    if authors:
        print(f"authors' code {authors:g} ms: {authors / statistics.median(fast) / 1e3:.1f}x")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=15"], __doc__ or "", Options, run))
