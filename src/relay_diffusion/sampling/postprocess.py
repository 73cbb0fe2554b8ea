"""Postprocess 8-bit images as in the published results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from relay_diffusion.data.decode import MODES
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.errors import UserError
from relay_diffusion.utils.pictures import pil_image


class Enhance:
    """Change contrast, brightness and color with Pillow.

    A factor of 1 changes nothing. Brightness interpolates between black and the image, contrast between its mean gray
    and the image, color between its gray version and the image; factors above 1 extrapolate.
    """

    def __init__(self, contrast: float = 1.0, brightness: float = 1.0, color: float = 1.0) -> None:
        self.contrast, self.brightness, self.color = contrast, brightness, color

    def __repr__(self) -> str:
        return f"Enhance(contrast={self.contrast}, brightness={self.brightness}, color={self.color})"

    def __call__(self, images: Tensor) -> Tensor:
        """Enhance uint8 images [B,C,H,W] of 1, 3 or 4 channels.

        The result is on the same device; Pillow computes on the CPU, on the straight colors of RGBA. Raises UserError
        for other channels.
        """
        if images.shape[1] not in MODES:
            raise UserError(f"relay.postprocess: Enhance cannot change images of {images.shape[1]} channels; use null")
        return torch.stack([self._one(pil_image(image)) for image in images]).to(images.device)

    def _one(self, image: Image.Image) -> Tensor:
        steps: Sequence[tuple[type[ImageEnhance.Contrast | ImageEnhance.Brightness | ImageEnhance.Color], float]] = (
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Color, self.color),
        )
        for enhancer, factor in steps:
            if factor != 1:
                image = enhancer(image).enhance(factor)
        return image_tensor(image)
