"""Compare noise levels at two resolutions by power spectra.

The analysis of Teng et al. 2024, sections 2 and 3, for any images: their power by frequency at two resolutions, and
their signal-to-noise ratio for white noise, block noise and the noise of a relay stage.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import MISSING
from torch import Tensor

from relay_diffusion.analysis.plots import plot
from relay_diffusion.analysis.spectrum import Curve, Settings, matching_factors, ring_means, snr_curves, summed_power
from relay_diffusion.analysis.tables import csv_text, print_table
from relay_diffusion.cli.arguments import positive_numbers, run_tool
from relay_diffusion.data.image_sets import ImageSet, evenly_spaced, open_image_set
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import refuse_existing, write_text
from relay_diffusion.utils.progress import progress

USAGE = """\
python -m relay_diffusion.cli.spectrum images=FOLDER|ZIP|NPZ [key=value ...]

  images          folder, image zip or .npz of ADM's samples
  resolutions     the small and the large one, in pixels (16,64); images are averaged in blocks to them
  sigmas          noise levels to compare, images being in [-1, 1] (1)
  count           images used, spread evenly over the set (1000)
  block           side of the block noise, in pixels of the large images (0: large / small)
  block_strength  share of block noise in a relay stage's noise (0.15)
  output          folder for spectrum.csv, snr.csv and the plots (outputs/spectrum)
  plots           true: also spectrum.png and snr.png, which needs matplotlib, `pip install -e '.[analysis]'` (default)
  overwrite       false: refuse an output that holds these files (default) | true: replace them
"""

FILES = ("spectrum.csv", "snr.csv", "spectrum.png", "snr.png")
BATCH = 32
SHOWN = (0, 1, 2, 4, 8, 16, 32)  # printed frequencies in cycles per image


@dataclass
class SpectrumOptions:
    """Options of this command; see USAGE."""

    images: str = MISSING
    resolutions: str = "16,64"
    sigmas: str = "1"
    count: int = 1000
    block: int = 0
    block_strength: float = 0.15
    output: str = "outputs/spectrum"
    plots: bool = True
    overwrite: bool = False


def checked(options: SpectrumOptions) -> Settings:
    """Check the options. Raises UserError naming the option."""
    remedy = "give the small and the large resolution, such as 16,64; the large one must be a whole multiple"
    sides = positive_numbers("resolutions", options.resolutions, remedy)
    if len(sides) != 2 or any(side % 1 for side in sides) or sides[0] >= sides[1] or sides[1] % sides[0]:
        raise UserError(f"resolutions={options.resolutions}: {remedy}")
    small, large = (int(side) for side in sides)
    sigmas = positive_numbers("sigmas", options.sigmas, "give positive numbers, such as 0.5,1,2")
    block = options.block or large // small
    if not 1 <= block <= large:
        raise UserError(f"block={options.block}: must be 1 to {large}, the large resolution (0: large / small)")
    if not 0 <= options.block_strength < math.inf:
        raise UserError(f"block_strength={options.block_strength}: must be 0 or more")
    if options.count < 1:
        raise UserError(f"count={options.count}: must be at least 1")
    return Settings(small, large, sigmas, block, options.block_strength)


def image_powers(images: ImageSet, count: int, resolutions: Sequence[int]) -> dict[int, Tensor]:
    """Compute mean squared DCT coefficients by resolution: float64 [R,R].

    count: number of images. The mean is over images and channels. Images are square, their side a multiple of every
    resolution; box averages are not rounded to 8 bits.
    """
    totals = {side: torch.zeros(side, side, dtype=torch.float64) for side in resolutions}
    with progress("transforming", count) as advance:
        for batch in images.batches(BATCH, evenly_spaced(count, len(images))):
            pixels = to_float(batch).double()
            for side, total in totals.items():
                total += summed_power(block_mean(pixels, images.resolution[0] // side))
            advance(len(batch))
    return {side: total / (3 * count) for side, total in totals.items()}


def spectrum_csv(powers: dict[int, Tensor], settings: Settings) -> str:
    """Format the power by frequency as CSV.

    Columns: frequency (cycles per image), power at both resolutions, `matching_factors`; empty cells beyond the small
    resolution.
    """
    small, large = (ring_means(powers[side]) for side in (settings.small, settings.large))
    columns = [small.tolist(), large.tolist(), matching_factors(small, large).tolist()]
    rows = ([ring / 2, *(c[ring] if ring < len(c) else "" for c in columns)] for ring in range(len(large)))
    header = ["frequency", f"power_{settings.small}", f"power_{settings.large}", "matching_factor"]
    return csv_text(header, rows)


def snr_csv(curves: Iterable[Curve]) -> str:
    """Format distinct curves as CSV, one row per ring.

    Columns: resolution, noise, sigma, frequency (cycles per image), snr.
    """
    distinct = {(curve.resolution, curve.noise, curve.sigma): curve for curve in curves}
    rows = ([*key, ring / 2, snr] for key, curve in distinct.items() for ring, snr in enumerate(curve.snr.tolist()))
    return csv_text(["resolution", "noise", "sigma", "frequency", "snr"], rows)


def _report(powers: dict[int, Tensor], settings: Settings, curves: Sequence[Curve]) -> None:
    small, large = (ring_means(powers[side]) for side in (settings.small, settings.large))
    factors = matching_factors(small, large)
    shown = [cycles for cycles in SHOWN if 2 * cycles < settings.small]
    titles = ["cycles per image", *map(str, shown)]
    lines = [[f"power at {settings.small}", *(f"{small[2 * cycles]:.4g}" for cycles in shown)]]
    lines += [[f"power at {settings.large}", *(f"{large[2 * cycles]:.4g}" for cycles in shown)]]
    lines += [["sigma for the same SNR", *(f"x {factors[2 * cycles]:.2f}" for cycles in shown)]]
    for curve in curves:
        name = f"SNR at {curve.resolution}, {curve.noise} {curve.sigma:g}"
        lines += [[name, *(f"{curve.snr[2 * cycles]:.4g}" for cycles in shown)]]
    print_table([titles, *lines], 10)


def analyze(options: SpectrumOptions) -> None:
    """Write spectrum.csv, snr.csv and their plots. Raises UserError naming the option."""
    settings, output = checked(options), Path(options.output).expanduser()
    for file in FILES:
        refuse_existing(output / file, "output", options.overwrite)
    images = open_image_set(options.images, "images", (settings.large, settings.large))
    count = min(options.count, len(images))
    powers = image_powers(images, count, (settings.small, settings.large))
    curves = [snr_curves(powers, settings, sigma) for sigma in settings.sigmas]
    write_text(output / "spectrum.csv", spectrum_csv(powers, settings))
    write_text(output / "snr.csv", snr_csv(curve for group in curves for curve in group))
    _report(powers, settings, curves[0])
    if options.plots:
        plot(output, powers, settings, curves)
    print(f"{count:,} of {len(images):,} images; spectrum and snr in {output}")


def main() -> NoReturn:
    """Run the command."""
    sys.exit(run_tool(sys.argv[1:], USAGE, SpectrumOptions, analyze))


if __name__ == "__main__":
    main()
