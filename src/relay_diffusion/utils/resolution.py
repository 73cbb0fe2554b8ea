"""Sizes of images: one number for squares, or [height, width]."""

from __future__ import annotations

import math
from collections.abc import Sequence

from relay_diffusion.utils.messages import shorten

MIN_SIDE = 8  # pixels of images to enlarge or to convert
MAX_SIDE = 2**14  # pixels: a damaged config must not exhaust time or memory
MAX_PIXELS = 89_478_485  # of an image: Pillow's limit against decompression bombs

Resolution = int | Sequence[int]
"""Side of square images in pixels, or [height, width]."""

Size = tuple[int, int]
"""Height and width in pixels."""


def image_size(resolution: Resolution, option: str = "resolution", least: int = 1) -> Size:
    """Return the height and width of a resolution.

    Raises ValueError naming `option` unless both are integers from `least` to MAX_SIDE, at most MAX_PIXELS together.
    """
    sides = list(resolution) if isinstance(resolution, Sequence) else [resolution] * 2
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"{option}={shorten(resolution)}: must be a whole number, or [height, width]")
    if not all(least <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"{option}={shorten(resolution)}: must lie between {least} and {MAX_SIDE:,}")
    size = sides[0], sides[1]
    if limits := exceeded_limits(size):
        raise ValueError(f"{option}={shorten(resolution)}: {limits}; use smaller sides")
    return size


def exceeded_limits(size: Size) -> str | None:
    """Return the limits of an image that is too large, for messages.

    None if it is not.
    """
    if max(size) <= MAX_SIDE and math.prod(size) <= MAX_PIXELS:
        return None
    return f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} on a side are supported"


def resolution_of(size: Sequence[int]) -> int | list[int]:
    """Return (height, width) as in settings: squares as one number."""
    height, width = size
    return height if height == width else [height, width]


def size_text(size: Sequence[int]) -> str:
    """Return (height, width) as in messages: "64x64", "96x64 (width x height)"."""
    height, width = size
    return f"{width}x{height}" + ("" if height == width else " (width x height)")
