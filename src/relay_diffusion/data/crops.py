"""Random crops of images of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

MAX_CROPS = 1_000_000  # of an image; the order of all crops is drawn at once


def random_crop(image: Image.Image, resolution: tuple[int, int], seed: int | Sequence[int]) -> Image.Image:
    """Cut a random rectangle and reduce it to a resolution.

    resolution: (H, W), at most the size of the image. The factor of the reduction is log-uniform from 1 to the largest
    that fits, the position uniform. The seed determines both. Lanczos filter with antialiasing.
    """
    height, width = resolution
    generator = np.random.default_rng(seed)
    scale = min(image.height / height, image.width / width) ** generator.random()
    cut_height, cut_width = round(height * scale), round(width * scale)
    top = int(generator.integers(image.height - cut_height + 1))
    left = int(generator.integers(image.width - cut_width + 1))
    box = (left, top, left + cut_width, top + cut_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
