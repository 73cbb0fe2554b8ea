"""Agreement of enlarged images with the images that they start from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relay_diffusion.data.image_sets import ImageSet
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.utils.parallel import map_in_order


def difference(enlarged: Tensor, start: Tensor) -> Tensor:
    """Subtract the start from the block means, in gray levels.

    enlarged uint8 [B,C,H,W], start uint8 or float in [-1, 1] [C,h,w] or [B,C,h,w] -> float [B,C,h,w]. H and W are the
    same multiple of h and w.
    """
    levels = start.float() if start.dtype == torch.uint8 else (start + 1) * 127.5
    return block_mean(enlarged.float(), enlarged.shape[-1] // start.shape[-1]) - levels


def block_mean_error(plan: Plan, images: ImageSet) -> float:
    """Compute the RMS error of the block means in gray levels.

    Over all images of a plan, which has starting images. images: the written 8-bit images, in the order of the plan.
    """
    assert plan.start is not None
    squares, count = 0.0, 0
    starts = map_in_order(plan.start.__getitem__, plan.seeds)
    for enlarged, (start, _) in zip(images.batches(1), starts, strict=True):
        error = difference(enlarged, start).double()
        squares, count = squares + float(error.square().sum()), count + error.numel()
    return math.sqrt(squares / count)
