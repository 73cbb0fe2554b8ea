"""Time a sampler without its network.

python benchmarks/sampler.py [key=value ...]

The denoiser returns a constant float32 tensor, so only the sampler takes time: state, noise with one generator per
image, block filter. Times are per network evaluation.

  device      auto | cpu | cuda          (auto)
  sampler     relay | edm                (both)
  batch       images per batch           (32 on a GPU, 8 on a CPU)
  resolution  pixels                     (256)
  repeats     timed runs of all steps    (5)
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import environment, launches, line, pick_device, seconds
from torch import Tensor

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.diffusion import BlurringCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.errors import UserError
from relay_diffusion.samplers import BlurringSampler, EDMSampler, Sampler

# milliseconds of the authors' relay sampler without the network: one H200, batch 32; two CPU cores, batch 8
AUTHORS = {("cuda", "relay", 32, 256): 6.4, ("cpu", "relay", 8, 256): 172.0}
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "relay": lambda: BlurringSampler(BlurringCorruption(TruncatedLogNormal()), steps=20),
    "edm": lambda: EDMSampler(steps=6, churn=2.0),
}


@dataclass
class Options:
    """Options of this command; see above."""

    device: str = "auto"
    sampler: str = "relay,edm"
    batch: int = 0
    resolution: int = 256
    repeats: int = 5


def run(options: Options) -> None:
    """Print one row for each sampler."""
    device = pick_device(options.device)
    batch = options.batch or (32 if device.type == "cuda" else 8)
    shape = (batch, 3, options.resolution, options.resolution)
    estimate, start = torch.randn(shape, device=device), torch.randn(shape, device=device)

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:  # noqa: ARG001
        return estimate

    print(environment())
    for name in options.sampler.split(","):
        if name not in SAMPLERS:
            raise UserError(f"sampler={name}: use {' or '.join(SAMPLERS)}")
        sampler = SAMPLERS[name]()

        def work(sampler: Sampler = sampler) -> None:
            sampler(denoise, start, PerImageGenerator(range(batch), device).randn_like)

        each = [time / sampler.evaluations for time in seconds(work, options.repeats, warm_up=1)]
        authors = AUTHORS.get((device.type, name, batch, options.resolution))
        row = line(f"{name}, {list(shape)}, per evaluation", each, batch)
        print(f"{row}  {launches(work) / sampler.evaluations:.0f} launches", end="")
        print(f"  authors' code {authors:g} ms: {authors / statistics.median(each) / 1e3:.1f}x" if authors else "")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=5"], __doc__ or "", Options, run))
