"""Draw crops before and after enlarging, beside interpolation and the original.

python benchmarks/enlarging_picture.py [key=value ...]

stage    relay stage, as in enlarging.py                              (demo/photos_256)
methods  a column each, as in enlarging.py              (bicubic+consistent:3/0.2/0.02/7/0)
images   folder or zip of images of any size                          (data/photos.zip)
subset   a folder inside                                              (heldout)
crops    a row each: NAME:NUMBER, separated by commas; NAME is an image without folder and suffix
seed     of the noise                                                 (0)
picture  the WebP to write                                            (outputs/enlarging.webp)

Columns: the input (block means of the crop), one of each method, the original. enlarging.py measures the same crops.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from enlarging import enlarged, inputs, load_enlarging_stage, methods_of
from omegaconf import MISSING
from torch import Tensor

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError
from relay_diffusion.utils.pictures import image_grid, save_still_webp

MOST = 10_000  # crops of an image


@dataclass
class Options:
    """Options of this command; see above."""

    crops: str = MISSING
    stage: str = "demo/photos_256"
    methods: str = "bicubic+consistent:3/0.2/0.02/7/0"
    images: str = "data/photos.zip"
    subset: str = "heldout"
    seed: int = 0
    picture: str = "outputs/enlarging.webp"


def chosen_crops(dataset: ImageDataset, crops: str) -> Tensor:
    """Cut the crops, uint8 [N,C,H,W]."""
    positions = {PurePosixPath(name).stem: position for position, name in enumerate(dataset.names)}
    found = []
    for crop in crops.split(","):
        name, _, number = crop.partition(":")
        if name not in positions or not number.isdigit() or int(number) >= MOST:
            raise UserError(f"crops={crop}: must be NAME:NUMBER with one of {', '.join(positions)} and 0 to {MOST - 1}")
        found.append(int(number) * len(dataset.names) + positions[name])
    return dataset.batch(found)[0]


def run(options: Options) -> None:
    """Write the picture."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, methods = load_enlarging_stage(options.stage, device), methods_of(options.methods)
    block = stage.corruption.block
    images, size = options.images, stage.size
    dataset = ImageDataset(images, size, options.subset, labels=False, random_crops=MOST, option="images")
    crops = chosen_crops(dataset, options.crops).to(device)
    small = inputs(crops, block)
    columns = [small.repeat_interleave(block, 2).repeat_interleave(block, 3)]
    columns += [enlarged(stage, small, method, options.seed, len(small))[0] for method in methods]
    columns.append(crops)
    picture = image_grid(torch.stack(columns, 1).flatten(0, 1), len(columns))
    save_still_webp(picture, Path(options.picture), quality=90)
    print(f"{options.picture}: {', '.join(['input', *methods, 'original'])}")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
