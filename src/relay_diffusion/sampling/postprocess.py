"""Postprocess 8-bit images as in the published results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor


class Enhance:
    """Change contrast, brightness and colour with Pillow.

    A factor of 1 changes nothing. Brightness interpolates between black and the image, contrast between its mean grey
    and the image, colour between its grey version and the image; factors above 1 extrapolate.
    """

    def __init__(self, contrast: float = 1.0, brightness: float = 1.0, colour: float = 1.0) -> None:
        self.contrast, self.brightness, self.colour = contrast, brightness, colour

    def __repr__(self) -> str:
        return f"Enhance(contrast={self.contrast}, brightness={self.brightness}, colour={self.colour})"

    def __call__(self, images: Tensor) -> Tensor:
        """Enhance uint8 images [B,3,H,W].

        The result is on the same device; Pillow computes on the CPU.
        """
        changed = [self._one(pixels) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous().to(images.device)

    def _one(self, pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        steps: Sequence[tuple[type[ImageEnhance.Contrast | ImageEnhance.Brightness | ImageEnhance.Color], float]] = (
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Color, self.colour),
        )
        for enhancer, factor in steps:
            if factor != 1:
                image = enhancer(image).enhance(factor)
        return np.asarray(image)
