"""Gradients that are not finite: replaced, as published, instead of spoiling the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from relay_diffusion.kernels import HAVE_TRITON

GRADIENT_LIMIT = 1e5  # what an infinite gradient becomes, as published


def replace_nonfinite(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Set gradients that are NaN to 0 and infinite ones to +-1e5, in place; the number of them, on the device.

    On a GPU one kernel reads all gradients once, and writes only what it replaces.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if HAVE_TRITON and all(_dense(gradient) for gradient in gradients):
        from relay_diffusion.kernels.nonfinite import replace_all

        return replace_all(gradients, GRADIENT_LIMIT)
    counts = [gradient.isfinite().logical_not_().sum() for gradient in gradients]
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=GRADIENT_LIMIT, neginf=-GRADIENT_LIMIT)
    return torch.stack(counts).sum()


def _dense(gradient: Tensor) -> bool:
    """Whether its memory can be walked through from end to end, in whatever order."""
    whole = gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.is_cuda and gradient.dtype == torch.float32 and whole
