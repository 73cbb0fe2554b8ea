"""Enlarge images by bicubic interpolation, the baseline of a relay stage.

python benchmarks/bicubic.py [key=value ...]

source       folder or zip of images                       (a relay.last=base run's images, or the real ones)
destination  the zip to write, for `sample.py mode=evaluate images=...`
small        side of the small images in pixels; larger ones are box-averaged first   (64)
factor       enlargement factor                            (4)
subset       a folder inside the source                    (all images)
overwrite    true: replace a destination that exists       (false)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from PIL import Image

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.zip_writer import encode_png, image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import refuse_existing
from relay_diffusion.utils.parallel import map_in_order


@dataclass
class Options:
    """Options of this command; see above."""

    source: str = MISSING
    destination: str = MISSING
    small: int = 64
    factor: int = 4
    subset: str = ""
    overwrite: bool = False


def run(options: Options) -> None:
    """Write the zip."""
    for name in ("small", "factor"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    refuse_existing(Path(options.destination).expanduser(), "destination", options.overwrite)
    images = open_image_set(options.source, "source", (options.small, options.small), options.subset)
    size = (options.small * options.factor,) * 2

    def encoded(pixels: np.ndarray) -> bytes:
        return encode_png(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    arrays = (batch[0].permute(1, 2, 0).numpy() for batch in images.batches(1))
    with image_zip(options.destination) as target:
        for number, content in enumerate(map_in_order(encoded, arrays)):
            target.add_encoded(f"{number:06d}.png", content)
    print(f"{options.destination}: {len(images):,} images of {size[0]}x{size[1]}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
