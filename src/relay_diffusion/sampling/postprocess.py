"""Postprocess 8-bit images as for the published results. Off by default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor


class Enhance:
    """Apply Pillow's enhancers: contrast, brightness, colour; a factor of 1 changes nothing.

    Brightness mixes an image with black, contrast with its mean grey, colour with its grey version; factors above 1
    move away from these.
    """

    def __init__(self, contrast: float = 1.0, brightness: float = 1.0, colour: float = 1.0) -> None:
        self.contrast, self.brightness, self.colour = contrast, brightness, colour

    def __repr__(self) -> str:
        return f"Enhance(contrast={self.contrast}, brightness={self.brightness}, colour={self.colour})"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] -> uint8 [B,3,H,W] on the same device; computed image by image on the CPU."""
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
