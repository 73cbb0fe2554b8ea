"""Checks and shapes of the tensors that corruptions, samplers and networks take."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 2**21  # pixels of images whose temporary tensors count: 16 MB in float64


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B,1,1,1] on the device of `like`.

    sigma may be on the CPU: computing a few numbers there is faster than launching GPU kernels, and the copy is
    asynchronous.
    """
    return sigma.view(-1, 1, 1, 1).to(like.device, non_blocking=True)


def noise_levels(sigma: Tensor | float, count: int) -> Tensor:
    """Expand noise levels to `count` images without copying.

    A number, tensor [] or tensor [B] -> [B]. Raises ValueError for another type, dtype or shape, and for a number that
    is not above 0 and finite. Values of tensors are not checked, because that would synchronize with the device.
    """
    if not isinstance(sigma, Tensor):
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma is {sigma!r}: must be a number above 0, or a tensor of floats [{count}]")
        return torch.full((count,), float(sigma), device="cpu")
    levels = sigma.expand(count) if sigma.ndim == 0 else sigma
    if levels.shape != (count,) or not levels.is_floating_point():
        raise ValueError(f"sigma is {sigma.dtype} of shape {tuple(sigma.shape)}: must be floats, one or [{count}]")
    return levels


def by_channel(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """Apply a function of images [B,C,H,W] that treats channels alike.

    Channel by channel for large images on the CPU, so that temporary tensors are those of one channel.
    """
    first = images[0]
    if first.device.type != "cpu" or first.shape[2] * first.shape[3] < LARGE:
        return function(*images)
    result: Tensor | None = None
    for channel in range(first.shape[1]):
        part = function(*(image[:, channel : channel + 1] for image in images))
        if result is None:
            result = torch.empty(first.shape, dtype=part.dtype)
        result[:, channel : channel + 1] = part
    assert result is not None
    return result


def check_images(name: str, images: Tensor) -> None:
    """Raise ValueError unless images are floats [B,C,H,W].

    name: the argument in the message. Values are not checked.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        given = (
            f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        )
        raise ValueError(f"{name} is {given}: must be floats [B,C,H,W]; uint8 images become such by pixels / 127.5 - 1")
