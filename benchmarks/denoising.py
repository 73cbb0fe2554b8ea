"""Measure the denoising error of a first stage.

python benchmarks/denoising.py [key=value ...]

stage   a run, a .ckpt file or an export                      (demo/emoji_text_64)
images  folder or zip with the classes of the training images (demo/emoji-64.zip)
subset  train or heldout                                        (heldout)
sigmas  standard deviations of the noise                        (0.1,0.5,2,5)
count   number of evenly spaced images                          (160)
batch   images per batch                                        (32)

Prints the root mean square difference of estimate and image in [-1, 1] for each sigma, with one draw of noise and
without augmentation labels. Subsets of demo/emoji-64.zip are those of experiment=emoji_64; the bundled text stage was
trained on another split, which includes images of this heldout (docs/emoji-text.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.cli.arguments import positive_numbers, run_tool
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import evenly_spaced
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError


@dataclass
class Options:
    """Options of this command; see above."""

    stage: str = "demo/emoji_text_64"
    images: str = "demo/emoji-64.zip"
    subset: str = "heldout"
    sigmas: str = "0.1,0.5,2,5"
    count: int = 160
    batch: int = 32


@torch.no_grad()
def run(options: Options) -> None:
    """Print one line."""
    if options.count < 1 or options.batch < 1:
        raise UserError(f"count={options.count} batch={options.batch}: must be at least 1")
    remedy = "need numbers above 0 with commas between them, e.g. 0.1,0.5"
    sigmas = positive_numbers("sigmas", options.sigmas, remedy)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stage = load_stage(options.stage).eval().to(device)
    dataset = ImageDataset(options.images, stage.size, subset=options.subset)
    chosen, labels = dataset.batch(evenly_spaced(min(options.count, len(dataset)), len(dataset)))
    images = to_float(chosen)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for sigma in sigmas:
        squares = 0.0
        for parts in zip(*(part.split(options.batch) for part in (images, noise, labels)), strict=True):
            x, eps, label = (part.to(device) for part in parts)
            level = torch.full((len(x),), sigma, device=device)
            classes = label if stage.num_classes else None
            squares += float((stage.denoiser(x + sigma * eps, level, classes) - x).square().sum())
        errors.append(f"{sigma:g}: {(squares / images.numel()) ** 0.5:.4f}")
    print(f"{options.stage}, {len(images)} images of {options.subset}  {'  '.join(errors)}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
