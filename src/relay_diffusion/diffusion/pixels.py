"""Conversion between uint8 and [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 [-1, 1]: x / 127.5 - 1.

    Any shape, same device; float32 stays.
    """
    if images.dtype == torch.float32:
        return images
    assert images.dtype == torch.uint8, f"expected uint8 images, got {images.dtype}"
    return (images / 127.5).sub_(1)  # in place: allocating memory costs more than the arithmetic


ROUNDING = {"nearest": 128.0, "floor": 127.5}
"""Offsets of the conversion from [-1, 1] to 0..255: EDM's floor(127.5 x + 128), ADM's floor(127.5 x + 127.5)."""


def to_uint8(images: Tensor, rounding: str = "nearest") -> Tensor:
    """Convert floats in [-1, 1] to uint8.

    127.5 x + ROUNDING, clamped to 0..255, then truncated; any shape, same device.
    """
    return (images.to(torch.float32) * 127.5).add_(ROUNDING[rounding]).clip_(0, 255).to(torch.uint8)
