"""Straight and premultiplied colors of RGBA images.

Files and PIL images have straight colors. Image tensors of 4 channels have premultiplied colors, color * alpha / 255:
then averaging and interpolation give transparent pixels no weight, and the small images of all stages of a relay are
the same. Arrays are [...,H,W,C]; those of other channels, and grayscale images [H,W], are returned unchanged. Imports
no torch.
"""

from __future__ import annotations

import numpy as np

RGBA = 4  # channels


def has_alpha(pixels: np.ndarray) -> bool:
    """Return whether an array holds RGBA images."""
    return pixels.ndim >= 3 and pixels.shape[-1] == RGBA


def premultiplied(pixels: np.ndarray) -> np.ndarray:
    """Multiply straight colors by alpha: uint8, rounded, or floats in [-1, 1].

    Opaque pixels keep their colors exactly.
    """
    if not has_alpha(pixels):
        return pixels
    result, alpha = pixels.copy(), pixels[..., 3]
    wide = alpha.astype(np.uint16)
    for channel in range(3):
        color = pixels[..., channel]
        if pixels.dtype == np.uint8:
            product = color * wide + 128  # at most 255 * 255 + 128, which 16 bits hold
            result[..., channel] = (product + (product >> 8)) >> 8  # product / 255, rounded
        else:
            result[..., channel] = np.maximum(color + (color + 1) * ((alpha - 1) / 2), -1)
    return result


def straight(pixels: np.ndarray) -> np.ndarray:
    """Divide premultiplied colors by alpha, uint8: rounded and clamped to 255.

    Transparent pixels become black. The inverse of `premultiplied` for colors up to alpha.
    """
    if not has_alpha(pixels):
        return pixels
    result = pixels.copy()
    alpha = pixels[..., 3].astype(np.uint16)
    divisor = np.maximum(alpha, 1)
    for channel in range(3):
        levels = (pixels[..., channel] * np.uint16(255) + divisor // 2) // divisor
        result[..., channel] = np.where(alpha > 0, np.minimum(levels, 255), 0)
    return result
