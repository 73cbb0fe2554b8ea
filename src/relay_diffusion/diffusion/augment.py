"""EDM's geometric augmentation with augmentation labels.

Random flips, scaling, rotation, stretching and translation: Karras et al. 2022 (arXiv 2206.00364), appendix F.2.
Images are resampled as in Karras et al. 2020 (arXiv 2006.06676), appendix B.2. Sampling with all labels 0 gives
images without augmentation.

Coordinates are pixels: x to the right, y down, the origin at the image's center, whole numbers between pixel centers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LABEL_NAMES = (
    "x_flip",
    "y_flip",
    "scale",
    "rotation_cos",
    "rotation_sin",
    "anisotropy_x",
    "anisotropy_y",
    "translation_x",
    "translation_y",
)
LABELS = len(LABEL_NAMES)
FIRST_RESAMPLED = LABEL_NAMES.index("scale")  # earlier labels are exact flips, without resampling

# Low-pass filter of the symlet wavelet with 6 vanishing moments: sum sqrt(2), orthonormal to its shifts by 2, 4, ...
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
TAPS = len(SYM6)
EVEN, ODD = SYM6[0::2], SYM6[1::2]
# Center of mass of the filter: filtering shifts a signal by so many samples (exactly, up to degree 2).
CENTER = sum(tap * weight for tap, weight in enumerate(SYM6)) / math.sqrt(2)
MARGIN = TAPS // 4  # reach of the filter to either side, in pixels


class Parameters(NamedTuple):
    """Transformation parameters a0..a7 of each image, all [B]; zeros are the identity."""

    x_flip: Tensor  # a0, bool
    y_flip: Tensor  # a1, bool
    scale: Tensor  # a2: exponent
    rotation: Tensor  # a3: radians, counter-clockwise as seen
    direction: Tensor  # a4: radians counter-clockwise as seen, the axis along which `stretch` acts
    stretch: Tensor  # a5: exponent
    right: Tensor  # a6: in units of `translation` widths
    down: Tensor  # a7: in units of `translation` heights

    def labels(self) -> Tensor:
        """Return the augmentation labels: [B,9], the columns of LABEL_NAMES."""
        columns = [
            self.x_flip,
            self.y_flip,
            self.scale,
            torch.cos(self.rotation) - 1,
            torch.sin(self.rotation),
            self.stretch * torch.cos(self.direction),
            self.stretch * torch.sin(self.direction),
            self.right,
            self.down,
        ]
        return torch.stack([column.float() for column in columns], dim=1)


class Augmentation:
    """Random geometric transformation of training images.

    probability: of each transformation, independently: y-flip (then applied with probability 1/2), scaling, rotation,
    anisotropic scaling, translation; 0 disables all.
    x_flip: mirror each image with probability 1/2, at any `probability` above 0.
    scale_base: images are scaled by scale_base^a, a ~ N(0,1).
    anisotropy_base: images are scaled by anisotropy_base^a along one axis, by the inverse across it.
    anisotropy_axis_aligned: share of these along x, the others in any direction.
    translation: standard deviation of the shift, in image widths and heights.
    Images are mirrored at their borders, about the centers of the border pixels. An image whose labels are all 0 is
    bit-identical. Random numbers come from the global generator of the images' device.
    Raises ValueError for an option out of range.
    """

    def __init__(
        self,
        probability: float = 0.12,
        x_flip: bool = True,
        scale_base: float = 2**0.2,
        anisotropy_base: float = 2**0.2,
        anisotropy_axis_aligned: float = 0.5,
        translation: float = 1 / 8,
    ) -> None:
        for name, value in (("probability", probability), ("anisotropy_axis_aligned", anisotropy_axis_aligned)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must lie between 0 and 1")
        # at these limits a transformation is the identity, but its labels would not be 0
        limits = (
            ("scale_base", scale_base, 1),
            ("anisotropy_base", anisotropy_base, 1),
            ("translation", translation, 0),
        )
        for name, value, limit in limits:
            if not limit < value < math.inf:
                raise ValueError(f"{name}={value}: must be above {limit} and finite")
        self.probability, self.x_flip = probability, x_flip
        self.scale_base, self.anisotropy_base = scale_base, anisotropy_base
        self.anisotropy_axis_aligned, self.translation = anisotropy_axis_aligned, translation
        self.labels = LABELS

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Transform images at random and return their labels.

        float32 [B,C,H,W] -> images of the same shape, labels [B,9]. Raises ValueError for another dtype or shape.
        """
        if images.dtype != torch.float32 or images.ndim != 4 or min(images.shape[2:]) < 2:
            shape = tuple(images.shape)
            raise ValueError(f"images is {images.dtype} {shape}: need float32 images [B,C,H,W] of 2x2 pixels or more")
        parameters = self.draw(len(images), images.device)
        return images if self.probability == 0 else self.apply(images, parameters), parameters.labels()

    def draw(self, count: int, device: torch.device | str = "cpu") -> Parameters:
        """Draw the transformation parameters of `count` images."""
        applied = torch.rand(5, count, device=device) < self.probability
        x_coin, y_coin = torch.rand(2, count, device=device) < 0.5
        rotation, direction = (torch.rand(2, count, device=device) * 2 - 1) * math.pi
        slanted = torch.rand(count, device=device) >= self.anisotropy_axis_aligned
        scale, stretch, right, down = torch.randn(4, count, device=device)
        y_flipped, scaled, rotated, stretched, shifted = applied
        return Parameters(
            x_flip=x_coin if self.x_flip and self.probability > 0 else torch.zeros_like(x_coin),
            y_flip=y_coin & y_flipped,
            scale=torch.where(scaled, scale, 0.0),
            rotation=torch.where(rotated, rotation, 0.0),
            direction=torch.where(stretched & slanted, direction, 0.0),
            stretch=torch.where(stretched, stretch, 0.0),
            right=torch.where(shifted, right, 0.0),
            down=torch.where(shifted, down, 0.0),
        )

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Transform images, float32 [B,C,H,W], with given parameters [B]."""
        images = flip(images, parameters)
        with torch.autocast(images.device.type, enabled=False):  # positions in bfloat16 would be off by pixels
            # warp the whole batch: selecting images would synchronize with the device
            warped = warp(images, self.matrix(parameters, *images.shape[2:]))
        moved = (parameters.labels()[:, FIRST_RESAMPLED:] != 0).any(dim=1)
        return torch.where(_per_image(moved), warped, images)

    def matrix(self, parameters: Parameters, height: int, width: int) -> Tensor:
        """Compute the affine matrix [B,2,3]: scaling, rotation, anisotropy, then translation.

        Flips are not part of it.
        """
        scale, spread = self.scale_base**parameters.scale, self.anisotropy_base**parameters.stretch
        cos, sin = torch.cos(parameters.rotation) * scale, torch.sin(parameters.rotation) * scale
        ux, uy = torch.cos(parameters.direction), -torch.sin(parameters.direction)
        # spread u u^T + (1 - u u^T) / spread = rotate(a4) diag(spread, 1 / spread) rotate(-a4), as published
        extra = spread - 1 / spread
        xx, xy, yy = extra * ux * ux + 1 / spread, extra * ux * uy, extra * uy * uy + 1 / spread
        x_shift, y_shift = parameters.right * (self.translation * width), parameters.down * (self.translation * height)
        # times [[cos, sin], [-sin, cos]], written out because `@` could run in TF32 and shift pixels
        first = torch.stack([xx * cos - xy * sin, xx * sin + xy * cos, x_shift], dim=1)
        second = torch.stack([xy * cos - yy * sin, xy * sin + yy * cos, y_shift], dim=1)
        return torch.stack([first, second], dim=1)


def flip(images: Tensor, parameters: Parameters) -> Tensor:
    """Mirror the selected images of a batch [B,C,H,W] exactly."""
    images = torch.where(_per_image(parameters.x_flip), images.flip(3), images)
    return torch.where(_per_image(parameters.y_flip), images.flip(2), images)


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Resample images [B,C,H,W] under an affine map.

    matrix M [B,2,3]: point p moves to M [p; 1], in pixels from the center, y down.
    Both axes are doubled with the wavelet's filter, sampled bilinearly where the inverse points, filtered with the
    same filter reversed and halved: its orthonormality makes that exact for the identity.
    """
    height, width = images.shape[2:]
    (a, b, right), (c, d, down) = (row.unbind(1) for row in matrix[..., None, None].unbind(1))  # each [B,1,1]
    x, y = _to_halve(width, images.device) - right, _to_halve(height, images.device)[:, None] - down
    determinant = a * d - b * c
    source_x = (d / determinant) * x - (b / determinant) * y
    source_y = (a / determinant) * y - (c / determinant) * x
    grid = torch.stack([_in_doubled(source_x, width), _in_doubled(source_y, height)], dim=-1)
    doubled = _double(_double(images, 2), 3)
    return _halve(_halve(F.grid_sample(doubled, grid, mode="bilinear", align_corners=True), 2), 3)


def _to_halve(size: int, device: torch.device) -> Tensor:
    """Return the positions of the samples that `_halve` needs.

    [2 size + 10], in pixels from the center.
    """
    return (torch.arange(2 * size + TAPS - 2, device=device) - CENTER) / 2 - (size - 1) / 2


def _in_doubled(position: Tensor, size: int) -> Tensor:
    """Convert positions from the center to grid_sample's coordinates in `_double`.

    -1 is the first sample, 1 the last.
    """
    pixel = position + (size - 1) / 2
    # near the border, `_double` has filtered mirrored pixels; beyond it, samples are mirrored, which is slightly less
    # exact because the filter is not symmetric
    near = position.abs() <= (size - 1) / 2 + MARGIN
    pixel = torch.where(near, pixel, _mirror(pixel, size))
    sample = 2 * (pixel + MARGIN) - (2 * MARGIN - 1) + CENTER
    return sample * (2 / (2 * (size + 2 * MARGIN) - 1)) - 1


def _mirror(pixel: Tensor, size: int) -> Tensor:
    """Map any pixel index to 0..size-1 by mirroring at both ends."""
    return (size - 1) - (pixel % (2 * (size - 1)) - (size - 1)).abs()


def _double(images: Tensor, dim: int) -> Tensor:
    """Double the resolution: extend by MARGIN, insert zeros, filter, multiply by sqrt(2).

    size -> 2 (size + 2 MARGIN). Sample j lies at pixel (j + 2 MARGIN - 1 - CENTER) / 2 - MARGIN: all taps of the first
    sample are inside the padding.
    """
    size, half = images.shape[dim], TAPS // 2
    index = torch.arange(-2 * MARGIN, size + 2 * MARGIN, device=images.device)
    padded = images.index_select(dim, _mirror(index, size))
    # each sample uses every second tap only (the others meet zeros), in the reversed order of a convolution
    parts = [padded.narrow(dim, half - tap, size + 2 * MARGIN) for tap in range(half + 1)]
    samples = [_weighted_sum(parts[1:], ODD), _weighted_sum(parts[:-1], EVEN)]
    return torch.stack(samples, dim + 1).flatten(dim, dim + 1).mul_(math.sqrt(2))


def _halve(samples: Tensor, dim: int) -> Tensor:
    """Halve the resolution: filter reversed, divide by sqrt(2), keep every second sample.

    2 size + 10 -> size.
    """
    pairs = samples.unflatten(dim, (-1, 2)).unbind(dim + 1)
    size, half = pairs[0].shape[dim] - TAPS // 2 + 1, TAPS // 2
    parts = [phase.narrow(dim, tap, size) for phase in pairs for tap in range(half)]
    return _weighted_sum(parts, EVEN + ODD).div_(math.sqrt(2))


def _weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum weights times parts in float32.

    A convolution could run in TF32 on a GPU.
    """
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
