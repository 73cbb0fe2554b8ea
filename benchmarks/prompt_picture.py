"""Draw all samples of each prompt in a row.

python benchmarks/prompt_picture.py images=OUTPUT/images [key=value ...]

images   samples with prompts: the images of a run of sample.py, folder or zip
side     pixels of an image in the picture        (96)
columns  prompts beside each other                (1)
picture  the WebP to write                        (outputs/prompts.webp)

Nothing is selected: prompts and seeds stand in their order.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.errors import UserError
from relay_diffusion.utils.pictures import pil_image, save_still_webp, side_by_side, titled


@dataclass
class Options:
    """Options of this command; see above."""

    images: str = MISSING
    side: int = 96
    columns: int = 1
    picture: str = "outputs/prompts.webp"


def rows(options: Options) -> list[Image.Image]:
    """Draw one row for each prompt."""
    samples = open_image_set(options.images, option="images")
    captions = samples.captions()
    of_prompt = defaultdict(list)
    for image, name in enumerate(samples.names):
        of_prompt[captions.get(name, [""])[0]].append(image)
    size = (options.side, options.side)
    drawn = []
    for prompt, images in of_prompt.items():
        pictures = [pil_image(samples.tensor(image)).resize(size, Image.Resampling.LANCZOS) for image in images]
        drawn.append(titled(side_by_side(pictures, gap=4), prompt))
    return drawn


def run(options: Options) -> None:
    """Write the picture."""
    for name in ("side", "columns"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}: must be at least 1")
    parts = rows(options)
    width, height = (max(sizes) + 12 for sizes in zip(*(part.size for part in parts), strict=True))
    picture = Image.new("RGB", (options.columns * width, -(-len(parts) // options.columns) * height), "white")
    for place, part in enumerate(parts):
        row, column = divmod(place, options.columns)
        picture.paste(part, (column * width, row * height))
    save_still_webp(picture, Path(options.picture))
    print(f"{options.picture}: {len(parts)} prompts")


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
